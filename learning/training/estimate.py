"""What a model needs before it is trained: parameters by part, and memory a GPU under each ZeRO stage."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from learning import methods
from learning.model_files import without_weights
from learning.training.deepspeed_setup import quiet_deepspeed

BERT_VOCABULARY = 30_522
LEFT_OUT = (
    "weights, gradients and AdamW's state in 16-bit training with fp32 master weights; left out: a teacher "
    "and its queues, activations (they grow with batch_per_gpu), buffers of the collectives, the gathered "
    "batch, what CUDA and NCCL take"
)


@dataclass(frozen=True)
class Estimate:
    """Parameters, and bytes a GPU by way of holding them (zero0 … zero3, zero2_offload, zero3_offload)."""

    parts: dict[str, int]  # trainable parameters
    trainable: int
    frozen: int
    largest_layer: int
    world_size: int
    bytes_per_gpu: dict[str, int]
    says: str = LEFT_OUT

    @property
    def parameters(self) -> int:
        return self.trainable + self.frozen


def estimate(
    model_config: Mapping[str, Any],
    losses: tuple[str, ...],
    world_size: int,
    vocabulary_size: int = BERT_VOCABULARY,
) -> Estimate:
    """Build the model on the meta device (no weights are read, no memory taken) and count.

    model_config: the recipe's `model` section. ZeRO 2 and 3 are DeepSpeed's own estimates of the trainable
    parameters; 0 and 1, for which DeepSpeed has none, count the same things: 2 bytes of weight, 2 + 4 of
    gradient, 4 of master weight, 8 of AdamW's moments. Frozen parameters add 2 bytes each, shared among
    GPUs under ZeRO-3.
    """
    with torch.device("meta"):
        method = methods.build(methods.parse_config(without_weights(model_config)), losses, vocabulary_size)
        method.make_heads()
    parts = {name: sum(p.numel() for p in own) for name, own in method.parts().items()}
    trainable = sum(p.numel() for p in method.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in method.parameters() if not p.requires_grad)
    largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in method.modules())
    return Estimate(
        parts, trainable, frozen, largest, world_size, bytes_per_gpu(trainable, frozen, largest, world_size)
    )


def bytes_per_gpu(trainable: int, frozen: int, largest_layer: int, world_size: int) -> dict[str, int]:
    """Bytes of model state a GPU by ZeRO stage; all arguments but `world_size` in parameters."""
    quiet_deepspeed(None)
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2

    def two(offload: bool) -> int:
        return int(zero2(trainable, world_size, 1, cpu_offload=offload)[1])

    def three(offload: bool) -> int:
        return int(
            zero3(
                trainable,
                largest_layer,
                world_size,
                1,
                cpu_offload=offload,
                cpu_offload_params=offload,
                zero_init=False,
            )[1]
        )

    return {
        "zero0": 20 * trainable + 2 * frozen,
        "zero1": (2 + 2) * trainable + 16 * trainable // world_size + 2 * frozen,
        "zero2": two(False) + 2 * frozen,
        "zero3": three(False) + 2 * frozen // world_size,
        "zero2_offload": two(True) + 2 * frozen,
        "zero3_offload": three(True),
    }
