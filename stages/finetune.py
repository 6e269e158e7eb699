"""Fine-tuning: see stages/training.py, which both kinds of training share."""

from typing import Literal

from stages.base import Job, Report
from stages.training import TrainingConfig
from stages.training_run import run_training


class Config(TrainingConfig):
    """Fine-tuning of one method on one split of a corpus."""

    kind: Literal["finetune"] = "finetune"


def run(config: Config, job: Job) -> Report:
    """Train; out/ then holds the model, its config and its tokenizer."""
    return run_training(config, job)
