"""The residual post-norm x + drop_path(LayerNorm(branch)) in one Triton kernel, and its gradient in another.

PyTorch's own operators read and write the feature map once each for the cast, norm, two steps of drop path and sum;
docs/performance.md counts the bytes.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils import _python_dispatch

from . import attention
from .launch import launch
from .tiles import next_power_of_2

MAX_CHANNELS = 4096  # of a token, all of which are in the registers of a program
# of a feature map: the host takes some 40 us longer for a launch than for PyTorch's operators, and a GPU that is done
# with smaller maps sooner than that would wait for it; estimated, not tuned
MIN_ELEMENTS = 2**21
ELEMENTS = 2048  # of a tile
PROGRAMS = 512  # of the backward pass, each of which sums the gradients of weight and bias over some tiles


def can_run(x: Tensor, branch: Tensor) -> str | None:
    """Tell why the kernels cannot add the norm of `branch` to `x`, or None if they can."""
    if type(x) is not Tensor or type(branch) is not Tensor or _python_dispatch._get_current_dispatch_mode():
        return 'its kernels are no operators, which a subclass of Tensor or a dispatch mode could replace'
    if x.shape != branch.shape or x.device != branch.device:
        return (
            f'its kernels add feature maps of one shape on one device, got {tuple(x.shape)} on {str(x.device)!r} '
            f'and {tuple(branch.shape)} on {str(branch.device)!r}'
        )
    if x.shape[-1] > MAX_CHANNELS:
        return f'its kernels support up to {MAX_CHANNELS} channels, but the feature map has {x.shape[-1]}'
    if x.numel() < MIN_ELEMENTS:
        return f'its kernels take longer to launch than they save below {MIN_ELEMENTS} elements, got {x.numel()}'
    return _why_not(x.device, x.dtype) or _why_not(x.device, branch.dtype)


@functools.cache
def _why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The requirements are those of the attention kernels, checked with the smallest feature map."""
    return attention.can_run(torch.empty(1, 1, 3, 1, 1, dtype=dtype, device=device))


def normed_dtype(branch: Tensor) -> torch.dtype:
    """Type that `torch.nn.functional.layer_norm` has its result in: float32 under autocast."""
    return torch.float32 if torch.is_autocast_enabled(branch.device.type) else branch.dtype


def add_post_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    kept: Tensor | None = None,
    keep_prob: float = 1.0,
) -> Tensor:
    """Compute x + drop_path(LayerNorm(branch)), which can be differentiated once.

    Args:
        x: Main branch (B, *S, C).
        branch: Residual branch (B, *S, C), which may be of another type.
        weight: Of the norm (C,).
        bias: Of the norm (C,).
        eps: Of the norm, added to the variance.
        kept: One number for each sample, (B,) or (B, 1, ...): 0 where its branch is dropped, or 1. None for 1.
        keep_prob: What drop path divides the branch by.

    Returns:
        (B, *S, C), in the type that the operators of PyTorch would give it.
    """
    x = x.to(torch.promote_types(x.dtype, normed_dtype(branch)))
    inputs = x, branch, weight, bias, kept, keep_prob, eps
    # what follows takes little longer on the host than the call of an autograd function
    return _AddPostNorm.apply(*inputs) if torch.is_grad_enabled() else forward(*inputs)[0]


class _AddPostNorm(torch.autograd.Function):
    """Not an operator of torch's library, which would double the time on the host: compiled models do without it."""

    @staticmethod
    def forward(ctx, x, branch, weight, bias, kept, keep_prob, eps):
        out, statistics = forward(x, branch, weight, bias, kept, keep_prob, eps)
        ctx.save_for_backward(branch, weight, kept, statistics)
        ctx.keep_prob = keep_prob
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        return grad_out, *backward(grad_out, *ctx.saved_tensors, ctx.keep_prob), None, None, None


