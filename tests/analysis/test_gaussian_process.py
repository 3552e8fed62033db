"""The Gaussian process: against conditioning written out by hand, and its invariances."""

from dataclasses import replace

import numpy as np
import pytest

from analysis.surrogate.gaussian_process import Mixture, fit
from analysis.surrogate.kernel import DRIFT_PRIOR, REROUTE_PRIOR, coordinates, observed_covariance

X = coordinates([0.0, 0.0, 0.1, 0.3, 0.5, 1.5], [1.0, 1.0, 1.0, 1.0, 2.0, 4.0])
SEED = np.array([0, 1, 0, 1, 0, 1])
Y = np.array([0.0, 0.01, 0.02, 0.05, 0.11, 0.30])


def covariance(a: np.ndarray, b: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Signal covariance in the plain textbook form, one pair at a time."""
    lengths, signal = np.exp(theta[:2]), np.exp(theta[2])
    table = np.empty((len(a), len(b)))
    for i, p in enumerate(a):
        for j, q in enumerate(b):
            r = np.sqrt(5 * np.sum(((p - q) / lengths) ** 2))
            table[i, j] = signal**2 * ((1 + r + r**2 / 3) * np.exp(-r) + 4 * p[0] * q[0])
    return table


def test_coordinates_put_every_baseline_at_one_point_and_span_the_search_space() -> None:
    x = coordinates([0.0, 0.0, 2.0], [1.0, 4.0, 4.0])
    assert x.tolist() == [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    assert 0.2 < coordinates(1e-3, 1.0)[0, 0] < 0.3


def test_value_and_difference_equal_conditioning_by_hand() -> None:
    posterior = fit(X, SEED, Y, REROUTE_PRIOR)
    points, reference = coordinates([0.2, 0.9], [1.5, 3.0]), X[0]
    theta, n = posterior.theta[3], len(Y)
    seed_sd, noise_sd = np.exp(theta[3:5])
    observed = covariance(X, X, theta) + REROUTE_PRIOR.level**2
    observed += seed_sd**2 * (SEED[:, None] == SEED) + noise_sd**2 * np.eye(n)
    stacked = np.concatenate([points, reference[None]])
    cross = covariance(stacked, X, theta) + REROUTE_PRIOR.level**2
    joint_mean = Y.mean() + cross @ np.linalg.solve(observed, Y - Y.mean())
    joint = covariance(stacked, stacked, theta) + REROUTE_PRIOR.level**2 - cross @ np.linalg.solve(observed, cross.T)
    contrast = np.array([[1.0, 0.0, -1.0], [0.0, 1.0, -1.0]])
    expected_covariance = contrast @ joint @ contrast.T

    value, difference = posterior.value(points), posterior.difference(points, reference)
    np.testing.assert_allclose(value.mean[3], joint_mean[:2], rtol=1e-5)
    np.testing.assert_allclose(value.sd[3], np.sqrt(np.diag(joint))[:2], rtol=1e-3)
    np.testing.assert_allclose(difference.mean[3], contrast @ joint_mean, rtol=1e-5)
    np.testing.assert_allclose(difference.sd[3], np.sqrt(np.diag(expected_covariance)), rtol=1e-3)


def test_quantiles_of_one_normal_are_the_known_ones() -> None:
    normal = Mixture(np.array([[1.0]]), np.array([[2.0]]), np.array([1.0]))
    assert normal.quantile(0.975)[0] == pytest.approx(1 + 2 * 1.959964, abs=1e-5)
    assert normal.probability_below(1.0)[0] == pytest.approx(0.5)


def test_quantile_inverts_probability_in_a_mixture() -> None:
    mixture = Mixture(np.array([[0.0], [3.0]]), np.array([[1.0], [0.2]]), np.array([0.4, 0.6]))
    for p in (0.025, 0.4, 0.5, 0.975):
        assert mixture.probability_below(mixture.quantile(p))[0] == pytest.approx(p, abs=1e-6)


def test_probability_rises_with_the_limit() -> None:
    lost = fit(X, SEED, Y, REROUTE_PRIOR).difference(X[2:], X[0])
    table = np.array([lost.probability_below(limit) for limit in np.linspace(-0.2, 0.5, 30)])
    assert (np.diff(table, axis=0) >= 0).all(), table


def test_same_data_give_the_same_posterior_in_any_order() -> None:
    order = np.array([4, 0, 5, 2, 1, 3])
    once = fit(X, SEED, Y, REROUTE_PRIOR).difference(X[2:], X[0])
    again = fit(X, SEED, Y, REROUTE_PRIOR).difference(X[2:], X[0])
    shuffled = fit(X[order], SEED[order] + 7, Y[order], REROUTE_PRIOR).difference(X[2:], X[0])
    assert np.array_equal(once.mean, again.mean)
    np.testing.assert_allclose(shuffled.expectation(), once.expectation(), atol=1e-6)


def test_a_baseline_differs_from_itself_by_nothing() -> None:
    lost = fit(X, SEED, Y, REROUTE_PRIOR).difference(X[:1], X[0])
    assert abs(lost.expectation()[0]) < 1e-9
    assert lost.quantile(0.975)[0] < 1e-3


def test_noise_and_seed_effect_are_recovered_from_many_trials() -> None:
    rng = np.random.default_rng(1)
    n, seed_sd, noise_sd = 96, 0.04, 0.01
    seed = np.arange(n) % 12
    x = coordinates(np.exp(rng.uniform(np.log(1e-3), np.log(2), n)), rng.uniform(1, 4, n))
    y = 0.2 * x[:, 0] + seed_sd * rng.standard_normal(12)[seed] + noise_sd * rng.standard_normal(n)
    shared, own = fit(x, seed, y, REROUTE_PRIOR).seed_and_noise_variance()
    assert np.sqrt(shared) == pytest.approx(seed_sd, rel=0.5)
    assert np.sqrt(own) == pytest.approx(noise_sd, rel=0.25)


def test_one_observation_leaves_the_prior_wide() -> None:
    posterior = fit(X[:1], SEED[:1], np.array([2.2]), DRIFT_PRIOR)
    there, far = posterior.value(coordinates([0.0, 2.0], [1.0, 4.0])).quantile(0.975)
    assert there < far
    assert far > 4, far


def test_effective_draws_suffice_at_a_full_sweep() -> None:
    rng = np.random.default_rng(3)
    x = coordinates(np.r_[np.zeros(8), np.exp(rng.uniform(np.log(1e-3), np.log(2), 32))], rng.uniform(1, 4, 40))
    y = np.maximum(0, x[:, 0] - 0.7) + 0.005 * rng.standard_normal(40)
    weights = fit(x, np.arange(40) % 8, y, REROUTE_PRIOR).weights
    assert 1 / np.square(weights).sum() > 20, 1 / np.square(weights).sum()


def test_the_probability_of_qualifying_is_how_often_another_trial_proves_it() -> None:
    posterior = fit(X, SEED, Y, REROUTE_PRIOR, draws=1)
    points, limit, confidence, seed = coordinates([0.2, 0.195], [1.0, 1.0]), 0.033, 0.95, 1
    said = posterior.probability_of_qualifying(points, X[0], seed, limit, confidence)
    theta, rng, labels = posterior.theta, np.random.default_rng(0), np.append(SEED, seed)
    for point, probability in zip(points, said, strict=True):
        both = np.concatenate([X, point[None]])
        joint = observed_covariance(both, labels, theta, REROUTE_PRIOR.level)[0]
        weights = np.linalg.solve(joint[:-1, :-1], joint[:-1, -1])
        mean, variance = Y.mean() + weights @ (Y - Y.mean()), joint[-1, -1] - weights @ joint[:-1, -1]
        proved, known = 0, posterior.believing(point[None], [seed])
        for y in rng.normal(mean, np.sqrt(variance), 500):
            alpha = np.linalg.solve(joint, np.append(Y, y) - Y.mean())[None]
            after = replace(known, alpha=alpha)
            proved += bool(after.difference(point[None], X[0]).probability_below(limit)[0] >= confidence)
        assert probability == pytest.approx(proved / 500, abs=0.06), said
    assert 0.05 < said[0] < said[1] < 0.98, said


def test_believing_keeps_means_and_shrinks_spread_as_an_observation_does() -> None:
    posterior = fit(X, SEED, Y, REROUTE_PRIOR)
    point = coordinates(0.2, 1.5)
    believed = posterior.believing(point, [0])
    near, before = believed.value(point), posterior.value(point)
    np.testing.assert_allclose(near.mean, before.mean, rtol=1e-6)
    assert (near.sd < 0.9 * before.sd).any()
    assert (near.sd <= before.sd * (1 + 1e-6)).all()


def test_a_few_draws_stand_for_all_of_them() -> None:
    points = coordinates([0.01, 0.2, 0.9], [1.0, 2.0, 3.0])
    all_draws, few = (fit(X, SEED, Y, REROUTE_PRIOR, draws).difference(points, X[0]) for draws in (None, 64))
    np.testing.assert_allclose(few.probability_below(0.05), all_draws.probability_below(0.05), atol=0.05)


def test_of_many_observations_some_serve_for_the_hyper_parameters_and_all_for_the_rest() -> None:
    rng = np.random.default_rng(0)
    x, seed = np.tile(X, (40, 1)), np.tile(SEED, 40)
    y = np.tile(Y, 40) + rng.normal(0, 0.01, 240)
    posterior = fit(x, seed, y, REROUTE_PRIOR)
    assert posterior.whitening.shape[1:] == (240, 240)
    np.testing.assert_allclose(posterior.difference(X[2:], X[0]).expectation(), Y[2:] - Y[:2].mean(), atol=0.01)
    assert np.sqrt(posterior.seed_and_noise_variance()[1]) == pytest.approx(0.01, rel=0.3)
