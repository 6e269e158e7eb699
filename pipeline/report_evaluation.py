"""What the report shows of evaluate stages: recalls, labels, matching, examples, where a model looked."""

import base64
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.report_data import Bar, read_json
from pipeline.results import StageRun
from pipeline.run_directory import RunDirectory
from stages.base import StageError

RECALLS = tuple(f"{way}_r@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10))
_PICTURE = re.compile(r"^pictures/[0-9a-f]{1,64}\.webp$")


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
    examples = read_json(out / "examples.json")
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
    shown = read_json(path)
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
    for gallery, ways in read_json(path).items():
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
