"""Every method, by its demo recipe: losses, gradients, ranks, checkpoints, embeddings, the model written out.

A method is found by `learning.methods.names()` and its recipe by a rule (tests/conformance.py), so the next
one is walked through as it comes. A fifth one stands in tests/user_method as a user would write it.
"""

import json
import math
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from learning import methods
from tests import conformance, label_case
from tests.conformance import STEPS, USER, USERS_OWN, Stage
from tests.distributed_harness import run_distributed
from tests.pipeline_harness import REPOSITORY, command, environment
from tests.training_case import CONFIGS

NAMES = sorted({*methods.names(), USERS_OWN})
by_method = pytest.mark.parametrize("method", NAMES)
Told = dict[str, Any]


@pytest.fixture(scope="module")
def plugged() -> Iterator[None]:
    conformance.plug_in()
    yield
    conformance.plug_out()


@pytest.fixture(scope="module")
def stages(plugged: None) -> list[Stage]:
    return conformance.stages()


@pytest.fixture(scope="module")
def folder(stages: list[Stage], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conformance")
    for stage in stages:
        conformance.write_inputs(folder / stage.id, stage)
    return folder


@pytest.fixture(scope="module")
def one(stages: list[Stage], folder: Path) -> dict[str, Told]:
    """What one process gives; it writes each stage's model, from which the next one starts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return conformance.walk(0, 1, str(folder), [stage.id for stage in stages])
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def two(stages: list[Stage], folder: Path, one: dict[str, Told]) -> list[dict[str, Told]]:
    """What two ranks give. A stage that one process cannot run is not tried."""
    wanted = [stage.id for stage in stages if "error" not in one[stage.id]]
    return run_distributed(conformance.walk, 2, str(folder), wanted, timeout_s=400)


def told_of(method: str, stages: list[Stage], told: dict[str, Told]) -> list[tuple[Stage, Told]]:
    own = [(stage, told[stage.id]) for stage in stages if stage.method == method]
    assert own, f"{method} has no recipe of a laptop's size: recipes/{method}_demo.yaml"
    for stage, found in own:
        assert "error" not in found, f"{stage.id}: {found['error']}"
    return own


@by_method
@pytest.mark.slow
def test_losses_are_finite_and_every_parameter_learns(
    method: str, stages: list[Stage], one: dict[str, Told]
) -> None:
    for stage, told in told_of(method, stages, one):
        assert set(told["terms"]) == set(stage.config.losses), stage.id
        assert all(math.isfinite(loss) for loss in told["fp32_losses"].values()), told["fp32_losses"]
        assert told["largest"]
        for name, largest in told["largest"].items():
            assert largest is not None, f"{stage.id}: {name} has no gradient: freeze it or use it"
            assert largest < float("inf"), f"{stage.id}: {name}: {largest}"
            # a key's bias moves all scores of a query alike: its gradient is 0 but for rounding
            assert largest > 0 or name.endswith("key.bias"), f"{stage.id}: {name} never learns"


@by_method
@pytest.mark.slow
def test_two_ranks_are_one_process(
    method: str, stages: list[Stage], one: dict[str, Told], two: list[dict[str, Told]]
) -> None:
    """Losses of two steps, gradients of the second, and the state that only training needs, in float64."""
    for rank in two:
        for (stage, alone), (_, both) in zip(
            told_of(method, stages, one), told_of(method, stages, rank), strict=True
        ):
            assert len(both["losses"]) == STEPS
            close(both["losses"], alone["losses"], stage.id)
            close(both["gradients"], alone["gradients"], stage.id)
            close(both["kept"], alone["kept"], stage.id)


@by_method
@pytest.mark.slow
def test_a_step_from_a_checkpoint_is_the_step_that_would_have_been(
    method: str, stages: list[Stage], one: dict[str, Told], two: list[dict[str, Told]]
) -> None:
    told_of(method, stages, one)
    for rank in two:
        for stage, told in told_of(method, stages, rank):
            assert told["moved"], stage.id
            assert told["again"] == told["straight"], stage.id
            assert told["unequal"] == [], stage.id


@by_method
@pytest.mark.slow
def test_embeddings_are_of_unit_length_and_those_of_the_model_written_out(
    method: str, stages: list[Stage], one: dict[str, Told]
) -> None:
    for stage, told in told_of(method, stages, one):
        lengths = told["lengths"]
        torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=1e-5)
        assert told["different"] > 2, stage.id
        assert told["again"], f"{stage.id}: evaluation mode gives other embeddings the second time"
        assert told["loaded"], f"{stage.id}: the model written out gives other embeddings"


def close(ours: Any, theirs: Any, at: str) -> None:
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs), at
        for name, value in theirs.items():
            close(ours[name], value, f"{at}: {name}")
    elif isinstance(theirs, list):
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            close(one, other, f"{at}: {number}")
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9, msg=lambda text: f"{at}: {text}")


@pytest.mark.slow
def test_a_users_method_is_one_file_and_one_recipe(tmp_path: Path) -> None:
    """A copy of the house with the file in learning/methods: trained and evaluated by `tandem run`."""
    house = tmp_path / "house"
    shutil.copytree(REPOSITORY / "learning", house / "learning", ignore=shutil.ignore_patterns("__pycache__"))
    for package in ("pipeline", "stages", "data_tools"):
        (house / package).symlink_to(REPOSITORY / package)
    shutil.copy(USER / f"{USERS_OWN}.py", house / "learning" / "methods")
    shutil.copy(USER / f"{USERS_OWN}_demo.yaml", tmp_path)
    shutil.copy(CONFIGS / "zero1_fp32.json", tmp_path)
    label_case.write_corpus(tmp_path / "shard" / "out", ("train", "val"))

    ran = subprocess.run(
        command("run", f"{USERS_OWN}_demo.yaml"),
        cwd=tmp_path,
        env=environment() | {"PYTHONPATH": str(house)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    assert "by_labels, by chance" in ran.stdout
    trained, evaluated = (
        json.loads(next((tmp_path / f"runs/{USERS_OWN}_demo" / stage).glob("*/DONE.json")).read_text())
        for stage in ("pretrain", "evaluate")
    )
    assert trained["metrics"]["best/val/ndcg"] == trained["metrics"]["val/ndcg"]
    for name in ("own/i2t_r@1", "own/rsum", "by_labels/ndcg", "by_labels/chance_map"):
        assert evaluated["metrics"][f"eval/{name}"] > 0
    assert evaluated["counts"]["by_labels_labels"] == 4
