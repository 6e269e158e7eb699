"""The ingest stage: public data sets, from the files that their sites give → what a crawl reads, or what
needs none.

It stands where the filter stands. Formats that name pictures make out/pairs.parquet; pairs of sentences make
out/text_pairs.parquet; videos as features make a corpus (shards, index, manifest) at once.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import duckdb
from pydantic import Field, field_validator, model_validator

from data_tools.corpora.feature_shards import write_features
from data_tools.corpora.registry import FORMATS, Format
from data_tools.corpora.source import FeatureRow, Options, Source
from data_tools.corpora.tables import Tables
from data_tools.errors import DataError, explain_full_disk
from stages.base import Frozen, Job, Report, StageConfig, StageError, Stopped

OPTIONS = ("first", "most_frequent", "answers", "narrow_classes")


class SourceConfig(Frozen):
    """One source: a format, its files, and what the files do not say."""

    format: str = Field(description=f"one of: {', '.join(FORMATS)}")
    files: dict[str, Path | tuple[Path, ...]] = Field(
        description="role: file, or list of files, relative to the recipe; docs/corpora.md lists the roles"
    )
    images: str | None = Field(
        default=None,
        description="URL that the names of pictures are put behind, ending with /",
    )
    name: str | None = Field(
        default=None, min_length=1, description="in records and counts; null: the format"
    )
    lang: str | None = Field(default=None, min_length=2, description="code of the texts; null: the format's")
    licence: str | None = Field(
        default=None, min_length=1, description="of the texts; null: as commonly stated"
    )
    split: str | None = Field(default=None, min_length=1, description="of rows whose files name no split")
    first: int | None = Field(default=None, ge=1, description="aic_icc: only the first so many pictures")
    most_frequent: int | None = Field(
        default=None, ge=1, description="nus_wide: only the so many classes that most pictures have"
    )
    answers: Literal["short", "full"] = Field(default="short", description="gqa: answer, or fullAnswer")
    narrow_classes: bool = Field(default=False, description="mirflickr: the lists <label>_r1 are classes too")

    @field_validator("format")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in FORMATS:
            raise ValueError(f"'{value}' is no format; there are: {', '.join(FORMATS)}")
        return value

    @field_validator("files", mode="before")
    @classmethod
    def _are_paths(cls, value: Any) -> Any:
        """One message a mistake, where the union of the type would give two."""
        for role, given in value.items() if isinstance(value, dict) else ():
            paths = given if isinstance(given, list | tuple) else [given]
            if not all(isinstance(path, str | Path) for path in paths):
                raise ValueError(f"{role}: {given!r} is neither a file nor a list of files")
        return value

    @field_validator("images")
    @classmethod
    def _is_prefix(cls, value: str | None) -> str | None:
        if value is not None and not (value.startswith(("http://", "https://")) and value.endswith("/")):
            raise ValueError(
                f"'{value}' must start with http:// or https:// and end with /, say http://coco.example/"
            )
        return value

    @model_validator(mode="after")
    def _fits_format(self) -> "SourceConfig":
        format_ = FORMATS[self.format]
        roles = {**format_.files, **format_.optional}
        listed = ", ".join(f"{role} ({what})" for role, what in roles.items())
        for role in self.files:
            if role not in roles:
                raise ValueError(
                    f"files: '{role}' is no file of the format {self.format}; it takes: {listed}"
                )
            if len(self.paths(role)) != 1 and role not in format_.many:
                raise ValueError(f"files.{role}: the format {self.format} takes one file, not a list")
            if not self.paths(role):
                raise ValueError(f"files.{role}: the list is empty")
        missing = [role for role in format_.files if role not in self.files]
        if missing or not self.files:
            raise ValueError(
                f"files: {missing[0] if missing else 'one'} is missing; {self.format} takes: {listed}"
            )
        named_elsewhere = format_.images == "may be given" and (
            "urls" in self.files or self.format == "wukong"
        )
        if format_.images != "in the file" and self.images is None and not named_elsewhere:
            raise ValueError(
                f"images: the format {self.format} names pictures by path: give the URL before them"
            )
        if format_.images == "in the file" and self.images is not None:
            raise ValueError(f"images: the format {self.format} does not name pictures by path; leave it out")
        for option in OPTIONS:
            if option in self.model_fields_set and option not in format_.options:
                raise ValueError(f"{option}: no option of the format {self.format}")
        return self

    def paths(self, role: str) -> tuple[Path, ...]:
        value = self.files[role]
        return value if isinstance(value, tuple) else (value,)

    def source(self, directory: Path) -> Source:
        """What the importer reads; `directory` is the recipe's."""
        format_ = FORMATS[self.format]
        return Source(
            name=self.name or self.format,
            files={role: tuple(directory / path for path in self.paths(role)) for role in self.files},
            lang=self.lang or format_.lang,
            licence=self.licence or format_.licence,
            images=self.images or "",
            split=self.split,
            options=Options(**{option: getattr(self, option) for option in OPTIONS}),
            licence_of_rows=self.licence is None,
        )


