"""The options of a training stage that change how a model is run: they reach the engine, and out/."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from stages.pretrain import Config, run
from tests.test_training import ONE
from tests.training_case import config_values, make_job, write_corpus


def trained(directory: Path, corpus: Path, **options: Any) -> dict[str, Tensor]:
    run(Config(**config_values(**ONE | options)), make_job(directory, corpus))
    return load_file(directory / "out/model.safetensors")


def test_recomputing_changes_no_bit_and_averages_go_to_out(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "shard/out", {"train": 19})
    plain = trained(tmp_path / "plain", corpus)
    again = trained(tmp_path / "again", corpus, activation_checkpointing=True)
    assert all(torch.equal(again[name], value) for name, value in plain.items())
    averaged = trained(tmp_path / "averaged", corpus, ema={"decay": 0.5})
    assert set(averaged) == set(plain)
    weight = "fusion.text.projection.weight"
    assert not torch.equal(averaged[weight], plain[weight])
    statistic = "vision.backbone.bn1.running_mean"  # buffers are the newest
    assert torch.equal(averaged[statistic], plain[statistic])
