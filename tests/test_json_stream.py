"""Entries of a large JSON file equal json.loads's, for any block size; damage is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.corpora import json_stream
from data_tools.corpora.json_stream import entries
from data_tools.errors import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    value=st.lists(VALUES, max_size=5) | st.dictionaries(st.text(), VALUES, max_size=5),
    block=st.integers(1, 40),
    ascii_alone=st.booleans(),
    indent=st.sampled_from([None, 1]),
)
def test_entries_equal_the_whole_value(
    tmp_path_factory: pytest.TempPathFactory, value: Any, block: int, ascii_alone: bool, indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps(value, ensure_ascii=ascii_alone, indent=indent), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_BLOCK", block)
        found = list(entries(path))
        wrapped = path.with_name("b.json")
        whole = {"before": {"x": [1, {}]}, "number": 12345, "wanted": value, "after": []}
        wrapped.write_text(json.dumps(whole), encoding="utf-8")
        inner = list(entries(wrapped, "wanted"))
    expected = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    assert found == expected
    assert inner == expected


@pytest.mark.parametrize(
    ("text", "member", "problem"),
    [
        (b'[{"a": 1}, {"a"', None, r"character 11: invalid JSON"),
        (b"[1, 2] [3]", None, r"character 7: invalid JSON: the end of the file was expected"),
        (b"[1 2]", None, r"invalid JSON: , or \] was expected, '2\]'"),
        (b'{"a": 1}', "images", r"it has no member 'images'"),
        (b'{"images": 3}', "images", r"'images': neither an array nor an object"),
        (b"[]", "images", r"not a JSON object with a member 'images'"),
        (b'["\xff"]', None, "invalid UTF-8"),
        (b"", None, "neither an array nor an object"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: bytes, member: str | None, problem: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(DataError, match=problem):
        list(entries(path, member))
