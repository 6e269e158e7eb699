"""What a plan says of training stages: parameters a part, steps, memory a GPU under each ZeRO stage."""

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from data_tools.corpus_source import CorpusSource
from data_tools.shards import CorpusError, ShardIndex
from pipeline.plan import Plan, StagePlan
from pipeline.progress import number
from stages.base import StageConfig

HOLDINGS = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


def of_plan(plan: Plan) -> dict[str, dict[str, Any]]:
    """Of every training stage that is not done, by name. Models are counted without their weights."""
    counted: dict[str, Any] = {}  # stages that share a model are counted once
    return {
        stage.name: _of_stage(plan, stage, counted)
        for stage in plan.stages
        if stage.kind in ("pretrain", "finetune") and stage.action != "reuse"
    }


def _of_stage(plan: Plan, stage: StagePlan, counted: dict[str, Any]) -> dict[str, Any]:
    from learning.training.estimate import BERT_VOCABULARY, estimate
    from learning.training.loader import steps_per_epoch

    config: Any = plan.recipe.stages[stage.name]  # a TrainingConfig
    ranks = plan.recipe.head.launch.processes
    first = config  # of the chain of weights: its vocabulary is everybody's
    while "weights" in first.inputs:
        first = plan.recipe.stages[first.inputs["weights"]]
    vocabulary = BERT_VOCABULARY if first.vocabulary.path else first.vocabulary.size
    losses = tuple(config.losses)
    key = json.dumps([config.model, losses, ranks, vocabulary], sort_keys=True, default=str)
    shown: dict[str, Any] = {"ranks": ranks, "epochs": config.epochs, "batch": config.contrastive_batch}
    samples, source = _samples(plan, stage, config)
    shown |= {"samples": samples, "samples_from": source, "steps": None}
    try:
        if samples is not None:
            shown["steps"] = config.epochs * steps_per_epoch(samples, config.contrastive_batch)
        if key not in counted:
            counted[key] = estimate(config.model, losses, ranks, vocabulary)
        found = counted[key]
    except (ValueError, OSError) as error:  # a local model directory that is not there, say: the plan goes on
        return shown | {"error": str(error)}
    return shown | {
        "parameters": dict(found.parts),
        "trainable": found.trainable,
        "frozen": found.frozen,
        "bytes_per_gpu": dict(found.bytes_per_gpu),
        "bytes_are": found.says,
        "holding": _holding(plan.recipe.directory / config.deepspeed),
    }


def _samples(plan: Plan, stage: StagePlan, config: StageConfig) -> tuple[int | None, str]:
    """How many samples the stage trains on, and who says so: the finished corpus, else the recipe's hint."""
    split = str(config.data.split)  # type: ignore[attr-defined]
    elsewhere: CorpusSource = config.data  # type: ignore[attr-defined]
    if elsewhere.corpus is not None:
        try:
            splits = ShardIndex.splits(elsewhere.place(None, plan.recipe.directory))
        except CorpusError as error:
            return None, str(error)
        return splits.get(split), f"split '{split}' of {elsewhere.corpus}"
    corpus = plan[config.inputs["corpus"]]
    manifest = corpus.directory.path / "out" / "manifest.json"
    if corpus.action == "reuse" and manifest.is_file():
        counts = json.loads(manifest.read_text(encoding="utf-8")).get("splits", {})
        return counts.get(split), f"split '{split}' of {corpus.name}"
    hint = plan.recipe.head.samples.get(corpus.name)
    if hint is not None:
        return hint, "the recipe's `samples`"
    return None, f"unknown until {corpus.name} is done"


def _holding(deepspeed: Path) -> str | None:
    """Which of HOLDINGS the DeepSpeed file asks for; None if it cannot be read."""
    try:
        zero = json.loads(deepspeed.read_text(encoding="utf-8")).get("zero_optimization", {})
    except (OSError, ValueError):
        return None
    offload = any(
        zero.get(name, {}).get("device", "none") != "none" for name in ("offload_optimizer", "offload_param")
    )
    return f"zero{zero.get('stage', 0)}{'_offload' if offload else ''}"


def tables(shown: dict[str, dict[str, Any]]) -> list[Table]:
    """One for sizes and steps, one for memory."""
    if not shown:
        return []
    parts = list(dict.fromkeys(part for row in shown.values() for part in row.get("parameters", {})))
    sizes = _table(
        "training: parameters and steps", "stage", *parts, "trainable", "frozen", "steps", "of samples"
    )
    memory = _table(
        "training: GiB a GPU for model states (* as the recipe says)", "stage", "ranks", *HOLDINGS
    )
    for name, row in shown.items():
        steps = "unknown" if row["steps"] is None else number(row["steps"])
        samples = row["samples_from"] if row["samples"] is None else number(row["samples"])
        if "error" in row:
            sizes.add_row(escape(name), *[""] * (len(parts) + 2), steps, escape(row["error"]))
            continue
        counts = [_millions(row["parameters"].get(part)) for part in parts]
        totals = [_millions(row["trainable"]), _millions(row["frozen"])]
        sizes.add_row(escape(name), *counts, *totals, steps, escape(samples))
        needs = [_gib(row["bytes_per_gpu"].get(h), h == row["holding"]) for h in HOLDINGS]
        memory.add_row(escape(name), str(row["ranks"]), *needs)
    says = next((row["bytes_are"] for row in shown.values() if "bytes_are" in row), "")
    memory.caption, memory.caption_justify = escape(says), "left"
    return [sizes, memory] if memory.row_count else [sizes]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(escape(column), justify="left" if i == 0 else "right")
    return table


def _millions(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count:,}"


def _gib(count: int | None, chosen: bool) -> str:
    return "" if count is None else f"{count / 2**30:,.2f}{'*' if chosen else ''}"
