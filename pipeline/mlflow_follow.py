"""The runner's handle on the process that keeps MLflow up to date."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from pipeline.mlflow_sync import TIMEOUTS, Target
from pipeline.recipe import Tracking
from pipeline.results import RunView

FINISH_S = 30.0  # how long the end of a run waits for MLflow


def tracking_uri(tracking: Tracking, root: Path, given: str | None = None) -> str | None:
    """The URI to use: the command line's, the recipe's, else SQLite under the root. None: no MLflow."""
    uri = given or tracking.uri
    if uri == "off":
        return None
    return uri or f"sqlite:///{root.resolve()}/mlflow.db"


class Follower:
    """Starts the process at the first target, so that a run that does nothing starts nothing."""

    def __init__(self, uri: str | None, experiment: str, recipe_directory: Path, say: Callable[[str], None]):
        self.uri, self.experiment, self.recipe_directory = uri, experiment, recipe_directory
        self._say = say
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._log: IO[str] | None = None

    def follow(self, directory: Path) -> None:
        """Ship this stage directory, now and until the end."""
        if self.uri is None:
            return
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it died: its log says why, metrics.jsonl has everything
            self._process.stdin.write(self._target(directory).as_line())
            self._process.stdin.flush()

    def follow_behind(self, directories: Sequence[Path]) -> bool:
        """Ship those that earlier runs left behind; whether there are any."""
        behind = [d for d in directories if self.uri is not None and self._target(d).behind()]
        for directory in behind:
            self.follow(directory)
        return bool(behind)

    def finish(self) -> None:
        """Ship what is left. Bounded: a server that hangs costs FINISH_S, and is caught up later."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(FINISH_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._say(
                f"MLflow at {self.uri} is slow; the next `tandem run` or `tandem results` goes on with it"
            )
        if self._reader:
            self._reader.join(5.0)
        if self._log:
            self._log.close()
        self._process = None

    def _target(self, directory: Path) -> Target:
        assert self.uri is not None
        return Target(directory, self.uri, self.experiment, self.recipe_directory)

    def _start(self) -> None:
        self.recipe_directory.mkdir(parents=True, exist_ok=True)
        self._log = (self.recipe_directory / "mlflow.log").open("a", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipeline.mlflow_sync"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
            env={**TIMEOUTS, **os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()

    def _read(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                self._say(json.loads(line)["warning"])


def catch_up(run: RunView, tracking: Tracking, say: Callable[[str], None]) -> None:
    """Bring MLflow up to the recipe's directories, if it is behind."""
    follower = Follower(tracking_uri(tracking, run.root), tracking.experiment, run.root / run.name, say)
    follower.follow_behind([stage.directory for stage in run.stages])
    follower.finish()