def forward(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, kept: Tensor | None, keep_prob: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Without autograd, return the sum in the type of `x`, and mean and 1 / deviation of each token, in float32."""
    from . import post_norm_kernels as kernels

    tokens, tiles, constants = _tiles(x)
    out, statistics = x.new_empty(x.shape), x.new_empty(*x.shape[:-1], 2, dtype=torch.float32)
    inputs = [t if t is None else t.contiguous() for t in (x, branch, weight, bias, kept)]
    launch(kernels.post_norm_forward, tiles, *inputs, out, statistics, tokens, keep_prob, eps, **constants)
    return out, statistics


def backward(
    grad_out: Tensor, branch: Tensor, weight: Tensor, kept: Tensor | None, statistics: Tensor, keep_prob: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of branch, weight and bias; that of the main branch is `grad_out`."""
    from . import post_norm_kernels as kernels

    tokens, tiles, constants = _tiles(branch)
    programs = min(tiles, PROGRAMS)
    grad_branch = branch.new_empty(branch.shape)
    parts = [branch.new_empty(programs, len(weight), dtype=torch.float32) for _ in range(2)]
    inputs = [t if t is None else t.contiguous() for t in (grad_out, branch, weight, kept, statistics)]
    sizes = tokens, tiles, keep_prob
    launch(kernels.post_norm_backward, programs, *inputs, grad_branch, *parts, *sizes, **constants)
    return grad_branch, *(part.sum(0).to(weight.dtype) for part in parts)


def _tiles(x: Tensor) -> tuple[int, int, dict]:
    """Tokens of a sample, tiles of the batch, and what the kernels are compiled for."""
    batch, *spatial_shape, channels = x.shape
    tokens, block = math.prod(spatial_shape), next_power_of_2(channels)
    rows = max(1, ELEMENTS // block)
    options = {'num_warps': 4 if block <= ELEMENTS else 8, 'enable_fp_fusion': True}
    return tokens, batch * -(-tokens // rows), {'C': channels, 'BLOCK_C': block, 'ROWS': rows, **options}


def check(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Compare the kernels with PyTorch's operators on a small feature map, with gradients and without autocast.

    Args:
        device: Of the feature map.
        dtype: Of the branch; all else is float32, as under autocast, and then of this type too.

    Returns:
        Largest errors of the sum and the gradients, and those that are allowed: three times the error of PyTorch's
        operators, and some rounding. They are parts of the largest value in float64.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 5, 7, 96), (3, 5, 7, 96), (96,), (96,), (3, 5, 7, 96)
    inputs = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    kept = torch.tensor([0.0, 1.0, 1.0], device=device)
    errors = {}
    for other in dict.fromkeys((torch.float32, dtype)):
        exact = _results(_add_by_operators, inputs, kept, torch.float64, torch.float64)
        peer = _results(_add_by_operators, inputs, kept, other, other)
        ours = _results(add_post_norm, inputs, kept, other, dtype)
        for name, expected, *found in zip(('out', 'x', 'branch', 'weight', 'bias'), exact, peer, ours, strict=True):
            allowed, error = (float((t.double() - expected).abs().max() / expected.abs().max()) for t in found)
            rounding = 4 * torch.finfo(dtype if name == 'branch' else other).eps
            errors[f'{name} with {other}'] = error, 3 * allowed + rounding
    return errors


def _add_by_operators(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float, kept: Tensor, keep_prob: float
) -> Tensor:
    normed = F.layer_norm(branch, weight.shape, weight, bias, eps)
    return x + normed / keep_prob * kept.view(-1, *(1,) * (x.dim() - 1))


def _results(
    add: Callable, inputs: list[Tensor], kept: Tensor, dtype: torch.dtype, branch_dtype: torch.dtype
) -> list[Tensor]:
    """The sum and all gradients."""
    *leaves, grad_out = (t.detach().to(branch_dtype if i == 1 else dtype) for i, t in enumerate(inputs))
    leaves = [t.requires_grad_() for t in leaves]
    out = add(*leaves, 1e-5, kept.to(dtype), 0.75)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]
