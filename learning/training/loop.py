"""The one training loop: batches, steps, metrics, validation and checkpoints; it knows no method, no model.

All ranks run it together: they act on the same flag at the same step, so they save, stop or fail together.
"""

import logging
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from learning.training import distributed, watchdog
from learning.training.anomalies import (
    Anomaly,
    LossWatch,
    StartOver,
    blame,
    shown_keys,
    too_many,
    weights_are_numbers,
)
from learning.training.checkpoint import Checkpoints
from learning.training.checkpoint_files import Writer
from learning.training.deadline import Deadline
from learning.training.engine import Engine, StepResult
from learning.training.loader import BadSamples, Batches, Failed, Loaded
from learning.training.plan import Outcome, Plan, Position, Shown
from learning.training.prefetch import batches_from
from learning.training.randomness import seed_step
from learning.training.schedule import factor

logger = logging.getLogger(__name__)

GO, SKIPPED, STOP, FAIL = 0, 1, 2, 3
BEST = "best.pt"

Validate = Callable[[dict[str, Tensor]], dict[str, float]]


def fit(
    engine: Engine,
    batches: Batches,
    plan: Plan,
    checkpoints: Checkpoints,
    shown: Shown,
    validate: Validate | None = None,
    again: StartOver | None = None,
) -> Outcome:
    """Train to the end of `plan`, from the newest valid checkpoint if there is one.

    `validate(state)` gives metrics (val/…) of the full state, on every rank. A loss that goes wrong rewinds
    to the last checkpoint; where there is none yet StartOver is raised, to be given as `again` with a new
    engine. Raises ValueError for an unreadable corpus, a loss that goes wrong too often, a checkpoint of
    another batch or seed, and when the last checkpoint cannot be written.
    """
    return _Run(engine, batches, plan, checkpoints, shown, validate).fit(again)


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
        self.watch: LossWatch  # of the losses since the last start or rewind
        self.deadline = Deadline(plan.stop_at, engine.state_bytes())
        self._paused_s = 0.0  # validation and saving after the last step
        self._save_begun = 0.0
        self._restart_clock()

    def fit(self, again: StartOver | None) -> Outcome:
        with closing(self.checkpoints):
            self._resume()
            if again is not None:
                self._leave_out(again)
            while True:
                try:
                    return self._train()
                except Anomaly as anomaly:
                    self._rewind(anomaly)

    def _train(self) -> Outcome:
        """From the position to the end. Raises Anomaly, on every rank, for a loss that goes wrong."""
        self.watch = LossWatch(self.plan.anomalies, self.position.recent_losses)
        self.batches.left_out = frozenset(self.position.left_out)
        self.shown.begin(self.position.step, self.steps)
        self._restart_clock()
        with closing(batches_from(self.batches, self.position.step, self.steps)) as source:
            for loaded in self._watched(source):
                if self._agree(loaded) == STOP:
                    self._save(last=True)
                    return self._outcome(stopped=True)
                assert isinstance(loaded, Loaded)  # a Failed one made _agree raise
                self._step(loaded)
                self._between_steps()
        watchdog.enter("end")
        return self._outcome(stopped=False)

    def _watched(self, source: Generator[Loaded | Failed, None, None]) -> Iterator[Loaded | Failed]:
        """The batches; while one is waited for, the watchdog knows the samples that it is to have."""
        while True:
            begun, step = time.perf_counter(), self.position.step
            watchdog.enter("load", step + 1, self.batches.keys(step))
            loaded = next(source, None)
            self._waited_s += time.perf_counter() - begun
            if loaded is None:
                return
            yield loaded
            self.deadline.took("step", time.perf_counter() - begun - self._paused_s)

    def _rewind(self, anomaly: Anomaly) -> None:
        """Back to the last checkpoint, without the samples that are to blame.

        Raises StartOver where there is none, and ValueError when the loss went wrong too often.
        """
        watchdog.enter("rewind")
        config, before = self.plan.anomalies, self.position
        stops = config.on_nan == "stop" and not anomaly.is_spike
        if stops or before.rewinds >= config.max_rewinds:
            self._settle(wait=True)
            raise ValueError(too_many(self.batches, anomaly, config, before.left_out, self.saved_step))
        again = StartOver(anomaly.with_traceback(None), before.rewinds + 1, before.left_out)
        if not self._resume():
            if distributed.rank() == 0:
                logger.warning("%s: there is no checkpoint yet: training starts over", again)
            raise again
        self._leave_out(again)

    def _leave_out(self, again: StartOver) -> None:
        """Find the samples to blame, from the good state that was restored, and tell them."""
        self.batches.left_out = frozenset(again.left_out)
        found = blame(self.engine, self.batches, again.anomaly, self.position.step)
        self.position.rewinds = again.rewinds
        self.position.left_out = again.left_out | found
        if distributed.rank() == 0:
            logger.warning(
                "%s; back to step %d without %d samples: %s (rewind %d of at most %d)",
                again,
                self.position.step,
                len(found),
                shown_keys(found),
                again.rewinds,
                self.plan.anomalies.max_rewinds,
            )
            logger.info("left out: %s", found)

    def _resume(self) -> bool:
        """Restore the newest checkpoint; False where there is none."""
        self._settle(wait=True)
        found = self.checkpoints.newest()
        if found is None:
            return False
        told = {key: found.position.get(key, value) for key, value in vars(self.position).items()}
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
        self.best_state = None
        if self.position.best_step is not None and distributed.rank() == 0:
            self.best_state = torch.load(found.directory / BEST, weights_only=True, map_location="cpu")
        self.saved_step = self.position.step
        logger.info("going on at step %d from %s", self.position.step, found.directory)
        return True

    def _agree(self, loaded: Loaded | Failed) -> int:
        """The same flag on every rank, and the last loss judged. Raises ValueError on all when one rank could
        not make its batch, and Anomaly on all when the loss went wrong."""
        failure: str | None = loaded.message if isinstance(loaded, Failed) else None
        new = {} if isinstance(loaded, Failed) else self.bad.new(loaded.skipped)
        watchdog.enter("agree", keys=None if isinstance(loaded, Failed) else loaded.batch.keys)
        stop = self.shown.should_stop() or self.deadline.due(self._validates(self.position.step + 1))
        own = FAIL if failure else STOP if stop else SKIPPED if new else GO
        flag, *loss = distributed.max_over_ranks([own, *self.watch.offer()])
        if flag == FAIL:
            self._settle(wait=True)
            told = distributed.gather_objects(failure)
            raise ValueError(
                "; ".join(f"rank {rank}: {message}" for rank, message in enumerate(told) if message)
            )
        if flag != GO:
            self._note(new)
        self.watch.judge(*loss)
        return int(flag)

    def _note(self, new: dict[str, str]) -> None:
        """Add what any rank skipped. Raises ValueError, on all ranks, when it is too much."""
        for why in new.values():
            logger.warning("skipped a sample: %s", why)
        for each in distributed.gather_objects(new):
            self.bad.why |= each
        problem = self.bad.too_many()
        if problem is not None:
            raise ValueError(problem)

    def _step(self, loaded: Loaded) -> None:
        number = self.position.step + 1
        logs = number % self.plan.log_every_steps == 0 or number == self.steps
        rate_factor = factor(self.position.updates, self.steps, self.plan.schedule)
        watchdog.enter("forward and backward")
        seed_step(self.position.seed, number, distributed.rank())
        result = self.engine.step(loaded.batch, rate_factor, want_norm=logs)
        self.position.step = number
        self.position.updates += result.applied
        self._unlogged += 1
        self.watch.hold(number, result, self.engine.scales_loss)
        if logs:
            self._judge()
            self._log(result)
        else:
            self.shown.advance(1)

    def _judge(self) -> None:
        """Raises Anomaly, on every rank, when the last loss went wrong: before anything relies on it."""
        if self.watch.holds:
            self.watch.judge(*distributed.max_over_ranks(self.watch.offer()))

    def _log(self, result: StepResult) -> None:
        """The step's own values: a resumed run logs what an uninterrupted one does. Means over ranks."""
        local = {f"loss/{name}": float(value) for name, value in result.losses.items()}
        local |= {f"train/{name}": float(value) for name, value in result.report.items()}
        local["loss/total"] = float(result.total)
        seconds = max(time.perf_counter() - self._since, 1e-9)
        local["train/data_wait_share"] = self._waited_s / seconds
        values = distributed.mean_over_ranks(local)
        speed = self._unlogged * self.batches.contrastive_batch / seconds
        rates = self.engine.learning_rates()
        values |= {
            "train/lr": max(rates.values()),
            "train/samples_per_s": speed,
            "train/epoch": self.position.step / self.batches.per_epoch,
            "train/skipped_steps": float(self.position.step - self.position.updates),
            "train/rewinds": float(self.position.rewinds),
        }
        if result.gradient_norm is not None and math.isfinite(result.gradient_norm):
            values["train/grad_norm"] = result.gradient_norm
        self.shown.metrics(values, self.position.step)
        self.shown.advance(1, loss=values["loss/total"], samples_per_s=speed)
        self.position.metrics |= values
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._since, self._unlogged, self._waited_s = time.perf_counter(), 0, 0.0

    def _validates(self, step: int) -> bool:
        epoch, inside = divmod(step, self.batches.per_epoch)
        due = inside == 0 and (epoch % self.plan.validate_every_epochs == 0 or step == self.steps)
        return due and self.validate is not None

    def _between_steps(self) -> None:
        """Validation where due, then a checkpoint where due: the checkpoint knows the validation."""
        step = self.position.step
        begun = time.perf_counter()
        self._settle(wait=False)
        if self._validates(step):
            self._validate()
        every = self.plan.checkpoint.every_steps or self.batches.per_epoch
        if step % every == 0 or step == self.steps:
            self._save(last=step == self.steps)
        self._paused_s = time.perf_counter() - begun
        self._since += self._paused_s  # samples/s are those of training

    def _validate(self) -> None:
        assert self.validate is not None
        self._judge()
        watchdog.enter("validate")
        begun = time.perf_counter()
        state = self.engine.full_state()
        values = self.validate(state)
        self.deadline.took("validate", time.perf_counter() - begun)
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
        self._judge()
        watchdog.enter("checkpoint")
        if not weights_are_numbers(self.engine):  # a checkpoint must be good to go back to
            step = self.position.step
            raise Anomaly(step, "its update made weights that are no numbers", (step,))
        self._save_begun = time.perf_counter()
        self.position.bad = dict(self.bad.why)
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
        self.deadline.took("save", time.perf_counter() - self._save_begun)
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
            self.position.step,
            stopped,
            state,
            self.position.metrics,
            self.position.bad | self.bad.why,
            self.position.left_out,
            self.position.rewinds,
        )
