"""Semantic Sharing (Yang et al.): segments of images and texts through one encoder and one classifier."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from learning.encoders.fusion import Activation, FullyConnected, TransformerEncoder
from learning.encoders.heads import MaskedLanguageHead
from learning.encoders.image_tower import ImageTower
from learning.encoders.pooling import MeanPooling
from learning.encoders.positions import POSITION_WIDTH, grid_boxes, sinusoids
from learning.encoders.regions import RegionsConfig
from learning.encoders.segments import SegmentEmbedding, grid_side
from learning.encoders.text_towers import TextTower, make_text
from learning.encoders.towers import VisionOrRegions, make_vision
from learning.losses.contrastive import widened
from learning.losses.labels import (
    LabelLoss,
    label_rows,
    pairwise_likelihood_rows,
    same_class,
    triplet_rows,
)
from learning.losses.masked import Masked, masked_places, masked_regions, masked_token_rows, rows_at
from learning.methods.base import (
    Batch,
    ImageView,
    LabelSet,
    MaskedTokens,
    Method,
    MethodConfig,
    Regions,
    Terms,
    Texts,
    TextView,
    Views,
)
from learning.training.contrast import Contrast
from learning.training.distributed import gather, rank, sum_over_ranks, world_size
from learning.training.hard_negatives import uniform_numbers
from learning.training.randomness import stable_hash

Side = Literal["image", "text"]
SIDES: tuple[Side, Side] = ("image", "text")
OF_EMBEDDINGS = ("labels", "consistency", "triplet")  # losses of the whole inputs' final embeddings
READS: dict[str, tuple[Side, ...]] = dict.fromkeys(OF_EMBEDDINGS, SIDES) | {
    "words": ("text",),
    "objects": ("image",),
}
LABELS = "labels"  # of Batch.label_sets


class LabelsConfig(BaseModel):
    """The labels that are predicted, C of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fields: tuple[str, ...] = Field(
        default=("classes",),
        min_length=1,
        description="of a record: classes, or the name of one of its labels",
    )
    names: tuple[str, ...] = Field(min_length=1, description="the labels that count; others are passed over")

    @model_validator(mode="after")
    def _check(self) -> "LabelsConfig":
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise ValueError(f"names: '{twice[0]}' stands twice; name each label once")
        return self


class Config(MethodConfig):
    """The recipe's `model` section for Semantic Sharing. Defaults are the paper's where it has any."""

    method: Literal["semantic_sharing"] = "semantic_sharing"
    vision: VisionOrRegions
    text: TextTower
    labels: LabelsConfig
    # The paper says none of these five: fc7's width; two layers, as data sets of 30,000 pictures are small
    dimension: int = Field(default=1024, ge=1, description="d, of the common space")
    layers: int = Field(default=2, ge=1, description="L, of the encoder")
    heads: int = Field(default=8, ge=1)
    intermediate: int = Field(default=2048, ge=1, description="width of the encoder's FFN")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="in the encoder")
    activation: Activation = "relu"
    feature_dropout: float = Field(default=0.0, ge=0, lt=1, description="on segments, before Eq. 3")
    encoder: Literal["transformer", "fc"] = Field(
        default="transformer", description="fc: FC layers on each segment alone (Table 1: w/o T)"
    )
    segments: Literal["regions", "global"] = Field(
        default="regions", description="global: the mean of the segments in their place (Table 1: w/o R)"
    )
    sharing: Literal["shared", "separate"] = Field(
        default="shared", description="separate: encoder and classifier a modality (Table 1: ST)"
    )
    label_loss: LabelLoss = Field(
        default="logistic", description="a logistic loss a label; literal: Eq. 4 as it is printed"
    )
    mask_share: float = Field(default=0.15, gt=0, lt=1, description="of words, and of regions, for Eq. 5")
    triplet_margin: float = Field(default=0.2, ge=0, description="of the cosine, for the loss `triplet`")
    retrieval: Literal["embeddings", "predictions"] = Field(
        default="embeddings",
        description="what is compared: z, or what the classifier makes of it, the labels' probabilities",
    )

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if self.encoder == "transformer" and self.dimension % self.heads:
            raise ValueError(f"heads: {self.heads} does not divide dimension, {self.dimension}")
        if self.segments == "global" and self.encoder != "fc":
            raise ValueError(
                "segments: global leaves one segment, which has nothing to attend to; set encoder: fc"
            )
        return self


