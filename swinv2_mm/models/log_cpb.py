"""Log-spaced continuous position bias."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..ops.autocast import no_autocast
from ..ops.coordinates import log_spaced_coords
from ..ops.recording import are_plain, has_hooks, has_hooks_of_all, is_counted, is_recorded, is_transformed

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

    Without gradients, the bias is computed once for the same weights. It is computed anew after an optimizer step,
    after each call of `train`, `eval`, `to` and `load_state_dict`, and after weights were replaced or changed in place.
    What PyTorch cannot see, an in-place change through `weight.data` or by `torch.distributed` with none of these after
    it, goes unnoticed.
    Layers that were replaced, or that have hooks or parametrizations, are called each time.

    Args:
        window_size: Tokens of a window along each axis.
        pretrained_window_size: Window that the weights were learnt with, along each axis.
        num_heads: Number of attention heads.
    """

    def __init__(self, window_size: tuple[int, ...], pretrained_window_size: tuple[int, ...], num_heads: int) -> None:
        super().__init__(nn.Linear(len(window_size), 512), nn.ReLU(), nn.Linear(512, num_heads, bias=False))
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
        learns = torch.is_grad_enabled() and any(weight.requires_grad for weight in self.parameters())
        return self._compute() if learns or not self._is_plain() else self._cached()

    def _is_plain(self) -> bool:
        """Whether the weights alone decide the bias, and PyTorch runs this module as it is."""
        if is_recorded() or is_transformed() or is_counted() or has_hooks(self) or has_hooks_of_all():
            return False
        as_built = are_plain(self, (nn.Linear, nn.ReLU, nn.Linear)) and self[2].bias is None
        return as_built and all(map(_is_plain_weight, self._weights()))

    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self[0].weight, self[0].bias, self[2].weight

    def _cached(self) -> Tensor:
        """Bias without gradient, computed if it is not that of the weights as they are now."""
        sources = *self._weights(), self.pretrained_window_size
        key = _optimizer_steps, *map(_version, sources)
        cache = self._cache  # once, since another thread may replace it
        if cache is None or cache[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # what is made here may be used in training too
                bias = self._compute()
            # with the storages that the key stands for: as long as they are held, no other one gets their addresses
            cache = self._cache = key, bias, [source.untyped_storage() for source in sources]
        return cache[1]

    def _compute(self) -> Tensor:
        # computed, not stored: a buffer would have to follow every window change and every deferred initialisation
        coords = log_spaced_coords(self.window_size, self.pretrained_window_size)
        # PyTorch's CPU kernels compute the last few elements of a tensor by another routine, one bit off; rows of
        # padding keep them out, so that the bias is the official one to the last bit although the sigmoid comes before
        # the gather
        rows = F.pad(coords, (0, 0, 0, -len(coords) % 64))
        # quantized layers have no parameters, and take float32
        dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), rows.dtype)
        with no_autocast(rows.device):
            bias = 16 * super().forward(rows.to(dtype)).sigmoid()
        return bias[: len(coords)].T

    def __getstate__(self) -> dict:
        """Leave the cache out of copies and pickles: it holds memory that is known by its address."""
        return {**vars(self), '_cache': None}

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


def _is_plain_weight(weight: Tensor) -> bool:
    """Tell whether a weight is a parameter of its own, which keeps its memory, and whose version counts its changes.

    FSDP has parts of its buffers instead, `functional_call` may have any tensor, and inference mode counts nothing.
    """
    kinds = nn.Parameter, FakeTensor  # a fake one has to behave as what it stands for
    return type(weight) in kinds and not weight.is_meta and not weight.is_inference()


def _version(tensor: Tensor) -> tuple[int, int, int]:
    """What changes when a tensor gets other memory or is written to."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor._version
