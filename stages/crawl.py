"""The crawl stage: the filter's pairs → their pictures as fetched, with one status a URL."""

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from data_tools.crawl import REASONS, CrawlError, CrawlOptions, crawl, require_some
from data_tools.crawl_shares import ShareError, join, share_of
from data_tools.errors import DataError, explain_full_disk
from data_tools.local_site import LocalSite
from data_tools.opener import Guard, Mirror
from data_tools.pictures import PictureRules
from stages.base import Frozen, Job, Report, SpoiltTasks, StageConfig, StageError, Stopped

logger = logging.getLogger(__name__)


class LocalSiteConfig(Frozen):
    """A folder that stands for a site of the web: the stage serves it on 127.0.0.1 while it crawls."""

    url_prefix: str = Field(description="URLs that start with it are fetched from the folder")
    folder: Path | dict[str, Path] = Field(
        description="relative to the recipe; or several, each by the name that follows the prefix in its "
        "URLs. A .tsv (id, base64 of a picture, as MUGE's) stands for a folder of <id>.jpg"
    )

    def folders(self, recipe_directory: Path) -> dict[str, Path]:
        """By the first part of the path behind the prefix; "" for all of them."""
        named = self.folder if isinstance(self.folder, dict) else {"": self.folder}
        return {name: recipe_directory / folder for name, folder in named.items()}

    @field_validator("folder", mode="before")
    @classmethod
    def _are_folders(cls, value: Any) -> Any:
        """One message a mistake, where the union of the type would give two."""
        named = value.items() if isinstance(value, dict) else [("all", value)]
        for name, folder in named:
            if not isinstance(folder, str | Path) or not re.fullmatch("[^/]+", str(name)):
                raise ValueError(f"{name}: {folder!r}: a name without / and a folder are wanted")
        return value

    @field_validator("url_prefix")
    @classmethod
    def _is_http(cls, value: str) -> str:
        if not value.startswith("http://") or not value.endswith("/"):
            raise ValueError(
                f"'{value}' must start with http:// and end with /, say http://pictures.example/"
            )
        return value


class Config(StageConfig):
    kind: Literal["crawl"] = "crawl"
    local_site: LocalSiteConfig | None = Field(default=None, description="null: the real web")
    timeout_s: float = Field(default=10.0, gt=0, description="of each wait, and of a whole body")
    retries: int = Field(default=1, ge=0, le=10)
    processes: int | None = Field(default=None, ge=1, description="null: what the machine gives the stage")
    threads: int = Field(default=16, ge=1, description="a process")
    urls_per_piece: int = Field(default=500, ge=2, description="what a killed crawl loses at most, a process")
    allow_private: bool = Field(default=False, description="fetch from private and local addresses too")
    use_proxy: bool = Field(
        default=False, description="the environment's; it must refuse private addresses itself"
    )
    min_side_px: int = Field(default=100, ge=1)
    max_aspect: float = Field(default=4.0, ge=1, description="longer side over shorter")
    max_pixels: int = Field(default=50_000_000, ge=1, description="pictures of more are not decoded")
    max_bytes: int = Field(default=20_000_000, ge=1)

    cosmetic: ClassVar[frozenset[str]] = frozenset({"processes", "threads", "urls_per_piece"})
    roles: ClassVar[tuple[str, ...]] = ("pairs",)
    array: ClassVar[bool] = True


def run(config: Config, job: Job) -> Report:
    """Write out/tars, then out/pairs.parquet (the input's), out/dropped.parquet and out/pictures.parquet."""
    urls = _urls(job)
    with _mendable(job.out):
        table = _crawl(config, job, urls)
        require_some(table, [job.out])
        return _complete(table, job)


def run_task(config: Config, job: Job) -> Report:
    """Fetch one share of the URLs: the task's out/tars and out/pictures.parquet."""
    urls = share_of(_urls(job), job.task_index, job.task_count)
    with _mendable(job.out):
        table = _crawl(config, job, urls)
        _write({"pictures": table}, job.out)
    counts = _counts(table)
    if urls and not counts["kept"]:  # no error: a small share may be so; `finish` asks for one picture of all
        logger.warning("crawl: not one of %d URLs gave a picture; is this node on the network?", len(urls))
    return _report(counts)


