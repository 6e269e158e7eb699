"""A training stage from corpus to out/: kills, stops, damage, bad pictures, a full disk, upstream weights."""

import hashlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

import learning
from learning import methods, model_files
from learning.training.engine import Engine
from learning.training.loader import Batches
from stages.base import StageError
from stages.finetune import Config as FinetuneConfig
from stages.pretrain import Config, run
from stages.upstream import absolute_weights, load_upstream
from tests.training_case import (
    CONFIGS,
    MODEL,
    SAME_ON_ANY_RANKS,
    config_values,
    logs,
    make_job,
    read_ledger,
    start_ranks,
    write_corpus,
)

CLIP: dict[str, Any] = {
    "method": "clip",
    "vision": {"name": "resnet10t", "image_px": 32},
    "text": {"layers": 1, "width": 32, "heads": 2, "intermediate": 64, "max_length": 12},
    "dimension": 16,
}
ONE = {"model": CLIP, "losses": {"ccl": 1.0}, "epochs": 1}


def weights_hash(directory: Path) -> str:
    return hashlib.sha256((directory / "out/model.safetensors").read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------------- config


def test_the_defaults_and_files_of_a_config() -> None:
    model = MODEL | {"vision": MODEL["vision"] | {"weights": "../w/a.safetensors"}}
    config = Config(**config_values(model=model, vocabulary={"path": "vocab.txt"}))
    assert config.files() == {
        "deepspeed": Path(config_values()["deepspeed"]),
        "vocabulary.path": Path("vocab.txt"),
        "model.vision.weights": Path("../w/a.safetensors"),
    }
    assert absolute_weights(model, Path("/r"))["vision"]["weights"] == "/r/../w/a.safetensors"
    assert Config.distributed
    assert FinetuneConfig(**config_values(kind="finetune")).kind == "finetune"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"losses": {"cll": 1.0}}, "losses: cll is not a loss of cookie; allowed: ccl, vcl, tcl, hinge"),
        ({"losses": {"ccl": 0.0}}, "the weight of ccl must be above 0"),
        ({"model": MODEL | {"pooling": "median"}}, "pooling"),
        ({"model": MODEL | {"dimenson": 8}}, "dimenson"),
        ({"model": {"method": "cookies"}}, "'cookies' is not a method; allowed: "),
        ({"pick_best": "val/rsum"}, "pick_best: needs `validate`"),
        ({"pick_best": "loss/ccl", "validate": {"split": "val"}}, "no validation metric"),
        ({"data": {"texts": ["titel"]}}, "texts"),
        ({"epoch": 3}, "epoch"),
    ],
)
def test_a_wrong_config_is_refused_with_the_field(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as raised:
        Config(**config_values(**changed))
    assert message in str(raised.value)


def test_a_loss_of_weight_null_is_left_out() -> None:
    config = Config(**config_values(losses={"ccl": 1.0, "hinge": None}))
    assert config.losses == {"ccl": 1.0}
    with pytest.raises(ValidationError, match="at least 1"):
        Config(**config_values(losses={"ccl": None}))


def test_cosmetic_fields_exist() -> None:
    for name in Config.cosmetic:
        fields: Any = Config.model_fields
        for part in name.split("."):
            assert part in fields, name
            annotation = fields[part].annotation
            fields = getattr(annotation, "model_fields", {})
            for option in getattr(annotation, "__args__", ()):
                fields = fields or getattr(option, "model_fields", {})


def test_of_a_deepspeed_config_its_precision_counts_and_not_how_it_holds(tmp_path: Path) -> None:
    config = Config(**config_values())
    counted: dict[str, set[str | None]] = {}
    for path in CONFIGS.glob("*.json"):
        counted.setdefault(path.stem.rpartition("_")[2], set()).add(config.what_counts("deepspeed", path))
    assert {dtype: len(texts) for dtype, texts in counted.items()} == {"fp32": 1, "bf16": 1, "fp16": 1}
    assert len(set.union(*counted.values())) == 3
    (tmp_path / "broken.json").write_text("{")
    assert config.what_counts("deepspeed", tmp_path / "broken.json") is None
    assert config.what_counts("vocabulary.path", CONFIGS / "zero0_fp32.json") is None


# ------------------------------------------------------------------------------------------- in this process


def test_one_process_trains_and_its_model_loads(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "shard/out", {"train": 19, "val": 6})
    values = config_values(**ONE, validate={"split": "val", "texts": ["title"]}, pick_best="val/rsum")
    job = make_job(tmp_path / "a", corpus)
    report = run(Config(**values), job)
    assert report.counts["steps"] == 2
    assert report.counts["samples_seen"] == 16
    assert {"loss/total", "loss/ccl", "train/lr", "train/temperature", "train/grad_norm"} <= set(
        report.metrics
    )
    assert report.metrics["val/rsum"] == report.metrics["best/val/rsum"]
    assert report.metrics["loss/total"] == pytest.approx(report.metrics["loss/ccl"])
    model = learning.load(tmp_path / "a")
    assert model.embed_texts(["thing number 3"]).shape == (1, 16)
    state = load_file(tmp_path / "a/out/model.safetensors")
    assert {value.dtype for value in state.values()} <= {torch.float32, torch.int64}
    # a second run finds the last checkpoint, takes no step, and writes the same
    before = weights_hash(tmp_path / "a")
    again = run(Config(**values), make_job(tmp_path / "a", corpus))
    assert weights_hash(tmp_path / "a") == before
    assert again.metrics == report.metrics

    # and another stage goes on from its weights and its tokenizer
    weights = tmp_path / "a"
    (weights / "DONE.json").write_text("{}")
    upstream = config_values(**ONE | {"epochs": 1}, inputs={"corpus": "shard", "weights": "a"})
    upstream["optimizer"] = {"learning_rate": 1e-30}
    run(Config(**upstream), make_job(tmp_path / "b", corpus, weights=weights))
    went_on = load_file(tmp_path / "b/out/model.safetensors")
    assert torch.equal(went_on["text.bert.embeddings.word_embeddings.weight"],
                       state["text.bert.embeddings.word_embeddings.weight"])  # fmt: skip
    assert not (tmp_path / "b/tokenizer").exists()


def test_a_stage_may_have_a_seed_of_its_own(tmp_path: Path) -> None:
    """In place of the recipe's, 5 here: the start and every draw hang on it."""
    corpus = write_corpus(tmp_path / "shard/out", {"train": 16})
    found = {}
    for seed in (None, 5, 6):
        name = f"seed_{seed}"
        run(Config(**config_values(**ONE, seed=seed)), make_job(tmp_path / name, corpus))
        found[seed] = weights_hash(tmp_path / name)
    assert found[None] == found[5]
    assert found[6] != found[5]


@pytest.mark.slow
def test_cached_tower_tokens_train_the_same_model(tmp_path: Path) -> None:
    """The faster path from corpus to out/: augmented views go through the tower, plain ones are kept."""
    corpus = write_corpus(tmp_path / "shard/out", {"train": 19})
    text = MODEL["text"] | {"dropout": 0.0}
    model = MODEL | {"vision": MODEL["vision"] | {"trainable": False}, "text": text, "dropout": 0.0}
    for cache in ("memory", "tokens"):
        values = config_values(model=model, data={"cache": cache}, optimizer={"learning_rate": 1e-3})
        run(Config(**values), make_job(tmp_path / cache, corpus))
    plain, cached = (load_file(tmp_path / c / "out/model.safetensors") for c in ("memory", "tokens"))
    torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-4)
    values["optimizer"] = {"learning_rate": 2e-3}  # another fingerprint of the stage: the same tokens
    run(Config(**values), make_job(tmp_path / "another", corpus))
    first, again = (next((tmp_path / d / "tower_tokens").glob("*.tokens")) for d in ("tokens", "another"))
    assert again.samefile(first)
    learns = MODEL | {"vision": MODEL["vision"] | {"trainable": True}}
    with pytest.raises(StageError, match=r"model\.vision\.trainable: false"):
        run(Config(**config_values(model=learns, data={"cache": "tokens"})), make_job(tmp_path / "x", corpus))


