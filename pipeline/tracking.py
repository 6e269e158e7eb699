"""Tracking, the part that never fails: `log/metrics.jsonl` and `log/params.json`. MLflow reads them later."""

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from pipeline.run_directory import finite

METRICS, PARAMS = "metrics.jsonl", "params.json"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"text": {"layers": 6}}} → {"model.text.layers": 6}; lists stay as they are."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The rows {"step", "time", name: value, …}; a line cut off when a process was killed is left out."""
    try:
        stream = path.open(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    with stream:
        for line in stream:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row


def curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Metric name → [(step, value)], for plots."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in read_metrics(path):
        for name, value in row.items():
            if name not in ("step", "time") and isinstance(value, int | float):
                found.setdefault(name, []).append((row["step"], float(value)))
    return found


class FileTracker:
    """Rank 0's tracker. No metric has a step twice, whatever a resumed stage logs again."""

    def __init__(self, log: Path):
        self._path, self._params_path = log / METRICS, log / PARAMS
        self._lock = threading.Lock()
        self._stream: TextIO | None = None
        self._last: dict[str, int] = {}
        rows = list(read_metrics(self._path))
        if rows:
            self._write_all(rows)  # drops a line that was cut off

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Append one row. A step logged before (by a run that was killed) is replaced from there on."""
        with self._lock:
            again = {name for name in values if self._last.get(name, -1) >= step}
            if again:
                self._forget(again, step)
            row = {"step": int(step), "time": round(time.time(), 3)}
            row |= {name: finite(float(value)) for name, value in values.items()}
            if self._stream is None:
                self._stream = self._path.open("a", encoding="utf-8")
            self._stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._stream.flush()
            self._last |= dict.fromkeys(values, int(step))

    def params(self, values: Mapping[str, Any]) -> None:
        """Add to params.json, flattened."""
        with self._lock:
            try:
                known = json.loads(self._params_path.read_text(encoding="utf-8"))
            except (FileNotFoundError, ValueError):
                known = {}
            _replace(self._params_path, json.dumps({**known, **flatten(values)}, indent=1, default=str))

    def rewind(self, step: int) -> None:
        """Drop all rows after `step`: a resumed stage goes on from there."""
        with self._lock:
            rows = list(read_metrics(self._path))
            kept = [row for row in rows if row["step"] <= step]
            if len(kept) < len(rows):
                self._write_all(kept)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _forget(self, names: set[str], step: int) -> None:
        """Take the names out of all rows from `step` on."""
        kept = []
        for row in read_metrics(self._path):
            if row["step"] >= step:
                row = {key: value for key, value in row.items() if key not in names}
            if row.keys() - {"step", "time"}:
                kept.append(row)
        self._write_all(kept)

    def _write_all(self, rows: list[dict[str, Any]]) -> None:
        self.close()
        _replace(self._path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self._last = {}
        for row in rows:
            for name in row.keys() - {"step", "time"}:
                self._last[name] = max(row["step"], self._last.get(name, -1))


class QuietTracker:
    """The other ranks' tracker."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Nothing: rank 0 tells."""

    def params(self, values: Mapping[str, Any]) -> None:
        """Nothing: rank 0 tells."""

    def rewind(self, step: int) -> None:
        """Nothing: rank 0 tells."""


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
