"""R2D2 (Xie et al.): pre-ranking by two towers, ranking by two cross encoders, two-way distillation."""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from learning.encoders.heads import MaskedLanguageHead
from learning.encoders.image_tower import ImageTower
from learning.encoders.momentum import Centre, FeatureQueue, Momentum
from learning.encoders.ranking import Fused, ImageCls, Ranking, with_cls
from learning.encoders.text import TextConfig, TextEncoder
from learning.encoders.towers import VisionTower, make_vision
from learning.losses.distillation import feature_guided_rows, target_guided_rows
from learning.losses.masked import masked_places, masked_token_rows, rows_at
from learning.losses.matching import MATCH, matching_rows
from learning.losses.temperature import Temperature, TemperatureConfig
from learning.methods.base import (
    Batch,
    ImageView,
    MaskedPatches,
    MaskedTokens,
    Method,
    MethodConfig,
    Terms,
    Texts,
    TextView,
    Views,
)
from learning.training.contrast import Contrast
from learning.training.distributed import all_reduce_max, gather, sum_over_ranks
from learning.training.exchange import Exchange
from learning.training.hard_negatives import NONE, draw_negatives, uniform_numbers
from learning.training.randomness import stable_hash

DISTILLING = ("gcpr_tgd", "fgd")  # the losses that have a teacher


class ImageMask(BaseModel):
    """What the student does not see of an image in feature-guided distillation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # The paper is silent on the image's mask: as much as of the text
    share: float = Field(default=0.15, gt=0, lt=1, description="of the patches, or of the tower's tokens")
    at: Literal["pixels", "tokens"] = Field(
        default="pixels",
        description="pixels: patches in the mean colour, and the tower runs again; tokens: left out of the "
        "mean of a tower's tokens (image_cls: mean), so that a frozen tower runs once",
    )
    patch_px: int = Field(default=16, ge=1, description="side of a masked patch, pixels; divides image_px")


class TeacherConfig(BaseModel):
    """The momentum teacher and what it teaches (Sec. 3.3, 4.1)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    momentum: float = Field(default=0.995, ge=0, lt=1, description="m of the teacher's weights")
    queue: int = Field(default=65_536, ge=1, description="features of each side that are kept")
    queue_decay: float = Field(default=0.99, gt=0, le=1, description="of a queue's weights, a step")
    alpha: float = Field(default=0.4, ge=0, le=1, description="α of Eq. 4: the share of the soft target")
    student_temperature: float = Field(default=0.1, gt=0, description="τ_s of Eq. 6")
    teacher_temperature: float = Field(default=0.04, gt=0, description="τ_t of Eq. 6")
    # The paper is silent on the momentum of μ: DINO's
    centre_momentum: float = Field(default=0.9, ge=0, lt=1, description="of μ in Eq. 6")


class Config(MethodConfig):
    """The recipe's `model` section for R2D2. Defaults are the paper's (Sec. 4.1) where it has any."""

    method: Literal["r2d2"] = "r2d2"
    vision: VisionTower
    text: TextConfig
    dimension: int = Field(
        default=768, ge=1, description="of the features of pre-ranking, and width of the cross encoders"
    )
    image_cls: ImageCls = Field(
        default="first",
        description="an image's [CLS]: the tower's first token, or the mean of its tokens, put before them",
    )
    cross_layers: int = Field(default=6, ge=0, description="of each cross encoder; 0: none (R2D2-CLIP)")
    cross_heads: int = Field(default=12, ge=1)
    cross_intermediate: int = Field(default=3072, ge=1, description="width of the cross encoders' FFN")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="in the cross encoders")
    feature_dropout: float = Field(default=0.0, ge=0, lt=1, description="on [CLS], before its projection")
    temperature: TemperatureConfig = TemperatureConfig(initial=0.07, learnable=True, min=0.001, max=0.5)
    image_view: Literal["plain", "augmented", "randaugment"] = "plain"
    mask_share: float = Field(default=0.15, gt=0, lt=1, description="of a text's tokens, for MLM and FgD")
    enhanced_training: bool = Field(
        default=True, description="ET: MLM inside FGR's forward of the positive pairs; false: one of its own"
    )
    match_weights: tuple[float, float] = Field(
        default=(1.0, 1.0), description="of pairs that do not match, and that do, in FGR's mean"
    )
    match_label: str = Field(default="match", description="label of a pair, 0 or 1, for the loss `match`")
    image_mask: ImageMask = ImageMask()
    teacher: TeacherConfig = TeacherConfig()

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if min(self.match_weights) <= 0:
            raise ValueError(f"match_weights: {self.match_weights}; both must be above 0")
        if self.image_mask.at == "tokens" and self.image_cls == "first":
            raise ValueError(
                "image_mask.at: tokens changes nothing where [CLS] is the tower's first token; "
                "set image_mask.at: pixels, or image_cls: mean"
            )
        return self


