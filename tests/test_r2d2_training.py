"""R2D2 under the engine: what is resumed, split by ZeRO, moved to other ranks, cast, skipped, written out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from learning import methods, model_files
from learning.training import distributed
from learning.training.augment import ImageTransform
from learning.training.checkpoint_files import Writer
from learning.training.deepspeed_setup import read_deepspeed_config
from learning.training.engine import Engine, OptimizerConfig
from stages.base import Stopped
from stages.finetune import Config as FinetuneConfig
from stages.finetune import run as run_finetune
from stages.pretrain import Config, run
from stages.upstream import load_upstream
from tests import r2d2_case, tiny_model
from tests.distributed_harness import run_distributed
from tests.r2d2_case import CNN, EQ_8, MODEL, PX, build, momentum
from tests.test_engine import Skipping
from tests.training_case import CONFIGS, config_values, make_job, write_corpus

COUNT, BEFORE, AFTER = 8, 3, 3
FP32 = [f"zero{stage}_fp32" for stage in range(4)]
BF16 = ["zero3_bf16"]
# As in tests/test_training.py: sums in another order, and AdamW's first steps make that grow with the rate
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, weight_decay=0.1)


def engine(name: str, world_size: int, seed: int = 0) -> Engine:
    config = read_deepspeed_config(CONFIGS / f"{name}.json")
    model = build(seed=seed).float()
    weights = dict.fromkeys(EQ_8, 1.0)
    return Engine(model, weights, OPTIMIZER, config, batch_per_gpu=COUNT // world_size, gradient_clip=1.0)


def take(made: Engine, steps: range, rank: int, world_size: int) -> list[float]:
    """The total losses. Ids come again, so that the queues hold positives."""
    told = []
    for step in steps:
        ids = [(3 * step + row) % 7 for row in range(COUNT)]
        whole = r2d2_case.batch(made.method, COUNT, seed=step, ids=ids)
        batch = r2d2_case.rows(whole, (COUNT // world_size,) * world_size, rank)
        told.append(float(made.step(batch, 1.0).total))
    return told


def save(made: Engine, directory: Path) -> None:
    writer = Writer(directory)
    made.save(directory, writer)
    assert writer.error is None


def held(made: Engine) -> dict[str, Tensor]:
    """All weights, whole, and all that momentum keeps."""
    method: Any = made.method
    kept = {n: v.clone() for n, v in method.state_dict().items() if n.startswith(method.training_only)}
    assert {value.dtype for value in kept.values()} <= {torch.float32, torch.int64}
    return made.full_state() | kept


def journeys(rank: int, world_size: int, folder: str, names: list[str]) -> dict[str, Any]:
    """For each config six steps, a checkpoint in the middle, and the last three once more from it."""
    told: dict[str, Any] = {}
    for name in names:
        made = engine(name, world_size)
        take(made, range(BEFORE), rank, world_size)
        save(made, Path(folder) / name)
        middle = held(made)
        losses = take(made, range(BEFORE, BEFORE + AFTER), rank, world_size)
        straight = held(made)
        made.close()
        other = engine(name, world_size, seed=1)  # other weights, an empty queue: nothing may be left of them
        other.load(Path(folder) / name)
        loaded = held(other)
        again = take(other, range(BEFORE, BEFORE + AFTER), rank, world_size)
        resumed = held(other)
        other.close()
        told[name] = {
            "loaded": unequal(loaded, middle),
            "resumed": unequal(resumed, straight),
            "losses": losses,
            "again": again,
            "state": straight,
        }
    return told


def unequal(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert set(one) == set(other)
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


def elastic(rank: int, world_size: int, source: str, name: str, steps: list[int], to: str) -> dict[str, Any]:
    """Steps from a checkpoint, on the ranks there are now, and a checkpoint again."""
    made = engine(name, world_size, seed=2)
    made.load(Path(source))
    losses = take(made, range(*steps), rank, world_size)
    save(made, Path(to))
    state = held(made)
    made.close()
    return {"losses": losses, "state": state}


def alone(function: Any, *arguments: Any) -> Any:
    """A function of ranks on one, in this process."""
    distributed.init()
    try:
        return function(0, 1, *arguments)
    finally:
        distributed.shutdown()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("r2d2")


@pytest.fixture(scope="module")
def told(place: Path) -> list[dict[str, Any]]:
    return run_distributed(journeys, 2, str(place), FP32 + BF16, timeout_s=500)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FP32 + BF16)
def test_a_resume_is_the_same_to_the_bit(told: list[dict[str, Any]], name: str) -> None:
    """Weights, teacher, queues with their pointer, ids and weights, and centres."""
    for rank in told:
        found = rank[name]
        assert found["loaded"] == []
        assert found["resumed"] == []
        assert found["again"] == found["losses"]
    assert unequal(told[0][name]["state"], told[1][name]["state"]) == []
    state = told[0][name]["state"]
    assert int(state["queues.text.pointer"]) == (BEFORE + AFTER) * COUNT % MODEL["teacher"]["queue"]
    assert float(state["queues.text.weights"].min()) == pytest.approx(0.99**2, rel=1e-6)
    assert float(state["centres.image.mean"].abs().max()) > 0


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float, at: str) -> None:
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        if not value.is_floating_point() or name.endswith(".weights"):
            assert torch.equal(ours[name], value), f"{at}: {name}"
        else:
            torch.testing.assert_close(
                ours[name],
                value,
                rtol=tolerance,
                atol=tolerance,
                msg=lambda text, n=name: f"{at}: {n}: {text}",
            )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_zero_stages_keep_the_same(told: list[dict[str, Any]]) -> None:
    expected = told[0]["zero0_fp32"]
    for name in FP32[1:]:
        assert told[0][name]["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        close(told[0][name]["state"], expected["state"], 1e-4, name)
    for name in BF16:
        assert told[0][name]["losses"] == pytest.approx(expected["losses"], rel=0.1)
        assert torch.equal(told[0][name]["state"]["queues.image.ids"], expected["state"]["queues.image.ids"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_other_ranks_go_on_with_the_same_momentum(told: list[dict[str, Any]], place: Path) -> None:
    """2 ranks with ZeRO 2 → 1 rank with ZeRO 3 → 4 ranks with ZeRO 1, against 2 ranks all the way."""
    expected = told[0]["zero2_fp32"]
    one = alone(elastic, str(place / "zero2_fp32"), "zero3_fp32", [3, 4], str(place / "one"))
    last = (str(place / "one"), "zero1_fp32", [4, 6], str(place / "four"))
    four = run_distributed(elastic, 4, *last, timeout_s=300)
    for rank in four:
        assert one["losses"] + rank["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        close(rank["state"], expected["state"], 1e-4, "2 → 1 → 4 ranks")


def followed(rank: int, world_size: int, names: list[str]) -> dict[str, list[str]]:
    """Where a teacher under bf16 is not the fp32 average of the bf16 weights, and what bf16 could hold."""
    wrong: dict[str, list[str]] = {}
    for name in names:
        made = engine(name, world_size)
        method: Any = made.method
        expected = momentum(method).teacher
        for step in range(4):
            take(made, range(step, step + 1), rank, world_size)
            student = dict(method.named_parameters())
            for key, value in expected.items():
                assert student[key].dtype == torch.bfloat16
                expected[key] = torch.lerp(value, student[key].detach().float(), 1 - 0.995)
        own = dict(method.teacher.named_buffers())
        wrong[name] = [key for key, value in expected.items() if not torch.equal(own[key], value)]
        for kept in (
            own["text_projection.weight"],
            method.queues["text"].features,
            method.centres["text"].mean,
        ):
            assert kept.dtype == torch.float32
            assert not torch.equal(kept, kept.bfloat16().float())
        made.close()
    return wrong


def normalised(rank: int, world_size: int) -> dict[str, Any]:
    """A teacher of a CNN that learns: its statistics are its student's, in fp32."""
    changed = CNN | {"vision": CNN["vision"] | {"batch_norm": "local"}}
    model = build(EQ_8, **changed).float()
    settings = read_deepspeed_config(CONFIGS / "zero0_bf16.json")
    made = Engine(model, dict.fromkeys(EQ_8, 1.0), OPTIMIZER, settings, batch_per_gpu=COUNT)
    take(made, range(2), rank, world_size)
    state = made.method.state_dict()
    names = [name for name in state if name.startswith("vision.") and "running" in name]
    wrong = [name for name in names if not torch.equal(state[f"teacher.{name}"], state[name].float())]
    return {
        "statistics": len(names),
        "wrong": wrong,
        "dtypes": [str(v.dtype) for v in momenta(held(made)).values()],
    }


