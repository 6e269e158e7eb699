"""Randomness by key: a sample gets the same choices whoever reads it, a step the same after any resume.

And a process's own random state, for what is computed twice within a step.
"""

import random
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

_ROUNDS = 6


def stable_hash(*parts: object) -> int:
    """63 bits of blake2b over the parts' texts: the same on every machine, in every process."""
    joined = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(blake2b(joined, digest_size=8).digest(), "little") >> 1


def keyed_generator(*parts: object) -> torch.Generator:
    """A generator seeded by the parts: say (seed, epoch, sample key, what it is for)."""
    return torch.Generator().manual_seed(stable_hash(*parts))


class Permutation:
    """A permutation of range(size) that is computed place by place: no table, no scan, any place at once.

    A Feistel network over the smallest even number of bits that holds `size`, walked until it lands inside
    (cycle walking), keyed by `seed` and `epoch`.
    """

    def __init__(self, size: int, seed: int, epoch: int):
        if size < 1:
            raise ValueError(f"a permutation of {size} items: there must be at least one")
        self.size = size
        self._half = np.uint64(max(1, (max(1, size - 1).bit_length() + 1) // 2))
        self._low = np.uint64((1 << int(self._half)) - 1)
        keys = [stable_hash("permutation", seed, epoch, round_) for round_ in range(_ROUNDS)]
        self._keys = [np.uint64(key) for key in keys]

    def __call__(self, places: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """What stands at these places, each in [0, size)."""
        values = np.asarray(places).astype(np.uint64)
        if values.size and int(values.max()) >= self.size:
            raise ValueError(f"place {int(values.max())} of a permutation of {self.size}")
        values = self._network(values)
        outside = values >= self.size
        while outside.any():  # each walk ends: the network permutes, and the start was inside
            values[outside] = self._network(values[outside])
            outside = values >= self.size
        return values.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._low
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._low)
        return (left << self._half) | right


class MixedShards:
    """A permutation of the samples of many shards whose neighbours come from few of them.

    The shards are permuted and taken in groups of `together`; the samples of a group are permuted among
    themselves. Samples are numbered shard by shard. Computed place by place too, from the shards' sizes.
    """

    def __init__(self, sizes: Int64[np.ndarray, " s"], together: int, seed: int, epoch: int):
        """`sizes`: samples of each shard, in the order in which samples are numbered, all above 0."""
        if together < 1:
            raise ValueError(f"shards mixed at a time: {together}; there must be at least one")
        self.size, self._seed, self._epoch, self._together = int(sizes.sum()), seed, epoch, together
        order = Permutation(len(sizes), seed, epoch)(np.arange(len(sizes)))
        self._first = (np.cumsum(sizes) - sizes)[order]  # number of the first sample of each shard
        self._end = np.cumsum(sizes[order])  # place after the last sample of each shard, were none permuted
        last = np.minimum(np.arange(together, len(sizes) + together, together), len(sizes)) - 1
        self._group_end = self._end[last]

    def __call__(self, places: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """What stands at these places, each in [0, size)."""
        places = np.asarray(places)
        groups = np.searchsorted(self._group_end, places, side="right")
        drawn = np.empty_like(places)
        for group in np.unique(groups):
            start = int(self._group_end[group - 1]) if group else 0
            inside = Permutation(
                int(self._group_end[group]) - start,
                stable_hash(self._seed, "group of shards", int(group)),
                self._epoch,
            )
            drawn[groups == group] = start + inside(places[groups == group] - start)
        shards = np.searchsorted(self._end, drawn, side="right")
        begins = np.concatenate(([0], self._end[:-1]))
        return self._first[shards] + drawn - begins[shards]


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every input bit moves every output bit."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed Python's, numpy's and torch's own generators (dropout draws from the last) for a rank's next step.

    So what a step draws is a matter of its number and its rank alone: a checkpoint needs no random state, and
    another number of ranks has a defined one.
    """
    key = stable_hash(seed, "step", step, rank)
    random.seed(key)
    np.random.seed(key % 2**32)
    torch.manual_seed(key)  # of all devices


def random_state() -> dict[str, Any]:
    """Python's, numpy's and torch's random state, of values that torch.load reads with weights_only."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [str(name), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """What `random_state` gave."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
