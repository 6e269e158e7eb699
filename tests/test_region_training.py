"""A method that reads regions: trained, validated, evaluated and used, and what is refused at the start."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import learning
from data_tools.regions.store import RegionStore
from data_tools.shards import ShardIndex
from learning.evaluation.embed import embed_images
from learning.training.split_regions import SplitRegions
from stages import evaluate, pretrain
from stages.base import Job, StageError
from tests import region_case
from tests.region_case import MODEL, write_store
from tests.training_case import config_values, make_job, write_corpus


@pytest.fixture(autouse=True, scope="module")
def method() -> Iterator[None]:
    region_case.plug_in()
    yield
    region_case.plug_out()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bad = {number: b"not a picture %d" % number for number in range(24)}  # nobody decodes one
    return write_corpus(tmp_path_factory.mktemp("shard") / "out", {"train": 24, "test": 6}, bad)


@pytest.fixture(scope="module")
def store(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a regions stage."""
    directory = tmp_path_factory.mktemp("regions")
    write_store(directory / "out", corpus)
    return directory


def values(**changed: Any) -> dict[str, Any]:
    plain = config_values(
        model=MODEL,
        losses={"ccl": 1.0},
        inputs={"corpus": "shard", "regions": "regions"},
        validate={"split": "test"},
        epochs=1,
        optimizer={"learning_rate": 1e-3},
    )
    return plain | changed


def job(directory: Path, corpus: Path, **inputs: Path) -> Job:
    made = make_job(directory, corpus)
    made.inputs = dict(made.inputs) | inputs
    return made


@pytest.mark.slow
def test_a_model_of_regions_is_trained_validated_evaluated_and_used(
    corpus: Path, store: Path, tmp_path: Path
) -> None:
    report = pretrain.run(pretrain.Config(**values()), job(tmp_path / "train", corpus, regions=store))
    assert report.counts["steps"] == 3 and report.counts["bad_samples"] == 0
    (tmp_path / "train" / "DONE.json").write_text("{}")
    gallery = {"name": "g", "split": "test", "texts": ["title"]}
    config = evaluate.Config.model_validate({"galleries": [gallery], "examples": 2, "batch": 4})
    inputs = {"weights": tmp_path / "train", "regions": store}
    found = evaluate.run(config, job(tmp_path / "eval", corpus, **inputs))
    for name in ("rsum", "i2t_r@1", "t2i_r@5"):
        assert found.metrics[f"eval/g/{name}"] == report.metrics[f"val/{name}"]
    shown = json.loads((tmp_path / "eval" / "out" / "examples.json").read_text())
    assert len(shown["g"]["t2i"]) == 2
    model = learning.load(tmp_path / "train")
    index = ShardIndex.open(corpus, "test")
    read = SplitRegions(RegionStore.open(store / "out"), index)
    embedded = model.embed_regions(read.block(0, 6), batch=4)
    cpu = torch.device("cpu")
    wanted = embed_images(
        model.method, index, model.transform, batch=6, device=cpu, max_pixels=1, regions=read.store
    )
    np.testing.assert_allclose(embedded, wanted, atol=1e-6)
    assert np.abs(embedded[0] - embedded[1]).max() > 1e-3
    with pytest.raises(ValueError, match=r"reads regions of pictures.*use embed_regions"):
        model.embed_images([])
    with pytest.raises(ValueError, match=r"model\.vision\.count: 4, but these regions: 3"):
        model.embed_regions(read.block(0, 6).each(lambda x: x[:, :3]))
    with pytest.raises(StageError, match=r"inputs\.regions: missing; Bagged reads regions"):
        evaluate.run(config, job(tmp_path / "eval_2", corpus, weights=tmp_path / "train"))


def test_what_does_not_go_together_is_told_before_the_first_step(
    corpus: Path, store: Path, tmp_path: Path
) -> None:
    def refused(says: str, *, regions: Path | None = store, **changed: Any) -> None:
        inputs = {} if regions is None else {"regions": regions}
        with pytest.raises((StageError, ValidationError), match=says):
            pretrain.run(pretrain.Config(**values(**changed)), job(tmp_path / "train", corpus, **inputs))

    wide = MODEL | {"vision": {"width": 7}}
    refused(r"model\.vision\.width: 7, but inputs\.regions: .*out: 6; set it to 6", model=wide)
    refused(r"model\.vision\.count: 9, but inputs\.regions", model=MODEL | {"vision": {"count": 9}})
    refused(r"inputs\.regions: missing; model\.vision\.tower is regions", inputs={"corpus": "shard"})
    refused("reads pictures, not regions; leave the input out", model=config_values()["model"])
    refused(
        r"validate\.task: reads pictures, and inputs\.regions is given",
        validate={"split": "test", "task": "matching"},
    )
    refused("is of no regions: name a regions stage", regions=corpus.parent)
    write_store(tmp_path / "some" / "out", corpus, without=["test0002"])
    refused(r"no regions of 1 of 6 samples .* test0002", regions=tmp_path / "some")


def test_galleries_of_pairs_and_attention_maps_are_refused_with_regions() -> None:
    plain = {"inputs": {"corpus": "s", "weights": "w", "regions": "r"}}
    gallery = {"name": "g", "split": "test"}
    for asked, says in (
        ({"galleries": [gallery | {"rerank": {"top_k": 2}}]}, r"galleries\.g\.rerank: reads pictures"),
        ({"galleries": [gallery | {"task": "matching"}]}, r"galleries\.g\.task: reads pictures"),
        ({"galleries": [gallery], "attention_maps": {"gallery": "g"}}, "attention_maps: reads pictures"),
    ):
        with pytest.raises(ValidationError, match=says):
            evaluate.Config.model_validate(plain | asked)
