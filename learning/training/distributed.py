"""The process group, and the few collectives that learning needs: some with gradient, some for control.

Gradient convention, shared with the engine: every rank computes the same full loss on gathered tensors; the
engine averages parameter gradients over ranks; the collectives here sum gradients over ranks in backward. A
parameter behind a gather then gets (1/W) · Σ_r W · dL/dx_r · dx_r/dθ, a parameter after it (a temperature)
gets (1/W) · Σ_r dL/dθ: both are exactly the gradient of one process on the joined batch.

The same holds where a rank computes only its share L_r and the loss is `sum_over_ranks(L_r)`: its backward
gives each L_r the factor W, so that a rank's own features and a temperature get (1/W) · Σ_r W · dL_r/dθ, and
features behind a gather (1/W) · Σ_s Σ_r W · dL_r/dx_s · dx_s/dθ.

Without a process group everything here is the identity of one process.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

T = TypeVar("T")

_device = torch.device("cpu")


def is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's rank: from torch.distributed, else 0."""
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    """How many ranks there are: from torch.distributed, else 1."""
    return dist.get_world_size() if is_initialized() else 1


def device() -> torch.device:
    """The device of this rank, as `init` chose it."""
    return _device


def init(timeout_s: float = 1800.0, device_type: str | None = None) -> torch.device:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe; return the device.

    Gloo on the CPU, NCCL on GPUs. `device_type` is 'cpu' or 'cuda'; by default a GPU where there is one. A
    second call changes nothing. Raises ValueError when a rank has no GPU of its own.
    """
    global _device
    if device_type is None:
        wants_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
        device_type = "cpu" if wants_cpu or not torch.cuda.is_available() else "cuda"
    os.environ.setdefault("DS_ACCELERATOR", device_type)  # DeepSpeed reads it when it is first imported
    if is_initialized():
        return _device
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if device_type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
        visible = torch.cuda.device_count()
        if visible == 1:
            local = 0  # the launcher shows each rank its own GPU alone
        if local >= visible:
            raise ValueError(f"LOCAL_RANK={local}, but {visible} GPU(s) are visible: start one process a GPU")
        _device = torch.device("cuda", local)
        torch.cuda.set_device(_device)
    else:
        _device = torch.device("cpu")
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_s)}
    if device_type == "cuda":
        options["device_id"] = _device
    if ranks == 1:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # no port to open for one process
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", **options)
    return _device


def shutdown() -> None:
    """Leave the process group. Without this a run now and then aborts after its work is done."""
    if not is_initialized():
        return
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()  # it remembers groups: a later run here must not find them
    else:
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        all_reduce_max(0)


class _Gather(torch.autograd.Function):
    """all_gather along the first dimension; backward sums over ranks and takes the own rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows_by_rank: Sequence[int]) -> Tensor:
        here, longest = dist.get_rank(), max(rows_by_rank)
        ctx.own = slice(sum(rows_by_rank[:here]), sum(rows_by_rank[: here + 1]))
        if len(x) < longest:  # a collective moves as many rows from every rank
            x = torch.cat([x, x.new_zeros((longest - len(x), *x.shape[1:]))])
        gathered = x.new_empty((len(rows_by_rank) * longest, *x.shape[1:]))
        dist.all_gather_into_tensor(gathered, x.contiguous())
        if min(rows_by_rank) < longest:
            parts = zip(gathered.split(longest), rows_by_rank, strict=True)
            gathered = torch.cat([part[:rows] for part, rows in parts])
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        summed = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True).contiguous()
        dist.all_reduce(summed)
        return summed[ctx.own].to(gradient.dtype), None


class _Sum(torch.autograd.Function):
    """all_reduce by sum, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        summed = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        summed = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed


def gather(
    x: Shaped[Tensor, " b *d"], rows_by_rank: Sequence[int] | None = None
) -> Shaped[Tensor, " world_b *d"]:
    """All ranks' rows, rank 0's first, with gradient: (b, …) → (Σ_r b_r, …).

    `rows_by_rank` says how many rows each rank has, the same on all of them; None: all have as many as this
    one. Raises ValueError when it does not fit the ranks or this rank's rows.
    """
    ranks = world_size()
    if rows_by_rank is None:
        rows_by_rank = (len(x),) * ranks
    elif len(rows_by_rank) != ranks or rows_by_rank[rank()] != len(x):
        raise ValueError(
            f"rows_by_rank: {list(rows_by_rank)} on rank {rank()} of {ranks} with {len(x)} rows; give the "
            "rows of every rank, in rank order"
        )
    return x if ranks == 1 else _Gather.apply(x, rows_by_rank)


def sum_over_ranks(x: Shaped[Tensor, " *d"]) -> Shaped[Tensor, " *d"]:
    """The sum of x over ranks, with gradient (summed over ranks too): for global batch statistics."""
    if world_size() == 1:
        return x
    return _Sum.apply(x)


def all_reduce_max(flag: int) -> int:
    """The largest of the ranks' flags: so all ranks act on what any of them saw, at the same step."""
    if world_size() == 1:
        return int(flag)
    value = torch.tensor([int(flag)], dtype=torch.int64, device=_device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value.item())


def max_over_ranks(values: Sequence[float]) -> list[float]:
    """The largest over ranks of each value, in float64, by one collective. No value may be a NaN."""
    if world_size() == 1:
        return [float(value) for value in values]
    joined = torch.tensor(list(values), dtype=torch.float64, device=_device)
    dist.all_reduce(joined, op=dist.ReduceOp.MAX)
    largest: list[float] = joined.tolist()
    return largest


def mean_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """The mean over ranks of each value, in float64. All ranks give the same names."""
    if world_size() == 1:
        return dict(values)
    names = sorted(values)
    # float64 survives gloo and NCCL alike: a mean of large counters stays exact
    joined = torch.tensor([values[name] for name in names], dtype=torch.float64, device=_device)
    dist.all_reduce(joined)
    return dict(zip(names, (joined / world_size()).tolist(), strict=True))


def broadcast_object(value: T, source: int = 0) -> T:
    """`source`'s value on every rank; what other ranks give is ignored. The value must be picklable."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, device=_device)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank. The values must be picklable."""
    if world_size() == 1:
        return [value]
    boxes: list[Any] = [None] * world_size()
    dist.all_gather_object(boxes, value)
    return boxes
