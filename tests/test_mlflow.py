"""MLflow from the run directories: real SQLite, a server that is down, one that never answers."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import mlflow_follow
from pipeline.fingerprint import identities
from pipeline.mlflow_follow import Follower, tracking_uri
from pipeline.mlflow_sync import Shipper, Target, mlflow_name
from pipeline.recipe import Tracking, load
from pipeline.run_directory import RunDirectory
from pipeline.tracking import FileTracker
from stages.base import Report
from tests.pipeline_harness import TINY, tandem, write_recipe

pytestmark = pytest.mark.slow


def made(tmp_path: Path, stage: str = "train") -> tuple[RunDirectory, Any]:
    """A started stage directory with its identity."""
    recipe = load(write_recipe(tmp_path))
    identity = identities(recipe, tmp_path)[stage]
    directory = RunDirectory.of(tmp_path / "runs", recipe.name, identity)
    directory.prepare(identity, recipe.name)
    return directory, identity


def target_of(tmp_path: Path, directory: RunDirectory) -> Target:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    return Target(directory.path, uri, "tandem", tmp_path / "runs" / "tiny")


@pytest.fixture(scope="module")
def client_of() -> Any:
    from mlflow.tracking import MlflowClient

    return lambda uri: MlflowClient(tracking_uri=uri)


def history(client: Any, run: str, name: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client.get_metric_history(run, name))


def test_one_run_a_stage_under_one_parent_and_no_step_twice(tmp_path: Path, client_of: Any) -> None:
    directory, identity = made(tmp_path)
    target = target_of(tmp_path, directory)
    tracker = FileTracker(directory.path / "log")
    tracker.params({"parameters/vision": 12})
    for step in (1, 2, 3):
        tracker.metrics({"loss/total": 1 / step, "val/i2t_r@1": 10.0 * step}, step)
    assert target.behind()
    Shipper(target.uri).ship(target)
    assert not target.behind()
    run = target.state()["run"]

    # A resumed stage goes back to step 2, tells its params again with another value, and goes on; the shipper
    # is a new process that has lost its state.
    tracker.rewind(2)
    tracker.params({"parameters/vision": 13})
    for step in (3, 4):
        tracker.metrics({"loss/total": 1 / step, "val/i2t_r@1": 10.0 * step}, step)
    target.state_path.unlink()
    Shipper(target.uri).ship(target)
    assert target.state()["run"] == run

    (directory.path / "out" / "model.txt").write_text("x")
    directory.commit(identity, Report({"steps": 4}, {"eval/tiny/i2t_r@1": 50.0}), 1.0)
    assert target.behind()
    shipper = Shipper(target.uri)
    shipper.ship(target)
    shipper.ship(target)  # nothing new

    client = client_of(target.uri)
    assert history(client, run, "loss/total") == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    assert history(client, run, "val/i2t_r_at_1") == [(1, 10.0), (2, 20.0), (3, 30.0), (4, 40.0)]
    assert history(client, run, "eval/tiny/i2t_r_at_1") == [(4, 50.0)]
    shown = client.get_run(run)
    assert shown.info.status == "FINISHED"
    assert shown.data.params["epochs"] == "2"
    assert shown.data.params["schedule.name"] == "step"
    assert shown.data.params["parameters/vision"] == "12"  # MLflow's params are set once
    parent = client.get_run(shown.data.tags["mlflow.parentRunId"])
    assert parent.data.tags["tandem.parent"] == str(tmp_path / "runs" / "tiny")

    other, _ = made(tmp_path, "tune")
    second = target_of(tmp_path, other)
    Shipper(second.uri).ship(second)
    tags = client.get_run(second.state()["run"]).data.tags
    assert tags["mlflow.parentRunId"] == parent.info.run_id
    assert second.state()["run"] != run


def test_names_that_mlflow_does_not_take() -> None:
    assert mlflow_name("eval/unseen_vendor/i2t_r@1") == "eval/unseen_vendor/i2t_r_at_1"
    assert mlflow_name("losses.[red]") == "losses._red_"


def test_uri() -> None:
    root = Path("/somewhere")
    assert tracking_uri(Tracking(), root) == "sqlite:////somewhere/mlflow.db"
    assert tracking_uri(Tracking(uri="off"), root) is None
    assert tracking_uri(Tracking(uri="http://127.0.0.1:5"), root) == "http://127.0.0.1:5"
    assert tracking_uri(Tracking(uri="http://127.0.0.1:5"), root, "off") is None


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Accepts connections, reads, and never answers."""
    server = socket.create_server(("127.0.0.1", 0))
    kept: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                kept.append(server.accept()[0])
            except OSError:
                return

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    server.close()
    for connection in kept:
        connection.close()


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["closed", "silent"])
def test_a_server_that_is_not_there_warns_once_and_stops_nothing(
    tmp_path: Path, kind: str, silent_server: str, client_of: Any
) -> None:
    uri = closed_port() if kind == "closed" else silent_server
    write_recipe(tmp_path, TINY.replace('uri: "off"', f"uri: '{uri}'"))
    began = time.monotonic()
    done = tandem("run", "tiny.yaml", cwd=tmp_path)
    assert time.monotonic() - began < 75
    assert done.stdout.count(f"MLflow at {uri}") == 1
    assert "nothing is lost" in done.stdout
    assert "[3/3] tune     done" in done.stdout
    # back again: what was missed is caught up
    database = f"sqlite:///{tmp_path}/later.db"
    write_recipe(tmp_path, TINY.replace('uri: "off"', f"uri: '{database}'"))
    tandem("results", "tiny.yaml", cwd=tmp_path)
    client = client_of(database)
    experiment = client.get_experiment_by_name("tandem")
    runs = client.search_runs([experiment.experiment_id])
    stages = {run.data.tags.get("tandem.stage"): run for run in runs}
    assert set(stages) == {None, "numbers", "train", "tune"}
    assert len(history(client, stages["train"].info.run_id, "loss/total")) == 8
    assert stages["numbers"].data.metrics["numbers/sum"] == 10.0


def test_the_end_waits_for_a_slow_server_only_so_long(
    tmp_path: Path, silent_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = made(tmp_path)
    monkeypatch.setattr(mlflow_follow, "FINISH_S", 1.0)
    said: list[str] = []
    follower = Follower(silent_server, "tandem", tmp_path / "runs" / "tiny", said.append)
    follower.follow(directory.path)
    began = time.monotonic()
    follower.finish()
    assert time.monotonic() - began < 10
    assert "is slow" in said[-1]


def test_a_run_with_nothing_to_ship_starts_no_process(tmp_path: Path) -> None:
    directory, _ = made(tmp_path)
    follower = Follower(f"sqlite:///{tmp_path}/m.db", "tandem", tmp_path / "runs" / "tiny", print)
    target = Target(directory.path, f"sqlite:///{tmp_path}/m.db", "tandem", tmp_path / "runs" / "tiny")
    Shipper(target.uri).ship(target)
    assert json.loads(target.state_path.read_text())["shipped"]
    assert not follower.follow_behind([directory.path])
    follower.finish()
