"""Window attention as a module: projections, scale and position bias around `swinv2_mm.ops.window_attention`."""

import math

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.window_attention import check_backend, window_attention
from ..ops.windows import pad_to_windows
from .log_cpb import LogCPB

# depend on the size of the map, which a symbolic trace does not know
torch.fx.wrap('crop')
torch.fx.wrap('pad_to_windows')
torch.fx.wrap('window_attention')


class QKVLinear(nn.Linear):
    """A linear layer without a bias of its own, which may be given one together with the input."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.weight, bias)


class WindowAttention(nn.Module):
    """Scaled cosine attention within shifted windows, with Log-CPB (Sec. 3.2 and 3.3).

    Args:
        dim: Channels.
        num_heads: Attention heads; must divide `dim`.
        window_size: Tokens of a window along each axis.
        shift_size: Shift of the windows along each axis.
        pretrained_window_size: Window that the position bias was learnt with, along each axis.
        mask_padding: Whether tokens added by padding are excluded. If not, they are attended as tokens of value zero,
            the convention of Swin's dense code; a map smaller than the window is then padded up to it.
        backend: Backend of `swinv2_mm.ops.window_attention`.
        sequential: Whether windows are attended a few at a time, see `swinv2_mm.ops.window_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: tuple[int, ...],
        shift_size: tuple[int, ...],
        pretrained_window_size: tuple[int, ...],
        mask_padding: bool = True,
        backend: str = 'auto',
        sequential: bool = False,
    ) -> None:
        super().__init__()
        check_backend(backend)
        self.num_heads = num_heads
        self.window_size = window_size
        self.shift_size = shift_size
        self.mask_padding = mask_padding
        self.backend = backend
        self.sequential = sequential
        self.logit_scale = nn.Parameter(torch.empty(num_heads, 1, 1))
        self.cpb_mlp = LogCPB(window_size, pretrained_window_size, num_heads)
        self.qkv = QKVLinear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.empty(dim))
        self.v_bias = nn.Parameter(torch.empty(dim))
        self.proj = nn.Linear(dim, dim)
        self.reset_scale_and_biases()

    def reset_scale_and_biases(self) -> None:
        """Initialise the parameters that are this module's own."""
        nn.init.constant_(self.logit_scale, math.log(10))
        nn.init.zeros_(self.q_bias)
        nn.init.zeros_(self.v_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within windows: (B, *S, C) -> (B, *S, C)."""
        tokens = x if self.mask_padding else pad_to_windows(x, self.window_size)
        out = window_attention(
            self._project(tokens).unflatten(-1, (3, self.num_heads, -1)),
            self.logit_scale,
            self.cpb_mlp(),
            self.window_size,
            self.shift_size,
            backend=self.backend,
            sequential=self.sequential,
        )
        return self.proj(out if self.mask_padding else crop(out, x))

    def _project(self, x: Tensor) -> Tensor:
        """Queries, keys and values: (..., C) -> (..., 3C)."""
        # queries and values have a bias, keys have none
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        if type(self.qkv).forward is QKVLinear.forward and 'forward' not in vars(self.qkv):
            return self.qkv(x, bias=bias)  # which adds it as the official code does, to the last bit
        return self.qkv(x) + bias  # an adapter, or another layer in its place


def crop(x: Tensor, like: Tensor) -> Tensor:
    """Take off what padding has added at the end of the axes of a map (B, *S, C)."""
    return x[(slice(None), *(slice(size) for size in like.shape[1:-1]))]
