"""A made click log of any size as Parquet parts, the same for the same seed: what the filter's benchmarks
read.

Queries are drawn log-uniformly (Zipf-like: the first of a thousand takes a tenth of the rows). A picture has
a title and a content (English or Chinese, some with CJK punctuation, digits or emoji) and stands in a few
rows one after the other, as in a log written by page. Some pairs stand twice, some CTRs and shows tie, some
URLs, sizes and texts are bad. DuckDB makes a part at a time: memory does not grow with the rows.
"""

from pathlib import Path

import duckdb
import numpy as np

ROWS_PER_PART = 1_000_000
ROWS_PER_PICTURE = 5
QUERIES = 2_000_000


def write_log(folder: Path, rows: int, seed: int = 0, memory_limit: str = "1GB") -> None:
    """Write part-00000.parquet, … into `folder`; parts that are there are kept. A log is a part of each
    larger one of the same seed, in whole parts."""
    folder.mkdir(parents=True, exist_ok=True)
    connection = duckdb.connect()
    connection.execute(f"SET memory_limit = '{memory_limit}'; SET threads = 2")
    _make_words(connection, seed)
    for part, start in enumerate(range(0, rows, ROWS_PER_PART)):
        path = folder / f"part-{part:05}.parquet"
        if path.exists():
            continue
        count = min(ROWS_PER_PART, rows - start)
        unfinished = path.with_suffix(".tmp")
        connection.execute(_part(start, count, seed, unfinished))
        unfinished.replace(path)
    connection.close()


def _make_words(connection: duckdb.DuckDBPyConnection, seed: int) -> None:
    rng = np.random.default_rng(seed)
    letters = list("aaabcdeeefghiiijklmnooopqrstuuvwxyz")
    english = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(5000)]
    chinese = ["".join(map(chr, rng.integers(0x4E00, 0x9000, rng.integers(1, 4)))) for _ in range(5000)]
    connection.execute("CREATE TABLE words AS SELECT ? AS en, ? AS zh", [english, chinese])


def _part(start: int, count: int, seed: int, path: Path) -> str:
    """The statement that writes rows `start` to `start + count`. hash() is DuckDB's: one version, one log."""

    def text(key: str, least: int, spread: int, chinese_share: int) -> str:
        length = f"{least} + hash({key}, 1) % {spread}"
        places = f"list_transform(range(({length})::BIGINT), lambda i: 1 + (hash({key}, i) % 5000)::BIGINT)"
        english = f"array_to_string(list_select(en, {places}), ' ')"
        chinese = f"array_to_string(list_select(zh, {places}), '')"
        chinese = f"CASE WHEN hash({key}, 2) % 3 = 0 THEN {chinese} || '，' || {chinese} ELSE {chinese} END"
        tail = f"CASE hash({key}, 3) % 40 WHEN 0 THEN ' 🐼' WHEN 1 THEN ' 2024' WHEN 2 THEN '…' ELSE '' END"
        return f"CASE WHEN hash({key}, 4) % 100 < {chinese_share} THEN {chinese} ELSE {english} END || {tail}"

    return f"""
    COPY (
      WITH numbered AS (
        SELECT i, hash(i, {seed}) AS h, (i // {ROWS_PER_PICTURE}) AS picture,
               floor(exp(ln({QUERIES}) * (hash(i, {seed}, 5) % 1000003) / 1000003.0))::BIGINT AS q
        FROM range({start}, {start + count}) t(i)
      ), pictures AS (
        SELECT picture, hash(picture, {seed}, 6) AS p, {text(f"picture, {seed}", 1, 9, 60)} AS title,
               {text(f"picture, {seed}, 7", 0, 30, 60)} AS content
        FROM (SELECT DISTINCT picture FROM numbered), words
      ), asked AS (
        SELECT q, {text(f"q, {seed}, 8", 1, 5, 60)} AS query FROM (SELECT DISTINCT q FROM numbered), words
      )
      SELECT query,
             CASE WHEN p % 500 = 0 THEN 'ftp' ELSE 'http' END || '://img' || (p % 97) || '.example/'
               || lpad(to_hex(p), 16, '0') || '.jpg' AS url,
             title, content, shown AS show, (shown * rate)::BIGINT AS click, width, height
      FROM (
        SELECT *, (10 + 990 * ((h % 1009) / 1009.0) * ((h % 1013) / 1013.0))::BIGINT AS shown,
               ((h // 7) % 21) / 100.0 AS rate,
               CASE WHEN p % 3 > 0 THEN (60 + p % 1500)::BIGINT END AS width,
               CASE WHEN p % 3 > 0 THEN (60 + p // 11 % 1500)::BIGINT END AS height
        FROM numbered JOIN pictures USING (picture) JOIN asked USING (q)
      )
      ORDER BY i
    ) TO '{path}' (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 122880)"""
