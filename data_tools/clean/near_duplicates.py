"""Near duplicates: which pictures show what another one shows, and which one of them is kept.

Candidates come from the hashes (hash_index.py), and each is verified on the thumbnails (same_picture.py). Of
pictures that are the same the first is kept, and each other one is the same as its kept one, as verified:
there are no chains along which one picture turns into another. The pictures are numbered in the order of
their URLs, so the result depends on neither the order of rows nor the number of workers.

Time grows as n log n in the number of pictures. Memory: the hashes (112 bytes a picture) and some 60 bytes a
picture while a window is searched, so 23 million pictures take 4 GB; thumbnails are read from disk, of the
candidates alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data_tools.clean.fingerprints import mirrored
from data_tools.clean.hash_index import NEAR, near_pairs
from data_tools.clean.same_picture import Limits, Scores, compare, is_plain

_NEAREST = 4  # candidates of a picture that are verified: in a crowd of lookalikes there are many more
_MERGES = 8  # each joins groups that touch: the number of groups of one crowd at least halves
_BLOCK = 1 << 14  # candidates at a time


@dataclass(frozen=True)
class Pictures:
    """Fingerprints of pictures: row k of each array is of picture k."""

    hashes: np.ndarray  # uint64 [n, WINDOWS]
    grey: np.ndarray  # uint8 [n, THUMBNAIL, THUMBNAIL], perhaps memory-mapped
    colour: np.ndarray  # uint8 [n, 2, CHROMA, CHROMA], perhaps memory-mapped

    def __len__(self) -> int:
        return len(self.hashes)


@dataclass(frozen=True)
class Same:
    """Verified pairs, and how alike they are."""

    pairs: np.ndarray  # int64 [pairs, 2]
    mirrored: np.ndarray  # bool: only in a mirror
    correlation: np.ndarray


@dataclass(frozen=True)
class Groups:
    """`kept[k]`: the picture that stands for picture k, itself where it is kept."""

    kept: np.ndarray
    mirrored: np.ndarray  # bool: k is like kept[k] only in a mirror
    correlation: np.ndarray  # with kept[k]; 1 where it is itself
    plain: np.ndarray  # bool: of one tone, so that nothing can be said of it


def silent(n: int) -> None:
    """No progress is shown."""


def never() -> bool:
    """Nothing stops it."""
    return False


def group(
    pictures: Pictures,
    limits: Limits,
    *,
    with_mirrored: bool = True,
    among: np.ndarray | None = None,
    on_progress: Callable[[int], None] = silent,
    on_verified: Callable[[int], None] = silent,
    should_stop: Callable[[], bool] = never,
) -> Groups | None:
    """Which of the pictures `among` (places; None: of all) are kept. None when stopped.

    Args:
        on_progress: counts to hash_index.steps(within=True, …); `should_stop` is asked as often.
        on_verified: called with a number of candidates that were verified after that; it may raise.
    """
    plain = plain_of(pictures, limits)
    shown = _shown(plain, among)
    found = near_pairs(
        pictures.hashes[shown],
        None,
        with_mirrored=with_mirrored,
        on_progress=on_progress,
        should_stop=should_stop,
    )
    if found is None:
        return None
    candidates = _nearest(pictures, pictures, shown[found], with_mirrored, both=True)
    same = verify(pictures, pictures, candidates, limits, with_mirrored, on_verified)
    groups = _first_kept(len(pictures), same, plain)
    for _ in range(_MERGES):
        touching = _touching(same.pairs, groups.kept)
        touching = touching[~np.isin(_codes(touching, len(pictures)), _codes(same.pairs, len(pictures)))]
        more = verify(pictures, pictures, touching, limits, with_mirrored, on_verified)
        if not len(more.pairs):
            break
        same = Same(
            np.concatenate([same.pairs, more.pairs]),
            np.concatenate([same.mirrored, more.mirrored]),
            np.concatenate([same.correlation, more.correlation]),
        )
        groups = _first_kept(len(pictures), same, plain)
    return groups


def matches(
    pictures: Pictures,
    others: Pictures,
    limits: Limits,
    *,
    among: np.ndarray | None = None,
    on_progress: Callable[[int], None] = silent,
    on_verified: Callable[[int], None] = silent,
    should_stop: Callable[[], bool] = never,
) -> Same | None:
    """Pairs (picture, other) that show the same, mirrored or not; `among`: places of the pictures asked for.

    `on_progress` counts to hash_index.steps(within=False, …), `on_verified` as in `group`. None when stopped.

    A crowd of equal pictures hides no match, as each is looked up; among equal `others` not every one is
    found.
    """
    here = _shown(plain_of(pictures, limits), among)
    there = _shown(plain_of(others, limits), None)
    found = near_pairs(
        pictures.hashes[here],
        others.hashes[there],
        with_mirrored=True,
        on_progress=on_progress,
        should_stop=should_stop,
    )
    if found is None:
        return None
    pairs = np.stack([here[found[:, 0]], there[found[:, 1]]], 1)
    candidates = _nearest(pictures, others, pairs, True, both=False)
    return verify(pictures, others, candidates, limits, True, on_verified)


def _nearest(
    pictures: Pictures, others: Pictures, pairs: np.ndarray, with_mirrored: bool, *, both: bool
) -> np.ndarray:
    """The pairs whose hashes are among the _NEAREST of the picture; `both`: or of the other one."""
    distance = np.zeros(len(pairs), np.uint8)
    for start in range(0, len(pairs), _BLOCK):
        here = slice(start, start + _BLOCK)
        ways = [
            _distances(pictures, others, pairs[here], turned, swapped).min(1)
            for turned in (False, True)[: 1 + with_mirrored]
            for swapped in (False, True)
        ]
        distance[here] = np.minimum.reduce(ways)
    near = np.zeros(len(pairs), bool)
    for side in (0, 1)[: 1 + both]:
        order = np.lexsort((pairs[:, 1 - side], distance, pairs[:, side]))
        of = pairs[order, side]
        first = np.searchsorted(of, of)  # where the picture's own pairs begin
        near[order[np.arange(len(of)) - first < _NEAREST]] = True
    chosen: np.ndarray = pairs[near]
    return chosen


def _distances(
    pictures: Pictures, others: Pictures, pairs: np.ndarray, turned: bool, swapped: bool
) -> np.ndarray:
    """[pairs, WINDOWS]: bits in which one's whole picture differs from the other's windows."""
    a, b = (others, pictures) if swapped else (pictures, others)
    whole, windowed = (pairs[:, 1], pairs[:, 0]) if swapped else (pairs[:, 0], pairs[:, 1])
    hashes = a.hashes[whole, 0]
    bits: np.ndarray = np.bitwise_count(
        (mirrored(hashes) if turned else hashes)[:, None] ^ b.hashes[windowed]
    )
    return bits


def _shown(plain: np.ndarray, among: np.ndarray | None) -> np.ndarray:
    """Places of the pictures that show something, in order."""
    asked = ~plain
    if among is not None:
        asked &= np.isin(np.arange(len(plain)), among)
    return np.flatnonzero(asked)


def plain_of(pictures: Pictures, limits: Limits) -> np.ndarray:
    """bool: pictures of one tone."""
    blocks = range(0, len(pictures), _BLOCK)
    parts = [is_plain(np.asarray(pictures.grey[start : start + _BLOCK]), limits) for start in blocks]
    return np.concatenate(parts) if parts else np.zeros(0, bool)


def verify(
    pictures: Pictures,
    others: Pictures,
    pairs: np.ndarray,
    limits: Limits,
    with_mirrored: bool = True,
    on_verified: Callable[[int], None] = silent,
) -> Same:
    """Those of the pairs that are the same picture, either one being perhaps a crop of the other."""
    kept, mirror, correlation = [], [], []
    for start in range(0, len(pairs), _BLOCK):
        block = pairs[start : start + _BLOCK]
        good = np.zeros((len(block), 2), bool)  # upright, in a mirror
        best = np.zeros(len(block))
        for turned in (0, 1)[: 1 + with_mirrored]:
            for swapped in (False, True):
                scores, places = _compare(pictures, others, block, bool(turned), swapped)
                same = scores.same(limits)
                good[places[same], turned] = True
                # symmetric pictures are the same both ways: it is then no mirror image
                best[places[same]] = np.maximum(best[places[same]], scores.correlation[same])
        any_way = good.any(1)
        kept.append(block[any_way])
        mirror.append(~good[any_way, 0])
        correlation.append(best[any_way])
        on_verified(len(block))
    if not kept:
        return Same(np.zeros((0, 2), np.int64), np.zeros(0, bool), np.zeros(0))
    return Same(np.concatenate(kept), np.concatenate(mirror), np.concatenate(correlation))


def _compare(
    pictures: Pictures, others: Pictures, pairs: np.ndarray, turned: bool, swapped: bool
) -> tuple[Scores, np.ndarray]:
    """Scores of one's whole over the nearest window of the other's; and which pairs: those near enough."""
    a, b = (others, pictures) if swapped else (pictures, others)
    wholes, windowed = (pairs[:, 1], pairs[:, 0]) if swapped else (pairs[:, 0], pairs[:, 1])
    distance = _distances(pictures, others, pairs, turned, swapped)
    window = distance.argmin(1)
    places = np.flatnonzero(distance[np.arange(len(pairs)), window] <= NEAR)
    chosen = (wholes[places], windowed[places], window[places])
    return compare((a.grey, a.colour), (b.grey, b.colour), *chosen, turned), places


def _first_kept(n: int, same: Same, plain: np.ndarray) -> Groups:
    """Each picture, in order, is dropped for the first kept one that is the same; without one it is kept.

    One step of Python for each verified pair, none for a picture without one.
    """
    kept, mirror, correlation = np.arange(n), np.zeros(n, bool), np.ones(n)
    low, high = same.pairs.min(1, initial=n), same.pairs.max(1, initial=0)
    for row in np.lexsort((low, high)).tolist():
        first, second = int(low[row]), int(high[row])
        if kept[second] == second and kept[first] == first:
            kept[second] = first
            mirror[second], correlation[second] = same.mirrored[row], same.correlation[row]
    return Groups(kept, mirror, correlation, plain)


def _touching(pairs: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Pairs to try next where a pair joins two groups: each with the other's kept one, and those two."""
    apart = pairs[kept[pairs[:, 0]] != kept[pairs[:, 1]]]
    a, b = apart[:, 0], apart[:, 1]
    tried = [np.stack(pair, 1) for pair in ((a, kept[b]), (kept[a], b), (kept[a], kept[b]))]
    joined = np.sort(np.concatenate(tried), 1)
    found: np.ndarray = np.unique(joined[joined[:, 0] != joined[:, 1]], axis=0)
    return found


def _codes(pairs: np.ndarray, n: int) -> np.ndarray:
    ordered = np.sort(pairs, 1)
    codes: np.ndarray = ordered[:, 0] * n + ordered[:, 1]
    return codes
