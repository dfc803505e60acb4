"""The order of packs: a pure function of seed and sample index, in constant memory."""

from collections.abc import Sequence

import numpy as np

MIX_PERIOD = 10_000  # samples after which the order of sources repeats
ROUNDS = 6
WINDOW = 4096  # draws computed at once
_M = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def scramble(value: np.ndarray) -> np.ndarray:
    """Mix the bits of uint64 values (SplitMix64's finaliser, Steele et al. 2014)."""
    value = (value ^ (value >> np.uint64(30))) * _M[0]
    value = (value ^ (value >> np.uint64(27))) * _M[1]
    return value ^ (value >> np.uint64(31))


class Permutation:
    """A pseudorandom permutation of 0..n-1 in constant memory: a Feistel network over the next power of two.

    Values outside 0..n-1 are permuted again until they are inside (cycle walking, Black and Rogaway 2002).
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
        """Permute indices; int64 (N,) to int64 (N,)."""
        values = self._once(places.astype(np.uint64))
        while (outside := values >= self.n).any():
            values[outside] = self._once(values[outside])
        return values.astype(np.int64)

    def _once(self, values: np.ndarray) -> np.ndarray:
        high, low = values >> self.low, values & self.masks[1]
        for i, key in enumerate(self.keys):  # the halves may differ by one bit in width
            if i % 2 == 0:
                high = (high ^ scramble(low ^ key)) & self.masks[0]
            else:
                low = (low ^ scramble(high ^ key)) & self.masks[1]
        return (high << self.low) | low


class Pool:
    """An endless sequence of packs, reshuffled in every epoch."""

    def __init__(self, n_packs: int, *keys: int) -> None:
        self.n_packs, self.keys = n_packs, keys
        self.window, self.found = -1, np.zeros(0, dtype=np.int64)

    def packs(self, draws: np.ndarray) -> np.ndarray:
        """Return the pack of each draw, counted from 0; int64 (N,) to int64 (N,)."""
        windows, found = draws // WINDOW, np.empty_like(draws)
        for window in np.unique(windows).tolist():
            if window != self.window:
                epochs, places = np.divmod(np.arange(window * WINDOW, (window + 1) * WINDOW), self.n_packs)
                by_epoch = [(e, places[epochs == e]) for e in np.unique(epochs).tolist()]
                orders = [Permutation(self.n_packs, *self.keys, epoch)(some) for epoch, some in by_epoch]
                self.window, self.found = window, np.concatenate(orders)
            here = windows == window
            found[here] = self.found[draws[here] - window * WINDOW]
        return found


class Mixture:
    """Draws from pools in exact proportions: any `MIX_PERIOD` consecutive samples have the same number of each.

    The draws of each pool are spread evenly over the period, which repeats.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        shares = np.array(weights, dtype=np.float64) / np.sum(weights)
        exact = shares * MIX_PERIOD
        self.counts = np.maximum(np.floor(exact), shares > 0).astype(np.int64)  # at least one for any weight
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
