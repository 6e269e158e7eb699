"""Fingerprints of many pictures: made in worker processes, a file a piece, so that a kill costs no more than
the pieces at hand; joined into one Parquet file; opened for a search."""

import hashlib
import io
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_tools.clean.fingerprints import CHROMA, THUMBNAIL, WINDOWS, Fingerprint, fingerprint
from data_tools.clean.near_duplicates import Pictures
from data_tools.clean.open_nsfw import OpenNsfw
from data_tools.errors import DataError
from data_tools.pictures import EncodedPicture, PictureError
from data_tools.workers import die_with_parent

FILE = "fingerprints.parquet"
PIECE = 1000  # pictures; fixed, so that the network's batches are the same for any number of workers
_ENOUGH_PX = 128  # a side, to make the samples of a fingerprint from
_NSFW_PX = 256

SCHEMA = pa.schema(
    [
        ("url", pa.string()),
        ("sha256", pa.string()),
        ("hashes", pa.binary(len(WINDOWS) * 8)),  # little endian
        ("grey", pa.binary(THUMBNAIL**2)),
        ("colour", pa.binary(2 * CHROMA**2)),
        ("nsfw", pa.float32()),  # Open NSFW's score from 0 to 1; null where it was not asked for
    ]
)


class FingerprintError(DataError):
    """Pictures that cannot be read, or fingerprints that cannot be used."""


@dataclass(frozen=True)
class Making:
    """How fingerprints are made."""

    max_pixels: int = 50_000_000  # a picture of more is not decoded
    nsfw_model: Path | None = None  # None: not scored
    processes: int = 1


def row(url: str, sha256: str, made: Fingerprint, nsfw: float | None) -> dict[str, object]:
    """A row of SCHEMA."""
    hashes = made.hashes.astype("<u8").tobytes()
    values = {"hashes": hashes, "grey": made.grey.tobytes(), "colour": made.colour.tobytes()}
    return {"url": url, "sha256": sha256, **values, "nsfw": nsfw}


def make(
    pictures: pa.Table,
    folder: Path,
    out: Path,
    how: Making,
    on_progress: Callable[[int], None],
    should_stop: Callable[[], bool],
) -> bool:
    """Write the fingerprints of all pictures to `out`, in their order. False when stopped between pieces.

    Args:
        pictures: columns url, sha256, tar (relative to `folder`), offset, bytes.
        on_progress: called with a number of pictures that are done.

    Raises:
        FingerprintError: a picture cannot be read or decoded; a worker died.
    """
    if _is_whole(out, pictures):  # an earlier run was stopped after it
        on_progress(pictures.num_rows)
        return True
    aside = out.with_name(f"{out.name}.pieces")
    aside.mkdir(parents=True, exist_ok=True)
    starts = range(0, pictures.num_rows, PIECE)
    paths = [aside / f"{start // PIECE:06d}.parquet" for start in starts]
    pieces = [pictures.slice(start, PIECE) for start in starts]
    todo = []
    for place, (path, piece) in enumerate(zip(paths, pieces, strict=True)):
        if _is_whole(path, piece):
            on_progress(piece.num_rows)
        else:
            todo.append(place)
    work = {place: (pieces[place], folder, paths[place]) for place in todo}
    if not _run(work, how, on_progress, should_stop):
        return False
    _join(paths, out)
    for path in paths:
        path.unlink()
    aside.rmdir()
    return True


def _is_whole(path: Path, piece: pa.Table) -> bool:
    try:
        found = pq.read_table(path, columns=["sha256"])["sha256"]
    except (OSError, pa.ArrowException):
        return False
    return bool(found.to_pylist() == piece["sha256"].to_pylist())


def _run(
    work: dict[int, tuple[pa.Table, Path, Path]],
    how: Making,
    on_progress: Callable[[int], None],
    should_stop: Callable[[], bool],
) -> bool:
    left, running = list(reversed(work)), dict[Future[int], int]()
    if not left:
        return True
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(how.processes, len(left)), context, initializer=_start_worker, initargs=(how,)
    ) as pool:
        while left or running:
            while left and len(running) < how.processes and not should_stop():
                place = left.pop()
                running[pool.submit(_make_piece, *work[place])] = place
            if not running:
                return False
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                running.pop(future)
                try:
                    on_progress(future.result())
                except BrokenProcessPool as error:
                    raise FingerprintError(
                        "a process that looks at pictures was killed (out of memory?). Finished pieces are "
                        "kept: run again, with fewer `processes`."
                    ) from error
    return True


_HOW = Making()
_NSFW: OpenNsfw | None = None


def _start_worker(how: Making) -> None:
    global _HOW, _NSFW
    die_with_parent()
    _HOW = how
    _NSFW = OpenNsfw(how.nsfw_model) if how.nsfw_model is not None else None


def _make_piece(piece: pa.Table, folder: Path, path: Path) -> int:
    """Write one piece by rename; how many pictures it has."""
    rows, to_score = [], []
    for data, one in zip(read_pictures(piece, folder), piece.to_pylist(), strict=True):
        picture = EncodedPicture(data, max_pixels=_HOW.max_pixels, name=one["url"])
        try:
            rows.append(row(one["url"], one["sha256"], fingerprint(picture.decoded((_ENOUGH_PX,) * 2)), None))
            if _NSFW is not None:
                to_score.append(_NSFW.prepare(picture.decoded((_NSFW_PX,) * 2)))
        except PictureError as error:
            raise FingerprintError(f"{error}. Run the stage that fetched it again.") from error
    if _NSFW is not None:
        for one, score in zip(rows, _NSFW.scores(to_score), strict=True):
            one["nsfw"] = score
    unfinished = path.with_suffix(".tmp")
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), unfinished)
    unfinished.replace(path)
    return piece.num_rows


