"""All ways to compute a contrastive loss: value and gradients of one float64 process, precision, memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from learning import methods
from learning.losses.blockwise import hinge_rows, info_nce_rows_blockwise
from learning.losses.contrastive import Ids, Queue, hardest_negative_hinge, info_nce, info_nce_rows
from learning.methods.base import Batch, ContrastiveMethod, Terms, Texts, Views
from learning.training.contrast import Contrast, ContrastConfig
from learning.training.distributed import gather
from learning.training.engine import Objective
from tests import cookie_case, reference
from tests.distributed_harness import run_distributed
from tests.plain_engine import PlainEngine

WIDTH, STORED, MARGIN = 5, 7, 0.2
HOWS = (
    ContrastConfig(),
    ContrastConfig(how="local"),
    ContrastConfig(how="blockwise", block=3),  # neither rows nor ranks end where blocks do
)
# rows of each rank, by the number of ranks: even, and with an uneven last batch
EVEN = {1: (12,), 2: (6, 6), 4: (3, 3, 3, 3)}
UNEVEN = {1: (11,), 2: (7, 4), 4: (3, 4, 2, 2)}
MICRO = 2


@dataclass(frozen=True)
class Case:
    """What is contrasted. `weights`: of the queue's keys, some of them 0."""

    uneven: bool = False
    ids: bool = False
    queue: bool = False
    weights: bool = False

    def rows(self, ranks: int) -> tuple[int, ...]:
        return (UNEVEN if self.uneven else EVEN)[ranks]


CASES = [
    Case(uneven, ids, queue, weights)
    for uneven in (False, True)
    for ids in (False, True)
    for queue, weights in ((False, False), (True, False), (True, True))
]


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


class Towers(ContrastiveMethod):
    """One matrix a side. Rows come as Batch.tokens; their ids, and a queue for image to text, are its own."""

    available_losses = ("ccl", "hinge")

    def __init__(self, case: Case):
        super().__init__(self.available_losses)
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        rows = sum(case.rows(1))
        self.features = {"image": normal(rows, WIDTH), "text": normal(rows, WIDTH)}
        self.image, self.text = (nn.Parameter(normal(WIDTH, WIDTH)) for _ in range(2))
        self.temperature = nn.Parameter(torch.tensor([0.2], dtype=torch.float64))
        self.ids = torch.randint(0, 5, (rows,), generator=generator) if case.ids else None
        self.queue = None
        if case.queue:
            stored = torch.randint(0, 5, (STORED,), generator=generator) if case.ids else None
            weights = torch.tensor([0.5, 0, 1, 0, 0, 0, 3], dtype=torch.float64) if case.weights else None
            self.queue = Queue(unit(normal(STORED, WIDTH)), stored, weights)

    def part(self, own: slice, rows_by_rank: tuple[int, ...] | None) -> Batch:
        """One rank's rows."""
        self.own_ids = None if self.ids is None else self.ids[own]
        tokens = {side: feature[own] for side, feature in self.features.items()}
        return Batch({}, {}, [""] * len(tokens["image"]), tokens, rows_by_rank)

    def encode(self, batch: Batch) -> dict[str, Tensor]:
        return {
            "image": self.embed_images(batch.tokens["image"]),
            "text": unit(batch.tokens["text"] @ self.text),
        }

    def terms(self, embeddings: Mapping[str, Tensor], rows_by_rank: Sequence[int] | None = None) -> Terms:
        step = Contrast(self.contrast, embeddings, rows_by_rank)
        temperature = self.temperature.squeeze(0)
        one = step.info_nce("image", "text", temperature, self.own_ids, self.queue)
        other = step.info_nce("text", "image", temperature, self.own_ids)
        hinge = step.hinge("image", "text", MARGIN)
        return Terms(
            {"ccl": one.loss + other.loss, "hinge": hinge.loss},
            {"i2t_accuracy": one.accuracy, "t2i_accuracy": other.accuracy},
        )

    def views(self) -> Views:
        return Views({"image": "plain"}, {"text": "plain"})

    def embed_images(self, images: Tensor) -> Tensor:
        return unit(images @ self.image)

    def embed_texts(self, texts: Texts) -> Tensor:
        return unit(self.features["text"][texts.ids[:, 0]] @ self.text)


