"""Embeddings of a split's images and of texts, shared among processes by Accelerate, gathered in order.

The blocks are the same for any number of processes: block b holds the items b·batch … (b + 1)·batch - 1,
and process r of W computes the blocks r, r + W, …. Nothing is padded with copies of other items, nothing is
computed twice but for blocks that keep a process in step (below), so the result is the same to the last bit
for 1, 2 or more processes that have the same number of threads.

All processes make the same number of forward calls: where a ZeRO-3 engine gathers parameters inside a call,
one that had nothing left to do would leave the others waiting. What it computes then is thrown away.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather
from jaxtyping import Float, Float32, Shaped
from torch import Tensor, nn

from data_tools.pictures import EncodedPicture, PictureError
from data_tools.regions.store import RegionStore
from data_tools.shards import ShardIndex
from learning.methods.base import EmbedsRegions, Method
from learning.tokenizer import Tokenizer
from learning.training import distributed, watchdog
from learning.training.augment import ImageTransform
from learning.training.split_regions import SplitRegions, cast_regions, check_method

Advance = Callable[[int], None]
T = TypeVar("T")


def embed_images(
    method: Method,
    index: ShardIndex,
    transform: ImageTransform,
    *,
    batch: int,
    device: torch.device,
    max_pixels: int,
    regions: RegionStore | None = None,
    advance: Advance | None = None,
) -> Float32[np.ndarray, "n d"]:
    """Unit-length embeddings of all images of an index, in its order, on every process.

    `method` is put on `device` by the caller, in evaluation mode. With `regions` it embeds those of the
    pictures in place of their pixels, and no picture is read. `advance` is told how many images were done.
    Raises ValueError, on every process, that names the shard and the key of a picture that cannot be
    read, or that has no regions: a gallery must not silently shrink.
    """
    if regions is None:
        embed = _of_pixels(method, index, transform, max_pixels, device)
    else:
        embed = _of_regions(method, index, regions, device)
    return spread(len(index), batch, lambda start, stop: _unit(embed(start, stop)), advance)


def _of_pixels(
    method: Method, index: ShardIndex, transform: ImageTransform, max_pixels: int, device: torch.device
) -> Callable[[int, int], Tensor]:
    """The embeddings of the images start … stop - 1, by their plain views."""
    dtype = weights_dtype(method)

    def embed(start: int, stop: int) -> Tensor:
        pixels = [plain_pixels(index, i, transform, max_pixels) for i in range(start, stop)]
        return method.embed_images(torch.stack(pixels).to(device, dtype))

    return embed


def _of_regions(
    method: Method, index: ShardIndex, store: RegionStore, device: torch.device
) -> Callable[[int, int], Tensor]:
    """The same by their regions. Raises ValueError where method and store do not go together."""
    check_method(method, store)
    assert isinstance(method, EmbedsRegions)
    regions, embeds, dtype = SplitRegions(store, index), method, weights_dtype(method)
    regions.check(0)

    def embed(start: int, stop: int) -> Tensor:
        read = regions.block(start, stop).each(lambda x: x.to(device))
        return embeds.embed_regions(cast_regions(read, dtype))

    return embed


def embed_texts(
    method: Method,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    max_length: int,
    batch: int,
    device: torch.device,
    advance: Advance | None = None,
) -> Float32[np.ndarray, "t d"]:
    """Unit-length embeddings of texts, in their order, on every process; cut to `max_length` tokens."""

    def block(start: int, stop: int) -> Tensor:
        return _unit(method.embed_texts(tokenizer.encode(list(texts[start:stop]), max_length).to(device)))

    return spread(len(texts), batch, block, advance)


def embed_both(
    method: Method,
    tokenizer: Tokenizer,
    transform: ImageTransform,
    index: ShardIndex,
    texts: Sequence[str],
    *,
    batch: int,
    device: torch.device,
    max_length: int,
    max_pixels: int,
    regions: RegionStore | None = None,
    advance: Advance | None = None,
) -> tuple[Float32[np.ndarray, "n d"], Float32[np.ndarray, "t d"]]:
    """Embeddings of all images of an index, as `embed_images`, and of texts, as `embed_texts`."""
    images = embed_images(
        method,
        index,
        transform,
        batch=batch,
        device=device,
        max_pixels=max_pixels,
        regions=regions,
        advance=advance,
    )
    asked = embed_texts(
        method, tokenizer, texts, max_length=max_length, batch=batch, device=device, advance=advance
    )
    return images, asked


@torch.no_grad()
def spread(
    count: int,
    block: int,
    compute: Callable[[int, int], Shaped[Tensor, " b *d"]],
    advance: Advance | None = None,
) -> Shaped[np.ndarray, " count *d"]:
    """Rows 0 … count - 1, computed block by block, shared among the processes, gathered in order on each.

    compute(start, stop) gives the stop - start rows of a block; a ValueError in one process is raised in all.
    Raises ValueError when count is 0.
    """
    if count == 0:
        raise ValueError("there is nothing to embed")
    rank, world = _processes()
    blocks = -(-count // block)
    gathered = []
    for first in range(0, blocks, world):
        own = first + rank
        start = (own if own < blocks else 0) * block
        rows = _agreed(lambda start=start: compute(start, min(start + block, count)))  # type: ignore[misc]
        if world > 1:
            short = block - len(rows)  # the last block alone: filled with zeros, which are cut off below
            rows = gather(torch.cat([rows, rows.new_zeros((short, *rows.shape[1:]))]))
        gathered.append(rows.cpu())
        watchdog.alive()
        if advance is not None:
            advance(min(count, (first + world) * block) - first * block)
    return torch.cat(gathered)[:count].numpy()


@contextmanager
def evaluation_mode(method: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, then each as it was (a frozen normalisation stays frozen)."""
    modes = {module: module.training for module in method.modules()}
    method.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _processes() -> tuple[int, int]:
    """This process's rank and the number of processes; Accelerate joins the process group that is there."""
    device = distributed.device()
    os.environ.setdefault("ACCELERATE_TORCH_DEVICE", str(device))  # as `distributed.init` chose it
    if distributed.is_initialized():  # by these Accelerate knows of a group; it joins the one that is there
        os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    else:  # an engine that was here before may have left it: Accelerate would wait for a group
        os.environ.pop("LOCAL_RANK", None)
    state = PartialState(cpu=device.type == "cpu")
    if state.num_processes != distributed.world_size():
        raise RuntimeError(
            f"Accelerate counts {state.num_processes} processes, torch.distributed "
            f"{distributed.world_size()}: call distributed.init() before the first use of Accelerate"
        )
    # not state.process_index: under DeepSpeed on the CPU it is 0 on every rank
    return distributed.rank(), distributed.world_size()


