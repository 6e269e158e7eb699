"""What a model is and how it learns. `learning.load(stage_directory)` gives a trained model to use."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from learning.model_files import RetrievalModel

__all__ = ["load"]


def load(directory: str | Path, device: str = "cpu") -> "RetrievalModel":
    """A trained model from a training stage's directory (or its `out/`), ready to embed images and texts.

    >>> model = learning.load("runs/demo/finetune/0123456789ab")
    >>> model.embed_images([PIL.Image.open("cat.jpg")])  # → (1, d) float32, unit length
    >>> model.embed_texts(["a cat", "猫"])               # → (2, d) float32, unit length

    Raises ValueError when the directory is not that of a training stage, when the stage is not done, or
    when a file is damaged or missing.
    """
    from learning import model_files  # here, so that `import learning` starts no torch

    return model_files.load(Path(directory), device)
