"""A contact sheet of a corpus: pictures with their texts, as one HTML page that fetches nothing, or as a PNG.

Texts come from the web. The template escapes every value, none becomes a link, pictures are drawn anew and
inlined, and a Content-Security-Policy forbids scripts and requests besides.
"""

import base64
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image, ImageDraw, ImageFont

from data_tools.pictures import EncodedPicture, PictureError
from data_tools.shards import ShardIndex
from data_tools.shards.files import CorpusError
from data_tools.shards.info import drawn, one_sample, record_text

THUMB_PX = 192
WHOLE_PX = 1600  # of the longer side, of one sample in full
MAX_PIXELS = 100_000_000
MOST_TEXTS = 12  # queries and captions of a sample that a sheet shows
FONTS = ("NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "wqy-microhei.ttc", "DroidSansFallbackFull.ttf")
_PNG_TEXT_PX = 44

_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><title>{{ title }}</title>
<style>
body { font: 14px/1.4 system-ui, "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif;
  margin: 1.5em; color: #1c1e21; background: #fff }
h1 { font-size: 18px; margin: 0 0 .2em } p.about { color: #666; margin: 0 0 1.2em }
main { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax({{ thumb + 24 }}px, 1fr)) }
figure { margin: 0; padding: 10px; border: 1px solid #ddd; border-radius: 6px; overflow-wrap: anywhere }
figure.whole { border: 0; padding: 0 }
figure > div { height: {{ thumb }}px; display: flex; align-items: center; justify-content: center;
  background: #f4f4f5 }
figure.whole > div { height: auto }
img { max-width: 100%; max-height: 100% } b { display: block; margin-top: .5em }
bdi { unicode-bidi: isolate } small { color: #666; display: block } .bad { color: #a11 }
ul { margin: .3em 0; padding-left: 1.2em } pre { white-space: pre-wrap; background: #f4f4f5; padding: 1em }
</style></head><body>
<h1>{{ title }}</h1><p class="about">{{ about }}</p>
<main{% if whole %} style="display:block"{% endif %}>
{% for cell in cells %}
<figure{% if whole %} class="whole"{% endif %}>
<div>{% if cell.picture %}<img src="{{ cell.uri }}" alt="">
{% else %}<span class="bad">{{ cell.problem }}</span>{% endif %}</div>
<figcaption>
{% if whole %}<pre>{{ cell.whole }}</pre>{% else %}
<b><bdi>{{ cell.title }}</bdi></b>
{% if cell.content %}<bdi>{{ cell.content }}</bdi>{% endif %}
{% if cell.texts %}<ul>{% for text in cell.texts %}<li><bdi>{{ text }}</bdi></li>{% endfor %}</ul>{% endif %}
{% if cell.more %}<small>and {{ cell.more }} more</small>{% endif %}
<small>{{ cell.facts }}</small><small>{{ cell.key }}</small>{% endif %}
</figcaption></figure>
{% endfor %}
</main></body></html>
"""


@dataclass(frozen=True)
class Cell:
    """One sample as a sheet shows it."""

    key: str
    picture: Image.Image | None
    problem: str  # why there is no picture
    title: str
    content: str
    texts: list[str]
    more: int  # texts that are not shown
    facts: str
    whole: str  # the record

    @property
    def uri(self) -> str:
        """The picture within the page; "" where there is none."""
        if self.picture is None:
            return ""
        data = io.BytesIO()
        self.picture.save(data, "JPEG", quality=88)
        return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def write_sheet(
    directory: Path,
    out: Path,
    split: str | None,
    count: int,
    seed: int,
    on_progress: Callable[[int], None] = lambda samples: None,
) -> int:
    """A sheet of `count` samples of a split (None: of all), drawn by `seed`; how many it shows.

    `out` ends in .html or .png. A page has all texts, in the fonts of the browser. A PNG has keys and titles;
    Chinese ones where one of FONTS is on the machine.

    Raises:
        CorpusError: no corpus, a damaged one, an unknown split, or another ending of `out`.
    """
    _check_ending(out)
    index = ShardIndex.open(directory, split)
    cells = []
    for i in drawn(len(index), count, seed).tolist():
        try:
            cells.append(_cell(index.keys[i], index.record(i), index.image_bytes(i), THUMB_PX))
        except CorpusError as error:  # a sample that is damaged has its place, and says so
            cells.append(Cell(index.keys[i], None, str(error), "", "", [], 0, "", ""))
        on_progress(1)
    total = len(index)
    index.close()
    about = f"{len(cells):,} of {total:,} samples of {split or 'all splits'}, drawn by seed {seed}"
    _write(out, str(directory), about, cells, whole=False)
    return len(cells)


def write_sample(directory: Path, out: Path, key: str) -> None:
    """One sample in full: its picture and its record. Raises CorpusError, also where there is no such key."""
    _check_ending(out)
    record, image, where = one_sample(directory, key)
    _write(out, key, where, [_cell(key, record, image, WHOLE_PX)], whole=True)


def _check_ending(out: Path) -> None:
    if out.suffix.lower() not in (".html", ".png"):
        raise CorpusError(f"{out}: a sheet is a .html or a .png file; give --out another ending")


def _cell(key: str, record: dict[str, Any], image: bytes, px: int) -> Cell:
    try:
        picture: Image.Image | None = EncodedPicture(image, max_pixels=MAX_PIXELS, name=key).decoded((px, px))
        problem = ""
    except PictureError as error:
        picture, problem = None, f"{error.reason}: {error.detail}"
    if picture is not None:
        picture = picture.copy()
        picture.thumbnail((px, px))
    texts = [_text(entry) for name in ("queries", "captions") for entry in record.get(name) or ()]
    labels = record.get("labels") or {}
    facts = [f"{record.get('width')} × {record.get('height')} px", f"{len(image):,} bytes"]
    facts += [str(record[name]) for name in ("split", "lang", "licence") if record.get(name)]
    facts += [f"{name}: {value}" for name, value in labels.items()]
    return Cell(
        key,
        picture,
        problem,
        str(record.get("title") or ""),
        str(record.get("content") or ""),
        texts[:MOST_TEXTS],
        max(0, len(texts) - MOST_TEXTS),
        " · ".join(facts),
        record_text(record),
    )


def _text(entry: Any) -> str:
    return str(entry.get("text", "")) if isinstance(entry, dict) else str(entry)


def _write(out: Path, title: str, about: str, cells: list[Cell], whole: bool) -> None:
    if out.suffix.lower() == ".png":
        data = _png(cells, WHOLE_PX if whole else THUMB_PX)
    else:
        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
        page = environment.from_string(_TEMPLATE)
        text = page.render(title=title, about=about, cells=cells, whole=whole, thumb=THUMB_PX)
        data = text.encode("utf-8", "replace")  # half of a surrogate pair, which JSON may hold, is no text
    aside = out.with_name(f"{out.name}.tmp")
    try:
        aside.write_bytes(data)
        aside.replace(out)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise CorpusError(
            f"{out}: the sheet cannot be written: {error.strerror}; give another --out"
        ) from error


def _font(size: int) -> tuple[ImageFont.ImageFont | ImageFont.FreeTypeFont, bool]:
    """The first of FONTS that is here, else Pillow's own; and whether it draws Latin script alone."""
    for name in FONTS:
        try:
            return ImageFont.truetype(name, size), False
        except OSError:
            continue
    return ImageFont.load_default(size), True


def _png(cells: list[Cell], px: int) -> bytes:
    """Pictures in a grid, each over its key and its title."""
    columns = max(1, min(len(cells), math.ceil(math.sqrt(len(cells)))))
    rows = math.ceil(len(cells) / columns)
    sheet = Image.new("RGB", (columns * (px + 8), rows * (px + 8 + _PNG_TEXT_PX)), "white")
    draw, (font, latin_alone) = ImageDraw.Draw(sheet), _font(12)
    for number, cell in enumerate(cells):
        x, y = number % columns * (px + 8) + 4, number // columns * (px + 8 + _PNG_TEXT_PX) + 4
        if cell.picture is not None:
            left, top = (px - cell.picture.width) // 2, (px - cell.picture.height) // 2
            sheet.paste(cell.picture, (x + left, y + top))
        title = " ".join((cell.title or cell.problem).split())
        if latin_alone and not title.isascii():
            title = "(see the .html)"
        while draw.textlength(title, font) > px:
            title = title[:-1]
        draw.text((x, y + px + 2), cell.key[:30], "gray", font)
        draw.text((x, y + px + 18), title, "black", font)
    data = io.BytesIO()
    sheet.save(data, "PNG")
    return data.getvalue()
