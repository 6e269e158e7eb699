"""A page of what the clean stage left out: counts, and examples side by side. It fetches nothing.

URLs come from the web: the template escapes every value, and a Content-Security-Policy forbids scripts and
requests.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from data_tools.pictures import open_picture

_SHOWN_PX = 128


@dataclass(frozen=True)
class Pair:
    """A picture that was left out beside the one that was kept."""

    kept_url: str
    dropped_url: str
    detail: str
    kept: str  # data: URLs
    dropped: str


def data_url(picture: bytes, *, max_pixels: int, name: str) -> str:
    """A picture's bytes as a small JPEG inside the page."""
    image = open_picture(picture, max_pixels=max_pixels, name=name)
    image.thumbnail((_SHOWN_PX, _SHOWN_PX), Image.Resampling.BILINEAR)
    small = io.BytesIO()
    image.save(small, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(small.getvalue()).decode()}"


def write_report(
    out: Path, counts: Mapping[str, int], pairs: Sequence[Pair], sensitive: Sequence[tuple[str, str]]
) -> None:
    """Write the page, by rename. `sensitive`: URLs and what to say of each."""
    environment = Environment(
        loader=PackageLoader("data_tools.clean"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("clean.html.j2").render(
        counts=[(name.replace("_", " "), n) for name, n in counts.items()],
        near_duplicates=counts["dropped_near_duplicate"],
        pairs=pairs,
        sensitive=sensitive,
    )
    unfinished = out.with_name(f"{out.name}.tmp")
    unfinished.write_text(page, encoding="utf-8")
    unfinished.replace(out)
