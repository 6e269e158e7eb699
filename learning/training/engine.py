"""One engine for all runs: DeepSpeed around a method, from a laptop's CPU to GPUs, ZeRO 0 to 3.

The engine owns precision, parallelism, the optimizer and their state. It knows no data and no schedule.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from learning.methods.base import Batch, ContrastiveMethod, EmbedsRegions, Method, Terms
from learning.training import distributed, grad_cache, watchdog
from learning.training.checkpoint_files import Writer
from learning.training.contrast import ContrastConfig
from learning.training.deepspeed_setup import dtype_of, start, zero_stage
from learning.training.elastic import ENGINE, LAYOUT, Layout, load
from learning.training.ema import Ema, EmaConfig, held_weights, set_weights
from learning.training.rates import OptimizerConfig, parameter_groups
from learning.training.split_regions import cast_regions

AVERAGES = "ema.pt"


@dataclass
class StepResult:
    """One optimizer step: what the method gave, and whether the step was applied (fp16 may skip it)."""

    total: Tensor
    losses: dict[str, Tensor]
    report: dict[str, Tensor]
    applied: bool
    gradient_norm: float | None  # of the whole gradient before clipping, where it was asked for


class Objective(nn.Module):
    """A method and its loss weights: the weighted sum is what is minimised. Terms go out as plain tuples.

    DeepSpeed's hooks look for tensors in tuples and dicts alone, not in dataclasses.
    """

    def __init__(self, method: Method, weights: Mapping[str, float]):
        super().__init__()
        self.method = method
        self.weights = dict(weights)

    def forward(
        self,
        batch: Batch,
        *,
        early: Mapping[str, Tensor] | None = None,
        gradients: Mapping[str, Tensor] | None = None,
        embed_only: bool = False,
    ) -> Any:
        """(total, losses, report) of a batch. The options are GradCache's (learning/training/grad_cache.py).

        `early`: embeddings of rows that come before the batch's and belong to the loss; `gradients`: of the
        loss by the batch's embeddings, for the one scalar Σ <e, dL/de>; `embed_only`: the embeddings.
        """
        if early is None and gradients is None and not embed_only:
            return self._weighed(self.method(batch))
        assert isinstance(self.method, ContrastiveMethod)
        embeddings = self.method.encode(batch)
        if embed_only:
            return embeddings
        if gradients is not None:
            return torch.stack([(e * gradients[name]).sum() for name, e in embeddings.items()]).sum()
        assert early is not None
        whole = {name: torch.cat([early[name], e]) for name, e in embeddings.items()}
        return self._weighed(self.method.terms(whole, batch.rows_by_rank))

    def _weighed(self, terms: Terms) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        if set(terms.losses) != set(self.weights):
            raise ValueError(
                f"losses: the recipe weighs {sorted(self.weights)}, {type(self.method).__name__} computed "
                f"{sorted(terms.losses)}; the two must be the same"
            )
        total = torch.stack([self.weights[name] * terms.losses[name].float() for name in self.weights]).sum()
        return (
            total,
            {name: loss.detach() for name, loss in terms.losses.items()},
            {name: value.detach() for name, value in terms.report.items()},
        )


class Engine:
    """A method under DeepSpeed: step, full weights, and saving and loading of its own state.

    All ranks call every method together.
    """

    def __init__(
        self,
        method: Method,
        weights: Mapping[str, float],
        optimizer: OptimizerConfig,
        deepspeed_config: Mapping[str, Any],
        *,
        batch_per_gpu: int,
        gradient_clip: float = 0.0,
        ema: EmaConfig | None = None,
        contrast: ContrastConfig | None = None,
        micro_batch: int | None = None,
        log_file: Path | None = None,
    ):
        """`batch_per_gpu` in samples; `gradient_clip`: largest norm of the whole gradient, 0 for no limit.

        `contrast`: how the losses are computed over ranks; `micro_batch`: samples embedded at a time, None
        for all. Takes `method` over: its parameters become DeepSpeed's. Raises ValueError for what cannot be
        done.
        """
        self.device = distributed.device()
        self.dtype = dtype_of(deepspeed_config)
        self.stage = zero_stage(deepspeed_config)
        self.gradient_clip = gradient_clip
        if self.dtype == torch.float16 and self.device.type == "cpu":
            raise ValueError("deepspeed: fp16 does not run on a CPU; choose a config in fp32 or bf16")
        scalars = [name for name, p in method.named_parameters() if p.ndim == 0]
        if scalars:  # DeepSpeed broadcasts parameters as views of bytes, and a 0-dimensional one has none
            raise ValueError(f"parameters of 0 dimensions: {', '.join(scalars)}; give them the shape (1,)")
        self.micro_batch = micro_batch
        if micro_batch is not None and micro_batch < batch_per_gpu:
            grad_cache.refuse_what_needs_all(method)
        method.contrast = contrast or ContrastConfig()
        groups = parameter_groups(method, optimizer)
        objective = Objective(method, weights)
        names = {id(p): name for name, p in objective.named_parameters()}
        self.layout = Layout(
            distributed.world_size(),
            self.stage,
            [[names[id(p)] for p in group["params"]] for group in groups],
        )
        adamw = torch.optim.AdamW(
            groups, lr=optimizer.learning_rate, betas=optimizer.betas, eps=optimizer.eps, fused=True
        )
        self._engine, self._optimizer = start(
            objective, adamw, deepspeed_config, batch_per_gpu, gradient_clip, log_file
        )
        if self.dtype != torch.float32:
            for name, statistic in self._own_statistics().items():
                if not name.startswith(method.training_only):  # a teacher's scale and shift are in fp32
                    statistic.data = statistic.data.to(self.dtype)  # kernels want that of scale and shift
        holding = (self._optimizer, method, self.stage, self.dtype)
        self._ema = None if ema is None else Ema(lambda: held_weights(*holding), ema)

    @property
    def method(self) -> Method:
        """The method whose parameters DeepSpeed holds: in its dtype, and partitioned under ZeRO-3."""
        return self._engine.module.method

    @property
    def scales_loss(self) -> bool:
        """Whether a step may be left out only because the loss scale was too large."""
        return self.dtype == torch.float16

    def step(self, batch: Batch, rate_factor: float, want_norm: bool = False) -> StepResult:
        """Forward, backward, and one optimizer step with each part's learning rate times `rate_factor`."""
        for group in self._optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate_factor
        self._engine.train()
        total, losses, report = self._backward(batch)
        norm = self._plain_norm() if want_norm and self.stage == 0 and self.dtype == torch.float32 else None
        watchdog.enter("optimizer")
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        if applied:
            self.method.after_step()
            if self._ema is not None:
                self._ema.update()
        if want_norm and norm is None:
            norm = float(self._optimizer._global_grad_norm) / self._loss_scale()
        return StepResult(total.detach(), losses, report, applied, norm)

    @torch.no_grad()
    def embed(self, batch: Batch) -> dict[str, Float[Tensor, "b d"]]:
        """Each view's embeddings of this rank's rows, in evaluation mode: which samples give numbers?"""
        placed = self._placed(batch)
        self._engine.eval()
        made = {f"image '{name}'": self.method.embed_images(rows) for name, rows in placed.images.items()}
        if placed.regions is not None and isinstance(self.method, EmbedsRegions):
            made["regions"] = self.method.embed_regions(placed.regions)
        made |= {f"text '{name}'": self.method.embed_texts(texts) for name, texts in placed.texts.items()}
        self._engine.train()
        return made

    def _backward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Forward and backward, in parts where the batch is larger than `micro_batch`."""
        parts = grad_cache.parts_of(batch, self.micro_batch)
        if len(parts) > 1:
            return grad_cache.backward(
                self._engine,
                parts,
                self._placed,
                loss_scale=self._loss_scale(),
                gradient_scale=self._gradient_scale(),
            )
        total, losses, report = self._engine(self._placed(batch))
        self._engine.backward(total * self._loss_scale())
        return total, losses, report

    def learning_rates(self) -> dict[str, float]:
        """The learning rate of each part (of its top layer), as the last step had it."""
        return {group["part"]: float(group["lr"]) for group in self._optimizer.param_groups}

    def full_state(self, averaged: bool = True) -> dict[str, Tensor]:
        """The model's state dict on the CPU, whole, on every rank: float32 master weights, and buffers.

        What only training needs (`Method.training_only`) is not in it.
        With an `ema`, and `averaged`, the weights are their averages; buffers are the newest. Statistics of
        batch normalisation that ranks keep for themselves are averaged over ranks.
        """
        if self._ema is None or not averaged:
            return self._full_state()
        with self._ema.exchanged():
            return self._full_state()

    def _full_state(self) -> dict[str, Tensor]:
        method = self.method
        masters = self._masters()
        state = {}
        parameters = {id(p): p for p in method.parameters()}
        whole = {key: masters[key] if key in masters else self._whole(p) for key, p in parameters.items()}
        averaged = {id(b) for b in self._own_statistics().values()}
        done: dict[int, Tensor] = {}
        for name, value in method.state_dict(keep_vars=True).items():
            if name.startswith(method.training_only):
                continue
            if id(value) not in done:
                if id(value) in whole:
                    done[id(value)] = whole[id(value)]
                elif id(value) in averaged:
                    done[id(value)] = _rank_mean(value)
                else:
                    done[id(value)] = value.detach().cpu().clone()
            state[name] = done[id(value)]
        return state

    def save(self, directory: Path, writer: Writer) -> None:
        """DeepSpeed's state and this rank's own into `directory`, every file by `writer`."""
        from learning.training.deepspeed_files import FileEngine  # imports DeepSpeed

        self._engine.checkpoint_engine = FileEngine(writer)
        self._engine._copy_recovery_script = lambda path: None  # scripts are no state
        self._engine.save_checkpoint(str(directory), tag=ENGINE, save_latest=False)
        own = {"statistics": {n: b.clone() for n, b in self._own_statistics().items()}}
        writer.save(own, directory / f"rank_{distributed.rank()}.pt")
        if self._ema is not None:
            state = self.full_state()
            averages = {name: state[name] for name in self._trained()}
            if distributed.rank() == 0:  # whole and by name: any number of ranks, any stage can read it
                writer.save(
                    {"updates": self._ema.updates, "weights": averages}, directory / AVERAGES, constant=True
                )
        if distributed.rank() == 0:
            writer.text(self.layout.text(), directory / LAYOUT)

    def load(self, directory: Path) -> None:
        """What `save` wrote, on any number of ranks and with any ZeRO stage.

        On the same number of ranks, each gets its own statistics of batch normalisation back; on another,
        all get their mean.
        """
        saved = Layout.read(directory)
        if saved == self.layout:
            path, _ = self._engine.load_checkpoint(str(directory), tag=ENGINE)
            if path is None:
                raise ValueError(f"{directory}: DeepSpeed found no state to load")
        else:
            load(directory, saved, self.layout, self._engine)
        own = [distributed.rank()] if saved.ranks == self.layout.ranks else range(saved.ranks)
        files = [directory / f"rank_{rank}.pt" for rank in own]
        found = [torch.load(path, weights_only=True, map_location="cpu")["statistics"] for path in files]
        for name, buffer in self._own_statistics().items():
            buffer.copy_(torch.stack([each[name].float() for each in found]).mean(0))
        if self._ema is not None:
            self._load_averages(directory / AVERAGES)

    def state_bytes(self) -> int:
        """About how many bytes a checkpoint of all ranks has: weights, masters, AdamW's moments, buffers."""
        trainable = frozen = 0
        for p in self.method.parameters():
            count = getattr(p, "ds_numel", p.numel())
            trainable, frozen = (
                (trainable + count, frozen) if p.requires_grad else (trainable, frozen + count)
            )
        weight = 4 if self.dtype == torch.float32 else 2
        master = 4 if self.dtype != torch.float32 or self.stage > 0 else 0
        average = 4 if self._ema is not None else 0
        # a teacher and its queues are buffers; under ZeRO-3 every rank's file has them
        copies = self.layout.ranks if self.stage == 3 else 1
        buffers = copies * sum(buffer.nbytes for buffer in self.method.buffers())
        return trainable * (weight + master + average + 8) + frozen * weight + buffers

    def close(self) -> None:
        """Let DeepSpeed's hooks and buffers go."""
        self._engine.destroy()

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.method.named_parameters() if p.requires_grad}

    def _load_averages(self, path: Path) -> None:
        assert self._ema is not None
        if not path.is_file():
            raise ValueError(
                f"{path}: missing: the checkpoint was written without `ema`; train without it too"
            )
        found = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        whole = {id(p): found["weights"][name].to(self.device) for name, p in self._trained().items()}
        with self._ema.exchanged():
            set_weights(self._optimizer, self.method, self.stage, self.dtype, whole)
        self._ema.updates = found["updates"]

    def _placed(self, batch: Batch) -> Batch:
        batch = batch.to(self.device)
        return replace(
            batch,
            images={name: image.to(self.dtype) for name, image in batch.images.items()},
            tokens={name: tokens.to(self.dtype) for name, tokens in batch.tokens.items()},
            regions=None if batch.regions is None else cast_regions(batch.regions, self.dtype),
        )

    def _loss_scale(self) -> float:
        """What the loss must be multiplied by here: DeepSpeed scales it itself, but for stage 0 in fp16."""
        if self.stage == 0 and self.dtype == torch.float16:
            return float(self._optimizer.loss_scale_config.cur_scale)
        return 1.0

    def _gradient_scale(self) -> float:
        """What the gradients of a backward pass come multiplied by, whoever does it."""
        if self.stage > 0 and self.dtype == torch.float16:
            return float(self._optimizer.loss_scale)
        return self._loss_scale()

    def _plain_norm(self) -> float:
        gradients = [p.grad for p in self.method.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0

    def _masters(self) -> dict[int, Tensor]:
        """fp32 master weights on the CPU by the id of their parameter, where DeepSpeed keeps such."""
        from deepspeed.utils import safe_get_full_fp32_param

        copies = self.stage == 0 or (self.stage < 3 and self._ema is None)  # the weights are the masters'
        if self.dtype == torch.float32 and copies:
            return {}
        if self.stage == 0:
            pairs = zip(self._optimizer.fp16_groups, self._optimizer.fp32_groups, strict=True)
            return {
                id(p): master.detach().cpu().clone()
                for low, high in pairs
                for p, master in zip(low, high, strict=True)
            }
        trained = [p for p in self.method.parameters() if p.requires_grad]
        return {id(p): safe_get_full_fp32_param(p).detach().cpu().clone() for p in trained}

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        if self.stage < 3:
            return parameter.detach().float().cpu().clone()
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().float().cpu().clone()

    def _own_statistics(self) -> dict[str, Tensor]:
        """Batch normalisation's running mean and variance: each rank has its own."""
        return {
            f"{name}.{kind}": getattr(module, kind)
            for name, module in self.method.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
            for kind in ("running_mean", "running_var")
        }


def _rank_mean(value: Tensor) -> Tensor:
    wide = value.detach().float()
    return (distributed.sum_over_ranks(wide) / distributed.world_size()).cpu().clone()
