"""MLflow, kept up to date from the run directories, in a process of its own: this part of tracking may fail.

`python -m pipeline.mlflow_sync` reads one JSON line a stage from its input (a Target) and ships params,
metrics and states until the input ends. Training never waits for it; what could not be shipped is shipped by
the next process that looks. MLflow knows no '@' in a name: r@1 is r_at_1 there.
"""

import contextlib
import fcntl
import json
import os
import re
import select
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.durable import write_durably
from pipeline.logs import read_errors
from pipeline.run_directory import RunDirectory
from pipeline.tracking import METRICS, PARAMS, flatten, read_metrics

STATE = "mlflow.json"
EVERY_S = 5.0
RETRY_S = 30.0
METRICS_A_CALL, PARAMS_A_CALL, VALUE_LENGTH = 1000, 100, 6000  # MLflow's limits
TIMEOUTS = {  # a server that accepts and never answers costs this much, not MLflow's own ten minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}


def mlflow_name(name: str) -> str:
    """The name as MLflow takes it: letters, digits, `_-. /`; '@' is written '_at_'."""
    return re.sub(r"[^\w.\- /]", "_", name.replace("@", "_at_"))


@dataclass(frozen=True)
class Target:
    """One stage directory and where it is to be shown."""

    directory: Path  # the stage's
    uri: str
    experiment: str
    recipe_directory: Path  # <root>/<recipe>: one parent run each

    def as_line(self) -> str:
        values = {"directory": str(self.directory), "uri": self.uri, "experiment": self.experiment}
        return json.dumps({**values, "recipe_directory": str(self.recipe_directory)}) + "\n"

    @classmethod
    def from_line(cls, line: str) -> "Target":
        values = json.loads(line)
        return cls(
            Path(values["directory"]), values["uri"], values["experiment"], Path(values["recipe_directory"])
        )

    @property
    def state_path(self) -> Path:
        return self.directory / "log" / STATE

    def state(self) -> dict[str, Any]:
        """What was shipped to this URI; {} if nothing was."""
        try:
            state = json.loads(self.state_path.read_text())
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) and state.get("uri") == self.uri else {}

    def behind(self) -> bool:
        """Whether something in the directory has not been shipped yet."""
        if not (self.directory / "config.yaml").is_file():
            return False
        return self.state().get("shipped") != _stamp(self.directory)


