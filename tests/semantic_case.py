"""A tiny Semantic Sharing in float64, batches for it, and its losses by the plain reference."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from learning import methods
from learning.methods.base import NO_CLASS, Batch, Regions, Texts
from learning.training.randomness import stable_hash
from tests import semantic_reference as reference
from tests.r2d2_reference import BERT_EPS
from tests.reference import State, encoder, fully_connected, gelu, layer_norm, linear, unit

VOCABULARY, MASK, HEADS, REGIONS, CLASSES, LONGEST = 30, 4, 2, 7, 5, 8
NAMES = ("cat", "dog", "sea", "sky")
EQ_6 = ("labels", "words", "objects")
ALL = (*EQ_6, "consistency", "triplet")
GRID = {"vision": {"name": "test_resnet", "image_px": 64, "batch_norm": "frozen"}}
GRU = {"tower": "gru", "word_width": 5, "width": 6, "layers": 2, "max_length": 9}
BERT = {
    "layers": 1,
    "width": 8,
    "heads": 2,
    "intermediate": 12,
    "positions": 12,
    "max_length": 9,
    "dropout": 0.0,
}
MODEL: dict[str, Any] = {
    "method": "semantic_sharing",
    "vision": {"tower": "regions", "count": REGIONS, "width": 6, "classes": CLASSES},
    "text": GRU,
    "labels": {"names": list(NAMES)},
    "dimension": 8,
    "layers": 2,
    "heads": HEADS,
    "intermediate": 12,
    "dropout": 0.0,
    "mask_share": 0.3,
}


def build(losses: tuple[str, ...] = EQ_6, seed: int = 0, **changed: Any) -> Any:
    """The tiny model with `changed` fields; no weight of its own layers is as it is initialised."""
    torch.manual_seed(seed)
    model: Any = methods.build(methods.parse_config(MODEL | changed), losses, VOCABULARY).double()
    for name, parameter in model.named_parameters():
        if not name.startswith(("vision.", "text.bert.")):
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.train()


def regions(count: int, generator: torch.Generator) -> Regions:
    """Boxes anywhere; the second picture has no class at all, others now and then none."""
    features = torch.randn(count, REGIONS, 6, generator=generator, dtype=torch.float64)
    corners = torch.rand(count, REGIONS, 2, 2, generator=generator, dtype=torch.float64).sort(dim=2).values
    area = (corners[:, :, 1] - corners[:, :, 0]).prod(dim=2, keepdim=True)
    positions = torch.cat([corners.flatten(2), area], dim=2)
    classes = torch.randint(CLASSES, (count, REGIONS), generator=generator)
    classes[torch.rand(count, REGIONS, generator=generator) < 0.2] = NO_CLASS
    classes[1] = NO_CLASS
    return Regions(features, positions, classes)


def batch(model: Any, count: int = 5, seed: int = 0) -> Batch:
    """A batch with the views that the model wants. The third sample has no label."""
    generator = torch.Generator().manual_seed(seed)
    views = model.views()
    own = regions(count, generator)
    images = {
        name: torch.randn(count, 3, 64, 64, generator=generator, dtype=torch.float64) for name in views.images
    }
    lengths = torch.randint(3, LONGEST + 1, (count,), generator=generator)
    lengths[0], lengths[1] = LONGEST, 3
    mask = (torch.arange(LONGEST) < lengths[:, None]).long()
    words = torch.randint(5, VOCABULARY, (count, LONGEST), generator=generator) * mask
    hidden = words.clone()
    for row, length in enumerate(lengths.tolist()):
        for _ in range(1 + row % 2):
            hidden[row, 1 + int(torch.randint(length - 2, (), generator=generator))] = MASK
    labels = (torch.rand(count, len(NAMES), generator=generator) < 0.4).float()
    labels[2] = 0
    texts = {"text": Texts(words, mask), "text_masked": Texts(hidden, mask)}
    return Batch(
        images,
        {name: texts[name] for name in views.texts},
        [f"k{number}" for number in range(count)],
        label_sets=dict.fromkeys(views.label_sets, labels),
        regions=own if views.regions else None,
        draw=seed + 77,
    )


def rows(whole: Batch, rows_by_rank: tuple[int, ...], rank: int) -> Batch:
    """A rank's part of a batch, all texts as long as the rank's longest: as its loader would have them."""
    first = sum(rows_by_rank[:rank])
    part = whole.rows(slice(first, first + rows_by_rank[rank]))
    longest = max(int(text.mask.sum(dim=1).max()) for text in part.texts.values()) if part.texts else 0
    texts = {name: Texts(text.ids[:, :longest], text.mask[:, :longest]) for name, text in part.texts.items()}
    return replace(part, texts=texts, rows_by_rank=rows_by_rank)


class Plain:
    """The losses of one batch in one process. `model` gives weights, and what BERT or an image tower says."""

    def __init__(self, model: Any, batch: Batch):
        self.model, self.batch, self.config = model, batch, model.config
        self.state: State = dict(model.named_parameters())
        sets = batch.label_sets
        self.labels: list[list[float]] = sets["labels"].tolist() if sets else []

    def losses(self) -> dict[str, Tensor]:
        wanted, found, count = self.model.losses, {}, len(self.batch.keys)
        if set(wanted) - {"words", "objects"}:
            images = torch.stack([self.z("image", self.image(i)) for i in range(count)])
            texts = torch.stack([self.z("text", self.text(i, "text")) for i in range(count)])
            literal = self.config.label_loss == "literal"
            each = [
                reference.label_loss(self.predicted(side, z), self.labels[i], literal)
                for side, rows in (("image", images), ("text", texts))
                for i, z in enumerate(rows)
            ]
            found["labels"] = sum(each, reference.zero()) / count
            found["consistency"] = reference.consistency(images, texts, self.labels)
            found["triplet"] = reference.triplet(images, texts, self.labels, self.config.triplet_margin)
        if "words" in wanted:
            found["words"] = self._words()
        if "objects" in wanted:
            found["objects"] = self._objects()
        return {name: found[name] for name in wanted}

    def _name(self, part: str, side: str) -> str:
        return f"{part}.{'both' if self.config.sharing == 'shared' else side}"

    def predicted(self, side: str, z: Tensor) -> Tensor:
        return linear(z, self.state, self._name("classifier", side))

    def embedding(self, side: str, segments: list[Tensor]) -> Tensor:
        """What retrieval compares."""
        z = self.z(side, segments)
        if self.config.retrieval == "predictions":
            z = 1 / (1 + torch.exp(-self.predicted(side, z)))
        return unit(z)

    def z(self, side: str, segments: list[Tensor]) -> Tensor:
        return reference.mean(list(self.encoded(side, segments)))

    def encoded(self, side: str, segments: list[Tensor]) -> Tensor:
        name, layers = self._name("encoder", side), self.config.layers
        if self.config.encoder == "fc":
            return fully_connected(torch.stack(segments), self.state, name, layers)
        return encoder(torch.stack(segments), self.state, name, layers, HEADS)

    def image(self, i: int, hidden: tuple[int, ...] = ()) -> list[Tensor]:
        """e of the segments of picture i; [MASK] stands in for the `hidden` ones."""
        given = self.batch.regions
        if given is not None:
            features, positions = list(given.features[i]), list(given.positions[i])
        else:
            features = list(self.model.vision(self.batch.images["image"][i : i + 1])[0])
            side = round(len(features) ** 0.5)
            features = features[len(features) - side * side :]
            cells = [(y, x) for y in range(side) for x in range(side)]
            positions = [reference.box(x, y, x + 1, y + 1, side, side) for y, x in cells]
        for place in hidden:
            features[place] = self.state["segments.image.mask_vector"]
        return self._segments("image", features, positions)

    def text(self, i: int, view: str) -> list[Tensor]:
        text = self.batch.texts[view]
        ids = text.ids[i, : int(text.mask[i].sum())]
        if self.config.text.tower == "gru":
            words = torch.stack([self.state["text.words.weight"][number] for number in ids.tolist()])
            features = list(reference.bi_gru(words, self.state, "text", self.config.text.layers))
        else:
            features = list(self.model.text(Texts(ids[None], torch.ones_like(ids)[None]))[0])
        positions = [reference.place(t, self.config.dimension) for t in range(len(features))]
        return self._segments("text", features, positions)

    def _segments(self, side: str, features: list[Tensor], positions: list[Tensor]) -> list[Tensor]:
        name = f"segments.{side}"
        if self.config.segments == "global":
            one = linear(reference.mean(features), self.state, f"{name}.segment_fc")
            return [reference.relu(linear(one, self.state, f"{name}.mixed_fc"))]
        return [
            reference.segment(v, position, self.state, name)
            for v, position in zip(features, positions, strict=True)
        ]

    def _words(self) -> Tensor:
        logits, targets = [], []
        for i in range(len(self.batch.keys)):
            after = self.encoded("text", self.text(i, "text_masked"))
            plain, masked = (self.batch.texts[view].ids[i].tolist() for view in ("text", "text_masked"))
            for place in (place for place in range(len(plain)) if plain[place] != masked[place]):
                wide = gelu(linear(after[place], self.state, "word_head.dense"))
                wide = layer_norm(wide, self.state, "word_head.norm", BERT_EPS)
                logits.append(linear(wide, self.state, "word_head.decoder"))
                targets.append(plain[place])
        return reference.masked_loss(logits, targets)

    def hidden(self) -> list[list[int]]:
        """The masked regions of each picture."""
        classes = self.batch.regions.classes.tolist()  # type: ignore[union-attr]
        generator = torch.Generator().manual_seed(stable_hash(self.batch.draw, "regions"))
        numbers = torch.rand(len(classes) * REGIONS, generator=generator, dtype=torch.float64).tolist()
        return [
            reference.to_mask(own, numbers[i * REGIONS : (i + 1) * REGIONS], self.config.mask_share)
            for i, own in enumerate(classes)
        ]

    def _objects(self) -> Tensor:
        logits, targets = [], []
        for i, hidden in enumerate(self.hidden()):
            after = self.encoded("image", self.image(i, tuple(hidden)))
            for place in hidden:
                logits.append(linear(after[place], self.state, "object_head"))
                targets.append(int(self.batch.regions.classes[i, place]))  # type: ignore[union-attr]
        return reference.masked_loss(logits, targets)
