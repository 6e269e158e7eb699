"""Losses that go wrong: found, blamed on samples, rewound, left out; and steps that fp16 skips."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.shards import ShardIndex
from learning.methods.base import Batch, Views
from learning.tokenizer import train_wordpiece
from learning.training import distributed
from learning.training.anomalies import Anomaly, AnomalyConfig, LossWatch
from learning.training.augment import ImageTransform
from learning.training.checkpoint import CheckpointConfig, Checkpoints
from learning.training.deepspeed_setup import read_deepspeed_config
from learning.training.engine import Engine, OptimizerConfig, StepResult
from learning.training.loader import Batches, DataConfig
from learning.training.loop import fit
from learning.training.plan import Outcome, Plan
from learning.training.schedule import ScheduleConfig, factor
from stages.pretrain import Config, run
from tests import survival_case
from tests.survival_case import clip_values, end, start
from tests.training_case import CONFIGS, PX, RecordingTracker, TinyMethod, logs, make_job, write_corpus

SAMPLES, BATCH = 19, 8  # two steps an epoch
PLAN = Plan(4, ScheduleConfig(warmup=2), CheckpointConfig(every_steps=2), log_every_steps=10)


class RecordingShown(RecordingTracker):
    """Keeps metrics, voids them when training goes back, and remembers where it began."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[int] = []

    def begin(self, step: int, steps: int) -> None:
        self.begun.append(step)
        self.rewind(step)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        super().metrics(values, step)

    def advance(self, n: int, **shown: Any) -> None:
        """Not shown."""

    def should_stop(self) -> bool:
        return False


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "shard/out", {"train": SAMPLES})


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed.init()
    yield
    distributed.shutdown()


