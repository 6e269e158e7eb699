"""A run of a training stage in this process: corpus, tokenizer, model, engine, loop, and out/."""

import copy
import gc
import logging
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from data_tools.shards import ShardIndex
from learning import methods, model_files
from learning.encoders.text_towers import load_word_vectors
from learning.evaluation.gallery import texts_of
from learning.methods.base import Method, MethodConfig
from learning.tokenizer import Tokenizer, load_tokenizer, train_wordpiece, whole_words
from learning.training import distributed, watchdog
from learning.training.anomalies import StartOver
from learning.training.augment import ImageTransform
from learning.training.blocks import compile_blocks, recompute_blocks
from learning.training.checkpoint import Checkpoints
from learning.training.deepspeed_setup import read_deepspeed_config, zero_stage
from learning.training.engine import Engine
from learning.training.loader import Batches
from learning.training.loop import fit
from learning.training.plan import Outcome, Plan
from learning.training.split_regions import SplitRegions
from learning.training.tower_tokens import TowerTokens, identity
from learning.training.watchdog import FIRST_STEP_FACTOR, Watchdog
from stages.base import Job, Report, StageError, Stopped, Task
from stages.judged import judge, open_regions
from stages.training import TrainingConfig
from stages.upstream import absolute_weights, load_heads, load_upstream

logger = logging.getLogger(__name__)

TOKENIZER = "tokenizer"  # in the stage's directory, where it was trained here
TOWER_TOKENS = "tower_tokens"  # in the stage's directory, with data.cache: tokens


def run_training(config: TrainingConfig, job: Job) -> Report:
    """Train, from the newest own checkpoint, else upstream weights, else scratch; rank 0 writes out/.

    Raises StageError for what the user can mend, and Stopped when it was asked to stop.
    """
    limit_s = config.stall_limit_s or 0.0
    # torch's own limit comes after the watchdog's, which says who is to blame
    distributed.init(timeout_s=max(1800.0, 2 * FIRST_STEP_FACTOR * limit_s))
    try:
        with Watchdog(job.log, config.stall_limit_s, job.stalled):
            return _trained(config, job)
    except ValueError as error:
        logger.info("the training stopped with an error", exc_info=True)
        raise StageError(str(error)) from error
    finally:
        distributed.shutdown()


def _trained(config: TrainingConfig, job: Job) -> Report:
    again: StartOver | None = None
    while True:
        training = _Training(config, job)
        try:
            return training.run(again)
        except StartOver as over:
            again = over.with_traceback(None)  # which holds the engine
        del training  # two models and their optimizers might not fit
        gc.collect()