def _stamp(directory: Path) -> list[Any]:
    """Changes whenever there is something to ship."""
    names = ("config.yaml", f"log/{METRICS}", f"log/{PARAMS}", "DONE.json", "log/rank0.error.json")
    stamps: list[Any] = []
    for name in names:
        try:
            status = (directory / name).stat()
            stamps.append([status.st_size, status.st_mtime_ns])
        except OSError:
            stamps.append(None)
    return stamps


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[bool]:
    """Whether this process alone works on it now."""
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@dataclass
class Shipper:
    """Ships stage directories to one MLflow. Any error of MLflow's goes to the caller."""

    uri: str
    _client: Any = None
    _last: dict[str, dict[str, int]] = field(default_factory=dict)  # run id → metric → last step there

    def ship(self, target: Target) -> None:
        """Bring MLflow up to the directory. Safe to call at any time and by several processes."""
        with _only_one(target.directory / "log" / "mlflow.lock") as alone:
            if alone:
                self._ship(target)

    def _ship(self, target: Target) -> None:
        stamp = _stamp(target.directory)  # before reading: what comes later is shipped the next time
        config = RunDirectory(target.directory).config()
        if config is None:
            return
        state = target.state() or {"uri": target.uri, "params": []}
        known = "run" in state
        if not known:
            state["run"] = self._stage_run(target, config)
            write_durably(target.state_path, json.dumps(state))
        run = str(state["run"])
        self._ship_params(run, config, target, state)
        rows = self._rows(target)
        self._ship_metrics(run, rows)
        self._ship_status(run, target, state)
        state["shipped"] = stamp
        write_durably(target.state_path, json.dumps(state))

    @property
    def client(self) -> Any:
        if self._client is None:
            for name, value in TIMEOUTS.items():
                os.environ.setdefault(name, value)
            from mlflow.tracking import MlflowClient  # takes seconds

            self._client = MlflowClient(tracking_uri=self.uri)
        return self._client

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self.client.create_experiment(name))
            except (
                MlflowException
            ):  # another process was quicker, or there is a real trouble, which shows here
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _find(self, experiment: str, tags: dict[str, str]) -> str | None:
        conditions = " and ".join(f"tags.`{key}` = '{_quoted(value)}'" for key, value in tags.items())
        found = self.client.search_runs([experiment], conditions, max_results=1)
        return str(found[0].info.run_id) if found else None

    def _stage_run(self, target: Target, config: dict[str, Any]) -> str:
        """The nested run of this directory: found by its tags, else made."""
        experiment = self._experiment(target.experiment)
        parent = self._parent(target, config, experiment)
        tags = {"tandem.directory": str(target.directory), "tandem.fingerprint": str(config["fingerprint"])}
        found = self._find(experiment, tags)
        if found:
            return found
        more = {
            "mlflow.parentRunId": parent,
            "mlflow.source.name": "tandem",
            "tandem.recipe": str(config["recipe"]),
            "tandem.stage": str(config["stage"]),
            "tandem.kind": str(config["kind"]),
        }
        name = f"{config['recipe']}/{config['stage']}/{target.directory.name[:6]}"
        return str(self.client.create_run(experiment, tags=tags | more, run_name=name).info.run_id)

    def _parent(self, target: Target, config: dict[str, Any], experiment: str) -> str:
        tags = {"tandem.parent": str(target.recipe_directory)}
        with (target.recipe_directory / ".mlflow.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two stages' processes must not make two parents
            found = self._find(experiment, tags)
            if found:
                return found
            more = {"tandem.recipe": str(config["recipe"]), "mlflow.source.name": "tandem"}
            run = self.client.create_run(experiment, tags=tags | more, run_name=str(config["recipe"]))
            self.client.set_terminated(run.info.run_id, "FINISHED")  # it only holds the others
            return str(run.info.run_id)

    def _ship_params(self, run: str, config: dict[str, Any], target: Target, state: dict[str, Any]) -> None:
        """Config fields and what the stage told, by the same names in every method. A param is set once."""
        from mlflow.entities import Param

        values = {"seed": config.get("seed"), **flatten(config.get("config") or {})}
        values |= {f"input.{role}": i["fingerprint"] for role, i in (config.get("inputs") or {}).items()}
        with contextlib.suppress(OSError, ValueError):
            values |= json.loads((target.directory / "log" / PARAMS).read_text(encoding="utf-8"))
        if not state["params"]:  # the state may have been lost: ask
            state["params"] = sorted(self.client.get_run(run).data.params)
        new = {mlflow_name(k): str(v)[:VALUE_LENGTH] for k, v in values.items()}
        params = [Param(name, value) for name, value in new.items() if name not in state["params"]]
        for start in range(0, len(params), PARAMS_A_CALL):
            self.client.log_batch(run, params=params[start : start + PARAMS_A_CALL])
        state["params"] = sorted({*state["params"], *new})

    def _rows(self, target: Target) -> list[dict[str, Any]]:
        """metrics.jsonl, and the report's counts and metrics as a last row."""
        rows = list(read_metrics(target.directory / "log" / METRICS))
        check = RunDirectory(target.directory).check()
        if check.done and check.content:
            logged = {name for row in rows for name in row}
            last = {f"count/{name}": value for name, value in check.content["counts"].items()}
            last |= {n: v for n, v in check.content["metrics"].items() if n not in logged and v is not None}
            step = max((row["step"] for row in rows), default=0)
            rows.append({"step": step, "time": (target.directory / "DONE.json").stat().st_mtime, **last})
        return rows

    def _ship_metrics(self, run: str, rows: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        last = self._last.pop(run, {})  # back only after success: after a failure the server is asked again
        names = {name for row in rows for name in row} - {"step", "time"}
        for name in sorted(names - last.keys()):  # first time in this process: what the server has counts
            history = self.client.get_metric_history(run, mlflow_name(name))
            last[name] = max((int(metric.step) for metric in history), default=-1)
        metrics, reached = [], dict(last)
        for row in rows:
            for name in row.keys() - {"step", "time"}:
                if row["step"] > last[name] and row[name] is not None:
                    stamp = int(float(row.get("time", 0.0)) * 1000)
                    metrics.append(Metric(mlflow_name(name), float(row[name]), stamp, row["step"]))
                    reached[name] = max(reached[name], row["step"])
        for start in range(0, len(metrics), METRICS_A_CALL):
            self.client.log_batch(run, metrics=metrics[start : start + METRICS_A_CALL])
        self._last[run] = reached

    def _ship_status(self, run: str, target: Target, state: dict[str, Any]) -> None:
        directory = RunDirectory(target.directory)
        if directory.check().done:
            status = "FINISHED"
        elif directory.holder():
            status = "RUNNING"
        else:
            status = "FAILED" if read_errors(target.directory) else "KILLED"
        if state.get("status") == status:
            return
        if status == "RUNNING":
            self.client.update_run(run, status=status)
        else:
            self.client.set_terminated(run, status)
        state["status"] = status


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'")


class _Loop:
    """The process: takes targets, ships each when it is behind, says once when MLflow fails."""

    def __init__(self) -> None:
        self.targets: dict[Path, Target] = {}
        self.shippers: dict[str, Shipper] = {}
        self.silent_until: dict[str, float] = {}
        self.warned: set[str] = set()

    def run(self) -> None:
        rest, more = b"", True
        while more:
            ready, _, _ = select.select([sys.stdin.fileno()], [], [], EVERY_S)
            if ready:
                block = os.read(sys.stdin.fileno(), 65536)
                more = bool(block)
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    target = Target.from_line(line.decode())
                    self.targets[target.directory] = target
            self.ship_all(last=not more)

    def ship_all(self, last: bool) -> None:
        for target in self.targets.values():
            if not target.behind() or (
                time.monotonic() < self.silent_until.get(target.uri, 0.0) and not last
            ):
                continue
            shipper = self.shippers.setdefault(target.uri, Shipper(target.uri))
            try:
                shipper.ship(target)
            except Exception as error:  # whatever MLflow raises: it must never stop a run
                self.silent_until[target.uri] = time.monotonic() + RETRY_S
                if target.uri not in self.warned:
                    self.warned.add(target.uri)
                    print(json.dumps({"warning": _warning(target.uri, error)}), flush=True)
                print(f"{target.directory}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                if last:
                    return  # the next one would wait for the same server


def _warning(uri: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return (
        f"MLflow at {uri} cannot be reached or written ({reason}); nothing is lost: metrics.jsonl has it, "
        "and the next `tandem run` or `tandem results` brings MLflow up to date"
    )


if __name__ == "__main__":
    os.nice(10)  # training goes first
    _Loop().run()