@pytest.fixture
def unpatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test does to the loader ends with it."""
    monkeypatch.setattr(Batches, "joined", Batches.joined)


def make_batches(corpus: Path) -> Batches:
    tokenizer = train_wordpiece([f"thing number {n} a content of in words query" for n in range(30)], 150)
    views = Views({"image": "plain"}, {"text": "plain"})
    transform = ImageTransform(PX, (0.5,) * 3, (0.5,) * 3)
    options: dict[str, Any] = {"seed": 5, "contrastive_batch": BATCH, "max_length": 12}
    index = ShardIndex.open(corpus, "train")
    config = DataConfig(max_bad_share=0.0)
    return Batches(index, tokenizer, transform, views, config, rank=0, world_size=1, **options)


def train(
    corpus: Path, checkpoints: Path, plan: Plan = PLAN, kind: type[Engine] = Engine
) -> tuple[Outcome, RecordingShown, Engine]:
    """A training of the tiny method in this process: real loader, engine, loop and checkpoints."""
    torch.manual_seed(3)
    engine = kind(
        TinyMethod(words=200),
        {"ccl": 1.0},
        OptimizerConfig(learning_rate=1e-2),
        read_deepspeed_config(CONFIGS / "zero0_fp32.json"),
        batch_per_gpu=BATCH,
        gradient_clip=1.0,
    )
    shown = RecordingShown()
    return fit(engine, make_batches(corpus), plan, Checkpoints(checkpoints, 2), shown), shown, engine


def first_seen(batches: Batches, step: int) -> str:
    """A sample that the steps before `step` do not have, and `step` has."""
    before = {key for earlier in range(1, step) for key in batches.keys(earlier - 1)}
    return next(key for key in batches.keys(step - 1) if key not in before)


# ------------------------------------------------------------------------------------------- the rule


def result(total: float, applied: bool = True) -> StepResult:
    return StepResult(torch.tensor(total), {"ccl": torch.tensor(total)}, {}, applied, None)


def test_a_loss_is_judged_once_and_against_the_last_window() -> None:
    recent: list[float] = []
    watch = LossWatch(AnomalyConfig(spike_factor=3.0, window=5), recent)

    def see(total: float, applied: bool = True, scales_loss: bool = False) -> None:
        watch.hold(9, result(total, applied), scales_loss)
        watch.judge(*watch.offer())
        assert not watch.holds

    for loss in (100.0, 2.0, 2.0, 1.0, 2.0, 1.0):
        see(loss)  # the first is far above the others, but there is no window yet
    assert recent == [2.0, 2.0, 1.0, 2.0, 1.0]
    see(5.5)
    with pytest.raises(
        Anomaly, match=r"the loss 6.5 is above anomalies.spike_factor 3 × 2, the median of the"
    ):
        see(6.5)
    assert recent == [2.0, 1.0, 2.0, 1.0, 5.5]  # a spike is no measure for others
    see(math.nan, applied=False, scales_loss=True)  # skipped by fp16: nothing happened
    with pytest.raises(Anomaly, match=r"the loss is no number \(loss/ccl inf\)") as raised:
        see(math.inf)
    assert raised.value.suspects == (8, 9)
    with pytest.raises(Anomaly, match=r"its gradient is no number \(loss/ccl 2.0\)") as raised:
        see(2.0, applied=False)  # without a scale there is no other reason to leave a step out
    assert raised.value.suspects == (9,)
    watch.judge(*watch.offer())  # nothing is held: nothing to judge


def test_without_a_factor_no_loss_is_a_spike_and_none_is_kept() -> None:
    recent: list[float] = []
    watch = LossWatch(AnomalyConfig(window=5), recent)
    for loss in [1.0] * 6 + [1e9]:
        watch.hold(1, result(loss), False)
        watch.judge(*watch.offer())
    assert recent == []


# ------------------------------------------------------------------------------- a training in this process


@pytest.mark.usefixtures("unpatched", "one_process")
def test_a_sample_without_numbers_is_found_and_left_out_and_a_resume_keeps_it_so(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    batches = make_batches(corpus)
    key = first_seen(batches, 3)
    survival_case.break_pixels([key])
    whole, shown, engine = train(corpus, tmp_path / "whole")
    assert list(whole.left_out) == [key]
    assert "step 3: the loss is no number (loss/ccl nan)" in whole.left_out[key]
    assert "image 'image' is not finite" in whole.left_out[key]
    assert (whole.rewinds, whole.step, whole.skipped) == (1, 8, {})
    assert shown.begun == [0, 2]
    assert f"back to step 2 without 1 samples: {key} (rewind 1 of at most 3)" in caplog.text
    assert all(math.isfinite(value) for _, row in shown.rows for value in row.values())
    state = engine.full_state()

    position = tmp_path / "whole/step_00000008/position.json"
    assert json.loads(position.read_text())["left_out"] == whole.left_out

    # interrupted after step 5, and gone on: from the checkpoint of step 4, which knows the sample
    with pytest.raises(RuntimeError, match="pulled the plug"):
        train(corpus, tmp_path / "parts", kind=_unplugged_at(7))  # steps 1 2 3, 3 4 5, and the next
    again, shown, engine = train(corpus, tmp_path / "parts")
    assert shown.begun == [4]
    assert (again.left_out, again.rewinds) == (whole.left_out, 1)
    for name, value in engine.full_state().items():
        assert torch.equal(value, state[name]), name


def _unplugged_at(call: int) -> type[Engine]:
    class Unplugged(Engine):
        calls = 0

        def step(self, *args: Any, **options: Any) -> StepResult:
            self.calls += 1
            if self.calls == call:
                raise RuntimeError("pulled the plug")
            return super().step(*args, **options)

    return Unplugged


@pytest.mark.usefixtures("one_process")
def test_a_rewound_training_is_the_one_that_never_read_the_sample(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the bad step stays: the same weights, to the last bit."""
    key = first_seen(make_batches(corpus), 3)
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "joined", Batches.joined)
        survival_case.break_pixels([key])
        _, _, rewound = train(corpus, tmp_path / "rewound")
    state = rewound.full_state()
    good = Batches._good_sample

    def good_sample(self: Batches, *args: Any) -> Any:
        self.left_out = frozenset({key})
        return good(self, *args)

    monkeypatch.setattr(Batches, "_good_sample", good_sample)
    outcome, _, straight = train(corpus, tmp_path / "straight")
    assert outcome.rewinds == 0
    for name, value in straight.full_state().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.usefixtures("unpatched", "one_process")
