"""What a training run is told, where it is, and what it comes to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from learning.training.anomalies import AnomalyConfig
from learning.training.checkpoint import CheckpointConfig
from learning.training.schedule import ScheduleConfig


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
    anomalies: AnomalyConfig = field(default_factory=AnomalyConfig)
    stop_at: float | None = None  # unix seconds by which this process must have saved and ended


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
    rewinds: int = 0  # how often a loss went wrong
    left_out: dict[str, str] = field(default_factory=dict)  # samples that made it so: key → why
    recent_losses: list[float] = field(default_factory=list)  # for the spike rule, where there is one

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
    left_out: dict[str, str]
    rewinds: int
