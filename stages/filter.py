"""The filter stage: a click log → the pairs worth fetching, and every dropped row under its one reason."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from data_tools.errors import DataError, explain_full_disk
from data_tools.log.click_log import read_click_log
from data_tools.log.engines import EngineOptions, mendable, open_engine
from data_tools.log.judged_files import ORDER, JudgedFiles
from data_tools.log.listed_words import WordLists, read_word_lists
from data_tools.log.rules import FilterRules, Subset, judge
from stages.base import Frozen, Job, Report, StageConfig, StageError, Stopped


class SparkConfig(Frozen):
    """Where Spark runs, for `engine: spark`."""

    master: str | None = Field(
        default=None,
        description="say spark://host:7077; null: the environment's SPARK_MASTER, or this machine alone",
    )
    conf: dict[str, str] = Field(
        default_factory=dict, description="Spark's own settings, say spark.executor.memory: 32g"
    )


class SubsetConfig(Frozen):
    """A seeded sample of the pictures, with all their rows: each query keeps about its part of the rows."""

    share: float = Field(gt=0, le=1, description="of the pictures that the rules leave")
    seed: int = Field(default=0, ge=0, description="another seed draws other pictures")


class LanguagesConfig(Frozen):
    """Language codes by script, as in the shard stage: of texts with Han characters, and of all others."""

    han: str = "zh"
    other: str = "en"


class Config(StageConfig):
    kind: Literal["filter"] = "filter"
    click_log: Path = Field(
        description="the log: a .csv, .tsv or .parquet file, a folder of .parquet files, or a glob of "
        "files of one kind; relative to the recipe"
    )
    listed_words: Path | dict[str, Path] | None = Field(
        default=None,
        description="word list: texts that hold one of its words are dropped; or a list a language, "
        "by its code",
    )
    languages: LanguagesConfig = LanguagesConfig()
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
    subset: SubsetConfig | None = Field(default=None, description="keep a seeded share of the pictures alone")
    engine: Literal["duckdb", "spark"] = Field(
        default="duckdb", description="both give the same rows; spark: for logs beyond one machine"
    )
    spark: SparkConfig = SparkConfig()
    memory_limit: str | None = Field(
        default=None,
        description="memory of DuckDB, or of a local Spark, say '8GB'; null: the engine's own default",
    )

    cosmetic: ClassVar[frozenset[str]] = frozenset({"memory_limit", "engine", "spark"})
    version: ClassVar[int] = 2

    @model_validator(mode="after")
    def _lists_have_languages(self) -> "Config":
        if isinstance(self.listed_words, dict):
            known = (self.languages.han, self.languages.other)
            unknown = sorted(set(self.listed_words) - set(known))
            if unknown:
                raise ValueError(
                    f"listed_words: '{unknown[0]}' is no code of `languages`; allowed: {', '.join(known)}"
                )
        return self

    def files(self) -> dict[str, Path]:
        if isinstance(self.listed_words, dict):
            lists = {f"listed_words.{code}": path for code, path in self.listed_words.items()}
        else:
            lists = {"listed_words": self.listed_words} if self.listed_words else {}
        return {"click_log": self.click_log, **lists}

    def rules(self, recipe_directory: Path) -> FilterRules:
        """The numbers and word lists. Raises DataError for a list that cannot be read."""
        lists, codes = WordLists(), self.languages
        if isinstance(self.listed_words, dict):
            paths: Mapping[str, Path] = {c: recipe_directory / p for c, p in self.listed_words.items()}
            lists = read_word_lists(paths, codes.han, codes.other)
        elif self.listed_words is not None:
            lists = read_word_lists(recipe_directory / self.listed_words, codes.han, codes.other)
        return FilterRules(
            min_show=self.min_show,
            min_ctr=self.min_ctr,
            ctr_bound=self.ctr_bound,
            best_per_query=self.best_per_query,
            min_words=self.min_words,
            max_words=self.max_words,
            listed_words=lists,
            min_side_px=self.min_side_px,
            max_aspect=self.max_aspect,
            subset=None if self.subset is None else Subset(self.subset.share, self.subset.seed),
        )


def run(config: Config, job: Job) -> Report:
    """Write out/pairs.parquet, out/dropped.parquet (both sorted by query and URL) and out/measures.parquet,
    the numbers that `tandem corpus whatif` judges anew."""
    if job.task_count != 1:
        raise StageError("filter: it runs as one task (rows of a query are ranked); set its task count to 1")
    job.out.mkdir(parents=True, exist_ok=True)
    kept = "Nothing of this stage is kept; earlier stages are untouched."
    try:
        with explain_full_disk(job.out, kept):
            rows, counts = _filter(config, job)
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


def _filter(config: Config, job: Job) -> tuple[int, dict[str, int]]:
    """How many rows were read, and how many were kept and dropped by each rule."""
    rules = config.rules(job.recipe_directory)
    options = EngineOptions(job.processes, config.memory_limit, config.spark.master, config.spark.conf)
    path = job.recipe_directory / config.click_log
    with open_engine(config.engine, job.directory / "spill", options) as engine:
        try:
            log = read_click_log(path, engine)
            judged = engine.judged(log.table, log.rows, partial(judge, rules=rules), "query", ORDER)
            with job.progress.task("filter", log.rows) as task, JudgedFiles(job.out) as files:
                for batch in judged:
                    if job.should_stop():
                        raise Stopped("filter: stopped; run again to start it over")
                    files.write(batch)
                    task.advance(batch.num_rows)
        except Exception as error:
            told = mendable(error)
            if told is None:
                raise
            raise DataError(f"{path}: {told}") from error
    return log.rows, files.counts()
