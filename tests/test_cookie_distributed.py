"""COOKIE and the baseline on several ranks: losses and averaged gradients equal one process's."""

import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from learning import methods
from learning.training.contrast import ContrastConfig
from learning.training.engine import Objective
from tests import cookie_case
from tests.cookie_case import ALL, MODEL, build
from tests.distributed_harness import run_distributed
from tests.plain_engine import PlainEngine

COUNT = 12
CLIP: dict[str, Any] = {key: MODEL[key] for key in ("vision", "text", "temperature")}
CLIP |= {"method": "clip", "dimension": 6}
FULL, LOCAL = ContrastConfig(), ContrastConfig(how="local")
BLOCKWISE = ContrastConfig(how="blockwise", block=3)
UNEVEN = {1: (12,), 2: (7, 5), 4: (4, 2, 3, 3)}


@dataclass(frozen=True)
class Case:
    """A method, and how its step is done."""

    kind: str
    batch_norm: str
    contrast: ContrastConfig = FULL
    micro_batch: int | None = None
    uneven: bool = False

    def plain(self) -> "Case":
        return Case(self.kind, self.batch_norm)


CASES = (
    Case("cookie", "global"),
    Case("cookie", "frozen"),
    Case("clip", "global"),
    Case("cookie", "local"),
    Case("clip", "global", LOCAL),
    Case("cookie", "frozen", BLOCKWISE),
    Case("cookie", "frozen", LOCAL, micro_batch=2, uneven=True),
)


def made(case: Case) -> Any:
    if case.kind == "cookie":
        model = build(ALL, vision__batch_norm=case.batch_norm, pooling="gpo", token_norm=True)
    else:
        torch.manual_seed(0)
        values = CLIP | {"vision": MODEL["vision"] | {"batch_norm": case.batch_norm}}
        config = methods.parse_config(values)
        model = methods.build(config, ("ccl", "hinge"), cookie_case.VOCABULARY).double()
    model.contrast = case.contrast
    return model


WEIGHTS = {"ccl": 1.0, "vcl": 0.5, "tcl": 2.0, "hinge": 3.0}


def step(rank: int, world_size: int, case: Case) -> dict[str, dict[str, Tensor]]:
    """One rank's losses, its gradients averaged over ranks as an engine does, and its buffers."""
    model = made(case)
    counts = UNEVEN[world_size] if case.uneven else (COUNT // world_size,) * world_size
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    batch = cookie_case.rows(cookie_case.batch(model, COUNT), own)
    batch.rows_by_rank = counts if case.uneven else None
    engine = PlainEngine(Objective(model, {name: WEIGHTS[name] for name in model.losses}))
    losses, report = engine.backward_of(batch, case.micro_batch)[1:]
    gradients = engine.averaged_gradients()
    return {
        "losses": losses,
        "report": report,
        "gradients": gradients,
        "buffers": dict(model.named_buffers()),
    }


def steps(rank: int, world_size: int) -> list[dict[str, dict[str, Tensor]]]:
    """All cases in one start of the processes, which is what takes long."""
    return [step(rank, world_size, case) for case in CASES]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_learn_what_one_process_learns(world_size: int) -> None:
    """Features, temperature and batch statistics alike: no factor of the world size is left anywhere."""
    one = {case: step(0, 1, case) for case in {case.plain() for case in CASES}}
    ranks = [steps(0, 1)] if world_size == 1 else run_distributed(steps, world_size, timeout_s=400)
    for found in ranks:
        for case, ours in zip(CASES, found, strict=True):
            expected = one[case.plain()]
            if case.batch_norm == "local" and world_size > 1:
                # each rank's own statistics: what the test would see if it were blind
                assert not torch.allclose(ours["losses"]["ccl"], expected["losses"]["ccl"], rtol=1e-6)
                continue
            for part, values in expected.items():
                assert list(ours[part]) == list(values)
                for name, value in values.items():
                    torch.testing.assert_close(
                        ours[part][name].to(value.dtype),
                        value,
                        rtol=1e-9,
                        atol=1e-10,
                        msg=lambda text, at=(case, name): f"{at}: {text}",
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