class SemanticSharing(Method):
    """Losses: `labels` (Eq. 4), `words` and `objects` (Eq. 5), `consistency` (Eq. 1), `triplet`.

    Eq. 6 is the recipe's `{labels: 1, words: λ, objects: λ}`. What no chosen loss uses is frozen, so that
    every trainable parameter gets a gradient.
    """

    available_losses = ("labels", "words", "objects", "consistency", "triplet")

    def __init__(self, config: Config, losses: tuple[str, ...], vocabulary_size: int):
        super().__init__(losses)
        self.config = config
        self._check_losses()
        d, vision = config.dimension, config.vision
        self.vision = None if isinstance(vision, RegionsConfig) else make_vision(vision)
        self.text = make_text(config.text, vocabulary_size)
        width = vision.width if isinstance(vision, RegionsConfig) else self._need_vision().width
        # The paper is silent on whether φ is shared: one a modality, as ψ1 and ψ2 must be; its Algorithm 1
        # names T and g as what is shared.
        positions = {"image": POSITION_WIDTH, "text": d}
        self.segments = nn.ModuleDict(
            {
                side: SegmentEmbedding(
                    own_width,
                    None if config.segments == "global" else positions[side],
                    d,
                    config.activation,
                    config.feature_dropout,
                    maskable=side == "image" and isinstance(vision, RegionsConfig),
                )
                for side, own_width in (("image", width), ("text", self.text.width))
            }
        )
        owners = ("both",) if config.sharing == "shared" else SIDES
        self.encoder = nn.ModuleDict({owner: _encoder(config) for owner in owners})
        self.classifier = nn.ModuleDict({owner: nn.Linear(d, len(config.labels.names)) for owner in owners})
        self.word_head = MaskedLanguageHead(d, vocabulary_size)  # g_w
        self.object_head = nn.Linear(d, vision.classes) if isinstance(vision, RegionsConfig) else None  # g_v
        # The paper is silent on how segments become one z: their mean. There is no segment that stands for
        # all: Eq. 3 has none, and regions have no [CLS].
        self.pooling = MeanPooling()
        self.register_buffer("text_positions", sinusoids(config.text.max_length, d), persistent=False)
        if self.vision is not None:
            side, self._before_grid = grid_side(self.vision.tokens)
            self.register_buffer("grid_positions", grid_boxes(side), persistent=False)
        self._freeze_unused()

    def frozen_image_tower(self) -> ImageTower | None:
        return None if self.config.vision.trainable else self.vision

    def views(self) -> Views:
        read = {side for name in self.losses for side in READS[name]}
        images: dict[str, ImageView] = {"image": "plain"} if "image" in read and self.vision else {}
        texts: dict[str, TextView] = {"text": "plain"} if "text" in read else {}
        if "words" in self.losses:
            texts["text_masked"] = MaskedTokens(self.config.mask_share)
        labels = self.config.labels
        sets = {LABELS: LabelSet(labels.fields, labels.names)} if self._reads_embeddings else {}
        return Views(images, texts, label_sets=sets, regions=self.vision is None)

    def forward(self, batch: Batch) -> Terms:
        """Both modalities of one mini-batch, in one step: Algorithm 1."""
        step = _Step(self, batch)
        terms = Terms({})
        if "labels" in self.losses:
            self._label_prediction(step, terms)
        if "words" in self.losses:
            self._masked_words(step, terms)
        if "objects" in self.losses:
            self._masked_objects(step, terms)
        if "consistency" in self.losses or "triplet" in self.losses:
            self._consistency(step, terms)
        return terms

    def embed_images(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Raises ValueError for a model that reads regions of files: pixels tell it nothing."""
        features, positions = self.grid_segments(self._need_vision()(images))
        return self._retrieved("image", self.encoded("image", features, positions)[0])

    def embed_regions(self, regions: Regions) -> Float[Tensor, "b d"]:
        """As `EmbedsRegions` says. Raises ValueError for a model that computes its segments from pixels."""
        self.check_regions(regions)
        return self._retrieved("image", self.encoded("image", regions.features, regions.positions)[0])

    def embed_texts(self, texts: Texts) -> Float[Tensor, "b d"]:
        return self._retrieved("text", self.encoded_texts(texts)[0])

    def grid_segments(self, tokens: Float[Tensor, "b n v"]) -> tuple[Tensor, Tensor]:
        """Features and boxes of the cells of an image tower's grid; its [CLS] is no segment."""
        positions: Tensor = self.grid_positions  # type: ignore[assignment]
        return tokens[:, self._before_grid :], positions

    def encoded_texts(self, texts: Texts) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b m d"]]:
        """z of texts, and their segments after the encoder; [CLS] and [SEP] are segments like the others."""
        table: Tensor = self.text_positions  # type: ignore[assignment]
        length = texts.ids.shape[1]
        if length > len(table):
            raise ValueError(
                f"texts of {length} tokens; model.text.max_length is {len(table)}: cut them, or raise it"
            )
        return self.encoded("text", self.text(texts), table[:length], texts.mask)

    def encoded(
        self,
        side: Side,
        segments_bnw: Float[Tensor, "b n w"],
        positions: Float[Tensor, "*b n p"],
        mask_bn: Int64[Tensor, "b n"] | None = None,
        hidden_cn: Bool[Tensor, "c n"] | None = None,
    ) -> tuple[Float[Tensor, "c d"], Float[Tensor, "c n d"]]:
        """z (Eq. 3), and the segments after the encoder.

        `mask_bn`: 0 is padding. `hidden_cn`: [MASK] stands in, as SegmentEmbedding has it; c = b without.
        """
        if self.config.segments == "global":
            # The paper is silent on which global embedding: the mean of what would be the segments
            one_b1w = self.pooling(segments_bnw, mask_bn)[:, None]
            encoded_bnd, mask_bn = self.of(self.encoder, side)(self.segments[side](one_b1w)), None
        else:
            e_bnd = self.segments[side](segments_bnw, positions, hidden_cn)
            encoded_bnd = self.of(self.encoder, side)(e_bnd, mask_bn)
        return self.pooling(encoded_bnd, mask_bn), encoded_bnd

    @staticmethod
    def of(parts: nn.ModuleDict, side: Side) -> nn.Module:
        """The part of a modality: the shared one, or its own."""
        return parts["both" if "both" in parts else side]

    def check_regions(self, regions: Regions) -> None:
        """ValueError for regions that are not those of `model.vision`, or where pixels are read."""
        vision = self.config.vision
        if not isinstance(vision, RegionsConfig):
            raise ValueError(
                f"model.vision.tower: {vision.tower} computes segments from pixels; leave "
                "inputs.regions out, or set tower: regions"
            )
        found = tuple(regions.features.shape[1:])
        if found != (vision.count, vision.width):
            raise ValueError(
                f"regions: {found[0]} a picture, {found[1]} wide; model.vision says count: {vision.count}, "
                f"width: {vision.width}: set them to what the stage of kind regions wrote"
            )

    def _retrieved(self, side: Side, z_bd: Tensor) -> Tensor:
        """What retrieval compares, of unit length."""
        if self.config.retrieval == "predictions":
            return _unit(widened(self.of(self.classifier, side)(z_bd)).sigmoid())
        return _unit(z_bd)

    def _label_prediction(self, step: "_Step", terms: Terms) -> None:
        """L1 (Eq. 4), the mean over the samples of all ranks of the sum over both modalities."""
        labels = step.batch.label_sets[LABELS]
        rows, hits = [], []
        for side, z_bd in step.z.items():
            logits = self.of(self.classifier, side)(z_bd)
            rows.append(label_rows(logits, labels, self.config.label_loss))
            hits.append(labels.gather(1, logits.argmax(dim=1, keepdim=True)).sum().to(rows[0].dtype))
        sums = sum_over_ranks(torch.stack([(rows[0] + rows[1]).sum(), *hits])) / step.rows
        terms.losses["labels"] = sums[0]
        for side, accuracy in zip(step.z, sums[1:].detach(), strict=True):
            terms.report[f"labels_{side}_accuracy"] = accuracy  # the surest label is one of the sample's

    def _masked_words(self, step: "_Step", terms: Terms) -> None:
        """ℓ_w of Eq. 5, the mean over the masked words of all ranks."""
        asked = masked_places(
            step.batch.texts["text"].ids, step.batch.texts["text_masked"].ids, self.config.mask_share
        )
        logits = self.word_head(rows_at(step.masked_text(), asked.places_bk))
        _asked("words", logits, asked, terms)

    def _masked_objects(self, step: "_Step", terms: Terms) -> None:
        """ℓ_v of Eq. 5, the mean over the masked regions of all ranks."""
        assert self.object_head is not None
        hidden, asked = step.masked_image()
        _asked("objects", self.object_head(rows_at(hidden, asked.places_bk)), asked, terms)

    def _consistency(self, step: "_Step", terms: Terms) -> None:
        """Eq. 1 as means over the pairs of all ranks' rows, and the triplet loss, both ways."""
        units: dict[str, Tensor] = {side: _unit(z_bd) for side, z_bd in step.z.items()}
        found = Contrast(self.contrast, units, step.batch.rows_by_rank)
        labels = step.batch.label_sets[LABELS]
        same_bn = same_class(labels, gather(labels, step.batch.rows_by_rank), found.first)
        if "consistency" in self.losses:
            pairs = (("image", "text"), ("image", "image"), ("text", "text"))
            total = sum(
                pairwise_likelihood_rows(found.own[one], found.every[other], same_bn).sum()
                for one, other in pairs
            )
            terms.losses["consistency"] = sum_over_ranks(torch.as_tensor(total)) / found.rows**2
        if "triplet" in self.losses:
            both_ways = (("image", "text"), ("text", "image"))
            margin = self.config.triplet_margin
            total = sum(
                triplet_rows(found.own[one], found.every[other], same_bn, margin, found.first).sum()
                for one, other in both_ways
            )
            terms.losses["triplet"] = sum_over_ranks(torch.as_tensor(total)) / found.rows

    @property
    def _reads_embeddings(self) -> bool:
        return bool(set(self.losses) & set(OF_EMBEDDINGS))

    def _need_vision(self) -> ImageTower:
        if self.vision is None:
            raise ValueError(
                "model.vision.tower: regions: this model reads no pixels; give the stage inputs.regions, a "
                "stage of kind regions"
            )
        return self.vision

    def _check_losses(self) -> None:
        config = self.config
        if "objects" in self.losses and not isinstance(config.vision, RegionsConfig):
            raise ValueError(
                "losses: objects asks for the object class of a masked region, and the cells of an image "
                "tower's grid have none; make regions with classes by a stage of kind regions, give them as "
                "inputs.regions, and set model.vision.tower: regions"
            )
        masked = [name for name in ("words", "objects") if name in self.losses]
        if masked and config.segments == "global":
            raise ValueError(
                f"losses: {masked[0]} asks for masked segments by the others, and segments: global has one; "
                "leave it out, or set model.segments: regions"
            )
        if config.retrieval == "predictions" and LABELS not in self.losses:
            raise ValueError(
                "model.retrieval: predictions come of a classifier that the loss labels trains; add it, or "
                "set retrieval: embeddings"
            )

    def _freeze_unused(self) -> None:
        """What no loss reaches keeps its weights: no optimizer state, and the model written out has it."""
        towers: dict[str, nn.Module | None] = {"image": self.vision, "text": self.text}
        unused: list[nn.Module | nn.Parameter | None] = []
        for side in SIDES:
            if not any(side in READS[name] for name in self.losses):
                unused += [towers[side], self.segments[side]]
                unused += [self.encoder[side]] if side in self.encoder else []
        unused += [] if "labels" in self.losses else [self.classifier]
        unused += [] if "words" in self.losses else [self.word_head]
        if "objects" not in self.losses:
            unused += [self.object_head, getattr(self.segments["image"], "mask_vector", None)]
        for part in unused:
            if part is not None:
                part.requires_grad_(False)


class _Step:
    """One batch through the encoder: whole for the final embeddings, masked for Eq. 5, one forward a side."""

    # The paper does not say which pass Eq. 4 reads. Eq. 3 makes z of all segments, and so does retrieval:
    # label prediction sees the whole input, context prediction a masked one.
    def __init__(self, method: SemanticSharing, batch: Batch):
        self.method, self.batch = method, batch
        each = batch.rows_by_rank or (len(batch),) * world_size()
        first, self.rows = sum(each[: rank()]), sum(each)
        self.own_rows = slice(first, first + len(batch))
        self.z: dict[Side, Float[Tensor, "b d"]] = {}
        self._masked: dict[Side, Tensor] = {}
        self._asked_regions: Masked | None = None
        for side, run in (("image", self._run_images), ("text", self._run_texts)):
            if any(side in READS[name] for name in method.losses):
                run()

    def masked_text(self) -> Float[Tensor, "b m d"]:
        """The segments of the masked texts, after the encoder."""
        return self._masked["text"]

    def masked_image(self) -> tuple[Float[Tensor, "b r d"], Masked]:
        """The segments of the masked pictures, after the encoder, and which ones are masked."""
        assert self._asked_regions is not None
        return self._masked["image"], self._asked_regions

    def _run_images(self) -> None:
        method, batch = self.method, self.batch
        if method.vision is not None:
            tokens = batch.tokens.get("image")
            tokens = method.vision(batch.images["image"]) if tokens is None else tokens
            self._keep("image", *method.encoded("image", *method.grid_segments(tokens)))
            return
        if batch.regions is None:
            raise ValueError(
                "model.vision.tower: regions: the batch has none; give the stage inputs.regions, a stage of "
                "kind regions"
            )
        method.check_regions(batch.regions)
        hidden = None
        if "objects" in method.losses:
            hidden = self._hidden_regions(batch.regions.classes)
            if method._reads_embeddings:
                hidden = torch.cat([torch.zeros_like(hidden), hidden])
        features, positions = batch.regions.features, batch.regions.positions
        self._keep("image", *method.encoded("image", features, positions, hidden_cn=hidden))

    def _hidden_regions(self, classes_br: Int64[Tensor, "b r"]) -> Tensor:
        """Where [MASK] stands in. Drawn of all ranks' rows: a row's mask is no matter of their number."""
        r = classes_br.shape[1]
        seed = stable_hash(self.batch.draw, "regions")
        uniform = uniform_numbers(seed, self.rows * r, 1, classes_br.device).view(self.rows, r)
        asked = masked_regions(classes_br, uniform[self.own_rows], self.method.config.mask_share)
        self._asked_regions = asked
        return torch.zeros_like(classes_br, dtype=torch.bool).scatter(1, asked.places_bk, asked.asked_bk)

    def _run_texts(self) -> None:
        texts = self.batch.texts["text"]
        if "words" in self.method.losses:
            masked = self.batch.texts["text_masked"]
            if self.method._reads_embeddings:
                texts = Texts(torch.cat([texts.ids, masked.ids]), torch.cat([texts.mask, masked.mask]))
            else:
                texts = masked
        self._keep("text", *self.method.encoded_texts(texts))

    def _keep(self, side: Side, z_bd: Tensor, encoded_bnd: Tensor) -> None:
        """The whole inputs come first, where there are any."""
        count = len(self.batch)
        if self.method._reads_embeddings:
            self.z[side] = z_bd[:count]
        self._masked[side] = encoded_bnd[-count:]


def _encoder(config: Config) -> nn.Module:
    """T: the transformer, or FC layers (Table 1: w/o T, w/o R)."""
    if config.encoder == "fc":
        return FullyConnected(config.layers, config.dimension, config.activation)
    sizes = (config.dimension, config.heads, config.intermediate)
    return TransformerEncoder(config.layers, *sizes, config.dropout, config.activation)


def _asked(name: str, logits: Float[Tensor, "b k c"], asked: Masked, terms: Terms) -> None:
    """Adds the mean over what is asked for on all ranks, and how much of it is right."""
    losses = masked_token_rows(logits, asked)
    right = (logits.argmax(dim=2) == asked.targets_bk) & asked.asked_bk
    counts = torch.stack([right.sum(), asked.asked_bk.sum()]).to(losses.dtype)
    loss, hits, count = sum_over_ranks(torch.cat([losses.sum()[None], counts])).unbind()
    count = count.detach().clamp(min=1)  # there may be none at all
    terms.losses[name] = loss / count
    terms.report[f"{name}_accuracy"] = (hits / count).detach()


def _unit(feature: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    return F.normalize(widened(feature), dim=-1)


METHOD = SemanticSharing
