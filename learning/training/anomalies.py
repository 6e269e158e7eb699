"""Losses that go wrong: found by all ranks at once, blamed on samples, which are left out from then on."""

import logging
import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from learning.methods.base import Batch
from learning.training import distributed
from learning.training.engine import Engine, StepResult
from learning.training.loader import Batches, Failed

logger = logging.getLogger(__name__)

SHOWN_KEYS = 8  # of a long list of samples, in a message


class AnomalyConfig(BaseModel):
    """What happens when a loss is no number, or far above the ones before it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    on_nan: Literal["rewind", "stop"] = Field(
        default="rewind",
        description="a loss (or a weight) that is no number: go back to the last checkpoint and leave the "
        "samples out that made it; stop: end with an error",
    )
    spike_factor: float | None = Field(
        default=None,
        gt=1,
        description="rewind too when a loss is above this factor × the median of the last `window`; null: "
        "never, for a contrastive loss may jump for good reasons (a queue that fills, a new hard batch)",
    )
    window: int = Field(default=100, ge=5, description="steps of the median; before, no loss is a spike")
    max_rewinds: int = Field(default=3, ge=0, description="in the whole run; one more stops it")


class Anomaly(Exception):
    """Raised on all ranks together. `step` is where it showed; `suspects`: steps whose samples may be it."""

    def __init__(self, step: int, what: str, suspects: tuple[int, ...], *, is_spike: bool = False):
        super().__init__(what)
        self.step, self.what, self.suspects, self.is_spike = step, what, suspects, is_spike


class StartOver(Exception):
    """Raised on all ranks when there is no checkpoint yet to rewind to.

    The caller builds method and engine as at the start, and calls `fit` with this as `again`.
    """

    def __init__(self, anomaly: Anomaly, rewinds: int, left_out: Mapping[str, str]):
        super().__init__(f"step {anomaly.step}: {anomaly.what}")
        self.anomaly, self.rewinds, self.left_out = anomaly, rewinds, dict(left_out)


class LossWatch:
    """Looks at each step's loss, once: at the next agreement of the ranks, or before anything relies on it.

    By then the loss has been computed, so that a GPU need not be waited for once more.
    """

    def __init__(self, config: AnomalyConfig, recent: list[float]):
        """`recent`: the last losses, oldest first; kept up to date in place; empty without a spike rule."""
        self.config, self.recent = config, recent
        self._held: tuple[int, StepResult] | None = None

    def hold(self, step: int, result: StepResult, scales_loss: bool) -> None:
        """To be looked at. Where the loss is scaled (fp16) a step may be left out: the scale was too large.

        Elsewhere DeepSpeed leaves a step out, under ZeRO 1 to 3, when a gradient is no number.
        """
        self._held = None if scales_loss and not result.applied else (step, result)

    @property
    def holds(self) -> bool:
        """The same on every rank."""
        return self._held is not None

    def offer(self) -> tuple[float, float]:
        """This rank's (1 if loss or gradient are no numbers else 0, the loss): their largest are judged."""
        if self._held is None:
            return 0.0, -math.inf
        result = self._held[1]
        loss = float(result.total)
        return (0.0, loss) if math.isfinite(loss) and result.applied else (1.0, -math.inf)

    def judge(self, is_bad: float, loss: float) -> None:
        """Raises Anomaly where the largest `offer` over ranks is not as it should be."""
        if self._held is None:
            return
        (step, result), self._held = self._held, None
        if is_bad:
            terms = ", ".join(f"loss/{name} {float(value)}" for name, value in sorted(result.losses.items()))
            told = distributed.gather_objects(None if math.isfinite(float(result.total)) else terms)
            bad = [text for text in told if text is not None]
            what = f"the loss is no number ({bad[0]})" if bad else f"its gradient is no number ({terms})"
            # an update that was applied in the step before may have broken the weights
            raise Anomaly(step, what, (step - 1, step) if result.applied else (step,))
        if self.config.spike_factor is None:
            return
        if len(self.recent) >= self.config.window:
            median = statistics.median(self.recent)
            if median > 0 and loss > self.config.spike_factor * median:
                what = (
                    f"the loss {loss:.6g} is above anomalies.spike_factor {self.config.spike_factor:g} × "
                    f"{median:.6g}, the median of the last {self.config.window} steps"
                )
                raise Anomaly(step, what, (step - 1, step), is_spike=True)
        self.recent.append(loss)
        del self.recent[: -self.config.window]


