"""What is searched: places and map of ranges and of a single temperature, their ends, and the model's coordinates."""

import numpy as np
import pytest

from analysis.surrogate.kernel import coordinates
from analysis.surrogate.search_space import DEFAULT_SPACE, RangeEnd, SearchSpace

AT_TWO = SearchSpace(kl_temperature=(2.0, 2.0))


@pytest.mark.parametrize("space", [DEFAULT_SPACE, AT_TWO, SearchSpace((3.0, 30.0), (0.5, 8.0))])
def test_the_map_reaches_every_end_and_its_places_lead_back(space: SearchSpace) -> None:
    weights, temperatures = space.grid()
    assert len(weights) == 13 * (1 if space.single_temperature else 5)
    assert (weights.min(), weights.max()) == pytest.approx(space.beta_kl)
    assert (temperatures.min(), temperatures.max()) == space.kl_temperature
    assert all(space.contains(*point) for point in zip(weights[1:-1], temperatures[1:-1], strict=True))
    places = space.to_unit(weights, temperatures)
    assert np.isfinite(places).all()
    assert (places.min(), places.max()) == pytest.approx((0, 1))
    np.testing.assert_allclose(space.from_unit(places), (weights, temperatures))


def test_it_reads_as_ranges_and_a_single_temperature_as_one_number() -> None:
    assert str(DEFAULT_SPACE) == "beta_kl 0.001–2, kl_temperature 1–4"
    assert str(SearchSpace((1e-5, 0.25), (2.5, 2.5))) == "beta_kl 1e-05–0.25, kl_temperature 2.5"


@pytest.mark.parametrize(
    ("pick", "ran", "ends"),
    [
        ((0.3, 2.0), [(0.1, 1.0)], []),
        ((2.0, 2.0), [(0.1, 1.0)], [("beta_kl", "upper")]),
        ((1.5, 2.0), [(0.1, 1.0)], [("beta_kl", "upper")]),
        ((1.3, 2.0), [(0.1, 1.0)], []),
        ((1.5, 2.0), [(1.9, 3.0)], []),
        ((0.0011, 2.0), [(0.1, 1.5)], [("beta_kl", "lower")]),
        ((0.3, 1.0), [(0.1, 1.0)], [("kl_temperature", "lower")]),
        ((0.3, 3.9), [(0.1, 1.0)], [("kl_temperature", "upper")]),
        ((0.3, 3.9), [(0.1, 4.0)], []),
        ((1.9, 4.0), [(0.1, 1.0)], [("beta_kl", "upper"), ("kl_temperature", "upper")]),
        ((3.0, 2.0), [(0.1, 1.0)], []),
    ],
)
def test_a_pick_sits_at_an_end_where_it_is_near_and_nothing_that_ran_is_nearer(
    pick: tuple[float, float], ran: list[tuple[float, float]], ends: list[tuple[str, str]]
) -> None:
    found = DEFAULT_SPACE.ends_at(pick, [pick, *ran])
    assert [(end.parameter, end.side) for end in found] == ends


def test_a_single_temperature_has_no_ends() -> None:
    assert AT_TWO.ends_at((0.3, 2.0), [(0.3, 2.0)]) == ()
    assert AT_TWO.ends_at((2.0, 2.0), [(2.0, 2.0)]) == (RangeEnd("beta_kl", "upper"),)


def test_a_range_is_widened_at_its_ends_alone() -> None:
    assert DEFAULT_SPACE.widened([RangeEnd("beta_kl", "upper")]) == SearchSpace((0.001, 20.0), (1.0, 4.0))
    both = [RangeEnd("beta_kl", "lower"), RangeEnd("kl_temperature", "lower")]
    assert DEFAULT_SPACE.widened(both) == SearchSpace((0.0001, 2.0), (0.5, 4.0))
    assert DEFAULT_SPACE.widened([RangeEnd("kl_temperature", "upper")]) == SearchSpace((0.001, 2.0), (1.0, 8.0))


def test_coordinates_of_the_default_space_are_as_the_priors_were_chosen_for() -> None:
    beta, heat = np.geomspace(1e-3, 2, 50), np.linspace(1, 4, 50)
    weight = np.log1p(beta / 1e-4) / np.log1p(2.0 / 1e-4)
    assert (coordinates(beta, heat) == np.stack([weight, weight * (heat - 1) / 3], axis=1)).all()


@pytest.mark.parametrize("space", [SearchSpace((0.1, 50.0), (1.0, 9.0)), SearchSpace((1e-3, 0.01), (1.0, 1.0))])
def test_a_change_of_weight_or_temperature_counts_alike_whatever_is_searched(space: SearchSpace) -> None:
    beta, heat = [0.0, 0.003, 0.3, 5.0], [1.0, 2.0, 3.0, 1.5]
    assert (coordinates(beta, heat, space) == coordinates(beta, heat)).all()


def test_the_smallest_weight_searched_stands_off_the_baseline_however_small() -> None:
    assert coordinates(1e-7, 1.0)[0, 0] < 1e-3
    for low in (1e-3, 1e-5, 1e-7):
        space = SearchSpace((low, 1e-2))
        at_zero, at_low = coordinates([0.0, low], 1.0, space)[:, 0]
        assert at_zero == 0
        assert at_low == pytest.approx(0.242, abs=1e-3)


def test_a_single_temperature_leaves_a_model_of_the_weight_alone() -> None:
    assert (coordinates([0.0, 0.1, 2.0], [1.0, 2.0, 2.0], AT_TWO)[:, 1] == 0).all()
