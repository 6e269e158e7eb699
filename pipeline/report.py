"""One self-contained HTML page of a run: what was filtered, fetched, learned and found. It fetches nothing.

Titles and queries come from the web. The template escapes every value (Jinja2's autoescape, and no part of
it is exempt), no value becomes a link, and a Content-Security-Policy forbids scripts and requests besides.
"""

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline import report_data as data
from pipeline import report_evaluation as found
from pipeline.results import RunView
from pipeline.run_directory import RunDirectory
from stages.base import StageError

TEMPLATE = "report.html.j2"
DERIVED = "query, title, content, show and click are derived by the demo's click model"


def write_report(run: RunView, out: Path) -> Path:
    """Write the page of a run to `out` (a file), by rename; returns `out`.

    Stages that have not run are shown as such. Raises StageError naming a result that cannot be read.
    """
    page = render(run)
    temporary = out.with_name(f"{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        raise StageError(
            f"{out}: the report cannot be written: {error.strerror}; give another --out"
        ) from error
    return out


def render(run: RunView) -> str:
    """The page as a string."""
    environment = Environment(
        loader=PackageLoader("pipeline"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"percent": percent, "duration": duration, "count": count, "shortened": shortened}
    return environment.get_template(TEMPLATE).render(**context(run))


def context(run: RunView) -> dict[str, Any]:
    """Everything that the template names."""
    of_kind = {
        kind: [stage for stage in run.stages if stage.kind == kind]
        for kind in ("filter", "crawl", "clean", "shard")
    }
    return {
        "run": run,
        "seed": seed_of(run),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "derived": DERIVED if run.truth is not None else None,
        "filters": [data.filter_section(run, stage) for stage in of_kind["filter"]],
        "crawls": [data.crawl_section(stage) for kind in ("crawl", "clean") for stage in of_kind[kind]],
        "corpora": [data.corpus_section(stage) for stage in of_kind["shard"]],
        "trainings": [data.training_section(s) for s in run.stages if s.kind in data.TRAINING_KINDS],
        "evaluations": [found.evaluation_section(s) for s in run.stages if s.kind == "evaluate"],
        "cls_attention": [heads for s in run.stages if (heads := found.cls_attention_section(s))],
        "attention": [section for s in run.stages if (section := found.attention_section(s))],
    }


def seed_of(run: RunView) -> int | None:
    """The seed that the stages ran with, as their config.yaml has it; None before the first has started."""
    configs = (RunDirectory(stage.directory).config() for stage in run.stages)
    return next((config["seed"] for config in configs if config is not None), None)


def percent(value: float | None, digits: int = 1) -> str:
    """A value that is in percent already; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value != 0 and abs(value) < 0.1:
        digits = 2
    return f"{value:.{digits}f}"


def duration(seconds: float | None) -> str:
    """Seconds as people say them: 48 s, 3 min 20 s, 2 h 5 min."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def shortened(text: str, most: int = 60) -> str:
    """A long text cut at `most` characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
