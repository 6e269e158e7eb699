"""Every recipe that is shipped is valid; cookie.yaml holds the paper's numbers."""

from pathlib import Path
from typing import Any

import pytest

from learning import methods
from pipeline.recipe import load

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid_and_its_deepspeed_files_exist(path: Path) -> None:
    recipe = load(path)
    assert recipe.name == path.stem
    for stage in recipe.stages.values():
        if stage.distributed and stage.kind != "evaluate":
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
