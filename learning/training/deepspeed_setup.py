"""DeepSpeed's config as the recipe names it, and DeepSpeed's own engine made from it."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from learning.training import distributed

RUN_SIZE_KEYS = {
    "train_batch_size": "contrastive_batch",
    "train_micro_batch_size_per_gpu": "batch_per_gpu",
    "gradient_accumulation_steps": "contrastive_batch (accumulation adds no negatives)",
    "gradient_clipping": "gradient_clip",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "steps_per_print": "log_every_steps",
}


def read_deepspeed_config(path: Path) -> dict[str, Any]:
    """A DeepSpeed config without run-size keys. Raises ValueError naming the file, the key and the remedy."""
    if not path.is_file():
        known = sorted(p.name for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
        there = f"; in {path.parent} there are {', '.join(known)}" if known else ""
        raise ValueError(f"deepspeed: {path}: no such file{there}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"deepspeed: {path}: is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"deepspeed: {path}: must hold one JSON object, holds a {type(config).__name__}")
    for key, field in RUN_SIZE_KEYS.items():
        if key in config:
            raise ValueError(f"deepspeed: {path}: take '{key}' out; the recipe says it: {field}")
    return config


def zero_stage(config: Mapping[str, Any]) -> int:
    return int(config.get("zero_optimization", {}).get("stage", 0))


def dtype_of(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that weights and activations have under a DeepSpeed config."""
    if config.get("bf16", {}).get("enabled"):
        return torch.bfloat16
    return torch.float16 if config.get("fp16", {}).get("enabled") else torch.float32


def quiet_deepspeed(log_file: Path | None) -> Any:
    """The deepspeed module, its messages going to `log_file` (or nowhere) instead of the user's screen.

    On a CPU without its compiled shared-memory collective: gloo serves, and no run waits for a compiler.
    """
    os.environ.setdefault("DS_ACCELERATOR", distributed.device().type)  # read when it is imported
    import deepspeed
    import deepspeed.ops

    if distributed.device().type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger = logging.getLogger("DeepSpeed")
    for old in list(logger.handlers):
        logger.removeHandler(old)
    handler: logging.Handler = logging.NullHandler()
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(log_file, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    return deepspeed


def start(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Mapping[str, Any],
    batch_per_gpu: int,
    gradient_clip: float,
    log_file: Path | None,
) -> tuple[Any, Any]:
    """DeepSpeed's engine and its optimizer around the objective, whose parameters become DeepSpeed's."""
    deepspeed = quiet_deepspeed(log_file)
    device = distributed.device()
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # DeepSpeed insists on it
    deepspeed.init_distributed(  # takes over the process group that is there
        dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
    )
    engine, held, _, _ = deepspeed.initialize(
        model=objective,
        optimizer=optimizer,
        config=dict(config)
        | {
            "train_micro_batch_size_per_gpu": batch_per_gpu,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": gradient_clip,
            "steps_per_print": 2**31,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
        dist_init_required=False,
    )
    if zero_stage(config) == 3:
        # ZeRO-3 gathers a parameter when the module that owns it is called. What stands beside children may
        # be used by another method of the module than forward: it belongs to the whole call.
        for module in engine.module.modules():
            if next(module.children(), None) is not None:
                for loose in module.parameters(recurse=False):
                    deepspeed.zero.register_external_parameter(engine.module, loose)
    return engine, held
