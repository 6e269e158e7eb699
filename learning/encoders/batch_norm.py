"""Batch normalisation by the statistics of the global batch, with gradient, on any device and backend."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from learning.training.distributed import gather, world_size


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose mean and variance in training are those of all ranks' batches together.

    Value and gradients equal one process on the joined batch. torch's SyncBatchNorm does this on GPUs alone.
    `drop` and `act` are what timm's fused layers do after the normalisation; they hold no parameters.
    """

    def __init__(self, like: nn.BatchNorm2d):
        super().__init__(like.num_features, like.eps, like.momentum, like.affine, like.track_running_stats)
        self.weight, self.bias = like.weight, like.bias
        for name, value in like.named_buffers(recurse=False):
            setattr(self, name, value)
        self.train(like.training)
        from timm.layers import BatchNormAct2d  # not with this module, as in learning/encoders/vision.py

        fused = isinstance(like, BatchNormAct2d)  # timm's layer with its activation inside
        after = like._modules if fused else {}
        self.drop = after.get("drop") or nn.Identity()
        self.act = after.get("act") or nn.Identity()

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        if not self.training or world_size() == 1:
            return self.act(self.drop(super().forward(input)))
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        mean_c, variance_c, count = self._statistics(wide)
        if self.track_running_stats:
            self._remember(mean_c.detach(), variance_c.detach(), count)
        scale_c = torch.rsqrt(variance_c + self.eps)
        if self.affine:
            scale_c = scale_c * self.weight
        shift_c = -mean_c * scale_c if self.bias is None else self.bias - mean_c * scale_c
        # one multiply-add, so that backward keeps the input alone, as the fused kernel does
        normal = torch.addcmul(_by_channel(shift_c), wide, _by_channel(scale_c))
        return self.act(self.drop(normal.to(input.dtype)))

    @staticmethod
    def _statistics(x_bchw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and biased variance by channel, and the count of values a channel, over all ranks.

        Ranks' means and variances are joined, not sums of squares: those cancel in fp32.
        """
        variance_c, mean_c = torch.var_mean(x_bchw, dim=(0, 2, 3), correction=0)
        count = x_bchw.new_full((1,), x_bchw.numel() / x_bchw.shape[1])
        ranks = gather(torch.cat([mean_c, variance_c, count])[None])
        means_rc, variances_rc, counts_r = ranks.split([len(mean_c), len(mean_c), 1], dim=1)
        share_r = counts_r / counts_r.sum()
        mean_c = (share_r * means_rc).sum(dim=0)
        variance_c = (share_r * (variances_rc + (means_rc - mean_c) ** 2)).sum(dim=0)
        return mean_c, variance_c, counts_r.sum().detach()

    @torch.no_grad()
    def _remember(self, mean_c: Tensor, variance_c: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        counter, rate = self.num_batches_tracked, self.momentum
        if counter is not None:
            counter.add_(1)
        if rate is None:
            assert counter is not None
            rate = 1.0 / float(counter)
        unbiased_c = variance_c * (count / (count - 1))
        self.running_mean.lerp_(mean_c.to(self.running_mean.dtype), rate)
        self.running_var.lerp_(unbiased_c.to(self.running_var.dtype), rate)


def _by_channel(value_c: Tensor) -> Tensor:
    return value_c[None, :, None, None]


def make_global(module: nn.Module) -> None:
    """Replace every BatchNorm2d in `module`, in place, keeping weights, statistics and names."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, GlobalBatchNorm2d(child))
        else:
            make_global(child)


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Inside, the batch norms in `module` normalise as ever, but their running statistics stand still.

    For a forward that is run a second time: its batch has been counted.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # the statistics still go into the kernel, which saves what it saved the first time
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, counter) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counter
