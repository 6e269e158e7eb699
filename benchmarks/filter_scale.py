"""The filter stage on logs of more and more rows: time, peak memory, and pandas beside it on what it can
hold.

`python -m benchmarks.filter_scale --folder DIR [--rows 1000000 3000000 …] [--pandas 1000000 …]` makes a log
(benchmarks.made_log; 100 million rows are 2.7 GB, and the stage needs four times as much for what it spills
and writes), filters its first 1, 3, 10, 30 and 100 million rows, each in a process of its own with two
threads and within --memory-limit, fits a straight line to the times, and runs a pandas program of the same
rules. The pandas program must give the same rows; the last column is its time over the filter's in the same
run.
"""

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.made_log import ROWS_PER_PART, write_log
from data_tools.log.rules import CJK, PUNCTUATION, REASONS, SPACE, FilterRules

RULES = FilterRules()


def peak_bytes() -> int:
    """The most memory that this process has held (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def by_stage(log: list[Path], place: Path, memory_limit: str) -> dict[str, Any]:
    """Seconds, peak memory and spilled bytes of the filter stage."""
    from stages.filter import Config, run
    from tests.data_helpers import make_job

    linked = place / "log"
    linked.mkdir(parents=True)
    for part in log:
        (linked / part.name).symlink_to(part)
    job = make_job(place / "filter")
    ended = threading.Event()
    spilled = [0]
    watcher = threading.Thread(target=_watch, args=(job.directory / "spill", spilled, ended))
    watcher.start()
    began = time.perf_counter()
    counts = run(Config(click_log=linked, memory_limit=memory_limit), job).counts
    seconds = time.perf_counter() - began
    ended.set()
    watcher.join()
    return {"seconds": seconds, "peak": peak_bytes(), "spilled": spilled[0], "counts": counts}


def _watch(folder: Path, most: list[int], ended: threading.Event) -> None:
    while not ended.wait(0.5):
        sizes = [_size(path) for path in folder.rglob("*")]
        most[0] = max(most[0], sum(sizes))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0  # deleted meanwhile


def by_pandas(log: list[Path], place: Path, memory_limit: str) -> dict[str, Any]:
    """The same rules as a plain pandas program: vectorised, in one process, all rows in memory."""
    import pandas as pd

    place.mkdir(parents=True)
    began = time.perf_counter()
    frame = pd.concat([pd.read_parquet(part) for part in log], ignore_index=True)
    rules = RULES
    best = ["query", "url", "show", "click", "title", "content", "width", "height"]
    frame = frame.sort_values(best, ascending=[True, True, False, False, True, True, True, True])
    word = f"[{CJK}]|[^{CJK}{SPACE}{PUNCTUATION}]+"
    words = {name: frame[name].str.count(word) for name in ("query", "title", "content")}
    short, long = frame[["width", "height"]].min(axis=1), frame[["width", "height"]].max(axis=1)
    ctr = (frame["click"] / frame["show"]).where(frame["show"] > 0)
    broken = {
        "repeated_pair": frame.duplicated(["query", "url"]),
        "bad_url": ~frame["url"].str.match("(?i)https?://[^/?#]"),
        "too_small": short < rules.min_side_px,
        "bad_aspect": long > rules.max_aspect * short,
        "query_too_short": words["query"] < rules.min_words,
        "query_too_long": words["query"] > rules.max_words,
        "title_too_short": words["title"] < rules.min_words,
        "title_too_long": words["title"] > rules.max_words,
        "content_too_long": words["content"] > rules.max_words,
        "few_shows": frame["show"] < rules.min_show,
        "low_ctr": ctr < rules.min_ctr,
    }
    assert list(broken) == [name for name in REASONS if name in broken]
    frame["ctr"] = ctr
    frame["reason"] = np.select(list(broken.values()), list(broken), default=None)
    left = frame[frame["reason"].isna()].sort_values(
        ["query", "ctr", "show"], ascending=[True, False, False], kind="stable"
    )
    place_of = left.groupby("query", sort=False).cumcount()
    frame.loc[place_of.index[place_of >= rules.best_per_query], "reason"] = "not_among_best"
    kept = frame["reason"].isna()
    frame[kept].drop(columns="reason").to_parquet(place / "pairs.parquet", compression="zstd")
    frame[~kept].to_parquet(place / "dropped.parquet", compression="zstd")
    return {"seconds": time.perf_counter() - began, "peak": peak_bytes(), "kept": int(kept.sum())}


PROGRAMS: dict[str, Callable[[list[Path], Path, str], dict[str, Any]]] = {
    "stage": by_stage,
    "pandas": by_pandas,
}


def in_a_process(program: str, folder: Path, rows: int, memory_limit: str) -> dict[str, Any]:
    place = folder / f"{program}-{rows}"
    shutil.rmtree(place, ignore_errors=True)
    arguments = [
        "--folder",
        str(folder),
        "--rows",
        str(rows),
        "--memory-limit",
        memory_limit,
        "--only",
        program,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.filter_scale", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{program} of {rows:,} rows: exit code {done.returncode}\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def difference(folder: Path, rows: int) -> int:
    """Rows of pairs and dropped rows that only one of the two programs has."""
    import duckdb

    connection = duckdb.connect()
    found = 0
    for name in ("pairs", "dropped"):
        files = [folder / f"stage-{rows}" / "filter" / "out", folder / f"pandas-{rows}"]
        reason = ", reason" if name == "dropped" else ""
        one, other = (
            f"(SELECT query, url, title, content, \"show\", click{reason} FROM '{path / name}.parquet')"
            for path in files
        )
        for a, b in ((one, other), (other, one)):
            counted = connection.execute(f"SELECT count(*) FROM ({a} EXCEPT ALL {b})").fetchone()
            found += counted[0] if counted else 0
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.filter_scale", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for the log and what is made of it")
    parser.add_argument("--rows", type=int, nargs="+", default=[10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8])
    parser.add_argument("--pandas", type=int, nargs="*", default=[], help="of --rows, those for pandas too")
    parser.add_argument("--memory-limit", default="2500MB", help="of DuckDB; the process holds some more")
    parser.add_argument("--only", choices=PROGRAMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    if options.only:
        parts = sorted((folder / "log").glob("part-*.parquet"))[: options.rows[0] // ROWS_PER_PART]
        place = folder / f"{options.only}-{options.rows[0]}"
        print(json.dumps(PROGRAMS[options.only](parts, place, options.memory_limit)))
        return
    if any(rows % ROWS_PER_PART for rows in options.rows):
        parser.error(f"--rows: multiples of {ROWS_PER_PART:,}")
    write_log(folder / "log", max(options.rows))
    report(folder, options.rows, options.pandas, options.memory_limit)


def report(folder: Path, sizes: list[int], with_pandas: list[int], memory_limit: str) -> None:
    """Run and print a line a size, then the fit."""
    print(f"{'rows':>11} {'seconds':>8} {'rows/s':>8} {'peak MB':>8} {'spill MB':>8} {'kept':>10} pandas")
    seconds = []
    for rows in sizes:
        stage = in_a_process("stage", folder, rows, memory_limit)
        seconds.append(stage["seconds"])
        beside = ""
        if rows in with_pandas:
            pandas = in_a_process("pandas", folder, rows, memory_limit)
            beside = (
                f"{pandas['seconds'] / stage['seconds']:.1f} times the time, {pandas['peak'] / 1e6:,.0f} MB, "
            )
            beside += f"{difference(folder, rows)} rows differ"
            shutil.rmtree(folder / f"pandas-{rows}")
        shutil.rmtree(folder / f"stage-{rows}")
        print(
            f"{rows:>11,} {stage['seconds']:>8.1f} {rows / stage['seconds']:>8,.0f} "
            f"{stage['peak'] / 1e6:>8,.0f} "
            f"{stage['spilled'] / 1e6:>8,.0f} {stage['counts']['kept']:>10,} {beside}",
            flush=True,
        )
    if len(sizes) > 2:
        slope, start = np.polyfit(sizes, seconds, 1)
        left = np.array(seconds) - (slope * np.array(sizes) + start)
        r_squared = 1 - (left**2).sum() / ((np.array(seconds) - np.mean(seconds)) ** 2).sum()
        print(f"seconds = {start:.1f} + {slope * 1e6:.2f} a million rows, R² {r_squared:.4f}")


if __name__ == "__main__":
    main()
