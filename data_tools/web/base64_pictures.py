"""A file of pictures as text, `<id><TAB><base64>` a line (MUGE's MR_train_imgs.tsv): read by id, where it
lies."""

import base64
import binascii
import os
from pathlib import Path

from data_tools.errors import DataError


class Base64Pictures:
    """The pictures of one file. Opening it reads it through once; memory grows with the number of its
    lines."""

    def __init__(self, path: Path) -> None:
        """Raises DataError for no such file, a line without a tab, or an id that stands twice."""
        self._places: dict[str, tuple[int, int]] = {}
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise DataError(
                f"{path}: cannot be opened ({error.strerror}). Check `local_site.folder`."
            ) from error
        start = 0
        for number, line in enumerate(self._file, 1):
            name, tab, text = line.rstrip(b"\r\n").partition(b"\t")
            if not tab or not name:
                raise DataError(f"{path}: line {number}: not an id, a tab and a picture in base64.")
            if (
                self._places.setdefault(name.decode("utf-8", "replace"), (start + len(name) + 1, len(text)))[
                    0
                ]
                < start
            ):
                raise DataError(
                    f"{path}: line {number}: the id {name.decode('utf-8', 'replace')!r} stands twice."
                )
            start += len(line)

    def read(self, name: str) -> bytes | None:
        """The picture of an id; None where there is none, or its text is no base64 (plain or URL-safe)."""
        place = self._places.get(name)
        if place is None:
            return None
        text = os.pread(self._file.fileno(), place[1], place[0])
        try:
            return base64.b64decode(text.translate(bytes.maketrans(b"-_", b"+/")), validate=True)
        except binascii.Error:
            return None

    def close(self) -> None:
        self._file.close()
