"""A tiny corpus, job and method, for the tests of training; and one training process of one rank."""

import argparse
import contextlib
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from data_tools.shards import ShardWriter
from learning.losses.contrastive import info_nce
from learning.methods.base import Batch, ContrastiveMethod, Terms, Texts, Views
from learning.training.distributed import gather
from stages.base import Job

PX = 16
MODEL: dict[str, Any] = {
    "method": "cookie",
    "vision": {"name": "resnet10t", "image_px": 32, "batch_norm": "local"},
    "text": {"layers": 1, "width": 32, "heads": 2, "intermediate": 64, "max_length": 12},
    "dimension": 32,
    "heads": 2,
    "intermediate": 32,
    "temperature": {"learnable": True},
}
CONFIGS = Path(__file__).parents[1] / "ds_configs"


def picture(seed: int) -> bytes:
    """A PNG of coloured blocks, 40 × 48 px."""
    blocks = np.random.default_rng(seed).integers(0, 256, size=(5, 6, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(blocks).resize((48, 40), Image.Resampling.NEAREST).save(data, "PNG")
    return data.getvalue()


def concept(number: int) -> dict[str, str]:
    """Three samples each show the same."""
    return {"concept": f"c{number // 3}"}


def write_corpus(
    out: Path,
    samples: Mapping[str, int],
    bad: Mapping[int, bytes] | None = None,
    labels: Callable[[int], dict[str, str]] = concept,
) -> Path:
    """A shard stage's out/: `samples` by split; `bad`: what stands in for pictures of the first split.

    `labels`: of a sample's number; those of number 0 name them all.
    """
    out.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(out, shard_bytes=20_000, splits=list(samples), labels=list(labels(0)))
    for place, (split, count) in enumerate(samples.items()):
        for number in range(count):
            image = (bad or {}).get(number, picture(number)) if place == 0 else picture(number)
            record = {
                "key": f"{split}{number:04d}",
                "title": f"thing number {number}",
                "content": f"a content of {number} in words",
                "queries": [{"text": f"query {number} {n}", "lang": "en"} for n in range(3)],
                "captions": [],
                "sha256": hashlib.sha256(image).hexdigest(),
                "width": 48,
                "height": 40,
                "labels": labels(number),
                "licence": "MIT",
                "split": split,
            }
            writer.write(image, "png", record)
    writer.close()
    return out


class TinyMethod(ContrastiveMethod):
    """Two linear towers and InfoNCE, in float64 if asked: small enough to compare with a plain loop."""

    available_losses = ("ccl",)

    def __init__(self, words: int = 50, width: int = 8):
        super().__init__(("ccl",))
        self.vision = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * PX * PX, width), nn.Tanh(), nn.Linear(width, width)
        )
        self.text = nn.Embedding(words, width)
        self.temperature = nn.Parameter(torch.tensor([0.3]))

    def views(self) -> Views:
        return Views({"image": "plain"}, {"text": "plain"})

    def embed_images(self, images: Tensor) -> Tensor:
        return nn.functional.normalize(self.vision(images).float(), dim=-1)

    def embed_texts(self, texts: Texts) -> Tensor:
        words = self.text(texts.ids) * texts.mask[..., None]
        return nn.functional.normalize(words.sum(1).float(), dim=-1)

    def encode(self, batch: Batch) -> dict[str, Tensor]:
        return {
            "image": self.embed_images(batch.images["image"]),
            "text": self.embed_texts(batch.texts["text"]),
        }

    def terms(self, embeddings: Mapping[str, Tensor], rows_by_rank: Sequence[int] | None = None) -> Terms:
        image, text = (gather(embeddings[side], rows_by_rank) for side in ("image", "text"))
        temperature = self.temperature.float().squeeze(0)
        loss = info_nce(image, text, temperature) + info_nce(text, image, temperature)
        return Terms({"ccl": loss}, {"temperature": temperature.detach()})


def tiny_batch(step: int, samples: int = 8) -> Batch:
    """The global batch of a step."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(samples, 3, PX, PX, generator=generator)
    ids = torch.randint(0, 50, (samples, 5), generator=generator)
    return Batch(
        {"image": images}, {"text": Texts(ids, torch.ones_like(ids))}, [str(i) for i in range(samples)]
    )


def part_of(batch: Batch, rank: int, world_size: int) -> Batch:
    """One rank's rows."""
    each = len(batch.keys) // world_size
    rows = slice(rank * each, (rank + 1) * each)
    texts = {name: Texts(t.ids[rows], t.mask[rows]) for name, t in batch.texts.items()}
    return Batch({name: image[rows] for name, image in batch.images.items()}, texts, batch.keys[rows])


