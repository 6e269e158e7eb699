"""From a crawl's pictures to the same crawl with sensitive pictures and near duplicates marked.

Everything here is one row a picture in Arrow or numpy; the largest is the crawl's own table.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_tools.clean.fingerprint_files import FingerprintError, Opened
from data_tools.clean.near_duplicates import Groups
from data_tools.web.crawl import SCHEMA

TABLE = "pictures.parquet"
REASONS = {
    "sensitive": "Open NSFW's score is at or over nsfw.threshold",
    "near_duplicate": "it shows what another one shows: resaved, resized, cropped by some 10 % or mirrored",
}
CLEANED = SCHEMA.append(pa.field("same_as", pa.string()))  # sha256 of the kept picture that takes its queries


@dataclass(frozen=True)
class Crawled:
    """A crawl's table in the order of URLs, and its different pictures: those that came, each sha256 once."""

    table: pa.Table
    different: pa.Table  # rows of the table: of each sha256 the first
    which: np.ndarray  # of each row of `table`: its place in `different`, or -1


def read_crawl(folder: Path) -> Crawled:
    """Read pictures.parquet of a crawl. Raises FingerprintError where it is missing or damaged."""
    try:
        table = pq.read_table(folder / TABLE, schema=SCHEMA).sort_by("url").combine_chunks()
    except (OSError, pa.ArrowException) as error:
        raise FingerprintError(
            f"{folder / TABLE}: cannot be read ({error}). Run the crawl stage again."
        ) from error
    came = np.flatnonzero(pc.equal(table["status"], "ok").to_numpy())
    codes = (
        table["sha256"]
        .take(came)
        .cast(pa.large_string())
        .combine_chunks()
        .dictionary_encode()
        .indices.to_numpy()
    )
    _, first = np.unique(codes, return_index=True)  # codes count up in the order of rows
    which = np.full(table.num_rows, -1, np.int64)
    which[came] = codes
    return Crawled(table, table.take(came[first]), which)


@dataclass(frozen=True)
class Verdicts:
    """What becomes of the different pictures: a reason of REASONS or "", and what to say of it."""

    reasons: np.ndarray
    details: np.ndarray
    same_as: np.ndarray  # sha256 or None
    kept: np.ndarray  # of a near duplicate: the place of the picture that is kept; of others their own
    correlation: np.ndarray  # with it

    @property
    def dropped(self) -> np.ndarray:
        """bool"""
        return np.asarray(self.reasons != "")


def judge(opened: Opened, groups: Groups | None, threshold: float | None) -> Verdicts:
    """Verdicts on the pictures of `opened`.

    Args:
        groups: None where near duplicates were not looked for.
        threshold: of the score; None where pictures were not scored.
    """
    n = len(opened.urls)
    reasons, details, same_as = np.full(n, "", object), np.full(n, None, object), np.full(n, None, object)
    all_kept, correlation = np.arange(n), np.ones(n)
    if threshold is not None:
        for k in np.flatnonzero(opened.nsfw >= threshold).tolist():
            reasons[k], details[k] = "sensitive", f"score {opened.nsfw[k]:.3f}"
    if groups is not None:
        for k in np.flatnonzero(groups.kept != np.arange(len(groups.kept))).tolist():
            kept = int(groups.kept[k])
            mirror = ", in a mirror" if groups.mirrored[k] else ""
            reasons[k], all_kept[k], correlation[k] = "near_duplicate", kept, groups.correlation[k]
            details[k] = f"of {opened.urls[kept]} (correlation {groups.correlation[k]:.3f}{mirror})"
            if not groups.mirrored[k]:  # what is said of left and right is wrong of a mirror image
                same_as[k] = opened.sha256[kept].as_py()
    return Verdicts(reasons, details, same_as, all_kept, correlation)


def cleaned(crawled: Crawled, verdicts: Verdicts) -> tuple[pa.Table, pa.Table]:
    """The crawl's table with statuses and `same_as`; and the rows dropped here (url, reason, detail)."""
    rows = np.flatnonzero(crawled.which >= 0)
    gone = rows[verdicts.dropped[crawled.which[rows]]]
    of = crawled.which[gone]
    table = crawled.table
    columns = {name: table[name].to_numpy(zero_copy_only=False).copy() for name in ("status", "detail")}
    columns["status"][gone], columns["detail"][gone] = verdicts.reasons[of], verdicts.details[of]
    same_as = np.full(table.num_rows, None, object)
    same_as[gone] = verdicts.same_as[of]
    for name, values in columns.items():
        table = table.set_column(SCHEMA.get_field_index(name), name, pa.array(values, pa.string()))
    table = table.append_column("same_as", pa.array(same_as, pa.string()))
    left_out = table.take(gone)
    dropped = pa.table({"url": left_out["url"], "reason": left_out["status"], "detail": left_out["detail"]})
    return table.cast(CLEANED), dropped
