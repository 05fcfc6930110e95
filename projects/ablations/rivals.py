"""What Swin V2 replaced, for comparison: other position biases, dot-product attention, pre-norm (Tables 1 and 6)."""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinv2_mm.models.attention import WindowAttention
from swinv2_mm.models.block import SwinBlock, SwinStage
from swinv2_mm.models.log_cpb import LogCPB
from swinv2_mm.ops.windows import (
    attention_mask,
    fit_window,
    partition,
    relative_position_index,
    reverse,
    token_regions,
)

# ---------------------------------------------------------------- position biases


class LinearCPB(nn.Sequential):
    """Linear-spaced continuous position bias: the MLP of Log-CPB on coordinates without the logarithm (Table 1).

    Args:
        log_cpb: The Log-CPB to replace; its layers are reused.
    """

    def __init__(self, log_cpb: LogCPB) -> None:
        super().__init__(*log_cpb)
        self.window_size = log_cpb.window_size
        self.pretrained_window_size = tuple(log_cpb.pretrained_window_size.tolist())

    def forward(self) -> Tensor:
        """Bias of every relative position: (heads, prod(2 * window - 1)), between 0 and 16."""
        sizes = zip(self.window_size, self.pretrained_window_size, strict=True)
        # the largest offset of the training window is 1
        axes = [torch.arange(1 - w, w, dtype=torch.float32) / max(p - 1, 1) for w, p in sizes]
        coords = torch.stack(torch.meshgrid(*axes, indexing='ij'), -1).flatten(0, -2)
        return 16 * super().forward(coords).sigmoid().T


class TableBias(nn.Module):
    """Parameterized position bias, interpolated for larger windows as in Swin V1 (Table 1, "parameterized").

    As in Log-CPB the bias is 16 * sigmoid of a table, which starts at zero, a bias of 8, as the MLPs nearly do. The
    table is 10 times its parameters: AdamW moves each of them by at most the learning rate, while in an MLP the steps
    of many weights add up. Without this factor, the bias learns too slowly for a short training.

    Args:
        log_cpb: The Log-CPB to replace.
    """

    def __init__(self, log_cpb: LogCPB) -> None:
        super().__init__()
        self.window_size = log_cpb.window_size
        self.pretrained_window_size = tuple(log_cpb.pretrained_window_size.tolist())
        heads = log_cpb[2].out_features
        self.table = nn.Parameter(torch.zeros(heads, math.prod(2 * p - 1 for p in self.pretrained_window_size)))

    def forward(self) -> Tensor:
        """Bias of every relative position: (heads, prod(2 * window - 1)), between 0 and 16."""
        bias = 16 * (10 * self.table).sigmoid()
        if self.window_size == self.pretrained_window_size:
            return bias
        grid = bias.unflatten(1, [2 * p - 1 for p in self.pretrained_window_size])
        return F.interpolate(grid[None], [2 * w - 1 for w in self.window_size], mode='bicubic')[0].flatten(1)


class NoBias(nn.Module):
    """No position bias, to measure how much the task and a trained model depend on it.

    Args:
        bias: The module to replace.
    """

    def __init__(self, bias: nn.Module) -> None:
        super().__init__()
        self.register_buffer('zeros', torch.zeros_like(bias().detach()), persistent=False)

    def forward(self) -> Tensor:
        """Zero for every relative position: (heads, prod(2 * window - 1))."""
        return self.zeros


def replace_bias(model: nn.Module, kind: Callable[[nn.Module], nn.Module]) -> None:
    """Replace the position bias of every block."""
    for attention in attentions(model):
        attention.cpb_mlp = kind(attention.cpb_mlp)


def attentions(model: nn.Module) -> Iterator[WindowAttention]:
    """All attention modules of a model, in the order of the blocks."""
    return (module for module in model.modules() if isinstance(module, WindowAttention))


# ---------------------------------------------------------------- attention and norms


def dot_product_attention(qkv: Tensor, bias_table: Tensor, window_size: tuple, shift_size: tuple) -> Tensor:
    """Dot-product attention of Swin V1 within shifted windows; arguments as in `swinv2_mm.ops.window_attention`.

    The window size must divide the feature map.
    """
    spatial_shape = tuple(qkv.shape[1:3])
    window, shift = fit_window(spatial_shape, window_size, shift_size)
    windows = partition(qkv.roll([-d for d in shift], (1, 2)), window)
    q, k, v = windows.permute(2, 0, 3, 1, 4)  # each (windows, heads, N, head_dim)
    bias = bias_table[:, relative_position_index(window)]
    regions = token_regions(spatial_shape, spatial_shape, window, shift)
    if regions is not None:
        mask = attention_mask(regions)[:, None]
        bias = (bias + mask).repeat(len(qkv), 1, 1, 1)  # one for each window of the batch
    out = F.scaled_dot_product_attention(q, k, v, bias)
    return reverse(out.transpose(1, 2).flatten(2), window, spatial_shape).roll(shift, (1, 2))


class DotProductAttention(nn.Module):
    """Attention as in Swin V1: logits are dot products, scaled by 1 / sqrt(head_dim).

    Args:
        cosine: The attention to replace; its projections and position bias are reused.
    """

    def __init__(self, cosine: WindowAttention) -> None:
        super().__init__()
        self.cosine = cosine
        cosine.logit_scale = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        own = self.cosine
        # without a bias of the keys: it adds the same to all logits of a query
        bias = torch.cat((own.q_bias, torch.zeros_like(own.v_bias), own.v_bias))
        qkv = own.qkv(x, bias).unflatten(-1, (3, own.num_heads, -1))
        return own.proj(dot_product_attention(qkv, own.cpb_mlp(), own.window_size, own.shift_size))


class PreNormBlock(nn.Module):
    """Block as in Swin V1: a norm before attention and MLP, none after them.

    Args:
        block: The block to replace; its layers are reused.
    """

    def __init__(self, block: SwinBlock) -> None:
        super().__init__()
        self.attn, self.norm1, self.mlp, self.norm2 = block.attn, block.norm1, block.mlp, block.norm2

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def use_dot_product(model: nn.Module) -> None:
    """Replace the attention of every block by dot-product attention."""
    for block in blocks(model):
        block.attn = DotProductAttention(block.attn)


def use_pre_norm(model: nn.Module) -> None:
    """Replace every block by one with pre-norm."""
    for stage in stages(model):
        stage.blocks = nn.ModuleList(map(PreNormBlock, stage.blocks))


def stages(model: nn.Module) -> Iterator[SwinStage]:
    """The stages of a model."""
    return (module for module in model.modules() if isinstance(module, SwinStage))


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of all stages, by depth."""
    return [block for stage in stages(model) for block in stage.blocks]
