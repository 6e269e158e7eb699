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

from data_tools.errors import DataError, explain_full_disk
from data_tools.pictures import PictureRules
from data_tools.web.crawl import REASONS, Crawled, CrawlError, CrawlOptions, crawl, require_some
from data_tools.web.local_site import LocalSite
from data_tools.web.opener import Guard, Mirror
from data_tools.web.politeness import Limits
from data_tools.web.reuse import PICTURES
from data_tools.web.shares import ShareError, join, share_of
from data_tools.web.statistics import summary
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
    """Fields of pace alone are cosmetic; so is who does the work. The limits of time and tries are not: they
    decide whether a slow site's pictures are there."""

    kind: Literal["crawl"] = "crawl"
    local_site: LocalSiteConfig | None = Field(default=None, description="null: the real web")
    user_agent: str = Field(
        default="tandem", pattern="^[A-Za-z_-]+$", description="product token, to servers and in robots.txt"
    )
    robots: bool = Field(default=True, description="obey robots.txt (RFC 9309)")
    timeout_s: float = Field(default=10.0, gt=0, description="of each wait on the network")
    request_deadline_s: float = Field(
        default=30.0, gt=0, description="of one request in all, from the name's lookup to the body's end"
    )
    piece_deadline_s: float = Field(
        default=3600.0, gt=0, description="of a piece, from its first request; what is left then is dropped"
    )
    retries: int = Field(default=2, ge=0, le=10, description="after 429, 5xx, timeouts, broken connections")
    backoff_s: float = Field(
        default=1.0, gt=0, le=60, description="before the first retry, doubled for each one more, with jitter"
    )
    retry_after_max_s: float = Field(
        default=120.0, ge=0, description="a server whose Retry-After asks for more is not asked again"
    )
    again: int = Field(
        default=0,
        ge=0,
        description="raise it to ask again for what failed for a time; all else is taken over",
    )
    per_host: int = Field(default=4, ge=1, description="requests at a time to one host")
    host_delay_s: float = Field(
        default=0.1, ge=0, le=600, description="between the starts of two requests to one host"
    )
    crawl_delay_max_s: float = Field(
        default=10.0, ge=0, description="a robots.txt that asks for a longer Crawl-delay gets this one"
    )
    distributor: Literal["processes", "spark"] = Field(
        default="processes", description="spark: img2dataset's, on the active session or a local one"
    )
    processes: int | None = Field(default=None, ge=1, description="null: what the machine gives the stage")
    threads: int = Field(default=16, ge=1, description="a process")
    urls_per_piece: int = Field(
        default=500, ge=2, description="of which a killed crawl loses four at most, a process"
    )
    stall_limit_s: float = Field(
        default=120.0, gt=0, description="a process without a sign of life for so long is replaced"
    )
    allow_private: bool = Field(default=False, description="fetch from private and local addresses too")
    use_proxy: bool = Field(
        default=False, description="the environment's; it must refuse private addresses itself"
    )
    min_side_px: int = Field(default=100, ge=1)
    max_aspect: float = Field(default=4.0, ge=1, description="longer side over shorter")
    max_pixels: int = Field(default=50_000_000, ge=1, description="pictures of more are not decoded")
    max_bytes: int = Field(default=20_000_000, ge=1, description="of a picture, once it is unpacked")

    cosmetic: ClassVar[frozenset[str]] = frozenset(
        {
            "backoff_s",
            "per_host",
            "host_delay_s",
            "crawl_delay_max_s",
            "distributor",
            "processes",
            "threads",
            "urls_per_piece",
            "stall_limit_s",
        }
    )
    roles: ClassVar[tuple[str, ...]] = ("pairs",)
    array: ClassVar[bool] = True

    def is_own(self, url: str) -> bool:
        """Whether a URL is of the stage's own site."""
        return self.local_site is not None and url.startswith(self.local_site.url_prefix)

    def limits(self, seed: int) -> Limits:
        return Limits(
            per_host=self.per_host,
            host_delay_s=self.host_delay_s,
            crawl_delay_max_s=self.crawl_delay_max_s,
            retries=self.retries,
            backoff_s=self.backoff_s,
            retry_after_max_s=self.retry_after_max_s,
            piece_deadline_s=self.piece_deadline_s,
            seed=seed,
        )

    def rules(self) -> PictureRules:
        return PictureRules(self.min_side_px, self.max_aspect, self.max_pixels)

    def guard(self, mirror: Mirror | None) -> Guard:
        return Guard(
            timeout_s=self.timeout_s,
            max_bytes=self.max_bytes,
            request_deadline_s=self.request_deadline_s,
            allow_private=self.allow_private,
            use_proxy=self.use_proxy,
            mirror=mirror,
            user_agent=self.user_agent,
        )


def run(config: Config, job: Job) -> Report:
    """Write out/tars; then out/pairs.parquet (the input's), dropped.parquet, pictures.parquet and
    statistics.parquet."""
    urls = _urls(job)
    with _mendable(job.out):
        crawled = _crawl(config, job, urls, job.directory)
        require_some(crawled.pictures, [job.out])
        return _complete(crawled, job)


