"""Log-spaced continuous position bias (Log-CPB, Sec. 3.3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..ops.autocast import no_autocast
from ..ops.coordinates import log_spaced_coords
from ..ops.tracing import are_plain, has_global_hooks, has_hooks, is_capturing, is_counting_flops, is_transformed

_optimizer_steps = 0


@register_optimizer_step_post_hook
def _count_step(*_) -> None:
    """Invalidate all caches: sharded optimizers write weights without incrementing their version counters."""
    global _optimizer_steps
    _optimizer_steps += 1


class LogCPB(nn.Sequential):
    """MLP from log-spaced relative coordinates to a position bias for each head (Sec. 3.3).

    The bias is a continuous function of the coordinates, so the weights transfer to any window size if the coordinates
    stay scaled by the pre-training window. That window is a buffer, because it belongs to the weights: checkpoints, EMA
    copies and process groups keep both together.

    Without gradients, the bias is cached. It is recomputed after an optimizer step, after each call of `train`, `eval`,
    `to` and `load_state_dict`, and after weights were replaced or changed in place. An in-place change that increments
    no version counter (through `weight.data` or by `torch.distributed`) is not noticed until the next of these events.
    Layers that were replaced, or that have hooks or parametrizations, are called each time.

    Args:
        window_size: Tokens of a window along each axis.
        pretrained_window_size: Window size that the weights were pre-trained with, along each axis.
        num_heads: Number of attention heads.
    """

    def __init__(self, window_size: tuple[int, ...], pretrained_window_size: tuple[int, ...], num_heads: int) -> None:
        super().__init__(nn.Linear(len(window_size), 512), nn.ReLU(), nn.Linear(512, num_heads, bias=False))
        self.window_size = window_size
        self._cache = None
        self._initial_window_size = pretrained_window_size
        self.register_buffer('pretrained_window_size', torch.tensor(pretrained_window_size))

    def reset_pretrained_window_size(self) -> None:
        """Reset the buffer to the argument of the constructor, for newly initialised weights."""
        with torch.no_grad():
            self.pretrained_window_size.copy_(torch.tensor(self._initial_window_size))

    def forward(self) -> Tensor:
        """Bias of every relative position: (heads, prod(2 * window - 1)), between 0 and 16."""
        needs_grad = torch.is_grad_enabled() and any(weight.requires_grad for weight in self.parameters())
        return self._compute() if needs_grad or not self._is_plain() else self._cached()

    def _is_plain(self) -> bool:
        """Whether the bias may be cached: it depends only on the weights, and PyTorch runs this module eagerly."""
        if is_capturing() or is_transformed() or is_counting_flops() or has_hooks(self) or has_global_hooks():
            return False
        as_built = are_plain(self, (nn.Linear, nn.ReLU, nn.Linear)) and self[2].bias is None
        return as_built and all(map(_is_plain_weight, self._weights()))

    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self[0].weight, self[0].bias, self[2].weight

    def _cached(self) -> Tensor:
        """Bias without gradient, recomputed if the weights have changed."""
        sources = *self._weights(), self.pretrained_window_size
        key = _optimizer_steps, *map(_version, sources)
        cache = self._cache  # read once: another thread may replace it
        if cache is None or cache[0] != key:
            # a tensor cached in inference mode could not be used in training later
            with torch.inference_mode(False), torch.no_grad():
                bias = self._compute()
            # the key contains addresses of storages; holding these keeps their addresses from being reused
            cache = self._cache = key, bias, [source.untyped_storage() for source in sources]
        return cache[1]

    def _compute(self) -> Tensor:
        # not a buffer: it would have to be updated with every change of the window and deferred initialisation
        coords = log_spaced_coords(self.window_size, self.pretrained_window_size)
        # PyTorch's CPU kernels compute the last elements of a tensor, which do not fill a vector register, with another
        # routine that may differ in the last bit. Padding the rows avoids it: the bias is bitwise equal to that of the
        # official code, which applies the sigmoid after the gather.
        rows = F.pad(coords, (0, 0, 0, -len(coords) % 64))
        # quantized layers have no floating-point parameters, and take float32
        dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), rows.dtype)
        with no_autocast(rows.device):
            bias = 16 * super().forward(rows.to(dtype)).sigmoid()
        return bias[: len(coords)].T

    def __getstate__(self) -> dict:
        """Drop the cache from copies and pickles: its key contains memory addresses."""
        return {**vars(self), '_cache': None}

    def train(self, mode: bool = True) -> 'LogCPB':
        """Set the mode, and drop the cache: mmengine's EMAHook swaps weights before it."""
        self._cache = None
        return super().train(mode)

    def _apply(self, *args, **kwargs) -> 'LogCPB':
        self._cache = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._cache = None
        super()._load_from_state_dict(*args, **kwargs)


def _is_plain_weight(weight: Tensor) -> bool:
    """Whether a weight is an ordinary parameter, whose version counter is incremented with each in-place change.

    Not so with views of FSDP's flat buffers, any tensors of `functional_call`, and tensors of inference mode.
    """
    kinds = nn.Parameter, FakeTensor  # a fake parameter must take the same branches as the real one
    return type(weight) in kinds and not weight.is_meta and not weight.is_inference()


def _version(tensor: Tensor) -> tuple[int, int, int]:
    """Key that changes when a tensor gets other memory or is changed in place."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor._version
