"""What a worker process of the crawl must know; light to import, and pickled to each."""

from dataclasses import dataclass
from pathlib import Path

from data_tools.pictures import PictureRules
from data_tools.web.opener import Guard
from data_tools.web.politeness import Limits


@dataclass(frozen=True)
class FetchSettings:
    """How to fetch pieces, and where to."""

    folder: Path  # of the tars
    rules: PictureRules
    guard: Guard
    limits: Limits
    robots: bool
    threads: int  # a process
    per_piece: int  # URLs of a piece, at most