class R2D2(Method):
    """Losses: `gcpr` (Eq. 2) or `gcpr_tgd` (Eq. 5), `fgr` (Eq. 3), `mlm`, `fgd` (Eq. 7); their sum is Eq. 8.

    `match` is Eq. 3 on labelled pairs, for matching fine-tuning.
    """

    available_losses = ("gcpr", "gcpr_tgd", "fgr", "mlm", "fgd", "match")
    training_only = ("teacher.", "queues.", "centres.")

    def __init__(self, config: Config, losses: tuple[str, ...], vocabulary_size: int):
        super().__init__(losses)
        self.config = config
        self._check_losses()
        self.vision = make_vision(config.vision)
        self.text = TextEncoder(config.text, vocabulary_size)
        # The paper does not say which layer is projected, nor how often: the towers' last one, once a side,
        # for pre-ranking and cross encoders alike ("the linear projection layer", Sec. 3.1)
        self.image_projection = nn.Linear(self.vision.width, config.dimension)
        self.text_projection = nn.Linear(self.text.width, config.dimension)
        self.ranking: Ranking | None = None
        if config.cross_layers:
            sizes = (config.dimension, config.cross_heads, config.cross_intermediate)
            self.ranking = Ranking(config.cross_layers, *sizes, config.dropout)
            self.mlm_head = MaskedLanguageHead(config.dimension, vocabulary_size)
        self.temperature = Temperature(config.temperature)
        self._freeze_unused()
        self._taught: _Taught | None = None  # by this step's forward; it counts once the step is applied

    def frozen_image_tower(self) -> ImageTower | None:
        return None if self.config.vision.trainable else self.vision

    def views(self) -> Views:
        images: dict[str, ImageView] = {"image": self.config.image_view}
        texts: dict[str, TextView] = {"text": "plain"}
        if "fgd" in self.losses and self.config.image_mask.at == "pixels":
            mask = self.config.image_mask
            images["image_masked"] = MaskedPatches(mask.share, mask.patch_px)
        if self._masks_texts:
            texts["text_masked"] = MaskedTokens(self.config.mask_share)
        return Views(images, texts, (self.config.match_label,) if "match" in self.losses else ())

    def begin(self) -> None:
        """The teacher begins as the student is; queues are empty, centres 0."""
        config = self.config.teacher
        if set(self.losses) & set(DISTILLING):
            self.teacher = Momentum(config.momentum, **self._followed())
        if "gcpr_tgd" in self.losses:
            sizes = (config.queue, self.config.dimension, config.queue_decay)
            self.queues = nn.ModuleDict({side: FeatureQueue(*sizes) for side in ("image", "text")})
        if "fgd" in self.losses:
            sizes_of_centre = (self.config.dimension, config.centre_momentum)
            self.centres = nn.ModuleDict({side: Centre(*sizes_of_centre) for side in ("image", "text")})

    def forward(self, batch: Batch) -> Terms:
        step = _Step(self, batch)
        terms = Terms({})
        if "gcpr" in self.losses or "gcpr_tgd" in self.losses:
            self._pre_ranking(step, terms)
        if "fgr" in self.losses:
            self._fine_ranking(step, terms)
        if "mlm" in self.losses and "mlm" not in terms.losses:
            self._masked_language_alone(step, terms)
        if "fgd" in self.losses:
            self._feature_distillation(step, terms)
        if "match" in self.losses:
            self._matching(step, terms)
        self._taught = step.taught
        return terms

    def after_step(self) -> None:
        """The teacher follows; what this step's teacher gave goes into queues and centres."""
        taught, self._taught = self._taught, None
        if taught is None:
            return
        self.teacher.follow(**self._followed())
        for side, features in zip(("image", "text"), taught.every, strict=True):
            if "gcpr_tgd" in self.losses:
                self.queues[side].push(features, taught.ids)  # type: ignore[operator]
            if "fgd" in self.losses:
                self.centres[side].push(features.mean(dim=0))  # type: ignore[operator]

    def embed_images(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        return _unit(self.image_feature(self.vision(images)))

    def embed_texts(self, texts: Texts) -> Float[Tensor, "b d"]:
        return _unit(self.text_feature(self.text(texts)))

    def image_feature(self, tokens: Float[Tensor, "b n v"]) -> Float[Tensor, "b d"]:
        """The projected [CLS] of a tower's tokens, not normalised."""
        return self.image_projection(self._dropped(self.image_cls(tokens)))

    def image_cls(self, tokens: Float[Tensor, "b n v"]) -> Float[Tensor, "b v"]:
        return with_cls(tokens.to(self.image_projection.weight.dtype), self.config.image_cls)[:, 0]

    def fused_images(self, tokens: Float[Tensor, "p n v"]) -> Fused:
        """What the cross encoders read of a tower's tokens."""
        tokens = with_cls(tokens.to(self.image_projection.weight.dtype), self.config.image_cls)
        return Fused(self.image_projection(tokens), None)

    def fused_texts(self, tokens: Float[Tensor, "p m t"], mask: Int64[Tensor, "p m"]) -> Fused:
        """The same of a text tower's."""
        return Fused(self.text_projection(tokens), mask)

    def text_feature(self, tokens: Float[Tensor, "b m t"]) -> Float[Tensor, "b d"]:
        """The projected [CLS] of a text tower's tokens, not normalised."""
        return self.text_projection(self._dropped(tokens[:, 0]))

    def image_tokens(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n v"]:
        return self.vision(images)

    def text_tokens(self, texts: Texts) -> Float[Tensor, "b m t"]:
        return self.text(texts)

    def score_pairs(
        self,
        image_tokens: Float[Tensor, "p n v"],
        text_tokens: Float[Tensor, "p m t"],
        text_mask: Int64[Tensor, "p m"],
    ) -> Float[Tensor, " p"]:
        """As `RanksPairs` says. Raises ValueError where there are no cross encoders."""
        ranking = self._need_ranking()
        return ranking(
            self.fused_images(image_tokens), self.fused_texts(text_tokens, text_mask)
        ).probability()

    def attention(
        self,
        image_tokens: Float[Tensor, "p n v"],
        text_tokens: Float[Tensor, "p m t"],
        text_mask: Int64[Tensor, "p m"],
        layer: int,
    ) -> Float[Tensor, "p heads m n"]:
        """As `RanksPairs` says; the image's [CLS] is left out, so that a row may sum to less than 1."""
        ranking = self._need_ranking()
        return ranking.attention(
            self.fused_images(image_tokens), self.fused_texts(text_tokens, text_mask), layer
        )

    def _pre_ranking(self, step: "_Step", terms: Terms) -> None:
        """GCPR (Eq. 1, 2), or with target-guided distillation (Eq. 4, 5)."""
        temperature = self.temperature()
        terms.report["temperature"] = temperature.detach()
        both = (("image", "text"), ("text", "image"))
        if "gcpr" in self.losses:
            found = [step.contrast.info_nce(a, b, temperature, step.ids) for a, b in both]
            terms.losses["gcpr"] = (found[0].loss + found[1].loss) / 2
            terms.report["gcpr_accuracy"] = (found[0].accuracy + found[1].accuracy) / 2
            return
        units = step.need_teacher().own
        positive = step.ids[:, None] == step.all_ids
        total = temperature.new_zeros(())
        for (query, key), teacher in zip(both, units, strict=True):
            queue = self.queues[key].content()  # type: ignore[operator]
            total = (
                total
                + target_guided_rows(
                    step.contrast.own[query],
                    step.contrast.every[key],
                    teacher,
                    temperature,
                    self.config.teacher.alpha,
                    positive,
                    queue,
                    step.ids[:, None] == queue.ids_m,
                ).sum()
            )
        terms.losses["gcpr_tgd"] = sum_over_ranks(total) / (2 * step.rows)

    def _fine_ranking(self, step: "_Step", terms: Terms) -> None:
        """FGR (Eq. 3) on the positive pairs and two hard negatives of each; with ET, MLM on the positives."""
        # Differs from the paper: it speaks of masked positive pairs. Here all texts are masked under ET: were
        # the positives' alone, [MASK] would tell the answer.
        count = len(step.ids)
        wanted_texts, wanted_images = self._negatives(step)
        there = torch.cat([torch.ones_like(wanted_texts), wanted_texts, wanted_images]) != NONE
        labels = torch.zeros_like(there, dtype=torch.int64)
        labels[:count] = MATCH

        rows_by_rank = step.contrast.each
        other_images = Exchange(step.or_own(wanted_images), rows_by_rank).fetch(step.image_tokens)
        image = self.fused_images(torch.cat([step.image_tokens, other_images])).tokens
        length = all_reduce_max(step.text.ids.shape[1])  # all ranks' rows travel in one shape
        own = _padded(step.masked_tokens if self.enhanced else step.text_tokens, length)
        mask = _padded(step.text.mask, length)
        other_texts = Exchange(step.or_own(wanted_texts), rows_by_rank)
        text = self.fused_texts(
            torch.cat([own, other_texts.fetch(own), own]),
            torch.cat([mask, other_texts.fetch(mask), mask]),
        )
        pairs = Fused(torch.cat([image[:count], image]), None)
        read = count if self.enhanced else None  # MLM reads the positive pairs' tokens
        hidden = self._judge(step, terms, "fgr", (pairs, text), labels, there, read)
        if self.enhanced:
            self._masked_language(step, terms, hidden)

    def _negatives(self, step: "_Step") -> tuple[Int64[Tensor, " b"], Int64[Tensor, " b"]]:
        """For each image a text, and for each text an image, of all ranks'; NONE where all show the same."""
        same = step.ids[:, None] == step.all_ids
        numbers = uniform_numbers(step.batch.draw, step.rows, 2, same.device)[:, step.own_rows]
        drawn = []
        for (query, key), uniform in zip((("image", "text"), ("text", "image")), numbers, strict=True):
            with torch.no_grad():
                logits = step.contrast.own[query] @ step.contrast.every[key].T / self.temperature()
            drawn.append(draw_negatives(logits, same, uniform))
        return drawn[0], drawn[1]

    def _matching(self, step: "_Step", terms: Terms) -> None:
        """Eq. 3 on the corpus's own pairs and labels."""
        labels = step.batch.labels[self.config.match_label]
        pairs = (self.fused_images(step.image_tokens), self.fused_texts(step.text_tokens, step.text.mask))
        self._judge(step, terms, "match", pairs, labels, torch.ones_like(labels, dtype=torch.bool))

    def _judge(
        self,
        step: "_Step",
        terms: Terms,
        name: str,
        pairs: tuple[Fused, Fused],
        labels: Int64[Tensor, " p"],
        there: Bool[Tensor, " p"],
        tokens_of: int | None = None,
    ) -> Float[Tensor, "q m w"]:
        """Adds the weighted mean over all ranks' pairs that are `there`; gives the text-image tokens of the
        first `tokens_of`."""
        judged = self._need_ranking()(*pairs, tokens_of)
        losses = (matching_rows(judged.by_image, labels) + matching_rows(judged.by_text, labels)) / 2
        weights = losses.new_tensor(self.config.match_weights)[labels] * there
        right = (judged.by_image + judged.by_text).argmax(dim=1) == labels
        counts = torch.stack([weights.sum(), (right & there).sum().to(losses.dtype), there.sum()])
        loss, weight, hits, pairs_there = sum_over_ranks(
            torch.stack([(weights * losses).sum(), *counts.to(losses.dtype)])
        ).unbind()
        terms.losses[name] = loss / weight
        terms.report[f"{name}_accuracy"] = (hits / pairs_there).detach()
        return judged.text_tokens

    def _masked_language_alone(self, step: "_Step", terms: Terms) -> None:
        """MLM without ET: the whole forward of the masked text is its own, as in most models (Sec. 3.2)."""
        ranking = self._need_ranking()
        text = self.fused_texts(self.text(step.masked_text), step.masked_text.mask)
        image = self.fused_images(step.image_tokens)
        self._masked_language(step, terms, ranking.text_image(*text, *image))

    def _masked_language(self, step: "_Step", terms: Terms, hidden: Float[Tensor, "b m w"]) -> None:
        """MLM: the mean over the masked tokens of all ranks."""
        masked = masked_places(step.text.ids, step.masked_text.ids, self.config.mask_share)
        logits = self.mlm_head(rows_at(hidden, masked.places_bk))
        losses = masked_token_rows(logits, masked)
        right = (logits.argmax(dim=2) == masked.targets_bk) & masked.asked_bk
        sums = torch.stack(
            [losses.sum(), right.sum().to(losses.dtype), masked.asked_bk.sum().to(losses.dtype)]
        )
        loss, hits, asked = sum_over_ranks(sums).unbind()
        asked = asked.detach().clamp(min=1)  # texts of no ordinary token have none
        terms.losses["mlm"] = loss / asked
        terms.report["mlm_accuracy"] = (hits / asked).detach()

    def _feature_distillation(self, step: "_Step", terms: Terms) -> None:
        """FgD (Eq. 6, 7): the teacher has the whole inputs, the student masked ones."""
        config, taught = self.config.teacher, step.need_teacher()
        # The paper does not say whether f is normalised: features have unit length, as in Eq. 1. DINO's
        # outputs are bounded too; were f not, its norm would grow. At d = 768 the soft-maxes are nearly even.
        students = (_unit(step.masked_image_feature()), _unit(self.text_feature(step.masked_tokens)))
        total = students[0].new_zeros(())
        for side, student, teacher in zip(("image", "text"), students, taught.own, strict=True):
            centre: Any = self.centres[side]
            temperatures = (config.student_temperature, config.teacher_temperature)
            total = total + feature_guided_rows(student, teacher, centre.mean, *temperatures).sum()
        terms.losses["fgd"] = sum_over_ranks(total) / (2 * step.rows)

    def _followed(self) -> dict[str, nn.Module]:
        """The modules that have a teacher: a frozen tower is its own."""
        modules = {name: getattr(self, name) for name in ("text", "image_projection", "text_projection")}
        return modules | ({"vision": self.vision} if self.config.vision.trainable else {})

    @property
    def enhanced(self) -> bool:
        """ET: whether FGR's forward is MLM's too."""
        return self.config.enhanced_training and {"fgr", "mlm"} <= set(self.losses)

    @property
    def _masks_texts(self) -> bool:
        return "mlm" in self.losses or "fgd" in self.losses

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.feature_dropout, self.training)

    def _need_ranking(self) -> Ranking:
        if self.ranking is None:
            raise ValueError("model.cross_layers: 0: there are no cross encoders to judge pairs with")
        return self.ranking

    def _check_losses(self) -> None:
        if "gcpr" in self.losses and "gcpr_tgd" in self.losses:
            raise ValueError("losses: gcpr_tgd is gcpr with soft targets; give one of the two")
        crossed = [name for name in ("fgr", "match", "mlm") if name in self.losses]
        if crossed and not self.config.cross_layers:
            raise ValueError(f"losses: {crossed[0]} needs cross encoders; set model.cross_layers above 0")

    def _freeze_unused(self) -> None:
        """What no loss reaches keeps its weights: no optimizer state, and the model written out has it."""
        losses = set(self.losses)
        if not losses & {"gcpr", "gcpr_tgd"}:
            self.temperature.requires_grad_(False)
        if self.ranking is not None:
            self.ranking.read_by(self.losses)
            self.mlm_head.requires_grad_("mlm" in losses)


class _Taught(NamedTuple):
    """What the teacher gave for a step: unit features of (image, text), and all ranks' with their ids."""

    own: tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]
    every: tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]
    ids: Int64[Tensor, " n"]


