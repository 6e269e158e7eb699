"""Entries of a large JSON file, one at a time: of its top array or object, or of one member of its top
object.

Annotation files are one JSON value of up to gigabytes (GQA's questions: a million entries). Memory here grows
with the largest single entry alone.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from data_tools.corpora.source import open_file
from data_tools.errors import DataError

_BLOCK = 1 << 20  # characters
_SPACE = " \t\r\n"
_OF_NUMBERS = "0123456789+-.eE"


def entries(path: Path, name: str | None = None) -> Iterator[tuple[str | int, Any]]:
    """(index, value) of an array's elements, or (key, value) of an object's members.

    Args:
        name: of the top object's member whose entries are wanted; None: those of the top value itself.

    Raises:
        DataError: invalid JSON or UTF-8, no such member, or a value that is neither an array nor an object.
    """
    where = f"{path}: '{name}'" if name is not None else str(path)
    with open_file(path) as raw:
        text = _Text(io.TextIOWrapper(raw, encoding="utf-8-sig"), path)
        if name is None:
            yield from text.entries(where)
            text.end()
            return
        if text.peek() != "{":
            raise DataError(
                f"{path}: not a JSON object with a member '{name}'. Check `sources` in the recipe."
            )
        for key in text.object_keys():
            if key == name:
                yield from text.entries(where)
                return
            text.skip()
    raise DataError(f"{path}: it has no member '{name}'. Is it the file of this format?")


class _Text:
    """The file as a window that moves on; what was read is let go."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file, self._path = file, path
        self._window, self._at, self._gone = "", 0, 0
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is no blank; "" at the end."""
        while True:
            while self._at < len(self._window):
                if self._window[self._at] not in _SPACE:
                    return self._window[self._at]
                self._at += 1
            if not self._more(_BLOCK):
                return ""

    def entries(self, where: str) -> Iterator[tuple[str | int, Any]]:
        opening = self.peek()
        if opening == "{":
            for key in self.object_keys():
                yield key, self._value()
        elif opening == "[":
            for number in self._elements():
                yield number, self._value()
        else:
            raise DataError(f"{where}: neither an array nor an object. Is it the file of this format?")

    def object_keys(self) -> Iterator[str]:
        """The keys of an object; its values are for the caller to take, before the next key."""
        self._take("{")
        if self.peek() == "}":
            self._take("}")
            return
        while True:
            if self.peek() != '"':
                self._fail("a key in quotes")
            key = str(self._value())
            self._take(":")
            yield key
            if self._take(",}") == "}":
                return

    def skip(self) -> None:
        """Over one value, an entry at a time where it has entries."""
        if self.peek() in ("{", "["):
            for _ in self.entries(""):
                pass
        else:
            self._value()

    def end(self) -> None:
        if self.peek():
            self._fail("the end of the file")

    def _elements(self) -> Iterator[int]:
        self._take("[")
        if self.peek() == "]":
            self._take("]")
            return
        number = 0
        while True:
            yield number
            number += 1
            if self._take(",]") == "]":
                return

    def _value(self) -> Any:
        self.peek()
        size = _BLOCK
        while True:
            try:
                value, end = self._decoder.raw_decode(self._window, self._at)
            except json.JSONDecodeError as error:
                if self._more(size):
                    size *= 2  # so that a large value is not tried once a block
                    continue
                self._fail(error.msg)
            rest = self._window[end : end + 8]
            if len(rest) < 8 and not rest.strip(_OF_NUMBERS) and self._more(_BLOCK):
                continue  # a number may go on
            self._at = end
            return value

    def _take(self, allowed: str) -> str:
        found = self.peek()
        if not found or found not in allowed:
            self._fail(" or ".join(allowed))
        self._at += 1
        return found

    def _more(self, size: int) -> bool:
        try:
            block = self._file.read(size)
        except UnicodeDecodeError as error:
            raise DataError(f"{self._path}: invalid UTF-8 ({error.reason}). Fetch the file again.") from error
        self._gone += self._at
        self._window, self._at = self._window[self._at :] + block, 0
        return bool(block)

    def _fail(self, wanted: str) -> Any:
        found = self._window[self._at : self._at + 30]
        raise DataError(
            f"{self._path}: character {self._gone + self._at}: invalid JSON: {wanted} was expected, "
            f"{found!r} stands there. The file may be cut short: fetch it again."
        )
