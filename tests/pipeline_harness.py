"""For the pipeline's tests: recipes of tiny stages, and the `tandem` command as a real process."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent

TINY = """
name: tiny
seed: 7
launch: {processes: 2}
tracking: {uri: "off"}
stages:
  numbers: {kind: tests.tiny.numbers, count: 4}
  train: {kind: tests.tiny.train, inputs: {numbers: numbers}, epochs: 2}
  tune: {kind: tests.tiny.train, inputs: {numbers: numbers, weights: train}, epochs: 1}
"""


def write_recipe(directory: Path, text: str = TINY, name: str = "tiny.yaml") -> Path:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-P", "-m", "pipeline.cli", *map(str, arguments)]


def tandem(
    *arguments: str | Path, cwd: Path, code: int | None = 0, timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end; `code` is the exit code that it must have."""
    done = subprocess.run(
        command(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout_s
    )
    if code is not None:
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def tandem_json(*arguments: str | Path, cwd: Path, code: int = 0) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(tandem(*arguments, "--json", cwd=cwd, code=code).stdout)
    return result


def inline(*arguments: str | Path, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command in this process: quicker, for commands that only read."""
    from pipeline import cli

    out, err, ended = io.StringIO(), io.StringIO(), 0
    before = sys.argv, os.environ.get("COLUMNS")
    sys.argv, os.environ["COLUMNS"] = ["tandem", *map(str, arguments)], "160"
    try:
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as exit_:
        ended = int(exit_.code or 0)
    finally:
        sys.argv = before[0]
        if before[1] is None:
            del os.environ["COLUMNS"]
    assert ended == code, f"exit code {ended}\n{out.getvalue()}\n{err.getvalue()}"
    return subprocess.CompletedProcess(list(map(str, arguments)), ended, out.getvalue(), err.getvalue())


def inline_json(*arguments: str | Path, cwd: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(inline(*arguments, "--json", cwd=cwd).stdout)
    return result


def start(*arguments: str | Path, cwd: Path) -> "subprocess.Popen[str]":
    """Start the command and leave it running."""
    return subprocess.Popen(
        command(*arguments),
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(true: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
