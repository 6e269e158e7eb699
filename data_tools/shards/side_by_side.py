"""The same function over many tasks in worker processes that start fresh and never outlive their parent."""

import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from data_tools.errors import DataError
from data_tools.workers import die_with_parent

Task = TypeVar("Task")
Result = TypeVar("Result")

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class WorkerLost(DataError):
    """A worker process was ended from outside."""


def side_by_side(
    function: Callable[[Task], Result], tasks: Iterable[Task], processes: int
) -> Iterator[Result]:
    """`function` of each task, in the order of the tasks, whoever is done first.

    At most three tasks a process are under way or waiting to be fetched, so that memory does not grow with
    their number. With one process everything runs in this one. What a task raises is raised here, and the
    others are not started. `function` is one of a module, and it and the tasks can be pickled.

    Raises:
        WorkerLost: a worker process was killed, as by the system for want of memory.
    """
    if processes <= 1:
        yield from map(function, tasks)
        return
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_begin_worker)
    waiting: deque[Future[Any]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(function, task))
            if len(waiting) >= 3 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise WorkerLost(
            f"one of {processes} worker processes was ended from outside; if the system was out of memory, "
            "give fewer processes, and run the same command again"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    """Leave stop signals, which come to a whole group, to the parent, and end with it whatever ends it."""
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
