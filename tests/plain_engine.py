"""An engine in float64, which DeepSpeed's is not: whole and divided steps, gradients averaged over ranks."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from learning.methods.base import Batch
from learning.training import grad_cache
from learning.training.engine import Objective

Results = tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]


class PlainEngine:
    """An objective whose gradients add up in its parameters; ranks meet only when they are averaged."""

    def __init__(self, objective: Objective):
        self.objective = objective

    def __call__(self, batch: Batch, **options: Any) -> Any:
        return self.objective(batch, **options)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """There is nothing to be done at a boundary."""

    def backward_of(self, batch: Batch, micro_batch: int | None) -> Results:
        """The gradients of one rank's batch, undivided or in parts."""
        if micro_batch is not None:
            return grad_cache.backward(self, grad_cache.parts_of(batch, micro_batch), lambda part: part)
        results = self(batch)
        self.backward(results[0])
        return results

    def averaged_gradients(self) -> dict[str, Tensor]:
        """By parameter of the method, averaged over ranks as an engine does. Every one must have one."""
        found = {}
        for name, parameter in self.objective.method.named_parameters():
            assert parameter.grad is not None, name
            if dist.is_initialized():
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
            found[name] = parameter.grad
        return found
