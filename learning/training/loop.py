"""The one training loop: batches, steps, metrics, validation and checkpoints; it knows no method, no model.

All ranks run it together: they act on the same flag at the same step, so they save, stop or fail together.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from learning.training import distributed
from learning.training.checkpoint import CheckpointConfig, Checkpoints
from learning.training.checkpoint_files import Writer
from learning.training.engine import Engine, StepResult
from learning.training.loader import BadSamples, Batches, Failed, Loaded, batches_from
from learning.training.randomness import seed_step
from learning.training.schedule import ScheduleConfig, factor

logger = logging.getLogger(__name__)

GO, STOP, FAIL = 0, 1, 2
BEST = "best.pt"


class Shown(Protocol):
    """Where numbers and progress go; called on every rank, heard on rank 0."""

    def begin(self, step: int, steps: int) -> None:
        """Training goes on after `step` of `steps`: what was logged beyond it is void."""

    def metrics(self, values: Mapping[str, float], step: int) -> None: ...

    def advance(self, n: int, **shown: Any) -> None: ...

    def should_stop(self) -> bool: ...


@dataclass(frozen=True)
class Plan:
    """How long to train, and what happens when. Steps are optimizer steps tried: one a global batch."""

    epochs: int
    schedule: ScheduleConfig
    checkpoint: CheckpointConfig
    log_every_steps: int
    validate_every_epochs: int = 1
    pick_best: str | None = (
        None  # a validation metric, say val/rsum: the largest wins, the earliest of equals
    )


@dataclass
class Position:
    """Where training is: all that is needed, beside the engine's state, to go on as if never interrupted."""

    seed: int
    contrastive_batch: int
    step: int = 0  # global batches consumed
    updates: int = 0  # optimizer steps applied: fewer than `step` where fp16 skipped some
    best: float | None = None
    best_step: int | None = None
    bad: dict[str, str] = field(default_factory=dict)  # skipped samples: key → why
    metrics: dict[str, float] = field(default_factory=dict)  # the last value of each

    def as_dict(self, per_epoch: int) -> dict[str, Any]:
        done = {"epoch": self.step // per_epoch, "samples_consumed": self.step * self.contrastive_batch}
        return vars(self) | done


@dataclass
class Outcome:
    """What training came to. `state` is what out/ is to hold; None when it was stopped before the end."""

    step: int
    stopped: bool
    state: dict[str, Tensor] | None
    metrics: dict[str, float]
    skipped: dict[str, str]


Validate = Callable[[dict[str, Tensor]], dict[str, float]]


def fit(
    engine: Engine,
    batches: Batches,
    plan: Plan,
    checkpoints: Checkpoints,
    shown: Shown,
    validate: Validate | None = None,
) -> Outcome:
    """Train to the end of `plan`, from the newest valid checkpoint if there is one.

    `validate(state)` gives metrics (val/…) of the full state, on every rank. Raises ValueError for an
    unreadable corpus, a loss that is no number, a checkpoint of another batch or seed, and when the last
    checkpoint cannot be written.
    """
    return _Run(engine, batches, plan, checkpoints, shown, validate).fit()


class _Run:
    """One call of `fit`."""

    def __init__(
        self,
        engine: Engine,
        batches: Batches,
        plan: Plan,
        checkpoints: Checkpoints,
        shown: Shown,
        validate: Validate | None,
    ):
        self.engine, self.batches, self.plan = engine, batches, plan
        self.checkpoints, self.shown, self.validate = checkpoints, shown, validate
        self.steps = plan.epochs * batches.per_epoch
        self.position = Position(batches.seed, batches.contrastive_batch)
        self.bad = BadSamples(int(batches.config.max_bad_share * len(batches.index)))
        self.best_state: dict[str, Tensor] | None = None  # rank 0's
        self.saved_step = 0
        self._result: StepResult | None = None
        self._restart_clock()

    def fit(self) -> Outcome:
        self._resume()
        self.shown.begin(self.position.step, self.steps)
        self._restart_clock()
        source = batches_from(self.batches, self.position.step, self.steps)
        with closing(self.checkpoints), closing(source):
            for loaded in source:
                if self._agree(loaded) == STOP:
                    self._save(last=True)
                    return self._outcome(stopped=True)
                assert isinstance(loaded, Loaded)  # a Failed one made _agree raise
                self._step(loaded)
                self._between_steps()
        return self._outcome(stopped=False)

    def _resume(self) -> None:
        self._settle(wait=True)
        found = self.checkpoints.newest()
        if found is None:
            return
        told = {key: found.position[key] for key in vars(self.position)}
        for name, here in (
            ("contrastive_batch", self.position.contrastive_batch),
            ("seed", self.position.seed),
        ):
            if told[name] != here:
                raise ValueError(
                    f"{found.directory}: was written with {name} = {told[name]}, this run has {here}; "
                    f"start it with {told[name]} again, or delete {found.directory.parent} to train anew"
                )
        self.position = Position(**told)
        self.bad.why = dict(self.position.bad)
        self.engine.load(found.directory)
        if self.position.best_step is not None and distributed.rank() == 0:
            self.best_state = torch.load(found.directory / BEST, weights_only=True, map_location="cpu")
        self.saved_step = self.position.step
        logger.info("going on at step %d from %s", self.position.step, found.directory)

    def _agree(self, loaded: Loaded | Failed) -> int:
        """The same flag on every rank. Raises ValueError on all when one could not make its batch."""
        failure: str | None = loaded.message if isinstance(loaded, Failed) else self._note(loaded.skipped)
        flag = distributed.all_reduce_max(FAIL if failure else STOP if self.shown.should_stop() else GO)
        if flag == FAIL:
            self._settle(wait=True)
            told = distributed.gather_objects(failure)
            raise ValueError(
                "; ".join(f"rank {rank}: {message}" for rank, message in enumerate(told) if message)
            )
        return flag

    def _note(self, skipped: dict[str, str]) -> str | None:
        for why in self.bad.add(skipped).values():
            logger.warning("skipped a sample: %s", why)
        return self.bad.too_many()

    def _step(self, loaded: Loaded) -> None:
        number = self.position.step + 1
        logs = number % self.plan.log_every_steps == 0 or number == self.steps
        rate_factor = factor(self.position.updates, self.steps, self.plan.schedule)
        seed_step(self.position.seed, number, distributed.rank())
        result = self.engine.step(loaded.batch, rate_factor, want_norm=logs)
        self.position.step = number
        self.position.updates += result.applied
        self._unlogged += 1
        self._result = result
        if logs:
            self._check_finite()
            self._log(result)
        else:
            self.shown.advance(1)

    def _check_finite(self) -> None:
        """Raises ValueError, on every rank, when the last loss is no number on any."""
        result = self._result
        if result is None:
            return
        if not distributed.all_reduce_max(result.applied and not math.isfinite(float(result.total))):
            return
        self._settle(wait=True)
        terms = ", ".join(f"loss/{name} {float(value)}" for name, value in sorted(result.losses.items()))
        raise ValueError(
            f"step {self.position.step}: the loss is no number ({terms}); lower optimizer.learning_rate, or "
            f"set gradient_clip; the last checkpoint: step {self.saved_step}"
        )

    def _log(self, result: StepResult) -> None:
        """The step's own values: a resumed run logs what an uninterrupted one does. Means over ranks."""
        local = {f"loss/{name}": float(value) for name, value in result.losses.items()}
        local |= {f"train/{name}": float(value) for name, value in result.report.items()}
        local["loss/total"] = float(result.total)
        values = distributed.mean_over_ranks(local)
        now = time.perf_counter()
        speed = self._unlogged * self.batches.contrastive_batch / max(now - self._since, 1e-9)
        rates = self.engine.learning_rates()
        values |= {
            "train/lr": max(rates.values()),
            "train/samples_per_s": speed,
            "train/epoch": self.position.step / self.batches.per_epoch,
            "train/skipped_steps": float(self.position.step - self.position.updates),
        }
        if result.gradient_norm is not None and math.isfinite(result.gradient_norm):
            values["train/grad_norm"] = result.gradient_norm
        self.shown.metrics(values, self.position.step)
        self.shown.advance(1, loss=values["loss/total"], samples_per_s=speed)
        self.position.metrics |= values
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._since, self._unlogged = time.perf_counter(), 0

    def _between_steps(self) -> None:
        """Validation where due, then a checkpoint where due: the checkpoint knows the validation."""
        step, per_epoch = self.position.step, self.batches.per_epoch
        epoch, inside = divmod(step, per_epoch)
        begun = time.perf_counter()
        self._settle(wait=False)
        due = inside == 0 and (epoch % self.plan.validate_every_epochs == 0 or step == self.steps)
        if self.validate is not None and due:
            self._validate(self.validate)
        every = self.plan.checkpoint.every_steps or per_epoch
        if step % every == 0 or step == self.steps:
            self._save(last=step == self.steps)
        self._since += time.perf_counter() - begun  # samples/s are those of training

    def _validate(self, validate: Validate) -> None:
        state = self.engine.full_state()
        values = validate(state)
        self.shown.metrics(values, self.position.step)
        self.position.metrics |= values
        name = self.plan.pick_best
        if name is None:
            return
        if name not in values:
            raise ValueError(
                f"pick_best: '{name}' is no validation metric; there are: {', '.join(sorted(values))}"
            )
        if self.position.best is None or values[name] > self.position.best:
            self.position.best, self.position.best_step = values[name], self.position.step
            self.best_state = state if distributed.rank() == 0 else None

    def _save(self, last: bool) -> None:
        """Begin to save; `last`, and where the recipe wants no background: and see it committed."""
        self._settle(wait=True)  # one at a time
        if self.saved_step == self.position.step:
            return
        self._check_finite()  # a checkpoint of numbers that are none would be worth nothing
        told = distributed.gather_objects(self.bad.why)
        self.position.bad = {key: why for each in told for key, why in each.items()}
        self.checkpoints.begin(
            self.position.step,
            self.position.as_dict(self.batches.per_epoch),
            self._write,
            self.engine.state_bytes(),
        )
        self._settle(wait=last or not self.checkpoints.background, last=last)

    def _settle(self, wait: bool, last: bool = False) -> None:
        """The outcome of the save that was begun, if it has one by now, or after a wait.

        A failure is a warning, and training goes on with the checkpoint before, but for the last.
        """
        settled = self.checkpoints.settle(wait)
        if settled is None:
            return
        if settled.problem is None:
            self.saved_step = settled.step
            return
        kept = (
            f"the checkpoint of step {self.saved_step} stays"
            if self.saved_step
            else "there is no earlier one"
        )
        where = self.checkpoints.directory
        message = f"{where}: the checkpoint of step {settled.step} failed: {settled.problem}; {kept}"
        if last:
            raise ValueError(f"{message}; make room and run again: it goes on from there")
        if distributed.rank() == 0:
            logger.warning("%s; training goes on, the next try is at the next interval", message)

    def _write(self, directory: Path, writer: Writer) -> None:
        self.engine.save(directory, writer)
        if distributed.rank() == 0 and self.best_state is not None:
            writer.save(self.best_state, directory / BEST, constant=True)

    def _outcome(self, stopped: bool) -> Outcome:
        state = None
        if not stopped:
            state = self.engine.full_state() if self.plan.pick_best is None else self.best_state
        if self.position.best_step is not None and self.plan.pick_best is not None:
            self.position.metrics |= {f"best/{self.plan.pick_best}": float(self.position.best or 0.0)}
            self.position.metrics |= {"best/step": float(self.position.best_step)}
        return Outcome(
            self.position.step, stopped, state, self.position.metrics, self.position.bad | self.bad.why
        )
