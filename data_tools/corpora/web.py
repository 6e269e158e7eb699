"""Lists of pictures of the web with one text each: CC3M, CC12M, SBU, Wukong.

They are read a line at a time, so that memory does not grow with their length and a bad line is known by its
number. Lines that cannot be read are known to be in them: they are dropped, and counted, up to 1 %
(`BadLines`).
"""

import csv
import io
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

from data_tools.corpora.json_stream import entries
from data_tools.corpora.source import BadLines, Dropped, Row, Source, member, open_file, web_lines
from data_tools.errors import DataError

_LARGEST_FIELD = 1 << 17  # characters: no text of these lists is as long


def cc3m(source: Source) -> Iterator[Row | Dropped]:
    """Train_GCC-training.tsv, Validation_GCC-1.1.0-Validation.tsv: caption, tab, URL; no header, no
    quoting."""
    for path in source.files["pairs"]:
        yield from _two_columns(path, "caption<TAB>URL", url_first=False)


def cc12m(source: Source) -> Iterator[Row | Dropped]:
    """cc12m.tsv: URL, tab, caption; no header, no quoting."""
    for path in source.files["pairs"]:
        yield from _two_columns(path, "URL<TAB>caption", url_first=True)


def _two_columns(path: Path, layout: str, url_first: bool) -> Iterator[Row | Dropped]:
    bad, number = BadLines(path, layout), 0
    for number, line in web_lines(path):
        fields = line.split("\t") if line is not None else []
        if len(fields) != 2:
            problem = "invalid UTF-8" if line is None else f"{len(fields)} fields, not 2"
            yield bad.drop(number, problem)
            continue
        url, text = fields if url_first else reversed(fields)
        yield pair(url, text, f"{path.name}: line {number}")
    bad.check(number)


def pair(url: str, text: str, where: str) -> Row | Dropped:
    """A picture and its one caption, or what is missing."""
    url, text = url.strip(), text.strip()
    if not url:
        return Dropped("no_picture", where, text=text)
    if not text:
        return Dropped("no_text", where, url=url)
    return Row(url, captions=(text,))


def sbu(source: Source) -> Iterator[Row | Dropped]:
    """SBU_captioned_photo_dataset_urls.txt and …_captions.txt, line by line."""
    urls, captions = source.file("urls"), source.file("captions")
    bad, number = BadLines(captions, "captions in UTF-8"), 0
    for one, other in zip_longest(web_lines(urls), web_lines(captions)):
        if one is None or other is None:
            short, long = (urls, captions) if one is None else (captions, urls)
            raise DataError(f"{short}: it has {number} lines, {long} has more: they are not of one release.")
        (number, url), (_, text) = one, other
        if url is None or text is None:
            yield bad.drop(number, "invalid UTF-8")
        else:
            yield pair(url, text, f"{urls.name}: line {number}")
    bad.check(number)


def sbu_json(source: Source) -> Iterator[Row | Dropped]:
    """sbu-captions-all.json: {"image_urls": […], "user_ids": […], "captions": […]}, one beside the other."""
    path = source.file("pairs")
    texts = entries(path, "captions")
    for number, url in entries(path, "image_urls"):
        _, text = next(texts, (0, None))
        if text is None:
            raise DataError(
                f"{path}: 'captions' has fewer entries than 'image_urls' ({number}). Fetch it again."
            )
        one = {"image_urls": url, "captions": text}
        where = f"{path.name}: entry {number}"
        yield pair(member(one, "image_urls", str, where), member(one, "captions", str, where), where)
    if next(texts, None) is not None:
        raise DataError(f"{path}: 'captions' has more entries than 'image_urls'. Fetch it again.")


def wukong(source: Source) -> Iterator[Row | Dropped]:
    """wukong_100m_<n>.csv (url, caption) and wukong_test.csv (dir, caption: pictures in a folder)."""
    for path in source.files["pairs"]:
        for number, row in csv_rows(path, ("caption",)):
            if isinstance(row, Dropped):
                yield row
                continue
            if "url" not in row and "dir" not in row:
                raise DataError(f"{path}: its columns are {', '.join(row)}: no 'url' and no 'dir'.")
            if "url" not in row and not source.images:
                raise DataError(
                    f"{path}: it names pictures in a folder ('dir'): give `images` with this source."
                )
            url = row["url"] if "url" in row else source.url(row["dir"]) if row["dir"] else ""
            yield pair(url, row["caption"], f"{path.name}: line {number}")


def csv_rows(path: Path, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, str] | Dropped]]:
    """The rows of a CSV with a header by column, or as dropped, each with the number of its last line.

    Raises:
        DataError: no header, one without a `needed` column, a field without an end, or too many bad lines.
    """
    rows = csv_fields(path)
    _, header = next(rows, (1, []))
    missing = [name for name in needed if name not in header]
    if missing:
        raise DataError(
            f"{path}: line 1: the header is {','.join(header)!r}: no column {', '.join(map(repr, missing))}. "
            "Is it the file of this format?"
        )
    bad, count = BadLines(path, ",".join(header)), 0
    for line, fields in rows:
        count += 1
        if len(fields) != len(header):
            yield line, bad.drop(line, f"{len(fields)} fields, not {len(header)}")
        elif not is_utf8(fields):
            yield line, bad.drop(line, "invalid UTF-8")
        else:
            yield line, dict(zip(header, fields, strict=True))
    bad.check(count)


def csv_fields(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The fields of each row of a CSV with the number of its last line; empty lines are no rows.

    Bytes that are not UTF-8 come as lone surrogates: ask `is_utf8`. DataError for a quote without its end.
    """
    csv.field_size_limit(_LARGEST_FIELD)  # of the process: other readers may have set theirs
    with open_file(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline="") as file:
        reader = csv.reader(file)
        try:
            for fields in reader:
                if fields:
                    yield reader.line_num, fields
        except csv.Error as error:  # a field of more than _LARGEST_FIELD
            raise DataError(
                f"{path}: line {reader.line_num}: {error}: a quote without its end? Fetch the file again."
            ) from error


def is_utf8(fields: Sequence[str]) -> bool:
    """Whether no byte had to be put aside by surrogateescape."""
    try:
        "".join(fields).encode()
    except UnicodeEncodeError:
        return False
    return True
