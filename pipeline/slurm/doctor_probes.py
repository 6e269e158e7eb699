"""What one rank of `tandem doctor` measures: what it sees, its clock, shared files, locks, the network."""

import errno
import fcntl
import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
import socketserver
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.durable import write_durably

CODE = ("pipeline", "stages", "learning", "data_tools")
REPEATS = 3
_TIME = struct.Struct("!d")


# ---- what a rank sees


def facts(directory: Path, scratch: Path) -> dict[str, Any]:
    """GPUs, versions, and free disk in bytes of the run directory and of the local scratch."""
    directory.mkdir(parents=True, exist_ok=True)
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "gpus": [torch.cuda.get_device_name(gpu) for gpu in gpus],
        "cpu_asked_for": os.environ.get("DS_ACCELERATOR") == "cpu",
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "slurm_gpus": os.environ.get("SLURM_STEP_GPUS", os.environ.get("SLURM_JOB_GPUS")),
        "versions": versions(),
        "free_bytes": {
            str(directory): shutil.disk_usage(directory).free,
            str(scratch): shutil.disk_usage(scratch).free,
        },
    }


def versions() -> dict[str, str]:
    """What has to be alike on all nodes."""
    found = {"python": platform.python_version()}
    for name in ("torch", "deepspeed", "transformers", "tandem"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["tandem's code"] = _code_digest()
    found["CUDA"] = torch.version.cuda or "none"
    if torch.version.cuda is not None:
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _code_digest() -> str:
    """Of Tandem's own source: nodes may have different copies of one version."""
    root = Path(__file__).resolve().parent.parent.parent
    digest = hashlib.sha256()
    for path in sorted(file for package in CODE for file in (root / package).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


# ---- clocks


@contextmanager
def time_server() -> Iterator[int]:
    """Answers each byte with this process's clock, at a port of its own, which it yields."""

    class Answer(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while self.request.recv(1):
                self.request.sendall(_TIME.pack(time.time()))

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 1024

    with Server(("", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


def clock_offset(host: str, port: int, timeout_s: float) -> dict[str, float]:
    """This node's clock less that of the `time_server`, in seconds, and how wrong that may be."""
    with socket.create_connection((host, port), timeout=timeout_s) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def ask() -> float:
            connection.sendall(b"?")
            answer: float = _TIME.unpack(connection.recv(_TIME.size, socket.MSG_WAITALL))[0]
            return answer

        offset_s, bound_s = ping_pong(ask, time.time)
    return {"offset_s": offset_s, "bound_s": bound_s}


def ping_pong(ask: Callable[[], float], clock: Callable[[], float], rounds: int = 16) -> tuple[float, float]:
    """How far `clock` is ahead of the one that `ask` reads, and the bound: half the quickest round trip."""
    measured = []
    for _ in range(rounds):
        sent = clock()
        theirs = ask()
        came = clock()
        measured.append(((came - sent) / 2, (sent + came) / 2 - theirs))
    bound_s, offset_s = min(measured)
    return offset_s, bound_s


# ---- shared files


def write_own(folder: Path, host: str) -> str:
    """Write this node's file; returns what is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = f"{host} {os.urandom(16).hex()}"
    write_durably(folder / host, text)
    return text


def read_others(folder: Path, texts: dict[str, str], limit_s: float) -> dict[str, float | None]:
    """Seconds until each node's file was there with its text; None where it was not within `limit_s`."""
    began = time.monotonic()
    seen: dict[str, float | None] = dict.fromkeys(texts)
    while True:
        for host, text in texts.items():
            if seen[host] is None and _text_of(folder / host) == text:
                seen[host] = time.monotonic() - began
        if None not in seen.values() or time.monotonic() - began > limit_s:
            return seen
        time.sleep(0.02)


def _text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):  # not yet, or replaced while it was read
            return None
        raise


class HeldLock:
    """An exclusive flock, as run directories use it (pipeline/run_directory.py), held until `release`."""

    def __init__(self, path: Path):
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self) -> None:
        os.close(self._descriptor)


def lock_is_held(path: Path) -> bool:
    """Whether this node sees that another holds the lock."""
    try:
        HeldLock(path).release()
    except BlockingIOError:
        return True
    return False


# ---- the network


class Network:
    """The process group of all ranks, and what it carries in a second."""

    def __init__(self, device: torch.device):
        self.device = device

    def join(self, store: dist.Store, rank: int, ranks: int, timeout_s: float) -> None:
        """NCCL for a GPU, gloo for the CPU."""
        backend = "gloo"
        if self.device.type == "cuda":
            backend = "nccl"
            torch.cuda.set_device(self.device)
            # a collective that hangs must not kill the process, which has yet to say so
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        group_store = dist.PrefixStore("group", store)
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group(backend, store=group_store, rank=rank, world_size=ranks, timeout=timeout)

    def leave(self) -> None:
        dist.destroy_process_group()

    def all_reduce(self, size_bytes: int) -> dict[str, Any]:
        """Sum rank + 1 over all ranks: whether every element is right, and the median time in seconds."""
        ranks, rank = dist.get_world_size(), dist.get_rank()
        expected = ranks * (ranks + 1) / 2  # exact in float32
        seconds, right = [], True
        for repeat in range(1 + REPEATS):  # the first one makes connections
            values = torch.full((max(1, size_bytes // 4),), rank + 1.0, device=self.device)
            took_s = self._timed(dist.all_reduce, values)
            right = right and bool((values == expected).all())
            if repeat:
                seconds.append(took_s)
        return {"right": right, "seconds": statistics.median(seconds)}

    def exchange(self, peer: int, size_bytes: int) -> float:
        """Send `size_bytes` to the rank and get as many back; the median time of that, in seconds."""
        values = torch.zeros(max(1, size_bytes), dtype=torch.uint8, device=self.device)
        steps = (dist.send, dist.recv) if dist.get_rank() < peer else (dist.recv, dist.send)

        def there_and_back(values: torch.Tensor) -> None:
            for step in steps:
                step(values, peer)

        there_and_back(values)  # makes the connection
        return statistics.median(self._timed(there_and_back, values) for _ in range(REPEATS))

    def _timed(self, work: Callable[[torch.Tensor], Any], values: torch.Tensor) -> float:
        self._synchronize()
        began = time.perf_counter()
        work(values)
        self._synchronize()
        return time.perf_counter() - began

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def tournament(members: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Rounds in which all members meet in pairs at once; after all rounds every pair has met once.

    The circle method: one stays, the others move on by a place; of an odd number one rests.
    """
    circle: list[int | None] = [*members]
    if len(circle) % 2:
        circle.append(None)
    half, rounds = len(circle) // 2, []
    for _ in range(len(circle) - 1):
        meetings = zip(circle[:half], reversed(circle[half:]), strict=True)
        rounds.append([(min(a, b), max(a, b)) for a, b in meetings if a is not None and b is not None])
        circle[1:] = [circle[-1], *circle[1:-1]]
    return rounds
