"""What the evaluate stage shows of a gallery: a seeded choice of queries with their first answers, thumbnails.

The choice knows nothing of the ranks: it shows what the model is like, not its best.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.pictures import open_picture
from data_tools.shards import ShardIndex
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
    show = _Thumbnails(directory, index, shown)

    def image(i: int) -> dict[str, Any]:
        return {"key": index.keys[i], "picture": show(i), "title": index.record(i).get("title") or ""}

    def text(t: int) -> dict[str, Any]:
        return {"text": outcome.gallery.texts[t]}

    generator = random.Random(shown.seed)
    directions = {}
    ranks = outcome.whole.ranks()
    of_direction = {
        side.direction: (side, made)
        for side, made in zip(
            outcome.whole.sides, outcome.whole.reranked or [None] * len(outcome.whole.sides), strict=True
        )
    }
    for direction, query_of, answer_of in (("t2i", text, image), ("i2t", image, text)):
        if direction in of_direction:
            side, made = of_direction[direction]
            chosen = sorted(generator.sample(range(len(side.queries)), min(shown.queries, len(side.queries))))
            directions[direction] = [
                {
                    "query": query_of(query),
                    "rank": int(ranks[direction][query]),
                    "right_answers": int(side.right.counts[query]),
                    **_answers(side, made, query, answer_of, shown.answers),
                }
                for query in chosen
            ]
    return {"images": len(outcome.images), "distinct_texts": len(outcome.texts), **directions}


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
