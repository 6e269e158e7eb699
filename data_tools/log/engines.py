"""The engines that run the corpus's Ibis expressions: DuckDB on one machine, Spark on one or many. Both give
the same rows in the same order, as one stream of Arrow batches.

DuckDB works out of core: where a log is larger than a bucket, it is first written once as buckets of whole
queries, a range of queries each, and the buckets are then judged and sorted one after the other. So memory
and the time a row do not grow with the log, and what is spilled is the log's own size, compressed. Spark does
the same by its own shuffle.
"""

import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import duckdb
import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq
from ibis.backends import BaseBackend

from data_tools.spark import spark_session

BATCH_ROWS = 100_000
BUCKET_ROWS = 2_000_000  # judged and sorted in about 1 GB
MAX_BUCKETS = 512  # a wider split would cost more memory for the open files than it saves
_SAMPLES_PER_BUCKET = 1000

Judge = Callable[[ir.Table], ir.Table]


@dataclass(frozen=True)
class EngineOptions:
    """`memory_limit`: DuckDB's, or the Spark driver's where it is local ('8GB'). `threads`: of one
    machine."""

    threads: int
    memory_limit: str | None = None
    spark_master: str | None = None  # null: the environment's SPARK_MASTER, or local[threads]
    spark_conf: Mapping[str, str] = field(default_factory=dict)


class Engine(ABC):
    """An Ibis backend with what it leaves on disk. Use it in a `with` block; `scratch` is emptied at its end.

    For Spark on many machines `scratch` must lie on a file system that all of them share.
    """

    def __init__(self, scratch: Path, options: EngineOptions) -> None:
        self.scratch = scratch
        self.options = options
        self.connection: BaseBackend

    def __enter__(self) -> Self:
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        shutil.rmtree(self.scratch, ignore_errors=True)

    @abstractmethod
    def _open(self) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...

    @abstractmethod
    def read_parquet(self, files: Sequence[Path]) -> ir.Table:
        """The rows of Parquet files of one schema, in no order."""

    @abstractmethod
    def judged(
        self, table: ir.Table, rows: int, judge: Judge, query: str, order: Sequence[str]
    ) -> Iterator[pa.RecordBatch]:
        """`judge(table)` sorted by the columns `order`, which begins with `query`; strings by their UTF-8
        bytes. A judged row may depend on other rows of its query alone. `rows`: how many the table has."""


def open_engine(name: str, scratch: Path, options: EngineOptions) -> Engine:
    return {"duckdb": DuckdbEngine, "spark": SparkEngine}[name](scratch, options)


# --------------------------------------------------------------------------------------------------- DuckDB