class _Training:
    """One run of a training stage in this process."""

    def __init__(self, config: TrainingConfig, job: Job):
        self.config, self.job = config, job
        self.seed = job.seed if config.seed is None else config.seed
        self._check_batch()
        made_here = job.inputs["corpus"] / "out" if "corpus" in job.inputs else None
        corpus = config.data.place(made_here, job.recipe_directory)
        self.index = config.data.open(corpus, config.data.split, job.recipe_directory)
        self.upstream = job.inputs.get("weights")
        values = absolute_weights(config.model, job.recipe_directory)
        if self.upstream is not None and not config.new_parts:
            values = model_files.without_weights(values)  # all of them come from upstream
        self.model_config = methods.parse_config(values)
        self.tokenizer = self._tokenizer()
        self.transform, self.max_length = preparation(self.model_config)
        self.method = self._method()
        self.regions = open_regions(job.inputs, self.method)
        self.batches = Batches(
            self.index,
            self.tokenizer,
            self.transform,
            self.method.views(),
            config.data,
            seed=self.seed,
            contrastive_batch=config.contrastive_batch,
            max_length=self.max_length,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            tower=self._tower(),
            regions=None if self.regions is None else SplitRegions(self.regions, self.index),
        )
        self.validated: tuple[ShardIndex, Method] | None = None
        if config.validation is not None:
            plain = copy.deepcopy(self.method)  # before DeepSpeed takes the parameters over
            held_out = config.data.open(corpus, config.validation.split, job.recipe_directory)
            if self.regions is not None:
                SplitRegions(self.regions, held_out).check(0)  # now, not after the first epoch
            self.validated = (held_out, plain)

    def run(self, again: StartOver | None) -> Report:
        config, job = self.config, self.job
        self.method.begin()
        if self.upstream is not None:
            load_heads(self.method, model_files.read_heads(self.upstream), self.upstream)
        sizes = {part: sum(p.numel() for p in own) for part, own in self.method.parts().items()}
        held = read_deepspeed_config(job.recipe_directory / config.deepspeed)
        if config.activation_checkpointing:
            recompute_blocks(self.method)
        if config.compile:
            compile_blocks(self.method, zero_stage(held))
        engine = Engine(
            self.method,
            config.losses,
            config.optimizer,
            held,
            batch_per_gpu=config.contrastive_batch // distributed.world_size(),
            gradient_clip=config.gradient_clip,
            ema=config.ema,
            contrast=config.contrast,
            micro_batch=config.micro_batch,
            log_file=job.log / f"deepspeed_rank{distributed.rank()}.log",
        )
        if distributed.rank() == 0:
            job.tracker.params({f"parameters/{part}": count for part, count in sizes.items()})
        self._fill_tower()
        shown = _Shown(job, f"{config.kind}: steps")
        try:
            outcome = fit(
                engine,
                self.batches,
                self._plan(),
                Checkpoints(
                    job.checkpoints,
                    config.checkpoint.keep,
                    config.checkpoint.milestone_every_steps,
                    config.checkpoint.background,
                ),
                shown,
                self._validate if self.validated is not None else None,
                again,
            )
        except StartOver:
            engine.close()
            raise
        finally:
            shown.end()
        if outcome.stopped:
            raise Stopped(f"after step {outcome.step}; its checkpoint is complete: run again to go on")
        self._write_out(outcome)
        engine.close()
        return self._report(outcome, sizes)

    def _tower(self) -> TowerTokens | None:
        """For data.cache, by a copy of the frozen image tower: the engine may split or cast the method's."""
        tower = self.method.frozen_image_tower()
        if tower is None or self.config.data.cache != "tokens":
            return None
        device = distributed.device()
        own = copy.deepcopy(tower).eval().to(device)
        # All of the config but where the weights were: they count by what they are
        how = own.config.model_dump(mode="json", exclude={"weights", "key_order"})
        name = identity(own, how, self.index.sha256)
        return TowerTokens(
            lambda pixels: own(pixels.to(device)),
            len(self.index),
            (own.tokens, own.width),
            self.job.directory / TOWER_TOKENS,
            name,
        )

    def _fill_tower(self) -> None:
        """Raises Stopped when a rank was asked to."""
        tower, job = self.batches.tower, self.job
        if tower is None:
            return
        # of upstream, and of other settings of this stage: another learning rate needs no other tokens
        earlier = [] if self.upstream is None else [self.upstream / TOWER_TOKENS]
        earlier += sorted(path for path in job.directory.parent.glob(f"*/{TOWER_TOKENS}"))
        share = len(range(distributed.rank(), len(self.index), distributed.world_size()))
        with job.progress.task(f"{self.config.kind}: the image tower, pictures", share) as task:

            def advance(rows: int) -> None:
                watchdog.alive()
                task.advance(rows)

            watchdog.enter("image tower")
            whole = tower.fill(self.batches.plain_pixels, earlier, advance, job.should_stop)
        if not whole:
            raise Stopped("before the first step: the image tower was running; run again to go on")

    def _plan(self) -> Plan:
        config = self.config
        every = config.validation.every_epochs if config.validation else 1
        return Plan(
            config.epochs,
            config.schedule,
            config.checkpoint,
            config.log_every_steps,
            every,
            config.pick_best,
            config.anomalies,
            self.job.stop_at,
        )

    def _check_batch(self) -> None:
        ranks, each = distributed.world_size(), self.config.batch_per_gpu
        if each is not None and ranks * each != self.config.contrastive_batch:
            raise ValueError(
                f"contrastive_batch: {self.config.contrastive_batch} is not {ranks} ranks × batch_per_gpu "
                f"{each}; gradient accumulation adds no negatives, so it is not done: change one of the "
                "three, or set micro_batch in place of batch_per_gpu to hold fewer samples at a time"
            )

    def _tokenizer(self) -> Tokenizer:
        """Upstream's, else the one of vocabulary.path, else made of this split's texts by rank 0."""
        if self.upstream is not None:
            return load_tokenizer(self.upstream / "out")
        if self.config.vocabulary.path is not None:
            return load_tokenizer(self.job.recipe_directory / self.config.vocabulary.path)
        directory = self.job.directory / TOKENIZER
        problem: str | None = None
        if distributed.rank() == 0 and not directory.is_dir():
            try:
                make = whole_words if self.config.vocabulary.kind == "words" else train_wordpiece
                made = make(self._all_texts(), self.config.vocabulary.size)
                temporary = directory.with_suffix(".tmp")
                shutil.rmtree(temporary, ignore_errors=True)
                made.save(temporary)
                temporary.rename(directory)
            except (ValueError, OSError) as error:
                problem = str(error)
        problem = distributed.broadcast_object(problem)  # the others wait here
        if problem is not None:
            raise ValueError(problem)
        return load_tokenizer(directory)

    def _all_texts(self) -> Iterator[str]:
        for position in range(len(self.index)):
            watchdog.alive()
            try:
                record = self.index.record(position)
            except ValueError as error:
                logger.warning("the vocabulary goes without a sample: %s", error)
                continue
            for name in self.config.data.texts:
                yield from texts_of(record, name)

    def _method(self) -> Method:
        torch.manual_seed(self.seed)  # the same start on every rank
        method = methods.build(self.model_config, tuple(self.config.losses), self.tokenizer.vocabulary_size)
        load_word_vectors(method, self.tokenizer.vocabulary())
        if self.upstream is not None:
            state = model_files.read_weights(self.upstream)
            load_upstream(method, state, self.config.new_parts, self.config.dropped_parts, self.upstream)
        return method

    def _validate(self, state: dict[str, Tensor]) -> dict[str, float]:
        assert self.validated is not None
        assert self.config.validation is not None
        index, plain = self.validated
        plain.load_state_dict(model_files.without_heads(plain, state))
        judged = judge(
            self.config.validation,
            plain.to(distributed.device()),
            self.tokenizer,
            self.transform,
            index,
            batch=self.config.validation.batch,
            device=distributed.device(),
            max_length=self.max_length,
            max_pixels=self.config.data.max_pixels,
            regions=self.regions,
        )
        return {f"val/{name}": value for name, value in judged.metrics.items()}

    def _write_out(self, outcome: Outcome) -> None:
        problem: str | None = None
        if distributed.rank() == 0:
            try:
                model_files.save(
                    self.job.out,
                    self.method,
                    self.config.model,
                    tuple(self.config.losses),
                    self.tokenizer,
                    transform=self.transform,
                    max_length=self.max_length,
                    state=outcome.state,
                )
            except OSError as error:
                problem = f"{self.job.out}: the model could not be written: {error}; make room and run again"
        problem = distributed.broadcast_object(problem)
        if problem is not None:
            raise ValueError(problem)

    def _report(self, outcome: Outcome, sizes: Mapping[str, int]) -> Report:
        counts = {
            "steps": outcome.step,
            "samples_seen": outcome.step * self.config.contrastive_batch,
            "samples_in_split": len(self.index),
            "bad_samples": len(outcome.skipped),
            "left_out_samples": len(outcome.left_out),
            "rewinds": outcome.rewinds,
            "parameters": sum(sizes.values()),
        }
        return Report(counts, outcome.metrics)