def test_too_many_rewinds_end_the_training_with_all_samples_named(corpus: Path, tmp_path: Path) -> None:
    batches = make_batches(corpus)
    key = first_seen(batches, 3)
    survival_case.break_pixels([key, first_seen(batches, 4)])
    plan = replace(PLAN, anomalies=AnomalyConfig(max_rewinds=1))
    with pytest.raises(ValueError) as raised:
        train(corpus, tmp_path, plan)
    message = str(raised.value)
    assert "step 4: the loss is no number (loss/ccl nan); the samples of steps 3 and 4: train00" in message
    assert "anomalies.max_rewinds allows 1, and as many are done; left out before: " in message
    assert key in message
    assert message.endswith("the last checkpoint: step 2")
    assert [p.name for p in tmp_path.glob("step_*")] == ["step_00000002"]  # nothing of the bad steps is kept


@pytest.mark.usefixtures("unpatched", "one_process")
def test_on_nan_stop_stops_and_names_the_samples(corpus: Path, tmp_path: Path) -> None:
    key = first_seen(make_batches(corpus), 3)
    survival_case.break_pixels([key])
    with pytest.raises(ValueError, match="step 3: the loss is no number") as raised:
        train(corpus, tmp_path, replace(PLAN, anomalies=AnomalyConfig(on_nan="stop")))
    assert "max_rewinds" not in str(raised.value)
    assert sum(f"train{n:04d}" in str(raised.value) for n in range(SAMPLES)) == BATCH


def _after_steps_with(key: str, act: Callable[[Engine, StepResult], StepResult]) -> type[Engine]:
    """The real engine; `act` after each step whose batch has the sample."""

    class Acting(Engine):
        def step(self, batch: Batch, *args: Any, **options: Any) -> StepResult:
            made = super().step(batch, *args, **options)
            return act(self, made) if key in batch.keys else made

    return Acting


