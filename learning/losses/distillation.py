"""R2D2's two-way distillation (Sec. 3.3): soft targets, and features, of a momentum teacher."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from learning.losses.contrastive import Queue, widened


def target_guided_rows(
    queries_bd: Float[Tensor, "b d"],
    keys_nd: Float[Tensor, "n d"],
    teacher_bd: Float[Tensor, "b d"],
    temperature: Float[Tensor, ""] | float,
    alpha: float,
    positive_bn: Bool[Tensor, "b n"],
    queue: Queue | None = None,
    positive_bm: Bool[Tensor, "b m"] | None = None,
) -> Float[Tensor, " b"]:
    """Target-guided distillation of some queries against all keys, a query at a time (Eq. 4, 5).

    -Σ_j w_j ŷ_j log s_j,   s = softmax_j(q·k_j/τ),   ŷ = α softmax_j(t·k_j/τ) + (1 - α) y

    j goes over the batch's keys (w = 1) and the queue's; y is even over the positives (`positive_bn` in the
    batch, `positive_bm` in the queue). The teacher's rows t, its soft-max and the queue get no gradient. A
    key of weight 0 is not there. Embeddings have unit length. Half precision is computed in fp32.
    """
    # The paper does not say how L_w is normalised: as a cross-entropy with class weights and soft targets
    # is, by the number of queries alone. The weights do not enter s.
    queries_bd, keys_nd, teacher_bd = widened(queries_bd), widened(keys_nd), widened(teacher_bd)
    all_keys, weights, positive = keys_nd, keys_nd.new_ones(len(keys_nd)), positive_bn
    if queue is not None:
        all_keys = torch.cat([keys_nd, queue.keys_md.detach().to(keys_nd.dtype)])
        stored = torch.ones_like(queue.keys_md[:, 0]) if queue.weights_m is None else queue.weights_m.detach()
        weights = torch.cat([weights, stored.to(weights.dtype)])
        same = positive_bn.new_zeros((len(queries_bd), len(stored))) if positive_bm is None else positive_bm
        positive = torch.cat([positive_bn, same], dim=1)
    absent = weights == 0
    log_s = (queries_bd @ all_keys.T / temperature).masked_fill(absent, -torch.inf).log_softmax(dim=1)
    with torch.no_grad():
        soft = (teacher_bd @ all_keys.T / temperature).masked_fill(absent, -torch.inf).softmax(dim=1)
        hard = (positive & ~absent).to(soft.dtype)
        target = weights * (alpha * soft + (1 - alpha) * hard / hard.sum(dim=1, keepdim=True))
    return -(target * log_s.masked_fill(absent, 0.0)).sum(dim=1)


def feature_guided_rows(
    student_bd: Float[Tensor, "b d"],
    teacher_bd: Float[Tensor, "b d"],
    centre_d: Float[Tensor, " d"],
    student_temperature: float,
    teacher_temperature: float,
) -> Float[Tensor, " b"]:
    """Feature-guided distillation, a row at a time: the cross-entropy of P_s by P_t (Eq. 6, 7).

    P_t = softmax((f_t - μ)/τ_t) gets no gradient, P_s = softmax(f_s/τ_s) is not centred. Half precision is
    computed in fp32.
    """
    student_bd, teacher_bd = widened(student_bd), widened(teacher_bd).detach()
    target = ((teacher_bd - centre_d.to(teacher_bd.dtype)) / teacher_temperature).softmax(dim=1)
    return -(target * F.log_softmax(student_bd / student_temperature, dim=1)).sum(dim=1)
