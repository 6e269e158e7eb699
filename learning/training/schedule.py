"""Learning-rate schedules: pure functions of the count of applied steps, so a resume needs no state."""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ScheduleConfig(BaseModel):
    """How the learning rate moves over a stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["constant", "step", "cosine", "linear"] = "constant"
    warmup: float = Field(
        default=0.0, ge=0, description="below 1: a share of all steps; from 1 on: a number of steps"
    )
    warmup_from: float = Field(
        default=0.0, ge=0, lt=1, description="the share of the rate that warm-up starts above"
    )
    decay_at: float = Field(
        default=0.5, gt=0, lt=1, description="step: the share of all steps after which the rate falls"
    )
    decay: float = Field(default=0.1, gt=0, le=1, description="step: what the rate is then multiplied by")
    floor: float = Field(
        default=0.0, ge=0, lt=1, description="cosine, linear: the share of the rate left at the end"
    )

    @model_validator(mode="after")
    def _whole_steps(self) -> "ScheduleConfig":
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(
                f"schedule.warmup: {self.warmup} is no number of steps; give a whole one, or a share below 1"
            )
        return self

    def warmup_steps(self, total: int) -> int:
        """Warm-up in steps, of `total` steps."""
        return int(self.warmup) if self.warmup >= 1 else round(self.warmup * total)


def factor(step: int, total: int, schedule: ScheduleConfig) -> float:
    """What the learning rate is multiplied by at optimizer step `step` (0 is the first) of `total`.

    Warm-up is linear, from `warmup_from` before the first step to 1 at its last: (step + 1) / warmup_steps of
    the way. `step` falls by `decay` once `decay_at` of all steps are done (COOKIE: a tenth after half of the
    epochs). `cosine` and `linear` go from 1, right after warm-up, to `floor`, which the step after the last
    one would have.
    """
    warmup = schedule.warmup_steps(total)
    if step < warmup:
        return schedule.warmup_from + (1 - schedule.warmup_from) * ((step + 1) / warmup)
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "step":
        return schedule.decay if step >= schedule.decay_at * total else 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule.name == "cosine" else 1 - done
    return schedule.floor + (1 - schedule.floor) * left
