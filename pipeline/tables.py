"""Plans, states and results as tables for a terminal."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pipeline import leaks
from pipeline.compare import Comparison
from pipeline.plan import Plan
from pipeline.progress import duration, number
from pipeline.results import RunView
from pipeline.status import StageStatus

ACTIONS = {
    "reuse": ("reused", "green"),
    "run": ("will run", "cyan"),
    "resume": ("resumes", "yellow"),
    "blocked": ("cannot run", "red"),
}
STATES = {
    "done": "green",
    "running": "cyan",
    "queued": "blue",
    "failed": "red",
    "stopped": "yellow",
    "cancelled": "yellow",
    "waiting": "dim",
}
RECALLS = ("i2t_r@1", "i2t_r@5", "i2t_r@10", "t2i_r@1", "t2i_r@5", "t2i_r@10", "rsum", "r@m")
BESIDE = ("ceiling_i2t", "ceiling_t2i", "auc")
LABEL_METRIC = re.compile(r"(?:(?:i2t|t2i)_)?(?:ndcg|map)(?:@\d+)?")


def _cell(value: object) -> Text:
    """Any text as it is: '[' in a setting is no markup."""
    return Text("" if value is None else str(value))


def shown_path(path: Path) -> str:
    """Relative to here where that is shorter."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _table(title: str, *columns: str, **options: Any) -> Table:
    return Table(*columns, title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, **options)


def of_plan(plan: Plan) -> Table:
    place = shown_path(plan.root / plan.recipe.name)
    table = _table(f"plan of {plan.recipe.name}: runs in {place}", "stage", "plan", "directory", "why")
    table.columns[2].no_wrap = True
    for stage in plan.stages:
        word, style = ACTIONS[stage.action]
        path = stage.directory.path.relative_to(plan.root)
        if path.parts[0] == plan.recipe.name:
            path = path.relative_to(plan.recipe.name)
        table.add_row(_cell(stage.name), Text(word, style=style), _cell(path), _cell(stage.why))
    unchecked = leaks.notes(plan.recipe.head.stages)
    if unchecked:
        table.caption, table.caption_justify = Text("\n".join(unchecked), style="yellow"), "left"
    return table


def of_status(rows: Sequence[StageStatus], title: str) -> Table:
    on_cluster = any(row.job for row in rows)
    table = _table(title, "stage", "state", *(["job"] if on_cluster else []))
    for column in ("doing", "step", "samples/s", "loss", "time", "starts"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            _cell(row.stage),
            Text(row.state, style=STATES[row.state]),
            *([_cell(row.job)] if on_cluster else []),
            _cell(_doing(row)),
            _cell(None if row.step is None else number(row.step)),
            _cell(None if row.samples_per_s is None else number(row.samples_per_s)),
            _cell(None if row.loss is None else f"{row.loss:.4f}"),
            _cell(_time(row)),
            _cell(row.starts or None),
        )
    return table


def failures(rows: Sequence[StageStatus]) -> list[str]:
    """What failed and why, for above the table."""
    lines = []
    for row in rows:
        if row.error and row.error_task is not None:
            lines.append(f"{row.stage} failed: task {row.error_task}: {row.error}")
        elif row.error and row.error_rank is not None:
            log = Path(row.directory) / "log" / f"rank{row.error_rank}.log"
            lines.append(f"{row.stage} failed: rank {row.error_rank}: {row.error}\n  log: {shown_path(log)}")
        elif row.error:
            lines.append(f"{row.stage} {row.state}: {row.error}")
        lines += [f"  | {line}" for line in row.last_lines]
    return lines


def _doing(row: StageStatus) -> str:
    tasks = f"{number(row.tasks_done or 0)} of {number(row.tasks)} tasks" if row.tasks else ""
    if row.completed is None or row.state == "done" or tasks:
        return "" if row.state == "done" else "  ".join(part for part in (tasks, row.doing) if part)
    count = number(row.completed) + (f"/{number(row.total)}" if row.total else "")
    return f"{row.doing}  {count}  by {row.holder}" if row.doing else count


