"""Answers of `tandem corpus` as tables for a terminal."""

from rich import box
from rich.table import Table
from rich.text import Text

from pipeline.corpus_explain import Explained
from pipeline.corpus_whatif import WhatIf

SHOWN_ROWS = 200  # of a query that stands in the log more often; --json has all


def of_fates(explained: Explained, text: str) -> Table:
    """A row of the log a line: kept or dropped where, and why."""
    rows = len(explained.fates)
    waiting = f"; not done yet: {', '.join(explained.waiting)}" if explained.waiting else ""
    title = f"{rows:,} rows of {explained.filter} for '{text}' (asked: {', '.join(explained.asked)}{waiting})"
    if rows > SHOWN_ROWS:
        title += f"; the first {SHOWN_ROWS}, --json has all"
    table = _table(title, "query", "url", "show", "click", "fate", "reason", "detail")
    for fate in explained.fates[:SHOWN_ROWS]:
        fated = f"kept by {fate.stage}" if fate.kept else f"dropped by {fate.stage}"
        told = (fate.row.query, fate.row.url, f"{fate.row.show:,}", f"{fate.row.click:,}")
        style = "green" if fate.kept else "yellow"
        table.add_row(*map(Text, told), Text(fated, style=style), Text(fate.reason or ""), Text(fate.detail))
    return table


def of_what_if(answer: WhatIf) -> Table:
    """Counts now, then, and the difference; a reason that counts nothing in both is left out."""
    changes = ", ".join(f"{answer.stage}.{name} {old} → {new}" for name, (old, new) in answer.changes.items())
    table = _table(f"what if {changes or 'nothing changed'}", "rows", "now", "then", "difference")
    for name, then in answer.then.items():
        now = answer.now.get(name, 0)
        if now or then or name == "kept":
            table.add_row(Text(name), f"{now:,}", f"{then:,}", f"{then - now:+,}" if then != now else "")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    for name in columns:
        numbers = name in ("show", "click", "now", "then", "difference")
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    return table