def plain_info_nce(
    queries: Tensor, keys: Tensor, temperature: Tensor, ids: Tensor | None, queue: Queue | None
) -> Tensor:
    """The formula of `info_nce_rows`, term by term."""
    losses = []
    for i, query in enumerate(queries):
        terms = [torch.exp(query @ key / temperature) for key in keys]
        positives = [terms[j] for j in range(len(keys)) if (j == i if ids is None else ids[j] == ids[i])]
        for m in range(0 if queue is None else len(queue.keys_md)):
            assert queue is not None
            weight = 1.0 if queue.weights_m is None else queue.weights_m[m]
            terms.append(weight * torch.exp(query @ queue.keys_md[m] / temperature))
            if ids is not None and queue.ids_m is not None and queue.ids_m[m] == ids[i] and weight > 0:
                positives.append(terms[-1])
        logs = [torch.log(positive / torch.stack(terms).sum()) for positive in positives]
        losses.append(-torch.stack(logs).sum() / len(logs))
    return torch.stack(losses).mean()


def accuracy(queries: Tensor, keys: Tensor, ids: Tensor | None) -> Tensor:
    best = (queries @ keys.T).argmax(dim=1)
    right = best == torch.arange(len(best)) if ids is None else ids[best] == ids
    return right.double().mean()


WEIGHTS = {"ccl": 1.0, "hinge": 3.0}


def plain_step(case: Case) -> dict[str, Tensor]:
    """One float64 process on the joined batch: losses, report and gradients."""
    method = Towers(case)
    found = method.encode(method.part(slice(None), None))
    image, text, tau, ids = found["image"], found["text"], method.temperature.squeeze(0), method.ids
    ccl = plain_info_nce(image, text, tau, ids, method.queue) + plain_info_nce(text, image, tau, ids, None)
    hinge = reference.hinge(image, text, MARGIN)
    (WEIGHTS["ccl"] * ccl + WEIGHTS["hinge"] * hinge).backward()
    report = {"i2t_accuracy": accuracy(image, text, ids), "t2i_accuracy": accuracy(text, image, ids)}
    return {"ccl": ccl, "hinge": hinge} | report | {name: p.grad for name, p in method.named_parameters()}


def rank_step(
    case: Case, how: ContrastConfig, micro_batch: int | None, rank: int, world_size: int
) -> dict[str, Tensor]:
    """The same of one rank, its gradients averaged over ranks as the engine does."""
    method, counts = Towers(case), case.rows(world_size)
    method.contrast = how
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    engine = PlainEngine(Objective(method, WEIGHTS))
    results = engine.backward_of(method.part(own, counts if case.uneven else None), micro_batch)
    return results[1] | results[2] | engine.averaged_gradients()


WAYS = [(case, how, None) for case in CASES for how in HOWS]
WAYS += [(case, how, MICRO) for case in CASES for how in (HOWS[0], HOWS[-1])]


def rank_steps(rank: int, world_size: int) -> list[dict[str, Tensor]]:
    """All cases in one start of the processes, which is what takes long."""
    return [rank_step(*way, rank, world_size) for way in WAYS]


def check_all(*ranks: list[dict[str, Tensor]]) -> None:
    expected = {case: plain_step(case) for case in CASES}
    for way, ours in (pair for found in ranks for pair in zip(WAYS, found, strict=True)):
        plain = expected[way[0]]
        assert set(ours) == set(plain)
        for name, value in plain.items():
            tolerance = 1e-6 if name.endswith("accuracy") else 1e-10  # the plain one's is in float32
            torch.testing.assert_close(
                ours[name].double(),
                value.detach(),
                rtol=tolerance,
                atol=1e-12,
                msg=lambda text, at=(way, name): f"{at}: {text}",
            )


