"""ConLIP over ranks, ZeRO stages and a resume; what its stages write out, read and measure."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from learning import methods, model_files
from learning.evaluation.cls_attention import cls_attention
from learning.training import distributed
from learning.training.checkpoint_files import Writer
from learning.training.deepspeed_setup import read_deepspeed_config
from learning.training.engine import Engine, Objective, OptimizerConfig
from stages import evaluate
from stages.base import StageError, Stopped
from stages.finetune import Config as FinetuneConfig
from stages.finetune import run as finetune
from stages.pretrain import Config as PretrainConfig
from stages.pretrain import run as pretrain
from tests import conlip_case, tiny_model
from tests.conlip_case import EQ_4, MODEL, Plain, build, momentum
from tests.conlip_reference import Stored
from tests.distributed_harness import run_distributed
from tests.plain_engine import PlainEngine
from tests.test_r2d2_distributed import close
from tests.training_case import CONFIGS, config_values, make_job, write_corpus

COUNT, RATE = 8, 0.004
ROWS = {1: (8,), 2: (5, 3)}
WEIGHTS = {"dcl": 1.0, "info_nce": 0.75, "mlm": 0.5, "mim": 2.0}  # exact in fp32


@dataclass(frozen=True)
class Case:
    losses: tuple[str, ...]
    steps: int = 1
    conditioned: bool = True

    def build(self) -> Any:
        return build(self.losses, conditioned=self.conditioned)

    def batch(self, model: Any, step: int) -> Any:
        """Ids come again in later steps: then the queues hold what shows the same."""
        return conlip_case.batch(model, COUNT, seed=step, ids=[(3 * step + row) % 7 for row in range(COUNT)])


LONG = Case(("dcl",), steps=6)  # 48 features in queues of 20
CASES = (LONG, Case(EQ_4), Case(("info_nce", "mlm"), conditioned=False))


def steps(rank: int, world_size: int) -> list[dict[str, Any]]:
    """Each case's steps on one rank; what it then holds."""
    return [_steps(rank, world_size, case) for case in CASES]


def _steps(rank: int, world_size: int, case: Case) -> dict[str, Any]:
    model = case.build()
    engine = PlainEngine(Objective(model, {name: WEIGHTS[name] for name in case.losses}))
    losses: list[dict[str, Tensor]] = []
    for step in range(case.steps):
        model.zero_grad()
        batch = conlip_case.rows(case.batch(model, step), ROWS[world_size], rank)
        losses.append(engine.backward_of(batch, None)[1])
        for parameter in model.parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                if dist.is_initialized():
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= world_size
                parameter.data -= RATE * parameter.grad
        model.after_step()
    return {"losses": losses} | state(model)


def state(model: Any) -> dict[str, Any]:
    """Weights (after one step and more: gradients too) and momentum, in words without a queue's layout."""
    kept = momentum(model)
    return {
        "weights": {name: value.detach().clone() for name, value in model.named_parameters()},
        "teacher": kept.teacher,
        "queues": [as_dict(kept.image_queue), as_dict(kept.text_queue)],
    }


def as_dict(queue: Stored) -> dict[str, Any]:
    return {"features": queue.features, "ids": queue.ids}


def plain(case: Case) -> dict[str, Any]:
    """The same steps in one process by the reference alone: its losses, its autograd, its momentum."""
    model = case.build()
    kept = momentum(model)
    losses = []
    for step in range(case.steps):
        model.zero_grad()
        batch = case.batch(model, step)
        told = Plain(model, batch, kept, quick=True).told()
        losses.append({name: loss.detach() for name, loss in told.losses.items()})
        torch.stack([WEIGHTS[name] * loss for name, loss in told.losses.items()]).sum().backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data -= RATE * parameter.grad
        kept.after_step(dict(model.named_parameters()), told.images, told.texts, batch.ids.tolist())
    return (
        {"losses": losses}
        | state(model)
        | {"teacher": kept.teacher, "queues": [as_dict(kept.image_queue), as_dict(kept.text_queue)]}
    )


@pytest.fixture(scope="module")
def expected() -> list[dict[str, Any]]:
    return [plain(case) for case in CASES]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_learn_and_remember_what_one_plain_process_does(
    world_size: int, expected: list[dict[str, Any]], two: list[dict[str, Any]]
) -> None:
    """Losses, weights, momentum encoders, and the queues' features, order and ids; rows lie unevenly."""
    ranks = [steps(0, 1)] if world_size == 1 else [rank["steps"] for rank in two]
    for rank, found in enumerate(ranks):
        for case, ours, theirs in zip(CASES, found, expected, strict=True):
            close(ours, theirs, f"rank {rank} of {world_size}: {case}")


