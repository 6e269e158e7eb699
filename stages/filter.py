"""The filter stage: a click log → the pairs worth fetching, and every dropped row under its one reason."""

from pathlib import Path
from typing import ClassVar, Literal

import ibis
from ibis.backends.duckdb import Backend
from pydantic import Field

from data_tools.click_log import read_click_log
from data_tools.errors import DataError, explain_full_disk
from data_tools.rules import REASONS, FilterRules, judge, read_listed_words
from stages.base import Job, Report, StageConfig, StageError


class Config(StageConfig):
    kind: Literal["filter"] = "filter"
    click_log: Path = Field(description="the log: .csv, .tsv or .parquet, relative to the recipe")
    listed_words: Path | None = Field(
        default=None, description="word list: texts that hold one of its words are dropped"
    )
    min_show: int = Field(
        default=20, ge=0, description="rows shown fewer times are dropped: their CTR says little"
    )
    min_ctr: float = Field(default=0.1, ge=0, le=1, description="least click / show")
    ctr_bound: Literal["point", "wilson"] = Field(
        default="point", description="judge the CTR itself, or the lower end of its 95 % Wilson interval"
    )
    best_per_query: int | None = Field(
        default=10, ge=1, description="pictures kept a query, by CTR; null: all"
    )
    min_words: int = Field(default=2, ge=0, description="of query and title; a Chinese character is one word")
    max_words: int = Field(default=128, ge=1, description="of query, title and content")
    min_side_px: int = Field(default=100, ge=1, description="where the log has width and height")
    max_aspect: float = Field(
        default=4.0, ge=1, description="longer side over shorter, where the log has them"
    )
    memory_limit: str | None = Field(
        default=None, description="DuckDB's memory, say '8GB'; null: its own default"
    )

    cosmetic: ClassVar[frozenset[str]] = frozenset({"memory_limit"})

    def files(self) -> dict[str, Path]:
        return {"click_log": self.click_log} | (
            {"listed_words": self.listed_words} if self.listed_words else {}
        )

    def rules(self, recipe_directory: Path) -> FilterRules:
        words = read_listed_words(recipe_directory / self.listed_words) if self.listed_words else ()
        return FilterRules(
            min_show=self.min_show,
            min_ctr=self.min_ctr,
            ctr_bound=self.ctr_bound,
            best_per_query=self.best_per_query,
            min_words=self.min_words,
            max_words=self.max_words,
            listed_words=words,
            min_side_px=self.min_side_px,
            max_aspect=self.max_aspect,
        )


def run(config: Config, job: Job) -> Report:
    """Write out/pairs.parquet and out/dropped.parquet, both sorted by query and URL."""
    if job.task_count != 1:
        raise StageError(
            "filter: it runs as one task (a window over all rows of a query); set its task count to 1"
        )
    job.out.mkdir(parents=True, exist_ok=True)
    kept = "Nothing of this stage is kept; earlier stages are untouched."
    try:
        with explain_full_disk(job.out, kept), job.progress.task("filter", 3) as task:
            rules = config.rules(job.recipe_directory)
            connection = _connect(config, job)
            log = read_click_log(job.recipe_directory / config.click_log, connection)
            task.advance()
            judged = connection.create_table("judged", judge(log, rules), temp=True)
            task.advance()
            counts = _write(connection, judged, job.out)
            task.advance()
            rows = int(connection.execute(log.count()))
            connection.disconnect()
    except DataError as error:
        raise StageError(str(error)) from error
    if rows != sum(counts.values()):
        raise RuntimeError(f"the filter lost rows: {rows} read, {counts} written")
    if counts["kept"] == 0:
        reasons = ", ".join(f"{name} {n}" for name, n in counts.items() if n)
        raise StageError(
            f"filter: no row of {config.click_log} is left ({reasons}). Lower the strictest rule."
        )
    metrics = {f"filter/{name}": float(n) for name, n in counts.items()} | {"filter/rows": float(rows)}
    return Report(counts={"rows": rows, **counts}, metrics=metrics)


def _connect(config: Config, job: Job) -> Backend:
    spill = job.directory / "spill"
    settings = {"temp_directory": str(spill)}
    if config.memory_limit is not None:
        settings["memory_limit"] = config.memory_limit
    connection: Backend = ibis.duckdb.connect(**settings)
    return connection


def _write(connection: Backend, judged: ibis.Table, out: Path) -> dict[str, int]:
    """Both files by temp file and rename; the counts: kept, and dropped_<reason> for every reason."""
    kept = judged.filter(judged.reason.isnull()).drop("reason").order_by("query", "url")
    dropped = judged.filter(judged.reason.notnull()).order_by("query", "url", "reason", "show", "click")
    for name, table in (("pairs.parquet", kept), ("dropped.parquet", dropped)):
        unfinished = out / f"{name}.tmp"
        connection.to_parquet(table, unfinished)
        unfinished.replace(out / name)
    found = connection.execute(judged.group_by("reason").agg(n=judged.count()))
    by_reason = {
        reason: int(n)
        for reason, n in zip(found["reason"], found["n"], strict=True)
        if isinstance(reason, str)
    }
    total = int(connection.execute(kept.count()))
    return {"kept": total, **{f"dropped_{reason}": by_reason.get(reason, 0) for reason in REASONS}}
