"""Embedding and evaluating a split: order, galleries, folds, damage, one process against several."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.shards import CorpusError
from learning.evaluation.embed import embed_images, embed_texts, spread
from learning.evaluation.gallery import Gallery, gallery_of, texts_of
from learning.evaluation.metrics import recalls
from learning.evaluation.retrieval import best_ranks
from learning.evaluation.validate import Outcome, evaluate_gallery, five_folds
from learning.methods.base import Texts
from learning.training import distributed
from tests import tiny_model
from tests.distributed_harness import run_distributed

CPU = torch.device("cpu")
IMAGES = 23  # with batches of 4: six blocks, the last one short; two or three processes do not divide them


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write_corpus(tmp_path_factory.mktemp("corpus"), IMAGES)


def evaluated(corpus: Path, **changed: Any) -> Outcome:
    options = {"batch": 4, "device": CPU, "max_length": 12} | changed
    texts = options.pop("texts", ["title"])
    relevance = options.pop("relevance", "concept")
    return evaluate_gallery(
        options.pop("method", None) or tiny_model.method(),
        tiny_model.tokenizer(),
        tiny_model.transform(),
        tiny_model.open_corpus(corpus),
        texts,
        relevance,
        **options,
    )


# ----------------------------------------------------------------------------------------------- galleries


def test_texts_that_are_equal_are_one_entry_right_for_all_their_images(corpus: Path) -> None:
    gallery = gallery_of(tiny_model.open_corpus(corpus), ["title"], "concept")
    assert len(gallery.images) == IMAGES
    assert len(gallery.texts) == 8  # 23 images, three a concept
    right_texts, right_images = gallery.right_texts(), gallery.right_images()
    assert right_texts.counts.tolist() == [1] * IMAGES
    assert right_images.counts.tolist() == [3] * 7 + [2]


def test_a_text_of_two_concepts_is_right_for_both() -> None:
    gallery = Gallery([0, 1, 2], ["a", "b", "c"], ["shared", "own of a"], [{0, 1}, {0}])
    assert gallery.right_images().of_query(0).tolist() == [0, 1]
    assert [gallery.right_texts().of_query(i).tolist() for i in range(2)] == [[0, 1], [0]]


def test_without_a_label_an_image_has_its_own_five_captions_and_a_caption_one_image(corpus: Path) -> None:
    gallery = gallery_of(tiny_model.open_corpus(corpus), ["captions"])
    assert gallery.right_texts().counts.tolist() == [5] * IMAGES
    assert gallery.right_images().counts.tolist() == [1] * 5 * IMAGES


def test_several_fields_are_asked_together(corpus: Path) -> None:
    gallery = gallery_of(tiny_model.open_corpus(corpus), ["title", "queries"], "concept")
    assert len(gallery.texts) == 8 + IMAGES
    assert gallery.right_texts().of_query(0).shape == (
        4,
    )  # the title and the queries of the concept's images


def test_texts_of_a_record() -> None:
    record = {
        "title": " a ",
        "content": None,
        "queries": [{"text": "q"}, {"text": " "}],
        "captions": ["c", ""],
    }
    assert [texts_of(record, field) for field in ("title", "content", "queries", "captions")] == [
        ["a"],
        [],
        ["q"],
        ["c"],
    ]


def test_what_cannot_be_evaluated_is_named(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no label 'colour'; there are: concept, vendor"):
        gallery_of(tiny_model.open_corpus(corpus), ["title"], "colour")
    bare = tiny_model.write_corpus(tmp_path / "bare", 3, labels={"concept": "", "vendor": "v"}, title="  ")
    index = tiny_model.open_corpus(bare)
    with pytest.raises(ValueError, match="'test0000' has no label 'concept'"):
        gallery_of(index, ["content"], "concept")
    with pytest.raises(ValueError, match="'test0000' has no title: its image has no right answer"):
        gallery_of(index, ["title"])


def test_folds_are_consecutive_and_hold_their_own_texts(corpus: Path) -> None:
    gallery = gallery_of(tiny_model.open_corpus(corpus), ["captions"])
    parts = gallery.folds(5)
    assert [len(part.images) for part, _, _ in parts] == [4, 5, 4, 5, 5]
    assert [i for _, images, _ in parts for i in images] == list(range(IMAGES))
    assert [t for _, _, texts in parts for t in texts] == list(range(5 * IMAGES))
    part, _, texts = parts[1]
    assert part.right_texts().counts.tolist() == [5] * 5
    assert part.texts == [gallery.texts[t] for t in texts]
    with pytest.raises(ValueError, match="folds: 24; allowed: 1 … 23"):
        gallery.folds(24)


# ----------------------------------------------------------------------------------------------- embedding


def test_rows_stand_in_the_order_of_the_index_whatever_the_batch(corpus: Path) -> None:
    index, method, done = tiny_model.open_corpus(corpus), tiny_model.method(), []
    found = embed_images(
        method, index, tiny_model.transform(), batch=4, device=CPU, max_pixels=10_000, advance=done.append
    )
    assert done == [4, 4, 4, 4, 4, 3]
    for i in (0, 7, 22):
        pixels = tiny_model.transform().plain(_opened(index.image_bytes(i)))
        with torch.no_grad():
            assert np.allclose(found[i], method.embed_images(pixels[None])[0].numpy(), atol=1e-5)
    texts = [f"red thing {i} {'long ' * (i % 5)}" for i in range(9)]
    rows = embed_texts(method, tiny_model.tokenizer(), texts, max_length=12, batch=4, device=CPU)
    alone = embed_texts(method, tiny_model.tokenizer(), texts[7:8], max_length=12, batch=4, device=CPU)
    assert np.allclose(rows[7], alone[0], atol=1e-5)


def _opened(data: bytes):  # type: ignore[no-untyped-def]
    from data_tools.pictures import open_picture

    return open_picture(data, max_pixels=10_000, name="x")


def test_a_half_precision_model_gives_float32_of_unit_length(corpus: Path) -> None:
    outcome = evaluated(corpus, method=tiny_model.method().to(torch.bfloat16))
    for rows in (outcome.images, outcome.texts):
        assert rows.dtype == np.float32
        assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


def _damage(corpus: Path, key: str, how: Callable[[bytes], bytes]) -> Path:
    index = tiny_model.open_corpus(corpus)
    data = index.image_bytes(index.keys.index(key))
    index.close()
    for path in corpus.rglob("*.tar"):
        whole = path.read_bytes()
        if data in whole:
            path.write_bytes(whole.replace(data, how(data)))
            return path
    raise AssertionError(f"{key} is in no shard")


@pytest.mark.parametrize(
    "how",
    [
        lambda data: b"<html>" + bytes(len(data) - 6),
        lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
        lambda data: tiny_model.picture_bytes(99)[: len(data)].ljust(
            len(data), b"\0"
        ),  # a whole one, another one
    ],
)
def test_a_damaged_picture_is_an_error_with_shard_and_key(
    tmp_path: Path, how: Callable[[bytes], bytes]
) -> None:
    corpus = tiny_model.write_corpus(tmp_path / "corpus", 9)
    shard = _damage(corpus, "test0005", how)
    with pytest.raises(ValueError, match=rf"{shard.name}: sample test0005: .*run the shard stage again"):
        evaluated(corpus)


def test_a_picture_over_the_limit_is_an_error_with_its_key(corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"sample test0000: bomb: .*raise max_pixels"):
        evaluated(corpus, max_pixels=100)


# ----------------------------------------------------------------------------------------------- evaluating


def test_metrics_are_those_of_the_ranks(corpus: Path) -> None:
    outcome = evaluated(corpus)
    gallery = outcome.gallery
    i2t = best_ranks(outcome.images, outcome.texts, gallery.right_texts(), query_block=3, gallery_block=2)
    t2i = best_ranks(outcome.texts, outcome.images, gallery.right_images(), query_block=5, gallery_block=7)
    assert recalls(i2t, t2i).items() <= outcome.metrics.items()
    assert outcome.metrics["chance_i2t_r@1"] == pytest.approx(100 / 8)
    assert (outcome.metrics["images"], outcome.metrics["texts"]) == (23, 8)


class Oracle(torch.nn.Module):
    """Embeds a text as its number, a picture as the number that its concept's title has."""

    def __init__(self, keys: list[str], wrong: set[int]):
        super().__init__()
        self.numbers = [int(key[-4:]) for key in keys]
        self.wrong, self.place = wrong, 0

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        numbers = self.numbers[self.place : self.place + len(images)]
        self.place += len(images)
        return torch.eye(16)[[(n // 3 + (n in self.wrong)) % 8 for n in numbers]]

    def embed_texts(self, texts: Texts) -> torch.Tensor:
        return torch.eye(16)[texts.ids[:, 0]]


class NumberTokenizer:
    def encode(self, texts: list[str], max_length: int) -> Texts:
        ids = torch.tensor([[int(text.split()[-1])] for text in texts])
        return Texts(ids, torch.ones_like(ids))


def test_a_model_that_errs_on_known_images_gets_the_recall_that_it_should(corpus: Path) -> None:
    index = tiny_model.open_corpus(corpus)
    outcome = evaluate_gallery(
        Oracle(index.keys, wrong={4, 9}),  # type: ignore[arg-type]
        NumberTokenizer(),  # type: ignore[arg-type]
        tiny_model.transform(),
        index,
        ["title"],
        "concept",
        batch=5,
        device=CPU,
        max_length=12,
    )
    assert outcome.metrics["i2t_r@1"] == pytest.approx(100 * 21 / 23)
    # wrong answers that score 0 as the right one does stand before it: seven others and the right one
    assert sorted(outcome.i2t_ranks.tolist())[-2:] == [8, 8]
    # image 4 is of concept 1 and taken for 2: a tie with the right images of 2, a wrong answer first
    assert outcome.t2i_ranks.tolist() == [1, 1, 2, 1, 2, 1, 1, 1]


def test_five_folds_are_the_mean_of_five_evaluations(corpus: Path) -> None:
    outcome = evaluated(corpus, texts=["captions"], relevance=None)
    folds = evaluated(corpus, texts=["captions"], relevance=None, folds=5).metrics
    single = []
    for part, images, texts in outcome.gallery.folds(5):
        i2t = best_ranks(outcome.images[images], outcome.texts[texts], part.right_texts())
        t2i = best_ranks(outcome.texts[texts], outcome.images[images], part.right_images())
        single.append(recalls(i2t, t2i))
    for name in single[0]:
        assert folds[name] == pytest.approx(np.mean([fold[name] for fold in single]))
    assert folds["t2i_r@1"] >= outcome.metrics["t2i_r@1"]  # a smaller gallery is no harder
    assert five_folds(outcome.images, outcome.texts, outcome.gallery).items() <= folds.items()


def test_evaluation_leaves_modes_gradients_and_random_numbers_as_they_were(corpus: Path) -> None:
    method = tiny_model.method().train()
    method.vision.eval()  # type: ignore[union-attr]
    modes = [module.training for module in method.modules()]
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    found = evaluated(corpus, method=method).metrics
    assert torch.equal(torch.rand(2), expected)
    assert [module.training for module in method.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())
    assert found == evaluated(corpus).metrics
    assert torch.is_grad_enabled()


# ----------------------------------------------------------------------------------------------- processes


def test_spread_needs_something() -> None:
    with pytest.raises(ValueError, match="nothing to embed"):
        spread(0, 4, lambda start, stop: torch.zeros(stop - start, 2))


def _evaluate_in(rank: int, world: int, corpus: str, damaged: str) -> list[Any]:
    """What an evaluation gives, to the last bit; the number of forward calls; what a damaged picture says."""
    calls: list[int] = []
    method = tiny_model.method()
    plain = method.embed_images
    method.embed_images = lambda images: (calls.append(len(images)), plain(images))[1]  # type: ignore[method-assign]
    outcome = evaluated(Path(corpus), method=method)
    few = evaluated(Path(corpus), batch=64)  # one block: other processes have nothing of their own
    try:
        evaluated(Path(damaged))
        words = "no error"
    except ValueError as error:
        words = str(error)
    values = [json.dumps(outcome.metrics), outcome.images.tobytes().hex(), outcome.texts.tobytes().hex()]
    return [
        *values,
        outcome.i2t_ranks.tolist(),
        outcome.t2i_ranks.tolist(),
        json.dumps(few.metrics),
        words,
        len(calls),
    ]


def _spread_in(rank: int, world: int) -> list[list[int]]:
    seen: list[int] = []

    def block(start: int, stop: int) -> torch.Tensor:
        seen.extend(range(start, stop))
        return torch.arange(start, stop)[:, None].repeat(1, 2)

    rows = spread(11, 3, block)
    return [rows[:, 0].tolist(), seen]


@pytest.mark.slow
def test_processes_share_the_work_and_change_nothing(corpus: Path, tmp_path: Path) -> None:
    damaged = tiny_model.write_corpus(tmp_path / "damaged", 9)
    _damage(
        damaged, "test0005", lambda data: bytes(len(data))
    )  # in the second block, that of the second process
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = _evaluate_in(0, 1, str(corpus), str(damaged))
    finally:
        torch.set_num_threads(threads)
    several = run_distributed(_evaluate_in, 2, str(corpus), str(damaged))
    for result in several:
        assert result[:-1] == one[:-1]
    assert "test0005" in one[-2]
    assert [one[-1], *(result[-1] for result in several)] == [6, 3, 3]  # the same number of calls on each


@pytest.mark.slow
def test_each_process_takes_its_own_blocks() -> None:
    results = run_distributed(_spread_in, 3)
    assert [rows for rows, _ in results] == [list(range(11))] * 3
    # blocks 0-2, 3-5, 6-8, 9-10: process 0 has the first and the last; the others keep in step by block 0
    assert [seen for _, seen in results] == [[0, 1, 2, 9, 10], [3, 4, 5, 0, 1, 2], [6, 7, 8, 0, 1, 2]]


def test_one_process_needs_no_process_group() -> None:
    assert distributed.world_size() == 1
    assert "torch.distributed" in sys.modules
    assert spread(3, 2, lambda start, stop: torch.arange(start, stop)).tolist() == [0, 1, 2]
