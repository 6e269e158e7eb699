"""A tiny ConLIP in float64, batches for it, and its losses by the plain reference, sample by sample."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from learning import methods
from learning.methods.base import Batch, Texts
from learning.training.randomness import stable_hash
from tests import conlip_reference as reference
from tests import r2d2_case
from tests.conlip_reference import Momentum, Stored
from tests.r2d2_reference import BERT_EPS, cross_encoder, log_soft_max
from tests.reference import State, gelu, layer_norm, linear, unit

PX, PATCH, UNIT = 16, 4, 8
VOCABULARY = r2d2_case.VOCABULARY
EQ_4 = ("dcl", "mlm", "mim")
HEADS = 2
MODEL: dict[str, Any] = {
    "method": "conlip",
    "vision": {
        "name": "test_vit",
        "image_px": PX,
        "vit": {"patch_px": PATCH, "layers": 1, "width": 8, "heads": 2},
    },
    "text": r2d2_case.MODEL["text"],
    "temperature": {"initial": 0.1, "learnable": True, "min": 0.01, "max": 1.0},
    "queue": 20,
    "text_mask_share": 0.15,
    "image_mask_px": UNIT,
    "head_heads": HEADS,
    "head_intermediate": 12,
    "dropout": 0.0,
}
PROJECTED = {"text": MODEL["text"] | {"width": 12}, "dimension": 6}


def build(losses: tuple[str, ...] = EQ_4, seed: int = 0, **changed: Any) -> Any:
    """The tiny model with `changed` fields, begun; no weight of its own layers is as it is initialised."""
    torch.manual_seed(seed)
    model: Any = methods.build(methods.parse_config(MODEL | changed), losses, VOCABULARY).double()
    model.begin()
    for name, parameter in model.named_parameters():
        if not name.startswith(("vision.", "text.", "temperature")):
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.double().train()


batch = r2d2_case.batch
rows = r2d2_case.rows


def momentum(model: Any) -> Momentum:
    """What a model's momentum encoders and queues hold now, for the plain simulation to go on from."""
    trained = {name for name, _ in model.named_parameters()}
    if not hasattr(model, "teacher"):
        return Momentum({}, model.config.queue)
    teacher = {name: v.clone() for name, v in model.teacher.named_buffers() if name in trained}
    queues = [stored(model.queues[side]) for side in ("image", "text")]
    return Momentum(teacher, model.config.queue, model.config.momentum, *queues)


def stored(queue: Any) -> Stored:
    found = r2d2_case.stored(queue)
    return Stored(found.features, found.ids)


def wear(model: Any, seed: int = 1) -> None:
    """Make of the model's momentum what many steps would: other encoders, part of a queue."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.teacher.named_buffers():
        if value.is_floating_point():
            value += 0.1 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        assert "running" not in name
    for queue in model.queues.values():
        for ids in ([3, 10, 4], [11, 10], [12, 5, 6, 10]):  # 10: what samples of a batch show, too
            features = torch.randn(len(ids), model.width, generator=generator, dtype=torch.float64)
            queue.push(torch.nn.functional.normalize(features, dim=1), torch.tensor(ids))


@dataclass
class Told:
    """The losses, and the momentum encoders' unit features of both sides."""

    losses: dict[str, Tensor]
    images: Tensor
    texts: Tensor


