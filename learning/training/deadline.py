"""When to stop by the clock: early enough for the step, the validation and the save that must still fit."""

import time
from collections.abc import Callable

MARGIN = 2.0  # on what was measured: a shared file system is not always as quick as it was
LEAVE_S = 5.0  # for the processes to end
WRITE_BYTES_PER_S = 100 * 2**20  # what a first save is expected to take, before one was measured


class Deadline:
    """Knows how long steps, validations and saves took last, and whether another one still fits."""

    def __init__(self, stop_at: float | None, checkpoint_bytes: int, clock: Callable[[], float] = time.time):
        """`stop_at`: unix seconds by which the processes must have ended; None: never."""
        self.stop_at, self.clock = stop_at, clock
        self._last_s = {"step": 0.0, "validate": 0.0, "save": checkpoint_bytes / WRITE_BYTES_PER_S}

    def took(self, what: str, seconds: float) -> None:
        """`what`: step, validate or save."""
        self._last_s[what] = seconds

    def due(self, validates: bool) -> bool:
        """Whether to save and stop now, before another step; `validates`: a validation follows that step."""
        if self.stop_at is None:
            return False
        needed = self._last_s["step"] + self._last_s["save"] + validates * self._last_s["validate"]
        return self.clock() + MARGIN * needed + LEAVE_S >= self.stop_at