@pytest.mark.slow
def test_the_plain_process_goes_round_its_queue(expected: list[dict[str, Any]]) -> None:
    long = expected[0]
    [queue, _] = long["queues"]
    assert len(queue["ids"]) == 20 < 6 * COUNT
    assert queue["ids"][-1] == (3 * 5 + 7) % 7
    moved = max(float((long["teacher"][n] - long["weights"][n]).abs().max()) for n in long["teacher"])
    assert moved > 1e-3


# ------------------------------------------------------------------------------------------ the engine


def engine(name: str, seed: int = 0) -> Engine:
    config = read_deepspeed_config(CONFIGS / f"{name}.json")
    each = COUNT // distributed.world_size()
    optimizer = OptimizerConfig(learning_rate=1e-4, weight_decay=0.1)
    made = build(seed=seed).float()
    return Engine(made, dict.fromkeys(EQ_4, 1.0), optimizer, config, batch_per_gpu=each, gradient_clip=1.0)


def take(made: Engine, numbers: range, rank: int, world_size: int) -> list[float]:
    told = []
    for step in numbers:
        whole = Case(EQ_4).batch(made.method, step)
        batch = conlip_case.rows(whole, (COUNT // world_size,) * world_size, rank)
        told.append(float(made.step(batch, 1.0).total))
    return told


def held(made: Engine) -> dict[str, Tensor]:
    method: Any = made.method
    kept = {n: v.clone() for n, v in method.state_dict().items() if n.startswith(method.training_only)}
    assert {value.dtype for value in kept.values()} == {torch.float32, torch.int64}
    return made.full_state() | kept


CONFIGURED = ("zero0_fp32", "zero3_fp32", "zero2_bf16")


def journeys(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """For each config six steps, a checkpoint in the middle, and the last three once more from it."""
    told: dict[str, Any] = {}
    for name in CONFIGURED:
        made = engine(name)
        losses = take(made, range(3), rank, world_size)
        directory = Path(folder) / name
        writer = Writer(directory)
        made.save(directory, writer)
        assert writer.error is None
        losses += take(made, range(3, 6), rank, world_size)
        straight = held(made)
        made.close()
        other = engine(name, seed=1)
        other.load(directory)
        again = take(other, range(3, 6), rank, world_size)
        resumed = held(other)
        other.close()
        assert set(resumed) == set(straight)
        told[name] = {
            "unequal": [key for key, value in straight.items() if not torch.equal(resumed[key], value)],
            "losses": losses,
            "again": again,
            "state": straight,
        }
    return told


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_zero_stages_and_a_resume_keep_the_same(two: list[dict[str, Any]]) -> None:
    """To the bit after a resume: heads, momentum encoders and queues too. bf16 leaves momentum in fp32."""
    told = [rank["journeys"] for rank in two]
    for name in CONFIGURED:
        for rank in told:
            assert rank[name]["unequal"] == []
            assert rank[name]["again"] == rank[name]["losses"][3:]
    first = told[0]["zero0_fp32"]
    assert any(name.startswith("heads.") for name in first["state"])
    assert int(first["state"]["queues.text.pointer"]) == 6 * COUNT % MODEL["queue"]
    for name in CONFIGURED:
        half = name.endswith("bf16")
        assert told[0][name]["losses"] == pytest.approx(first["losses"], rel=0.1 if half else 1e-4)
        for key, value in first["state"].items():
            ours = told[0][name]["state"][key]
            if not value.is_floating_point():
                assert torch.equal(ours, value)
            elif not half:
                torch.testing.assert_close(
                    ours, value, rtol=1e-4, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
                )


# ------------------------------------------------------------------------------------------- the stages

RETRIEVAL = {"split": "val", "texts": ["title"], "relevance": "concept"}


def values(**changed: Any) -> dict[str, Any]:
    model = MODEL | {"text": MODEL["text"] | {"dropout": 0.1}, "dropout": 0.1}
    data = {"positives": "concept"}
    return config_values(model=model, losses=dict.fromkeys(EQ_4, 1.0), epochs=2, data=data) | changed


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A corpus, and a stage that stopped once, with averaged weights of which the best were picked."""
    folder = tmp_path_factory.mktemp("conlip")
    corpus = write_corpus(folder / "shard/out", {"train": 19, "val": 9})
    config = values(ema={"decay": 0.5}, validate=RETRIEVAL, pick_best="val/rsum")
    with pytest.raises(Stopped):
        pretrain(PretrainConfig(**config), make_job(folder / "stage", corpus, stop_after=3))
    report = pretrain(PretrainConfig(**config), make_job(folder / "stage", corpus))
    assert {"val/rsum", "best/val/rsum", "loss/dcl", "loss/mlm", "loss/mim"} <= set(report.metrics)
    (folder / "stage/DONE.json").write_text("{}")
    return corpus, folder / "stage"


@pytest.mark.slow
def test_heads_stand_beside_the_model_and_not_in_it(trained: tuple[Path, Path]) -> None:
    _, stage = trained
    state, heads = model_files.read_weights(stage), model_files.read_heads(stage)
    assert {name.split(".")[0] for name in state} == {"vision", "text", "temperature"}
    assert {name.split(".")[1] for name in heads} == {"mlm", "mim", "mask_token"}
    assert set(model_files.read_card(stage)["files"]) >= {"model.safetensors", "heads.safetensors"}
    model = model_files.load(stage)
    assert not hasattr(model.method, "heads")
    assert model.embed_texts(["thing number 3"]).shape == (1, 8)
    whole: Any = model_files.load(stage, heads=True).method
    assert all(torch.equal(whole.state_dict()[name], value) for name, value in heads.items())


@pytest.mark.slow
def test_fine_tuning_takes_the_towers_to_larger_pictures(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """With the instance loss alone: no heads are asked for, and none left out by name."""
    corpus, stage = trained
    larger = values()["model"] | {"vision": MODEL["vision"] | {"image_px": 24}}
    config = values(kind="finetune", model=larger, losses={"dcl": 1.0}, epochs=1)
    report = finetune(FinetuneConfig(**config), make_job(tmp_path, corpus, weights=stage))
    assert set(report.metrics) >= {"loss/dcl"}
    assert not (tmp_path / "out/heads.safetensors").exists()
    table = model_files.read_weights(tmp_path)["vision.backbone.pos_embed"]
    assert table.shape == (1, 37, 8)


@pytest.mark.slow
def test_another_pre_training_goes_on_with_the_heads(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """Those that it has; what upstream has not starts from scratch. At hardly any rate they stay."""
    corpus, stage = trained
    still = {"optimizer": {"learning_rate": 1e-12, "weight_decay": 0.0}, "epochs": 1}
    config = values(losses={"dcl": 1.0, "mim": 1.0}, **still)
    pretrain(PretrainConfig(**config), make_job(tmp_path / "mim", corpus, weights=stage))
    before, after = model_files.read_heads(stage), model_files.read_heads(tmp_path / "mim")
    assert set(after) == {name for name in before if not name.startswith("heads.mlm.")}
    for name, value in after.items():
        torch.testing.assert_close(value, before[name])
    (tmp_path / "mim/DONE.json").write_text("{}")
    config = values(**still)
    pretrain(PretrainConfig(**config), make_job(tmp_path / "both", corpus, weights=tmp_path / "mim"))
    again = model_files.read_heads(tmp_path / "both")
    assert set(again) == set(before)
    torch.testing.assert_close(again["heads.mim.predictor.weight"], before["heads.mim.predictor.weight"])
    assert not torch.allclose(
        again["heads.mlm.predictor.dense.weight"], before["heads.mlm.predictor.dense.weight"]
    )
    config = values(**still) | {"model": values()["model"] | {"head_intermediate": 16}}
    with pytest.raises(
        StageError, match=r"heads.safetensors does not fit .* heads.mim.encoder.layers.0.narrow"
    ):
        pretrain(PretrainConfig(**config), make_job(tmp_path / "odd", corpus, weights=tmp_path / "mim"))


def measured(rank: int, world_size: int, corpus: str, stage: str, directory: str) -> dict[str, float]:
    """The evaluate stage's metrics on one of several processes."""
    job = make_job(Path(directory), Path(corpus), weights=Path(stage))
    config = evaluate.Config.model_validate(
        {"galleries": [RETRIEVAL | {"name": "own", "cls_attention": True}], "batch": 2, "examples": 1}
    )
    return evaluate.run(config, job).metrics


def on_two(rank: int, world_size: int, corpus: str, stage: str, folder: str) -> dict[str, Any]:
    """All that is asked of two ranks: one start of processes."""
    return {
        "steps": steps(rank, world_size),
        "measured": measured(rank, world_size, corpus, stage, f"{folder}/evaluate"),
        "journeys": journeys(rank, world_size, folder),
    }


@pytest.fixture(scope="module")
def two(trained: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    corpus, stage = trained
    folder = tmp_path_factory.mktemp("two")
    return run_distributed(on_two, 2, str(corpus), str(stage), str(folder), timeout_s=400)


@pytest.mark.slow
def test_the_evaluate_stage_measures_table_2(
    trained: tuple[Path, Path], two: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Each direction's mean and deviation, of what the heads give; on two processes the same bits."""
    corpus, stage = trained
    found = measured(0, 1, str(corpus), str(stage), str(tmp_path))
    assert [rank["measured"] for rank in two] == [found, found]
    model = model_files.load(stage, heads=True)
    seen: dict[str, list[Tensor]] = {}
    method: Any = model.method
    attends = method.cls_attention

    def keep(batch: Any) -> dict[str, Tensor]:
        told = attends(batch)
        length = batch.texts["text"].mask.sum(1)
        for row, n in enumerate(length.tolist()):
            seen.setdefault("text_to_image", []).append(told["text_to_image"][row, :, 1 : n - 1].flatten())
            seen.setdefault("image_to_text", []).append(told["image_to_text"][row, :, 1:].flatten())
        return dict(told)

    method.cls_attention = keep
    index = tiny_model.open_corpus(corpus, "val")
    told = cls_attention(
        method,
        model.tokenizer,
        model.transform,
        index,
        ["title"],
        seed=5,
        batch=2,
        device=model.device,
        max_length=model.max_length,
        max_pixels=10_000,
    )
    written = json.loads((tmp_path / "out/cls_attention.json").read_text())["own"]
    for way, scores in seen.items():
        joined = torch.cat(scores).double()
        mean, std = float(joined.mean()), float(joined.std(correction=0))
        assert (told[way].mean, told[way].std) == pytest.approx((mean, std), rel=1e-9)
        assert found[f"eval/own/attention_{way}_cls"] == told[way].mean == written[way]["mean"]
        assert found[f"eval/own/attention_{way}_cls_std"] == told[way].std
        assert sum(told[way].counts) == len(joined)
        assert told[way].counts[0] == int((joined < 0.05).sum())
        assert std > 0


def test_cls_attention_is_that_of_the_heads_inputs() -> None:
    """The first key of the cross-attention is the clean [CLS]; vanilla heads have their own inputs."""
    for conditioned in (True, False):
        model = build(EQ_4, conditioned=conditioned).eval()
        given = conlip_case.batch(model)
        told = model.cls_attention(given)
        plainly = Plain(model, given, momentum(model))
        for i in range(2):
            for name, way, tokens, other in (
                ("mlm", "text_to_image", plainly.text(i, "text_masked"), plainly.images_for_text(i)),
                ("mim", "image_to_text", plainly.masked_image(i), plainly.texts_for_image(i)),
            ):
                weights = model.heads[name].encoder.attention(tokens[None], None, other[None], None, 1)
                length = len(tokens)
                torch.testing.assert_close(told[way][i, :, :length], weights[0, :, :, 0])


@pytest.mark.slow
def test_a_model_without_heads_has_no_such_attention(trained: tuple[Path, Path], tmp_path: Path) -> None:
    corpus, _ = trained
    config = values(losses={"dcl": 1.0}, epochs=1)
    pretrain(PretrainConfig(**config), make_job(tmp_path / "cl", corpus))
    (tmp_path / "cl/DONE.json").write_text("{}")
    with pytest.raises(StageError, match=r"galleries.own.cls_attention: the model has no such heads"):
        measured(0, 1, str(corpus), str(tmp_path / "cl"), str(tmp_path / "eval"))
    with pytest.raises(ValueError, match="Clip has no heads in which"):
        other = methods.build(methods.parse_config(tiny_model.MODEL), ("ccl",), 50)
        cls_attention(
            other,
            tiny_model.tokenizer(),
            tiny_model.transform(),
            tiny_model.open_corpus(corpus, "val"),
            ["title"],
            seed=5,
            batch=2,
            device=torch.device("cpu"),
            max_length=9,
            max_pixels=10_000,
        )
    with pytest.raises(ValueError, match="cls_attention: is of images and their own texts"):
        evaluate.GalleryConfig(name="x", split="val", task="matching", cls_attention=True)