@pytest.mark.usefixtures("one_process")
def test_a_spike_leaves_out_its_batch_and_the_one_before(corpus: Path, tmp_path: Path) -> None:
    batches = make_batches(corpus)
    key = first_seen(batches, 4)

    def spike(engine: Engine, made: StepResult) -> StepResult:
        return replace(made, total=made.total * 50)

    plan = replace(PLAN, epochs=6, anomalies=AnomalyConfig(spike_factor=10.0, window=5))
    # the window is full after step 5: the first spike of a later step counts
    steps = [s for s in range(6, 13) if key in batches.keys(s - 1)]
    outcome, shown, _ = train(corpus, tmp_path, plan, _after_steps_with(key, spike))
    bad = steps[0]
    since = 2 * ((bad - 1) // 2)
    expected = {k for s in (bad - 1, bad) if s > since for k in batches.keys(s - 1)}
    assert set(outcome.left_out) == expected
    assert key in outcome.left_out
    assert "is above anomalies.spike_factor 10 × " in outcome.left_out[key]
    assert shown.begun == [0, since]
    assert outcome.rewinds == 1


@pytest.mark.usefixtures("one_process")
def test_weights_that_become_no_numbers_are_never_saved(corpus: Path, tmp_path: Path) -> None:
    """The loss of the step is fine; its update is not. Seen before the checkpoint, blamed on that step."""
    batches = make_batches(corpus)
    key = first_seen(batches, 4)

    def poison(engine: Engine, made: StepResult) -> StepResult:
        with torch.no_grad():
            next(engine.method.parameters()).view(-1)[0] = math.inf
        return made

    outcome, shown, engine = train(corpus, tmp_path, kind=_after_steps_with(key, poison))
    assert set(outcome.left_out) == set(batches.keys(3))
    assert "its update made weights that are no numbers" in outcome.left_out[key]
    assert shown.begun == [0, 2]
    assert all(torch.isfinite(p).all() for p in engine.method.parameters())


@pytest.mark.usefixtures("one_process")
def test_steps_that_fp16_skips_move_no_schedule_and_are_no_anomaly(corpus: Path, tmp_path: Path) -> None:
    """DeepSpeed has no fp16 on a CPU: the real engine here says fp16, and leaves chosen steps out."""
    skipped, rates = {2, 3, 6}, []

    class Overflowing(Engine):
        calls = 0
        scales_loss = True

        def step(self, batch: Batch, rate_factor: float, want_norm: bool = False) -> StepResult:
            self.calls += 1
            rates.append(rate_factor)
            if self.calls in skipped:
                return replace(result(math.inf, applied=False), gradient_norm=math.inf)
            return super().step(batch, rate_factor, want_norm)

    outcome, shown, _ = train(corpus, tmp_path, kind=Overflowing)
    updates = [0, 1, 1, 1, 2, 3, 3, 4]  # applied before each step
    assert rates == [factor(done, 8, PLAN.schedule) for done in updates]
    assert (outcome.step, outcome.rewinds) == (8, 0)
    assert dict(shown.rows)[8]["train/skipped_steps"] == 3
    position = json.loads((tmp_path / "step_00000008/position.json").read_text())
    assert (position["step"], position["updates"]) == (8, 5)


@pytest.mark.usefixtures("one_process")
def test_a_step_that_was_not_applied_leaves_queue_and_teacher_alone(corpus: Path) -> None:
    """`after_step` moves them: it is not called where DeepSpeed says that the step was not applied."""
    called: list[int] = []

    class Counting(TinyMethod):
        def after_step(self) -> None:
            called.append(1)

    engine = Engine(
        Counting(words=200),
        {"ccl": 1.0},
        OptimizerConfig(learning_rate=1e-2),
        read_deepspeed_config(CONFIGS / "zero0_fp32.json"),
        batch_per_gpu=BATCH,
    )
    batch = make_batches(corpus).load(0).batch
    assert engine.step(batch, 1.0).applied
    assert len(called) == 1
    engine._engine.was_step_applied = lambda: False
    assert not engine.step(batch, 1.0).applied
    assert len(called) == 1


# ----------------------------------------------------------------------------------------------- as a stage


@pytest.mark.slow
@pytest.mark.usefixtures("unpatched")
def test_before_the_first_checkpoint_training_starts_over(corpus: Path, tmp_path: Path) -> None:
    key = make_batches(corpus).keys(0)[2]
    survival_case.break_pixels([key])
    job = make_job(tmp_path / "a", corpus)
    report = run(Config(**clip_values(epochs=1)), job)
    assert (report.counts["left_out_samples"], report.counts["rewinds"]) == (1, 1)
    assert report.counts["bad_samples"] == 0
    assert report.metrics["train/rewinds"] == 1.0
    assert isinstance(job.tracker, RecordingTracker)
    assert all(math.isfinite(value) for _, row in job.tracker.rows for value in row.values())
    position = json.loads((tmp_path / "a/checkpoints/step_00000002/position.json").read_text())
    assert list(position["left_out"]) == [key]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_agree_and_a_kill_after_the_rewind_changes_no_bit(corpus: Path, tmp_path: Path) -> None:
    values = clip_values(deepspeed=str(CONFIGS / "zero3_fp32.json"), epochs=3, log_every_steps=10)
    key = first_seen(make_batches(corpus), 3)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert end(start(whole, corpus, values, nan_key=key)) == [0, 0], logs(whole)
    assert f"back to step 2 without 1 samples: {key} (rewind 1 of at most 3)" in logs(whole)
    assert -9 in end(start(killed, corpus, values, nan_key=key, kill_step=5))  # step 4, after the rewind
    assert [p.name for p in (killed / "checkpoints").glob("step_*")] == ["step_00000002"]
    assert end(start(killed, corpus, values, nan_key=key)) == [0, 0], logs(killed)
    assert (killed / "out/model.safetensors").read_bytes() == (whole / "out/model.safetensors").read_bytes()
    told, expected = (json.loads((d / "told.json").read_text())["counts"] for d in (killed, whole))
    assert told == expected
    assert told["left_out_samples"] == 1
