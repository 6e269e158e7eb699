"""One piece of a crawl in one worker process: img2dataset's downloader with Tandem's checks, kept as fetched.

img2dataset loops over the URLs with threads, retries, reads X-Robots-Tag, hashes, and writes tar, Parquet and
statistics. What stands here is handed to it: the opener's guard, the look at each picture in place of its
resizer (so that nothing is re-encoded), and a writer that finishes a piece by rename and never swallows a
full disk. Importing this file takes seconds (img2dataset brings albumentations, webdataset and wandb along),
so only workers do.
"""

import os
import shutil
import threading
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any, BinaryIO

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

from img2dataset.downloader import Downloader
from img2dataset.writer import WebDatasetSampleWriter

from data_tools.opener import Guard, install
from data_tools.pictures import PictureError, PictureRules, open_picture, picture_extension

SHARD_DIGITS = 5


class Look:
    """Takes the place of img2dataset's resizer: the bytes as they came, or the reason against them."""

    def __init__(self, rules: PictureRules) -> None:
        self.rules = rules

    def __call__(
        self, stream: BinaryIO, _: object = None
    ) -> tuple[bytes | None, Any, Any, Any, Any, str | None]:
        data = stream.read()
        try:
            width, height = open_picture(data, max_pixels=self.rules.max_pixels, name="picture").size
        except PictureError as error:
            return None, None, None, None, None, f"{error.reason}: {error.detail}"
        if min(width, height) < self.rules.min_side_px:
            return None, None, None, None, None, f"too_small: {width} x {height} px"
        if max(width, height) > self.rules.max_aspect * min(width, height):
            return None, None, None, None, None, f"bad_aspect: {width} x {height} px"
        return data, width, height, width, height, None


class PieceWriter(WebDatasetSampleWriter):
    """img2dataset's tar and Parquet of one piece: in a folder of its own until whole, true file endings."""

    def __init__(
        self, shard_id: int, folder: str, save_caption: bool, digits: int, schema: Any, encode_format: str
    ) -> None:
        self._final = Path(folder)
        self._aside = self._final / f".piece-{shard_id:0{digits}d}-{os.getpid()}"
        shutil.rmtree(self._aside, ignore_errors=True)
        self._aside.mkdir()
        self._error: OSError | None = None
        super().__init__(shard_id, str(self._aside), save_caption, digits, schema, encode_format)

    def write(self, img_str: bytes | None, key: str, caption: str | None, meta: dict[str, Any]) -> None:
        if self._error is not None:  # img2dataset would go on without the sample: close() raises instead
            return
        if img_str is not None:
            self.encode_format = picture_extension(img_str)
        try:
            super().write(img_str, key, caption, meta)
        except OSError as error:
            self._error = error

    def close(self) -> None:
        if self._error is not None:
            raise self._error
        super().close()
        _stop_if_orphan()  # the site may have gone with the parent: its failures are none of the web's
        for path in sorted(self._aside.iterdir()):
            path.replace(self._final / path.name)
        self._aside.rmdir()


class PieceDownloader(Downloader):
    """img2dataset's downloader, whose failures of a whole piece are raised, not printed."""

    def __call__(self, row: tuple[int, str]) -> int:
        self.download_shard(row)
        return int(row[0])


def make_downloader(
    folder: Path, rules: PictureRules, guard: Guard, threads: int, retries: int, per_piece: int
) -> Any:
    """The downloader of all pieces: pickled to the workers, called with (piece, its list of URLs)."""
    return PieceDownloader(
        sample_writer_class=PieceWriter,
        resizer=Look(rules),
        thread_count=threads,
        save_caption=False,
        extract_exif=False,
        output_folder=str(folder),
        column_list=["url"],
        timeout=guard.timeout_s,
        number_sample_per_shard=per_piece,
        oom_shard_count=SHARD_DIGITS,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format="webp",
        retries=retries,
        user_agent_token="tandem",
        disallowed_header_directives=["noai", "noimageai", "noindex", "noimageindex"],
    )


_DOWNLOADER: Any = None


def start_worker(
    folder: Path, rules: PictureRules, guard: Guard, threads: int, retries: int, per_piece: int
) -> None:
    """Initializer of a worker process."""
    global _DOWNLOADER
    install(guard)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _DOWNLOADER = make_downloader(folder, rules, guard, threads, retries, per_piece)


def fetch_piece(piece: int, url_list: str) -> int:
    """Fetch one piece; its tar, Parquet and statistics lie in the folder when this returns."""
    return int(_DOWNLOADER((piece, url_list)))


def _die_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _stop_if_orphan() -> None:
    parent = parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)
