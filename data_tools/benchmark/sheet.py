"""The annotation sheet of a benchmark: sheet.csv, and the same pairs as pages that work without a network.

    sheet.csv           one line a pair; sheet_csv.py says how texts are kept from being formulas
    sheet.html          the list of the pages
    sheet/00001.html    a page of pairs of one split, each with a small picture inside the page

The pages show no label: an annotator judges what is seen. The same pairs give the same bytes. Memory: the
pairs of one page.
"""

import base64
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from data_tools.benchmark.sheet_csv import defused, header, line
from data_tools.pictures import EncodedPicture

_QUALITY = 75  # of the small pictures (WebP)


class SheetWriter:
    """Writes pairs, split by split in the order they come in, to the sheet; `close` writes what is left."""

    def __init__(
        self,
        directory: Path,
        name: str,
        counts: Mapping[str, int],
        page: int,
        picture_px: int,
        max_pixels: int,
    ) -> None:
        """`counts`: pairs of each split, in their order. `page`: pairs a page. `picture_px`: longer side."""
        self._directory, self._name, self._counts, self._page = directory, name, counts, page
        self._px, self._max_pixels = picture_px, max_pixels
        self._pages = sum(-(-count // page) for count in counts.values())
        self._rows: list[dict[str, Any]] = []
        self._listed: dict[str, list[int]] = {split: [] for split in counts}
        self._number = 0
        self._templates = Environment(
            loader=PackageLoader("data_tools.benchmark"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
        )
        self._style, self._style_sha256 = self._part("sheet.css")
        self._script, self._script_sha256 = self._part("sheet.js")
        (directory / "sheet").mkdir(parents=True)
        self._csv = (directory / "sheet.csv").open("x", encoding="utf-8", newline="")
        self._csv.write(header())

    def add(self, pair: Mapping[str, Any], image: bytes) -> None:
        """Append a pair (id, split, key, text, label) with its picture. Raises PictureError for a bad one."""
        text = pair["text"].replace("\0", "\ufffd")
        cells = (pair["id"], pair["split"], defused(pair["key"]), defused(text), str(pair["label"]))
        self._csv.write(line((*cells, "", "", "", "")))
        if self._rows and self._rows[0]["split"] != pair["split"]:
            self._write_page()
        shown = {name: pair[name] for name in ("id", "split", "key", "label")}
        self._rows.append(shown | {"text": text} | self._small(image, pair["key"]))
        if len(self._rows) == self._page:
            self._write_page()

    def close(self) -> None:
        if self._rows:
            self._write_page()
        self._csv.close()
        splits = [
            {
                "name": split,
                "pairs": self._counts[split],
                "pages": [{"href": f"sheet/{number:05d}.html", "number": number} for number in numbers],
            }
            for split, numbers in self._listed.items()
            if numbers
        ]
        values = {
            "set": self._name,
            "pairs": sum(self._counts.values()),
            "pages": self._pages,
            "splits": splits,
        }
        self._render("sheet_list.html.j2", self._directory / "sheet.html", values)

    def _write_page(self) -> None:
        self._number += 1
        split = self._rows[0]["split"]
        self._listed[split].append(self._number)
        ids = "\n".join(row["id"] for row in self._rows)
        values = {
            "set": self._name,
            "split": split,
            "number": self._number,
            "pages": self._pages,
            "file_name": f"{self._number:05d}",
            "before": f"{self._number - 1:05d}.html" if self._number > 1 else None,
            "after": f"{self._number + 1:05d}.html" if self._number < self._pages else None,
            "digest": hashlib.sha256(ids.encode()).hexdigest()[:20],  # answers of the same pairs stay
            "pairs": self._rows,
            "script": self._script,
            "script_sha256": self._script_sha256,
        }
        self._render("sheet_page.html.j2", self._directory / "sheet" / f"{self._number:05d}.html", values)
        self._rows = []

    def _render(self, template: str, path: Path, values: dict[str, Any]) -> None:
        page = self._templates.get_template(template)
        made = page.render(values, style=self._style, style_sha256=self._style_sha256)
        path.write_text(made, encoding="utf-8", newline="")

    def _part(self, name: str) -> tuple[Markup, str]:
        """A file of templates/ as it stands, and the hash by which the page's policy allows it."""
        source, _, _ = self._templates.loader.get_source(self._templates, name)  # type: ignore[union-attr]
        return Markup(source), base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()

    def _small(self, image: bytes, key: str) -> dict[str, Any]:
        encoded = EncodedPicture(image, max_pixels=self._max_pixels, name=f"key {key}")
        picture = encoded.decoded((self._px, self._px)).copy()
        picture.thumbnail((self._px, self._px), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP", quality=_QUALITY)
        uri = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        return {"picture": uri, "width": picture.width, "height": picture.height}
