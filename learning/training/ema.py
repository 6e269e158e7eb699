"""Averaged weights: an exponential moving average of the fp32 weights, split over ranks as they are."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from learning.training import distributed


class EmaConfig(BaseModel):
    """The recipe's `ema` section of a training stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    decay: float = Field(default=0.999, gt=0, lt=1, description="what stays of the average at each update")
    warmup: bool = Field(
        default=False, description="at update n at most (1 + n) / (10 + n): early weights are soon forgotten"
    )

    def at(self, update: int) -> float:
        """The decay of an update, the first being 0."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay


class Ema:
    """a ← d·a + (1 - d)·w after each applied step, for each fp32 tensor of weights that this rank steps.

    No collective is needed for an update. `held()` gives those tensors, the same ones in the same order at
    each call. Buffers are not averaged.
    """

    def __init__(self, held: Callable[[], Sequence[Tensor]], config: EmaConfig):
        self.config = config
        self.updates = 0
        self._held = held
        self._averages = [weights.detach().clone() for weights in held()]

    @torch.no_grad()
    def update(self) -> None:
        weights = [w.detach() for w in self._held()]
        torch._foreach_lerp_(self._averages, weights, 1.0 - self.config.at(self.updates))
        self.updates += 1

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """Inside, the averages stand where the weights were, and the weights here; nothing is lost."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for weights, average in zip(self._held(), self._averages, strict=True):
            kept = weights.detach().clone()
            weights.copy_(average)
            average.copy_(kept)


def held_weights(optimizer: Any, method: nn.Module, stage: int, dtype: torch.dtype) -> list[Tensor]:
    """The fp32 tensors that this rank's optimizer steps: DeepSpeed's flat partitions, or whole parameters."""
    if stage == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    if stage > 0:
        return list(optimizer.single_partition_of_fp32_groups)
    if dtype != torch.float32:
        return [weights for group in optimizer.fp32_groups for weights in group]
    return [p for p in method.parameters() if p.requires_grad]


@torch.no_grad()
def set_weights(
    optimizer: Any, method: nn.Module, stage: int, dtype: torch.dtype, whole: dict[int, Tensor]
) -> None:
    """Write whole parameters, by their id, where `held_weights` has them; each rank its own part."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    trained: list[Any] = [p for p in method.parameters() if p.requires_grad]
    if stage == 0:
        held = held_weights(optimizer, method, stage, dtype)
        if dtype != torch.float32:
            trained = [p for group in optimizer.fp16_groups for p in group]  # in the order of the fp32 ones
        for parameter, weights in zip(trained, held, strict=True):
            weights.copy_(whole[id(parameter)])
    elif stage < 3:
        for parameter in trained:
            safe_set_full_fp32_param(parameter, whole[id(parameter)])
    else:
        for parameter in trained:  # the last rank's part is padded
            each = parameter.ds_tensor.numel()
            flat = whole[id(parameter)].flatten()
            padded = F.pad(flat, (0, each * distributed.world_size() - flat.numel()))
            safe_set_local_fp32_param(parameter, padded.narrow(0, each * distributed.rank(), each))
