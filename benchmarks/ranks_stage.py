"""A stage for benchmarks/slurm_64_ranks.py: each rank says where it is, all reduce, and train a tiny model.

Torch and Tandem's own collectives and losses alone: 64 processes with all of DeepSpeed, timm and transformers
would need 35 GB of this machine's memory.
"""

import json
import os
import socket
from typing import ClassVar

import torch
from torch import nn

from learning.losses.contrastive import info_nce_rows
from learning.training import distributed
from stages.base import Job, Report, StageConfig

STEPS, ROWS, WIDTH = 3, 4, 16


class Config(StageConfig):
    kind: str = "benchmarks.ranks_stage"
    distributed: ClassVar[bool] = True


def run(config: Config, job: Job) -> Report:
    torch.set_num_threads(1)
    distributed.init(timeout_s=600)
    try:
        rank, ranks = distributed.rank(), distributed.world_size()
        total = torch.tensor([float(rank)])
        torch.distributed.all_reduce(total)
        here = {
            "rank": rank,
            "node": socket.gethostname(),
            "local_rank": int(os.environ["LOCAL_RANK"]),
            "gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
            "sum": float(total),
        }
        found = distributed.gather_objects(here)
        losses = _train(job, rank, ranks)
        if rank == 0:
            (job.out / "ranks.json").write_text(json.dumps({"ranks": found, "losses": losses}))
        return Report({"ranks": ranks, "steps": STEPS})
    finally:
        distributed.shutdown()


def _train(job: Job, rank: int, ranks: int) -> list[float]:
    """Two towers of one layer, InfoNCE over all ranks' rows; the same loss on every rank."""
    torch.manual_seed(job.seed)
    towers = nn.ModuleDict({"image": nn.Linear(WIDTH, WIDTH), "text": nn.Linear(WIDTH, WIDTH)})
    optimizer = torch.optim.AdamW(towers.parameters(), lr=1e-2)
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(1000 * step + rank)
        inputs = torch.randn(ROWS, WIDTH, generator=generator)
        image, text = (
            distributed.gather(nn.functional.normalize(towers[name](inputs), dim=-1))
            for name in ("image", "text")
        )
        loss = info_nce_rows(image, text, torch.tensor(0.1)).losses_b.mean()
        optimizer.zero_grad()
        loss.backward()
        for parameter in towers.parameters():
            assert parameter.grad is not None
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= ranks
        optimizer.step()
        losses.append(float(loss))
        job.tracker.metrics({"loss/total": losses[-1]}, step + 1)
    return losses