class DuckdbEngine(Engine):
    """DuckDB within `memory_limit` (by default its own: 80 % of the machine's)."""

    bucket_rows = BUCKET_ROWS

    def _open(self) -> None:
        settings: dict[str, Any] = {
            "temp_directory": str(self.scratch / "duckdb"),
            "threads": self.options.threads,
            "preserve_insertion_order": False,  # every result is sorted, or has no order
        }
        if self.options.memory_limit is not None:
            settings["memory_limit"] = self.options.memory_limit
        self.connection = ibis.duckdb.connect(**settings)

    def _close(self) -> None:
        self.connection.disconnect()

    def read_parquet(self, files: Sequence[Path]) -> ir.Table:
        paths = [str(path) for path in files]
        table: ir.Table = self.connection.read_parquet(paths, hive_partitioning=False)
        return table

    def judged(
        self, table: ir.Table, rows: int, judge: Judge, query: str, order: Sequence[str]
    ) -> Iterator[pa.RecordBatch]:
        count = min(-(-rows // self.bucket_rows), MAX_BUCKETS)
        if count <= 1:
            yield from self._stream(judge(table).order_by(order))
            return
        bounds = self._bounds(table[query], rows, count)
        folder = self.scratch / "buckets"
        self._write_buckets(table.mutate(bucket=_bucket(table[query], bounds)), folder)
        for bucket in range(len(bounds) + 1):
            part = folder / f"bucket={bucket}"
            files = sorted(part.glob("*.parquet"))
            if files:
                yield from self._stream(judge(self.read_parquet(files)).order_by(order))
                shutil.rmtree(part)

    def _stream(self, table: ir.Table) -> Iterator[pa.RecordBatch]:
        sql = self.connection.compile(table)
        yield from self.connection.con.sql(sql).to_arrow_reader(BATCH_ROWS)

    def _bounds(self, query: ir.StringColumn, rows: int, count: int) -> list[str]:
        """Up to `count` - 1 queries that cut the log into about equal parts. Which ones is chance: the rows
        that are judged, and their order, do not depend on it."""
        share = min(1.0, _SAMPLES_PER_BUCKET * count / rows)
        sampled = self.connection.to_pyarrow(query.name("query").as_table().sample(share))["query"]
        ordered = sorted(sampled.to_pylist(), key=str.encode)
        chosen = {ordered[len(ordered) * place // count] for place in range(1, count)} if ordered else set()
        return sorted(chosen, key=str.encode)

    def _write_buckets(self, table: ir.Table, folder: Path) -> None:
        sql, target = self.connection.compile(table), str(folder).replace("'", "''")
        # A thread holds this many rows of all buckets together before it writes them.
        self.connection.raw_sql("SET partitioned_write_flush_threshold = 16384")
        self.connection.raw_sql(f"SET partitioned_write_max_open_files = {MAX_BUCKETS}")
        self.connection.raw_sql(
            f"COPY ({sql}) TO '{target}' "
            "(FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1, PARTITION_BY (bucket))"
        )


def _bucket(query: ir.StringValue, bounds: Sequence[str], first: int = 0) -> ir.IntegerValue:
    """How many bounds are at or before a query, by halving."""
    if not bounds:
        return ibis.literal(first, "int32")
    middle = len(bounds) // 2
    return ibis.ifelse(
        query < bounds[middle],
        _bucket(query, bounds[:middle], first),
        _bucket(query, bounds[middle + 1 :], first + middle + 1),
    )


# ---------------------------------------------------------------------------------------------------- Spark


class SparkEngine(Engine):
    """Spark: in this process's machine (`local[n]`), or on the cluster of `spark_master`."""

    def _open(self) -> None:
        options = self.options
        self.session = spark_session(
            "tandem",
            options.threads,
            self.scratch,
            master=options.spark_master,
            memory_limit=options.memory_limit,
            conf=options.spark_conf,
        )
        self.connection = ibis.pyspark.connect(self.session)

    def _close(self) -> None:
        self.session.stop()

    def read_parquet(self, files: Sequence[Path]) -> ir.Table:
        # Spark reads its paths as patterns.
        paths = [re.sub(r"([\\{}\[\]*?])", r"\\\1", str(path)) for path in files]
        name = ibis.util.gen_name("read_parquet")
        self.session.read.parquet(*paths).createOrReplaceTempView(name)
        return self.connection.table(name)

    def judged(
        self, table: ir.Table, rows: int, judge: Judge, query: str, order: Sequence[str]
    ) -> Iterator[pa.RecordBatch]:
        folder = self.scratch / "parts"
        sql = self.connection.compile(judge(table).order_by(order))
        self.session.sql(sql).write.parquet(str(folder))
        for part in sorted(folder.glob("part-*.parquet")):  # numbered in the order of the sort
            with pq.ParquetFile(part) as file:
                yield from file.iter_batches(BATCH_ROWS)
            part.unlink()


def mendable(error: Exception) -> str | None:
    """What the user can do about an error of DuckDB's, with its first line; None for all others."""
    first = str(error).partition("\n")[0]
    if isinstance(error, duckdb.OutOfMemoryException):
        return f"{first}. Raise `memory_limit`, or set `engine: spark`."
    if isinstance(error, duckdb.InvalidInputException | duckdb.ConversionException):
        return f"{first}. Write the log again."  # text that is not UTF-8, a damaged page …
    return None
