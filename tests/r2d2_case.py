"""A tiny R2D2 in float64, batches for it, and its losses by the plain reference, sample by sample."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from learning import methods
from learning.methods.base import Batch, Texts
from learning.training.randomness import stable_hash
from tests import r2d2_reference as reference
from tests.r2d2_reference import BERT_EPS, Momentum, Stored
from tests.reference import State, gelu, layer_norm, linear, unit

PX = 32
VOCABULARY, MASK = 30, 4
EQ_8 = ("gcpr_tgd", "fgr", "mlm", "fgd")
HEADS, CROSS_LAYERS = 2, 2
MODEL: dict[str, Any] = {
    "method": "r2d2",
    "vision": {"name": "test_vit", "image_px": PX},
    "text": {
        "layers": 1,
        "width": 8,
        "heads": 2,
        "intermediate": 12,
        "positions": 12,
        "max_length": 9,
        "dropout": 0.0,
    },
    "dimension": 8,
    "cross_layers": CROSS_LAYERS,
    "cross_heads": HEADS,
    "cross_intermediate": 12,
    "dropout": 0.0,
    "temperature": {"initial": 0.1, "learnable": True, "min": 0.01, "max": 1.0},
    "match_weights": [1.0, 2.0],
    "teacher": {"queue": 20, "alpha": 0.4},
}
CNN: dict[str, Any] = {
    "vision": {"name": "test_resnet", "image_px": 64, "batch_norm": "frozen"},
    "image_cls": "mean",
}


def build(losses: tuple[str, ...] = EQ_8, seed: int = 0, **changed: Any) -> Any:
    """The tiny model with `changed` fields, begun; no weight of its own layers is as it is initialised."""
    values = MODEL | changed
    torch.manual_seed(seed)
    model: Any = methods.build(methods.parse_config(values), losses, VOCABULARY).double()
    for name, parameter in model.named_parameters():
        if not name.startswith(("vision.", "text.", "temperature")):
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.begin()
    return model.double().train()


def batch(model: Any, count: int = 4, seed: int = 0, ids: list[int] | None = None) -> Batch:
    """A batch with the views that the model wants. By default the first and the last sample show the same."""
    generator = torch.Generator().manual_seed(seed)
    side = model.config.vision.image_px
    views = model.views()
    images = {
        name: torch.randn(count, 3, side, side, generator=generator, dtype=torch.float64)
        for name in views.images
    }
    lengths = torch.randint(4, 9, (count,), generator=generator)
    lengths[0], lengths[1] = 8, 3
    mask = (torch.arange(8) < lengths[:, None]).long()
    words = torch.randint(5, VOCABULARY, (count, 8), generator=generator) * mask
    texts = {"text": Texts(words, mask)}
    if "text_masked" in views.texts:
        hidden = words.clone()
        for row, length in enumerate(lengths.tolist()):
            hidden[row, 1 + int(torch.randint(length - 2, (), generator=generator))] = MASK
        texts["text_masked"] = Texts(hidden, mask)
    labels = {name: torch.randint(2, (count,), generator=generator) for name in views.labels}
    numbers = ids or [*range(10, 9 + count), 10]
    return Batch(
        images,
        texts,
        [f"k{number}" for number in range(count)],
        ids=torch.tensor(numbers),
        labels=labels,
        draw=seed + 77,
    )


def rows(whole: Batch, rows_by_rank: tuple[int, ...], rank: int) -> Batch:
    """A rank's part of a batch, all texts as long as the rank's longest: as its loader would have them."""
    first = sum(rows_by_rank[:rank])
    part = whole.rows(slice(first, first + rows_by_rank[rank]))
    longest = int(part.texts["text"].mask.sum(dim=1).max())
    texts = {name: Texts(text.ids[:, :longest], text.mask[:, :longest]) for name, text in part.texts.items()}
    return replace(part, texts=texts, rows_by_rank=rows_by_rank)


def momentum(model: Any) -> Momentum:
    """What a model's teacher, queues and centres hold now, for the plain simulation to go on from."""
    config = model.config
    teacher: State = {}
    if hasattr(model, "teacher"):
        trained = {name for name, _ in model.named_parameters()}
        teacher = {name: v.clone() for name, v in model.teacher.named_buffers() if name in trained}
    nothing = torch.zeros(config.dimension, dtype=torch.float64)
    kept = Momentum(teacher, config.teacher.queue, nothing, nothing)
    if "gcpr_tgd" in model.losses:
        kept.image_queue, kept.text_queue = stored(model.queues["image"]), stored(model.queues["text"])
    if "fgd" in model.losses:
        kept.image_centre = model.centres["image"].mean.clone()
        kept.text_centre = model.centres["text"].mean.clone()
    return kept


def stored(queue: Any) -> Stored:
    """What a queue has, the oldest first."""
    content = queue.content()
    order = [(int(queue.pointer) + place) % queue.size for place in range(queue.size)]
    order = [slot for slot in order if content.weights_m[slot] > 0]
    return Stored(
        [content.keys_md[slot].clone() for slot in order],
        [int(content.ids_m[slot]) for slot in order],
        [float(content.weights_m[slot]) for slot in order],
    )


