"""Window attention as a module: projections, scale and position bias around `swinv2_mm.ops.window_attention`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.window_attention import check_backend, window_attention
from ..ops.windows import pad_to_windows
from .log_cpb import LogCPB


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
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
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
        map_size = x.shape[1:-1]
        if not self.mask_padding:
            x = pad_to_windows(x, self.window_size)
        # queries and values have a bias, keys have none
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))
        out = window_attention(
            qkv,
            self.logit_scale,
            self.cpb_mlp(),
            self.window_size,
            self.shift_size,
            backend=self.backend,
            sequential=self.sequential,
        )
        return self.proj(out[(slice(None), *(slice(s) for s in map_size))])
