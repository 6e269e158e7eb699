"""Methods by name. A method is one file here with a `Config` and a class named by its `METHOD`."""

import pkgutil
from importlib import import_module
from typing import Any

from learning.methods.base import Method, MethodConfig


def names() -> list[str]:
    """The methods there are: every module here but `base`."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base")


def module(name: str) -> Any:
    """The module of a method. Raises ValueError that lists the methods there are."""
    if name not in names():
        raise ValueError(f"model.method: '{name}' is not a method; allowed: {', '.join(names())}")
    return import_module(f"learning.methods.{name}")


def parse_config(values: dict[str, Any]) -> MethodConfig:
    """Validate a recipe's `model` section by the Config of the method that it names."""
    if "method" not in values:
        raise ValueError(f"model.method: missing; allowed: {', '.join(names())}")
    return module(str(values["method"])).Config.model_validate(values)


def build(config: MethodConfig, losses: tuple[str, ...], vocabulary_size: int) -> Method:
    """The method's module, on the CPU, its weights as the config says: from scratch, or from local files."""
    return module(config.method).METHOD(config, losses, vocabulary_size)
