"""Other ways to run the encoders' blocks, in place and under the same names: recomputed, or compiled."""

import shutil
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from learning.encoders.batch_norm import statistics_kept
from learning.encoders.layers import Layered


def blocks_of(method: nn.Module) -> list[nn.Module]:
    """The blocks of every encoder in `method` that learns. Raises ValueError where a tower has none."""
    return [
        block
        for module in method.modules()
        if isinstance(module, Layered) and any(p.requires_grad for p in module.parameters())
        for block in module.blocks()
    ]


def recompute_blocks(method: nn.Module) -> int:
    """Let each block keep its inputs alone for backward, and compute the rest again there; how many do.

    Values, gradients, dropout and the running statistics of batch norms are those of the plain way, bit by
    bit (Chen et al. 2016, Sec. 3, with one segment a block).
    """
    blocks = blocks_of(method)
    for block in blocks:
        block.forward = _Recomputed(block)  # on the instance: names, hooks and copies stay as they are
    return len(blocks)


class _Recomputed:
    """Stands for the forward of `block`."""

    def __init__(self, block: nn.Module):
        self.block = block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block = self.block
        plain = partial(type(block).forward, block)
        if not (block.training and torch.is_grad_enabled()):
            return plain(*args, **kwargs)
        if (
            torch.compiler.is_compiling()
        ):  # the graph has each write to a buffer once, however often it is read
            return checkpoint(plain, *args, use_reentrant=False, **kwargs)
        return checkpoint(plain, *args, use_reentrant=False, context_fn=self._contexts, **kwargs)

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Around the block: in forward, and when it is computed again."""
        return nullcontext(), statistics_kept(self.block)


def compile_blocks(method: nn.Module, zero_stage: int = 0) -> int:
    """torch.compile each block of the towers and of the fusion; how many are. Equal blocks share the code.

    In place (`Module.compile`): the names in the state dict do not change. Dropout draws other numbers than
    the plain way. Raises ValueError under ZeRO-3, and where there is no compiler.
    """
    if zero_stage == 3:  # its hooks gather and release weights around each module, which breaks every graph
        raise ValueError(
            "compile: does not go with ZeRO-3; choose a config of ds_configs/ up to zero2, or false"
        )
    if not torch.cuda.is_available() and shutil.which("g++") is None:
        raise ValueError("compile: there is no g++, which torch.compile needs on a CPU; install it, or false")
    blocks = blocks_of(method)
    for block in blocks:
        block.compile()
    return len(blocks)
