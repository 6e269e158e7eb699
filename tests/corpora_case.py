"""Tiny files of the layouts in which public data sets are given, and what an importer makes of them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.corpora.registry import FORMATS
from data_tools.corpora.source import Dropped
from stages.ingest import SourceConfig


def write(folder: Path, files: Mapping[str, Any]) -> None:
    """Files by path: bytes and texts as they are, anything else as JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            path.write_bytes(text.encode())


def read(folder: Path, source: Mapping[str, Any]) -> tuple[list[Any], list[tuple[str, str]]]:
    """The rows that a source of a recipe gives, and of each dropped entry its reason and where it stood."""
    config = SourceConfig(**source)
    found = list(FORMATS[config.format].read(config.source(folder)))
    dropped = [(one.reason, one.where) for one in found if isinstance(one, Dropped)]
    return [one for one in found if not isinstance(one, Dropped)], dropped