def read_pictures(piece: pa.Table, folder: Path) -> Iterator[bytes]:
    """The bytes of each row's picture, from the crawl's tars. FingerprintError where they are not there."""
    opened: dict[str, io.FileIO] = {}
    try:
        for one in piece.select(["tar", "offset", "bytes", "url"]).to_pylist():
            path = folder / one["tar"]
            try:
                if one["tar"] not in opened:
                    opened[one["tar"]] = io.FileIO(path)
                data = os.pread(opened[one["tar"]].fileno(), one["bytes"], one["offset"])
            except OSError as error:
                raise FingerprintError(f"{path}: {error.strerror}. Run the crawl stage again.") from error
            if len(data) != one["bytes"]:
                raise FingerprintError(f"{path}: cut short at {one['url']}. Run the crawl stage again.")
            yield data
    finally:
        for file in opened.values():
            file.close()


def _join(paths: Iterable[Path], out: Path) -> None:
    unfinished = out.with_name(f"{out.name}.tmp")
    with pq.ParquetWriter(unfinished, SCHEMA) as writer:
        for path in paths:
            writer.write_table(pq.read_table(path, schema=SCHEMA))
    unfinished.replace(out)


def write_rows(rows: Iterable[dict[str, object]], out: Path) -> None:
    """Write rows of SCHEMA that were made in this process, by rename."""
    unfinished = out.with_name(f"{out.name}.tmp")
    with pq.ParquetWriter(unfinished, SCHEMA) as writer:
        batch: list[dict[str, object]] = []
        for one in rows:
            batch.append(one)
            if len(batch) == PIECE:
                writer.write_table(pa.Table.from_pylist(batch, SCHEMA))
                batch = []
        writer.write_table(pa.Table.from_pylist(batch, SCHEMA))
    unfinished.replace(out)


@dataclass(frozen=True)
class Opened:
    """A file of fingerprints: row k of all is of one picture. Thumbnails lie on disk until they are read."""

    pictures: Pictures
    urls: pa.ChunkedArray
    sha256: pa.ChunkedArray
    nsfw: np.ndarray  # NaN where it was not scored


def open_fingerprints(path: Path, scratch: Path, wanted: pa.Array | None = None) -> Opened:
    """Open a file of fingerprints, or those rows of it whose sha256 is `wanted`.

    The thumbnails are laid out in `scratch`/<a name>.raw, which is removed at once: they are there while they
    are open. Raises FingerprintError where the file is damaged.
    """
    try:
        with pq.ParquetFile(path) as file:
            names = pq.read_table(path, columns=["url", "sha256", "nsfw"])
            chosen = None if wanted is None else pc.is_in(names["sha256"], value_set=wanted)
            kept = names if chosen is None else names.filter(chosen)
            hashes = np.empty((kept.num_rows, len(WINDOWS)), "<u8")
            thumbnails = _on_disk(kept.num_rows, scratch, path)
            start = read = 0
            for batch in file.iter_batches(batch_size=4096, columns=["hashes", "grey", "colour"]):
                rows = batch if chosen is None else batch.filter(_slice(chosen, read, batch.num_rows))
                read += batch.num_rows
                here = slice(start, start + rows.num_rows)
                hashes[here] = _bytes_of(rows["hashes"]).view("<u8")
                thumbnails[here, : THUMBNAIL**2] = _bytes_of(rows["grey"])
                thumbnails[here, THUMBNAIL**2 :] = _bytes_of(rows["colour"])
                start = here.stop
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise FingerprintError(f"{path}: cannot be read ({error}). Run the clean stage again.") from error
    pictures = Pictures(
        hashes.astype(np.uint64, copy=False),
        thumbnails[:, : THUMBNAIL**2].reshape(-1, THUMBNAIL, THUMBNAIL),
        thumbnails[:, THUMBNAIL**2 :].reshape(-1, 2, CHROMA, CHROMA),
    )
    scores = kept["nsfw"].to_numpy(zero_copy_only=False).astype(np.float64)
    return Opened(pictures, kept["url"], kept["sha256"], scores)


def _slice(chosen: pa.ChunkedArray, start: int, length: int) -> pa.Array:
    part = chosen.slice(start, length)
    return part.combine_chunks() if isinstance(part, pa.ChunkedArray) else part


def _bytes_of(column: pa.Array) -> np.ndarray:
    """A column of fixed-size binaries as uint8 [rows, size]."""
    size = column.type.byte_width
    data = np.frombuffer(column.buffers()[1], np.uint8)[column.offset * size :]
    return data[: len(column) * size].reshape(len(column), size)


def _on_disk(n: int, scratch: Path, source: Path) -> np.ndarray:
    """uint8 [n, bytes of the thumbnails] in a file without a name."""
    size = THUMBNAIL**2 + 2 * CHROMA**2
    if n == 0:
        return np.zeros((0, size), np.uint8)
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / f"thumbnails-{hashlib.sha256(str(source).encode()).hexdigest()[:8]}-{os.getpid()}.raw"
    with path.open("wb+") as file:
        path.unlink()
        os.posix_fallocate(file.fileno(), 0, n * size)  # a full disk is told here, not by a signal later
        return np.memmap(file, np.uint8, "r+", shape=(n, size))