def test_upstream_weights_must_fit(tmp_path: Path) -> None:
    config = methods.parse_config(CLIP)
    torch.manual_seed(0)
    source = {name: value.clone() for name, value in methods.build(config, ("ccl",), 60).state_dict().items()}
    torch.manual_seed(1)
    target = methods.build(config, ("ccl",), 60)
    lacking = {k: v for k, v in source.items() if not k.startswith("fusion.image")} | {"old.x": torch.ones(1)}
    with pytest.raises(
        ValueError, match=r"missing: fusion.image.projection.weight .*unexpected: old.x"
    ) as raised:
        load_upstream(target, lacking, (), (), tmp_path)
    assert "new_parts" in str(raised.value) and "dropped_parts" in str(raised.value)
    fresh = target.state_dict()["fusion.image.projection.weight"].clone()
    load_upstream(target, lacking, ("fusion.image",), ("old",), tmp_path)
    assert torch.equal(target.state_dict()["fusion.image.projection.weight"], fresh)
    assert torch.equal(
        target.state_dict()["fusion.text.projection.weight"], source["fusion.text.projection.weight"]
    )
    with pytest.raises(
        ValueError, match=r"of another shape: .*word_embeddings.weight \(60, 32\) instead of \(70, 32\)"
    ):
        load_upstream(methods.build(config, ("ccl",), 70), source, (), (), tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_per_gpu": 4}, "8 is not 1 ranks × batch_per_gpu 4; gradient accumulation adds no negatives"),
        ({"contrastive_batch": 32}, "the split has 19 samples"),
        ({"data": {"split": "tarin"}}, "no split 'tarin'; there are: train, val"),
        ({"deepspeed": "nowhere.json"}, "nowhere.json: no such file"),
        (
            {"optimizer": {"learning_rate": 1, "lr_scale": {"fuson": 1}}},
            "lr_scale: fuson is no trainable part",
        ),
    ],
)
def test_mistakes_stop_with_their_field(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    corpus = write_corpus(tmp_path / "shard/out", {"train": 19, "val": 6})
    with pytest.raises(StageError, match=r".") as raised:
        run(Config(**config_values(**ONE | changed)), make_job(tmp_path / "a", corpus))
    assert message in str(raised.value)


def test_bad_pictures_are_skipped_up_to_a_share(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "shard/out", {"train": 24}, {3: b"<html>", 5: b""})
    allowed = config_values(**ONE | {"epochs": 2}, data={"max_bad_share": 0.1})
    report = run(Config(**allowed), make_job(tmp_path / "a", corpus))
    assert report.counts["bad_samples"] == 2
    with pytest.raises(StageError, match=r"bad samples, data\.max_bad_share allows 0") as raised:
        run(Config(**allowed | {"data": {"max_bad_share": 0}}), make_job(tmp_path / "b", corpus))
    assert "train/train-0000" in str(raised.value)
    assert "train000" in str(raised.value)


def test_another_batch_is_refused_with_the_remedy(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "shard/out", {"train": 19})
    run(Config(**config_values(**ONE)), make_job(tmp_path / "a", corpus))
    other = config_values(**ONE | {"contrastive_batch": 4})
    with pytest.raises(StageError, match=r"contrastive_batch = 8, this run has 4; start it with 8 again, or"):
        run(Config(**other), make_job(tmp_path / "a", corpus))


@pytest.mark.slow
def test_bad_pictures_are_counted_over_all_ranks(tmp_path: Path) -> None:
    """Six bad ones of 24, five allowed: in one epoch neither of two ranks meets more than five alone."""
    corpus = write_corpus(tmp_path / "shard/out", {"train": 24}, dict.fromkeys((1, 4, 9, 12, 17, 20), b""))
    values = config_values(**ONE | {"epochs": 1, "data": {"max_bad_share": 5 / 24}})
    assert start_ranks(tmp_path / "a", corpus, values) == [2, 2], logs(tmp_path / "a")
    told = [path.read_text() for path in sorted((tmp_path / "a").glob("test_rank*.log"))]
    alone = [text.count("skipped a sample") for text in told]
    assert max(alone) <= 5, alone
    assert all("6 bad samples, data.max_bad_share allows 5" in text for text in told)


def test_the_share_of_time_spent_waiting_for_data_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "shard/out", {"train": 24})
    rows, step_of_engine = Batches.rows, Engine.step
    taken: list[int] = []
    fifth = threading.Event()

    def late_rows(self: Batches, step: int, part: int, parts: int) -> Any:
        if step == 5:  # the sixth batch: begun when there is nothing left to do but wait for it
            assert fifth.wait(60)
            time.sleep(1.0)
        return rows(self, step, part, parts)

    def counted_step(self: Engine, *arguments: Any, **options: Any) -> Any:
        result = step_of_engine(self, *arguments, **options)
        taken.append(1)
        if len(taken) == 5:
            fifth.set()
        return result

    monkeypatch.setattr(Batches, "rows", late_rows)
    monkeypatch.setattr(Engine, "step", counted_step)
    job = make_job(tmp_path / "a", corpus)
    run(Config(**config_values(**ONE | {"epochs": 2})), job)
    tracker: Any = job.tracker
    told = {step: row for step, row in tracker.rows if "loss/total" in row}
    assert list(told) == [1, 2, 3, 4, 5, 6]
    assert all(0 <= row["train/data_wait_share"] <= 1 for row in told.values())
    waited_s = told[6]["train/data_wait_share"] * 8 / told[6]["train/samples_per_s"]
    assert 0.8 < waited_s < 30


