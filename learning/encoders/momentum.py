"""A momentum teacher, queues of its features and running centres: fp32 state, saved, never trained.

All are buffers: no optimizer and no ZeRO stage takes them, a checkpoint holds them whole, and a cast of the
model to half precision leaves them as they are (bf16 cannot hold an average of momentum 0.995).
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from learning.losses.contrastive import Queue
from learning.training.partitioned import whole

M = TypeVar("M", bound=nn.Module)


class WideState(nn.Module):
    """A module whose floating-point state stays in fp32 at least, whatever the model is cast to."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "WideState":
        def moved(tensor: Tensor) -> Tensor:
            to = fn(tensor)
            if not tensor.is_floating_point():
                return to
            return tensor.to(to.device, torch.promote_types(to.dtype, torch.float32))

        super()._apply(moved, recurse)
        return self


class Momentum(WideState):
    """Copies of modules that follow them: θ_m ← m θ_m + (1 - m) θ. They stay in evaluation mode.

    The copies' parameters are buffers under the same names. Under half precision they are computed by
    autocast, and follow the weights that the student computes with.
    """

    def __init__(self, momentum: float, **modules: nn.Module):
        """Each copy begins as its module is now, and is an attribute under its name."""
        super().__init__()
        self.momentum = momentum
        for name, module in modules.items():
            self.add_module(name, _as_buffers(copy.deepcopy(module)))
        self.train(False)

    def train(self, mode: bool = True) -> "Momentum":
        """As torch's, but always in evaluation mode."""
        super().train(False)
        return self

    @torch.no_grad()
    def follow(self, **modules: nn.Module) -> None:
        """Once after each applied step, with the modules it was made of. All ranks together (ZeRO-3)."""
        for name, module in modules.items():
            own = dict(self.get_submodule(name).named_modules())
            for path, student in module.named_modules():
                _follow(own[path], student, 1.0 - self.momentum)

    @contextmanager
    def computing(self, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
        """Around a forward of the copies: without gradient, products in the student's dtype."""
        half = dtype in (torch.bfloat16, torch.float16)
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype if half else None, enabled=half):
            yield


class FeatureQueue(WideState):
    """The last `size` features, first in, first out, with ids and weights that fade.

    R2D2, Sec. 3.3: "we decay each element in the queue by a factor of 0.99 per iteration, except for the new
    incoming item". The same on all ranks. A slot that was never filled has the weight 0.
    """

    features: Tensor
    ids: Tensor
    weights: Tensor
    pointer: Tensor  # the slot that is filled next

    def __init__(self, size: int, dimension: int, decay: float = 1.0):
        super().__init__()
        self.size, self.decay = size, decay
        self.register_buffer("features", torch.zeros(size, dimension))
        self.register_buffer("ids", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("weights", torch.zeros(size))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))

    def content(self) -> Queue:
        """What is in the queue, by slot."""
        return Queue(self.features, self.ids, self.weights)

    @torch.no_grad()
    def push(self, features_nd: Float[Tensor, "n d"], ids_n: Int64[Tensor, " n"]) -> None:
        """The rows of all ranks, in their global order, in the place of the oldest; of more than `size`, the
        last."""
        features_nd, ids_n = features_nd[-self.size :], ids_n[-self.size :]
        slots = (self.pointer + torch.arange(len(ids_n), device=ids_n.device)) % self.size
        self.weights.mul_(self.decay)
        self.features[slots] = features_nd.to(self.features.dtype)
        self.ids[slots] = ids_n
        self.weights[slots] = 1.0
        self.pointer.add_(len(ids_n)).remainder_(self.size)

    @torch.no_grad()
    def pushed(self, features_nd: Float[Tensor, "n d"], ids_n: Int64[Tensor, " n"]) -> Queue:
        """What the content would be after `push`; the queue stays as it is."""
        features_nd, ids_n = features_nd[-self.size :], ids_n[-self.size :]
        slots = (self.pointer + torch.arange(len(ids_n), device=ids_n.device)) % self.size
        return Queue(
            self.features.index_copy(0, slots, features_nd.to(self.features.dtype)),
            self.ids.index_copy(0, slots, ids_n),
            (self.weights * self.decay).index_fill(0, slots, 1.0),
        )


class Centre(WideState):
    """A running mean of features: μ ← m μ + (1 - m) · the batch's mean, from 0 on (R2D2, Eq. 6)."""

    mean: Tensor

    def __init__(self, dimension: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(dimension))

    @torch.no_grad()
    def push(self, mean_d: Float[Tensor, " d"]) -> None:
        """The mean over the rows of all ranks."""
        self.mean.lerp_(mean_d.to(self.mean.dtype), 1.0 - self.momentum)


def _as_buffers(module: M) -> M:
    """`module` with buffers in place of its parameters, in fp32 at least, under the same names."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            del part._parameters[name]
            if parameter is not None:
                wide = torch.promote_types(parameter.dtype, torch.float32)
                part.register_buffer(name, parameter.detach().to(wide))
            else:
                part.register_parameter(name, None)
    return module


def _follow(own: nn.Module, student: nn.Module, rate: float) -> None:
    """What `student` itself holds, not its children: parameters are averaged, buffers (statistics) copied."""
    parameters = {name: p for name, p in student._parameters.items() if p is not None}
    with whole(list(parameters.values())):
        for name, value in parameters.items():
            mine = getattr(own, name)
            mine.lerp_(value.detach().to(mine.dtype), rate)
    for name, buffer in student._buffers.items():
        if buffer is not None:
            getattr(own, name).copy_(buffer)
