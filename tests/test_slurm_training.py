"""Real training (DeepSpeed over gloo, two nodes) under a real SLURM: the same model as on a laptop."""

import hashlib
import os
import signal
from pathlib import Path

import pytest
import yaml

from tests.slurm_cluster import SlurmCluster
from tests.slurm_desk import CLUSTER, Desk, rank_pid
from tests.survival_case import clip_values
from tests.training_case import write_corpus


def recipe(corpus: Path) -> str:
    """Two stages of training over a corpus that is there, the second from the first's weights."""
    data = {"texts": ["title"], "corpus": str(corpus)}
    first = clip_values(data=data, epochs=4, checkpoint={"every_steps": 2})
    second = first | {"kind": "finetune", "inputs": {"weights": "pretrain"}, "epochs": 1}
    second.pop("vocabulary")
    stages = {"pretrain": first | {"inputs": {}}, "finetune": second}
    values = {
        "name": "tiny",
        "seed": 3,
        "tracking": {"uri": "off"},
        "launch": {"processes": 2},
        "stages": stages,
    }
    return yaml.safe_dump(values, sort_keys=False)


def model(desk: Desk, stage: str) -> str:
    return hashlib.sha256((desk.directory(stage) / "out/model.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
def test_a_killed_rank_on_two_nodes_costs_no_bit(slurm: SlurmCluster, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", {"train": 40})
    cluster = CLUSTER.replace("nodes: 1, gpus_per_node: 2", "nodes: 2, gpus_per_node: 1")
    laptop = Desk(slurm, tmp_path / "laptop", recipe(corpus))
    laptop.tandem("run")
    user = Desk(slurm, tmp_path / "desk", recipe(corpus), cluster)
    sent = user.submit()
    job = str(sent["pretrain"]["jobs"][0])
    user.slurm.wait_until(lambda: user.step("pretrain") >= 5, 120, "step 5")
    assert user.slurm.job(job)["NumNodes"] == "2"
    os.kill(rank_pid(job, 1), signal.SIGKILL)
    rows = user.wait(timeout_s=240)
    assert [row["state"] for row in rows.values()] == ["done", "done"], user.tandem("status")
    assert [row["starts"] for row in rows.values()] == [2, 1]
    assert "Killed" in user.attempts("pretrain")[0]["message"]
    for stage in ("pretrain", "finetune"):
        assert model(user, stage) == model(laptop, stage)
