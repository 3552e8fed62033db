"""Which trials the model rests on where there are many: some of every kind, settings whole, and the newest."""

import pandas as pd
import pytest

from analysis.surrogate.surrogate import modelled


def trials(baselines: int, repeated: int, others: int) -> pd.DataFrame:
    """Baselines, settings on two seeds each, and then settings on one, in the order in which they ran."""
    settings = [(0.0, seed) for seed in range(baselines)]
    settings += [(1 + number, seed) for number in range(repeated) for seed in range(2)]
    settings += [(1000 + number, 0) for number in range(others)]
    return pd.DataFrame(settings, columns=["beta_kl", "seed"]).assign(kl_temperature=1.0)


def test_all_are_taken_as_long_as_there_is_room():
    few = trials(3, 10, 10)
    pd.testing.assert_frame_equal(modelled(few, len(few)), few)


@pytest.mark.parametrize(
    ("baselines", "repeated", "others", "expected"),
    [
        (3, 40, 60, (3, 30, 31)),  # what is new is seen beside what is repeated
        (70, 0, 20, (16, 0, 20)),
        (3, 60, 5, (3, 56, 5)),  # room that the others leave
        (3, 2, 100, (3, 4, 57)),
        (3, 0, 100, (3, 0, 61)),
        (3, 100, 0, (3, 60, 0)),
    ],
)
def test_of_many_some_of_every_kind_are_taken(baselines, repeated, others, expected):
    rows = trials(baselines, repeated, others)
    taken = modelled(rows, 64)
    assert taken.index.is_monotonic_increasing
    assert not taken.index.has_duplicates
    seeds = taken[taken.beta_kl > 0].groupby("beta_kl").size()
    assert (seeds[seeds.index < 1000] == 2).all(), "a repeated setting is taken whole"
    counts = (taken.beta_kl == 0).sum(), seeds[seeds.index < 1000].sum(), (seeds.index >= 1000).sum()
    assert counts == expected
    if others:
        assert rows.index[-1] in taken.index
