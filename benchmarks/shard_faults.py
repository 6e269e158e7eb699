"""Random faults in real shards: each is to be found, and every sound sample rescued byte for byte.

`python -m benchmarks.shard_faults [--faults 500] [--seed 0]` builds small shards of the demo's drawings,
spoils copies of them one fault at a time, checks and repairs each copy, and prints by kind of fault: tried,
found, samples that the fault left sound, how many of them were rescued; how many more were, whose headers
alone were hit; and how many samples of the new corpus are false, with other bytes than they had. Once as a
corpus of Tandem's, with manifest and index, and once as bare tars: without checksums of records a bit that
leaves them JSON cannot be seen.

Which samples a fault leaves sound is told by the fault itself, from the bytes that it changed: those of whose
two members neither header nor data was touched.
"""

import argparse
import csv
import hashlib
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.shards import ShardIndex, ShardWriter
from data_tools.shards.check import check, find_shards
from data_tools.shards.files import CorpusError
from data_tools.shards.format import BLOCK, padded
from data_tools.shards.repair import repair

DEMO = Path(__file__).parent.parent / "demo" / "corpus"
Content = dict[str, tuple[bytes, bytes]]  # key: picture and record


@dataclass(frozen=True)
class Span:
    """A sample's members in a shard: (start of the header, end of the data) of the picture and the record."""

    key: str
    image: tuple[int, int]
    record: tuple[int, int]

    @property
    def members(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return self.image, self.record


@dataclass(frozen=True)
class Spoilt:
    """A shard's new bytes, and the keys of it whose members are still whole in them."""

    data: bytes
    sound: set[str]


def build_corpus(out: Path, samples: int = 90, shard_bytes: int = 120_000) -> Path:
    """Small shards of the demo's drawings, with their names and tags."""
    out.mkdir(parents=True)
    writer = ShardWriter(out, shard_bytes, ["val", "train"], ["vendor"])
    with (DEMO / "pairs.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[:samples]
    rows.sort(key=lambda row: _key(row["image"]))
    pictures = _drawings({row["image"] for row in rows})
    for number, row in enumerate(rows):
        image = pictures[row["image"]]
        record = {
            "key": _key(row["image"]),
            "title": row["caption_en"],
            "content": row["caption_zh"],
            "queries": [{"text": tag, "lang": "en"} for tag in row["tags_en"].split("|")],
            "captions": [],
            "lang": "en",
            "url": f"http://pictures.example/{row['image']}",
            "sha256": hashlib.sha256(image).hexdigest(),
            "width": 128,
            "height": 128,
            "labels": {"vendor": row["vendor"]},
            "licence": row["licence"],
            "split": "val" if number % 5 == 0 else "train",
        }
        writer.write(image, "webp", record)
    writer.close()
    return out


def _drawings(names: set[str]) -> dict[str, bytes]:
    found = {}
    for vendor in {name.partition("/")[0] for name in names}:
        with tarfile.open(DEMO / f"{vendor}.tar") as tar:
            for member in tar:
                if f"{vendor}/{member.name}" in names:
                    file = tar.extractfile(member)
                    assert file is not None
                    found[f"{vendor}/{member.name}"] = file.read()
    return found


def _key(image: str) -> str:
    return hashlib.sha256(image.encode()).hexdigest()[:20]


# ------------------------------------------------------------------------------------------------- faults


def _flip(data: bytes, spans: list[Span], bit: int) -> Spoilt:
    place = bit // 8
    spoilt = bytearray(data)
    spoilt[place] ^= 1 << bit % 8
    hit = {span.key for span in spans for first, last in span.members if first <= place < last}
    return Spoilt(bytes(spoilt), {span.key for span in spans} - hit)


def _within(random: np.random.Generator, first: int, last: int) -> int:
    """A bit of some bytes."""
    return int(random.integers(8 * first, 8 * last))


def flip_header(data: bytes, spans: list[Span], other: bytes, random: np.random.Generator) -> Spoilt:
    start = spans[random.integers(len(spans))].members[random.integers(2)][0]
    return _flip(data, spans, _within(random, start, start + BLOCK))


def flip_picture(data: bytes, spans: list[Span], other: bytes, random: np.random.Generator) -> Spoilt:
    first, last = spans[random.integers(len(spans))].image
    return _flip(data, spans, _within(random, first + BLOCK, last))


def flip_record(data: bytes, spans: list[Span], other: bytes, random: np.random.Generator) -> Spoilt:
    first, last = spans[random.integers(len(spans))].record
    return _flip(data, spans, _within(random, first + BLOCK, last))


def flip_padding(data: bytes, spans: list[Span], other: bytes, random: np.random.Generator) -> Spoilt:
    ends = [last for span in spans for _, last in span.members if last % BLOCK]
    gaps = [(last, padded(last)) for last in ends] + [(padded(spans[-1].record[1]), len(data))]
    return _flip(data, spans, _within(random, *gaps[random.integers(len(gaps))]))


def flip_anywhere(data: bytes, spans: list[Span], other: bytes, random: np.random.Generator) -> Spoilt:
    return _flip(data, spans, _within(random, 0, len(data)))


def truncate(data: bytes, spans: list[Span], other: bytes, random: np.random.Generator) -> Spoilt:
    size = int(random.integers(0, len(data)))
    return Spoilt(data[:size], {span.key for span in spans if max(span.image[1], span.record[1]) <= size})


def duplicate(data: bytes, spans: list[Span], other: bytes, random: np.random.Generator) -> Spoilt:
    """A sample once more, before another one or at the end."""
    twice, before = spans[random.integers(len(spans))], int(random.integers(len(spans) + 1))
    sample = data[twice.image[0] : padded(twice.record[1])]
    place = spans[before].image[0] if before < len(spans) else padded(spans[-1].record[1])
    return Spoilt(data[:place] + sample + data[place:], {span.key for span in spans})


def interleave_members(data: bytes, spans: list[Span], other: bytes, random: np.random.Generator) -> Spoilt:
    """The members of two shards in turns, as two writers of one tar leave them."""
    mine = [data[first : padded(last)] for span in spans for first, last in span.members]
    theirs = [other[first : padded(last)] for span in spans_of(other) for first, last in span.members]
    return Spoilt(_mixed(mine, theirs, random) + bytes(2 * BLOCK), {span.key for span in spans})


def interleave_blocks(data: bytes, spans: list[Span], other: bytes, random: np.random.Generator) -> Spoilt:
    """Runs of blocks of two shards in turns: a member is whole where no run ends within it."""
    runs = [np.sort(random.choice(np.arange(1, len(d) // BLOCK), 6, replace=False)) for d in (data, other)]
    cut = [
        [d[a * BLOCK : b * BLOCK] for a, b in zip([0, *r], [*r, len(d) // BLOCK], strict=True)]
        for d, r in zip((data, other), runs, strict=True)
    ]
    mixed = b"".join(piece for pair in zip(*cut, strict=True) for piece in pair)
    edges = [int(edge) * BLOCK for edge in runs[0]]
    broken = {s.key for s in spans for first, last in s.members if any(first < e < last for e in edges)}
    return Spoilt(mixed, {span.key for span in spans} - broken)


def _mixed(mine: list[bytes], theirs: list[bytes], random: np.random.Generator) -> bytes:
    """Both lists in their orders, in random turns."""
    turns = random.permutation([True] * len(mine) + [False] * len(theirs))
    sources = iter(mine), iter(theirs)
    return b"".join(next(sources[0] if turn else sources[1]) for turn in turns)


FAULTS: dict[str, Callable[[bytes, list[Span], bytes, np.random.Generator], Spoilt]] = {
    "truncate": truncate,
    "flip in a header": flip_header,
    "flip in a picture": flip_picture,
    "flip in a record": flip_record,
    "flip in padding or end": flip_padding,
    "flip anywhere": flip_anywhere,
    "interleave members": interleave_members,
    "interleave blocks": interleave_blocks,
    "duplicate a sample": duplicate,
}


# --------------------------------------------------------------------------------------------------- runs


def spans_of(data: bytes) -> list[Span]:
    """Where the members of a sound shard of Tandem's stand: picture, record, picture, record …"""
    spans, place = [], 0
    while data[place]:
        pair = []
        for _ in range(2):
            info = tarfile.TarInfo.frombuf(data[place : place + BLOCK], "utf-8", "strict")
            pair.append((place, place + BLOCK + info.size))
            place += BLOCK + padded(info.size)
        spans.append(Span(info.name.partition(".")[0], pair[0], pair[1]))
    return spans


def contents(corpus: Path) -> Content:
    """Every sample's bytes."""
    index = ShardIndex.open(corpus)
    return {
        key: (index.image_bytes(i), index._read(i, "json"))  # as they stand, not as JSON means them
        for i, key in enumerate(index.keys)
    }


def run_fault(
    kind: str, corpus: Path, truth: Content, folder: Path, random: np.random.Generator, bare: bool
) -> dict[str, int]:
    """One fault in a copy: whether it was found; how many samples were sound, rescued, and false."""
    shards = sorted(corpus.rglob("*.tar"))
    hit, other = (shards[n] for n in random.choice(len(shards), 2, replace=False))
    data = hit.read_bytes()
    spoilt = FAULTS[kind](data, spans_of(data), other.read_bytes(), random)
    copy = folder / "copy"
    for path in corpus.rglob("*"):
        if path.is_file() and not (bare and path.suffix != ".tar"):
            target = copy / path.relative_to(corpus)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(path)
    (copy / hit.relative_to(corpus)).unlink()
    (copy / hit.relative_to(corpus)).write_bytes(spoilt.data)
    sound = set(truth) - {span.key for span in spans_of(data)} | spoilt.sound
    found = check(find_shards([copy]), 1)
    try:
        repair(find_shards([copy]), folder / "new", 1, split="train")
        rescued = contents(folder / "new")
    except CorpusError:  # nothing is sound
        rescued = {}
    shutil.rmtree(copy)
    shutil.rmtree(folder / "new", ignore_errors=True)
    return {
        "found": int(bool(found.kinds)),
        "sound": len(sound),
        "rescued": sum(rescued.get(key) == truth[key] for key in sound),
        "more": sum(rescued[key] == truth[key] for key in set(rescued) - sound),
        "false": sum(value != truth.get(key) for key, value in rescued.items()),
    }


def run_all(faults: int, seed: int, corpus: Path, folder: Path, bare: bool) -> dict[str, Counter[str]]:
    """Sums by kind; every fault has its own seed."""
    sums: dict[str, Counter[str]] = {kind: Counter() for kind in FAULTS}
    truth = contents(corpus)
    for number in range(faults):
        kind = list(FAULTS)[number % len(FAULTS)]
        result = run_fault(kind, corpus, truth, folder, np.random.default_rng([seed, number]), bare)
        sums[kind].update(result | {"tried": 1})
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        corpus = build_corpus(Path(name) / "corpus")
        for bare in (False, True):
            print("bare tars" if bare else "with manifest and index")
            print(f"{'fault':24}{'tried':>7}{'found':>7}{'sound':>8}{'rescued':>9}{'more':>6}{'false':>7}")
            sums = run_all(args.faults, args.seed, corpus, Path(name), bare)
            for kind, counts in [*sums.items(), ("all", sum(sums.values(), Counter()))]:
                shown = "".join(
                    f"{counts[column]:>{width}}"
                    for column, width in (("tried", 7), ("found", 7), ("sound", 8), ("rescued", 9))
                )
                print(f"{kind:24}{shown}{counts['more']:>6}{counts['false']:>7}", flush=True)


if __name__ == "__main__":
    main()
