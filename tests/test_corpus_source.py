"""data.corpus: a corpus made elsewhere, in a directory or at an address, in place of an input stage."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_tools import remote
from data_tools.corpus_source import CorpusSource
from data_tools.remote import Patience
from pipeline import estimates, plan
from pipeline.fingerprint import identities
from pipeline.recipe import load
from stages.base import StageError
from stages.evaluate import Config as Evaluate
from stages.pretrain import Config, run
from tests.range_server import serving
from tests.training_case import config_values, make_job, write_corpus

ONE: dict[str, Any] = {"epochs": 1, "losses": {"ccl": 1.0}, "inputs": {}}


def recipe(directory: Path, data: dict[str, Any], **changed: Any) -> Path:
    values = config_values(**ONE | {"data": data} | changed)
    path = directory / "recipe.yaml"
    path.write_text(
        json.dumps({"name": "elsewhere", "tracking": {"uri": "off"}, "stages": {"train": values}})
    )
    return path


def fingerprint(path: Path) -> str:
    return identities(load(path), path.parent / "runs")["train"].fingerprint


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE", Patience(tries=2, first_wait_s=0.01))


def test_what_the_corpus_is_enters_the_fingerprint_and_where_it_is_does_not(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", {"train": 19})
    here = fingerprint(recipe(tmp_path, {"corpus": "corpus"}))  # relative to the recipe's file
    shutil.copytree(corpus, tmp_path / "copy")
    assert fingerprint(recipe(tmp_path, {"corpus": str(tmp_path / "copy")})) == here
    with serving(tmp_path) as server:
        address = {"corpus": f"{server.address}/corpus", "cache_dir": "cache", "cache_gb": 3}
        path = recipe(tmp_path, address)
        assert fingerprint(path) == here
        shown = plan.make(load(path), tmp_path / "runs")
        assert estimates._samples(shown, shown["train"], shown.recipe.stages["train"])[0] == 19
        server.fault = lambda path, times: 503
        with pytest.raises(
            StageError, match=r"stages\.train\.data\.corpus: http://127.*manifest.json: cannot be read"
        ):
            fingerprint(path)
    shutil.rmtree(corpus)
    write_corpus(corpus, {"train": 20})
    assert fingerprint(recipe(tmp_path, {"corpus": "corpus"})) != here
    shutil.rmtree(corpus)
    stage = plan.make(load(tmp_path / "recipe.yaml"), tmp_path / "runs")["train"]
    assert (stage.action, stage.why.split(":")[0]) == ("blocked", "manifest.json is not there")


def test_one_place_is_named_and_an_address_has_a_cache(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", {"train": 19})
    with pytest.raises(StageError, match=r"recipe.yaml:\d+: stages.train.inputs.corpus: missing"):
        load(recipe(tmp_path, {}))
    both = recipe(tmp_path, {"corpus": "corpus"}, inputs={"corpus": "shard"})
    text = json.loads(both.read_text())
    text["stages"] = {"shard": {"kind": "tests.tiny.numbers", "count": 1}} | text["stages"]
    both.write_text(json.dumps(text))
    with pytest.raises(StageError, match=r"stages.train.inputs.corpus: another field names it too"):
        load(both)
    with pytest.raises(StageError, match=r"data.cache_dir: missing; s3://b/c is read by way of a cache"):
        load(recipe(tmp_path, {"corpus": "s3://b/c"}))
    with pytest.raises(ValueError, match=r"data.corpus: missing, and so is inputs.corpus"):
        CorpusSource().place(None, tmp_path)


def test_training_at_an_address_gives_what_training_in_the_directory_gives(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "shard/out", {"train": 19})
    values = config_values(**ONE | {"inputs": {"corpus": "shard"}})
    straight = run(Config(**values), make_job(tmp_path / "a", corpus))
    with serving(corpus) as server:
        data = {"corpus": server.address, "cache_dir": str(tmp_path / "cache"), "mix_shards": None}
        job = make_job(tmp_path / "b", corpus)
        job.inputs = {}
        report = run(Config(**values | {"inputs": {}, "data": data}), job)
        with pytest.raises(StageError, match=r"the cache .* takes 0.000: .*data.cache_gb"):
            small = data | {"cache_gb": 1e-5, "cache_dir": str(tmp_path / "cache")}
            run(Config(**values | {"inputs": {}, "data": small}), make_job(tmp_path / "c", corpus))
    assert report.metrics["loss/total"] == straight.metrics["loss/total"]
    assert 0 <= report.metrics["train/data_wait_share"] <= 1


def test_evaluate_reads_elsewhere_too() -> None:
    values = {"kind": "evaluate", "inputs": {"weights": "train"}, "galleries": [{"name": "g", "split": "t"}]}
    config = Evaluate(**values, data={"corpus": "http://x/c", "cache_dir": "cache"})  # type: ignore[arg-type]
    assert config.addresses() == {"data.corpus": "http://x/c/manifest.json"}
    assert config.named_elsewhere() == {"corpus"}
    assert Evaluate(**values, data={"corpus": "c"}).files() == {"data.corpus": Path("c/manifest.json")}  # type: ignore[arg-type]
