"""How the public implementations of Swin V2 are built: timm, transformers and torchvision.

They are optional, see requirements/peers.txt.
"""

import functools
import importlib
import math
from types import ModuleType

import peer_packages
import torch
import torch.nn.functional as F
from cases import NotSupportedError
from shapes import Shape
from torch import Tensor, nn


@functools.cache
def import_peer(module: str) -> ModuleType:
    """Import a module of timm, transformers or torchvision.

    Raises:
        NotSupportedError: It is not installed.
    """
    peer_packages.add_to_path()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise NotSupportedError(
            f'not supported: {error.name} is not installed; see requirements/peers.txt, or run make setup'
        ) from error


def check_shape(shape: Shape) -> None:
    """Check that the peers compute the same for a shape as this package.

    Raises:
        NotSupportedError: The shape has an axis for time, or is padded.
    """
    if len(shape.size) != 2:
        raise NotSupportedError('not supported: it takes only images')
    if shape.is_padded():
        raise NotSupportedError('not supported: its tokens attend to padding, which gives other features')


# ---------------------------------------------------------------- timm


def build_timm_backbone(shape: Shape) -> nn.Module:
    """The model without its classifier."""
    check_shape(shape)
    return import_peer('timm.models.swin_transformer_v2').SwinTransformerV2(
        img_size=shape.size,
        window_size=shape.window[0],
        num_classes=0,
        embed_dim=shape.arch['embed_dims'],
        depths=shape.depths,
        num_heads=shape.arch['num_heads'],
        drop_path_rate=0.0,
    )


class TimmAttention(nn.Module):
    """The attention half of timm's block.

    Args:
        block: timm's block, whose `attn` it takes.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        block.norm1 = block.norm2 = block.mlp = nn.Identity()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        return self.block._attn(x)

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """Weights under the names of this package."""
        return self.block.attn.state_dict(*args, **kwargs)


def build_timm_attention(shape: Shape, stage: int) -> nn.Module:
    """The same as `ours.build_attention`."""
    check_shape(shape)
    block = import_peer('timm.models.swin_transformer_v2').SwinTransformerV2Block(
        shape.dim(stage),
        shape.spatial_shape(stage),
        shape.arch['num_heads'][stage],
        window_size=shape.window,
        shift_size=tuple(w // 2 for w in shape.window),
    )
    return TimmAttention(block)


def use_sdpa(model: nn.Module) -> None:
    """Make timm's attention use `F.scaled_dot_product_attention`: the strongest baseline, and the obvious change."""
    module = import_peer('timm.models.swin_transformer_v2')
    for attention in model.modules():
        if type(attention) is module.WindowAttention:
            attention.__class__ = _sdpa_class()
            attention.cached_bias = None


@functools.cache
def _sdpa_class() -> type[nn.Module]:
    class SdpaWindowAttention(import_peer('timm.models.swin_transformer_v2').WindowAttention):
        """timm's attention with `F.scaled_dot_product_attention`; in eval mode its position bias is computed once."""

        def train(self, mode: bool = True) -> nn.Module:
            self.cached_bias = None
            super().train(mode)
            if not mode:
                with torch.no_grad():
                    self.cached_bias = self.bias()
            return self

        def bias(self) -> Tensor:
            table = 16 * self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads).sigmoid()
            tokens = math.prod(self.window_size)
            return table[self.relative_position_index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1).contiguous()

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            count, tokens, dim = x.shape
            qkv = F.linear(x, self.qkv.weight, torch.cat((self.q_bias, self.k_bias, self.v_bias)))
            q, k, v = qkv.reshape(count, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            q = F.normalize(q, dim=-1) * self.logit_scale.clamp(max=math.log(100)).exp()
            q, k = q.to(v.dtype), F.normalize(k, dim=-1).to(v.dtype)
            bias = (self.bias() if self.cached_bias is None else self.cached_bias).to(v.dtype)
            if mask is not None:  # windows become heads, so that the mask need not be repeated for each image
                bias = (bias + mask[:, None].to(v.dtype)).flatten(0, 1)
                q, k, v = (t.reshape(-1, len(bias), tokens, t.shape[-1]) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None], scale=1.0)
            out = out.reshape(count, self.num_heads, tokens, -1)
            return self.proj(out.transpose(1, 2).reshape(count, tokens, dim))

    return SdpaWindowAttention


# ---------------------------------------------------------------- transformers and torchvision


def build_transformers_backbone(shape: Shape) -> nn.Module:
    """The model without pooling."""
    check_shape(shape)
    transformers = import_peer('transformers')
    config = transformers.Swinv2Config(
        image_size=shape.size[0],
        window_size=shape.window[0],
        embed_dim=shape.arch['embed_dims'],
        depths=list(shape.depths),
        num_heads=list(shape.arch['num_heads']),
        drop_path_rate=0.0,
    )
    return transformers.Swinv2Model(config, add_pooling_layer=False)


def build_torchvision_backbone(shape: Shape) -> nn.Module:
    """The model without its classifier."""
    check_shape(shape)
    _check_windows(shape, range(len(shape.depths)))
    peer = import_peer('torchvision.models.swin_transformer')
    model = peer.SwinTransformer(
        [4, 4],
        shape.arch['embed_dims'],
        shape.depths,
        shape.arch['num_heads'],
        list(shape.window),
        stochastic_depth_prob=0.0,
        block=peer.SwinTransformerBlockV2,
        downsample_layer=peer.PatchMergingV2,
    )
    model.head = nn.Identity()
    return model


def build_torchvision_attention(shape: Shape, stage: int) -> nn.Module:
    """The same as `ours.build_attention`."""
    check_shape(shape)
    _check_windows(shape, [stage])
    attention = import_peer('torchvision.models.swin_transformer').ShiftedWindowAttentionV2
    window, shift = list(shape.window), [w // 2 for w in shape.window]
    return attention(shape.dim(stage), window, shift, shape.arch['num_heads'][stage])


def _check_windows(shape: Shape, stages: list[int] | range) -> None:
    if any(shape.effective_window(i) != shape.window for i in stages):
        raise NotSupportedError('not supported: it pads maps smaller than the window, and attends to the padding')
