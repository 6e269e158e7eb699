"""GradCache: the gradients of a batch that does not fit, part by part and exact (Gao et al. 2021, Sec. 3).

A contrastive loss needs the embeddings of all rows, but its gradient reaches a tower through the embeddings
alone: dL/dθ = Σ_parts Σ_rows dL/de · de/dθ. So all parts are embedded without a graph, dL/de is taken once
and kept, and each part is embedded again with a graph, for <e, dL/de>, whose gradient is the part's share.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from learning.methods.base import Batch, ContrastiveMethod, Method
from learning.training.randomness import random_state, set_random_state


def parts_of(batch: Batch, micro_batch: int | None) -> list[Batch]:
    """A rank's rows in parts of `micro_batch` at most, even in size, and as many on every rank.

    None: one part. Raises ValueError when a rank has fewer rows than another one has parts.
    """
    every = batch.rows_by_rank or (len(batch),)
    if micro_batch is None or max(every) <= micro_batch:
        return [batch]
    count = -(-max(every) // micro_batch)
    if min(every) < count:  # all ranks must make as many calls: their collectives meet
        raise ValueError(
            f"micro_batch: {micro_batch} makes {count} parts of {max(every)} rows, and another rank has "
            f"{min(every)} rows; set it to {-(-max(every) // min(every))} or more"
        )
    bounds = [len(batch) * number // count for number in range(count + 1)]
    return [batch.rows(slice(start, stop)) for start, stop in pairwise(bounds)]


def backward(
    engine: Any,
    parts: list[Batch],
    placed: Callable[[Batch], Batch],
    *,
    loss_scale: float = 1.0,
    gradient_scale: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The gradients of a whole batch in a DeepSpeed engine over an `Objective`, ready for its step.

    Every part but the last is embedded twice, with the same random numbers; the last one has the loss in its
    graph. A loss is given to the engine times `loss_scale`; the gradients then come times `gradient_scale`
    (in fp16 an engine may scale the loss itself). Returns what `Objective` gives of the batch.
    """
    *early, last = parts
    before, embedded = [], []
    for part in early:
        before.append(random_state())
        with torch.no_grad():
            embedded.append(engine(placed(part), embed_only=True))
    leaves = {name: torch.cat([one[name] for one in embedded]).requires_grad_() for name in embedded[0]}
    engine.set_gradient_accumulation_boundary(False)
    # The loss goes first: under ZeRO-3 the first backward of a step overwrites the gradients of the step
    # before, of the parameters that it reaches. This one reaches all, a temperature too.
    total, losses, report = engine(placed(last), early=leaves)
    engine.backward(total * loss_scale)
    after = random_state()
    rows = [len(part) for part in early]
    gradients = {}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, f"no loss reads the view {name}"
        gradients[name] = leaf.grad.div(gradient_scale).split(rows)
    for number, (part, state) in enumerate(zip(early, before, strict=True)):
        engine.set_gradient_accumulation_boundary(number == len(early) - 1)
        set_random_state(state)
        share = engine(placed(part), gradients={name: kept[number] for name, kept in gradients.items()})
        engine.backward(share * loss_scale)
    set_random_state(after)
    return total, losses, report


def refuse_what_needs_all(method: Method) -> None:
    """Raises ValueError for a method that is not a matter of embeddings alone, or normalises by its batch."""
    if not isinstance(method, ContrastiveMethod):
        raise ValueError(
            f"micro_batch: the losses of {type(method).__name__} read more than embeddings, so a batch is "
            "not computed in parts; leave micro_batch out, and take more GPUs or activation_checkpointing"
        )
    trains = method.training
    method.train()
    found = [
        name
        for name, module in method.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and (module.training or module.running_mean is None)
    ]
    method.train(trains)
    if found:
        raise ValueError(
            f"micro_batch: {found[0]} and {len(found) - 1} more normalise by the statistics of the whole "
            "batch, which its parts do not have; set model.vision.batch_norm: frozen, or "
            "model.vision.trainable: false, or leave micro_batch out"
        )
