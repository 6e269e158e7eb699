"""DeepSpeed's checkpoint files through Tandem's own writer: each is hashed, and a full disk hangs no rank."""

from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

from learning.training.checkpoint_files import Writer


class FileEngine(CheckpointEngine):
    """Writes through a Writer, which remembers an error instead of raising it while other ranks wait."""

    def __init__(self, writer: Writer):
        super().__init__()
        self.writer = writer

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing to prepare."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.writer.make_directory(path)

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        self.writer.save(state_dict, path)

    def load(self, path: str, map_location: Any = None) -> Any:
        # DeepSpeed's own objects are in it, so not weights_only; the manifest's hash was checked before
        return torch.load(path, map_location=map_location, weights_only=False)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True
