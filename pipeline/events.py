"""The line from a stage's processes to the runner: small JSON messages through one pipe."""

import contextlib
import fcntl
import json
import os
import select
import time
from collections.abc import Iterator
from typing import Any

VARIABLE = "TANDEM_EVENTS_FD"
_MOST_BYTES = select.PIPE_BUF  # a write of up to this many bytes is never torn by another process's


class Channel:
    """The writing end. Without a runner (on a cluster) it swallows everything."""

    def __init__(self, descriptor: int | None):
        self.descriptor = descriptor
        if descriptor is not None:
            os.set_inheritable(descriptor, False)
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_NONBLOCK)

    @classmethod
    def from_environment(cls) -> "Channel":
        value = os.environ.pop(VARIABLE, None)
        return cls(int(value) if value else None)

    def send(self, kind: str, /, patience_s: float = 0.0, **content: Any) -> bool:
        """Send one message; False if it was lost. `patience_s`: how long to try while the pipe is full."""
        if self.descriptor is None:
            return False
        line = json.dumps({"event": kind, **content}, ensure_ascii=True, default=str).encode() + b"\n"
        if len(line) > _MOST_BYTES and "message" in content:
            content["message"] = str(content["message"])[:500] + " …"
            line = json.dumps({"event": kind, **content}, ensure_ascii=True, default=str).encode() + b"\n"
        if len(line) > _MOST_BYTES:
            return False
        deadline = time.monotonic() + patience_s
        while True:
            try:
                os.write(self.descriptor, line)
                return True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(0.02)
            except OSError:
                self.descriptor = None  # the runner has gone
                return False


class Inbox:
    """The reading end."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.read_end, False)
        self._rest = b""

    def messages(self, wait_s: float) -> Iterator[dict[str, Any]]:
        """What has arrived, waiting for up to `wait_s` for the first."""
        ready, _, _ = select.select([self.read_end], [], [], wait_s)
        if not ready:
            return
        with contextlib.suppress(BlockingIOError):
            while block := os.read(self.read_end, 65536):
                self._rest += block
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):
                message = json.loads(line)
                if isinstance(message, dict):
                    yield message

    def close(self) -> None:
        os.close(self.read_end)
        os.close(self.write_end)
