"""The order of packs: a pure function of the seed and the sample, in constant memory."""

from collections.abc import Sequence

import numpy as np

MIX_PERIOD = 10_000  # consecutive samples in which a mixture is exact
ROUNDS = 6
WINDOW = 4096  # draws that are computed at once
_M = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def scramble(value: np.ndarray) -> np.ndarray:
    """Mix the bits of uint64 values (SplitMix64's finaliser, Steele et al. 2014)."""
    value = (value ^ (value >> np.uint64(30))) * _M[0]
    value = (value ^ (value >> np.uint64(27))) * _M[1]
    return value ^ (value >> np.uint64(31))


class Permutation:
    """A shuffle of 0..n-1 that is computed, not stored: a Feistel network over the next power of two.

    Values outside 0..n-1 are permuted again until they are inside (cycle walking; Black and Rogaway 2002).
    """

    def __init__(self, n: int, *keys: int) -> None:
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self.low = np.uint64(bits // 2)
        self.masks = (np.uint64((1 << (bits - bits // 2)) - 1), np.uint64((1 << bits // 2) - 1))
        state = np.zeros(1, dtype=np.uint64)
        for key in keys:
            state = scramble(state * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key) + np.uint64(1))
        self.keys = scramble(state + np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """Return the values at places; int64 (N,) to int64 (N,)."""
        values = self._once(places.astype(np.uint64))
        while (outside := values >= self.n).any():
            values[outside] = self._once(values[outside])
        return values.astype(np.int64)

    def _once(self, values: np.ndarray) -> np.ndarray:
        high, low = values >> self.low, values & self.masks[1]
        for i, key in enumerate(self.keys):  # the halves may differ by a bit, so each is masked to its own width
            if i % 2 == 0:
                high = (high ^ scramble(low ^ key)) & self.masks[0]
            else:
                low = (low ^ scramble(high ^ key)) & self.masks[1]
        return (high << self.low) | low


class Pool:
    """Packs that are shuffled together, anew in each epoch, without end."""

    def __init__(self, n_packs: int, *keys: int) -> None:
        self.n_packs, self.keys = n_packs, keys
        self.window, self.found = -1, np.zeros(0, dtype=np.int64)

    def packs(self, draws: np.ndarray) -> np.ndarray:
        """Return the packs of draws, of which the first is draw 0; int64 (N,) to int64 (N,)."""
        windows = draws // WINDOW
        found = np.empty_like(draws)
        for window in sorted(set(windows.tolist())):
            if window != self.window:
                self.window, self.found = window, self._of_window(window)
            here = windows == window
            found[here] = self.found[draws[here] - window * WINDOW]
        return found

    def _of_window(self, window: int) -> np.ndarray:
        draws = np.arange(window * WINDOW, (window + 1) * WINDOW)
        epochs, places = np.divmod(draws, self.n_packs)
        found = np.empty_like(draws)
        for epoch in np.unique(epochs).tolist():
            now = epochs == epoch
            found[now] = Permutation(self.n_packs, *self.keys, epoch)(places[now])
        return found


class Mixture:
    """Draws from pools in exact proportions: any `MIX_PERIOD` samples in a row hold the same number of each.

    One arrangement is repeated, in which each pool's turns are spread as evenly as possible.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        shares = np.array(weights, dtype=np.float64) / np.sum(weights)
        exact = shares * MIX_PERIOD
        self.counts = np.maximum(np.floor(exact), shares > 0).astype(np.int64)  # each with a weight is drawn
        by_rest = np.argsort(self.counts - exact, kind="stable")
        while (missing := MIX_PERIOD - int(self.counts.sum())) > 0:
            self.counts[by_rest[:missing]] += 1
        while (over := int(self.counts.sum()) - MIX_PERIOD) > 0:
            self.counts[np.argmax(self.counts)] -= over
        turns = [(np.arange(count) + 0.5) / count for count in self.counts.tolist() if count]
        pools = np.repeat(np.arange(len(self.counts)), self.counts)
        order = np.argsort(np.concatenate(turns), kind="stable")
        self.pool = pools[order]
        self.turn = np.concatenate([np.arange(count) for count in self.counts.tolist()])[order]

    def draws(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return each sample's pool and its draw from it."""
        periods, places = np.divmod(samples, MIX_PERIOD)
        pools = self.pool[places]
        return pools, periods * self.counts[pools] + self.turn[places]

    def drawn(self, samples: int) -> np.ndarray:
        """Return the number of draws from each pool in the first `samples`."""
        periods, rest = divmod(samples, MIX_PERIOD)
        return periods * self.counts + np.bincount(self.pool[:rest], minlength=len(self.counts))
