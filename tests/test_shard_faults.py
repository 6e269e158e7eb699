"""Random faults in shards, as benchmarks/shard_faults.py makes 500 of them: each found, the rest rescued."""

import random
import shutil
import tarfile
from pathlib import Path

import pytest

from benchmarks.shard_faults import FAULTS, build_corpus, run_all
from data_tools.shards.check import check, find_shards
from data_tools.shards.files import CorpusError
from data_tools.shards.repair import repair
from tests.shard_case import contents, pair, tar_of, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_corpus(tmp_path_factory.mktemp("faults") / "corpus", samples=40, shard_bytes=40_000)


@pytest.mark.slow
def test_each_fault_in_a_corpus_is_found_and_every_sound_sample_rescued(corpus: Path, tmp_path: Path) -> None:
    for kind, counts in run_all(63, 1, corpus, tmp_path, bare=False).items():
        assert counts["tried"] == counts["found"] == 63 // len(FAULTS), kind
        assert counts["rescued"] == counts["sound"] > 0, kind
        assert counts["false"] == 0, kind


@pytest.mark.slow
def test_bare_tars_give_their_sound_samples_too(corpus: Path, tmp_path: Path) -> None:
    for kind, counts in run_all(27, 1, corpus, tmp_path, bare=True).items():
        assert counts["rescued"] == counts["sound"] > 0, kind
        if kind not in ("flip in a record", "flip anywhere"):  # a bit of a text may leave it JSON
            assert counts["tried"] == counts["found"], kind
            assert counts["false"] == 0, kind


def spoil(data: bytes, draw: random.Random) -> bytes:
    """Several faults of any kind at once: bytes, blocks, lengths, and headers of all sorts."""
    spoilt = bytearray(data)
    for _ in range(draw.randrange(1, 6)):
        blocks, kind = len(spoilt) // 512, draw.randrange(7)
        if blocks < 3:
            break
        a, b = (512 * draw.randrange(blocks) for _ in range(2))
        if kind == 0:
            for _ in range(draw.randrange(1, 50)):
                spoilt[draw.randrange(len(spoilt))] = draw.randrange(256)
        elif kind == 1:
            spoilt[a : a + 512], spoilt[b : b + 512] = spoilt[b : b + 512], spoilt[a : a + 512]
        elif kind == 2:
            del spoilt[a : a + 512 * draw.randrange(1, 4)]
        elif kind == 3:
            spoilt[b:b] = spoilt[a : a + 512 * draw.randrange(1, 8)]
        elif kind == 4:
            del spoilt[draw.randrange(len(spoilt)) :]
        elif kind == 5:
            spoilt[a + 7 : a + 7] = bytes(draw.randrange(1, 600))
        else:
            info = tarfile.TarInfo(draw.choice(["0001.png", "0002.json", "../x.png", "a" * 90, ".json", "/"]))
            info.size = draw.choice([0, 1, 511, 512, 513, 10**6, 2**40])
            info.type = draw.choice([b"0", b"L", b"x", b"g", b"5", b"1", b"S", b"K", b"7", b"Z"])
            spoilt[a : a + 512] = info.tobuf(tarfile.GNU_FORMAT)[:512]
    return bytes(spoilt)


@pytest.mark.slow
@pytest.mark.parametrize("bare", [False, True])
def test_no_bytes_end_a_check_and_what_is_rescued_is_true(tmp_path: Path, bare: bool) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    truth = contents(corpus)
    long = tar_of(tmp_path / "long.tar", [m for n in range(6) for m in pair(n)], pax_headers={"comment": "x"})
    for seed in range(20):
        draw, copy = random.Random(seed), tmp_path / "copy"
        shutil.copytree(corpus, copy)
        for shard in sorted(copy.rglob("*.tar")):
            shard.write_bytes(spoil(shard.read_bytes(), draw))
        if bare:
            (copy / "manifest.json").unlink()
            (copy / "more.tar").write_bytes(spoil(long.read_bytes(), draw))
        assert check(find_shards([copy], decode=True), 1).kinds, seed
        try:
            repair(find_shards([copy]), tmp_path / "new", 1)
        except CorpusError as error:
            assert "nothing to rescue" in str(error), seed
        else:
            found = contents(tmp_path / "new")
            assert not check(find_shards([tmp_path / "new"]), 1).kinds, seed
            assert bare or all(found[key] == truth[key] for key in found if key in truth), seed
        shutil.rmtree(copy)
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
