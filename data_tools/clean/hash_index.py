"""Which hashes of a set are near to those of another, found by sorting.

Each of `ORDERS` keys is a selection of a hash's bits in an order of its own, the surest bits before the
others. The hashes are sorted by the key; what is looked up is compared with the NEIGHBOURS that stand before
and after its place (Ravichandran, Pantel and Hovy 2005). So n hashes cost n log n, whatever they are: a
bucket cannot grow too large, as there are none. What is lost: of a crowd of hashes so alike that they stand
between two in all orders, the two are not compared with each other, but each with its own neighbours.
"""

from collections.abc import Callable, Iterator

import numpy as np

from data_tools.clean.fingerprints import HASH_BITS, WINDOWS, mirrored

ORDERS = 12
NEIGHBOURS = 8  # on each side
NEAR = 11  # most bits of HASH_BITS that differ: a crop of 10 % and recompression seldom change more than 9
_KEY_BITS = 32  # enough to tell 2^32 hashes apart
_SURE_BITS = 36  # of the lowest frequencies: a key's bits are drawn from these
_BLOCK = 1 << 16  # looked up at a time: 16 MB


def near_pairs(
    hashes: np.ndarray,
    others: np.ndarray | None,
    *,
    with_mirrored: bool,
    on_progress: Callable[[int], None],
    should_stop: Callable[[], bool],
) -> np.ndarray | None:
    """Pairs (place in `hashes`, in `others`) of which one's whole picture is near a window of the other's.

    Args:
        hashes, others: uint64 [n, WINDOWS]; `others` None: pairs within `hashes`, the smaller place first.
        with_mirrored: also those whose mirror image is near.
        on_progress: called with a number of steps done, of `steps(...)`.
        should_stop: asked between steps.

    Returns:
        int64 [pairs, 2], each pair once, in order; None when stopped. Memory: some 60 bytes a picture.
    """
    found: list[np.ndarray] = []
    places = len(hashes) if others is None else len(others)
    for near in _searches(hashes, others, with_mirrored):
        if should_stop():
            return None
        pairs = near[:, 0] * places + near[:, 1]
        if others is None:
            near = np.sort(near[near[:, 0] != near[:, 1]], 1)
            pairs = near[:, 0] * places + near[:, 1]
        found.append(np.unique(pairs))
        if len(found) > ORDERS:  # the same pairs come in most orders
            found = [np.unique(np.concatenate(found))]
        on_progress(1)
    codes = np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)
    return np.stack(np.divmod(codes, max(1, places)), 1)


def steps(*, within: bool, with_mirrored: bool) -> int:
    """How many steps near_pairs has."""
    return ORDERS * len(WINDOWS) * (1 + with_mirrored) * (1 if within else 2)


def _searches(hashes: np.ndarray, others: np.ndarray | None, with_mirrored: bool) -> Iterator[np.ndarray]:
    """Near places (in hashes, in others), one search at a time.

    It is always `hashes` that is looked up and `others` that is sorted: a crowd in `hashes` then hides
    nothing.
    """
    sorted_set = hashes if others is None else others
    for order in range(ORDERS):
        for window in range(len(WINDOWS)):
            index = _Sorted(sorted_set[:, window], order)
            for turned in (False, True)[: 1 + with_mirrored]:
                yield index.near(mirrored(hashes[:, 0]) if turned else hashes[:, 0])
        if others is None:
            continue  # the other way round is the same search
        index = _Sorted(others[:, 0], order)
        for window in range(len(WINDOWS)):
            for turned in (False, True)[: 1 + with_mirrored]:
                # a mirrored window is not a window mirrored: here the sorted side is turned
                yield (_Sorted(mirrored(others[:, 0]), order) if turned else index).near(hashes[:, window])


class _Sorted:
    """Hashes in the order of one key."""

    def __init__(self, hashes: np.ndarray, order: int) -> None:
        self._bits = _bits_of(order)
        keys = self._keys(hashes)
        self._places = np.argsort(keys, kind="stable")
        self._sorted_keys, self._hashes = keys[self._places], hashes[self._places]

    def near(self, wanted: np.ndarray) -> np.ndarray:
        """[found, 2]: place in `wanted`, place in the sorted hashes."""
        if not len(self._hashes):
            return np.zeros((0, 2), np.int64)
        keys = self._keys(wanted)
        by_key = np.argsort(keys, kind="stable")  # so that memory is read from one end to the other
        around = np.arange(-NEIGHBOURS, NEIGHBOURS)
        found = []
        for start in range(0, len(wanted), _BLOCK):
            block = by_key[start : start + _BLOCK]
            at = np.searchsorted(self._sorted_keys, keys[block])[:, None] + around
            at = np.clip(at, 0, len(self._hashes) - 1)
            distance = np.bitwise_count(self._hashes[at] ^ wanted[block][:, None])
            row, column = np.nonzero(distance <= NEAR)
            found.append(np.stack([block[row], self._places[at[row, column]]], 1))
        return np.concatenate(found) if found else np.zeros((0, 2), np.int64)

    def _keys(self, hashes: np.ndarray) -> np.ndarray:
        keys = np.zeros(len(hashes), np.uint32)
        for bit in self._bits:
            keys = (keys << np.uint32(1)) | ((hashes >> bit) & np.uint64(1)).astype(np.uint32)
        return keys


def _bits_of(order: int) -> np.ndarray:
    """The bits of one key, the first one first: always the same for the same order."""
    drawn = np.random.Generator(np.random.PCG64(order)).permutation(_SURE_BITS)[:_KEY_BITS]
    bits: np.ndarray = (HASH_BITS - 1 - drawn).astype(np.uint64)  # bit 62 is the lowest frequency
    return bits