def test_a_corrupt_shard_stops_before_training(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "shard/out", {"train": 24})
    shard = corpus / "train/train-00000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(StageError, match=r"train-00000.tar: the shard has \d+ bytes, not \d+"):
        run(Config(**config_values(**ONE)), make_job(tmp_path / "a", corpus))


def test_a_loss_that_is_no_number_is_not_saved(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "shard/out", {"train": 24})
    weights = tmp_path / "w"
    run(Config(**config_values(**ONE)), make_job(weights, corpus))
    (weights / "DONE.json").write_text("{}")
    state = load_file(weights / "out/model.safetensors")
    state["fusion.image.projection.weight"][:] = float("nan")
    save_file(state, weights / "out/model.safetensors")
    card = json.loads((weights / "out/model.json").read_text())
    card["files"]["model.safetensors"]["sha256"] = weights_hash(weights)
    card["files"]["model.safetensors"]["bytes"] = (weights / "out/model.safetensors").stat().st_size
    (weights / "out/model.json").write_text(json.dumps(card))
    with pytest.raises(StageError, match="step 1: the loss is no number"):
        run(Config(**config_values(**ONE)), make_job(tmp_path / "a", corpus, weights=weights))
    assert not list((tmp_path / "a/checkpoints").iterdir())
    assert not (tmp_path / "a/out" / model_files.WEIGHTS).exists()