def run_task(config: Config, job: Job) -> Report:
    """Fetch one share of the URLs: the task's out/tars, out/pictures.parquet and out/statistics.parquet."""
    urls = share_of(_urls(job), job.task_index, job.task_count, config.is_own)
    with _mendable(job.out):
        crawled = _crawl(config, job, urls, job.directory.parents[1])
        _write({"pictures": crawled.pictures, "statistics": crawled.statistics}, job.out)
    report = _report(crawled)
    if len(urls) and not report.counts["kept"]:  # no error: a small share may be so; `finish` asks all
        logger.warning("crawl: not one of %d URLs gave a picture; is this node on the network?", len(urls))
    return report


def finish(config: Config, job: Job) -> Report:
    """Write what `run` writes, from what the tasks fetched; the tars lie in a folder a task."""
    with _mendable(job.out), job.progress.task("join", job.task_count) as task:
        try:
            crawled = join(job.task_outs, job.out, task.advance)
        except ShareError as error:
            raise SpoiltTasks(f"{error}. Run task {error.share} again.", [error.share]) from error
        try:
            require_some(crawled.pictures, job.task_outs)
        except CrawlError as error:
            raise SpoiltTasks(str(error), range(job.task_count)) from error
        return _complete(crawled, job)


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


def _urls(job: Job) -> pa.ChunkedArray:
    """Those of the pairs."""
    try:
        return pq.read_table(_pairs(job), columns=["url"])["url"]
    except (OSError, pa.ArrowException) as error:
        raise StageError(f"{_pairs(job)}: cannot be read ({error}). Run the filter stage again.") from error


def _crawl(config: Config, job: Job, urls: pa.ChunkedArray, stage_directory: Path) -> Crawled:
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
        options = CrawlOptions(
            config.guard(mirror),
            config.limits(job.seed),
            config.robots,
            config.distributor,
            config.processes or job.processes,
            config.threads,
            config.urls_per_piece,
            config.stall_limit_s,
        )
        rules = config.rules()
        urls = pc.unique(urls)
        task = stack.enter_context(job.progress.task("crawl", len(urls)))
        earlier = _earlier(stage_directory)
        crawled = crawl(urls, job.out, rules, options, task.advance, job.should_stop, earlier)
    if crawled is None:
        raise Stopped("crawl: stopped between pieces; run again to go on")
    return crawled


def _earlier(stage_directory: Path) -> list[Path]:
    """The folders of this stage's other crawls, the newest first: whole ones, or what their tasks have."""
    found: list[Path] = []
    others = [each for each in stage_directory.parent.iterdir() if each.is_dir() and each != stage_directory]
    for other in sorted(others, key=lambda each: (-each.stat().st_mtime, each.name)):
        tasks = sorted((other / "tasks").glob("*/out"))
        found += [other / "out"] if (other / "out" / PICTURES).is_file() or not tasks else tasks
    return found


def _complete(crawled: Crawled, job: Job) -> Report:
    """The stage's tables and counts, once all URLs have a status."""
    report, table = _report(crawled), crawled.pictures
    dropped = table.filter(pc.not_equal(table["status"], "ok"))
    dropped = pa.table({"url": dropped["url"], "reason": dropped["status"], "detail": dropped["detail"]})
    shutil.copyfile(_pairs(job), job.out / "pairs.parquet.tmp")
    (job.out / "pairs.parquet.tmp").replace(job.out / "pairs.parquet")
    _write({"dropped": dropped, "statistics": crawled.statistics, "pictures": table}, job.out)
    for line in summary(crawled.statistics):
        logger.info("crawl: %s", line)
    if report.metrics["crawl/reused"]:
        logger.info(
            "crawl: %d of %d URLs were taken over from earlier crawls",
            report.metrics["crawl/reused"],
            report.counts["urls"],
        )
    return report


def _report(crawled: Crawled) -> Report:
    """Counts by status, and how many URLs earlier crawls had."""
    table = crawled.pictures
    found = {row["values"]: row["counts"] for row in pc.value_counts(table["status"]).to_pylist()}
    unknown = set(found) - {"ok", *REASONS}
    if unknown:
        raise RuntimeError(f"the crawl has a status without a name: {sorted(unknown)}")
    counts = {"urls": table.num_rows, "kept": found.get("ok", 0)}
    counts |= {f"dropped_{reason}": found.get(reason, 0) for reason in REASONS}
    metrics = {f"crawl/{name}": float(n) for name, n in counts.items()}
    statistics = crawled.statistics
    metrics["crawl/hosts"] = float(pc.count_distinct(statistics["host"]).as_py())
    metrics["crawl/reused"] = float(pc.sum(statistics["reused"], min_count=0).as_py())
    return Report(counts=counts, metrics=metrics)


def _write(tables: dict[str, pa.Table], out: Path) -> None:
    """Tables as Parquet files of these names, each by temp file and rename."""
    for name, table in tables.items():
        pq.write_table(table, out / f"{name}.parquet.tmp")
        (out / f"{name}.parquet.tmp").replace(out / f"{name}.parquet")
