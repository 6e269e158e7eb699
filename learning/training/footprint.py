"""What one rank's forward and backward take: FLOPs and bytes of activations, counted without computing."""

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from learning import methods
from learning.encoders.positions import POSITION_WIDTH
from learning.encoders.regions import RegionsConfig
from learning.methods.base import Batch, Method, Regions, Texts
from learning.model_files import without_weights
from learning.training.blocks import recompute_blocks


class LiveBytes(TorchDispatchMode):
    """Inside, counts the bytes of the tensors that are made: `live` now, `peak` at most. Views count once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, int] = {}

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """These were there before: a view of one of them is not counted."""
        for tensor in tensors:
            self._storages[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return made

    def _add(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, address: int) -> None:
        self.live -= self._storages.pop(address)


@dataclass(frozen=True)
class Footprint:
    """Of one step of one rank."""

    forward_flops: int  # a multiply-add is two
    activation_bytes: int  # most that forward and backward hold at a time, beside weights and their gradients

    def training_flops(self, recomputed: bool) -> int:
        """Forward, and twice as much for the gradients of inputs and weights; once more where recomputed.

        The frozen parts are counted like the others: an upper bound for them.
        """
        return self.forward_flops * (4 if recomputed else 3)


def footprint(
    model_config: Mapping[str, Any],
    losses: tuple[str, ...],
    batch: int,
    dtype: torch.dtype,
    vocabulary_size: int,
    recomputed: bool = False,
) -> Footprint:
    """Run forward and backward on tensors without content: `batch` samples of a rank, texts at full length.

    model_config: the recipe's `model` section. Left out: other ranks' features, workspaces of the kernels.
    """
    values = without_weights(model_config)
    with torch.device("meta"):
        method = methods.build(methods.parse_config(values), losses, vocabulary_size)
        method.begin()
    if recomputed:
        recompute_blocks(method)
    live, flops = LiveBytes(), FlopCounterMode(display=False)
    with FakeTensorMode():
        _fill(method, dtype)
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        given = _batch(method, values, batch, dtype)
        live.ignore([*method.parameters(), *method.buffers()])
        with live:
            with flops:
                terms = method(given)
            torch.stack([loss.float() for loss in terms.losses.values()]).sum().backward()
    return Footprint(flops.get_total_flops(), live.peak)


def _fill(method: nn.Module, dtype: torch.dtype) -> None:
    """Tensors of the current mode in place of the parameters and buffers; what was shared stays shared."""
    made: dict[int, Tensor] = {}
    for module in method.modules():
        tensors: list[Any] = [module._parameters, module._buffers]
        for held in tensors:
            for name, old in held.items():
                if old is not None:
                    if id(old) not in made:
                        new = torch.empty(old.shape, dtype=dtype if old.is_floating_point() else old.dtype)
                        trained = isinstance(old, nn.Parameter)
                        made[id(old)] = nn.Parameter(new, old.requires_grad) if trained else new
                    held[name] = made[id(old)]


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _batch(method: Method, values: Mapping[str, Any], samples: int, dtype: torch.dtype) -> Batch:
    config: Any = methods.parse_config(dict(values))  # every method's Config has `vision` and `text`
    side, length = config.vision.image_px, config.text.max_length
    views = method.views()
    ones = torch.ones(samples, length, dtype=torch.int64)
    return Batch(
        {name: torch.empty(samples, 3, side, side, dtype=dtype) for name in views.images},
        {name: Texts(ones, ones) for name in views.texts},
        [str(number) for number in range(samples)],
        ids=torch.arange(samples),
        labels={name: torch.ones(samples, dtype=torch.int64) for name in views.labels},
        label_sets={name: torch.ones(samples, len(each.names)) for name, each in views.label_sets.items()},
        regions=_regions(config.vision, samples, dtype) if views.regions else None,
    )


def _regions(vision: RegionsConfig, samples: int, dtype: torch.dtype) -> Regions:
    return Regions(
        torch.empty(samples, vision.count, vision.width, dtype=dtype),
        torch.empty(samples, vision.count, POSITION_WIDTH, dtype=dtype),
        torch.zeros(samples, vision.count, dtype=torch.int64),
    )