class RecordingTracker:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.rows.append((step, dict(values)))

    def params(self, values: Mapping[str, Any]) -> None:
        """Not kept."""

    def rewind(self, step: int) -> None:
        self.rows = [row for row in self.rows if row[0] <= step]


class _Task:
    def advance(self, n: float = 1, **shown: Any) -> None:
        """Not shown."""


class QuietProgress:
    """No bars."""

    @contextlib.contextmanager
    def task(self, description: str, total: float | None) -> Iterator[_Task]:
        yield _Task()


def make_job(
    directory: Path, corpus: Path, stop_after: int | None = None, weights: Path | None = None
) -> Job:
    """A job of a training stage; `stop_after`: should_stop says so once it was asked that often."""
    for part in ("out", "checkpoints", "log"):
        (directory / part).mkdir(parents=True, exist_ok=True)
    asked = [0]

    def should_stop() -> bool:
        asked[0] += 1
        return stop_after is not None and asked[0] > stop_after

    inputs = {"corpus": corpus.parent} | ({"weights": weights} if weights else {})
    return Job(directory, inputs, RecordingTracker(), QuietProgress(), should_stop, seed=5)


def config_values(**changed: Any) -> dict[str, Any]:
    """A short training's config."""
    return {
        "kind": "pretrain",
        "inputs": {"corpus": "shard"},
        "model": MODEL,
        "losses": {"ccl": 1.0, "vcl": 1.0, "tcl": 1.0},
        "contrastive_batch": 8,
        "epochs": 3,
        "optimizer": {"learning_rate": 1e-3, "lr_scale": {"vision": 0.1}},
        "schedule": {"name": "step", "warmup": 2},
        "gradient_clip": 1.0,
        "deepspeed": str(CONFIGS / "zero0_fp32.json"),
        "checkpoint": {"every_steps": 2, "keep": 2},
        "log_every_steps": 1,
        "vocabulary": {"size": 200},
    } | changed


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def start_ranks(
    directory: Path, corpus: Path, values: Mapping[str, Any], ranks: int = 2, **options: Any
) -> list[int]:
    """Train in `ranks` processes, to their end; their exit codes. When one dies, the others are killed."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "tests.training_case",
        str(directory),
        str(corpus),
        json.dumps(dict(values)),
    ]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    processes = []
    for rank in range(ranks):
        directory.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        log = (directory / f"test_rank{rank}.log").open("a")
        processes.append(
            subprocess.Popen(
                command, env=environment, cwd=Path(__file__).parents[1], stdout=log, stderr=subprocess.STDOUT
            )
        )
        log.close()
    try:
        while any(process.poll() is None for process in processes):
            if any(process.poll() not in (None, 0) for process in processes):
                with contextlib.suppress(subprocess.TimeoutExpired):  # all may be on their way out together
                    for process in processes:
                        process.wait(3)
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                processes[0].wait(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [int(process.returncode) for process in processes]


def logs(directory: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(directory.glob("test_rank*.log")))


def _kill_at(step: int | None, write: int | None) -> None:
    """SIGKILL this process before its step `step`, or half-way through its checkpoint file number `write`."""
    from learning.training import checkpoint_files
    from learning.training.engine import Engine

    if step is not None:
        taken, stepped = [0], Engine.step

        def step_or_die(self: Engine, *args: Any, **kwargs: Any) -> Any:
            taken[0] += 1
            if taken[0] == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return stepped(self, *args, **kwargs)

        Engine.step = step_or_die  # type: ignore[method-assign]
    if write is not None:
        written, wrote = [0], checkpoint_files._Hashing.write

        def write_or_die(self: Any, data: Any) -> int:
            written[0] += 1
            if written[0] == write:
                self._raw.write(memoryview(data).cast("B")[:10])
                os.kill(os.getpid(), signal.SIGKILL)
            return wrote(self, data)

        checkpoint_files._Hashing.write = write_or_die  # type: ignore[method-assign]


# Its losses are those of the global batch whatever the ranks: no dropout, no statistic of a rank's own
SAME_ON_ANY_RANKS: dict[str, Any] = MODEL | {
    "vision": MODEL["vision"] | {"batch_norm": "global"},
    "text": MODEL["text"] | {"dropout": 0.0},
    "dropout": 0.0,
}


@dataclass(frozen=True)
class Row:
    """What a step read and came to, over all ranks in order."""

    keys: list[str]
    pixels: list[str]  # sha256 a sample, all views
    texts: list[list[list[int]]]  # token ids a sample, by view
    loss: float


def _keep_ledger(path: Path) -> None:
    """Write a line a step to `path`: what this rank read, and the loss."""
    from learning.training import loop
    from learning.training.engine import Engine

    number, seeded, stepped = [0], loop.seed_step, Engine.step

    def seed_step(seed: int, step: int, rank: int) -> None:
        number[0] = step
        seeded(seed, step, rank)

    def step(self: Engine, batch: Batch, *args: Any, **kwargs: Any) -> Any:
        result = stepped(self, batch, *args, **kwargs)
        rows = range(len(batch.keys))
        pictures = list(batch.images.values())
        line = {
            "start": os.environ["MASTER_PORT"],
            "at": time.time(),
            "step": number[0],
            "rank": int(os.environ["RANK"]),
            "ranks": int(os.environ["WORLD_SIZE"]),
            "keys": list(batch.keys),
            "pixels": [
                hashlib.sha256(b"".join(p[r].numpy().tobytes() for p in pictures)).hexdigest() for r in rows
            ],
            "texts": [[t.ids[r][t.mask[r].bool()].tolist() for t in batch.texts.values()] for r in rows],
            "loss": float(result.total),
        }
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return result

    loop.seed_step = seed_step  # type: ignore[attr-defined]
    Engine.step = step  # type: ignore[method-assign]


def read_ledger(directory: Path) -> dict[int, Row]:
    """By step, as the last start that took it. A step that was taken twice must have read the same."""
    starts: dict[int, dict[str, list[dict[str, Any]]]] = {}
    for path in directory.glob("ledger*.jsonl"):
        for text in path.read_text().splitlines():
            line = json.loads(text)
            starts.setdefault(line["step"], {}).setdefault(line["start"], []).append(line)
    found = {}
    for step, by_start in sorted(starts.items()):
        taken = sorted(by_start.values(), key=lambda lines: max(line["at"] for line in lines))
        rows = [_joined(lines) for lines in taken if len(lines) == lines[0]["ranks"]]
        assert all((r.keys, r.pixels, r.texts) == (rows[0].keys, rows[0].pixels, rows[0].texts) for r in rows)
        found[step] = rows[-1]
    return found


def _joined(lines: list[dict[str, Any]]) -> Row:
    lines = sorted(lines, key=lambda line: int(line["rank"]))
    each = {name: [value for line in lines for value in line[name]] for name in ("keys", "pixels", "texts")}
    return Row(**each, loss=lines[0]["loss"])


def _count_writes(path: Path) -> None:
    """Append to `path`, for each write to a checkpoint's file on this rank, the file's name."""
    from learning.training import checkpoint_files

    wrote = checkpoint_files._Hashing.write

    def write(self: Any, data: Any) -> int:
        with path.open("a") as file:
            file.write(f"{Path(self._raw.name).relative_to(path.parent)}\n")
        return wrote(self, data)

    checkpoint_files._Hashing.write = write  # type: ignore[method-assign]


def main() -> None:
    """One rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("config")
    parser.add_argument("--kill-step", type=int)
    parser.add_argument("--kill-write", type=int)
    parser.add_argument("--kill-rank", type=int, default=0)
    parser.add_argument("--stop-after", type=int)
    parser.add_argument("--ledger", type=int, help="1: keep one, in the directory")
    parser.add_argument("--count-writes", type=int, help="1: list the writes of checkpoints")
    parser.add_argument("--file-limit", type=int, help="bytes a file may have, from the training on")
    options = parser.parse_args()
    import logging
    import resource

    from stages.base import StageError, Stopped
    from stages.pretrain import Config, run

    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    if options.ledger:
        _keep_ledger(options.directory / f"ledger_{os.environ['RANK']}.jsonl")
    if options.count_writes:
        _count_writes(options.directory / f"writes_{os.environ['RANK']}.txt")
    if options.kill_rank == int(os.environ["RANK"]):
        _kill_at(options.kill_step, options.kill_write)
    if options.file_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then fails with EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (options.file_limit, resource.RLIM_INFINITY))
    stop_after = options.stop_after if os.environ["RANK"] == "1" else None  # one rank alone is asked to stop
    job = make_job(options.directory, options.corpus, stop_after)
    try:
        report = run(Config(**json.loads(options.config)), job)
    except Stopped as stopped:
        print("stopped", stopped)
        sys.exit(75)
    except StageError as error:
        print("error:", error)
        sys.exit(2)
    if os.environ["RANK"] == "0":
        assert isinstance(job.tracker, RecordingTracker)
        told = {"metrics": report.metrics, "counts": report.counts, "rows": job.tracker.rows}
        (options.directory / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