class Plain:
    """ConLIP's losses of one batch in one process. `model` gives towers and weights, nothing more.

    `quick`: and its cross encoders, a pair at a time, where another test has held them to the reference.
    """

    def __init__(self, model: Any, batch: Batch, kept: Momentum, quick: bool = False):
        self.model, self.batch, self.kept, self.quick = model, batch, kept, quick
        self.config = model.config
        self.state: State = dict(model.named_parameters())
        assert batch.ids is not None
        self.ids: list[int] = batch.ids.tolist()
        self.tau = torch.exp(self.state["temperature.log"][0])
        self.lengths = batch.texts["text"].mask.sum(dim=1).tolist()
        self.masked = reference.masked_patches(
            stable_hash(batch.draw, "patches"),
            len(self.ids),
            PX // PATCH,
            UNIT // PATCH,
            self.config.image_mask_share,
        )

    def told(self) -> Told:
        wanted = self.model.losses
        losses: dict[str, Tensor] = {}
        images = texts = torch.zeros(0)
        if self.kept.teacher:
            images, texts = self._teacher()
        for name, row in (("dcl", reference.dcl_row), ("info_nce", reference.info_nce_row)):
            if name in wanted:
                losses[name] = self._instance(row, images, texts)
        if "mlm" in wanted:
            losses["mlm"] = self._mlm()
        if "mim" in wanted:
            losses["mim"] = self._mim()
        return Told({name: losses[name] for name in wanted}, images, texts)

    # -------------------------------------------------------------------------------------------- towers

    def image(self, i: int, state: State | None = None) -> Tensor:
        """Eq. 1: one image's tokens, projected where there is a projection."""
        return self._projected(
            self._tower("vision", state, (self.batch.images["image"][i : i + 1],)), "image", state
        )

    def masked_image(self, i: int) -> Tensor:
        """Eq. 3: the ViT step by step, with the mask token in the place of masked patches' embeddings."""
        vit: Any = self.model.vision.backbone
        patches = vit.patch_embed(self.batch.images["image"][i : i + 1])[0].flatten(0, -2)
        token = self.state["heads.mask_token.token"]
        seen = [token if place in self.masked[i] else patches[place] for place in range(len(patches))]
        x = torch.cat([vit.cls_token[0], torch.stack(seen)])[None] + vit.pos_embed
        for block in vit.blocks:
            x = block(x)
        return self._projected(vit.norm(x)[0], "image", None)

    def text(self, i: int, view: str = "text", state: State | None = None) -> Tensor:
        """A text alone, without padding."""
        ids = self.batch.texts[view].ids[i : i + 1, : self.lengths[i]]
        return self._projected(self._tower("text", state, (Texts(ids, torch.ones_like(ids)),)), "text", state)

    def _tower(self, name: str, state: State | None, inputs: tuple[Any, ...]) -> Tensor:
        tower = getattr(self.model, name)
        if state is None:
            found: Tensor = tower(*inputs)[0]
            return found
        own = {key.removeprefix(f"{name}."): v for key, v in state.items() if key.startswith(f"{name}.")}
        return functional_call(tower, own, inputs)[0]

    def _projected(self, tokens: Tensor, side: str, state: State | None) -> Tensor:
        if self.config.dimension is None:
            return tokens
        return torch.stack([linear(row, state or self.state, f"{side}_projection") for row in tokens])

    # ----------------------------------------------------------------------------------- instance level

    @torch.no_grad()
    def _teacher(self) -> tuple[Tensor, Tensor]:
        state, count = self.kept.teacher, len(self.ids)
        frozen = not self.config.vision.trainable
        images = [unit(self.image(i, None if frozen else state)[0]) for i in range(count)]
        if frozen and self.config.dimension is not None:
            raise NotImplementedError
        return torch.stack(images), torch.stack([unit(self.text(i, state=state)[0]) for i in range(count)])

    def _instance(self, row: Any, images: Tensor, texts: Tensor) -> Tensor:
        """Eq. 12, the mean over the batch."""
        q = self.kept.enqueued(self.kept.image_queue, images, self.ids)
        p = self.kept.enqueued(self.kept.text_queue, texts, self.ids)
        total = torch.zeros((), dtype=torch.float64)
        for i, number in enumerate(self.ids):
            h_img, h_txt = self.image(i)[0], self.text(i)[0]
            positives = (h_img, h_txt) if self.config.positive == "online" else (images[i], texts[i])
            total = total + row(h_txt, positives[0], q, number, self.tau)
            total = total + row(h_img, positives[1], p, number, self.tau)
        return total / len(self.ids)

    # -------------------------------------------------------------------------------------- token level

    def _mlm(self) -> Tensor:
        """Eq. 5, or vanilla MLM, as the mean over the masked tokens."""
        losses = []
        for i in range(len(self.ids)):
            plain, hidden = (self.batch.texts[view].ids[i].tolist() for view in ("text", "text_masked"))
            after = self._head("mlm", self.text(i, "text_masked"), self.images_for_text(i))
            for place in (place for place in range(len(plain)) if plain[place] != hidden[place]):
                wide = gelu(linear(after[place], self.state, "heads.mlm.predictor.dense"))
                wide = layer_norm(wide, self.state, "heads.mlm.predictor.norm", BERT_EPS)
                logits = linear(wide, self.state, "heads.mlm.predictor.decoder")
                losses.append(-log_soft_max(list(logits))[plain[place]])
        return torch.stack(losses).sum() / len(losses)

    def _mim(self) -> Tensor:
        """Eq. 6, or vanilla MIM, as the mean over the masked patches."""
        losses = []
        for i in range(len(self.ids)):
            after = self._head("mim", self.masked_image(i), self.texts_for_image(i))
            for place in self.masked[i]:
                z = linear(after[1 + place], self.state, "heads.mim.predictor")
                y = reference.patch(self.batch.images["image"][i], place, PATCH).flatten()
                losses.append(reference.l1(z, y))
        return torch.stack(losses).sum() / len(losses)

    def images_for_text(self, i: int) -> Tensor:
        """Sec. 3.2: [h_cls; h_1*, h_2*, …]; vanilla: [h_cls, h_1, …]."""
        if not self.config.conditioned:
            return self.image(i)
        return torch.stack([self.image(i)[0], *self.masked_image(i)[1:]])

    def texts_for_image(self, i: int) -> Tensor:
        if not self.config.conditioned:
            return self.text(i)
        return torch.stack([self.text(i)[0], *self.text(i, "text_masked")[1:]])

    def _head(self, name: str, tokens: Tensor, other: Tensor) -> Tensor:
        if self.quick:
            told: Tensor = self.model.heads[name].encoder(tokens[None], None, other[None], None)
            return told[0]
        layers = self.config.head_layers
        return cross_encoder(tokens, other, self._layers(), f"heads.{name}.encoder", layers, HEADS)[0]

    def _layers(self) -> State:
        """The weights; those of shared layers under every layer's number."""
        if not self.config.head_shared:
            return self.state
        copies = {
            name.replace(".layers.0.", f".layers.{number}."): value
            for name, value in self.state.items()
            for number in range(self.config.head_layers)
        }
        return self.state | copies
