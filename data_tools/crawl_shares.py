"""A crawl in shares: which URLs are whose, and how finished shares become one crawl."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_tools.crawl import SCHEMA
from data_tools.errors import DataError

TABLE = "pictures.parquet"
# What a file system says that has no hard links, or none between folders, or no more of one file.
_NO_LINK = {errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK, errno.ENOSYS}


class ShareError(DataError):
    """What one share's crawl left cannot be used."""

    def __init__(self, message: str, share: int):
        super().__init__(message)
        self.share = share


def share_of(urls: Iterable[str], index: int, count: int) -> list[str]:
    """The URLs of share `index` of `count`, by each URL's own hash: whatever other URLs there are."""
    return [url for url in urls if _number(url) % count == index]


def _number(url: str) -> int:
    return int.from_bytes(hashlib.sha256(url.encode()).digest()[:8])


def join(shares: Sequence[Path], folder: Path, on_progress: Callable[[int], None]) -> pa.Table:
    """One crawl in `folder` from those of all shares: share 3's tars as tars/3/….tar, and the table of all.

    Tars take no room twice where the file system has hard links. The table is that of a crawl that was never
    split, but for `tar` and `offset`. What lay in `folder`/tars before is removed.

    Args:
        on_progress: called with a number of shares that are joined.

    Raises:
        ShareError: a share's table or a tar of it cannot be read.
        OSError: `folder` cannot be written.
    """
    shutil.rmtree(folder / "tars", ignore_errors=True)
    tables = []
    for index, share in enumerate(shares):
        try:
            table = pq.read_table(share / TABLE, schema=SCHEMA)
        except (OSError, pa.ArrowException) as error:
            raise ShareError(f"{share / TABLE}: cannot be read ({error})", index) from error
        names = pc.unique(table["tar"].drop_null()).to_pylist()
        moved = {name: f"tars/{index}/{Path(name).name}" for name in names}
        for name, target in moved.items():
            if not (share / name).is_file():
                raise ShareError(f"{share / name}: missing", index)
            _link(share / name, folder / target)
        tars = pa.array([moved.get(name) for name in table["tar"].to_pylist()], pa.string())
        tables.append(table.set_column(SCHEMA.get_field_index("tar"), "tar", tars))
        on_progress(1)
    return pa.concat_tables(tables).sort_by("url").combine_chunks()


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy where there can be none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        shutil.copyfile(source, target)