@pytest.mark.slow
def test_a_teacher_keeps_its_statistics_in_fp32() -> None:
    told = alone(normalised)
    assert told["statistics"] > 4
    assert told["wrong"] == []
    assert set(told["dtypes"]) == {"torch.float32", "torch.int64"}


@pytest.mark.slow
def test_no_bit_of_momentum_goes_through_bf16() -> None:
    assert alone(followed, ["zero0_bf16", "zero2_bf16"]) == {"zero0_bf16": [], "zero2_bf16": []}


def skipped(rank: int, world_size: int) -> dict[str, Any]:
    """What a step that is not applied changed of momentum, and what the next one did."""
    made = engine("zero0_fp32", world_size)
    take(made, range(1), rank, world_size)
    before = momenta(held(made))
    made._engine = Skipping(made._engine)  # as when fp16 overflows
    take(made, range(1, 2), rank, world_size)
    changed = unequal(momenta(held(made)), before)
    made._engine = made._engine._engine
    take(made, range(2, 3), rank, world_size)
    after = momenta(held(made))
    return {
        "skipped": changed,
        "applied": unequal(after, before),
        "ids": after["queues.text.ids"].tolist(),
    }


KEPT = ("teacher.", "queues.", "centres.")


def momenta(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name.startswith(KEPT)}


def weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith(KEPT)}


@pytest.mark.slow
def test_a_step_that_is_not_applied_moves_no_momentum() -> None:
    told = alone(skipped)
    assert told["skipped"] == []
    assert {"queues.text.features", "centres.image.mean", "teacher.text_projection.weight"} <= set(
        told["applied"]
    )
    taken = [(3 * step + row) % 7 for step in (0, 2) for row in range(COUNT)]
    assert told["ids"] == taken + [0] * (MODEL["teacher"]["queue"] - len(taken))


def sized(rank: int, world_size: int) -> list[int]:
    """Bytes of a checkpoint, and of the buffers in it."""
    made = engine("zero1_fp32", world_size)
    buffers = {name: value.nbytes for name, value in made.method.named_buffers()}
    assert any(name.startswith("queues.") for name in buffers)
    kept = [made.state_bytes(), sum(buffers.values())]
    made.close()
    return kept


@pytest.mark.slow
def test_the_room_that_a_checkpoint_needs_counts_teacher_and_queues() -> None:
    needed, buffers = alone(sized)
    weights_and_moments = needed - buffers
    trained = sum(p.numel() for p in build().parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in build().parameters() if not p.requires_grad)
    assert weights_and_moments == trained * (4 + 4 + 8) + frozen * 4


def written(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """A trained model, written out as a stage does."""
    tokenizer = tiny_model.tokenizer()
    config = methods.parse_config(MODEL)
    torch.manual_seed(0)
    method: Any = methods.build(config, EQ_8, tokenizer.vocabulary_size)
    method.begin()
    settings = read_deepspeed_config(CONFIGS / "zero3_fp32.json")
    made = Engine(method, dict.fromkeys(EQ_8, 1.0), OPTIMIZER, settings, batch_per_gpu=COUNT)
    take(made, range(2), rank, world_size)
    transform = ImageTransform(PX, config.vision.mean, config.vision.std)  # type: ignore[attr-defined]
    state = made.full_state()
    model_files.save(
        Path(folder), method, MODEL, EQ_8, tokenizer, transform=transform, max_length=9, state=state
    )
    told = held(made)
    made.close()
    return told


@pytest.mark.slow
def test_the_model_written_out_has_no_teacher_and_is_fine_tuned(tmp_path: Path) -> None:
    told = alone(written, str(tmp_path / "out"))
    names = set(model_files.read_weights(tmp_path))
    assert names == set(weights(told))
    loaded = model_files.load(tmp_path)
    assert loaded.embed_texts(["red thing", "blue thing 3"]).shape == (2, MODEL["dimension"])
    for losses in (EQ_8, ("gcpr", "fgr"), ("match",)):
        method: Any = methods.build(
            methods.parse_config(MODEL), losses, tiny_model.tokenizer().vocabulary_size
        )
        load_upstream(method, model_files.read_weights(tmp_path), (), (), tmp_path)
        method.begin()
        assert hasattr(method, "teacher") == (losses == EQ_8)
        if losses == EQ_8:
            teacher = dict(method.teacher.named_buffers())
            for name, value in momentum(method).teacher.items():
                assert torch.equal(teacher[name], told[name]), name
                assert torch.equal(value, told[name]), name
            assert r2d2_case.stored(method.queues["text"]).ids == []
        terms = method(r2d2_case.batch(method.double(), 4))
        assert all(loss.isfinite() for loss in terms.losses.values())


@pytest.mark.slow
def test_a_stage_that_stops_goes_on_to_the_same_model(tmp_path: Path) -> None:
    """From a corpus, with dropout; every step after the stop reads teacher, queues and centres."""
    corpus = write_corpus(tmp_path / "shard/out", {"train": 19})
    model = MODEL | {"text": MODEL["text"] | {"dropout": 0.1}, "dropout": 0.1, "image_view": "randaugment"}
    values = config_values(model=model, losses=dict.fromkeys(EQ_8, 1.0), epochs=3)
    run(Config(**values), make_job(tmp_path / "straight", corpus))
    with pytest.raises(Stopped):
        run(Config(**values), make_job(tmp_path / "stopped", corpus, stop_after=3))
    report = run(Config(**values), make_job(tmp_path / "stopped", corpus))
    assert {f"loss/{name}" for name in EQ_8} <= set(report.metrics)
    one, other = (load_file(tmp_path / name / "out/model.safetensors") for name in ("straight", "stopped"))
    assert unequal(one, other) == []
    assert not momenta(one)
    upstream = tmp_path / "straight"
    (upstream / "DONE.json").write_text("{}")
    tuned = config_values(
        kind="finetune",
        model=model,
        losses={"gcpr": 1.0, "fgr": 1.0},
        epochs=1,
        inputs=values["inputs"] | {"weights": "x"},
    )
    run_finetune(FinetuneConfig(**tuned), make_job(tmp_path / "tuned", corpus, weights=upstream))
    assert set(load_file(tmp_path / "tuned/out/model.safetensors")) == set(one)