class Config(StageConfig):
    kind: Literal["ingest"] = "ingest"
    sources: tuple[SourceConfig, ...] = Field(description="at least one; their rows come in this order")
    shard_bytes: int = Field(
        default=100_000_000, ge=1_000_000, description="of features: a shard is closed once it has as many"
    )

    @model_validator(mode="after")
    def _give_one_thing(self) -> "Config":
        if not self.sources:
            raise ValueError("sources: the list is empty")
        gives = {FORMATS[source.format].gives: source.format for source in self.sources}
        if len(gives) > 1:
            said = ", ".join(f"{name} gives {what}" for what, name in gives.items())
            raise ValueError(f"sources: {said}: give each a stage of its own")
        return self

    def files(self) -> dict[str, Path]:
        named: dict[str, Path] = {}
        for number, source in enumerate(self.sources):
            for role, value in source.files.items():
                field = f"sources.{number}.files.{role}"
                if isinstance(value, tuple):
                    named |= {f"{field}.{place}": path for place, path in enumerate(value)}
                else:
                    named[field] = value
        return named


def run(config: Config, job: Job) -> Report:
    """Write the result and dropped.parquet beside out/ and rename them there when they are whole."""
    if job.task_count != 1:
        raise StageError("ingest: it runs as one task; set its task count to 1")
    aside = job.directory / "out.unfinished"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    kept = "Nothing of this stage is kept; the data sets' files are untouched."
    try:
        with explain_full_disk(aside, kept), job.progress.task("ingest", None) as task:

            def on_batch(count: int) -> None:
                task.advance(count)
                if job.should_stop():
                    raise Stopped("ingest: stopped; run again to start it over")

            counts = _ingest(config, job.recipe_directory, aside, on_batch)
    except DataError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise StageError(str(error)) from error
    shutil.rmtree(job.out, ignore_errors=True)
    aside.replace(job.out)
    return Report(counts=counts, metrics={f"ingest/{name}": float(n) for name, n in counts.items()})


def _ingest(config: Config, directory: Path, out: Path, on_batch: Callable[[int], None]) -> dict[str, int]:
    sources = [(FORMATS[one.format], one.source(directory)) for one in config.sources]
    gives = sources[0][0].gives
    if gives == "features":
        return _features(config, sources, out, on_batch)
    if gives == "text pairs":
        counts = _rows(sources, out, "text_pairs", on_batch)
        del counts["captions"]
        return counts
    counts = _rows(sources, out, "pairs", on_batch)
    return counts | {"pictures": _pictures(out / "pairs.parquet")}


def _rows(
    sources: list[tuple[Format, Source]],
    out: Path,
    name: str,
    on_batch: Callable[[int], None],
) -> dict[str, int]:
    with Tables(out, name, on_batch) as tables:
        for format_, source in sources:
            before = tables.counts
            tables.add(source, format_.read(source))
            _require_some(source, before, tables.counts)
        return tables.counts


def _features(
    config: Config, sources: list[tuple[Format, Source]], out: Path, on_batch: Callable[[int], None]
) -> dict[str, int]:
    videos: list[tuple[Source, FeatureRow]] = []
    with Tables(out, None, on_batch) as tables:
        for format_, source in sources:
            found = list(format_.read(source))
            videos += [(source, one) for one in found if isinstance(one, FeatureRow)]
            tables.add(source, (one for one in found if not isinstance(one, FeatureRow)))
        counts = tables.counts
    if not videos:
        said = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        raise DataError(f"sources: no video is left ({said}). Check `files.features`.")
    manifest = write_features(videos, out, config.shard_bytes, on_batch)
    captions = sum(len(row.captions) for _, row in videos)
    kept = {"rows": counts["rows"] + len(videos), "kept": len(videos), "captions": captions}
    return counts | kept | {"shards": len(manifest["shards"])}


def _pictures(pairs: Path) -> int:
    """How many pictures the pairs name; DuckDB spills where they do not fit."""
    with duckdb.connect(config={"temp_directory": str(pairs.parents[1] / "spill")}) as connection:
        found = connection.execute("SELECT count(DISTINCT url) FROM read_parquet(?)", [str(pairs)]).fetchone()
    return int(found[0]) if found else 0


def _require_some(source: Source, before: dict[str, int], after: dict[str, int]) -> None:
    """DataError for a source of which no row is left."""
    if after["kept"] > before["kept"]:
        return
    reasons = {name: after[name] - before[name] for name in after if name.startswith("dropped_")}
    said = ", ".join(f"{name} {count}" for name, count in reasons.items() if count) or "its files are empty"
    raise DataError(f"sources: {source.name}: no row is left ({said}). Check its files and options.")
