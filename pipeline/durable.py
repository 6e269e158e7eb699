"""A file that is there whole or not at all."""

import os
import secrets
from pathlib import Path


def write_durably(path: Path, text: str) -> None:
    """The file is there whole or not at all, also after a power cut: temp file, fsync, rename, fsync."""
    unique = f"{os.getpid()}.{secrets.token_hex(4)}"  # two nodes may have the same process id
    temporary = path.with_name(f".{path.name}.{unique}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
