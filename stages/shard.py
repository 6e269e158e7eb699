"""The shard stage: crawled pictures and their pairs → webdataset shards by split, an index and a manifest."""

import shutil
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ConfigDict, Field, field_validator, model_validator

from data_tools.class_table import ClassTable
from data_tools.clean.decontaminate import DROPPED, note_checked
from data_tools.errors import DataError, explain_full_disk
from data_tools.given import merge_given
from data_tools.record_splits import RecordSplits
from data_tools.records import Languages, merge_queries, read_records, record_json
from data_tools.shards.check import check, find_shards
from data_tools.shards.files import CorpusError
from data_tools.shards.plan import PROCESS_WORTH_BYTES, Layout, ShardPlan
from data_tools.shards.writer import record_bytes
from data_tools.splits import SplitRule, check_rules, compile_labels, labels_of
from stages.base import Frozen, Job, Report, StageConfig, StageError, Stopped
from stages.shard_checks import decontaminate_records

STOPPED = "shard: stopped; run again to start it over"


class SplitConfig(Frozen):
    """One split; the first that takes a record decides. The last one takes all that is left."""

    name: str
    by: str | None = Field(default=None, description="a label")
    share: float | None = Field(
        default=None, description="of the label's values, or of all keys; drawn by a seeded hash"
    )
    values: tuple[str, ...] | None = Field(default=None, description="of the label")
    given: tuple[str, ...] | None = Field(
        default=None, description="names of splits in the source's own files: an ingest's pictures of these"
    )

    def rule(self) -> SplitRule:
        return SplitRule(self.name, self.by, self.share, self.values, self.given)


class LicenceConfig(Frozen):
    """The licence of each picture, by one of its labels; without `by`, as an ingest says, else
    `otherwise`."""

    by: str | None = None
    values: dict[str, str] = Field(default_factory=dict, description="value of the label: licence")
    otherwise: str = "unknown"

    def of(self, labels: dict[str, str], given: str | None) -> str:
        if self.by is None:
            return given or self.otherwise
        return self.values.get(labels.get(self.by, ""), self.otherwise)


class LanguagesConfig(Frozen):
    """Language codes by script: of texts with Han characters, and of all others."""

    han: str = "zh"
    other: str = "en"


class HeldOutConfig(Frozen):
    """A set that is evaluated on: of this corpus, of an input `held_out…`, or of a corpus in a directory."""

    name: str | None = Field(
        default=None, description="in dropped.parquet and the manifest; null: the split's"
    )
    split: str | None = Field(default=None, description="null: all of another corpus")
    role: str | None = Field(
        default=None,
        pattern="^held_out(_[a-z0-9_]+)?$",
        description="held_out, or held_out_<any name> where there are several: the corpus of the shard stage "
        "that this input names",
    )
    corpus: Path | None = Field(
        default=None, description="a directory with manifest.json, relative to the recipe"
    )
    texts: bool = Field(
        default=True,
        description="false: its texts may be trained on, as where two splits share them by design",
    )

    @model_validator(mode="after")
    def _is_one(self) -> "HeldOutConfig":
        if self.role is not None and self.corpus is not None:
            raise ValueError(f"corpus: inputs.{self.role} is meant by `role` already; leave one of them out")
        if self.role is None and self.corpus is None and self.split is None:
            raise ValueError("split: missing; name a split of this corpus, or give `role` or `corpus`")
        return self

    @property
    def is_own(self) -> bool:
        """Whether it is a split of the corpus that the stage makes."""
        return self.role is None and self.corpus is None

    @property
    def called(self) -> str:
        return self.name or self.split or self.role or str(self.corpus)


