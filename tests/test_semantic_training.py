"""Semantic Sharing under the engine and as a stage: resumed, split by ZeRO, written out; word vectors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from learning import model_files
from learning.training.checkpoint_files import Writer
from learning.training.deepspeed_setup import read_deepspeed_config
from learning.training.engine import Engine, OptimizerConfig
from stages.base import StageError, Stopped
from stages.pretrain import Config, run
from tests import semantic_case
from tests.distributed_harness import run_distributed
from tests.semantic_case import ALL, GRU, MODEL, build
from tests.training_case import CONFIGS, config_values, make_job, write_corpus

COUNT, BEFORE, AFTER = 8, 2, 2
NAMES = ["zero0_fp32", "zero2_fp32", "zero3_fp32", "zero3_bf16"]
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1)


def engine(name: str, world_size: int, seed: int = 0) -> Engine:
    model = build(ALL, seed, feature_dropout=0.1).float()
    settings = read_deepspeed_config(CONFIGS / f"{name}.json")
    return Engine(
        model,
        dict.fromkeys(ALL, 1.0),
        OPTIMIZER,
        settings,
        batch_per_gpu=COUNT // world_size,
        gradient_clip=1.0,
    )


def take(made: Engine, steps: range, rank: int, world_size: int) -> list[float]:
    told = []
    for step in steps:
        torch.manual_seed(1000 * step + rank)  # as the loop seeds dropout
        batch = semantic_case.batch(made.method, COUNT, seed=step)
        part = semantic_case.rows(batch, (COUNT // world_size,) * world_size, rank)
        told.append(float(made.step(part, 1.0).total))
    return told


def journeys(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """For each config four steps, a checkpoint in the middle, and the last two once more from it."""
    told: dict[str, Any] = {}
    for name in NAMES:
        made = engine(name, world_size)
        take(made, range(BEFORE), rank, world_size)
        writer = Writer(Path(folder) / name)
        made.save(Path(folder) / name, writer)
        assert writer.error is None
        losses = take(made, range(BEFORE, BEFORE + AFTER), rank, world_size)
        straight = made.full_state()
        made.close()
        other = engine(name, world_size, seed=1)  # other weights: nothing may be left of them
        other.load(Path(folder) / name)
        again = take(other, range(BEFORE, BEFORE + AFTER), rank, world_size)
        resumed = other.full_state()
        other.close()
        told[name] = {"losses": losses, "again": again, "straight": straight, "resumed": resumed}
    return told


@pytest.mark.slow
def test_a_resume_is_the_same_to_the_bit_and_zero_stages_keep_the_same(tmp_path: Path) -> None:
    ranks = run_distributed(journeys, 2, str(tmp_path), timeout_s=300)
    for told in ranks:
        for name in NAMES:
            found: dict[str, Any] = told[name]
            assert found["again"] == found["losses"]
            assert [n for n, v in found["straight"].items() if not torch.equal(v, found["resumed"][n])] == []
        plain = told["zero0_fp32"]
        for name in NAMES[1:]:
            tolerance = 0.1 if "bf16" in name else 1e-3
            assert told[name]["losses"] == pytest.approx(plain["losses"], rel=tolerance)
        for key, value in plain["straight"].items():
            torch.testing.assert_close(told["zero3_fp32"]["straight"][key], value, rtol=1e-3, atol=1e-3)


WORDS = ["thing", "number", "query", "7"]
STAGE: dict[str, Any] = MODEL | {
    "vision": {"name": "test_resnet", "image_px": 64, "batch_norm": "global"},
    "text": GRU | {"dropout": 0.1, "max_length": 12},
    "labels": {"fields": ["concept"], "names": [f"c{number}" for number in range(7)]},
    "dropout": 0.1,
}


def vectors(path: Path, width: int = 5) -> Path:
    rows = [
        f"{word} {' '.join(str(place + n / 8) for n in range(width))}" for place, word in enumerate(WORDS)
    ]
    path.write_text(f"{len(rows)} {width}\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


def state(directory: Path) -> dict[str, Tensor]:
    return model_files.read_weights(directory)


@pytest.mark.slow
def test_a_stage_that_stops_goes_on_to_the_same_model(tmp_path: Path) -> None:
    """From a corpus, with labels, masks and dropout; its words begin as the file says and are written out."""
    corpus = write_corpus(tmp_path / "shard/out", {"train": 19})
    frozen = STAGE["text"] | {"weights": str(vectors(tmp_path / "v.txt")), "trainable": False}
    values = config_values(
        model=STAGE | {"text": frozen},
        losses={"labels": 1.0, "words": 0.5},
        vocabulary={"kind": "words", "size": 60},
        optimizer={"learning_rate": 1e-3},
        data={"positives": None},
    )
    run(Config(**values), make_job(tmp_path / "straight", corpus))
    with pytest.raises(Stopped):
        run(Config(**values), make_job(tmp_path / "stopped", corpus, stop_after=3))
    report = run(Config(**values), make_job(tmp_path / "stopped", corpus))
    assert {"loss/labels", "loss/words"} <= set(report.metrics)
    straight, stopped = state(tmp_path / "straight"), state(tmp_path / "stopped")
    assert [name for name, value in straight.items() if not torch.equal(value, stopped[name])] == []
    loaded = model_files.load(tmp_path / "straight")
    table = dict(zip(loaded.tokenizer.vocabulary(), straight["text.words.weight"], strict=True))
    for place, word in enumerate(WORDS):
        assert table[word].tolist() == [place + n / 8 for n in range(5)]
    assert float(table["content"].abs().max()) <= 0.1  # drawn
    assert loaded.embed_texts(["thing number 3"]).shape == (1, MODEL["dimension"])
    wrong = values | {"model": STAGE | {"text": frozen | {"weights": str(vectors(tmp_path / "w.txt", 4))}}}
    with pytest.raises(StageError, match=r"have 4 numbers, model\.text.word_width is 5"):
        run(Config(**wrong), make_job(tmp_path / "wrong", corpus))
