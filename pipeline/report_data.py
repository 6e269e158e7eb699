"""What the report shows, gathered from the stages' results: plain values, read from files, no markup."""

import base64
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
from pipeline.run_directory import RunDirectory
from stages.base import StageError

TRAINING_KINDS = ("pretrain", "finetune")
RECALLS = tuple(f"{way}_r@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10))
_PICTURE = re.compile(r"^pictures/[0-9a-f]{1,64}\.webp$")


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


@dataclass(frozen=True)
class AttentionSection:
    """Where a model looked: entries of attention.json with `picture_uri` and `map_uri`."""

    stage: StageRun
    gallery: str
    maps: list[dict[str, Any]]


@dataclass(frozen=True)
class ClsAttentionRow:
    """How tokens of one side attend to the other's [CLS]."""

    gallery: str
    way: str
    mean: float
    std: float
    bars: list[Bar]  # up to the last part of 0 … 1 that has a score


@dataclass(frozen=True)
class ClsAttentionSection:
    stage: StageRun
    rows: list[ClsAttentionRow]


@dataclass(frozen=True)
class RecallRow:
    """A gallery's line of the recall table: (value, chance) a recall, in percent; None if missing."""

    gallery: str
    remark: str  # how large it is; what stands between the cosines and these recalls
    recalls: list[tuple[float | None, float | None]]
    rsum: float | None
    chance_rsum: float | None
    mean: float | None
    chance_mean: float | None


@dataclass(frozen=True)
class MatchingRow:
    """A matching gallery's line: the AUC in percent, and how many pairs match and do not."""

    gallery: str
    auc: float
    positives: int | None
    negatives: int | None


@dataclass(frozen=True)
class LabelRow:
    """A label-wise gallery's line: (value, chance) of NDCG and of MAP, each i2t, t2i and their mean."""

    gallery: str
    remark: str  # how many labels are counted, what was left out, what counts
    ndcg: list[tuple[float | None, float | None]]
    map: list[tuple[float | None, float | None]]


@dataclass(frozen=True)
class EvaluationSection:
    stage: StageRun
    rows: list[RecallRow] = field(default_factory=list)
    matching: list[MatchingRow] = field(default_factory=list)
    labels: list[LabelRow] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)
    unchecked: str | None = None  # why the training corpora were not checked against the galleries


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
    manifest = _json(path)
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


def evaluation_section(stage: StageRun) -> EvaluationSection:
    """The recall table and the examples, their pictures as data URIs."""
    if stage.done is None:
        return EvaluationSection(stage)
    metrics, counts = stage.done["metrics"], stage.done["counts"]
    galleries = list(dict.fromkeys(name.split("/")[1] for name in metrics if name.startswith("eval/")))

    rows: list[RecallRow] = []
    matching: list[MatchingRow] = []
    labels: list[LabelRow] = []
    out = stage.directory / "out"
    examples = _json(out / "examples.json")
    for gallery in galleries:
        before = f"eval/{gallery}/"
        own = {name.removeprefix(before): metrics[name] for name in metrics if name.startswith(before)}
        if "auc" in own:
            sizes = (counts.get(f"{gallery}_{side}") for side in ("positives", "negatives"))
            matching.append(MatchingRow(gallery, own["auc"], *sizes))
        else:
            rows += _recall_rows(gallery, own, counts)
            labels += _label_rows(gallery, own, counts, examples.get(gallery, {}))
    config = RunDirectory(stage.directory).config() or {}
    unchecked = (config.get("config") or {}).get("unchecked")
    shown_ones = [_with_pictures(out, name, shown) for name, shown in examples.items()]
    return EvaluationSection(stage, rows, matching, labels, shown_ones, unchecked)


def _recall_rows(gallery: str, own: dict[str, float], counts: dict[str, int]) -> list[RecallRow]:
    """A gallery's line; re-ranked, a second one of what the cosines alone gave."""

    def row(name: str, remark: str, stage: str) -> RecallRow:
        return RecallRow(
            name,
            remark,
            [(own.get(f"{stage}{recall}"), own.get(f"chance_{recall}")) for recall in RECALLS],
            own.get(f"{stage}rsum"),
            own.get("chance_rsum"),
            own.get(f"{stage}r@m"),
            own.get("chance_r@m"),
        )

    images, texts = (counts.get(f"{gallery}_{side}") for side in ("images", "texts"))
    remark = "" if images is None or texts is None else f"{images:,} images, {texts:,} texts"
    if f"{gallery}_labels" in counts:
        remark += "; right: one shared label"
    ceilings = [(way, own[f"ceiling_{way}"]) for way in ("i2t", "t2i") if f"ceiling_{way}" in own]
    if not ceilings:
        return [row(gallery, remark, "")]
    among = ", ".join(f"{value:.1f} % ({way})" for way, value in ceilings)
    return [
        row(gallery, f"{remark}; re-ranked: a right one is a candidate for {among}", ""),
        row(f"{gallery}, by cosine", "before re-ranking", "cosine_"),
    ]


