"""What a training step costs on many GPUs: bytes held and moved a GPU, from counts and the ZeRO stage alone.

benchmarks/scale_check.py holds these formulas against what real ranks hold and move.
"""

from dataclasses import dataclass

import torch

FULL, MOMENTS = 4, 8  # bytes a parameter: an fp32 copy; AdamW's two


@dataclass(frozen=True)
class Held:
    """Bytes of model state on one GPU."""

    weights: int
    optimizer: int  # fp32 masters, where they are not the weights themselves, and AdamW's moments
    gradients: int  # between backward and the optimizer's step
    bucket: int = 0  # of ZeRO-3, which keeps it and the gradients' buffer after the step too

    @property
    def after_step(self) -> int:
        kept = self.gradients + self.bucket if self.bucket else 0
        return self.weights + self.optimizer + kept

    @property
    def before_step(self) -> int:
        return self.weights + self.optimizer + self.gradients + self.bucket


def held(
    trainable: int, frozen: int, stage: int, dtype: torch.dtype, ranks: int, bucket: int = 50_000_000
) -> Held:
    """Model state under a ZeRO stage, without offload; `trainable`, `frozen` and `bucket` in numbers.

    `bucket`: ZeRO-3's reduce_bucket_size. Left out: activations, the buckets of ZeRO 1 and 2, which live in
    backward alone, and what lives in the optimizer's step alone.
    """
    each = dtype.itemsize
    if stage == 0:
        master = 0 if dtype == torch.float32 else FULL
        return Held(each * (trainable + frozen), (master + MOMENTS) * trainable, each * trainable)
    share = (FULL + MOMENTS) * trainable // ranks  # a master even in fp32
    if stage < 3:
        return Held(each * (trainable + frozen), share, each * trainable // ranks)
    return Held(each * (trainable + frozen) // ranks, share, each * trainable // ranks, FULL * bucket)


@dataclass(frozen=True)
class Moved:
    """Payload bytes of one rank's collectives in a step."""

    reduced: int  # all-reduced: gradients under ZeRO 0-2, and the features' gradients
    scattered: int  # reduce-scattered: gradients under ZeRO-3
    gathered: int  # all-gathered: weights under ZeRO 1-3, and features
    ranks: int

    @property
    def payload(self) -> int:
        return self.reduced + self.scattered + self.gathered

    @property
    def on_the_wire(self) -> int:
        """Bytes that a GPU sends (and receives) with ring collectives (Patarasuk and Yuan 2009)."""
        return (2 * self.reduced + self.scattered + self.gathered) * (self.ranks - 1) // self.ranks


def moved(
    trainable: int,
    stage: int,
    dtype: torch.dtype,
    ranks: int,
    *,
    samples: int,
    features: int,
    frozen: int = 0,
) -> Moved:
    """`samples`: of the global batch; `features`: fp32 numbers a sample that are gathered for the losses.

    As the shipped configs have it: gradients travel in fp32 but under ZeRO 0, where they go in `dtype`;
    ZeRO 1 and 2 all-reduce them (DeepSpeed's `use_multi_rank_bucket_allreduce`); ZeRO-3 gathers weights once
    a step, as backward follows within `stage3_max_reuse_distance`. On one rank nothing travels.
    """
    if ranks == 1:
        return Moved(0, 0, 0, 1)
    each, exchanged = dtype.itemsize, FULL * samples * features
    gradients = (each if stage == 0 else FULL) * trainable
    if stage == 3:
        return Moved(exchanged, gradients, each * (trainable + frozen) + exchanged, ranks)
    weights = each * trainable if stage else 0
    return Moved(gradients + exchanged, 0, weights + exchanged, ranks)