def _agreed(compute: Callable[[], T]) -> T:
    """compute(), or on every process the ValueError that any of them met: none is left waiting."""
    error: ValueError | None = None
    try:
        result = compute()
    except ValueError as raised:
        error = raised
    if distributed.all_reduce_max(error is not None):
        messages = distributed.gather_objects(None if error is None else str(error))
        raise ValueError(next(m for m in messages if m is not None)) from error
    return result


def plain_pixels(index: ShardIndex, i: int, transform: ImageTransform, max_pixels: int) -> Tensor:
    """Image i as training sees its plain view. Raises ValueError that names its shard and its key."""
    picture = checked_picture(index, i, max_pixels)
    try:
        return transform.plain(picture)
    except PictureError as error:
        raise ValueError(f"{error}; raise max_pixels, or run the shard stage again") from error


def checked_picture(index: ShardIndex, i: int, max_pixels: int) -> EncodedPicture:
    """Image i, not decoded yet. Raises ValueError where it is not the picture of its record."""
    where = index.where(i)
    data = index.image_bytes(i)
    if hashlib.sha256(data).hexdigest() != index.record(i)["sha256"]:
        raise ValueError(f"{where}: the picture is not the one of its record; run the shard stage again")
    return EncodedPicture(data, max_pixels=max_pixels, name=where)


def weights_dtype(method: Method) -> torch.dtype:
    """The dtype of the method's weights (bfloat16 under a bf16 engine): what its images are cast to."""
    return next((p.dtype for p in method.parameters() if p.is_floating_point()), torch.float32)


def _unit(embeddings: Float[Tensor, "b d"]) -> Float32[Tensor, "b d"]:
    """Unit length in float32: half precision leaves a length that is off by some 2^-9."""
    return torch.nn.functional.normalize(embeddings.float(), dim=-1)
