"""A checkpoint of other ranks, or of another ZeRO stage, into this engine, parameter by parameter.

Nothing is converted on disk: each rank maps the files of all ranks that wrote, and copies out the pieces of
weights and moments that it holds. DeepSpeed has a format for this (deepspeed.checkpoint.ds_to_universal); in
0.19.8 it does not serve here:
- ZeRO-0 is neither converted nor loaded; ZeRO-3 cannot load what is made of ZeRO-1 and 2, nor they what is
  made of ZeRO-3;
- ZeRO-1 and 2 fail where a parameter group leaves a rank nothing: a temperature alone in its group;
- in ZeRO-3 all parameter groups get the first one's learning rate and weight decay, and share one step count,
  which then grows by the number of groups a step;
- buffers (queues) and frozen parameters (teachers) are not loaded.
"""

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from learning.training import distributed

logger = logging.getLogger(__name__)

ENGINE = "engine"  # DeepSpeed's files, in the checkpoint's directory
LAYOUT = "layout.json"
MASTER, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # what moves in fp16's scaler


@dataclass(frozen=True)
class Layout:
    """How a checkpoint is spread over its files."""

    ranks: int
    zero_stage: int
    groups: list[list[str]]  # names of the trainable parameters, by parameter group, in the optimizer's order

    def text(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def read(cls, directory: Path) -> "Layout":
        return cls(**json.loads((directory / LAYOUT).read_text(encoding="utf-8")))

    def __str__(self) -> str:
        return f"{self.ranks} rank{'s' if self.ranks > 1 else ''} with ZeRO {self.zero_stage}"


@dataclass(frozen=True)
class _Piece:
    """Consecutive values of one parameter in one rank's file."""

    flat: dict[str, Tensor]  # master weights and moments; a parameter that never had a step has no moments
    start: int
    count: int


class Saved:
    """The state in DeepSpeed's files by parameter name. They are mapped: only what is asked for is read."""

    def __init__(self, directory: Path, layout: Layout):
        """Raises ValueError when a parameter is not whole."""
        self.layout = layout
        folder = directory / ENGINE
        optimizer_files = _by_rank(folder, "*_optim_states.pt", layout.ranks if layout.zero_stage else 0)
        model_files = _by_rank(folder, "*_model_states.pt", layout.ranks if layout.zero_stage == 3 else 1)
        self._models = [_mapped(path) for path in model_files]
        self._optimizers = [_mapped(path)["optimizer_state_dict"] for path in optimizer_files]
        self.shapes = self._shapes()
        self._pieces: dict[str, list[_Piece]] = {name: [] for name in self.shapes}
        self._steps: list[float] = []
        for name, piece in self._read():
            self._pieces[name].append(piece)
        for name, shape in self.shapes.items():
            held = sum(piece.count for piece in self._pieces[name])
            if held != math.prod(shape):
                raise ValueError(f"{folder}: {held} of {math.prod(shape)} values of {name} are there")

    @property
    def step(self) -> float:
        """Updates that the optimizer has counted."""
        return max(self._steps, default=0.0)

    def part(self, name: str, kind: str, start: int, count: int) -> Float[Tensor, " n"]:
        """`count` values of a parameter from `start` on, flat: master weights or a moment."""
        taken, at = [], 0
        for piece in self._pieces[name]:
            low, high = max(start, at), min(start + count, at + piece.count)
            if low < high:
                flat = piece.flat.get(kind)
                taken.append(
                    torch.zeros(high - low)
                    if flat is None
                    else flat.narrow(0, piece.start + low - at, high - low)
                )
            at += piece.count
        return torch.cat(taken) if taken else torch.zeros(0)

    def others(self) -> dict[str, Tensor]:
        """Buffers and frozen parameters, whole, by name; of buffers that differ between ranks, rank 0's."""
        first = self._models[0]
        if self.layout.zero_stage < 3:
            return {name: value for name, value in first["module"].items() if name not in self.shapes}
        found = {name: first["module"][name] for name in first["buffer_names"]}
        for name, shape in first["frozen_param_shapes"].items():
            flat = torch.cat([model["frozen_param_fragments"][name].flatten() for model in self._models])
            found[name] = flat[: math.prod(shape)].view(shape)
        return found

    def counters(self) -> dict[str, int]:
        """DeepSpeed's own: steps tried, and steps that fp16 skipped."""
        return {name: int(self._models[0][name]) for name in ("global_steps", "skipped_steps")}

    def loss_scale(self) -> dict[str, float]:
        """The state of fp16's loss scaler."""
        if self.layout.zero_stage:
            known = vars(self._optimizers[0]["loss_scaler"])
        else:
            known = self._models[0]["optimizer"]
        return {name: known[name] for name in LOSS_SCALE if name in known}

    def _shapes(self) -> dict[str, torch.Size]:
        first = self._models[0]
        if self.layout.zero_stage:
            return {name: shape for group in first["param_shapes"] for name, shape in group.items()}
        return {name: first["module"][name].shape for group in self.layout.groups for name in group}

    def _read(self) -> Iterator[tuple[str, _Piece]]:
        """All pieces; those of one parameter in the order of its values."""
        if self.layout.zero_stage == 0:
            yield from self._read_whole()
            return
        for rank, saved in enumerate(self._optimizers):
            yield from (
                self._read_by_group(saved)
                if self.layout.zero_stage < 3
                else self._read_by_parameter(saved, rank)
            )

    def _read_whole(self) -> Iterator[tuple[str, _Piece]]:
        """ZeRO-0: whole tensors; master weights apart from the weights where these have 16 bits."""
        saved = self._models[0]["optimizer"]
        base = saved.get("optimizer_state_dict", saved)
        for place, (group, names) in enumerate(zip(base["param_groups"], self.layout.groups, strict=True)):
            for number, (index, name) in enumerate(zip(group["params"], names, strict=True)):
                if "fp32_groups" in saved:
                    master = saved["fp32_groups"][place][number]
                else:
                    master = self._models[0]["module"][name]
                yield name, _Piece(self._flat(master, base["state"].get(index, {})), 0, master.numel())

    def _read_by_group(self, saved: dict[str, Any]) -> Iterator[tuple[str, _Piece]]:
        """ZeRO-1 and 2: a group's parameters laid end to end and cut evenly; a rank has one stretch of it."""
        base = saved["base_optimizer_state"]
        groups = zip(base["param_groups"], saved["single_partition_of_fp32_groups"], strict=True)
        for (group, master), inside in zip(groups, saved["param_slice_mappings"], strict=True):
            flat = self._flat(master, base["state"].get(group["params"][0], {}))
            for name, address in inside.items():
                yield name, _Piece(flat, address.start, address.numel)

    def _read_by_parameter(self, saved: dict[str, Any], rank: int) -> Iterator[tuple[str, _Piece]]:
        """ZeRO-3: each parameter cut evenly; a rank has its stretch of each, end to end."""
        base = saved["optimizer_state_dict"]
        indices = [index for group in base["param_groups"] for index in group["params"]]
        masters = zip(indices, saved["fp32_flat_groups"], strict=True)
        for (index, master), inside in zip(masters, self._models[rank]["param_shapes"], strict=True):
            flat = self._flat(master, base["state"].get(index, {}))
            start = 0
            for name, shape in inside.items():
                each, first, end = stretch(math.prod(shape), rank, self.layout.ranks)
                yield name, _Piece(flat, start, end - first)
                start += each

    def _flat(self, master: Tensor, state: dict[str, Any]) -> dict[str, Tensor]:
        if "step" in state:
            self._steps.append(float(state["step"]))
        held = {kind: state[kind] for kind in MOMENTS if kind in state}
        return {kind: value.detach().flatten() for kind, value in ({MASTER: master} | held).items()}


def stretch(values: int, rank: int, ranks: int) -> tuple[int, int, int]:
    """How ZeRO-3 cuts a parameter: values a rank with padding; first and end of those of `rank`."""
    each = math.ceil(values / ranks)
    return each, min(rank * each, values), min((rank + 1) * each, values)


def load(directory: Path, layout: Layout, here: Layout, engine: Any) -> None:
    """Weights, moments, step count, buffers, frozen parameters and loss scale, into a DeepSpeed engine.

    `layout`: of the files; `here`: of the engine. All ranks call it together. Raises ValueError when the two
    have not the same parameters.
    """
    if distributed.rank() == 0:
        logger.info("%s was written by %s: laying it out for %s", directory, layout, here)
    theirs, ours = ({name for group in each.groups for name in group} for each in (layout, here))
    if theirs != ours:
        raise ValueError(f"{directory}: is of another model; {', '.join(sorted(theirs ^ ours))} differ")
    saved, optimizer = Saved(directory, layout), engine.optimizer
    if here.zero_stage == 3:
        optimizer.checkpoint_event_prologue()  # no parameter stays gathered with old values
    _load_others(saved, engine.module, here)
    names: dict[nn.Parameter, str] = {parameter: name for name, parameter in engine.module.named_parameters()}
    base = engine.basic_optimizer
    if here.zero_stage == 0:
        _load_whole(saved, optimizer, base, names)
    elif here.zero_stage < 3:
        _load_by_group(saved, optimizer, base, names)
    else:
        _load_by_parameter(saved, optimizer, base, names)
        optimizer.checkpoint_event_epilogue()
    if engine.fp16_enabled():
        scaler = optimizer.loss_scaler if here.zero_stage else optimizer.loss_scale_config
        for name, value in saved.loss_scale().items():
            setattr(scaler, name, value)
    for name, count in saved.counters().items():
        setattr(engine, name, count)
    distributed.barrier()


def _load_others(saved: Saved, module: nn.Module, here: Layout) -> None:
    others = saved.others()
    for name, buffer in module.named_buffers():
        if name in others:  # those that are not saved are made anew with the module
            buffer.data.copy_(others[name])
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            continue
        if here.zero_stage < 3:
            parameter.data.copy_(others[name])
            continue
        _, first, end = stretch(others[name].numel(), distributed.rank(), here.ranks)
        held: Any = parameter  # with what ZeRO-3 adds
        held.ds_tensor.data.view(-1)[: end - first].copy_(others[name].flatten()[first:end])


def _load_whole(saved: Saved, optimizer: Any, base: Any, names: dict[nn.Parameter, str]) -> None:
    """ZeRO-0."""
    groups = getattr(optimizer, "fp16_groups", None) or [group["params"] for group in base.param_groups]
    masters = getattr(optimizer, "fp32_groups", groups)
    for group, own in zip(groups, masters, strict=True):
        for parameter, master in zip(group, own, strict=True):
            state = _state(base, master, saved.step)
            for kind, target in _targets(master, state).items():
                target.copy_(saved.part(names[parameter], kind, 0, master.numel()).view(master.shape))
            parameter.data.copy_(master.data)


def _load_by_group(saved: Saved, optimizer: Any, base: Any, names: dict[nn.Parameter, str]) -> None:
    """ZeRO-1 and 2."""
    for group, master in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        state = _state(base, master, saved.step)
        for parameter in group:
            if parameter._hp_mapping is None:  # this rank has no value of it
                continue
            inside = parameter._hp_mapping.hp_fragment_address  # of this rank's flat tensor
            there = parameter._hp_mapping.lp_fragment_address  # of the parameter
            for kind, target in _targets(master, state).items():
                target.narrow(0, inside.start, inside.numel).copy_(
                    saved.part(names[parameter], kind, there.start, there.numel)
                )
    optimizer.update_lp_params()


def _load_by_parameter(saved: Saved, optimizer: Any, base: Any, names: dict[nn.Parameter, str]) -> None:
    """ZeRO-3."""
    groups = zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
    for place, (group, master) in enumerate(groups):
        state = _state(base, master, saved.step)
        start = 0
        for parameter in group:
            each, first, end = stretch(parameter.ds_numel, distributed.rank(), distributed.world_size())
            for kind, target in _targets(master, state).items():
                target.narrow(0, start, end - first).copy_(
                    saved.part(names[parameter], kind, first, end - first)
                )
            start += each
        optimizer._reassign_or_swap_out_partitioned_parameters(place)  # the model's weights from the masters


def _state(base: Any, master: Tensor, step: float) -> dict[str, Tensor]:
    """AdamW's state of one tensor, made if it is not there yet; its step count set."""
    state = base.state[master]
    for kind in MOMENTS:
        state.setdefault(kind, torch.zeros_like(master, requires_grad=False))
    state["step"] = torch.tensor(step, dtype=torch.float32, device=master.device)
    return state


def _targets(master: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {MASTER: master.data} | {kind: state[kind] for kind in MOMENTS}


def _mapped(path: Path) -> dict[str, Any]:
    # DeepSpeed's own objects are in it, so not weights_only; the manifest's hash was checked before
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def _by_rank(folder: Path, pattern: str, expected: int) -> list[Path]:
    """The files of ranks 0 … expected - 1. Raises ValueError when one is missing."""
    found = {_rank_of(path): path for path in folder.glob(pattern)} if expected else {}
    missing = [str(rank) for rank in range(expected) if rank not in found]
    if missing:
        raise ValueError(f"{folder}: {pattern} of rank {', '.join(missing)} is not there")
    return [found[rank] for rank in range(expected)]


def _rank_of(path: Path) -> int:
    """Of [bf16_]zero_pp_rank_<r>_mp_rank_00_….pt; a file without the first is the one of all ranks."""
    _, found, rest = path.name.partition("zero_pp_rank_")
    return int(rest.split("_")[0]) if found else 0