# ----------------------------------------------------------------------------------- several processes


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("config", ["zero0_fp32", "zero2_fp32"])
def test_kills_anywhere_end_with_the_same_weights(tmp_path: Path, config: str) -> None:
    corpus = write_corpus(tmp_path / "shard/out", {"train": 19, "val": 6})
    path = Path(config_values()["deepspeed"]).with_name(f"{config}.json")
    background = config == "zero2_fp32"  # then it is a matter of time which step has a checkpoint at a kill
    values = config_values(
        deepspeed=str(path),
        epochs=4,
        validate={"split": "val", "every_epochs": 2},
        pick_best="val/r@m",
        checkpoint={"every_steps": 2, "background": background},
    )
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert start_ranks(straight, corpus, values) == [0, 0], logs(straight)

    assert -9 in start_ranks(killed, corpus, values, kill_step=2)  # before there is a checkpoint
    assert -9 in start_ranks(killed, corpus, values, kill_write=30, kill_rank=1)  # in the first checkpoint
    assert not list((killed / "checkpoints").glob("step_????????"))
    assert -9 in start_ranks(killed, corpus, values, kill_step=4)  # between checkpoints
    if not background:
        assert [p.name for p in (killed / "checkpoints").glob("step_????????")] == ["step_00000002"]
    assert start_ranks(killed, corpus, values, stop_after=1) == [75, 75], logs(killed)  # one rank is asked to
    newest = max((killed / "checkpoints").glob("step_????????"))
    assert newest.name == "step_00000003" or background
    damaged = newest / "rank_1.pt"
    damaged.write_bytes(damaged.read_bytes()[:-3])
    assert start_ranks(killed, corpus, values) == [0, 0], logs(killed)
    assert f"{newest.name} is damaged and skipped: rank_1.pt" in logs(killed)

    assert weights_hash(killed) == weights_hash(straight)
    told, expected = (json.loads((d / "told.json").read_text()) for d in (killed, straight))
    changing = ("train/samples_per_s", "train/data_wait_share")
    for mine, theirs in ((told["metrics"], expected["metrics"]), (told["counts"], expected["counts"])):
        assert {k: v for k, v in mine.items() if k not in changing} == {
            k: v for k, v in theirs.items() if k not in changing
        }
    last = {step: row["loss/total"] for step, row in told["rows"] if "loss/total" in row}
    assert min(last) == 3 or background
    assert last == {s: r["loss/total"] for s, r in expected["rows"] if "loss/total" in r and s >= min(last)}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "shard/out", {"train": 19})
    values = config_values(**ONE | {"epochs": 2})
    assert start_ranks(tmp_path / "a", corpus, values, file_limit=1_000_000) == [2, 2], logs(tmp_path / "a")
    text = logs(tmp_path / "a")
    assert "the checkpoint of step 2 failed: rank 0:" in text
    assert "training goes on" in text
    assert "error: " in text and "the checkpoint of step 4 failed" in text and "make room" in text
    assert not list((tmp_path / "a/checkpoints").iterdir())
    assert start_ranks(tmp_path / "a", corpus, values) == [0, 0], logs(tmp_path / "a")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_other_ranks_and_another_zero_stage_go_on(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "shard/out", {"train": 24})
    # Sums in another order differ in the last bits, and AdamW's first steps make that grow with the rate:
    # from 3e-6 right after the move to 1.07e-4 four steps later at a rate of 1e-3.
    values = config_values(
        model=SAME_ON_ANY_RANKS,
        optimizer={"learning_rate": 1e-4, "lr_scale": {"vision": 0.1}},
        checkpoint={"every_steps": 2, "background": False},
    )
    zero = {stage: values | {"deepspeed": str(CONFIGS / f"zero{stage}_fp32.json")} for stage in range(4)}
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    assert start_ranks(straight, corpus, zero[2], ledger=1) == [0, 0], logs(straight)

    assert -9 in start_ranks(moved, corpus, zero[2], ledger=1, kill_step=4)
    assert start_ranks(moved, corpus, zero[3], ranks=1, ledger=1, kill_step=4) == [-9], logs(moved)
    assert start_ranks(moved, corpus, zero[0], ledger=1) == [0, 0], logs(moved)
    text = logs(moved)
    assert "was written by 2 ranks with ZeRO 2: laying it out for 1 rank with ZeRO 3" in text
    assert "was written by 1 rank with ZeRO 3: laying it out for 2 ranks with ZeRO 0" in text

    told, expected = read_ledger(moved), read_ledger(straight)
    assert set(told) == set(expected) == set(range(1, 10))
    for epoch in range(3):
        keys = [key for step in range(3 * epoch + 1, 3 * epoch + 4) for key in told[step].keys]
        assert sorted(keys) == [f"train{number:04d}" for number in range(24)]
    for step, row in expected.items():
        assert (told[step].keys, told[step].pixels, told[step].texts) == (row.keys, row.pixels, row.texts)
        assert told[step].loss == pytest.approx(row.loss, abs=1e-4)