def finish(config: Config, job: Job) -> Report:
    """Write what `run` writes, from what the tasks fetched; the tars lie in a folder a task."""
    with _mendable(job.out), job.progress.task("join", job.task_count) as task:
        try:
            table = join(job.task_outs, job.out, task.advance)
        except ShareError as error:
            raise SpoiltTasks(f"{error}. Run task {error.share} again.", [error.share]) from error
        try:
            require_some(table, job.task_outs)
        except CrawlError as error:
            raise SpoiltTasks(str(error), range(job.task_count)) from error
        return _complete(table, job)


@contextmanager
def _mendable(out: Path) -> Iterator[None]:
    """What is wrong with the data or the disk, as a stage tells it."""
    kept = "Finished pieces of the crawl are kept; the next run goes on after them."
    try:
        with explain_full_disk(out, kept):
            yield
    except DataError as error:
        raise StageError(str(error)) from error


def _pairs(job: Job) -> Path:
    return job.inputs["pairs"] / "out" / "pairs.parquet"


def _urls(job: Job) -> list[str]:
    """Those of the pairs, each once."""
    try:
        urls: list[str] = pc.unique(pq.read_table(_pairs(job), columns=["url"])["url"]).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise StageError(f"{_pairs(job)}: cannot be read ({error}). Run the filter stage again.") from error
    return urls


def _crawl(config: Config, job: Job, urls: list[str]) -> pa.Table:
    """Fetch the URLs into out/tars. Raises Stopped between pieces when asked to."""
    job.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        mirror = None
        if config.local_site is not None:
            folders = config.local_site.folders(job.recipe_directory)
            for folder in folders.values():
                if not folder.exists():
                    raise StageError(f"{folder}: no such folder. Check `local_site.folder` in the recipe.")
            site = stack.enter_context(LocalSite(folders))
            mirror = Mirror(config.local_site.url_prefix, site.address)
        guard = Guard(config.timeout_s, config.max_bytes, config.allow_private, config.use_proxy, mirror)
        options = CrawlOptions(
            guard, config.processes or job.processes, config.threads, config.retries, config.urls_per_piece
        )
        rules = PictureRules(config.min_side_px, config.max_aspect, config.max_pixels)
        task = stack.enter_context(job.progress.task("crawl", len(urls)))
        table = crawl(urls, job.out, rules, options, task.advance, job.should_stop)
    if table is None:
        raise Stopped("crawl: stopped between pieces; run again to go on")
    return table


def _complete(table: pa.Table, job: Job) -> Report:
    """The stage's tables and counts, once all URLs have a status."""
    counts = _counts(table)
    dropped = table.filter(pc.not_equal(table["status"], "ok"))
    dropped = pa.table({"url": dropped["url"], "reason": dropped["status"], "detail": dropped["detail"]})
    shutil.copyfile(_pairs(job), job.out / "pairs.parquet.tmp")
    (job.out / "pairs.parquet.tmp").replace(job.out / "pairs.parquet")
    _write({"dropped": dropped, "pictures": table}, job.out)
    return _report(counts)


def _counts(table: pa.Table) -> dict[str, int]:
    statuses = table["status"].to_pylist()
    counts = {"urls": len(statuses), "kept": statuses.count("ok")}
    counts |= {f"dropped_{reason}": statuses.count(reason) for reason in REASONS}
    if counts["urls"] != sum(n for name, n in counts.items() if name != "urls"):
        raise RuntimeError(
            f"the crawl has a status without a name: {sorted(set(statuses) - {'ok', *REASONS})}"
        )
    return counts


def _report(counts: dict[str, int]) -> Report:
    return Report(counts=counts, metrics={f"crawl/{name}": float(n) for name, n in counts.items()})


def _write(tables: dict[str, pa.Table], out: Path) -> None:
    """Tables as Parquet files of these names, each by temp file and rename."""
    for name, table in tables.items():
        pq.write_table(table, out / f"{name}.parquet.tmp")
        (out / f"{name}.parquet.tmp").replace(out / f"{name}.parquet")
