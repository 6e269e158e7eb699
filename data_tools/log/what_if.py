"""What other limits would leave of a click log, from the measures that the filter stored: the same counts as
a new run, without the texts."""

import tempfile
from collections import Counter
from pathlib import Path

import ibis

from data_tools.log.judged_files import counts_of
from data_tools.log.rules import FilterRules, decide_alone, late_reason


def counts_under(measures: Path, rules: FilterRules, memory_limit: str | None = None) -> dict[str, int]:
    """kept, and dropped_<reason> for every reason, as the filter would count them under `rules`.

    The measures must hold what the rules ask for: `listed` for listed words, `draw` (of the same seed) for a
    subset. DuckDB streams the file; only the rows that the row-by-row rules leave are ranked.
    """
    with tempfile.TemporaryDirectory() as scratch:
        settings = {} if memory_limit is None else {"memory_limit": memory_limit}
        connection = ibis.duckdb.connect(temp_directory=scratch, **settings)
        place = (
            "file_row_number"  # the file is in the order of queries and URLs: its rows are ranked as URLs are
        )
        rows = decide_alone(connection.read_parquet(measures, file_row_number=True), rules)
        early = rows.filter(rows.reason.notnull()).select("reason")
        left = rows.filter(rows.reason.isnull())
        late = left.select(reason=late_reason(left, rules, place))
        found = connection.to_pyarrow(early.union(late).group_by("reason").agg(n=ibis._.count())).to_pylist()
        connection.disconnect()
    return counts_of(Counter({row["reason"]: row["n"] for row in found}))
