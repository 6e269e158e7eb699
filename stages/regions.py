"""The regions stage: regions of a corpus's pictures, by files, a detector or a grid → a store of them.

All splits are in one store, out/, whose rows are the corpus's samples in their order. Every process takes its
share of the rows and each row is computed alone, so that neither their number nor a kill changes a bit.
"""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

import pyarrow as pa
from pydantic import Field

from data_tools.corpus_source import CorpusSource
from data_tools.errors import explain_full_disk
from data_tools.regions.feature_files import Unfit
from data_tools.regions.store import MANIFEST, Layout, RegionError
from data_tools.regions.writer import RegionWriter, commit, prepare, write_missing
from data_tools.shards import ShardIndex
from learning.training import distributed
from stages.base import Job, Report, StageConfig, StageError, Stopped
from stages.region_sources import ABSENT, PictureSource, Source, make_source

T = TypeVar("T")

UNFINISHED = "regions.unfinished"  # in the stage's directory
REASONS = ("absent", "few_regions", "many_regions", "unreadable")
WAIT_S = 86_400.0  # a process that is done waits for the others' shares
SHOWN = 3  # keys that an error names


class Config(StageConfig):
    """Where the regions come from, and how they are kept."""

    roles: ClassVar[tuple[str, ...]] = ("corpus",)
    distributed: ClassVar[bool] = True
    cosmetic: ClassVar[frozenset[str]] = frozenset({"data"})

    kind: Literal["regions"] = "regions"
    source: Source
    data: CorpusSource = CorpusSource()
    dtype: Literal["float16", "float32"] = Field(default="float16", description="of the features on disk")
    max_missing_share: float = Field(
        default=0.001, ge=0, le=1, description="of the corpus's samples; more without regions are an error"
    )
    max_pixels: int = Field(default=50_000_000, ge=1, description="a stored picture with more is unreadable")

    def files(self) -> dict[str, Path]:
        return self.source.files() | self.data.files()

    def addresses(self) -> dict[str, str]:
        return self.data.addresses()

    def named_elsewhere(self) -> frozenset[str]:
        return self.data.named_elsewhere()


def run(config: Config, job: Job) -> Report:
    """Write the store beside out/, all processes together; rank 0 renames it there when it is whole."""
    joined_here = not distributed.is_initialized()
    device = distributed.init(timeout_s=WAIT_S)
    try:
        made_here = job.inputs["corpus"] / "out" if "corpus" in job.inputs else None
        corpus = config.data.place(made_here, job.recipe_directory)
        index = config.data.open(corpus, None, job.recipe_directory)
        source = make_source(config.source, index, job.recipe_directory, device, job.seed, config.max_pixels)
        return _Stored(config, job, index, source).run()
    except ValueError as error:
        raise StageError(f"regions: {error}") from error
    finally:
        if joined_here:
            distributed.shutdown()


class _Stored:
    """A store in the making, in this process."""

    def __init__(self, config: Config, job: Job, index: ShardIndex, source: PictureSource):
        self.config, self.job, self.index, self.source = config, job, index, source
        self.aside = job.directory / UNFINISHED
        self.layout = Layout(len(index), source.regions, source.width, config.dtype)

    def run(self) -> Report:
        self._together(self._prepare)
        missing: dict[int, Unfit] = {}
        stopped = self._together(lambda: self._share(missing))
        told = distributed.gather_objects({row: (why.reason, str(why)) for row, why in missing.items()})
        if any(stopped):
            raise Stopped("regions: stopped; run again to go on")
        rows = [
            self._row(row, *why)
            for row, why in sorted((row, why) for each in told for row, why in each.items())
        ]
        self._together(lambda: self._commit(rows))
        counts = {"pictures": len(self.index), "with_regions": len(self.index) - len(rows)}
        by_reason = Counter(row["reason"] for row in rows)
        counts |= {f"missing_{reason}": by_reason[reason] for reason in REASONS}
        return Report(counts, {f"regions/{name}": float(count) for name, count in counts.items()})

    def _prepare(self) -> None:
        """Rank 0: the empty files, or those of an earlier start, even of one that was killed at its end."""
        if distributed.rank() != 0:
            return
        if (self.job.out / MANIFEST).is_file() and not self.aside.exists():
            self.job.out.replace(self.aside)
        prepare(self.aside, self.layout)
        self._check_missing([self._row(row, "absent", ABSENT) for row in self.source.absent()])

    def _share(self, missing: dict[int, Unfit]) -> bool:
        """This process's rows; whether it was asked to stop."""
        mine = range(distributed.rank(), self.layout.rows, distributed.world_size())
        with (
            self.job.progress.task("regions: pictures", len(mine)) as task,
            RegionWriter(self.aside, self.layout) as writer,
        ):
            for row in mine:
                if self.job.should_stop():
                    writer.sync()
                    return True
                if not writer.is_whole(row):
                    self._write(writer, row, missing)
                task.advance()
            writer.sync()
        return False

    def _write(self, writer: RegionWriter, row: int, missing: dict[int, Unfit]) -> None:
        try:
            writer.write(row, self.source.of(row))
        except Unfit as why:
            missing[row] = why
            writer.write(row, None)
        except RegionError as error:
            raise RegionError(f"{self.index.where(row)}: {error}") from error

    def _row(self, row: int, reason: str, detail: str) -> dict[str, str]:
        """Of missing.parquet."""
        name = str(self.index.record(row).get("url") or "")
        return {"key": self.index.keys[row], "name": name, "reason": reason, "detail": detail}

    def _commit(self, missing: list[dict[str, str]]) -> None:
        """Rank 0: what stands beside the arrays, and the store's place."""
        if distributed.rank() != 0:
            return
        self._check_missing(missing)
        how = self.config.source.model_dump(mode="json", by_alias=True)
        samples = pa.table({"key": self.index.keys, "picture": self.index.pictures})
        commit(
            self.aside, self.layout, samples, missing, self.source.class_count, self.source.class_names, how
        )
        shutil.rmtree(self.job.out, ignore_errors=True)
        self.aside.replace(self.job.out)

    def _check_missing(self, missing: list[dict[str, str]]) -> None:
        allowed = int(self.config.max_missing_share * len(self.index))
        if len(missing) > allowed:
            path = write_missing(self.aside, missing)
            some = "; ".join(f"{row['key']} ({row['detail']})" for row in missing[:SHOWN])
            raise RegionError(
                f"{len(missing)} of {len(self.index)} samples have no regions, max_missing_share allows "
                f"{allowed}: {some}; {path} lists them all"
            )

    def _together(self, act: Callable[[], T]) -> list[T]:
        """What `act` gave on every rank; an error of any of them on all, so that none is left waiting."""
        result: T | None = None
        problem = None
        try:
            with explain_full_disk(self.job.directory, "What is written is kept."):
                result = act()
        except (ValueError, OSError) as error:
            problem = str(error)
        told = distributed.gather_objects((result, problem))
        found = next((each for _, each in told if each is not None), None)
        if found is not None:
            raise RegionError(found)
        return [each for each, _ in told]  # type: ignore[misc]
