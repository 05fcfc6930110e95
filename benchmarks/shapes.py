"""The backbones, input sizes and types that are benchmarked, and the FLOP they take."""

import math
from dataclasses import dataclass

import torch

from swinv2_mm.models.sizes import ARCHS

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


@dataclass(frozen=True)
class Shape:
    """A backbone and the size of its input.

    Attributes:
        arch: As `swinv2_mm.models.SwinTransformerV2` takes it, as a dict.
        size: Pixels of the input along each axis, frames first.
        window: Tokens of a window along each axis.
        patch: Pixels of a patch along each axis.
    """

    arch: dict
    size: tuple[int, ...]
    window: tuple[int, ...]
    patch: tuple[int, ...] = (4, 4)

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each stage."""
        return tuple(self.arch['depths'])

    def dim(self, stage: int) -> int:
        """Channels of a stage."""
        return self.arch['embed_dims'] * 2**stage

    def spatial_shape(self, stage: int) -> tuple[int, ...]:
        """Tokens of a stage along each axis; height and width are merged, time is not."""
        tokens = [-(-pixels // p) for pixels, p in zip(self.size, self.patch, strict=True)]
        return *tokens[:-2], *(-(-t // 2**stage) for t in tokens[-2:])

    def effective_window(self, stage: int) -> tuple[int, ...]:
        """Window of a stage: no larger than its feature map."""
        return tuple(min(pair) for pair in zip(self.spatial_shape(stage), self.window, strict=True))

    def is_padded(self) -> bool:
        """Whether the input is no multiple of the patch, or a feature map no multiple of the window."""
        pairs = [(self.size, self.patch)]
        pairs += [(self.spatial_shape(i), self.effective_window(i)) for i in range(len(self.depths))]
        return any(size % part for sizes, parts in pairs for size, part in zip(sizes, parts, strict=True))

    def logits(self, stage: int) -> int:
        """Attention logits of one block of a stage, for one image: windows x heads x N x N."""
        window = self.effective_window(stage)
        windows = math.prod(-(-s // w) for s, w in zip(self.spatial_shape(stage), window, strict=True))
        return windows * self.arch['num_heads'][stage] * math.prod(window) ** 2

    def attention_flops(self, stage: int) -> int:
        """FLOP of the attention half of a block, forward, two for each multiply-add; padding does not count."""
        tokens, dim = math.prod(self.spatial_shape(stage)), self.dim(stage)
        return 2 * tokens * (4 * dim**2 + 2 * math.prod(self.effective_window(stage)) * dim)

    def flops(self) -> int:
        """FLOP of the whole forward pass, without the small MLP of the position bias."""
        total = 2 * math.prod(self.spatial_shape(0)) * self.dim(0) * 3 * math.prod(self.patch)
        for stage, depth in enumerate(self.depths):
            tokens, dim = math.prod(self.spatial_shape(stage)), self.dim(stage)
            total += depth * (self.attention_flops(stage) + 2 * tokens * 8 * dim**2)
            if stage:
                total += 2 * tokens * 2 * dim * dim  # patch merging: 4 of half the channels each -> 1
        return total


def _square(arch: str, window: int, size: int) -> Shape:
    return Shape(ARCHS[arch], (size, size), (window, window))


SHAPES = {
    'nano': Shape(dict(embed_dims=32, depths=(2, 1), num_heads=(1, 2)), (64, 64), (8, 8)),  # to try the commands
    't_w8_256': _square('tiny', 8, 256),
    'b_w8_256': _square('base', 8, 256),
    'b_w16_256': _square('base', 16, 256),
    'b_w24_384': _square('base', 24, 384),
    'l_w24_384': _square('large', 24, 384),
    'b_w32_1024': _square('base', 32, 1024),
    'b_w32_800x1333': Shape(ARCHS['base'], (800, 1333), (32, 32)),
    'video_t_224x224x8': Shape(ARCHS['tiny'], (8, 224, 224), (8, 7, 7), (1, 4, 4)),
    'video_t_320x320x8': Shape(ARCHS['tiny'], (8, 320, 320), (8, 20, 20), (1, 4, 4)),
    # one block of the first stage of SwinV2-G; its eager attention takes 29 GB in float32
    'g_block_1536_w32': Shape(dict(embed_dims=512, depths=(1,), num_heads=(16,)), (1536, 1536), (32, 32)),
}


def default_batch(shape: Shape, device: str) -> int:
    """Images of a step on a device, 'cuda' or 'cpu'."""
    side = max(shape.size)
    if device == 'cuda':
        return 32 if side <= 256 else 16 if side <= 384 and len(shape.size) == 2 else 1
    return 4 if side <= 256 else 2 if side <= 384 and len(shape.size) == 2 else 1
