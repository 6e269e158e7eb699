"""The crawl stage: the filter's pairs → their pictures as fetched, with one status a URL."""

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from data_tools.crawl import REASONS, CrawlOptions, crawl
from data_tools.errors import DataError, explain_full_disk
from data_tools.local_site import LocalSite
from data_tools.opener import Guard, Mirror
from data_tools.pictures import PictureRules
from stages.base import Frozen, Job, Report, StageConfig, StageError, Stopped


class LocalSiteConfig(Frozen):
    """A folder that stands for a site of the web: the stage serves it on 127.0.0.1 while it crawls."""

    url_prefix: str = Field(description="URLs that start with it are fetched from the folder")
    folder: Path = Field(description="relative to the recipe")

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


def run(config: Config, job: Job) -> Report:
    """Write out/tars, then out/pairs.parquet (the input's), out/dropped.parquet and out/pictures.parquet."""
    if job.task_count != 1:
        raise StageError("crawl: it runs as one task with several processes; set its task count to 1")
    pairs = job.inputs["pairs"] / "out" / "pairs.parquet"
    try:
        urls = pc.unique(pq.read_table(pairs, columns=["url"])["url"]).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise StageError(f"{pairs}: cannot be read ({error}). Run the filter stage again.") from error
    job.out.mkdir(parents=True, exist_ok=True)
    kept = "Finished pieces of the crawl are kept; the next run goes on after them."
    try:
        with explain_full_disk(job.out, kept):
            table = _crawl(config, job, urls)
            if table is None:
                raise Stopped("crawl: stopped between pieces; run again to go on")
            _write(table, pairs, job.out)
    except DataError as error:
        raise StageError(str(error)) from error
    statuses = table["status"].to_pylist()
    counts = {"urls": len(statuses), "kept": statuses.count("ok")}
    counts |= {f"dropped_{reason}": statuses.count(reason) for reason in REASONS}
    if counts["urls"] != sum(n for name, n in counts.items() if name != "urls"):
        raise RuntimeError(
            f"the crawl has a status without a name: {sorted(set(statuses) - {'ok', *REASONS})}"
        )
    return Report(counts=counts, metrics={f"crawl/{name}": float(n) for name, n in counts.items()})


def _crawl(config: Config, job: Job, urls: list[str]) -> pa.Table | None:
    with ExitStack() as stack:
        mirror = None
        if config.local_site is not None:
            folder = job.recipe_directory / config.local_site.folder
            if not folder.is_dir():
                raise StageError(f"{folder}: no such folder. Check `local_site.folder` in the recipe.")
            site = stack.enter_context(LocalSite(folder))
            mirror = Mirror(config.local_site.url_prefix, site.address)
        guard = Guard(config.timeout_s, config.max_bytes, config.allow_private, config.use_proxy, mirror)
        options = CrawlOptions(
            guard, config.processes or job.processes, config.threads, config.retries, config.urls_per_piece
        )
        rules = PictureRules(config.min_side_px, config.max_aspect, config.max_pixels)
        task = stack.enter_context(job.progress.task("crawl", len(urls)))
        return crawl(urls, job.out, rules, options, task.advance, job.should_stop)


def _write(table: pa.Table, pairs: Path, out: Path) -> None:
    """The stage's tables, each by temp file and rename."""
    dropped = table.filter(pc.not_equal(table["status"], "ok"))
    dropped = pa.table({"url": dropped["url"], "reason": dropped["status"], "detail": dropped["detail"]})
    pq.write_table(dropped, out / "dropped.parquet.tmp")
    pq.write_table(table, out / "pictures.parquet.tmp")
    shutil.copyfile(pairs, out / "pairs.parquet.tmp")
    for name in ("pairs", "dropped", "pictures"):
        (out / f"{name}.parquet.tmp").replace(out / f"{name}.parquet")
