"""What a frozen image tower gives for every picture of a split, on disk: it runs once a picture.

<directory>/<identity>.tokens   float32 rows (n, v), one a sample, in the order of the index
<directory>/<identity>.sums     uint32 a row: crc32 of its bytes (never 0); 0 for a row that is not there

The identity hashes the tower's weights, the preparation of the pictures and the corpus, so that a later
stage with the same tower takes an earlier one's rows over by a hard link. A row is computed alone, so that it
depends on no other picture, and a resume or another number of ranks changes no bit. The ranks share the work;
the directory is on a file system that all of them see.
"""

import hashlib
import os
import shutil
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor, nn

from learning.training import distributed

SPARE = 1.05  # free space asked for, as a multiple of what is written
_FLOAT_BYTES = _SUM_BYTES = 4


def identity(tower: nn.Module, *others: object) -> str:
    """A hash of the tower's state and of whatever else shapes its tokens."""
    digest = hashlib.sha256(repr(others).encode())
    for name, value in sorted(tower.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:20]


class TowerTokens:
    """The tokens of a split's pictures. All ranks call `fill` together; then `row` reads."""

    def __init__(
        self, tower: Callable[[Tensor], Tensor], rows: int, shape: tuple[int, int], directory: Path, name: str
    ):
        """`tower`: (1, 3, h, w) → (1, n, v), with `shape` = (n, v). `name`: what `identity` gave."""
        self.tower, self.rows, self.shape = tower, rows, shape
        self.path, self.sums_path = directory / f"{name}.tokens", directory / f"{name}.sums"
        self._row_bytes = shape[0] * shape[1] * _FLOAT_BYTES
        self._there: np.ndarray | None = None
        self._values: np.ndarray | None = None

    def fill(
        self,
        pixels: Callable[[int], Tensor | None],
        earlier: Iterable[Path] = (),
        advance: Callable[[int], None] = lambda rows: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Compute what is missing, each rank its share; False, on every rank, when one was asked to stop.

        pixels: of a row, (3, h, w); None for a picture that cannot be read: its row stays empty.
        earlier: directories of stages that may have the same rows.

        Raises ValueError, on every rank, when there is no room for the rows.
        """
        problem = self._prepare(earlier) if distributed.rank() == 0 else None
        problem = distributed.broadcast_object(problem)
        if problem is None:
            stopped, problem = self._share(pixels, advance, should_stop)
            told = distributed.gather_objects((stopped, problem))  # and all wait for all here
            problem = next((each for _, each in told if each is not None), None)
        if problem is not None:
            raise ValueError(f"{self.path.parent}: {problem}; make room, or set data.cache: memory")
        if any(each for each, _ in told):
            return False
        self._there = np.fromfile(self.sums_path, np.uint32) != 0
        self._values = np.memmap(self.path, np.float32, "r", shape=(self.rows, *self.shape))
        return True

    def _share(
        self,
        pixels: Callable[[int], Tensor | None],
        advance: Callable[[int], None],
        should_stop: Callable[[], bool],
    ) -> tuple[bool, str | None]:
        """This rank's rows: whether it was asked to stop, and what went wrong (told, as the others wait)."""
        try:
            with self.path.open("r+b") as file, self.sums_path.open("r+b") as sums:
                for row in range(distributed.rank(), self.rows, distributed.world_size()):
                    if should_stop():
                        return True, None
                    if not self._whole(file.fileno(), sums.fileno(), row):
                        self._compute(file.fileno(), sums.fileno(), row, pixels)
                    advance(1)
                os.fsync(file.fileno())
                os.fsync(sums.fileno())
        except OSError as error:
            return False, f"the tower's tokens cannot be kept: {error}"
        return False, None

    def row(self, position: int, pixels: Callable[[], Tensor]) -> Float32[Tensor, "n v"]:
        """The tokens of a picture: those on disk, else (before `fill`, and for an empty row) the tower's."""
        if self._there is None or self._values is None or not self._there[position]:
            return self._run(pixels())
        return torch.from_numpy(np.array(self._values[position]))

    def _run(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return self.tower(pixels[None])[0].to("cpu", torch.float32)

    def _prepare(self, earlier: Iterable[Path]) -> str | None:
        """Rank 0: take an earlier stage's rows over, or make empty files; what is wrong, if anything is."""
        directory = self.path.parent
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for stage in earlier:
                self._link(stage)
            missing = self.rows * self._row_bytes - _allocated(self.path)
            free = shutil.disk_usage(directory).free
            if free < missing * SPARE:
                return (
                    f"{free // 2**20} MiB are free, the tokens of {self.rows} pictures need "
                    f"{int(missing * SPARE) // 2**20} MiB"
                )
            for path, size in ((self.path, self._row_bytes), (self.sums_path, _SUM_BYTES)):
                with path.open("ab") as file:
                    file.truncate(size * self.rows)  # zeros where nothing was written, and no space taken
        except OSError as error:
            return f"the tower's tokens cannot be kept: {error}"
        return None

    def _link(self, stage: Path) -> None:
        """The tokens first: sums without them would be found wrong row by row, and computed again."""
        for own in (self.path, self.sums_path):
            theirs = stage / own.name
            if theirs.is_file() and not own.exists():
                try:
                    os.link(theirs, own)
                except OSError:  # another file system
                    shutil.copyfile(theirs, own.with_suffix(".tmp"))
                    own.with_suffix(".tmp").replace(own)

    def _whole(self, file: int, sums: int, row: int) -> bool:
        told = int.from_bytes(os.pread(sums, _SUM_BYTES, row * _SUM_BYTES), "little")
        return told != 0 and told == _sum(os.pread(file, self._row_bytes, row * self._row_bytes))

    def _compute(self, file: int, sums: int, row: int, pixels: Callable[[int], Tensor | None]) -> None:
        picture = pixels(row)
        data = b"" if picture is None else self._run(picture).contiguous().numpy().tobytes()
        if data:
            os.pwrite(file, data, row * self._row_bytes)
        os.pwrite(sums, (_sum(data) if data else 0).to_bytes(_SUM_BYTES, "little"), row * _SUM_BYTES)


def _sum(data: bytes) -> int:
    return zlib.crc32(data) or 1  # 0 says that there is no row


def _allocated(path: Path) -> int:
    return path.stat().st_blocks * 512 if path.is_file() else 0
