"""Log-spaced continuous position bias."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..ops.coordinates import log_spaced_coords
from ..ops.recording import is_recorded

_optimizer_steps = 0


@register_optimizer_step_post_hook
def _count_step(*_) -> None:
    """Note that weights may have changed: sharded optimizers write them such that their version stays the same."""
    global _optimizer_steps
    _optimizer_steps += 1


class LogCPB(nn.Sequential):
    """The MLP that turns log-spaced relative coordinates into a position bias for each head (Sec. 3.3).

    It is continuous in the coordinates, so its weights serve any window size, as long as the coordinates are scaled by
    the window that they were learnt with. That window is a buffer: it belongs to the weights, and so it travels with
    them through checkpoints, EMA copies and process groups.

    The bias is computed once for the same weights, and the backward pass computes it again instead of keeping
    activations: so once per optimizer step, however many micro-batches and recomputed blocks use it, and once in eval
    mode. It is computed anew after an optimizer step, after each call of `train`, `eval`, `to` and `load_state_dict`,
    and after weights were replaced or changed in place. What PyTorch cannot see, an in-place change through
    `weight.data` with none of these after it, goes unnoticed.

    Args:
        window_size: Tokens of a window along each axis.
        pretrained_window_size: Window that the weights were learnt with, along each axis.
        num_heads: Number of attention heads.
    """

    def __init__(self, window_size: tuple[int, ...], pretrained_window_size: tuple[int, ...], num_heads: int) -> None:
        super().__init__(nn.Linear(len(window_size), 512), nn.ReLU(inplace=True), nn.Linear(512, num_heads, bias=False))
        self.window_size = window_size
        self._cache = None
        self._initial_window_size = pretrained_window_size
        self.register_buffer('pretrained_window_size', torch.tensor(pretrained_window_size))

    def reset_pretrained_window_size(self) -> None:
        """Return to the window of the constructor, as new weights need it."""
        with torch.no_grad():
            self.pretrained_window_size.copy_(torch.tensor(self._initial_window_size))

    def forward(self) -> Tensor:
        """Bias of every relative position: (heads, prod(2 * window - 1)), between 0 and 16."""
        weights = self[0].weight, self[0].bias, self[2].weight
        if is_recorded() or not all(map(_is_plain, weights)):
            return self._compute(*weights)
        return CachedBias.apply(self, *weights)

    def cached(self, *weights: Tensor) -> Tensor:
        """Bias without gradient, computed if it is not that of these weights."""
        key = _optimizer_steps, *map(_identity, (*weights, self.pretrained_window_size))
        if self._cache is None or self._cache[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # what is made here may be used in training too
                self._cache = key, self._compute(*weights)
        return self._cache[1]

    def _compute(self, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> Tensor:
        # computed, not stored: a buffer would have to follow every window change and every deferred initialisation
        coords = log_spaced_coords(self.window_size, self.pretrained_window_size)
        # PyTorch's CPU kernels compute the last few elements of a tensor by another routine, one bit off; rows of
        # padding keep them out, so that the bias is the official one to the last bit although the sigmoid comes before
        # the gather
        rows = F.pad(coords.to(weight1.dtype), (0, 0, 0, -len(coords) % 64))
        with torch.autocast(weight1.device.type, enabled=False):
            bias = 16 * F.linear(F.relu(F.linear(rows, weight1, bias1)), weight2).sigmoid()
        return bias[: len(coords)].T

    def train(self, mode: bool = True) -> 'LogCPB':
        """Set the mode; weights may have been exchanged before, as mmengine's EMAHook does it."""
        self._cache = None
        return super().train(mode)

    def _apply(self, *args, **kwargs) -> 'LogCPB':
        self._cache = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._cache = None
        super()._load_from_state_dict(*args, **kwargs)


class CachedBias(torch.autograd.Function):
    """The bias of a `LogCPB`, whose activations are computed again in the backward pass."""

    @staticmethod
    def forward(ctx, log_cpb: LogCPB, *weights: Tensor) -> Tensor:  # noqa: D102
        ctx.log_cpb = log_cpb
        ctx.save_for_backward(*weights)
        return log_cpb.cached(*weights).detach()  # autograd makes the result its own

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:  # noqa: D102
        weights = [w.detach().requires_grad_() for w in ctx.saved_tensors]
        with torch.enable_grad():
            bias = ctx.log_cpb._compute(*weights)
        return None, *torch.autograd.grad(bias, weights, grad)


def _is_plain(weight: Tensor) -> bool:
    """Tell whether a tensor has a storage and a version: no wrapper of tensors, nor made in inference mode."""
    kinds = Tensor, nn.Parameter, FakeTensor  # a fake one has to behave as what it stands for
    return type(weight) in kinds and not weight.is_meta and not weight.is_inference()


def _identity(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor._version
