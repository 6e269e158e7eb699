"""What the shard stage does for `decontaminate`: it finds the fingerprints and the held-out sets, and has
them compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.clean.crawled import read_crawl
from data_tools.clean.decontaminate import Outcome, Records, Stop, decontaminate, own_set
from data_tools.clean.fingerprint_files import FILE, Making, Opened, make, open_fingerprints
from data_tools.clean.hash_index import steps
from data_tools.clean.held_out import HeldOut, HeldOutSet, read_corpus
from data_tools.record_splits import RecordSplits
from data_tools.shards import ShardIndex
from stages.base import Job, Stopped

if TYPE_CHECKING:
    from stages.shard import Config, HeldOutConfig

MAX_PIXELS = 200_000_000  # the pictures passed the crawl's limit already
_STOPPED = "shard: stopped; run again to start it over"


def decontaminate_records(config: Config, job: Job, source: Path, splits: RecordSplits) -> Outcome:
    """Write records.tmp again without what leaked. Raises Stopped; DataError for what the user can mend."""
    assert config.decontaminate is not None
    opened = _fingerprints(job, source)
    records = Records(job.directory / "records.tmp", splits)
    sets = [_held_out(one, job, records, opened) for one in config.decontaminate.against]
    total = len(sets) * steps(within=False, with_mirrored=True)
    try:
        with job.progress.task("decontaminate", total) as task:
            return decontaminate(
                records, opened, sets, config.checked_splits(), task.advance, job.should_stop
            )
    except Stop as error:
        raise Stopped(_STOPPED) from error


def _fingerprints(job: Job, source: Path) -> Opened:
    """Those of the clean stage, or else made here and kept for the next start."""
    path = source / FILE
    if not path.is_file():
        path = job.directory / FILE
        crawled = read_crawl(source)
        how = Making(MAX_PIXELS, None, job.processes)
        with job.progress.task("fingerprints", crawled.different.num_rows) as task:
            if not make(crawled.different, source, path, how, task.advance, job.should_stop):
                raise Stopped(_STOPPED)
    return open_fingerprints(path, job.directory)


def _held_out(config: HeldOutConfig, job: Job, records: Records, opened: Opened) -> HeldOutSet:
    if config.is_own:
        return own_set(HeldOut(config.called, config.split, config.texts), records, opened)
    corpus = (
        job.inputs[config.role] / "out"
        if config.role is not None
        else job.recipe_directory / str(config.corpus)
    )
    index = ShardIndex.open(corpus, config.split)
    held_out = HeldOut(config.called, config.split, config.texts, index)
    with job.progress.task(f"fingerprints of {config.called}", len(index)) as task:
        return read_corpus(held_out, job.directory / "held_out", MAX_PIXELS, task.advance)
