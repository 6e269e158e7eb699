"""The errors of data_tools: each names the file, the field or line, and the remedy."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DataError(ValueError):
    """Something in the user's data or on the user's disk that the user can mend."""


class DiskFullError(DataError):
    """No room to write; what was complete before is untouched."""


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that the disk, a quota or a file size limit is full."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        text = str(seen).lower()
        if "no space left on device" in text or "file too large" in text or "disk quota exceeded" in text:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@contextmanager
def explain_full_disk(directory: Path, kept: str) -> Iterator[None]:
    """Turn a full disk into a DiskFullError that names `directory` and says what was `kept`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskFullError) or not is_disk_full(error):
            raise
        raise DiskFullError(
            f"{directory}: no space left to write there ({error}). {kept} Free space (or "
            "raise the quota or the file size limit), or give another --root, and run the same command again."
        ) from error
