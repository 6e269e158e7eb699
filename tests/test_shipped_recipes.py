"""Every recipe that is shipped is valid and checked for leaks; cookie.yaml and r2d2_*.yaml hold their papers'
numbers."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from learning import methods
from learning.model_files import without_weights
from pipeline import leaks
from pipeline.fingerprint import identities
from pipeline.recipe import Recipe, load

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
read = cache(load)  # R2D2's have 30 stages and more


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid_and_its_deepspeed_files_exist(path: Path) -> None:
    recipe = read(path)
    assert recipe.name == path.stem
    assert set(recipe.head.reuse) <= {other.stem for other in RECIPES} - {recipe.name}
    leaks.check(recipe.source, recipe.head.stages)  # as every plan does
    for stage in recipe.stages.values():
        if stage.distributed and stage.kind not in ("evaluate", "regions"):
            assert (recipe.directory / stage.deepspeed).is_file()  # type: ignore[attr-defined]


def test_cookie_has_the_papers_numbers() -> None:
    """Sec. IV-A b, IV-B a and IV-C of COOKIE."""
    stages: dict[str, Any] = dict(load(ROOT / "recipes/cookie.yaml").stages)
    first, second, tuned = stages["pretrain_1"], stages["pretrain_2"], stages["finetune"]
    assert [(s.contrastive_batch, s.epochs) for s in (first, second, tuned)] == [
        (576, 30),
        (288, 10),
        (288, 16),
    ]
    assert [s.contrastive_batch // s.batch_per_gpu for s in (first, second, tuned)] == [48, 48, 48]
    assert [set(s.losses) for s in (first, second, tuned)] == [{"ccl"}, {"ccl", "vcl", "tcl"}, {"hinge"}]
    assert {weight for s in (first, second, tuned) for weight in s.losses.values()} == {1.0}  # Eq. 12
    for stage in (first, second, tuned):
        assert (stage.schedule.name, stage.schedule.decay_at, stage.schedule.decay) == ("step", 0.5, 0.1)
        assert stage.optimizer.lr_scale == {"vision": 0.1}
    assert (first.optimizer.learning_rate, second.optimizer.learning_rate) == (2e-5, 2e-5)
    assert (tuned.optimizer.learning_rate, tuned.optimizer.weight_decay, tuned.schedule.warmup) == (
        1e-5,
        1e-4,
        0.1,
    )
    model: Any = methods.parse_config(first.model)
    assert (model.vision.name, model.vision.image_px, model.text.max_length) == ("resnext101_32x8d", 512, 50)
    assert (model.text.layers, model.text.width) == (12, 768)
    assert (model.dimension, model.heads, model.intermediate) == (1024, 8, 1024)
    assert (model.tav_layers, model.ws_layers, model.sharing, model.pooling) == (1, 2, "shared", "max")
    assert model.hinge_margin == 0.2


RETRIEVAL = ("flickr30k_cn", "flickr30k_cna", "coco_cn", "aic_icc", "muge", "icr", "iqr")
MATCHING = ("icm", "iqm")


def r2d2(name: str, *overrides: str) -> Recipe:
    path = ROOT / f"recipes/r2d2_{name}.yaml"
    return read(path, overrides) if overrides else read(path)


def shorts(recipe: Recipe, root: Path) -> dict[str, str]:
    return {name: identity.short for name, identity in identities(recipe, root).items()}


@pytest.mark.parametrize(
    ("name", "vision", "layers", "patch_px"),
    [("base", "clip_vit_b16", 12, 16), ("large", "clip_vit_l14", 24, 14)],
)
def test_r2d2_has_the_papers_numbers(name: str, vision: str, layers: int, patch_px: int) -> None:
    """Sec. 2.1, 3 and 4.1 of Zero and R2D2."""
    recipe = r2d2(name)
    stage: Any = recipe.stages["pretrain"]
    assert stage.losses == {"gcpr_tgd": 1.0, "fgr": 1.0, "mlm": 1.0, "fgd": 1.0}  # Eq. 8
    assert (stage.contrastive_batch, stage.batch_per_gpu, stage.ranks_wanted()) == (2048, 32, 64)
    assert (stage.epochs, stage.schedule.name, recipe.head.samples["shard"]) == (30, "cosine", 23_000_000)
    assert stage.schedule.warmup > 0
    assert stage.data.texts == ("title", "content", "queries")
    model: Any = methods.parse_config(stage.model)
    tower = model.vision
    assert (tower.name, tower.layers, tower.patch_px, tower.image_px) == (vision, layers, patch_px, 224)
    assert not tower.trainable
    assert (model.text.layers, model.text.width, model.text.weights) == (12, 768, None)
    assert (model.dimension, model.cross_layers, model.mask_share, model.enhanced_training) == (
        768,
        6,
        0.15,
        True,
    )
    assert (model.temperature.initial, model.temperature.learnable) == (0.07, True)
    assert model.image_mask.patch_px == patch_px
    teacher = model.teacher
    assert (teacher.momentum, teacher.queue, teacher.queue_decay) == (0.995, 65_536, 0.99)
    assert (teacher.alpha, teacher.student_temperature, teacher.teacher_temperature) == (0.4, 0.1, 0.04)
    log: Any = recipe.stages["filter"]
    assert (log.best_per_query, log.min_words, log.max_words, log.min_side_px, log.max_aspect) == (
        1,
        2,
        128,
        100,
        4,
    )


@pytest.mark.parametrize(
    ("overrides", "losses", "enhanced"),
    [
        (["model.enhanced_training=false"], {"gcpr_tgd", "fgr", "mlm", "fgd"}, False),
        (
            [
                "stages.pretrain.losses.gcpr_tgd=null",
                "stages.pretrain.losses.gcpr=1",
                "stages.pretrain.losses.fgd=null",
            ],
            {"gcpr", "fgr", "mlm"},
            True,
        ),
        (
            ["stages.pretrain.losses.gcpr_tgd=null", "stages.pretrain.losses.gcpr=1"],
            {"gcpr", "fgr", "mlm", "fgd"},
            True,
        ),
        (["stages.pretrain.losses.fgd=null"], {"gcpr_tgd", "fgr", "mlm"}, True),
    ],
    ids=["ET", "TwD", "TgD", "FgD"],
)
def test_what_the_head_of_r2d2_large_sets_makes_the_rows_of_table_3(
    overrides: list[str], losses: set[str], enhanced: bool
) -> None:
    head = (ROOT / "recipes/r2d2_large.yaml").read_text(encoding="utf-8").partition("extends:")[0]
    assert all(f"--set {override}" in head for override in overrides)
    stage: Any = r2d2("large", *overrides).stages["pretrain"]
    model: Any = methods.parse_config(stage.model)
    assert (set(stage.losses), model.enhanced_training) == (losses, enhanced)


def test_r2d2_clip_is_pre_ranking_alone() -> None:
    stage: Any = r2d2("clip").stages["pretrain"]
    model: Any = methods.parse_config(stage.model)
    assert (stage.losses, model.cross_layers, model.vision.name) == ({"gcpr": 1.0}, 0, "clip_vit_l14")


@pytest.mark.parametrize("name", [*RETRIEVAL, *MATCHING])
def test_fine_tuning_has_the_papers_and_the_released_settings(name: str) -> None:
    """Appendix C of Zero and R2D2, and the released configurations."""
    stages: dict[str, Any] = dict(r2d2(f"finetune_{name}").stages)
    stage, gallery = stages["finetune"], stages["evaluate"].galleries[0]
    assert stage.inputs == {"corpus": name, "weights": "pretrain"}
    assert stages["evaluate"].inputs == {"corpus": name, "weights": "finetune"}
    assert (gallery.name, gallery.split, stage.validation.split, stage.data.split) == (
        name,
        "test",
        "val",
        "train",
    )
    assert (stage.epochs, stage.batch_per_gpu, stage.schedule.name) == (10, 32, "cosine")
    tuned, trained = (methods.parse_config(stages[n].model) for n in ("finetune", "pretrain"))
    model: Any = tuned
    assert model.image_view == "randaugment"
    assert (model.vision, model.text, model.temperature) == (
        trained.vision,
        trained.text,
        trained.temperature,
    )  # type: ignore[attr-defined]
    assert (model.temperature.min, model.temperature.max, model.text.max_length) == (0.001, 0.5, 64)
    rates = (stage.optimizer.learning_rate, stage.optimizer.weight_decay, stage.schedule.warmup)
    first_rate = stage.optimizer.learning_rate * stage.schedule.warmup_from
    if name in MATCHING:
        assert (stage.losses, stage.pick_best, gallery.task) == ({"match": 1.0}, "val/auc", "matching")
        assert (rates, first_rate) == ((3e-6, 0.01, 3125), pytest.approx(1.5e-7))
        assert stages[name].labels is not None
        assert stages[name].pair_labels == ("match",)
        return
    assert (stage.losses, stage.pick_best, gallery.task) == (
        {"gcpr": 1.0, "fgr": 1.0},
        "val/r@m",
        "retrieval",
    )
    assert (rates, first_rate) == ((1e-5, 0.05, 500), pytest.approx(1e-6))
    assert model.match_weights == (1.0, 2.0)
    assert gallery.rerank.top_k == (128 if name.startswith("flickr30k") else 64)
    assert gallery.directions == (("t2i",) if name == "muge" else ("i2t", "t2i"))


SETS = {"": 80, "_flickr25k": 24, "_nus_wide": 21, "_demo": 109}


@pytest.mark.parametrize("name", SETS)
def test_semantic_sharing_has_the_papers_numbers(name: str) -> None:
    """Sec. 3.2 and 4.1: 36 regions, word2vec and a Bi-GRU, 15 %, Eq. 6, the labels of each set, NDCG."""
    stages: dict[str, Any] = dict(read(ROOT / f"recipes/semantic_sharing{name}.yaml").stages)
    stage = stages["pretrain"]
    model: Any = methods.parse_config(stage.model)
    assert (model.vision.count, model.text.tower, model.mask_share) == (36, "gru", 0.15)
    assert len(model.labels.names) == SETS[name]
    assert set(stage.losses) == {"labels", "words", "objects"}
    assert stage.vocabulary.kind == "words"
    for gallery in stages["evaluate"].galleries:
        assert (gallery.task, gallery.label_set.names) == ("labels", model.labels.names)
    if name != "_demo":
        assert (model.text.word_width, str(model.text.weights)[-4:]) == (300, ".txt")
        assert (stage.pick_best, stage.validation.split) == ("val/ndcg", "val")


LOSS = "stages.pretrain.losses"
SMALL: dict[str, Any] = {"dimension": 8, "text": {"tower": "gru", "width": 8}}
WO_C = (f"{LOSS}.words=null", f"{LOSS}.objects=null")


@pytest.mark.parametrize(
    ("overrides", "losses"),
    [
        (("model.sharing=separate", "model.retrieval=predictions", *WO_C), {"labels"}),
        ((f"{LOSS}.consistency=1", f"{LOSS}.labels=null", *WO_C), {"consistency"}),
        (("model.segments=global", "model.encoder=fc", *WO_C), {"labels"}),
        (("model.encoder=fc",), {"labels", "words", "objects"}),
        (WO_C, {"labels"}),
        ((f"{LOSS}.labels=null",), {"words", "objects"}),
        ((f"{LOSS}.triplet=1",), {"labels", "words", "objects", "triplet"}),
    ],
    ids=["ST", "IMC", "wo R", "wo T", "wo C", "wo L", "Ours+Con"],
)
def test_what_the_head_of_semantic_sharing_sets_makes_the_rows_of_table_1(
    overrides: tuple[str, ...], losses: set[str]
) -> None:
    path = ROOT / "recipes/semantic_sharing.yaml"
    head = path.read_text(encoding="utf-8").partition("name: semantic_sharing\n")[0]
    assert all(f"--set {override}" in head for override in overrides)
    stage: Any = read(path, overrides).stages["pretrain"]
    assert set(stage.losses) == losses
    assert methods.build(methods.parse_config(without_weights(stage.model) | SMALL), tuple(losses), 40)


def test_conlip_has_the_papers_numbers() -> None:
    """Sec. 4.1, 4.4 and Table 6 of ConLIP."""
    recipe = read(ROOT / "recipes/conlip.yaml")
    stages: dict[str, Any] = dict(recipe.stages)
    trained, tuned = stages["pretrain"], [stages["finetune_coco"], stages["finetune_flickr30k"]]
    for stage in (trained, *tuned):
        assert (stage.contrastive_batch, stage.epochs, stage.ranks_wanted()) == (4096, 30, 8)
        assert (stage.optimizer.learning_rate, stage.optimizer.weight_decay) == (5e-5, 0.01)
        assert (stage.schedule.name, stage.schedule.warmup, stage.schedule.floor) == ("linear", 0.1, 0.0)
        assert "fp16" in stage.deepspeed.name
        model: Any = methods.parse_config(stage.model)
        assert (model.temperature.initial, model.temperature.learnable) == (0.05, False)
        assert (model.momentum, model.queue, model.dimension) == (0.99, 12_288, None)
        assert (model.text.layers, model.text.width, model.text.max_length) == (12, 768, 50)
        assert model.vision.name == "vit_base_patch16_224"
        assert model.vision.image_px == (224 if stage is trained else 336)
    model = methods.parse_config(trained.model)
    assert trained.losses == {"dcl": 1.0, "mlm": 1.0, "mim": 1.0}  # Eq. 4, 7
    assert (model.conditioned, model.head_layers, model.dropout) == (True, 1, 0.1)
    assert (model.text_mask_share, model.image_mask_share) == (0.15, 0.5)
    assert recipe.head.samples["shard"] == 5_300_000
    assert [stage.losses for stage in tuned] == [{"dcl": 1.0}] * 2
    assert [stage.inputs for stage in tuned] == [
        {"corpus": corpus, "weights": "pretrain"} for corpus in ("coco", "flickr30k")
    ]
    measured = [gallery for gallery in stages["zero_shot_flickr30k"].galleries if gallery.cls_attention]
    assert [gallery.split for gallery in measured] == ["val"]  # Table 2


PRETRAIN = "stages.pretrain"
CONLIP_SMALL: dict[str, Any] = {
    "vision": {
        "name": "test_vit",
        "image_px": 64,
        "vit": {"patch_px": 16, "layers": 1, "width": 8, "heads": 2},
    },
    "text": {"layers": 1, "width": 8, "heads": 2, "intermediate": 8},
    "head_heads": 2,
    "head_intermediate": 8,
    "queue": 8,
}


@pytest.mark.parametrize(
    ("overrides", "losses"),
    [
        ((f"{PRETRAIN}.losses.mlm=null", f"{PRETRAIN}.losses.mim=null"), {"dcl"}),
        (("model.conditioned=false",), {"dcl", "mlm", "mim"}),
        ((f"{PRETRAIN}.losses.mim=null",), {"dcl", "mlm"}),
        ((f"{PRETRAIN}.losses.mlm=null",), {"dcl", "mim"}),
        ((f"{PRETRAIN}.losses.dcl=null", f"{PRETRAIN}.losses.info_nce=1"), {"info_nce", "mlm", "mim"}),
        (("model.head_layers=2", "model.head_shared=true"), {"dcl", "mlm", "mim"}),
        (("model.text_mask_share=0.4", "model.image_mask_share=0.7"), {"dcl", "mlm", "mim"}),
    ],
    ids=["CL", "Vanilla", "ConMLM", "ConMIM", "InfoNCE", "2*", "Table 5"],
)
def test_rows_of_conlips_tables_are_settings(overrides: tuple[str, ...], losses: set[str]) -> None:
    stage: Any = read(ROOT / "recipes/conlip.yaml", overrides).stages["pretrain"]
    assert set(stage.losses) == losses
    small = without_weights(stage.model) | CONLIP_SMALL
    made = methods.build(methods.parse_config(small), tuple(stage.losses), 40)
    made.begin()


def test_aic_icc_is_tested_on_the_first_10000_pictures() -> None:
    stages: dict[str, Any] = dict(read(ROOT / "recipes/chinese_sets.yaml").stages)
    [train, test] = stages["aic_icc_ingest"].sources
    assert (train.split, train.first, test.split, test.first) == ("train", None, "test", 10_000)


def test_fine_tuning_starts_from_the_pre_training_of_another_recipe(tmp_path: Path) -> None:
    """The stage in both recipes is one: what it made there is found by `reuse`."""
    large, base = (shorts(r2d2(name), tmp_path) for name in ("large", "base"))
    tuned = r2d2("finetune_icr")
    assert shorts(tuned, tmp_path)["pretrain"] == large["pretrain"] != base["pretrain"]
    assert {"r2d2_large", "r2d2_base", "zero_corpus", "chinese_sets"} <= set(tuned.head.reuse)
    head = (
        (ROOT / "recipes/r2d2_finetune_retrieval.yaml").read_text(encoding="utf-8").partition("extends:")[0]
    )
    as_base = [word for word in head.split() if "=" in word]
    assert len(as_base) == 4
    assert shorts(r2d2("finetune_icr", *as_base), tmp_path)["pretrain"] == base["pretrain"]
