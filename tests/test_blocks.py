"""Blocks recomputed in backward, and compiled blocks: the numbers of the plain way, and less memory."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from learning.encoders.vision import VisionConfig, VisionEncoder
from learning.methods.base import Method
from learning.training.blocks import blocks_of, compile_blocks, recompute_blocks
from learning.training.deepspeed_setup import read_deepspeed_config
from learning.training.engine import Engine
from learning.training.footprint import LiveBytes
from learning.training.rates import OptimizerConfig
from tests import cookie_case
from tests.distributed_harness import run_distributed
from tests.training_case import CONFIGS


def cookie(seed: int = 0, dropout: float = 0.3, **changed: Any) -> Method:
    """The tiny COOKIE in float64, dropout in the text tower and in the fusion."""
    text = cookie_case.MODEL["text"] | {"dropout": dropout, "layers": 2}
    return cookie_case.build(seed=seed, text=text, dropout=dropout, **changed)


def gradients(method: Method, steps: int = 1) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses, gradients and the state after `steps` forward and backward passes without an update."""
    torch.manual_seed(3)
    losses = []
    for step in range(steps):
        terms = method(cookie_case.batch(method, seed=step))
        total = torch.stack(list(terms.losses.values())).sum()
        losses.append(float(total.detach()))
        total.backward()
    grads = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    return losses, grads, {name: value.clone() for name, value in method.state_dict().items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("batch_norm", ["local", "global", "frozen"])
def test_recomputed_blocks_change_no_bit(batch_norm: str) -> None:
    """Dropout on; and the running statistics and their counters move once a step."""
    plain, recomputed = (cookie(vision__batch_norm=batch_norm) for _ in range(2))
    # test_resnet has a block a stage; the text tower 2 layers; TAV-TE 1, WS-TE 2
    assert recompute_blocks(recomputed) == 4 + 2 + 1 + 2
    expected, told = gradients(plain, steps=2), gradients(recomputed, steps=2)
    assert told[0] == expected[0]
    assert_equal(told[1], expected[1])
    assert_equal(told[2], expected[2])


def test_recomputed_blocks_of_a_vit_in_fp32_change_no_bit() -> None:
    plain, recomputed = (cookie(vision__name="test_vit", vision__image_px=64).float() for _ in range(2))
    recompute_blocks(recomputed)
    for method in (plain, recomputed):
        torch.manual_seed(1)
        vectors = method.embed_images(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
        vectors.square().mul(torch.arange(8)).sum().backward()
    grads = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (recomputed, plain)]
    assert len(grads[0]) > 60
    assert_equal(*grads)


def test_recomputed_blocks_hold_less() -> None:
    """Bytes really allocated by forward and backward at a time, gradients among them."""
    peaks = []
    for recomputed in (False, True):
        method = cookie(vision__name="test_vit", vision__image_px=64)
        if recomputed:
            recompute_blocks(method)
        batch = cookie_case.batch(method, count=8)
        with LiveBytes() as live:
            torch.stack(list(method(batch).losses.values())).sum().backward()
        peaks.append(live.peak)
    assert peaks[1] < 0.5 * peaks[0]


def test_evaluation_and_frozen_towers_run_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = cookie(vision__trainable=False)
    assert recompute_blocks(frozen) == 2 + 1 + 2
    method = cookie()
    recompute_blocks(method)

    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("recomputed")

    monkeypatch.setattr("learning.training.blocks.checkpoint", refused)
    batch = cookie_case.batch(method)
    with torch.no_grad():
        method(batch)
    method.eval()
    method(batch)
    with pytest.raises(AssertionError, match="recomputed"):
        method.train()(batch)


def test_names_and_copies_are_those_of_the_plain_model() -> None:
    method = cookie()
    names = list(method.state_dict())
    recompute_blocks(method)
    assert list(method.state_dict()) == names
    other = copy.deepcopy(method)  # a copy computes with its own weights
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    _, grads, _ = gradients(method)
    assert all(bool(g.abs().sum() > 0) for n, g in grads.items() if n.endswith("query_key_value.weight"))
    assert all(p.grad is None for p in other.parameters())


def test_a_backbone_without_blocks_is_refused() -> None:
    with torch.device("meta"):
        tower = VisionEncoder(VisionConfig(name="cait_xxs24_224", image_px=224))
    with pytest.raises(ValueError, match=r"model.vision.name: timm tells no blocks of cait_xxs24_224; leave"):
        blocks_of(tower)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_compiled_and_recomputed_blocks_follow_the_plain_ones(tmp_path: Path, monkeypatch: Any) -> None:
    """Losses, gradients and statistics of two batches, without dropout; the names of the state stay."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    plain, compiled = (cookie(dropout=0.0) for _ in range(2))
    recompute_blocks(compiled)
    assert compile_blocks(compiled) == 4 + 2 + 1 + 2
    expected, told = gradients(plain, steps=2), gradients(compiled, steps=2)
    assert told[0] == pytest.approx(expected[0], rel=1e-9)
    for ours, theirs in zip(told[1:], expected[1:], strict=True):
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-9, msg=name)


def test_compiling_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"compile: does not go with ZeRO-3"):
        compile_blocks(cookie(), zero_stage=3)


def trained(name: str, rank: int, recomputed: bool) -> dict[str, Tensor]:
    """The state after three steps of an engine on this rank's half of the batches."""
    torch.manual_seed(0)
    method = cookie(vision__batch_norm="global").float()
    if recomputed:
        recompute_blocks(method)
    config = read_deepspeed_config(CONFIGS / f"{name}.json")
    weights = dict.fromkeys(cookie_case.ALL, 1.0)
    engine = Engine(method, weights, OptimizerConfig(learning_rate=1e-3), config, batch_per_gpu=2)
    torch.manual_seed(rank)  # of dropout
    for step in range(3):
        whole = cookie_case.batch(engine.method, seed=step)
        engine.step(cookie_case.rows(whole, slice(2 * rank, 2 * rank + 2)), 1.0)
    state = engine.full_state()
    engine.close()
    return state


def both_ways(rank: int, world_size: int, names: list[str]) -> list[int]:
    """How many tensors agree bit by bit, a config."""
    counts = []
    for name in names:
        plain, recomputed = trained(name, rank, False), trained(name, rank, True)
        assert_equal(recomputed, plain)
        counts.append(len(plain))
    return counts


@pytest.mark.slow
def test_recomputed_blocks_train_the_same_under_zero() -> None:
    """Statistics over both ranks, so that what is recomputed holds a collective too."""
    names = ["zero0_fp32", "zero1_fp32", "zero2_bf16", "zero3_fp32"]
    for counts in run_distributed(both_ways, 2, names, timeout_s=400):
        assert len(set(counts)) == 1
        assert counts[0] > 100