def test_every_way_equals_the_formula_in_one_process() -> None:
    check_all(rank_steps(0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_way_equals_one_process_on_several_ranks(world_size: int) -> None:
    """Value and all gradients, the temperature's too; with queue, several positives, uneven last batch."""
    check_all(*run_distributed(rank_steps, world_size, timeout_s=400))


def test_the_default_is_the_plain_loss_bit_for_bit() -> None:
    image, text = (unit(torch.randn(9, WIDTH)).requires_grad_() for _ in range(2))
    tau = torch.tensor(0.1, requires_grad=True)
    step = Contrast(ContrastConfig(), {"image": image, "text": text})
    joined_image, joined_text = torch.cat([image, text], dim=1).chunk(2, dim=1)  # as gathered: one matrix
    plain = info_nce(joined_image, joined_text, tau) + info_nce(joined_text, joined_image, tau)
    hinge = hardest_negative_hinge(joined_image, joined_text, MARGIN)
    for ours, theirs in (
        (step.both_ways("image", "text", tau).loss, plain),
        (step.hinge("image", "text", MARGIN).loss + 0 * tau, hinge + 0 * tau),
    ):
        assert torch.equal(ours, theirs)
        gradients = (torch.autograd.grad(loss, (image, text, tau)) for loss in (ours, theirs))
        assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


# --------------------------------------------------------------------------------------- blockwise, alone


@pytest.mark.parametrize("block", [1, 4, 11, 100])
def test_the_block_changes_nothing(block: int) -> None:
    for case in CASES:
        method, rows = Towers(case), slice(4, 8)
        ids = None if method.ids is None else Ids(method.ids[rows], method.ids)
        image, text = (unit(feature) for feature in method.features.values())
        leaves = image[rows], text, torch.tensor(0.2, dtype=torch.float64)
        found = []
        for options in ({}, {"block": block}):
            own = [leaf.clone().requires_grad_() for leaf in leaves]
            function = info_nce_rows_blockwise if options else info_nce_rows
            rowwise = function(*own, first=4, ids=ids, queue=method.queue, **options)
            weighted = (rowwise.losses_b * torch.tensor([0.5, 2.0, 0.0, 1.0])).sum()
            found.append((rowwise.losses_b, rowwise.hits_b, *torch.autograd.grad(weighted, own)))
        torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", [Case(), Case(ids=True), Case(queue=True, weights=True), CASES[5]])
def test_the_streamed_gradient_is_that_of_central_differences(case: Case) -> None:
    method, rows = Towers(case), slice(4, 8)
    queries, keys = unit(method.features["image"])[rows], unit(method.features["text"])
    ids = None if method.ids is None else Ids(method.ids[rows], method.ids)

    def losses(q: Tensor, k: Tensor, tau: Tensor) -> Tensor:
        return info_nce_rows_blockwise(q, k, tau, first=4, ids=ids, queue=method.queue, block=5).losses_b

    leaves = queries.requires_grad_(), keys.requires_grad_(), torch.tensor(0.2).double().requires_grad_()
    assert torch.autograd.gradcheck(losses, leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("several", [False, True])
def test_low_precision_features_are_contrasted_in_fp32(dtype: torch.dtype, several: bool) -> None:
    """At a temperature of 0.01: logits of ±100, of which exp alone has no place in fp16."""
    torch.manual_seed(1)
    keys = unit(torch.randn(200, 64)).to(dtype)
    queries = unit(keys[50:100].float() + 0.05 * torch.randn(50, 64)).to(dtype)
    queries[0] = -keys[50]  # as wrong as can be: a loss of more than 100
    numbers = torch.arange(200) // 3
    ids = Ids(numbers[50:100], numbers) if several else None
    found = []
    for made in (dtype, torch.float64):
        leaves = [x.to(made).requires_grad_() for x in (queries, keys)] + [torch.tensor(0.01).to(made)]
        leaves[2] = torch.tensor(0.01, dtype=torch.promote_types(made, torch.float32), requires_grad=True)
        function = info_nce_rows if made == torch.float64 else info_nce_rows_blockwise
        options = {} if made == torch.float64 else {"block": 64}
        loss = function(*leaves, first=50, ids=ids, **options).losses_b.mean()
        found.append((loss, *torch.autograd.grad(loss, leaves)))
    assert [value.dtype for value in found[0]] == [torch.float32, dtype, dtype, torch.float32]
    assert all(value.isfinite().all() for value in found[0])
    rounding = torch.finfo(dtype).eps
    for ours, exact, tolerance in zip(*found, (1e-5, rounding, rounding, 1e-4), strict=True):
        assert (ours.double() - exact).abs().max() <= tolerance * exact.abs().max()


def test_keys_that_want_no_gradient_get_none() -> None:
    queries, keys = unit(torch.randn(4, WIDTH)).requires_grad_(), unit(torch.randn(4, WIDTH))
    info_nce_rows_blockwise(queries, keys, 0.1, block=3).losses_b.sum().backward()
    expected = torch.autograd.grad(info_nce_rows(queries, keys, 0.1).losses_b.sum(), queries)[0]
    torch.testing.assert_close(queries.grad, expected)
    assert keys.grad is None


class Largest(TorchDispatchMode):
    """Remembers the most numbers that any tensor made meanwhile has."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(one, Tensor):
                self.numbers = max(self.numbers, one.numel())
        return made


@pytest.mark.parametrize(("how", "numbers"), [("full", 90 * 90), ("blockwise", 90 * 16)])
def test_no_matrix_is_larger_than_the_block(how: Any, numbers: int) -> None:
    """A whole step of losses and report, forward and backward: 90 rows of both sides, 8 dimensions."""
    values = {key: cookie_case.MODEL[key] for key in ("vision", "text", "temperature")}
    config = methods.parse_config(values | {"method": "clip", "dimension": 8})
    model = methods.build(config, ("ccl", "hinge"), cookie_case.VOCABULARY)
    model.contrast = ContrastConfig(how=how, block=16)
    embeddings = {side: unit(torch.randn(90, 8)).requires_grad_() for side in ("image", "text")}
    with Largest() as seen:
        terms = model.terms(embeddings)
        (terms.losses["ccl"] + terms.losses["hinge"]).backward()
    assert seen.numbers == numbers
    assert set(terms.report) == {"temperature", "ccl_accuracy", "hinge_accuracy"}


# ------------------------------------------------------------------------------------------------ mistakes


def test_what_does_not_fit_is_refused() -> None:
    q, k = torch.ones(3, 4), torch.ones(6, 4)
    ids = Ids(torch.zeros(3).long(), torch.zeros(6).long())
    for function in (info_nce_rows, lambda *a, **kw: info_nce_rows_blockwise(*a, **kw, block=2)):
        with pytest.raises(ValueError, match="3 queries from row 4 on do not lie in 6 keys"):
            function(q, k, 0.1, first=4)
        with pytest.raises(ValueError, match=r"\(b, d\) queries and \(n, d\) keys are needed"):
            function(q, k[:, :3], 0.1)
        with pytest.raises(ValueError, match="ids: 3 of queries and 5 of keys; there are 3 and 6"):
            function(q, k, 0.1, ids=replace(ids, keys_n=ids.keys_n[:5]))
        with pytest.raises(ValueError, match=r"queue\.weights_m: 2 values for 6 keys"):
            function(q, k, 0.1, queue=Queue(k, weights_m=torch.ones(2)))
        with pytest.raises(ValueError, match=r"queue\.ids_m: there are no ids of the queries"):
            function(q, k, 0.1, queue=Queue(k, ids_m=torch.ones(6)))
        with pytest.raises(ValueError, match="a batch of 1 has no negatives"):
            function(q[:1], q[:1], 0.1)
    with pytest.raises(ValueError, match=r"contrast\.block: 0 keys at a time"):
        info_nce_rows_blockwise(q, k, 0.1, block=0)
    with pytest.raises(ValueError, match="no negatives"):
        hinge_rows(q[:1], q[:1], 0.2, block=4)
    with pytest.raises(ValueError, match=r"rows_by_rank: \[2\] on rank 0 of 1 with 3 rows"):
        gather(q, (2,))
    with pytest.raises(ValidationError, match="full"):
        ContrastConfig(how="blocks")  # type: ignore[arg-type]