class _Shown:
    """The loop's numbers and progress, to the job; rank 0 speaks."""

    def __init__(self, job: Job, description: str):
        self.job, self.description = job, description
        self.speaks = distributed.rank() == 0
        self._task: Task | None = None
        self._context: Any = None

    def begin(self, step: int, steps: int) -> None:
        if not self.speaks:
            return
        self.end()  # of what went before a rewind
        self.job.tracker.rewind(step)
        name = self.description if step == 0 else f"{self.description} (from {step:,})"
        self._context = self.job.progress.task(name, steps - step)
        self._task = self._context.__enter__()

    def end(self) -> None:
        if self._context is not None:
            self._context.__exit__(None, None, None)
            self._context = None

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        if self.speaks:
            self.job.tracker.metrics(values, step)

    def advance(self, n: int, **shown: Any) -> None:
        if self._task is not None:
            self._task.advance(n, **shown)

    def should_stop(self) -> bool:
        return self.job.should_stop()


def preparation(config: MethodConfig) -> tuple[ImageTransform, int]:
    """How a method's images and texts are prepared: the transform, and the most tokens a text."""
    towers: Any = config  # every method's own Config has `vision` and `text`
    vision = towers.vision
    return ImageTransform(vision.image_px, vision.mean, vision.std), int(towers.text.max_length)
