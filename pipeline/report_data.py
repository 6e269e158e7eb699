"""What the report shows of data and training stages: plain values, read from files, no markup."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.charts import Chart, line_chart
from pipeline.results import RunView, StageRun
from stages.base import StageError

TRAINING_KINDS = ("pretrain", "finetune")


@dataclass(frozen=True)
class Bar:
    """One bar of a bar list: a name, a number, its share of the whole (0 … 1) and a remark."""

    name: str
    count: int
    share: float
    remark: str = ""


@dataclass(frozen=True)
class Quality:
    """Distinct (query, url) pairs against the truth, in percent."""

    precision_before: float
    precision_after: float
    recall_after: float
    right: int  # pairs that are right, before the filter
    right_kept: int
    pairs: int  # before the filter
    kept: int
    unknown: int  # pairs that the truth does not name: left out of all of the above


@dataclass(frozen=True)
class FilterSection:
    stage: StageRun
    rows: int = 0
    kept: int = 0
    bars: list[Bar] = field(default_factory=list)
    quality: Quality | None = None


@dataclass(frozen=True)
class BarSection:
    """The crawl's statuses, or the corpus's splits."""

    stage: StageRun
    bars: list[Bar] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class TrainingSection:
    stage: StageRun
    charts: list[Chart] = field(default_factory=list)
    steps: int = 0


def filter_section(view: RunView, stage: StageRun) -> FilterSection:
    """The funnel by reasons and, where the recipe names a truth file, precision and recall against it."""
    if stage.done is None:
        return FilterSection(stage)
    counts = stage.done["counts"]
    rows, kept = int(counts.get("rows", 0)), int(counts.get("kept", 0))
    dropped = {k.removeprefix("dropped_"): int(v) for k, v in counts.items() if k.startswith("dropped_")}
    quality: Quality | None = None
    right_lost: dict[str, int] = {}
    if view.truth is not None:
        quality, right_lost = against_truth(stage.directory / "out", view.truth)
    bars = [
        Bar(
            reason.replace("_", " "),
            count,
            count / rows if rows else 0.0,
            f"{right_lost[reason]:,} right pairs lost" if right_lost.get(reason) else "",
        )
        for reason, count in sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
        if count
    ]
    return FilterSection(stage, rows, kept, bars, quality)


def against_truth(out: Path, truth: Path) -> tuple[Quality, dict[str, int]]:
    """Precision and recall of the kept pairs, and how many right rows each reason dropped.

    truth: a parquet file of query, url, right. Raises StageError when it cannot be read.
    """
    try:
        table = pq.read_table(truth, columns=["query", "url", "right"])
        known = {
            (query, url): bool(right)
            for query, url, right in zip(*(table[c].to_pylist() for c in table.column_names), strict=True)
        }
    except (OSError, ValueError, KeyError) as error:
        raise StageError(f"{truth}: truth: not a parquet file of query, url, right: {error}") from error
    pairs = pq.read_table(out / "pairs.parquet", columns=["query", "url"])
    dropped = pq.read_table(out / "dropped.parquet", columns=["query", "url", "reason"])
    kept = set(zip(pairs["query"].to_pylist(), pairs["url"].to_pylist(), strict=True))
    before = kept | set(zip(dropped["query"].to_pylist(), dropped["url"].to_pylist(), strict=True))
    lost = {
        (reason, query, url)
        for query, url, reason in zip(*(dropped[c].to_pylist() for c in dropped.column_names), strict=True)
        if (query, url) not in kept  # a repeated row of a kept pair loses nothing
    }
    right_lost = Counter(reason for reason, query, url in lost if known.get((query, url)))
    unknown = {pair for pair in before if pair not in known}
    before, kept = before - unknown, kept - unknown
    right, right_kept = sum(known[pair] for pair in before), sum(known[pair] for pair in kept)
    quality = Quality(
        precision_before=_percent(right, len(before)),
        precision_after=_percent(right_kept, len(kept)),
        recall_after=_percent(right_kept, right),
        right=right,
        right_kept=right_kept,
        pairs=len(before),
        kept=len(kept),
        unknown=len(unknown),
    )
    return quality, dict(right_lost)


def crawl_section(stage: StageRun) -> BarSection:
    """How many pictures came, and why the others did not."""
    if stage.done is None:
        return BarSection(stage)
    statuses = pq.read_table(stage.directory / "out" / "pictures.parquet", columns=["status"])["status"]
    counted = [(entry["values"], entry["counts"]) for entry in pc.value_counts(statuses).to_pylist()]
    counted.sort(key=lambda item: (item[0] != "ok", -item[1], str(item[0])))
    total = max(1, len(statuses))
    bars = [Bar(str(name).replace("_", " "), count, count / total) for name, count in counted]
    return BarSection(stage, bars, [("pictures asked for", f"{len(statuses):,}")])


def corpus_section(stage: StageRun) -> BarSection:
    """The samples of each split, and whose pictures they are."""
    if stage.done is None:
        return BarSection(stage)
    path = stage.directory / "out" / "manifest.json"
    manifest = read_json(path)
    missing = [name for name in ("splits", "shards", "licences") if name not in manifest]
    if missing:
        raise StageError(f"{path}: {missing[0]}: missing; run the shard stage again")
    splits = manifest["splits"]
    total = max(1, sum(splits.values()))
    size = sum(int(shard["bytes"]) for shard in manifest["shards"])
    facts = [
        ("samples", f"{sum(splits.values()):,}"),
        ("shards", f"{len(manifest['shards']):,}"),
        ("size", f"{size / 2**20:,.1f} MiB"),
        ("licences of the pictures", ", ".join(f"{n} ({c:,})" for n, c in manifest["licences"].items())),
    ]
    return BarSection(stage, [Bar(name, count, count / total) for name, count in splits.items()], facts)


def training_section(stage: StageRun) -> TrainingSection:
    """The curves of log/metrics.jsonl; also of a stage that is under way."""
    rows = read_metrics(stage.directory / "log" / "metrics.jsonl")
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "time") and isinstance(value, int | float):
                series.setdefault(name, []).append((float(row["step"]), float(value)))
    charts = []
    for title, wanted, from_zero in (
        ("Losses", r"loss/(.+)", True),
        ("Learning rate", r"train/(lr.*)", True),
        ("Temperature", r"train/(temperature.*)", False),
        ("Validation: recalls in %", r"val/((?:i2t|t2i)_r@\d+)", True),
        ("Validation: Rsum", r"val/((?:cosine_)?rsum)", True),
        ("Validation: AUC in %", r"val/(auc)", True),
        ("Validation: NDCG and MAP in %", r"val/((?:(?:i2t|t2i)_)?(?:ndcg|map)(?:@\d+)?)", True),
    ):
        found = {match[1]: points for name, points in series.items() if (match := re.fullmatch(wanted, name))}
        if found:
            charts.append(line_chart(title, found, from_zero=from_zero))
    return TrainingSection(stage, charts, int(rows[-1]["step"]) if rows else 0)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; none where there is no file. A last line still being written waits."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            float(row["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise StageError(f"{path}: line {number} is no JSON object with a step: {error}") from error
        rows.append(row)
    return rows


def read_json(path: Path) -> dict[str, Any]:
    """An object in a file. Raises StageError that names it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StageError(f"{path}: cannot be read: {error}; run its stage again") from error
    if not isinstance(value, dict):
        raise StageError(f"{path}: is no JSON object; run its stage again")
    return value


def _percent(part: int, whole: int) -> float:
    return 100.0 * part / whole if whole else 0.0
