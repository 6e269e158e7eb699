"""The benchmark stage: a split that was held out → ICM, IQM, ICR or IQR as in Zero, and back from annotators.

out/ is a corpus with the splits train, val and test, as a shard stage's: training and galleries open it with
`texts: [captions]`. A record has one text, in `captions`; title, content and queries are empty. A matching
set has the label `match` ("1" or "0") in the index, and there the text of a record labelled "0" is not its
picture's: train on it with a matching loss alone. pairs.parquet tells the same as a table.

The paper does not say whether its four sets share pictures. Here they do not: a model that learnt from one
may be tested on another. A text may still stand in two sets.

Memory: DuckDB's, which `memory_limit` bounds, a row group of its tables, and for each picture of the split
what ShardIndex and ShardWriter hold of it (its key; its row of the index).
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import ibis
import pyarrow.parquet as pq
from ibis.backends.duckdb import Backend
from pydantic import Field, field_validator, model_validator

from data_tools.benchmark.corrections import CORRECTION_REASONS, finish_pairs, in_splits
from data_tools.benchmark.pairs import (
    REASONS,
    SPLITS,
    SplitName,
    connect,
    read_rows,
    reasons,
    sort_out,
    write_candidates,
    write_pairs,
)
from data_tools.benchmark.sheet import SheetWriter
from data_tools.benchmark.texts import SETS, SetName, TextRules
from data_tools.benchmark.votes import check_votes, write_decisions, write_votes
from data_tools.errors import DataError, explain_full_disk
from data_tools.pictures import picture_extension
from data_tools.shards import ShardIndex, ShardWriter
from data_tools.splits import unit_hash
from stages.base import Frozen, Job, Report, StageConfig, StageError, Stopped

logger = logging.getLogger(__name__)

MATCH = "match"  # the label of a matching set
_CHECK_STOP_EVERY = 1000  # samples


class AnnotateConfig(Frozen):
    """The sheet on which people correct the pairs."""

    splits: tuple[SplitName, ...] = Field(default=SPLITS, min_length=1)
    share: float = Field(default=1.0, gt=0, le=1, description="of these splits' pairs, by a seeded draw")
    pairs_per_page: int = Field(default=200, ge=1, le=2000)
    picture_px: int = Field(default=256, ge=32, le=1024, description="longer side of a picture on a page")
    max_pixels: int = Field(default=50_000_000, ge=1, description="a stored picture with more is refused")


class Config(StageConfig):
    roles: ClassVar[tuple[str, ...]] = ("corpus",)

    kind: Literal["benchmark"] = "benchmark"
    set: SetName = Field(
        description="icm, iqm: match or no match; icr, iqr: retrieval; c: captions, q: queries"
    )
    split: str = Field(description="of the corpus, held out: no training may read it")
    sets: tuple[SetName, ...] = Field(
        default=("icm", "iqm", "icr", "iqr"),
        min_length=1,
        description="the sets that share the split, the same in each one's stage: each has a part of its own",
    )
    pairs: int | None = Field(
        default=None, ge=20, description="at most; null: the paper's 400,000 (icm, iqm) or 200,000 (icr, iqr)"
    )
    shares: tuple[int, int, int] = Field(default=(8, 1, 1), description="of train, val and test")
    captions: tuple[Literal["content", "title"], ...] = Field(
        default=("content", "title"),
        min_length=1,
        description="icm, icr: the first of these fields that has a text of a right length",
    )
    min_click: int = Field(
        default=1, ge=0, description="of the picture (icm, icr) or of the query (iqm, iqr): fewer, no pair"
    )
    min_words: int = Field(default=2, ge=0, description="of a text; a Chinese character is one word")
    max_words: int = Field(default=128, ge=1, description="of a text")
    seed: int = Field(default=0, description="of every draw")
    annotate: AnnotateConfig | None = Field(
        default=None, description="write the sheet; not while there are corrections"
    )
    corrections: tuple[Path, ...] = Field(
        default=(),
        description="filled-in sheets, of one annotator or several: CSV files, or folders of *.csv",
    )
    shard_bytes: int = Field(
        default=100_000_000, ge=1_000_000, description="a shard is closed once it has as many"
    )
    memory_limit: str | None = Field(
        default=None, description="DuckDB's memory, say '8GB'; null: its own default"
    )

    cosmetic: ClassVar[frozenset[str]] = frozenset({"memory_limit"})

    @field_validator("corrections", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return () if value is None else (value,) if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _sound(self) -> "Config":
        if self.set not in self.sets:
            raise ValueError(f"sets: {self.set} is not among them; got {', '.join(self.sets)}")
        if min(self.shares) < 1:
            raise ValueError(f"shares: each is 1 or more; got {':'.join(map(str, self.shares))}")
        if self.min_words > self.max_words:
            raise ValueError(f"min_words: {self.min_words} is more than max_words: {self.max_words}")
        return self

    def files(self) -> dict[str, Path]:
        return {f"corrections.{place}": path for place, path in enumerate(self.corrections)}

    def text_rules(self) -> TextRules:
        return TextRules(
            queries=SETS[self.set].queries,
            captions=self.captions,
            min_click=self.min_click,
            min_words=self.min_words,
            max_words=self.max_words,
            seed=self.seed,
        )


def run(config: Config, job: Job) -> Report:
    """Write the corpus, its pairs and its sheet beside out/, and rename them there when they are whole."""
    if job.task_count != 1:
        raise StageError("benchmark: it runs as one task; set its task count to 1")
    aside, scratch = job.directory / "out.unfinished", job.directory / "scratch"
    for directory in (aside, scratch):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    try:
        with explain_full_disk(job.directory, "The corpus is untouched; only this stage starts over."):
            counts, metrics = _make(config, job, aside, scratch)
    except DataError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise StageError(str(error)) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(job.out, ignore_errors=True)
    aside.replace(job.out)
    metrics |= {name: float(count) for name, count in counts.items()}
    return Report(counts, {f"benchmark/{name}": value for name, value in metrics.items()})


def _make(config: Config, job: Job, aside: Path, scratch: Path) -> tuple[dict[str, int], dict[str, float]]:
    index = ShardIndex.open(job.inputs["corpus"] / "out", config.split)
    connection = connect(scratch, config.memory_limit)
    try:
        return _Maker(config, job, aside, scratch, index, connection).make()
    finally:
        connection.disconnect()
        index.close()


class _Maker:
    """The steps from a split to a set; each leaves a file in `scratch`."""

    def __init__(
        self, config: Config, job: Job, aside: Path, scratch: Path, index: ShardIndex, connection: Backend
    ) -> None:
        self.config, self.job, self.aside, self.scratch = config, job, aside, scratch
        self.index, self.connection = index, connection
        self.matching = SETS[config.set].matching
        self.counts: dict[str, int] = {}
        self.metrics: dict[str, float] = {}

    def make(self) -> tuple[dict[str, int], dict[str, float]]:
        labels, taken = self._choose()
        with self._bar("pair the texts", taken) as advance:
            write_pairs(
                self.scratch / "chosen.parquet",
                self.config.set,
                taken,
                self.matching,
                self.config.shares,
                self.scratch / "pairs.parquet",
                advance,
            )
        decisions = self._decisions() if self.config.corrections else None
        finish_pairs(
            self.connection,
            self.scratch / "pairs.parquet",
            decisions,
            self.matching,
            self.scratch / "final.parquet",
        )
        self._count_pairs()
        self._write_tables()
        self._write_corpus(labels)
        return self.counts, self.metrics

    @contextmanager
    def _bar(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """A progress bar; what it gives is called for each sample, and stops the stage when asked to."""
        with self.job.progress.task(f"{self.config.set}: {what}", total) as task:
            done = 0

            def advance() -> None:
                nonlocal done
                if done % _CHECK_STOP_EVERY == 0 and self.job.should_stop():
                    raise Stopped("benchmark: stopped; run again to start it over")
                done += 1
                task.advance()

            yield advance

    def _choose(self) -> tuple[list[str], int]:
        """chosen.parquet; the labels of the records, and how many pictures are taken."""
        config, index = self.config, self.index
        candidates, chosen = self.scratch / "candidates.parquet", self.scratch / "chosen.parquet"
        wanted = config.pairs or SETS[config.set].pairs
        with self._bar("read the records", len(index)) as advance:
            labels, others = write_candidates(
                index, config.set, config.sets, config.text_rules(), candidates, advance
            )
        if self.matching and MATCH in labels:
            raise DataError(f"label '{MATCH}': the corpus has one of that name; rename it in the shard stage")
        taken = sort_out(self.connection, candidates, chosen, wanted, self.matching)
        left_out = reasons(self.connection, chosen)
        self.counts = {"pairs": taken, "wanted": wanted}  # first, as the terminal shows the first few
        self.counts |= {"pictures": len(index), "of_other_sets": others, "drawn": taken}
        self.counts |= {f"dropped_{reason}": left_out[reason] for reason in REASONS}
        if len(index) != others + taken + sum(left_out.values()):
            raise RuntimeError(f"the benchmark lost pictures: {self.counts}")
        if taken < wanted:
            logger.warning("benchmark: %s: %d pairs of %d: the split has no more", config.set, taken, wanted)
        return labels, taken

    def _decisions(self) -> Path:
        """What the filled-in sheets say, and agreement.json beside the corpus."""
        config, votes = self.config, self.scratch / "votes.parquet"
        paths = [self.job.recipe_directory / path for path in config.corrections]
        blank = write_votes(paths, (config.min_words, config.max_words), votes)
        check_votes(self.connection, votes, self.scratch / "pairs.parquet")
        decisions = self.scratch / "decisions.parquet"
        agreement = write_decisions(self.connection, votes, self.scratch / "by_pair.parquet", decisions)
        self.counts |= {
            "lines_not_judged": blank,
            "votes": sum(agreement["annotators"].values()),
            "annotators": len(agreement["annotators"]),
            "pairs_judged": pq.read_metadata(decisions).num_rows,
            "pairs_judged_twice": agreement["pairs_judged_twice"],
        }
        if agreement["fleiss_kappa"] is not None:
            self.metrics["fleiss_kappa"] = agreement["fleiss_kappa"]
        path = self.aside / "agreement.json"
        path.write_text(json.dumps(agreement, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return decisions

    def _count_pairs(self) -> None:
        rows = self.connection.read_parquet(self.scratch / "final.parquet")
        grouped = rows.group_by(["reason", "split", "label"]).agg(
            pairs=lambda t: t.count(), corrected=lambda t: t.corrected.cast("int64").sum()
        )
        found = self.connection.to_pyarrow(grouped).to_pylist()
        stay = [row for row in found if row["reason"] is None]
        self.counts["pairs"] = sum(row["pairs"] for row in stay)
        for split in SPLITS:
            for label, word in ((1, "positive"), (0, "negative"))[: 1 + self.matching]:
                of_both = [row["pairs"] for row in stay if (row["split"], row["label"]) == (split, label)]
                self.counts[f"{split}_{word}"] = sum(of_both)
                if not of_both:
                    raise DataError(f"corrections: they leave no {word} pair in {split}; draw more `pairs`")
        if self.config.corrections:
            self.counts["corrected_texts"] = sum(row["corrected"] for row in stay)
            for reason in CORRECTION_REASONS:
                dropped = sum(row["pairs"] for row in found if row["reason"] == reason)
                self.counts[f"dropped_{reason}"] = dropped

    def _write_tables(self) -> None:
        """pairs.parquet, and dropped.parquet: each picture of the set's part that is in no pair, with its one
        reason, and the id of its pair where it had one."""
        rows = self.connection.read_parquet(self.scratch / "final.parquet")
        shown = ("id", "key", "text", "lang", "label", "split", "text_key")
        pairs = rows.filter(rows.reason.isnull()).order_by(in_splits(rows), rows.key).select(*shown)
        self.connection.to_parquet(pairs, self.aside / "pairs.parquet")
        chosen = self.connection.read_parquet(self.scratch / "chosen.parquet")
        listed = ("key", "id", "text", "reason")
        never = chosen.filter(chosen.reason.notnull()).mutate(id=ibis.null("string")).select(*listed)
        later = rows.filter(rows.reason.notnull()).select(*listed)
        self.connection.to_parquet(never.union(later).order_by("key"), self.aside / "dropped.parquet")

    def _write_corpus(self, labels: list[str]) -> None:
        writer = ShardWriter(
            self.aside,
            self.config.shard_bytes,
            list(SPLITS),
            sorted({*labels, MATCH}) if self.matching else labels,
        )
        sheet = self._sheet()
        with self._bar("write the pictures", self.counts["pairs"]) as advance:
            for row in self._final_rows():
                advance()
                image = self.index.image_bytes(row["place"])
                record = benchmark_record(self.index.record(row["place"]), row, self.matching)
                writer.write(image, picture_extension(image), record)
                if sheet is not None and self._on_sheet(row):
                    sheet.add(row, image)
        manifest = writer.close()
        self.counts["shards"] = len(manifest["shards"])
        if sheet is not None:
            sheet.close()

    def _final_rows(self) -> Iterator[dict[str, Any]]:
        return (row for row in read_rows(self.scratch / "final.parquet") if row["reason"] is None)

    def _on_sheet(self, row: dict[str, Any]) -> bool:
        annotate = self.config.annotate
        if annotate is None or row["split"] not in annotate.splits:
            return False
        return annotate.share == 1 or unit_hash(self.config.seed, "annotate", row["id"]) < annotate.share

    def _sheet(self) -> SheetWriter | None:
        annotate = self.config.annotate
        if annotate is None or self.config.corrections:
            return None
        sizes: dict[str, int] = dict.fromkeys(SPLITS, 0)
        for row in self._final_rows():
            sizes[row["split"]] += self._on_sheet(row)
        self.counts["on_sheet"] = sum(sizes.values())
        return SheetWriter(
            self.aside,
            self.config.set,
            sizes,
            annotate.pairs_per_page,
            annotate.picture_px,
            annotate.max_pixels,
        )


def benchmark_record(record: dict[str, Any], row: dict[str, Any], matching: bool) -> dict[str, Any]:
    """The record of a picture with the text of its pair, in `captions`, and no other."""
    one_text = {
        "title": "",
        "content": "",
        "other_titles": [],
        "other_contents": [],
        "queries": [],
        "captions": [{"text": row["text"], "lang": row["lang"]}],
        "lang": row["lang"],
        "split": row["split"],
    }
    if matching:
        one_text["labels"] = record["labels"] | {MATCH: str(row["label"])}
        one_text["pair"] = {"id": row["id"], "text_key": row["text_key"]}
    return record | one_text
