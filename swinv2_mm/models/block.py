"""The res-post-norm block, its MLP, and the stage."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..openmmlab import DropPath
from ..ops.tracing import are_plain, has_global_hooks, is_capturing, is_compiling_or_tracing, is_transformed
from ..ops.triton import post_norm, selfcheck
from .attention import WindowAttention
from .patch import PatchMerging


def reset_layers(model: nn.Module) -> None:
    """Initialise all linear layers, norms and convolutions of a model as in the official code."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | nn.Conv2d | nn.Conv3d):
            module.reset_parameters()


# Tokens that an MLP takes at a time on a CPU, so that the hidden channels stay in its cache. Besides, glibc reuses the
# memory of tensors up to 32 MiB; larger ones are mapped anew by each operation, and the page faults cost more than the
# arithmetic.
CPU_TOKENS = 1024


class Mlp(nn.Module):
    """Two linear layers with GELU between them; the hidden dimension is 4 * dim."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        # replaced layers and hooks get all tokens at once, as on a GPU
        is_plain = are_plain((self.fc1, self.act, self.fc2), (nn.Linear, nn.GELU, nn.Linear))
        if is_capturing() or x.device.type != 'cpu' or not is_plain:
            return self._forward(x)
        tokens = x.flatten(0, -2)
        # chunks of equal size, because PyTorch rounds the product with a single row differently
        chunks = tokens.tensor_split(max(1, math.ceil(len(tokens) / CPU_TOKENS)))
        return torch.cat([self._forward(chunk) for chunk in chunks]).view(x.shape)

    def _forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SwinBlock(nn.Module):
    """Attention and MLP, each followed by a norm and then added to the main branch (res-post-norm, Sec. 3.2).

    Args:
        dim: Channels.
        drop_path: Probability of dropping a residual branch for a sample. DropPath follows the norm, so that a dropped
            branch adds nothing, not even the norm's bias.
        extra_norm: Whether the main branch is normalised at the end, as in every sixth block of H and G.
        **attention: Arguments of `WindowAttention`.
    """

    def __init__(self, dim: int, drop_path: float, extra_norm: bool, **attention) -> None:
        super().__init__()
        self.attn = WindowAttention(dim, **attention)
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.enorm = nn.LayerNorm(dim) if extra_norm else None
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, *S, C) -> (B, *S, C)."""
        x = self._add(x, self.attn(x), self.norm1)
        x = self._add(x, self.mlp(x), self.norm2)
        return x if self.enorm is None else self.enorm(x)

    def _add(self, x: Tensor, branch: Tensor, norm: nn.Module) -> Tensor:
        """Add a residual branch: both (B, *S, C)."""
        if not self._uses_triton(x, branch, norm):
            return x + self.drop_path(norm(branch))
        kept, keep_prob = None, 1 - getattr(self.drop_path, 'drop_prob', 0.0)
        if keep_prob < 1 and self.drop_path.training:  # the same random numbers as mmcv's DropPath
            shape = (len(branch),) + (1,) * (branch.dim() - 1)
            kept = (keep_prob + torch.rand(shape, dtype=post_norm.normed_dtype(branch), device=branch.device)).floor()
        return post_norm.add_post_norm(x, branch, norm.weight, norm.bias, norm.eps, kept, keep_prob)

    def _uses_triton(self, x: Tensor, branch: Tensor, norm: nn.Module) -> bool:
        """Whether one Triton kernel computes norm, drop path and addition.

        Not in a compiled model: Inductor fuses these with the operators around them, and cannot fuse across a custom
        operator.
        """
        backend = getattr(self.attn, 'backend', '')
        if is_compiling_or_tracing() or is_transformed() or backend not in ('triton', 'auto'):
            return False
        modules, kinds = (norm, self.drop_path), (nn.LayerNorm, type(self.drop_path))
        if not are_plain(modules, kinds) or kinds[1] not in (DropPath, nn.Identity) or has_global_hooks():
            return False
        as_built = norm.normalized_shape == branch.shape[-1:] and norm.bias is not None
        if not as_built or post_norm.can_run(x, branch):
            return False
        return backend == 'triton' or selfcheck.why_not_post_norm(branch) is None


class SwinStage(nn.Module):
    """Blocks, every second one with shifted windows, and the patch merging before the next stage.

    Args:
        dim: Channels.
        drop_path: Drop-path rate of each block; its length is the depth.
        window_size: Tokens of a window along each axis.
        extra_norm_every_n_blocks: Normalise the main branch after every n-th block; 0 for never.
        downsample: Whether the stage has a `PatchMerging`, which the backbone calls after `forward`.
        with_cp: Whether to recompute the activations of each block in the backward pass (gradient checkpointing).
        **attention: Further arguments of `WindowAttention`.
    """

    def __init__(
        self,
        dim: int,
        drop_path: list[float],
        window_size: tuple[int, ...],
        extra_norm_every_n_blocks: int,
        downsample: bool,
        with_cp: bool,
        **attention,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        period = extra_norm_every_n_blocks
        self.blocks = nn.ModuleList(
            SwinBlock(
                dim,
                drop_path=rate,
                extra_norm=bool(period) and (i + 1) % period == 0,
                window_size=window_size,
                shift_size=tuple(w // 2 if i % 2 else 0 for w in window_size),
                **attention,
            )
            for i, rate in enumerate(drop_path)
        )
        self.downsample = PatchMerging(dim) if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, *S, C) -> (B, *S, C), before patch merging."""
        for block in self.blocks:
            # torch.func cannot differentiate through torch.utils.checkpoint
            recompute = self.with_cp and torch.is_grad_enabled() and not is_transformed()
            x = checkpoint_module(block, x) if recompute else block(x)
        return x


def checkpoint_module(module: nn.Module, x: Tensor) -> Tensor:
    """Call a module and recompute its activations in the backward pass, with the same random numbers.

    Without autocast's weight cache: it would keep the half-precision copies of all weights, half the size of the
    weights, until the end of the forward pass, and no weight is used twice in it.
    """
    with _no_autocast_cache():
        return checkpoint(module, x, use_reentrant=False)


@contextlib.contextmanager
def _no_autocast_cache() -> Iterator[None]:
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