def _label_rows(
    gallery: str, own: dict[str, float], counts: dict[str, int], shown: dict[str, Any]
) -> list[LabelRow]:
    """The line of a gallery that was asked for label by label; none of another."""
    if shown.get("task") != "labels":
        return []
    cut = shown.get("cut")
    after = "" if cut is None else f"@{cut}"

    def of(metric: str) -> list[tuple[float | None, float | None]]:
        names = [f"{way}{metric}{after}" for way in ("i2t_", "t2i_", "")]
        return [(own.get(name), own.get(f"chance_{name}")) for name in names]

    told = [f"{counts.get(f'{gallery}_labels', 0):,} labels ({', '.join(shown['fields'])})"]
    told += [f"gain {shown['gain']}"] if shown["gain"] != "linear" else []
    told += [f"the first {cut:,}"] if cut is not None else []
    left_out = [(way, counts.get(f"{gallery}_{way}_left_out", 0)) for way in ("i2t", "t2i")]
    told += [f"{count:,} queries ({way}) have no right answer" for way, count in left_out if count]
    return [LabelRow(gallery, "; ".join(told), of("ndcg"), of("map"))]


def _with_pictures(out: Path, name: str, shown: dict[str, Any]) -> dict[str, Any]:
    """A gallery's examples with `uri` beside each `picture`: the file's content as a data URI.

    A direction that was not asked has no examples; only a matching gallery has `pairs`.
    """

    def entry(value: dict[str, Any]) -> dict[str, Any]:
        return {**value, "uri": _data_uri(out, value["picture"]) if "picture" in value else None}

    return {
        "name": name,
        **{key: value for key, value in shown.items() if key not in ("t2i", "i2t", "pairs")},
        "pairs": [entry(pair) for pair in shown.get("pairs", [])],
        **{
            way: [
                {
                    **asked,
                    "query": entry(asked["query"]),
                    "best_right": entry(asked["best_right"]),
                    "answers": [entry(a) for a in asked["answers"]],
                }
                for asked in shown.get(way, [])
            ]
            for way in ("t2i", "i2t")
        },
    }


def attention_section(stage: StageRun) -> AttentionSection | None:
    """The attention maps, their pictures as data URIs; None where the stage is not done or drew none."""
    out = stage.directory / "out"
    path = out / "attention.json"
    if stage.done is None or not path.exists():
        return None
    shown = _json(path)
    maps = [
        {**drawn, **{f"{role}_uri": _data_uri(out, drawn[role], path.name) for role in ("picture", "map")}}
        for drawn in shown["maps"]
    ]
    return AttentionSection(stage, shown["gallery"], maps)


def cls_attention_section(stage: StageRun) -> ClsAttentionSection | None:
    """The scores of cls_attention.json; None where the stage is not done or measured none."""
    path = stage.directory / "out" / "cls_attention.json"
    if stage.done is None or not path.exists():
        return None
    rows = []
    for gallery, ways in _json(path).items():
        for way, found in ways.items():
            counts, total = found["counts"], max(1, sum(found["counts"]))
            edges = [number / len(counts) for number in range(len(counts) + 1)]
            bars = [
                Bar(f"{low:.2f} – {high:.2f}", count, count / total)
                for low, high, count in zip(edges, edges[1:], counts, strict=False)
            ]
            while len(bars) > 1 and not bars[-1].count:
                bars.pop()
            name = way.replace("_to_", " → ") + " [CLS]"
            rows.append(ClsAttentionRow(gallery, name, found["mean"], found["std"], bars))
    return ClsAttentionSection(stage, rows)


def _data_uri(out: Path, relative: str, listed: str = "examples.json") -> str:
    if not _PICTURE.match(relative):
        raise StageError(f"{out / listed}: picture: '{relative}' is not pictures/<hash>.webp")
    try:
        data = (out / relative).read_bytes()
    except OSError as error:
        raise StageError(f"{out / relative}: {error.strerror}; run the evaluate stage again") from error
    return f"data:image/webp;base64,{base64.b64encode(data).decode()}"


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StageError(f"{path}: cannot be read: {error}; run its stage again") from error
    if not isinstance(value, dict):
        raise StageError(f"{path}: is no JSON object; run its stage again")
    return value


def _percent(part: int, whole: int) -> float:
    return 100.0 * part / whole if whole else 0.0
