"""The order of packs: each once per epoch, mixtures exact in any window, constant memory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.sampler import MIX_PERIOD, WINDOW, Mixture, Permutation, Pool


@given(st.integers(1, 5000), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_permutation_holds_every_value_once(n: int, key: int) -> None:
    assert sorted(Permutation(n, key)(np.arange(n)).tolist()) == list(range(n))


def test_permutation_is_a_shuffle() -> None:
    n = 20_000
    values = Permutation(n, 1)(np.arange(n))
    assert abs(np.corrcoef(np.arange(n), values)[0, 1]) < 0.02
    assert (np.abs(np.diff(values)) == 1).mean() < 0.001
    assert (Permutation(n, 2)(np.arange(n)) == values).mean() < 0.001, "another key, another order"
    firsts = [int(Permutation(8, key)(np.array([0]))[0]) for key in range(4000)]
    assert np.bincount(firsts).min() > 400, "each value comes first about as often: 500 of 4,000"


def test_permutation_of_2_to_the_40_needs_no_memory() -> None:
    places = np.array([0, 1, 2**40 - 1], dtype=np.int64)
    values = Permutation(2**40, 7)(places)
    assert len(set(values.tolist())) == 3 and values.max() < 2**40


@pytest.mark.parametrize("n_packs", [7, 2 * WINDOW + 3])
def test_each_epoch_is_another_order_of_all_packs(n_packs: int) -> None:
    drawn = Pool(n_packs, 5).packs(np.arange(3 * n_packs))
    epochs = drawn.reshape(3, n_packs)
    assert all(sorted(epoch.tolist()) == list(range(n_packs)) for epoch in epochs)
    assert n_packs <= 7 or not (epochs[0] == epochs[1]).all()
    backwards = np.arange(3 * n_packs)[::-1]
    assert (Pool(n_packs, 5).packs(backwards) == drawn[::-1]).all(), "a draw does not depend on those before it"


@given(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=1, max_size=22).filter(lambda w: sum(w) > 0),
    st.integers(0, 5 * MIX_PERIOD),
)
@settings(max_examples=20, deadline=None)
def test_any_window_holds_the_same_number_of_each_source(weights: list[float], start: int) -> None:
    mixture = Mixture(weights)
    pools, draws = mixture.draws(np.arange(start, start + MIX_PERIOD))
    counts = np.bincount(pools, minlength=len(weights))
    exact = np.array(weights) / sum(weights) * MIX_PERIOD
    assert counts.sum() == MIX_PERIOD and (np.abs(counts - exact) <= len(weights)).all()
    assert ((counts > 0) == (np.array(weights) > 0)).all()
    assert (counts == mixture.counts).all()
    before = mixture.drawn(start)
    for pool in range(len(weights)):
        assert draws[pools == pool].tolist() == list(range(before[pool], before[pool] + counts[pool]))
