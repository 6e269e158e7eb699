"""COOKIE and the baseline on several ranks: losses and averaged gradients equal one process's."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from learning import methods
from tests import cookie_case
from tests.cookie_case import ALL, MODEL, build
from tests.distributed_harness import run_distributed

COUNT = 8
CLIP: dict[str, Any] = {key: MODEL[key] for key in ("vision", "text", "temperature")}
CLIP |= {"method": "clip", "dimension": 6}


def made(kind: str, batch_norm: str) -> Any:
    if kind == "cookie":
        return build(ALL, vision__batch_norm=batch_norm, pooling="gpo", token_norm=True)
    torch.manual_seed(0)
    values = CLIP | {"vision": MODEL["vision"] | {"batch_norm": batch_norm}}
    return methods.build(methods.parse_config(values), ("ccl", "hinge"), cookie_case.VOCABULARY).double()


def step(rank: int, world_size: int, kind: str, batch_norm: str) -> dict[str, dict[str, Tensor]]:
    """One rank's losses, its gradients averaged over ranks as an engine does, and its buffers."""
    model = made(kind, batch_norm)
    size = COUNT // world_size
    batch = cookie_case.rows(cookie_case.batch(model, COUNT), slice(rank * size, (rank + 1) * size))
    terms = model(batch)
    weights = {"ccl": 1.0, "vcl": 0.5, "tcl": 2.0, "hinge": 3.0}
    torch.stack([weights[name] * loss for name, loss in terms.losses.items()]).sum().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if world_size > 1:
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size
        gradients[name] = parameter.grad
    losses = {name: loss.detach() for name, loss in terms.losses.items()}
    return {
        "losses": losses,
        "report": terms.report,
        "gradients": gradients,
        "buffers": dict(model.named_buffers()),
    }


CASES = (("cookie", "global"), ("cookie", "frozen"), ("clip", "global"), ("cookie", "local"))


def steps(rank: int, world_size: int) -> list[dict[str, dict[str, Tensor]]]:
    """All cases in one start of the processes, which is what takes long."""
    return [step(rank, world_size, kind, batch_norm) for kind, batch_norm in CASES]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_learn_what_one_process_learns(world_size: int) -> None:
    """Features, temperature and batch statistics alike: no factor of the world size is left anywhere."""
    one = steps(0, 1)
    for found in run_distributed(steps, world_size, timeout_s=400):
        for case, ours, expected in zip(CASES, found, one, strict=True):
            if case[1] == "local":  # each rank's own statistics: what the test would see if it were blind
                assert not torch.allclose(ours["losses"]["ccl"], expected["losses"]["ccl"], rtol=1e-6)
                continue
            for part, values in expected.items():
                assert list(ours[part]) == list(values)
                for name, value in values.items():
                    torch.testing.assert_close(
                        ours[part][name],
                        value,
                        rtol=1e-9,
                        atol=1e-10,
                        msg=lambda text, n=name: f"{n}: {text}",
                    )


def fails(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("rank 1's own words")
    dist.barrier()


def hangs(rank: int, world_size: int) -> None:
    if rank == 0:
        dist.barrier()
    time.sleep(600)


@pytest.mark.slow
def test_the_harness_tells_the_cause_and_ends_in_time() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 of 2 failed(.|\n)*rank 1's own words"):
        run_distributed(fails, 2)
    with pytest.raises((TimeoutError, AssertionError)):
        run_distributed(hangs, 2, timeout_s=12)
