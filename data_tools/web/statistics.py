"""What a crawl met: how many URLs of each host ended in each status, with their bytes and seconds."""

from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from data_tools.web.opener import host_of, url_problem

FILE = "statistics.parquet"
SCHEMA = pa.schema(
    [
        ("host", pa.string()),  # "" for what is no URL
        ("status", pa.string()),
        ("count", pa.int64()),
        ("reused", pa.int64()),  # of them, those that an earlier crawl had fetched
        ("bytes", pa.int64()),  # of the pictures that were kept
        ("seconds", pa.float64()),  # that the requests took, waits between them left out
    ]
)


def of_rows(rows: pa.Table, *, reused: bool) -> pa.Table:
    """The statistics of rows with url, status, bytes and maybe seconds. Grows with hosts and statuses."""
    hosts = [
        host_of(url) if url_problem(url) is None else ""
        for batch in rows["url"].chunks
        for url in batch.to_pylist()
    ]
    count = rows.num_rows
    table = pa.table(
        {
            "host": pa.array(hosts, pa.string()),
            "status": rows["status"],
            "count": pa.repeat(1, count),
            "reused": pa.repeat(int(reused), count),
            "bytes": pc.fill_null(rows["bytes"], 0),
            "seconds": rows["seconds"] if "seconds" in rows.column_names else pa.repeat(0.0, count),
        }
    )
    return joined([table])


def joined(tables: Iterable[pa.Table]) -> pa.Table:
    """Statistics of parts as those of the whole, sorted by host and status."""
    whole = pa.concat_tables([SCHEMA.empty_table(), *(table.cast(SCHEMA) for table in tables)])
    sums = ("count", "reused", "bytes", "seconds")
    grouped = whole.group_by(["host", "status"]).aggregate([(name, "sum") for name in sums])
    columns = {name: grouped[name] for name in ("host", "status")} | {n: grouped[f"{n}_sum"] for n in sums}
    return pa.table(columns).cast(SCHEMA).sort_by([("host", "ascending"), ("status", "ascending")])


def summary(statistics: pa.Table, most: int = 10) -> list[str]:
    """Lines for a log: every status, then the hosts with most URLs that gave no picture."""
    by_status = statistics.group_by("status").aggregate([("count", "sum"), ("seconds", "sum")])
    lines = [
        f"{row['status']}: {row['count_sum']:,} ({row['seconds_sum'] / row['count_sum']:.2f} s each)"
        for row in by_status.sort_by([("count_sum", "descending"), ("status", "ascending")]).to_pylist()
    ]
    failed = statistics.filter(pc.not_equal(statistics["status"], "ok"))
    worst = failed.sort_by([("count", "descending"), ("host", "ascending"), ("status", "ascending")])
    for row in worst.slice(0, most).to_pylist():
        lines.append(f"{row['host'] or '(no host)'}: {row['status']} {row['count']:,}")
    return lines
