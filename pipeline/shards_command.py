"""`tandem shards check | repair | info | view`: whether shards are whole, and what they hold."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pipeline.cli_options import JsonOption, console, print_json
from stages.base import StageError

SHOWN = 50  # findings in the table; --json has them all

app = typer.Typer(
    name="shards",
    help="""
    Check shards, rescue what is sound of damaged ones, and look at what they hold.

    `check` and `repair` take a corpus (the out/ of a shard stage), or any webdataset: tars, or directories of
    tars.
    """,
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

PlacesArgument = Annotated[
    list[Path],
    typer.Argument(
        help="a corpus, or tars and directories of tars", metavar="DIR|TAR...", show_default=False
    ),
]
CorpusArgument = Annotated[
    Path, typer.Argument(help="a corpus: the out/ of a shard stage", metavar="DIR", show_default=False)
]
ProcessesOption = Annotated[
    int | None,
    typer.Option("--processes", min=1, help="that read side by side; default: one a core", metavar="N"),
]
SeedOption = Annotated[int, typer.Option("--seed", help="of the samples that are drawn", metavar="N")]
DecodeOption = Annotated[bool, typer.Option("--decode", help="decode every picture too: takes long")]


@app.command()
def check(
    places: PlacesArgument,
    decode: DecodeOption = False,
    processes: ProcessesOption = None,
    json_: JsonOption = False,
) -> None:
    """Say what is damaged: the shard, the sample, the byte.

    Of a corpus every byte is accounted for, by manifest, index and checksums. Of other tars what they hold
    must fit together; a changed bit that leaves a tar, its JSON and its pictures readable is not found
    there. Exit code 0: all is as it was written; 2: something is not, if only padding.

      tandem shards check runs/demo/shard/4d197e3eb880/out

      tandem shards check crawl/00000.tar crawl/00001.tar --decode
    """
    from data_tools.shards import check as shard_check

    with _mendable():
        corpus = shard_check.find_shards(places, decode)
        shards = len(corpus.tasks)
        with _bars(json_) as told:
            report = shard_check.check(
                corpus, _processes(processes, shards), lambda count: told("check", count, shards)
            )
    if json_:
        print_json(shard_check.as_json(report))
    else:
        _show_check(report, console())
    if report.kinds:
        raise typer.Exit(2)


@app.command()
def repair(
    places: PlacesArgument,
    out: Annotated[Path, typer.Option("--out", help="a directory that is not there yet", metavar="NEW")],
    decode: DecodeOption = False,
    shard_mb: Annotated[
        float | None,
        typer.Option(
            "--shard-mb",
            min=1,
            help="10^6 bytes of a new shard at most; default: as the largest",
            metavar="MB",
        ),
    ] = None,
    split: Annotated[
        str, typer.Option("--split", help="of records that name none", metavar="NAME")
    ] = "train",
    processes: ProcessesOption = None,
    json_: JsonOption = False,
) -> None:
    """Write every sound sample, byte for byte, as a new corpus; what is damaged is only read.

    NEW has shards, index and manifest, and lost.parquet: the keys of which nothing sound was left, and why.
    Of a key that comes several times the first sound sample is kept.

      tandem shards repair runs/demo/shard/4d197e3eb880/out --out rescued
    """
    from data_tools.shards import check as shard_check
    from data_tools.shards import repair as shard_repair

    with _mendable():
        corpus = shard_check.find_shards(places, decode)
        size = None if shard_mb is None else int(shard_mb * 1e6)
        number = _processes(processes, len(corpus.tasks))
        with _bars(json_) as told:
            done = shard_repair.repair(corpus, out, number, size, split, told)
    if json_:
        print_json({"out": str(out), **vars(done)})
        return
    said = console()
    said.print(
        f"{out}: {done.rescued:,} samples rescued in {done.shards:,} shards of {done.bytes:,} bytes",
        markup=False,
    )
    for reason, count in done.reasons.most_common():
        said.print(f"  lost, {reason}: {count:,}", markup=False)
    if done.lost or done.differing:
        said.print(f"  {out / 'lost.parquet'} names them", markup=False)
    if done.differing:
        said.print(f"  {done.differing:,} more samples had a key of another's and other bytes", markup=False)


@app.command()
def info(
    corpus: CorpusArgument,
    records: Annotated[
        int, typer.Option("--records", min=0, help="that are read for languages and texts", metavar="N")
    ] = 1000,
    seed: SeedOption = 0,
    json_: JsonOption = False,
) -> None:
    """What a corpus holds: samples, splits, licences, labels, sizes of pictures and texts, languages.

    tandem shards info runs/demo/shard/4d197e3eb880/out
    """
    from data_tools.shards.info import describe

    with _mendable():
        found = describe(corpus, records, seed)
    if json_:
        print_json(found)
        return
    _show_info(found, console())


@app.command()
def view(
    corpus: CorpusArgument,
    out: Annotated[Path | None, typer.Option("--out", help="a .html or .png file", metavar="FILE")] = None,
    split: Annotated[str | None, typer.Option("--split", help="default: all", metavar="NAME")] = None,
    count: Annotated[
        int, typer.Option("--n", min=1, max=5000, help="samples on the sheet", metavar="N")
    ] = 64,
    seed: SeedOption = 0,
    key: Annotated[
        str | None, typer.Option("--key", help="one sample in full, in place of a sheet", metavar="KEY")
    ] = None,
) -> None:
    """Write a contact sheet: pictures with their texts, in one file that fetches nothing.

    With --key one sample in full; without --out its record is printed.

      tandem shards view runs/demo/shard/4d197e3eb880/out --split train --n 64 --out sheet.html

      tandem shards view runs/demo/shard/4d197e3eb880/out --key 0a1b2c3d4e5f60718293
    """
    from data_tools.shards import info as shard_info
    from data_tools.shards import sheet as shard_sheet

    with _mendable():
        if key is not None and out is None:
            record, image, where = shard_info.one_sample(corpus, key)
            print_json({"where": where, "image_bytes": len(image), "record": record})
            return
        target = out or Path("sheet.html")
        if key is not None:
            shard_sheet.write_sample(corpus, target, key)
        else:
            with _bars(False) as told:
                shard_sheet.write_sheet(corpus, target, split, count, seed, lambda n: told("draw", n, count))
    sys.stdout.write(f"{target}\n")


@contextmanager
def _mendable() -> Iterator[None]:
    """What is wrong with the data or the disk, as the command line tells it."""
    from data_tools.errors import DataError

    try:
        yield
    except DataError as error:
        raise StageError(str(error)) from error


@contextmanager
def _bars(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Bars on the standard error, while there is someone to see them: `told(part, count, total)`."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown, tasks = Console(stderr=True), dict[str, TaskID]()
    with Progress(*columns, console=shown, transient=True, disable=quiet or not shown.is_terminal) as bars:

        def told(part: str, count: int, total: int) -> None:
            if part not in tasks:
                tasks[part] = bars.add_task(part, total=total)
            bars.advance(tasks[part], count)

        yield told


def _processes(wanted: int | None, shards: int) -> int:
    return max(1, min(shards, wanted or len(os.sched_getaffinity(0))))


def _show_check(report: Any, shown: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    if report.findings:
        table = Table("shard", "kind", "sample", "byte", "what", box=None, title_justify="left")
        for finding in report.findings[:SHOWN]:
            style = "yellow" if finding.harmless else "red"
            cells = (finding.shard, finding.kind, finding.key, f"{finding.offset:,}", finding.detail)
            table.add_row(*(Text(cell) for cell in cells), style=style)
        shown.print(table)
        if report.kinds.total() > SHOWN:
            shown.print(f"and {report.kinds.total() - SHOWN:,} more; --json has them")
    for kind, count in report.kinds.most_common():
        shown.print(f"{kind}: {count:,}", markup=False)
    counts = f"{report.sound:,} of {report.samples:,} samples sound in {report.shards:,} shards, "
    shown.print(f"{counts}{report.bytes:,} bytes", markup=False)
    if not report.manifest:
        shown.print("no manifest: a change that leaves everything readable is not found", markup=False)


def _show_info(found: dict[str, Any], shown: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False)

    def row(name: str, value: Any) -> None:
        table.add_row(Text(name, style="bold"), Text(str(value)))

    def listed(counts: dict[str, Any]) -> str:
        return ", ".join(f"{name or '(none)'} {count:,}" for name, count in counts.items()) or "none"

    def spread(values: dict[str, float]) -> str:
        return "  ".join(f"{name} {value:,.0f}" for name, value in values.items()) or "none"

    row("samples", f"{found['samples']:,}")
    row("shards", f"{found['shards']:,}, {found['bytes']:,} bytes")
    row("bytes of a shard", spread(found["shard_bytes"]))
    row("splits", listed(found["splits"]))
    row("licences", listed(found["licences"]))
    for name, values in found["labels"].items():
        most = dict(list(values["most"].items())[:8])
        row(f"label {name}", f"{values['values']:,} values, the most frequent: {listed(most)}")
    for name, values in found["pictures"].items():
        row(name, spread(values))
    row("bytes of a record", spread(found["record_bytes"]))
    row("languages", f"{listed(found['records']['languages'])} (of {found['records']['read']:,} records)")
    row("queries a sample", spread(found["records"]["queries_a_sample"]))
    for name, values in found["records"]["characters"].items():
        row(f"characters of a {name}", spread(values))
    shown.print(table)