def _time(row: StageStatus) -> str:
    if row.seconds is not None:
        return f"took {duration(row.seconds)}"
    return "" if row.seconds_left is None else f"{duration(row.seconds_left)} left"


def of_recalls(metrics: dict[str, Any], title: str) -> Table | None:
    """Galleries as rows, recalls and AUC as columns, chance beside them; None where nothing was evaluated.

    A gallery that was re-ranked has a second row: its recalls by cosine.
    """
    galleries = _galleries(metrics)
    if not galleries:
        return None
    columns = [name for name in RECALLS + BESIDE if any(name in values for values in galleries.values())]
    table = _table(f"{title} (%)", "gallery")
    for name in columns:
        table.add_column(name, justify="right")
    with_chance = any("chance_i2t_r@1" in values for values in galleries.values())
    if with_chance:
        table.add_column("chance i2t_r@1", justify="right", style="dim")
    for gallery, values in galleries.items():
        cells = [f"{values[name]:.1f}" if name in values else "" for name in columns]
        if with_chance:
            cells.append(f"{values['chance_i2t_r@1']:.2f}" if "chance_i2t_r@1" in values else "")
        table.add_row(_cell(gallery), *cells)
        if "cosine_r@m" in values:
            before = [values.get(f"cosine_{name}") for name in columns]
            told = ["" if value is None else f"{value:.1f}" for value in before]
            table.add_row(_cell(f"{gallery}, by cosine"), *told, style="dim")
    return table


def of_labels(metrics: dict[str, Any], title: str) -> Table | None:
    """Galleries that were asked for label by label as rows, NDCG and MAP as columns; None: there are none.

    A random order's is a second row of each.
    """
    galleries = {
        gallery: values
        for gallery, values in _galleries(metrics).items()
        if any(LABEL_METRIC.fullmatch(name) for name in values)
    }
    if not galleries:
        return None
    every = dict.fromkeys(name for values in galleries.values() for name in values)
    columns = [name for name in every if LABEL_METRIC.fullmatch(name)]
    table = _table(f"{title}, by labels (%)", "gallery")
    for name in columns:
        table.add_column(name, justify="right")
    for gallery, values in galleries.items():
        for before, told, style in (("", gallery, None), ("chance_", f"{gallery}, by chance", "dim")):
            found = [values.get(f"{before}{name}") for name in columns]
            cells = ["" if value is None else f"{value:.1f}" for value in found]
            table.add_row(_cell(told), *cells, style=style)
    return table


def _galleries(metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of each gallery its metrics by their own names."""
    galleries: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        parts = name.split("/")
        if parts[0] == "eval" and len(parts) == 3 and value is not None:
            galleries.setdefault(parts[1], {})[parts[2]] = value
    return galleries


def of_stages(run: RunView) -> Table:
    """What each stage counted and measured (recalls apart)."""
    table = _table(f"stages of {run.name}", "stage", "time", "counts", "metrics")
    for stage in run.stages:
        if stage.done is None:
            table.add_row(_cell(stage.name), Text("not done", style="dim"), "", "")
            continue
        counts = ", ".join(f"{number(value)} {name}" for name, value in stage.done.get("counts", {}).items())
        metrics = stage.done.get("metrics", {})
        told = [f"{n} {number(v)}" for n, v in metrics.items() if not n.startswith("eval/") and v is not None]
        table.add_row(
            _cell(stage.name), duration(stage.done.get("seconds", 0.0)), _cell(counts), _cell(", ".join(told))
        )
    return table


def of_comparison(comparison: Comparison) -> list[Table]:
    titles = [escape(title) for title in comparison.titles]
    best = _table("metrics", "metric", *titles)
    for name, values in comparison.metrics.items():
        best.add_row(_cell(name), *[_cell("" if v is None else number(v)) for v in values])
    tables = [best]
    if comparison.settings:
        other = _table("settings that differ", "setting", *titles)
        for name, values in comparison.settings.items():
            other.add_row(_cell(name), *[_cell(v) for v in values])
        tables.append(other)
    return tables
