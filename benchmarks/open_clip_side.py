"""What the benchmarks run of open_clip, in an environment that has it: its own data, model, loss and loop.

Started by benchmarks/peer_loader.py and benchmarks/peer_training.py; imports nothing of Tandem. Prints one
line of JSON: images, wall seconds and CPU seconds.
"""

import argparse
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from open_clip_train.data import get_wds_dataset
from open_clip_train.distributed import init_distributed_device
from open_clip_train.train import train_one_epoch


def data_arguments(options: argparse.Namespace, world_size: int) -> SimpleNamespace:
    return SimpleNamespace(
        train_data=str(options.shards),
        train_num_samples=options.samples,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=options.batch // world_size,
        workers=options.workers,
        world_size=world_size,
    )


def loader(options: argparse.Namespace) -> dict[str, float]:
    """One pass over the training pipeline, in this process."""
    transform = open_clip.image_transform(options.image_px, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=options.tokens)
    source = get_wds_dataset(data_arguments(options, 1), transform, is_train=True, tokenizer=tokenizer)
    next(iter(source.dataloader))  # imports and caches are warm
    began, cpu, images = time.perf_counter(), time.process_time(), 0
    for batch, _ in source.dataloader:
        images += len(batch)
    return {"images": images, "wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}


class Ready:
    """A data loader that always has its one batch ready."""

    def __init__(self, batch: Any, num_batches: int, num_samples: int):
        self.batch, self.num_batches, self.num_samples = batch, num_batches, num_samples

    def __iter__(self) -> Any:
        return iter([self.batch] * self.num_batches)


def training(options: argparse.Namespace) -> dict[str, float]:
    """`steps` steps after a warm-up, as open_clip_train/main.py sets its loop up."""
    arguments: Any = SimpleNamespace(
        **vars(data_arguments(options, int(os.environ["WORLD_SIZE"]))),
        device="cpu",
        dist_backend="gloo",
        dist_url="env://",
        precision="fp32",
        accum_freq=1,
        distill=False,
        skip_scheduler=True,
        grad_clip_norm=None,
        horovod=False,
        log_every_n_steps=10**9,
        wandb=False,
        tensorboard=False,
        save_logs=False,
    )
    device = init_distributed_device(arguments)
    torch.manual_seed(0)
    open_clip.add_model_config(options.model)
    model, transform, _ = open_clip.create_model_and_transforms(options.model.stem, precision="fp32")
    tokenizer = open_clip.get_tokenizer(options.model.stem)
    model.output_dict = True
    model = torch.nn.parallel.DistributedDataParallel(model)
    loss = open_clip.ClipLoss(
        local_loss=True,
        gather_with_grad=True,
        cache_labels=True,
        rank=arguments.rank,
        world_size=arguments.world_size,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.98), weight_decay=0.2)
    source = get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokenizer)
    batch = next(iter(source.dataloader))
    warm = Ready(batch, 2, 2 * options.batch)
    timed = Ready(batch, options.steps, options.steps * options.batch) if options.ready else source.dataloader

    def epoch(dataloader: Any) -> None:
        data = {"train": SimpleNamespace(dataloader=dataloader, set_epoch=lambda epoch: None)}
        train_one_epoch(model, data, loss, 0, optimizer, None, None, None, arguments)

    epoch(warm)
    torch.distributed.barrier()
    began, cpu = time.perf_counter(), time.process_time()
    epoch(timed)
    torch.distributed.barrier()
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    told: list[Any] = [None] * arguments.world_size
    torch.distributed.all_gather_object(told, cpu)
    torch.distributed.destroy_process_group()
    assert device.type == "cpu"
    return {"images": timed.num_batches * options.batch, "wall_s": wall, "cpu_s": sum(told)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["loader", "training"])
    parser.add_argument("--shards", required=True, help="as webdataset names several: {a,b}.tar")
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True, help="over all ranks")
    parser.add_argument("--image-px", type=int, default=224)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--ready", action="store_true")
    parser.add_argument("--model", type=Path, help="a model config of open_clip, JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = loader(options) if options.what == "loader" else training(options)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found))


if __name__ == "__main__":
    main()
