"""The formulas of scale.py against what two ranks hold and move; FLOPs and activations against known ones."""

import pytest
import torch

from benchmarks.scale_check import expected, measure
from learning.training.footprint import footprint
from learning.training.scale import held, moved
from tests.distributed_harness import run_distributed

VIT = {
    "method": "clip",
    "vision": {"name": "vit_base_patch16_224", "image_px": 224},
    "text": {"name": "bert_base", "max_length": 32},
    "dimension": 512,
}


def test_flops_are_those_of_the_layers() -> None:
    """ViT-B/16: 17.6 GFLOPs of multiply-adds at 224 px (Dosovitskiy et al. 2021); BERT-base: 12 layers."""
    told = footprint(VIT, ("ccl",), 2, torch.float16, 30_522)
    n, d = 197, 768
    vision = 2 * (196 * 768 * d + 12 * (n * 12 * d * d + 2 * n * n * d))
    text = 2 * 12 * (32 * 12 * d * d + 2 * 32 * 32 * d)
    assert told.forward_flops == pytest.approx(2 * (vision + text + 2 * 2 * d * 512), rel=1e-3)
    assert told.training_flops(recomputed=False) == 3 * told.forward_flops


def test_activations_grow_with_the_batch_and_shrink_when_recomputed() -> None:
    two, four = (footprint(VIT, ("ccl",), n, torch.float16, 30_522) for n in (2, 4))
    again = footprint(VIT, ("ccl",), 4, torch.float16, 30_522, recomputed=True)
    assert four.activation_bytes == pytest.approx(2 * two.activation_bytes, rel=0.15)
    assert again.activation_bytes < 0.35 * four.activation_bytes
    assert again.training_flops(recomputed=True) == 4 * four.forward_flops


def test_what_is_held_is_shared_among_ranks() -> None:
    million = 10**6
    assert held(million, 0, 0, torch.float16, 8).after_step == 14 * million
    assert held(million, 0, 1, torch.bfloat16, 8).after_step == 2 * million + 12 * million // 8
    assert held(million, 0, 3, torch.bfloat16, 8, bucket=1).after_step == 16 * million // 8 + 4
    assert held(million, million, 1, torch.bfloat16, 8).weights == 4 * million


def test_what_moves_on_the_wire() -> None:
    one = moved(1000, 1, torch.float16, 4, samples=8, features=2)
    assert (one.reduced, one.gathered) == (4000 + 64, 2000 + 64)
    assert one.on_the_wire == (2 * 4064 + 2064) * 3 // 4
    assert moved(1000, 1, torch.float16, 1, samples=8, features=2).payload == 0
    three = moved(1000, 3, torch.float16, 4, samples=8, features=2)
    assert three.on_the_wire < one.on_the_wire


@pytest.mark.slow
def test_two_ranks_hold_and_move_what_the_formulas_say() -> None:
    names = ["zero0_bf16", "zero1_bf16", "zero2_fp32", "zero3_bf16"]
    for found in run_distributed(measure, 2, names, timeout_s=500):
        for name, told in zip(names, found, strict=True):
            holds, moves = expected(name, told["parameters"], 2)
            assert told["after_step"] == pytest.approx(holds.after_step, rel=0.02), name
            assert told["before_step"] == pytest.approx(holds.before_step, rel=0.02), name
            assert sum(told["collectives"].values()) == pytest.approx(moves.payload, rel=0.02), name
