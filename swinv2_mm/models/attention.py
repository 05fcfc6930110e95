"""Window attention as a module: its parameters and projections around `swinv2_mm.ops.window_attention`."""

import math

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.window_attention import check_backend, window_attention
from ..ops.windows import pad_to_windows
from .log_cpb import LogCPB

# leaf functions of torch.fx: they depend on the spatial shape, which a symbolic trace does not know
torch.fx.wrap('crop')
torch.fx.wrap('pad_to_windows')
torch.fx.wrap('window_attention')


class QKVLinear(nn.Linear):
    """A linear layer that takes its bias as an argument."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., in) -> (..., out); bias (out,)."""
        return F.linear(x, self.weight, bias)


class WindowAttention(nn.Module):
    """Scaled cosine attention within shifted windows, with Log-CPB (Sec. 3.2 and 3.3).

    Args:
        dim: Channels.
        num_heads: Attention heads; must divide `dim`.
        window_size: Tokens of a window along each axis.
        shift_size: Shift of the windows along each axis.
        pretrained_window_size: Window size that the position bias was pre-trained with, along each axis.
        mask_padding: Whether padding is masked. If not, padded tokens are zeros before the projection and take part in
            attention, as in Swin's dense code; a feature map smaller than the window is then padded up to it.
        backend: Backend of `swinv2_mm.ops.window_attention`.
        sequential: Whether to compute a few windows at a time, see `swinv2_mm.ops.window_attention`.
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
        """Initialise the parameters that belong to no submodule."""
        nn.init.constant_(self.logit_scale, math.log(10))
        nn.init.zeros_(self.q_bias)
        nn.init.zeros_(self.v_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *S, C) -> (B, *S, C)."""
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
        # queries and values have a bias, keys do not
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        if type(self.qkv).forward is QKVLinear.forward and 'forward' not in vars(self.qkv):
            return self.qkv(x, bias=bias)  # F.linear adds it as in the official code: bitwise equal
        return self.qkv(x) + bias  # a replaced or adapted layer, such as LoRA, takes no bias


def crop(x: Tensor, like: Tensor) -> Tensor:
    """Crop a padded feature map (B, *S, C) to the spatial shape of `like`."""
    return x[(slice(None), *(slice(size) for size in like.shape[1:-1]))]
