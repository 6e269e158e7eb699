"""R2D2's cross encoder, and its teacher, queues and centres, each alone, against the plain reference."""

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learning.encoders.cross import CrossEncoder
from learning.encoders.momentum import Centre, FeatureQueue, Momentum
from tests import r2d2_reference as reference
from tests.r2d2_case import stored
from tests.r2d2_reference import Stored

DOUBLE = torch.float64

# ------------------------------------------------------------------------------------------- cross encoder


def encoder(layers: int = 2, dropout: float = 0.0) -> CrossEncoder:
    torch.manual_seed(0)
    made = CrossEncoder(layers, 8, 2, 12, dropout).double()
    for parameter in made.parameters():  # no start is special: no bias is 0, no scale is 1
        parameter.data += 0.3 * torch.randn_like(parameter)
    return made


def pairs(count: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries (b, 5, 8) and the other side's tokens (b, 6, 8), with their masks."""
    generator = torch.Generator().manual_seed(1)
    x, other = (torch.randn(count, n, 8, generator=generator, dtype=DOUBLE) for n in (5, 6))
    x_mask = (torch.arange(5) < torch.tensor([5, 2, 3])[:count, None]).long()
    other_mask = (torch.arange(6) < torch.tensor([1, 6, 4])[:count, None]).long()
    return x, x_mask, other, other_mask


def test_the_cross_encoder_is_the_plain_one_pair_by_pair() -> None:
    """Values, and gradients in every parameter and both sides' tokens; the reference never sees padding."""
    made, (x, x_mask, other, other_mask) = encoder(), pairs()
    x.requires_grad_()
    other.requires_grad_()
    state = {f"e.{name}": parameter for name, parameter in made.named_parameters()}
    ours = made(x, x_mask, other, other_mask)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    total_ours = total_theirs = torch.zeros((), dtype=DOUBLE)
    for i in range(len(x)):
        n, m = int(x_mask[i].sum()), int(other_mask[i].sum())
        theirs, told = reference.cross_encoder(x[i, :n], other[i, :m], state, "e", 2, 2)
        torch.testing.assert_close(ours[i, :n], theirs, rtol=1e-10, atol=1e-11)
        for layer, expected in enumerate(told, start=1):
            attention = made.attention(x, x_mask, other, other_mask, layer)[i]
            torch.testing.assert_close(attention[:, :n, :m], expected, rtol=1e-10, atol=1e-12)
            assert not attention[:, :n, m:].any()
        total_ours = total_ours + (ours[i, :n] * weights[i, :n]).sum()
        total_theirs = total_theirs + (theirs * weights[i, :n]).sum()
    inputs = [x, other, *made.parameters()]
    for one, two in zip(
        torch.autograd.grad(total_ours, inputs), torch.autograd.grad(total_theirs, inputs), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10)


def test_the_first_tokens_alone_are_those_of_all() -> None:
    """What the last layer leaves out is not read: [CLS] and every gradient are the whole encoder's."""
    made, (x, x_mask, other, other_mask) = encoder(), pairs()
    inputs = [x.requires_grad_(), other.requires_grad_(), *made.parameters()]
    whole, first = made(x, x_mask, other, other_mask), made(x, x_mask, other, other_mask, first=1)
    assert first.shape == (3, 1, 8)
    torch.testing.assert_close(first, whole[:, :1], rtol=1e-12, atol=1e-13)
    weights = torch.randn(first.shape, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    ours, theirs = (
        torch.autograd.grad((made_[:, :1] * weights).sum(), inputs, retain_graph=True)
        for made_ in (first, whole)
    )
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_without_masks_nothing_is_padding() -> None:
    made, (x, x_mask, other, other_mask) = encoder(), pairs()
    ours = made(x, None, other, None)
    torch.testing.assert_close(ours, made(x, torch.ones_like(x_mask), other, torch.ones_like(other_mask)))
    assert not torch.allclose(ours[0], made(x, None, other, other_mask)[0])


def test_dropout_acts_in_training_alone() -> None:
    made, (x, x_mask, other, other_mask) = encoder(dropout=0.3), pairs()
    assert not torch.equal(made(x, x_mask, other, other_mask), made(x, x_mask, other, other_mask))
    made.eval()
    torch.testing.assert_close(made(x, x_mask, other, other_mask), encoder()(x, x_mask, other, other_mask))


def test_wrong_sizes_and_layers_are_named() -> None:
    with pytest.raises(ValueError, match=r"cross_heads: 3 does not divide model\.dimension, 8"):
        CrossEncoder(1, 8, 3, 8, 0.0)
    x, x_mask, other, other_mask = pairs()
    with pytest.raises(ValueError, match="layer: 3"):
        encoder().attention(x, x_mask, other, other_mask, 3)


# ------------------------------------------------------------------------------------------------- queues


def test_a_queue_keeps_the_last_features_with_fading_weights() -> None:
    """Batches that fit, that go round the end, that fill it whole, and one that is larger than it."""
    queue, generator = FeatureQueue(7, 3, 0.99).double(), torch.Generator().manual_seed(0)
    plain = reference.Momentum({}, 7, torch.zeros(3), torch.zeros(3))
    assert stored(queue) == Stored()
    for step, count in enumerate((2, 3, 4, 7, 1, 5, 17, 6, 7, 2)):
        features = torch.randn(count, 3, generator=generator, dtype=DOUBLE)
        ids = torch.arange(count) + 100 * step
        queue.push(features, ids)
        plain.after_step({}, features, features, ids.tolist())
        found, expected = stored(queue), plain.text_queue
        assert found.ids == expected.ids
        assert found.weights == pytest.approx(expected.weights, rel=1e-14)
        assert torch.equal(torch.stack(found.features), torch.stack(expected.features))
    assert found.weights[-2:] == [1.0, 1.0]
    assert found.weights[0] == pytest.approx(0.99)


def test_a_queue_takes_no_gradient_and_keeps_its_own_copy() -> None:
    queue = FeatureQueue(4, 2)
    features = torch.ones(2, 2, requires_grad=True)
    queue.push(features, torch.tensor([1, 2]))
    with torch.no_grad():
        features.fill_(9.0)
    content = queue.content()
    assert not content.keys_md.requires_grad
    assert content.keys_md[:2].tolist() == [[1.0, 1.0]] * 2


def test_a_centre_follows_the_mean() -> None:
    centre, mu = Centre(3, 0.9).double(), torch.zeros(3, dtype=DOUBLE)
    for step in range(4):
        mean = torch.randn(3, generator=torch.Generator().manual_seed(step), dtype=DOUBLE)
        centre.push(mean)
        mu = 0.9 * mu + 0.1 * mean
        torch.testing.assert_close(centre.mean, mu, rtol=1e-14, atol=1e-15)


# ------------------------------------------------------------------------------------------------ teacher


class Tower(nn.Module):
    """Parameters at two depths, a bias that is none, statistics, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.inner = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.first(x)) * self.scale


def changed(tower: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def test_the_teacher_is_the_moving_average_of_the_student() -> None:
    torch.manual_seed(0)
    student = Tower().double()
    teacher = Momentum(0.995, tower=student)
    expected = {name: value.clone() for name, value in student.named_parameters()}
    for step in range(5):
        changed(student, step)
        student.train()(torch.randn(6, 4, dtype=DOUBLE))  # new statistics
        teacher.follow(tower=student)
        for name, value in student.named_parameters():
            expected[name] = 0.995 * expected[name] + 0.005 * value.detach()
    own = dict(teacher.get_submodule("tower").named_buffers())
    for name, value in expected.items():
        torch.testing.assert_close(own[name], value, rtol=1e-13, atol=1e-14)
    assert torch.equal(own["inner.0.running_var"], student.inner[0].running_var)  # type: ignore[arg-type]
    assert not list(teacher.parameters())
    assert set(teacher.state_dict()) == {f"tower.{name}" for name in student.state_dict()}


def test_the_teacher_has_no_dropout_no_gradient_and_its_own_weights() -> None:
    student = Tower()
    teacher: Any = Momentum(0.995, tower=student)
    teacher.train()
    x = torch.randn(6, 4)
    with teacher.computing(torch.float32, torch.device("cpu")):
        first, second = teacher.tower(x), teacher.tower(x)
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert torch.equal(teacher.tower.inner[0].running_mean, torch.zeros(4))
    changed(student, 0)
    with teacher.computing(torch.float32, torch.device("cpu")):
        assert torch.equal(teacher.tower(x), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_cast_rounds_what_momentum_keeps(dtype: torch.dtype) -> None:
    """Not even through half precision and back: the state has the bits that it had."""
    torch.manual_seed(0)
    student = Tower()
    model = nn.Module()
    model.student = student
    model.teacher = Momentum(0.995, tower=student)
    model.queue, model.centre = FeatureQueue(5, 3, 0.99), Centre(3, 0.9)
    for _ in range(3):
        model.queue.push(F.normalize(torch.randn(2, 3)), torch.tensor([1, 2]))
        model.centre.push(torch.randn(3))
        changed(student, 0)
        model.teacher.follow(tower=student)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for cast in (lambda m: m.to(dtype), lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.float()):
        cast(model)
        for name, value in model.state_dict().items():
            if not name.startswith("student."):
                assert value.dtype == state[name].dtype, name
                assert torch.equal(value, state[name]), name
    assert model.double().queue.features.dtype == DOUBLE


def test_a_teacher_of_a_bf16_student_moves_in_fp32() -> None:
    """A step of 0.005 is under bf16's resolution: a teacher in bf16 would stand still."""
    student = nn.Linear(4, 4).bfloat16()
    teacher: Any = Momentum(0.995, tower=student)
    assert teacher.tower.weight.dtype == torch.float32
    expected = student.weight.detach().float()
    for step in range(50):
        with torch.no_grad():
            student.weight.add_(0.01)
        expected = 0.995 * expected + 0.005 * student.weight.detach().float()
        teacher.follow(tower=student)
        assert not torch.equal(teacher.tower.weight, teacher.tower.weight.bfloat16().float()), step
    torch.testing.assert_close(teacher.tower.weight, expected, rtol=1e-6, atol=1e-7)
    with teacher.computing(torch.bfloat16, torch.device("cpu")):
        assert teacher.tower(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_state_goes_through_a_file_bit_by_bit() -> None:
    queue = FeatureQueue(5, 3, 0.99)
    for step in range(4):
        queue.push(torch.randn(2, 3), torch.tensor([step, -step]))
    data = io.BytesIO()
    torch.save(queue.state_dict(), data)
    data.seek(0)
    other = FeatureQueue(5, 3, 0.99)
    other.load_state_dict(torch.load(data, weights_only=True))
    for each in (queue, other):
        each.push(torch.ones(1, 3), torch.tensor([77]))
    one, two = stored(queue), stored(other)
    assert (one.ids, one.weights) == (two.ids, two.weights)
    assert torch.equal(torch.stack(one.features), torch.stack(two.features))
    assert torch.equal(copy.deepcopy(queue).features, queue.features)
