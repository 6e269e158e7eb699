"""Files of a checkpoint, written while training goes on: copies taken at its step, a thread to write them."""

import copy
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learning.training.checkpoint_files import Writer


class LaterWriter(Writer):
    """Takes copies of what is to be written; `run` writes them, in any thread."""

    def __init__(self, directory: Path, staging: "Staging"):
        super().__init__(directory)
        self._staging = staging
        self._taken: list[torch.UntypedStorage] = []
        self._waiting: deque[Callable[[], None]] = deque()
        self._given_up = False

    def save(self, state: Any, path: str | Path, *, constant: bool = False) -> None:
        taken: list[Any] = []
        self._guarded(lambda: taken.append(state if constant else snapshot(state, self._copy)))
        if taken:
            self._later(lambda: super(LaterWriter, self).save(taken.pop(), path))

    def text(self, content: str, path: str | Path) -> None:
        self._later(lambda: super(LaterWriter, self).text(content, path))

    def run(self) -> None:
        """Write what was taken. An error is kept, as Writer does."""
        while self._waiting and not self._given_up:
            self._waiting.popleft()()
        self._waiting.clear()
        self._staging.keep(self._taken)

    def give_up(self) -> None:
        """Let `run` end after the file that it is writing."""
        self._given_up = True
        self.error = self.error or "given up"

    def _copy(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        self._taken.append(self._staging.copy(storage))
        return self._taken[-1]

    def _later(self, action: Callable[[], None]) -> None:
        if self.error is None:
            self._waiting.append(action)


class Staging:
    """Memory for copies, kept from one checkpoint to the next: fresh pages cost more than the copying.

    Copies are taken in one thread and handed back in another, one checkpoint after the other.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[torch.UntypedStorage]] = {}  # by size in bytes

    def copy(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """On the CPU; of a GPU's memory in pinned memory, which it writes to at full speed."""
        size = storage.nbytes()
        free = self._free.get(size)
        if free:
            kept = free.pop()
        else:
            pinned = storage.device.type == "cuda"
            kept = torch.empty(size, dtype=torch.uint8, pin_memory=pinned).untyped_storage()
        kept.copy_(storage)
        return kept

    def keep(self, storages: Sequence[torch.UntypedStorage]) -> None:
        """For the next checkpoint; what this one did not need is let go."""
        self._free = {}
        for storage in storages:
            self._free.setdefault(storage.nbytes(), []).append(storage)


def snapshot(state: Any, copy_storage: Callable[[torch.UntypedStorage], torch.UntypedStorage]) -> Any:
    """A copy of nested containers, tensors on the CPU; what is done to `state` afterwards is not seen in it.

    Tensors that share memory in `state` share it in the copy.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            if storage._cdata not in storages:
                storages[storage._cdata] = copy_storage(storage)
            empty = torch.empty(0, dtype=value.dtype)
            return empty.set_(storages[storage._cdata], value.storage_offset(), value.size(), value.stride())
        if isinstance(value, dict):
            made = copy.copy(value)  # keeps an OrderedDict's own attributes: a state dict has _metadata
            for key, inner in value.items():
                made[key] = copied(inner)
            return made
        if type(value) in (list, tuple):
            return type(value)(copied(inner) for inner in value)
        return copy.deepcopy(value)

    return copied(state)
