"""A Spark session as Tandem needs one: quiet, on 127.0.0.1 where it is local, errors with their remedy."""

import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.errors import DataError

_REMEDY = (
    "Install the extra `spark` (pip install 'tandem[spark]') and a Java runtime, 17 or 21, or leave "
    "Spark out (`engine: duckdb`, `distributor: processes`)."
)


def spark_session(
    name: str,
    threads: int,
    scratch: Path,
    *,
    master: str | None = None,
    memory_limit: str | None = None,
    conf: Mapping[str, str] | None = None,
) -> Any:
    """A Spark session. Where it is local it listens on 127.0.0.1 alone.

    Args:
        threads: of one machine, where it is local.
        scratch: a folder for what Spark spills.
        master: say spark://host:7077; None: the environment's SPARK_MASTER, or local[threads].
        memory_limit: of the driver, where it is local ("8GB").
        conf: Spark's own settings, which win.

    Raises:
        DataError: no pyspark, no Java, or no session on `master`.
    """
    sessions = _sessions()
    home = os.environ.get("JAVA_HOME")
    if shutil.which(f"{home}/bin/java" if home else "java") is None:
        where = f"JAVA_HOME={home} has no bin/java" if home else "there is no java on PATH"
        raise DataError(f"Spark: {where}. {_REMEDY}")
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # of executors: it has what is imported here
    master = master or os.environ.get("SPARK_MASTER") or f"local[{threads}]"
    settings = {
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",  # it would write over the stage's own progress
        "spark.log.level": "ERROR",
        "spark.local.dir": str(scratch / "spark"),
        "spark.sql.warehouse.dir": str(scratch / "warehouse"),
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.ansi.enabled": "true",  # an overflow or a bad cast is an error, as it is in DuckDB
        "spark.sql.execution.arrow.pyspark.enabled": "true",
    }
    if master.startswith("local"):
        settings |= {"spark.driver.bindAddress": "127.0.0.1", "spark.driver.host": "127.0.0.1"}
        if memory_limit is not None:
            settings["spark.driver.memory"] = java_bytes(memory_limit)
    builder = sessions.builder.appName(name).master(master)
    for key, value in (settings | dict(conf or {})).items():
        builder = builder.config(key, value)
    try:
        return builder.getOrCreate()
    except Exception as error:  # Py4J's: what it called, then ': ' and what Java says
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        first = next((line[2:] for line in lines if line.startswith(": ")), lines[0])
        raise DataError(
            f"Spark: no session on {master}: {first}. Check `spark.master` and `spark.conf`. {_REMEDY}"
        ) from error


def active_session() -> Any:
    """The session that this process has already; None: none. DataError: there is no pyspark."""
    return _sessions().getActiveSession()


def _sessions() -> Any:
    try:
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise DataError(f"Spark: {error}. {_REMEDY}") from error
    return SparkSession


def java_bytes(limit: str) -> str:
    """'8GB' or '7.5 GiB' as Java's megabytes, '7629m'."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT])(i?)B?\s*", limit, re.IGNORECASE)
    if found is None:
        raise DataError(f"memory_limit: '{limit}' is no amount of memory; write it as 8GB or 7.5GiB")
    base = 1024 if found[3] else 1000
    size = float(found[1]) * base ** (" KMGT".index(found[2].upper()))
    return f"{int(size / 2**20)}m"
