"""What the evaluate stage shows of a gallery: a seeded choice of queries, their first answers, thumbnails.

The choice knows nothing of the ranks: it shows what the model is like, not its best.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.pictures import open_picture
from data_tools.shards import ShardIndex
from learning.evaluation.label_retrieval import LabelOutcome, LabelSide
from learning.evaluation.matching import Matched
from learning.evaluation.rerank import Reranked, Side
from learning.evaluation.retrieval import RightAnswers, top_answers
from learning.evaluation.validate import Outcome

Entry = Callable[[int], dict[str, Any]]  # a picture or a text by its place, as examples.json has it


@dataclass(frozen=True)
class Shown:
    """How much is shown."""

    queries: int  # each way
    answers: int  # of each query
    thumbnail_px: int
    max_pixels: int
    seed: str


def retrieval_examples(outcome: Outcome, shown: Shown, index: ShardIndex, directory: Path) -> dict[str, Any]:
    """Queries in each direction asked, the answers in the order that the metrics count.

    Each answer has its `cosine` and, where it was re-ranked, its `match` probability. The pictures go to
    `directory`.
    """
    entries = _entries(outcome.gallery.texts, shown, index, directory)
    generator = random.Random(shown.seed)
    directions: dict[str, list[dict[str, Any]]] = {}
    ranks = outcome.whole.ranks()
    sides = outcome.whole.sides
    reranked: list[Reranked | None] = [*outcome.whole.reranked] or [None] * len(sides)
    # texts that ask for images come first
    both = sorted(zip(sides, reranked, strict=True), key=lambda pair: pair[0].direction == "i2t")
    for side, made in both:
        query_of, answer_of = entries[side.direction]
        chosen = sorted(generator.sample(range(len(side.queries)), min(shown.queries, len(side.queries))))
        directions[side.direction] = [
            {
                "query": query_of(query),
                "rank": int(ranks[side.direction][query]),
                "right_answers": int(side.right.counts[query]),
                **_answers(side, made, query, answer_of, shown.answers),
            }
            for query in chosen
        ]
    return {"images": len(outcome.images), "distinct_texts": len(outcome.texts), **directions}


def label_examples(outcome: LabelOutcome, shown: Shown, index: ShardIndex, directory: Path) -> dict[str, Any]:
    """Queries in each direction, of those that have a right answer, with their labels and NDCG in percent.

    Each answer has the names that it `shared` with the query. The pictures go to `directory`.
    """
    entries = _entries(outcome.gallery.texts, shown, index, directory)
    generator = random.Random(shown.seed)
    directions: dict[str, list[dict[str, Any]]] = {}
    for side in sorted(outcome.sides, key=lambda side: side.direction == "i2t"):
        counted = np.flatnonzero(side.judged.counted).tolist()
        chosen = sorted(generator.sample(counted, min(shown.queries, len(counted))))
        query_of, answer_of = entries[side.direction]
        directions[side.direction] = [
            {
                "query": query_of(query),
                "labels": [outcome.names[label] for label in side.asked.of_row(query)],
                "ndcg": round(100.0 * float(side.judged.ndcg[query]), 1),
                "rank": int(side.judged.ranks[query]),
                "right_answers": int(side.judged.rights[query]),
                **_label_answers(side, query, answer_of, outcome.names, shown.answers),
            }
            for query in chosen
        ]
    texts, images = len(outcome.gallery.texts), len(outcome.gallery.images)
    return {"images": images, "distinct_texts": texts, **directions}


def matching_examples(matched: Matched, shown: Shown, index: ShardIndex, directory: Path) -> dict[str, Any]:
    """Pictures with their texts, what the label says and the score, the highest first."""
    show = _Thumbnails(directory, index, shown)
    places = range(len(matched.texts))
    chosen = random.Random(shown.seed).sample(places, min(shown.queries, len(places)))
    chosen.sort(key=lambda i: (-matched.scores[i], i))
    pairs = [
        {
            "key": index.keys[i],
            "picture": show(i),
            "title": "",
            "text": matched.texts[i],
            "right": bool(matched.is_match[i]),
            "score": round(float(matched.scores[i]), 4),
        }
        for i in chosen
    ]
    return {"score": "match" if matched.by == "pairs" else "cosine", "pairs": pairs}


def _answers(side: Side, made: Reranked | None, query: int, answer_of: Entry, most: int) -> dict[str, Any]:
    """The first answers of a query, and the best right one."""
    right = side.right.of_query(query)
    row = RightAnswers.of([right.tolist()])
    by_cosine, cosines = top_answers(side.queries[query : query + 1], side.answers, row, most)
    listed: list[tuple[int, float, float | None]] = []  # position, cosine, match probability
    if made is not None:
        columns = (made.candidates[query], made.cosines[query], made.match[query])
        listed = [(int(a), float(c), float(m)) for a, c, m in zip(*columns, strict=True)]
    candidates = {position for position, _, _ in listed}
    best = next((position for position, _, _ in listed if position in right), None)
    if best is None:
        best = _best_right(side.queries[query], side.answers, right)
    listed += [
        (int(a), float(c), None)
        for a, c in zip(by_cosine[0], cosines[0], strict=True)
        if int(a) not in candidates
    ]
    answers = [
        {
            **answer_of(position),
            "right": bool(position in right),
            "cosine": round(cosine, 4),
            **({} if match is None else {"match": round(match, 4)}),
        }
        for position, cosine, match in listed[: min(most, len(side.answers))]
    ]
    return {"best_right": answer_of(best), "answers": answers}


def _label_answers(
    side: LabelSide, query: int, answer_of: Entry, names: Sequence[str], most: int
) -> dict[str, Any]:
    """The first answers of a query with what they share with it, and the first right one."""
    own = side.asked.of_row(query)
    right = side.given.with_one_of(own)
    positions, cosines = top_answers(
        side.queries[query : query + 1], side.answers, RightAnswers.of([right.tolist()]), most
    )
    answers = []
    for position, cosine in zip(positions[0].tolist(), cosines[0].tolist(), strict=True):
        shared = [names[label] for label in np.intersect1d(side.given.of_row(position), own)]
        found = {"right": bool(shared), "shared": shared, "cosine": round(cosine, 4)}
        answers.append(answer_of(position) | found)
    best = _best_right(side.queries[query], side.answers, right)
    return {"best_right": answer_of(best), "answers": answers}


def _entries(
    texts: Sequence[str], shown: Shown, index: ShardIndex, directory: Path
) -> dict[str, tuple[Entry, Entry]]:
    """Of each direction how a query and how an answer is shown; the pictures go to `directory`."""
    show = _Thumbnails(directory, index, shown)

    def image(i: int) -> dict[str, Any]:
        return {"key": index.keys[i], "picture": show(i), "title": index.record(i).get("title") or ""}

    def text(t: int) -> dict[str, Any]:
        return {"text": texts[t]}

    return {"i2t": (image, text), "t2i": (text, image)}


def _best_right(query: np.ndarray, answers: np.ndarray, right: np.ndarray) -> int:
    """The right answer that the model puts first."""
    return int(right[np.argmax(answers[right].astype(np.float64) @ query.astype(np.float64))])


class _Thumbnails:
    """Writes a sample's picture once, small, and gives its path relative to `out/`."""

    def __init__(self, directory: Path, index: ShardIndex, shown: Shown):
        self.directory, self.index, self.shown = directory, index, shown
        self.directory.mkdir(parents=True, exist_ok=True)
        self.written: set[Path] = set()  # not path.exists(): a killed run may have left half a file

    def __call__(self, i: int) -> str:
        key = self.index.keys[i]
        # a key comes from the corpus: its hash is a safe file name
        path = self.directory / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.webp"
        if path not in self.written:
            size = (self.shown.thumbnail_px, self.shown.thumbnail_px)
            picture = open_picture(
                self.index.image_bytes(i), max_pixels=self.shown.max_pixels, name=f"key {key}"
            )
            picture.thumbnail(size, Image.Resampling.LANCZOS)
            picture.save(path, "WEBP", quality=80)
            self.written.add(path)
        return f"{self.directory.name}/{path.name}"
