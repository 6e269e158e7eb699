"""`tandem shards …`: help, exit codes, JSON, and what a person is shown."""

import json
from pathlib import Path

import pytest

from tests.pipeline_harness import inline, tandem
from tests.shard_case import change, rows, write_corpus


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus")
    return tmp_path


def damage(place: Path, key: str) -> None:
    row = rows(place / "corpus")[key]
    change(place / "corpus" / row["shard"], row["image_offset"] + 50, b"!!")


@pytest.mark.parametrize("name", ["check", "repair", "info", "view"])
def test_each_command_has_an_example(tmp_path: Path, name: str) -> None:
    assert f"tandem shards {name}" in inline("shards", name, "--help", cwd=tmp_path).stdout


def test_check_says_sound_or_what_is_not(place: Path) -> None:
    shown = inline("shards", "check", "corpus", cwd=place).stdout
    assert "12 of 12 samples sound" in shown
    damage(place, "0005")
    shown = inline("shards", "check", "corpus", cwd=place, code=2).stdout
    assert "0005" in shown
    assert "11 of 12 samples sound" in shown
    assert "data: 1" in shown
    found = json.loads(
        inline("shards", "check", "corpus", "--json", "--processes", "1", cwd=place, code=2).stdout
    )
    row = rows(place / "corpus")["0005"]
    assert found["findings"] == [
        {
            "shard": row["shard"],
            "kind": "data",
            "key": "0005",
            "offset": row["image_offset"],
            "harmless": False,
            "detail": "the picture is not the one that the index's checksum tells",
        }
    ]
    assert (found["samples"], found["sound"], found["kinds"]) == (12, 11, {"data": 1})


def test_check_of_bare_tars_says_what_it_cannot_tell(place: Path) -> None:
    shown = inline(
        "shards", "check", "corpus/train/train-00000.tar", "corpus/train/train-00001.tar", cwd=place
    ).stdout
    assert "no manifest" in shown
    assert "in 2 shards" in shown


def test_many_findings_are_cut_in_the_table_and_whole_in_json(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.shards_command.SHOWN", 2)
    for key in ("0001", "0002", "0005"):
        damage(place, key)
    assert "and 1 more; --json has them" in inline("shards", "check", "corpus", cwd=place, code=2).stdout
    found = json.loads(inline("shards", "check", "corpus", "--json", cwd=place, code=2).stdout)
    assert len(found["findings"]) == 3


def test_repair_and_what_it_lost(place: Path) -> None:
    damage(place, "0005")
    shown = inline("shards", "repair", "corpus", "--out", "new", cwd=place).stdout
    assert "11 samples rescued" in shown
    assert "lost, data: 1" in shown
    assert "lost.parquet" in shown
    inline("shards", "check", "new", "--decode", cwd=place)
    again = inline("shards", "repair", "corpus", "--out", "new", cwd=place, code=2)
    assert "exists already" in again.stderr
    found = json.loads(inline("shards", "repair", "corpus", "--out", "two", "--json", cwd=place).stdout)
    assert (found["rescued"], found["lost"], found["reasons"]) == (11, 1, {"data": 1})


def test_info_and_view(place: Path) -> None:
    shown = inline("shards", "info", "corpus", cwd=place).stdout
    assert "CC-BY-4.0 6, MIT 6" in shown
    assert json.loads(inline("shards", "info", "corpus", "--json", cwd=place).stdout)["samples"] == 12
    inline("shards", "view", "corpus", "--split", "train", "--n", "3", "--out", "sheet.html", cwd=place)
    assert (place / "sheet.html").read_text().count("<figure") == 3
    found = json.loads(inline("shards", "view", "corpus", "--key", "0004", cwd=place).stdout)
    assert found["record"]["title"] == "title 4"
    inline("shards", "view", "corpus", "--key", "0004", "--out", "one.html", cwd=place)
    assert "title 4" in (place / "one.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["check", "none"], "there is no such file"),
        (["check", "."], "no .tar file is below"),
        (["info", "."], "no manifest"),
        (["view", "corpus", "--split", "test"], "no split 'test'; there are: train"),
        (["view", "corpus", "--key", "none"], "no sample has the key 'none'"),
        (["view", "corpus", "--out", "a.pdf"], "a .html or a .png"),
    ],
)
def test_mistakes_are_named(place: Path, arguments: list[str], says: str) -> None:
    if arguments == ["check", "."]:
        (place / "empty").mkdir()
        arguments = ["check", "empty"]
    shown = inline("shards", *arguments, cwd=place, code=2)
    assert says in shown.stderr
    assert "Traceback" not in shown.stderr


@pytest.mark.slow
def test_workers_side_by_side_as_a_command(place: Path) -> None:
    damage(place, "0005")
    found = json.loads(
        tandem("shards", "check", "corpus", "--json", "--processes", "2", cwd=place, code=2).stdout
    )
    assert found["kinds"] == {"data": 1}
    tandem("shards", "repair", "corpus", "--out", "new", "--processes", "2", cwd=place)
    tandem("shards", "check", "new", cwd=place)
