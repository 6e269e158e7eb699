"""A crawl in shares: which URLs are whose, and how finished shares become one crawl."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_tools.errors import DataError
from data_tools.web import statistics as crawl_statistics
from data_tools.web.crawl import Crawled
from data_tools.web.pieces import SCHEMA
from data_tools.web.plan import number_of, share_key
from data_tools.web.reuse import PICTURES, Terms, link


class ShareError(DataError):
    """What one share's crawl left cannot be used."""

    def __init__(self, message: str, share: int):
        super().__init__(message)
        self.share = share


def share_of(
    urls: pa.ChunkedArray, index: int, count: int, is_own: Callable[[str], bool] = lambda url: False
) -> pa.ChunkedArray:
    """The URLs of share `index` of `count`: all of a host are in one, so that limits a host hold for the
    whole crawl. Those of the stage's own site (`is_own`), which has no limits, and what is no URL go by their
    own hash. Other URLs that there are make no difference.
    """

    def is_ours(url: str) -> bool:
        return number_of(share_key(url, is_own)) % count == index

    masks = [pa.array(map(is_ours, chunk.to_pylist()), pa.bool_()) for chunk in urls.chunks]
    return urls.filter(pa.chunked_array(masks, pa.bool_()))


def join(shares: Sequence[Path], folder: Path, on_progress: Callable[[int], None]) -> Crawled:
    """One crawl in `folder` from those of all shares: share 3's tars as tars/3/….tar, and the table of all.

    Tars take no room twice where the file system has hard links. The tables are those of a crawl that was
    never split, but for `tar`, `offset` and the seconds. What lay in `folder`/tars before is removed.

    Args:
        on_progress: called with a number of shares that are joined.

    Raises:
        ShareError: a table of a share or a tar of it cannot be read.
        OSError: `folder` cannot be written.
    """
    shutil.rmtree(folder / "tars", ignore_errors=True)
    tables, statistics = [], []
    for index, share in enumerate(shares):
        table = _read(share / PICTURES, SCHEMA, index)
        statistics.append(_read(share / crawl_statistics.FILE, crawl_statistics.SCHEMA, index))
        names = pc.unique(table["tar"].drop_null()).to_pylist()
        moved = {name: f"tars/{index}/{Path(name).name}" for name in names}
        for name, target in moved.items():
            if not (share / name).is_file():
                raise ShareError(f"{share / name}: missing", index)
            link(share / name, folder / target)
        tars = pa.array([moved.get(name) for name in table["tar"].to_pylist()], pa.string())
        tables.append(table.set_column(SCHEMA.get_field_index("tar"), "tar", tars))
        on_progress(1)
    terms = Terms.read(shares[0])
    if terms is not None:
        terms.write(folder)
    pictures = pa.concat_tables(tables).sort_by("url").combine_chunks()
    return Crawled(pictures, crawl_statistics.joined(statistics))


def _read(path: Path, schema: pa.Schema, index: int) -> pa.Table:
    try:
        return pq.read_table(path, schema=schema)
    except (OSError, pa.ArrowException) as error:
        raise ShareError(f"{path}: cannot be read ({error})", index) from error
