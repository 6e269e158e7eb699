"""When a run must have ended: `--stop-after 3h50m`, or TANDEM_STOP_AT, which a batch script sets."""

import os
import re
import time
from collections.abc import Mapping

from stages.base import StageError

VARIABLE = "TANDEM_STOP_AT"  # unix seconds
_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def seconds_of(duration: str) -> float:
    """3h50m, 90m, 1d2h or 45s in seconds. Raises StageError for anything else."""
    found = _DURATION.fullmatch(duration.strip())
    if found is None or not any(found.groups()):
        raise StageError(f"--stop-after: '{duration}' is no duration; write 3h50m, 90m, 1d2h or 45s")
    pairs = zip(found.groups(), _SECONDS.values(), strict=True)
    return float(sum(int(count) * seconds for count, seconds in pairs if count is not None))


def stop_at(stop_after: str | None = None, environment: Mapping[str, str] = os.environ) -> float | None:
    """Unix seconds by which all must be saved: the earlier of the option and TANDEM_STOP_AT; None: never."""
    times = [] if stop_after is None else [time.time() + seconds_of(stop_after)]
    told = environment.get(VARIABLE)
    if told:
        try:
            times.append(float(told))
        except ValueError:
            raise StageError(f"{VARIABLE}: '{told}' is no time; give unix seconds (date +%s)") from None
    return min(times, default=None)


def is_over(stop_at: float | None) -> bool:
    return stop_at is not None and time.time() >= stop_at
