"""The residual post-norm block and the stage made of it."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..openmmlab import DropPath
from ..ops.recording import are_plain, has_hooks_of_all, is_graphed, is_recorded, is_transformed
from ..ops.triton import post_norm, selfcheck
from .attention import WindowAttention
from .patch import PatchMerging


def reset_layers(model: nn.Module) -> None:
    """Draw the weights of all linear layers, norms and convolutions inside a model as the official code does."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | nn.Conv2d | nn.Conv3d):
            module.reset_parameters()


# Tokens that a CPU takes at a time. Their hidden channels stay in its cache, and in memory that the C library uses
# again: tensors beyond 32 MiB it asks of the system anew for each operation, whose pages cost more than the arithmetic.
CPU_TOKENS = 1024


class Mlp(nn.Module):
    """Two linear layers with GELU between them, the hidden one four times as wide."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        # what may stand in the place of a layer, and hooks, get all tokens at once, as on a GPU
        is_plain = are_plain((self.fc1, self.act, self.fc2), (nn.Linear, nn.GELU, nn.Linear))
        if is_recorded() or x.device.type != 'cpu' or not is_plain:
            return self._run(x)
        tokens = x.flatten(0, -2)
        # equal parts, since PyTorch rounds the product with a single row differently
        parts = tokens.tensor_split(max(1, math.ceil(len(tokens) / CPU_TOKENS)))
        return torch.cat([self._run(part) for part in parts]).view(x.shape)

    def _run(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SwinBlock(nn.Module):
    """Attention and MLP, each normalised after it and then added to the main branch (res-post-norm, Sec. 3.2).

    Args:
        dim: Channels.
        drop_path: Probability of dropping a residual branch for a sample. The branch is dropped after its norm, so that
            a dropped branch adds nothing, not even the norm's bias.
        extra_norm: Whether the main branch itself is normalised at the end, as every sixth block of H and G does.
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
        if not self._is_fused(x, branch, norm):
            return x + self.drop_path(norm(branch))
        kept, keep_prob = None, 1 - getattr(self.drop_path, 'drop_prob', 0.0)
        if keep_prob < 1 and self.drop_path.training:  # as mmcv's DropPath draws it
            shape = (len(branch),) + (1,) * (branch.dim() - 1)
            kept = (keep_prob + torch.rand(shape, dtype=post_norm.normed_dtype(branch), device=branch.device)).floor()
        return post_norm.add_post_norm(x, branch, norm.weight, norm.bias, norm.eps, kept, keep_prob)

    def _is_fused(self, x: Tensor, branch: Tensor, norm: nn.Module) -> bool:
        """Whether a Triton kernel adds the branch.

        Not where a model is compiled: Inductor fuses the same operators itself, with the casts around them too, and an
        operator of ours would be a border that it cannot cross.
        """
        backend = getattr(self.attn, 'backend', '')
        if is_graphed() or is_transformed() or backend not in ('triton', 'auto'):
            return False
        modules, kinds = (norm, self.drop_path), (nn.LayerNorm, type(self.drop_path))
        if not are_plain(modules, kinds) or kinds[1] not in (DropPath, nn.Identity) or has_hooks_of_all():
            return False
        as_built = norm.normalized_shape == branch.shape[-1:] and norm.bias is not None
        if not as_built or post_norm.can_run(x, branch):
            return False
        return backend == 'triton' or selfcheck.why_not_post_norm(branch) is None


class SwinStage(nn.Module):
    """Blocks with windows that are shifted in every second one, and the merging that leads to the next stage.

    Args:
        dim: Channels.
        drop_path: Drop-path rate of each block; its length is the depth.
        window_size: Tokens of a window along each axis.
        extra_norm_every_n_blocks: The main branch is normalised after every n-th block; 0 for never.
        downsample: Whether patches are merged at the end.
        with_cp: Whether activations of a block are recomputed in the backward pass.
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
        """(B, *S, C) -> (B, *S, C), before merging."""
        for block in self.blocks:
            # torch.func cannot differentiate what is computed again in the backward pass
            recompute = self.with_cp and torch.is_grad_enabled() and not is_transformed()
            x = recomputed(block, x) if recompute else block(x)
        return x


def recomputed(module: nn.Module, x: Tensor) -> Tensor:
    """Call a module such that its activations are computed again for the backward pass, with the same random numbers.

    Autocast keeps the half-precision copies of all weights until the forward pass of the whole model ends, for weights
    that are used again. These are not, and the copies would take half as much memory as the weights themselves.
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
