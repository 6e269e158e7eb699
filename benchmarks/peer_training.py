"""Training beside open_clip: the same photos, small towers, batch and two CPU ranks; samples a second.

python -m benchmarks.peer_training --peer-python PEER/bin/python [--photos FOLDER_OF_TARS]

Both sides in turns, end to end and with ready batches: two processes of one thread each, AdamW, fp32, a timm
tower and a text transformer of 2 layers of 128, the embedding of 49,408 tokens. open_clip's side is its own
webdataset pipeline, model, loss (local, gathered with gradient) and train_one_epoch under DDP; Tandem's is
its loop under DeepSpeed. CPU seconds of both ranks are printed too: where other work runs they are steadier.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.peer_loader import shard_list
from benchmarks.photos import write_photos
from benchmarks.small_towers import DIMENSION, HEADS, LAYERS, TOKENS, VOCABULARY, WIDTH

REPOSITORY = Path(__file__).parents[1]
RANKS = 2


def ranks(command: list[str]) -> dict[str, float]:
    """Run the command as two ranks; what rank 0 printed last."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    processes = []
    for rank in range(RANKS):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        processes.append(
            subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        )
    try:
        outputs = [process.communicate(timeout=1800)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        raise SystemExit(f"{' '.join(command)}: exit codes {[p.returncode for p in processes]}")
    found: dict[str, float] = json.loads(outputs[0].splitlines()[-1])
    return found


def open_clip_model(tower: str, image_px: int) -> dict[str, object]:
    """open_clip's model config of the same towers."""
    return {
        "embed_dim": DIMENSION,
        "vision_cfg": {
            "timm_model_name": tower,
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": image_px,
        },
        "text_cfg": {
            "context_length": TOKENS,
            "vocab_size": VOCABULARY,
            "width": WIDTH,
            "heads": HEADS,
            "layers": LAYERS,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", type=Path, required=True, help="a Python that has open_clip_torch")
    parser.add_argument("--photos", type=Path, help="a folder of tars of pictures; else textures")
    parser.add_argument("--tower", default="resnet10t", help="a timm model")
    parser.add_argument("--image-px", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        samples = options.steps * options.batch
        corpus = write_photos(Path(folder) / "corpus", samples, options.photos)
        model = Path(folder) / "small.json"
        model.write_text(json.dumps(open_clip_model(options.tower, options.image_px)))
        both = ["--batch", str(options.batch), "--steps", str(options.steps)]
        both += ["--image-px", str(options.image_px)]
        peer = [str(options.peer_python), str(REPOSITORY / "benchmarks/open_clip_side.py"), "training", *both]
        peer += ["--shards", shard_list(corpus), "--samples", str(samples), "--model", str(model)]
        own = [sys.executable, "-m", "benchmarks.small_towers", *both, "--tower", options.tower]
        own += ["--corpus", str(corpus), "--directory", folder]
        print(f"{options.tower} at {options.image_px} px, batch {options.batch}, {RANKS} ranks; samples/s")
        for name, extra in (("end to end", []), ("ready batches", ["--ready"])):
            wall, cpu = [], []
            for _ in range(options.rounds):
                theirs, ours = ranks(peer + extra), ranks(own + extra)
                speeds = [each["images"] / each["wall_s"] for each in (theirs, ours)]
                wall.append((*speeds, speeds[1] / speeds[0]))
                per_cpu = [each["images"] / each["cpu_s"] for each in (theirs, ours)]
                cpu.append((*per_cpu, per_cpu[1] / per_cpu[0]))
            for what, rows in (("a second", wall), ("a CPU second", cpu)):
                theirs_s, ours_s, ratio = (statistics.median(column) for column in zip(*rows, strict=True))
                print(
                    f"{name:13s} {what:12s} open_clip {theirs_s:7.1f}  Tandem {ours_s:7.1f}  {ratio:.2f} x "
                    f"({min(r[2] for r in rows):.2f} … {max(r[2] for r in rows):.2f})"
                )


if __name__ == "__main__":
    main()
