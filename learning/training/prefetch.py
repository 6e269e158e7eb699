"""Batches made ahead of the training, in order: by a thread, or by worker processes and a thread.

Worker processes make each batch together, every one its rows: the first batch is there soonest, and one that
waits for a slow shard holds up no more than it must. The thread joins the rows, pads the texts and pins the
memory where there is a GPU.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from learning.training.loader import Batches, Failed, Loaded, Rows

PREFETCH = 2  # batches made ahead; each worker process has as many parts of later ones ready
# What PyTorch raises for a process that is gone; and what the tensors that it was handing over raise, whose
# memory it can no longer be asked for.
_ENDED = (RuntimeError, EOFError, ConnectionError, FileNotFoundError)


def batches_from(batches: Batches, start: int, stop: int) -> Generator[Loaded | Failed, None, None]:
    """The batches of the steps start … stop - 1. A worker process that dies gives a Failed one."""
    workers = batches.config.workers
    make: Callable[[int], Loaded | Failed] = (
        _Workers(batches, start, stop).batch if workers else batches.__getitem__
    )
    with ThreadPoolExecutor(1, thread_name_prefix="loader") as thread:
        ahead: deque[Future[Loaded | Failed]] = deque()
        try:
            for step in range(start, stop):
                while len(ahead) < PREFETCH and step + len(ahead) < stop:
                    ahead.append(thread.submit(_pinned, make, step + len(ahead)))
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _pinned(make: Callable[[int], Loaded | Failed], step: int) -> Loaded | Failed:
    """A batch in page-locked memory, so that its copy to the GPU runs beside the computation."""
    made = make(step)
    if isinstance(made, Loaded) and torch.cuda.is_available():
        made.batch = made.batch.pin_memory()
    return made


class _Parts(Dataset[Rows | Failed]):
    """Item (step, part): the rows that one worker process makes."""

    def __init__(self, batches: Batches):
        self.batches = batches

    def __getitem__(self, item: tuple[int, int]) -> Rows | Failed:
        return self.batches.rows(*item, self.batches.config.workers)


class _Order(Sampler[tuple[int, int]]):
    """The items of _Parts: part p falls to process p each time, as PyTorch hands them out in turns."""

    def __init__(self, start: int, stop: int, parts: int):
        self.steps, self.parts = range(start, stop), parts

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((step, part) for step in self.steps for part in range(self.parts))


class _Workers:
    """`data.workers` processes; `batch` gives the steps in order, each once."""

    def __init__(self, batches: Batches, start: int, stop: int):
        self.batches, self.parts = batches, batches.config.workers
        self._loader: Any = DataLoader(
            _Parts(batches),
            batch_size=None,
            sampler=_Order(start, stop, self.parts),
            num_workers=self.parts,
            prefetch_factor=PREFETCH,
        )
        self._made: Any = None
        self._ended: Failed | None = None

    def batch(self, step: int) -> Loaded | Failed:
        if self._ended is not None:  # what follows is not in order any more
            return self._ended
        try:
            if self._made is None:
                # started by the calling thread: PyTorch then looks for dead processes while it waits for
                # one, and does not interrupt the training by a signal handler
                self._made = iter(self._loader)
            return self.batches.joined([next(self._made) for _ in range(self.parts)])
        except _ENDED as error:
            self._ended = Failed(f"step {step}: a process of data.workers ended: {error!r}")
            return self._ended