def wear(model: Any, seed: int = 1) -> None:
    """Make of the model's momentum what many steps would: another teacher, part of a queue, centres."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.teacher.named_buffers():
        if value.is_floating_point() and "running" not in name:
            value += 0.1 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
    for queue in model.queues.values() if "gcpr_tgd" in model.losses else ():
        for ids in ([3, 10, 4], [11, 10], [12, 5, 6, 10]):  # 10: what samples of a batch show, too
            features = torch.randn(len(ids), model.config.dimension, generator=generator, dtype=torch.float64)
            queue.push(torch.nn.functional.normalize(features, dim=1), torch.tensor(ids))
    for centre in model.centres.values() if "fgd" in model.losses else ():
        centre.push(torch.randn(model.config.dimension, generator=generator, dtype=torch.float64))


@dataclass
class Seen:
    """A batch's samples as the towers see them: lists of (tokens, width), without padding."""

    images: list[Tensor]
    texts: list[Tensor]


@dataclass
class Told:
    """The losses, and the teacher's unit features of both sides."""

    losses: dict[str, Tensor]
    negatives: list[int]  # texts of the images, then images of the texts
    images: Tensor
    texts: Tensor


class Plain:
    """R2D2's losses of one batch in one process. `model` gives towers and weights, nothing more.

    `quick`: and its cross encoders, a pair at a time, where another test has held them to the reference.
    """

    def __init__(self, model: Any, batch: Batch, kept: Momentum, quick: bool = False):
        self.model, self.batch, self.kept, self.quick = model, batch, kept, quick
        self.config = model.config
        self.state: State = dict(model.named_parameters())
        self.ids = [] if batch.ids is None else batch.ids.tolist()
        self.tau = torch.exp(self.state["temperature.log"][0])
        text = batch.texts["text"]
        self.lengths = text.mask.sum(dim=1).tolist()
        self.clean = Seen(self._images("image"), self._texts("text"))

    def told(self) -> Told:
        losses, wanted = {}, self.model.losses
        images = torch.stack([self.image_feature(tokens) for tokens in self.clean.images])
        texts = torch.stack([self.text_feature(tokens) for tokens in self.clean.texts])
        taught = self._teacher() if self.kept.teacher else (images, texts)
        if "gcpr" in wanted:
            losses["gcpr"] = reference.gcpr(images, texts, self.tau, self.ids)
        if "gcpr_tgd" in wanted:
            queues = self.kept.image_queue, self.kept.text_queue
            alpha = self.config.teacher.alpha
            losses["gcpr_tgd"] = reference.gcpr_tgd(
                images, texts, *taught, self.tau, alpha, self.ids, *queues
            )
        negatives: list[int] = []
        if "fgr" in wanted or "mlm" in wanted:
            negatives = self._negatives(images, texts)
            losses |= self._ranking(negatives)
        if "fgd" in wanted:
            losses["fgd"] = self._feature_guided(*taught)
        if "match" in wanted:
            labels = self.batch.labels[self.config.match_label].tolist()
            pairs = zip(self.clean.images, self.clean.texts, labels, strict=True)
            judged = [(*self.judged(one, two)[:2], label) for one, two, label in pairs]
            losses["match"] = reference.fgr(judged, self.config.match_weights)
        return Told({name: losses[name] for name in wanted}, negatives, *taught)

    # -------------------------------------------------------------------------------------------- towers

    def _images(self, view: str, state: State | None = None) -> list[Tensor]:
        tower = self.model.vision
        if state is None:
            return [tower(image[None])[0] for image in self.batch.images[view]]
        own = {name.removeprefix("vision."): v for name, v in state.items() if name.startswith("vision.")}
        return [functional_call(tower, own, (image[None],))[0] for image in self.batch.images[view]]

    def _texts(self, view: str, state: State | None = None) -> list[Tensor]:
        """Each text alone, without padding."""
        tower, found = self.model.text, []
        own = {name.removeprefix("text."): v for name, v in (state or {}).items() if name.startswith("text.")}
        for row, length in enumerate(self.lengths):
            ids = self.batch.texts[view].ids[row : row + 1, :length]
            text = Texts(ids, torch.ones_like(ids))
            found.append((tower(text) if state is None else functional_call(tower, own, (text,)))[0])
        return found

    def with_cls(self, tokens: Tensor) -> Tensor:
        if self.config.image_cls == "first":
            return tokens
        return torch.stack([sum(tokens, torch.zeros(())) / len(tokens), *tokens])

    def image_feature(self, tokens: Tensor, state: State | None = None) -> Tensor:
        return unit(linear(self.with_cls(tokens)[0], state or self.state, "image_projection"))

    def text_feature(self, tokens: Tensor, state: State | None = None) -> Tensor:
        return unit(linear(tokens[0], state or self.state, "text_projection"))

    @torch.no_grad()
    def _teacher(self) -> tuple[Tensor, Tensor]:
        state = self.kept.teacher
        trained = self.config.vision.trainable
        images = self._images("image", state) if trained else self.clean.images
        texts = self._texts("text", state)
        return (
            torch.stack([self.image_feature(tokens, state) for tokens in images]),
            torch.stack([self.text_feature(tokens, state) for tokens in texts]),
        )

    # ------------------------------------------------------------------------------------------- ranking

    @torch.no_grad()
    def _negatives(self, images: Tensor, texts: Tensor) -> list[int]:
        generator = torch.Generator().manual_seed(self.batch.draw)
        uniform = torch.rand(2, len(self.ids), generator=generator, dtype=torch.float64).tolist()
        found = []
        for numbers, queries, keys in zip(uniform, (images, texts), (texts, images), strict=True):
            for i, q in enumerate(queries):
                logits = [float(q @ k / self.tau) for k in keys]
                same = [number == self.ids[i] for number in self.ids]
                found.append(reference.draw_negative(logits, same, numbers[i]))
        return found

    def _ranking(self, negatives: list[int]) -> dict[str, Tensor]:
        images, texts, count = self.clean.images, self.clean.texts, len(self.ids)
        masks = "mlm" in self.model.losses
        enhanced = masks and "fgr" in self.model.losses and self.config.enhanced_training
        hidden_texts = self._texts("text_masked") if masks else []
        judged, logits, targets = [], [], []
        for i in range(count):
            if "fgr" in self.model.losses:
                pairs = [(i, i, 1), (i, negatives[i], 0), (negatives[count + i], i, 0)]
                for image, text, label in pairs:
                    if image >= 0 and text >= 0:
                        read = hidden_texts[text] if enhanced else texts[text]
                        judged.append((*self.judged(images[image], read)[:2], label))
            if masks:
                after = self.judged(images[i], hidden_texts[i])[2]
                plain, masked = (self.batch.texts[view].ids[i].tolist() for view in ("text", "text_masked"))
                for place in (place for place in range(len(plain)) if plain[place] != masked[place]):
                    logits.append(self._mlm_logits(after[place]))
                    targets.append(plain[place])
        losses = {"mlm": reference.mlm(logits, targets)} if masks else {}
        if judged:
            losses["fgr"] = reference.fgr(judged, self.config.match_weights)
        return losses

    def judged(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both encoders' logits of a pair, and the text's tokens after the text-image encoder."""
        state = self.state
        x = torch.stack([linear(row, state, "image_projection") for row in self.with_cls(image)])
        y = torch.stack([linear(row, state, "text_projection") for row in text])
        by_image, by_text = self._crossed("image_text", x, y), self._crossed("text_image", y, x)
        logits = [linear(tokens[0], state, "ranking.match_head") for tokens in (by_image, by_text)]
        return logits[0], logits[1], by_text

    def _crossed(self, name: str, x: Tensor, other: Tensor) -> Tensor:
        if self.quick:
            told: Tensor = getattr(self.model.ranking, name)(x[None], None, other[None], None)
            return told[0]
        return reference.cross_encoder(x, other, self.state, f"ranking.{name}", CROSS_LAYERS, HEADS)[0]

    def _mlm_logits(self, token: Tensor) -> Tensor:
        wide = gelu(linear(token, self.state, "mlm_head.dense"))
        return linear(layer_norm(wide, self.state, "mlm_head.norm", BERT_EPS), self.state, "mlm_head.decoder")

    # --------------------------------------------------------------------------------- feature-guided

    def _feature_guided(self, teacher_image: Tensor, teacher_text: Tensor) -> Tensor:
        image = torch.stack([self.image_feature(tokens) for tokens in self._masked_images()])
        text = torch.stack([self.text_feature(tokens) for tokens in self._texts("text_masked")])
        config, kept = self.config.teacher, self.kept
        temperatures = config.student_temperature, config.teacher_temperature
        by_image = reference.feature_guided_rows(image, teacher_image, kept.image_centre, *temperatures)
        by_text = reference.feature_guided_rows(text, teacher_text, kept.text_centre, *temperatures)
        return (by_image.sum() + by_text.sum()) / (2 * len(self.ids))

    def _masked_images(self) -> list[Tensor]:
        mask = self.config.image_mask
        if mask.at == "pixels":
            return self._images("image_masked")
        count, n = len(self.ids), len(self.clean.images[0])
        generator = torch.Generator().manual_seed(stable_hash(self.batch.draw, "mask"))
        scores = torch.rand(count * n, generator=generator, dtype=torch.float64).tolist()
        left_out = max(1, round(mask.share * n))
        found = []
        for i, tokens in enumerate(self.clean.images):
            order = sorted(range(n), key=lambda place: scores[i * n + place])
            found.append(tokens[order[: n - left_out]])
        return found