def weights_are_numbers(engine: Engine) -> bool:
    """Whether all weights, of all ranks, are finite; the same answer on every rank."""
    with torch.no_grad():
        own = [getattr(p, "ds_tensor", p) for p in engine.method.parameters()]
        bad = torch.stack([~torch.isfinite(p).all().to(engine.device) for p in own]).any()
    return not distributed.all_reduce_max(int(bad))


def blame(engine: Engine, batches: Batches, anomaly: Anomaly, since_step: int) -> dict[str, str]:
    """The samples to leave out, by key, and why: those that give no finite input or embedding under the
    weights of `since_step`, which the engine has; where there is none, all of the suspected steps.

    All ranks together. Raises ValueError when these weights are no numbers.
    """
    if not weights_are_numbers(engine):
        raise ValueError(
            f"step {anomaly.step}: {anomaly.what}; the weights that training started from at step "
            f"{since_step} hold values that are no numbers already: begin from other weights"
        )
    steps = [step for step in anomaly.suspects if step > since_step]
    culprits: dict[str, str] = {}
    suspected: dict[str, str] = {}
    for step in steps:
        loaded = batches[step - 1]
        problem = loaded.message if isinstance(loaded, Failed) else None
        problems = [told for told in distributed.gather_objects(problem) if told is not None]
        if problems:
            raise ValueError("; ".join(problems))
        assert not isinstance(loaded, Failed)
        reason = f"step {anomaly.step}: {anomaly.what}"
        suspected |= dict.fromkeys(loaded.batch.keys, reason)
        if not anomaly.is_spike:
            culprits |= {key: f"{reason}: {what}" for key, what in _not_finite(engine, loaded.batch).items()}
    told = distributed.gather_objects((culprits, suspected))
    found = {key: why for own, _ in told for key, why in own.items()}
    return found or {key: why for _, own in told for key, why in own.items()}


def _not_finite(engine: Engine, batch: Batch) -> dict[str, str]:
    """This rank's rows of which an input or an embedding is not finite: key → which."""
    made = {f"image '{name}'": rows for name, rows in batch.images.items()}
    made |= {f"image tokens '{name}'": rows for name, rows in batch.tokens.items()}
    if batch.regions is not None:
        made |= {
            "features of regions": batch.regions.features,
            "positions of regions": batch.regions.positions,
        }
    made |= {f"the embedding of {name}": rows for name, rows in engine.embed(batch).items()}
    found: dict[str, str] = {}
    for name, rows in made.items():
        finite = torch.isfinite(rows).flatten(1).all(dim=1)
        for row in torch.nonzero(~finite).flatten().tolist():
            found.setdefault(batch.keys[row], f"{name} is not finite")
    return found


def shown_keys(keys: Iterable[str]) -> str:
    """Some keys of many, and how many more."""
    ordered = sorted(keys)
    more = f" and {len(ordered) - SHOWN_KEYS} more" if len(ordered) > SHOWN_KEYS else ""
    return f"{', '.join(ordered[:SHOWN_KEYS])}{more}"


def by_reason(left_out: Mapping[str, str]) -> str:
    """All samples left out, grouped by why: for the error that ends a run."""
    groups: dict[str, list[str]] = {}
    for key, why in left_out.items():
        groups.setdefault(why, []).append(key)
    return "; ".join(f"{shown_keys(keys)} ({why})" for why, keys in groups.items())


def too_many(
    batches: Batches, anomaly: Anomaly, config: AnomalyConfig, left_out: Mapping[str, str], saved_step: int
) -> str:
    """What to tell the user when the run ends at an anomaly. All ranks together."""
    steps = [step for step in anomaly.suspects if step > saved_step]
    own = [key for step in steps for key in batches.keys(step - 1)]
    keys = [key for each in distributed.gather_objects(own) for key in each]
    allowed = ""
    if left_out:
        allowed = (
            f"; anomalies.max_rewinds allows {config.max_rewinds}, and as many are done; left out before: "
            f"{by_reason(left_out)}"
        )
    numbers = f"step{'s' if len(steps) > 1 else ''} {' and '.join(map(str, steps))}"
    where = f"the samples of {numbers}: {shown_keys(keys)}"
    remedy = "lower optimizer.learning_rate, set gradient_clip, or look at these samples"
    last = f"the last checkpoint: step {saved_step}"
    return f"step {anomaly.step}: {anomaly.what}; {where}{allowed}; {remedy}; {last}"
