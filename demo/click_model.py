"""A seeded click model: derives a search engine's click log from the drawings' names and tags.

There are no real users behind it. For every concept it makes queries in English and Chinese, or in one of
the two, shows each query right drawings and wrong ones, and draws clicks. The model, with all its numbers in
`ClickModel`:

1. Query `q` has the parts it was made from: a name, or a tag and a name, or two tags. A drawing FITS `q` if
   the names and tags of its concept contain all parts. RIGHT are, for two tags, all drawings that fit; for a
   name (with a tag or without), those of the concept that has the name. Wrong are drawings that do not fit.
   Those that fit by a tag what another concept has as its name (a cricket bat for "bat picture") are neither,
   and are not shown.
2. The result list of `q`: the right drawings (all vendors; at most `max_right`) and
   Poisson(`wrong_per_query`) wrong ones, a part from the concept's own subgroup, the rest from other groups.
   It is ranked by relevance plus noise.
3. Volume V_q ~ lognormal(ln `volume_median`, `volume_sigma`); shows at position p ~ Poisson(V_q / (1 +
   `scroll` (p - 1))).
4. A drawing's attraction a is drawn from a Beta distribution by its relevance; clicks ~ Binomial(shows,
   min(1, a * p^-`position_bias` + `accident`)): position bias and accidental clicks hide the truth from the
   filter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ENGLISH = ("{} emoji", "{} picture", "{} icon", "picture of {}", "{} drawing", "{} clipart")
CHINESE = ("{}的图片", "{}表情", "{} 图标", "{}卡通画", "{}简笔画", "{}的表情包")


@dataclass(frozen=True)
class Concept:
    """What is drawn: its code point, names, tags and place."""

    codepoint: str
    name_en: str
    tags_en: tuple[str, ...]
    name_zh: str
    tags_zh: tuple[str, ...]
    group: str
    subgroup: str

    def words(self) -> frozenset[str]:
        return frozenset((self.name_en, self.name_zh, *self.tags_en, *self.tags_zh))


@dataclass(frozen=True)
class Query:
    """A query, the concept it was made for, and the parts that a drawing must have to fit."""

    text: str
    concept: int
    parts: tuple[str, ...]
    named: bool  # one part is the concept's name: only that concept is right


@dataclass(frozen=True)
class ClickModel:
    """Every number of the model."""

    name_queries: int = 4  # of the templates of each language
    tag_queries: int = 2  # "{tag} {name}" a language
    pair_queries: int = 1  # "{tag} {tag}" a language
    max_right: int = 8
    wrong_per_query: float = 1.5
    wrong_same_subgroup: float = 0.6
    volume_median: float = 220.0
    volume_sigma: float = 0.7
    scroll: float = 0.12
    position_bias: float = 0.35
    accident: float = 0.004
    right_attraction: tuple[float, float] = (5.0, 9.0)  # Beta(a, b): mean 0.357
    near_attraction: tuple[float, float] = (1.5, 30.0)  # wrong, of the same subgroup: mean 0.048
    far_attraction: tuple[float, float] = (1.0, 45.0)  # wrong, of another group: mean 0.022


@dataclass(frozen=True)
class Impressions:
    """One element a (query, drawing) shown; all arrays have the same length."""

    query: NDArray[np.int64]
    drawing: NDArray[np.int64]
    right: NDArray[np.bool_]
    same_subgroup: NDArray[np.bool_]
    show: NDArray[np.int64]
    click: NDArray[np.int64]


def make_queries(
    concepts: list[Concept],
    model: ClickModel,
    rng: np.random.Generator,
    languages: Sequence[str] = ("en", "zh"),
) -> list[Query]:
    """Queries of all concepts in these languages; a text that several concepts give is kept once."""
    queries: dict[str, Query] = {}
    for index, concept in enumerate(concepts):
        sides = {
            "en": (ENGLISH, concept.name_en, concept.tags_en),
            "zh": (CHINESE, concept.name_zh, concept.tags_zh),
        }
        for templates, name, tags in (sides[language] for language in languages):
            made: list[tuple[str, tuple[str, ...], bool]] = [
                (templates[t].format(name), (name,), True)
                for t in _some(rng, len(templates), model.name_queries)
            ]
            other = [tag for tag in tags if tag not in name]
            for t in _some(rng, len(other), model.tag_queries):
                made.append((f"{other[t]} {name}", (other[t], name), True))
            for _ in range(model.pair_queries if len(other) >= 2 else 0):
                first, second = (other[t] for t in _some(rng, len(other), 2))
                made.append((f"{first} {second}", (first, second), False))
            for text, parts, named in made:
                queries.setdefault(text, Query(text, index, parts, named))
    return list(queries.values())


def impressions(
    queries: list[Query],
    concepts: list[Concept],
    drawings: NDArray[np.int64],
    model: ClickModel,
    rng: np.random.Generator,
) -> Impressions:
    """Show every query right and wrong drawings and draw the clicks.

    Args:
        drawings: (n,) the concept index of each drawing (of each page that shows one).
    """
    by_word: dict[str, set[int]] = {}
    for index, concept in enumerate(concepts):
        for word in concept.words():
            by_word.setdefault(word, set()).add(index)
    of_concept = [np.flatnonzero(drawings == c) for c in range(len(concepts))]
    subgroup = np.array([c.subgroup for c in concepts])[drawings]
    group = np.array([c.group for c in concepts])[drawings]
    in_subgroup = {name: np.flatnonzero(subgroup == name) for name in np.unique(subgroup)}
    in_other_group = {name: np.flatnonzero(group != name) for name in np.unique(group)}

    parts: list[tuple[NDArray[np.int64], ...]] = []
    for number, query in enumerate(queries):
        fitting = set.intersection(*(by_word[part] for part in query.parts))
        right = np.concatenate([of_concept[c] for c in ([query.concept] if query.named else sorted(fitting))])
        if len(right) > model.max_right:
            right = rng.choice(right, model.max_right, replace=False)
        concept = concepts[query.concept]
        wrong = _wrong(
            rng, model, fitting, drawings, in_subgroup[concept.subgroup], in_other_group[concept.group]
        )
        shown = np.concatenate([right, wrong])
        is_right = np.concatenate([np.ones(len(right), np.int64), np.zeros(len(wrong), np.int64)])
        order = np.argsort(-(is_right + rng.normal(0.0, 0.8, len(shown))), kind="stable")
        position = np.empty(len(shown), np.int64)
        position[order] = np.arange(1, len(shown) + 1)
        near = (subgroup[shown] == concept.subgroup).astype(np.int64)
        parts.append((np.full(len(shown), number), shown, is_right, near, position))
    query_, drawing, right_, near_, position_ = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    show, click = _clicks(len(queries), query_, right_ == 1, near_ == 1, position_, model, rng)
    return Impressions(query_, drawing, right_ == 1, near_ == 1, show, click)


def _wrong(
    rng: np.random.Generator,
    model: ClickModel,
    fitting: set[int],
    drawings: NDArray[np.int64],
    near: NDArray[np.int64],
    far: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Distinct drawings that do not fit: some from the same subgroup, some from other groups."""
    chosen: list[int] = []
    for _ in range(rng.poisson(model.wrong_per_query)):
        pool = near if rng.random() < model.wrong_same_subgroup else far
        if len(pool) == 0:
            continue
        candidate = int(pool[rng.integers(len(pool))])
        if int(drawings[candidate]) not in fitting and candidate not in chosen:
            chosen.append(candidate)
    return np.array(chosen, np.int64)


def _clicks(
    queries: int,
    query: NDArray[np.int64],
    right: NDArray[np.bool_],
    near: NDArray[np.bool_],
    position: NDArray[np.int64],
    model: ClickModel,
    rng: np.random.Generator,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    volume = rng.lognormal(np.log(model.volume_median), model.volume_sigma, queries)[query]
    show = rng.poisson(volume / (1.0 + model.scroll * (position - 1))).astype(np.int64)
    attraction = np.where(
        right,
        rng.beta(*model.right_attraction, len(query)),
        np.where(
            near, rng.beta(*model.near_attraction, len(query)), rng.beta(*model.far_attraction, len(query))
        ),
    )
    chance = np.minimum(1.0, attraction * position ** (-model.position_bias) + model.accident)
    return show, rng.binomial(show, chance).astype(np.int64)


def _some(rng: np.random.Generator, of: int, count: int) -> list[int]:
    """`count` distinct numbers below `of` (all of them if there are fewer), in order."""
    return sorted(int(i) for i in rng.choice(of, min(of, count), replace=False)) if of else []
