"""Near duplicates and leaks planted among real pictures: what is found, what is found wrongly, and how time
grows.

    python -m benchmarks.duplicates --data DIR [--sizes 10000 20000 40000] [--processes 2]

The pictures are the photos of Flickr8k and the demo's drawings, 12.4 thousand, and copies of them, each
changed in one of KINDS and saved again. The limits of data_tools/clean/same_picture.py were chosen on the
first half of Flickr8k's training photos, and on all drawings: the figures of drawings are not held out.
Copies are planted of photos that were not looked at (the validation photos, the second half of the training
photos) and of every second drawing, and the figures of the two are printed apart.

A copy is found where it and its original are in one group. A group's member is wrong where it comes from
another picture than the one that is kept. Drawings that look the same by nature, of which full-size pixels
differ by less than ALIKE levels, upright or in a mirror (hands, clocks, arrows), are counted beside. For
times alone, the largest sizes take halves of photos, left and right, as pictures of their own. Times are
printed as ratios.
"""

import argparse
import hashlib
import io
import math
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data_tools.clean.fingerprints import fingerprint
from data_tools.clean.near_duplicates import Pictures, group, matches
from data_tools.clean.same_picture import Limits
from data_tools.pictures import open_picture

PLANTED_SHARE = 0.38  # of all pictures: 12,400 originals and 7,600 copies are 20,000
ALIKE = 8.0  # root mean square, levels of RGB
_MAX_PIXELS = 10**7
Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def _cropped(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """A tenth of the width and of the height cut off, wherever the seed says: 81 % of the area stays."""
    width, height = round(image.width * 0.9), round(image.height * 0.9)
    left = int(random.integers(image.width - width + 1))
    top = int(random.integers(image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def _resized(image: Image.Image, factor: float) -> Image.Image:
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.LANCZOS)


KINDS: dict[str, tuple[Change, int]] = {  # what is done, and the JPEG quality that it is saved with
    "quality 30": (lambda image, _: image, 30),
    "quality 50": (lambda image, _: image, 50),
    "quality 70": (lambda image, _: image, 70),
    "resized x 0.5": (lambda image, _: _resized(image, 0.5), 85),
    "resized x 0.75": (lambda image, _: _resized(image, 0.75), 85),
    "resized x 1.5": (lambda image, _: _resized(image, 1.5), 85),
    "cropped 10 %": (_cropped, 85),
    "flipped": (lambda image, _: ImageOps.mirror(image), 85),
    "cropped, quality 30": (_cropped, 30),
    "cropped, x 0.5": (lambda image, random: _resized(_cropped(image, random), 0.5), 70),
    "flipped, cropped": (lambda image, random: ImageOps.mirror(_cropped(image, random)), 85),
    "flipped, cropped, x 0.75, q 50": (
        lambda image, random: _resized(ImageOps.mirror(_cropped(image, random)), 0.75),
        50,
    ),
}


@dataclass(frozen=True)
class Item:
    """A picture of the benchmark: an original, a part of one, or a copy."""

    tar: Path
    offset: int
    bytes: int
    source: int  # the number of its original
    kind: str  # "" for an original, "half" for a part
    seed: int


def originals(data: Path, drawings: Path) -> tuple[list[Item], list[bool]]:
    """All originals, each once, and of each whether copies of it may be planted."""
    items: list[Item] = []
    seen: set[bytes] = set()
    fresh: list[bool] = []
    photos = sorted((data / "flickr8k").glob("*.tar"))
    if not photos:
        raise SystemExit(f"{data / 'flickr8k'}: no tars of photos; name the folder of the data with --data")
    for path in [*photos, *sorted(drawings.glob("*.tar"))]:
        tuned_on = path.name in ("train-00.tar", "train-01.tar")
        with tarfile.open(path) as tar:
            for number, member in enumerate(sorted(tar.getmembers(), key=lambda member: member.name)):
                file = tar.extractfile(member)
                digest = hashlib.sha256(file.read()).digest() if file is not None else b""
                if file is not None and digest not in seen:
                    seen.add(digest)
                    items.append(Item(path, member.offset_data, member.size, len(items), "", len(items)))
                    fresh.append(number % 2 == 1 if path in drawings.glob("*.tar") else not tuned_on)
    return items, fresh


def picture_of(item: Item) -> Image.Image:
    """The original's pixels."""
    with item.tar.open("rb") as file:
        file.seek(item.offset)
        return open_picture(file.read(item.bytes), max_pixels=_MAX_PIXELS, name=str(item.tar))


def _made(item: Item) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    image = picture_of(item)
    if item.kind == "half":
        left = 0 if item.seed % 2 else image.width // 2
        image = image.crop((left, 0, left + image.width // 2, image.height))
    elif item.kind:
        change, quality = KINDS[item.kind]
        saved = io.BytesIO()
        change(image, np.random.default_rng(item.seed)).save(saved, "JPEG", quality=quality)
        image = open_picture(saved.getvalue(), max_pixels=_MAX_PIXELS, name=item.kind)
    found = fingerprint(image)
    return found.hashes, found.grey, found.colour


def fingerprints(items: Sequence[Item], processes: int) -> Pictures:
    """Of all items, in order."""
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        made = list(pool.map(_made, items, chunksize=100))
    return Pictures(*(np.stack(column) for column in zip(*made, strict=True)))


def copies(items: Sequence[Item], of: Sequence[int], count: int, seed: int) -> Iterator[Item]:
    """`count` copies, the kinds in turn, of the originals `of`, in an order that the seed shuffles."""
    order = np.random.default_rng(seed).permutation(np.asarray(of))
    names = list(KINDS)
    for n in range(count):
        item = items[int(order[n % len(order)])]
        # the second round of an original is of another kind
        kind = names[(n + n // len(order)) % len(names)]
        yield Item(item.tar, item.offset, item.bytes, item.source, kind, seed + n)


def alike(a: Item, b: Item) -> bool:
    """Whether two originals look the same in full size, upright or in a mirror."""
    one = picture_of(a)
    two = np.asarray(picture_of(b).resize(one.size), np.float64)
    upright = np.asarray(one, np.float64)
    return min(float(np.sqrt(((x - two) ** 2).mean())) for x in (upright, upright[:, ::-1])) < ALIKE


def is_drawing(item: Item) -> bool:
    return item.tar.parent.name != "flickr8k"


def print_recall(planted: Sequence[Item], found: np.ndarray) -> None:
    """A line a kind, then photos, drawings and all together."""
    drawn = np.array([is_drawing(item) for item in planted])
    kinds = {kind: np.array([item.kind == kind for item in planted]) for kind in KINDS}
    for name, of in (kinds | {"photos": ~drawn, "drawings": drawn, "all": drawn | ~drawn}).items():
        print(f"  {name:32s} {int(found[of].sum()):6,} of {int(of.sum()):6,}   recall {found[of].mean():.4f}")


def print_precision(
    items: Sequence[Item], reported: Sequence[int], wrong: set[int], natural: set[int]
) -> None:
    """Of the pictures reported as copies: of photos, of drawings, of all."""
    for name, drawn in (("photos", (False,)), ("drawings", (True,)), ("all", (False, True))):
        of = {k for k in reported if is_drawing(items[k]) in drawn}
        bad = len(of & wrong)
        strict = 1 - len(of & (wrong | natural)) / len(of)
        right = 1 - bad / len(of)
        print(f"  {name:10s} precision {right:.4f}: {bad} of {len(of):,} wrong; {strict:.4f} if those")
        print(f"  {'':10s} {len(of & natural)} that look the same by nature count as wrong")


def duplicates(items: Sequence[Item], base: Sequence[Item], pictures: Pictures) -> None:
    """Figures of one corpus."""
    groups = group(pictures, Limits())
    assert groups is not None
    source = np.array([item.source for item in items])
    kept_source = source[groups.kept]
    # the original of each source: two copies may be in a group that another original stands for
    group_of_source = {item.source: groups.kept[k] for k, item in enumerate(items) if not item.kind}
    planted = [k for k, item in enumerate(items) if item.kind in KINDS]
    found = np.array([groups.kept[k] == group_of_source[source[k]] for k in planted])
    print_recall([items[k] for k in planted], found)
    merged = np.flatnonzero(groups.kept != np.arange(len(items)))
    strange = [k for k in merged.tolist() if kept_source[k] != source[k]]
    judge = {
        pair: alike(base[pair[0]], base[pair[1]])
        for pair in {(int(source[k]), int(kept_source[k])) for k in strange}
    }
    natural = {k for k in strange if judge[int(source[k]), int(kept_source[k])]}
    print_precision(items, merged.tolist(), set(strange) - natural, natural)


def leaks(items: Sequence[Item], fresh: Sequence[bool], processes: int) -> None:
    """A training corpus with copies of the pictures that are evaluated on."""
    held = [k for k in range(len(items)) if fresh[k]][::4]
    chosen = set(held)
    train = [item for item in items if item.source not in chosen]
    planted = list(copies(items, held, 2 * len(held), seed=10**6))
    print(f"leaks: {len(planted):,} copies of {len(held):,} held-out pictures among {len(train):,} others")
    same = matches(
        fingerprints([*train, *planted], processes),
        fingerprints([items[k] for k in held], processes),
        Limits(),
    )
    assert same is not None
    everyone = [*train, *planted]
    right = {int(k) for k, other in same.pairs if everyone[k].source == held[other]}
    found = np.array([k in right for k in range(len(train), len(everyone))])
    print_recall(planted, found)
    reported = {int(k) for k in same.pairs[:, 0]}
    strange = [(k, other) for k, other in same.pairs.tolist() if int(k) not in right]
    natural = {k for k, other in strange if alike(items[everyone[k].source], items[held[other]])}
    print_precision(everyone, sorted(reported), reported - right - natural, natural)


def corpus_of(size: int, items: Sequence[Item], fresh: Sequence[bool]) -> list[Item]:
    """`size` pictures: originals (parts of them where there are too few), and copies."""
    count = round(size * PLANTED_SHARE)
    drawn = np.random.default_rng(0).permutation(len(items))[: size - count]
    chosen = [items[k] for k in sorted(drawn.tolist())]
    room = size - count - len(chosen)
    halves = [
        Item(i.tar, i.offset, i.bytes, -1 - n, "half", n) for n, i in enumerate([*items, *items][:room])
    ]
    of = [item.source for item in chosen if fresh[item.source]]
    return [*chosen, *halves, *copies(items, of, count, seed=1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder with flickr8k/")
    parser.add_argument("--drawings", type=Path, default=Path("demo/corpus"))
    parser.add_argument("--sizes", type=int, nargs="*", default=[10_000, 20_000, 40_000])
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    items, fresh = originals(arguments.data, arguments.drawings)
    seconds: list[float] = []
    made = partial(fingerprints, processes=arguments.processes)
    for size in arguments.sizes:
        corpus = corpus_of(size, items, fresh)
        pictures = made(corpus)
        start = time.process_time()
        group(pictures, Limits())
        seconds.append(time.process_time() - start)
        print(f"{len(corpus):,} pictures: {seconds[-1] / seconds[0]:.2f} times the time")
        if size == 20_000:
            planted = sum(item.kind in KINDS for item in corpus)
            print(f"near duplicates: {planted:,} copies among {len(corpus):,} pictures")
            duplicates(corpus, items, pictures)
    if len(seconds) > 1:
        growth = math.log(seconds[-1] / seconds[0]) / math.log(arguments.sizes[-1] / arguments.sizes[0])
        print(f"time grows as n^{growth:.2f} (n log n: about 1.1; n²: 2)")
    leaks(items, fresh, arguments.processes)


if __name__ == "__main__":
    main()
