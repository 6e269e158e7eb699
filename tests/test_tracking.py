"""metrics.jsonl: no step twice after a resume, whatever was cut off."""

import json
from pathlib import Path

from pipeline.tracking import METRICS, FileTracker, curves, flatten, read_metrics


def steps(path: Path) -> list[int]:
    return [row["step"] for row in read_metrics(path / METRICS)]


def test_rows_are_flushed_one_by_one(tmp_path: Path) -> None:
    tracker = FileTracker(tmp_path)
    tracker.metrics({"loss/total": 2.5}, 1)
    line = (tmp_path / METRICS).read_text()
    assert line.endswith("\n")
    row = json.loads(line)
    assert (row["step"], row["loss/total"]) == (1, 2.5)
    assert row["time"] > 1e9


def test_rewind_drops_what_came_after(tmp_path: Path) -> None:
    tracker = FileTracker(tmp_path)
    for step in range(1, 8):
        tracker.metrics({"loss/total": float(step)}, step)
    tracker.close()
    resumed = FileTracker(tmp_path)
    resumed.rewind(4)
    resumed.metrics({"loss/total": 50.0}, 5)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    assert curves(tmp_path / METRICS)["loss/total"][-1] == (5, 50.0)


def test_no_step_twice_even_without_rewind(tmp_path: Path) -> None:
    tracker = FileTracker(tmp_path)
    for step in range(1, 6):
        tracker.metrics({"loss/total": 1.0}, step)
        tracker.metrics({"val/rsum": 9.0}, step)  # another metric at the same step is no repetition
    tracker.close()
    again = FileTracker(tmp_path)
    again.metrics({"loss/total": 2.0}, 3)
    found = curves(tmp_path / METRICS)
    assert found["loss/total"] == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert [step for step, _ in found["val/rsum"]] == [1, 2, 3, 4, 5]


def test_a_line_that_was_cut_off(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step": 1, "time": 1, "a": 1}\n{"step": 2, "ti')
    tracker = FileTracker(tmp_path)
    tracker.metrics({"a": 2.0}, 2)
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_not_finite_is_null(tmp_path: Path) -> None:
    tracker = FileTracker(tmp_path)
    tracker.metrics({"loss/total": float("inf"), "loss/ccl": float("nan")}, 1)
    assert "Infinity" not in (tmp_path / METRICS).read_text()
    assert next(read_metrics(tmp_path / METRICS))["loss/total"] is None


def test_params_are_flat_and_add_up(tmp_path: Path) -> None:
    tracker = FileTracker(tmp_path)
    tracker.params({"model": {"text": {"layers": 6}}})
    tracker.params({"parameters/vision": 12})
    assert json.loads((tmp_path / "params.json").read_text()) == {
        "model.text.layers": 6,
        "parameters/vision": 12,
    }
    assert flatten({"a": {}, "b": [1]}) == {"a": {}, "b": [1]}