class _Step:
    """One batch through the towers, and where its rows stand among those of all ranks."""

    def __init__(self, method: R2D2, batch: Batch):
        self.method, self.batch = method, batch
        self.text = batch.texts["text"]
        tokens = batch.tokens.get("image")
        self.image_tokens = method.vision(batch.images["image"]) if tokens is None else tokens
        self.taught: _Taught | None = None
        wants_masked = "fgd" in method.losses or method.enhanced
        self.text_tokens, self._masked_tokens = self._texts(wants_masked)
        ids = batch.ids
        if ids is None:
            ids = torch.tensor([stable_hash(key) for key in batch.keys], device=self.text.ids.device)
        features = {
            "image": _unit(method.image_feature(self.image_tokens)),
            "text": _unit(method.text_feature(self.text_tokens)),
        }
        self.ids = ids
        self.all_ids = gather(ids, batch.rows_by_rank)
        self.contrast = Contrast(method.contrast, features, batch.rows_by_rank)
        self.rows, first = self.contrast.rows, self.contrast.first
        self.own_rows = slice(first, first + len(ids))

    @property
    def masked_text(self) -> Texts:
        return self.batch.texts["text_masked"]

    @property
    def masked_tokens(self) -> Float[Tensor, "b m t"]:
        assert self._masked_tokens is not None
        return self._masked_tokens

    def or_own(self, wanted: Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
        """The row itself where there is none to fetch: it stays on its rank, and its pair does not count."""
        own = torch.arange(self.own_rows.start, self.own_rows.stop, device=wanted.device)
        return torch.where(wanted == NONE, own, wanted)

    def masked_image_feature(self) -> Float[Tensor, "b d"]:
        """What the student makes of the masked image (Eq. 6)."""
        method, mask = self.method, self.method.config.image_mask
        if mask.at == "pixels":
            return method.image_feature(method.vision(self.batch.images["image_masked"]))
        n = self.image_tokens.shape[1]
        # of all ranks' rows, so that a row's mask is no matter of their number
        seed = stable_hash(self.batch.draw, "mask")
        scores = uniform_numbers(seed, self.rows * n, 1, self.image_tokens.device).view(self.rows, n)
        kept = max(1, n - max(1, round(mask.share * n)))
        places = scores[self.own_rows].argsort(dim=1)[:, :kept]
        return method.image_feature(rows_at(self.image_tokens, places))

    def need_teacher(self) -> _Taught:
        """The teacher's features of the whole inputs; computed once a step."""
        if self.taught is None:
            self.taught = self._ask_teacher()
        return self.taught

    @torch.no_grad()
    def _ask_teacher(self) -> _Taught:
        method, tokens = self.method, self.image_tokens.detach()
        teacher: Any = method.teacher
        with teacher.computing(self.text_tokens.dtype, tokens.device):
            if method.config.vision.trainable:
                tokens = teacher.vision(self.batch.images["image"])
            image = teacher.image_projection(method.image_cls(tokens))
            text = teacher.text_projection(teacher.text(self.text)[:, 0])
        own = (_unit(image), _unit(text))
        images, texts = gather(torch.cat(own, dim=1), self.batch.rows_by_rank).chunk(2, dim=1)
        return _Taught(own, (images, texts), self.all_ids)

    def _texts(self, wants_masked: bool) -> tuple[Tensor, Tensor | None]:
        """The text tower's tokens, of the masked view too by the same forward pass."""
        if not wants_masked:
            return self.method.text(self.text), None
        masked = self.masked_text
        both = Texts(torch.cat([self.text.ids, masked.ids]), torch.cat([self.text.mask, masked.mask]))
        plain, hidden = self.method.text(both).chunk(2)
        return plain, hidden


def _unit(feature: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    return F.normalize(feature.to(torch.promote_types(feature.dtype, torch.float32)), dim=-1)


def _padded(x: Tensor, length: int) -> Tensor:
    """(b, m, …) with zeros up to `length` in the second dimension."""
    missing = length - x.shape[1]
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing)) if missing else x


METHOD = R2D2