class DecontaminateConfig(Frozen):
    """What is evaluated on is taken out of what is trained on: pictures and texts."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    sources: tuple[str, ...] | None = Field(
        default=None,
        alias="from",
        description="splits that must not hold it; null: all that `against` does not name",
    )
    against: tuple[HeldOutConfig, ...] = Field(min_length=1)


class ClassesConfig(Frozen):
    """Classes of each picture, from the rows of a table that have one of its labels."""

    table: Path = Field(description=".tsv, .csv or .parquet, relative to the recipe")
    by: str = Field(description="the label whose value is looked up, whatever its case")
    key: str = Field(description="the table's column that has it")
    columns: tuple[str, ...] = Field(
        min_length=1, description="that have the classes; several in a cell by |"
    )


class Config(StageConfig):
    kind: Literal["shard"] = "shard"
    labels: str | None = Field(
        default=None, description="regular expression on the URL; its named groups are the labels"
    )
    splits: tuple[SplitConfig, ...] = (SplitConfig(name="train"),)
    seed: int = Field(default=0, description="of the splits' shares")
    shard_bytes: int = Field(
        default=100_000_000, ge=1_000_000, description="about the most; a split's shards are of equal size"
    )
    check: bool = Field(
        default=False, description="read the shards back and compare every byte with what was written"
    )
    licence: LicenceConfig = LicenceConfig()
    pair_labels: tuple[str, ...] = Field(
        default=(),
        description="labels of picture and text together, as ICM's match: where equal pictures become one "
        "sample, texts of another value than its own are left out",
    )
    languages: LanguagesConfig = LanguagesConfig()
    classes_from: ClassesConfig | None = Field(
        default=None, description="behind what an ingest says; null: that alone"
    )
    decontaminate: DecontaminateConfig | None = Field(default=None, description="null: nothing is checked")

    cosmetic: ClassVar[frozenset[str]] = frozenset({"check"})
    roles: ClassVar[tuple[str, ...]] = ("pictures",)
    optional_roles: ClassVar[tuple[str, ...]] = ("held_out",)
    version: ClassVar[int] = 2  # shards of equal size

    @field_validator("labels")
    @classmethod
    def _is_expression(cls, value: str | None) -> str | None:
        compile_labels(value)
        return value

    @model_validator(mode="after")
    def _known_splits(self) -> "Config":
        if self.decontaminate is None:
            return self
        names = [split.name for split in self.splits]
        wanted = [("from", split) for split in self.decontaminate.sources or ()]
        wanted += [("against", str(one.split)) for one in self.decontaminate.against if one.is_own]
        for field, split in wanted:
            if split not in names:
                raise ValueError(
                    f"decontaminate.{field}: no split '{split}' here; allowed: {', '.join(names)}"
                )
        both = set(self.checked_splits()) & {one.split for one in self.decontaminate.against if one.is_own}
        if both:
            raise ValueError(f"decontaminate.from: '{min(both, key=str)}' stands in `against` too")
        held_out = {role for role in self.inputs if role.startswith("held_out")}
        for role in sorted(self.roles_named() ^ held_out):
            raise ValueError(f"inputs.{role}: it and `role: {role}` in decontaminate.against go together")
        return self

    def roles_named(self) -> frozenset[str]:
        against = self.decontaminate.against if self.decontaminate is not None else ()
        return frozenset(one.role for one in against if one.role is not None)

    def checked_splits(self) -> tuple[str, ...]:
        """The splits that decontamination keeps clean."""
        if self.decontaminate is None:
            return ()
        held = {one.split for one in self.decontaminate.against if one.is_own}
        rest = tuple(split.name for split in self.splits if split.name not in held)
        return rest if self.decontaminate.sources is None else self.decontaminate.sources

    def files(self) -> dict[str, Path]:
        against = self.decontaminate.against if self.decontaminate is not None else ()
        found = {
            f"decontaminate.against.{n}.corpus": one.corpus / "manifest.json"
            for n, one in enumerate(against)
            if one.corpus is not None
        }
        return found | ({} if self.classes_from is None else {"classes_from.table": self.classes_from.table})


def run(config: Config, job: Job) -> Report:
    """Write the shards beside out/ and rename them there when they are whole."""
    if job.task_count != 1:
        raise StageError("shard: it runs as one task; set its task count to 1")
    source = job.inputs["pictures"] / "out"
    aside = _emptied(job.directory / "out.unfinished")
    try:
        with explain_full_disk(
            job.directory, "The crawled pictures are untouched; only this stage starts over."
        ):
            counts, manifest = _write_shards(config, job, source, aside)
            if config.check:
                _read_back(aside, job, manifest["bytes"])
    except DataError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise StageError(str(error)) from error
    finally:
        (job.directory / "records.tmp").unlink(missing_ok=True)
        shutil.rmtree(job.directory / "plan.tmp", ignore_errors=True)
    shutil.rmtree(job.out, ignore_errors=True)
    aside.replace(job.out)
    counts |= {f"split_{name}": count for name, count in manifest["splits"].items()}
    counts["shards"] = len(manifest["shards"])
    return Report(counts=counts, metrics={f"shard/{name}": float(n) for name, n in counts.items()})


def _write_shards(
    config: Config, job: Job, source: Path, aside: Path
) -> tuple[dict[str, int], dict[str, Any]]:
    pattern = compile_labels(config.labels)
    labels = sorted(pattern.groupindex) if pattern else []
    rules = [split.rule() for split in config.splits]
    check_rules(rules, labels)
    _check_pair_labels(config.pair_labels, labels)
    _check_licence(config.licence, labels)
    classes = _class_table(config.classes_from, labels, job.recipe_directory)
    for name in ("pictures.parquet", "pairs.parquet"):
        if not (source / name).is_file():
            raise CorpusError(f"{source / name}: missing. Run the crawl stage again.")
    records, count, duplicates = read_records(source, job.directory / "records.tmp")
    splits = RecordSplits(rules, config.seed, pattern, config.pair_labels)
    outcome = None
    if config.decontaminate is not None:
        outcome = decontaminate_records(config, job, source, splits)
        count = outcome.kept
    languages = Languages(config.languages.han, config.languages.other)
    left_out = captions_left_out = without_classes = 0
    plan = ShardPlan(_emptied(job.directory / "plan.tmp"), source, "Run the crawl stage again.")
    with job.progress.task("records", count) as task:
        for number, row in enumerate(records):
            if number % 1000 == 0 and job.should_stop():
                raise Stopped(STOPPED)
            found, split = labels_of(row["url"], pattern), splits.of(row)
            belongs = splits.belongs(row, split)
            row["queries"], refused = merge_queries(row["queries"], belongs)
            given = merge_given(row["given"], belongs)
            left_out += refused
            captions_left_out += given.refused
            if classes is not None and config.classes_from is not None:
                named = classes.of(found[config.classes_from.by])
                given.classes += [name for name in named if name not in given.classes]
                without_classes += not named
            licence = config.licence.of(found, given.licence)
            record = record_json(row, found, split, licence, languages, given)
            plan.add(split, _planned(row, record))
            task.advance()
    layout = Layout(aside, [rule.name for rule in rules], labels, config.shard_bytes)
    with job.progress.task("shard", len(plan)) as task:
        manifest = plan.write(layout, job.processes, task.advance, job.should_stop)
    if manifest is None:
        raise Stopped(STOPPED)
    dropped = duplicates.append_column("reason", pa.array(["duplicate"] * duplicates.num_rows, pa.string()))
    leaked = pa.Table.from_pylist(outcome.dropped if outcome else [], DROPPED)
    dropped = pa.concat_tables([dropped, leaked], promote_options="default")
    pq.write_table(dropped, aside / "dropped.parquet")
    counts = {
        "pictures": count + dropped.num_rows,
        "kept": count,
        "dropped_duplicate": duplicates.num_rows,
        "queries_of_other_splits": left_out,
        "captions_of_other_splits": captions_left_out,
    }
    if classes is not None:
        counts["without_classes"] = without_classes
    if outcome is not None:
        counts |= outcome.counts()
        note_checked(aside / "manifest.json", outcome.checked)
    return counts, manifest


def _read_back(corpus: Path, job: Job, size: int) -> None:
    """CorpusError where the disk gives other bytes than were written to it."""
    shards = find_shards([corpus])
    with job.progress.task("check", len(shards.tasks)) as task:
        report = check(shards, min(job.processes, 1 + size // PROCESS_WORTH_BYTES), task.advance)
    if report.kinds:
        one = report.findings[0]
        raise CorpusError(
            f"{job.directory}: the shards are not as they were written, {report.kinds.total()} times; "
            f"the first is in {one.shard}, byte {one.offset}: {one.kind}: {one.detail}. "
            "Run it again, on another disk."
        )


def _check_pair_labels(named: tuple[str, ...], labels: list[str]) -> None:
    unknown = sorted(set(named) - set(labels))
    if unknown:
        raise DataError(f"pair_labels: no label '{unknown[0]}'; labels: {', '.join(labels) or 'none'}")


def _check_licence(licence: LicenceConfig, labels: list[str]) -> None:
    if licence.by is not None and licence.by not in labels:
        raise DataError(f"licence.by: no label '{licence.by}'; labels: {', '.join(labels) or 'none'}")


def _class_table(asked: ClassesConfig | None, labels: list[str], directory: Path) -> ClassTable | None:
    if asked is None:
        return None
    if asked.by not in labels:
        raise DataError(f"classes_from.by: no label '{asked.by}'; labels: {', '.join(labels) or 'none'}")
    return ClassTable(directory / asked.table, asked.key, asked.columns)


def _planned(row: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """A crawled picture and its record, as a plan lists them."""
    found = {name: record[name] for name in ("key", "sha256", "width", "height", "licence", "labels")}
    place = {"file": row["tar"], "image_offset": row["offset"], "image_bytes": row["bytes"]}
    return found | place | {"called": row["url"], "json": record_bytes(record)}


def _emptied(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory
