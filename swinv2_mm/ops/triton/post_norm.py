"""The residual post-norm x + keep * LayerNorm(branch) in one Triton kernel, and its gradient in another.

PyTorch's own operators read and write the map once each for the cast, the norm, the two steps of drop path and the sum.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import attention
from .launch import launch
from .tiles import next_power_of_2

MAX_CHANNELS = 4096  # of a token, all of which are in the registers of a program
ELEMENTS = 2048  # of a tile
PROGRAMS = 512  # of the backward pass, each of which sums the gradients of weight and bias over some tiles


def can_run(x: Tensor, branch: Tensor) -> str | None:
    """Tell why the kernels cannot add the norm of `branch` to `x`, or None if they can."""
    if x.shape != branch.shape:
        return f'its kernels add maps of one shape, got {tuple(x.shape)} and {tuple(branch.shape)}'
    if x.shape[-1] > MAX_CHANNELS:
        return f'its kernels take up to {MAX_CHANNELS} channels, and the map has {x.shape[-1]}'
    # the same GPUs, versions and types as for attention, which is asked with a head of one channel
    return attention.can_run(x[..., :1, None, None]) or attention.can_run(branch[..., :1, None, None])


def normed_dtype(branch: Tensor) -> torch.dtype:
    """Type that `torch.nn.functional.layer_norm` has its result in: float32 under autocast."""
    return torch.float32 if torch.is_autocast_enabled(branch.device.type) else branch.dtype


def add_post_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float, keep: Tensor | None = None
) -> Tensor:
    """Compute x + keep * LayerNorm(branch), which can be differentiated once.

    Args:
        x: Main branch (B, *S, C).
        branch: Residual branch (B, *S, C), which may be of another type.
        weight: Of the norm (C,).
        bias: Of the norm (C,).
        eps: Of the norm, added to the variance.
        keep: Factor of each sample (B,) in float32, 0 where the branch is dropped; None for 1.

    Returns:
        (B, *S, C), in the type that the operators of PyTorch would give it.
    """
    x = x.to(torch.promote_types(x.dtype, normed_dtype(branch)))
    inputs = x, branch, weight, bias, keep, eps
    # a call of an autograd function takes longer than that of the operator
    return _AddPostNorm.apply(*inputs) if torch.is_grad_enabled() else OPERATORS.post_norm(*inputs)[0]


class _AddPostNorm(torch.autograd.Function):
    """Around the operators, since `torch.library.custom_op` takes the host thrice as long as all of this."""

    @staticmethod
    def forward(ctx, x, branch, weight, bias, keep, eps):
        out, mean, rstd = OPERATORS.post_norm(x, branch, weight, bias, keep, eps)
        ctx.save_for_backward(branch, weight, keep, mean, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        return grad_out, *OPERATORS.post_norm_backward(grad_out, *ctx.saved_tensors), None, None


def _forward(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from . import post_norm_kernels as kernels

    results = _forward_results(x, branch, weight, bias, keep, eps)
    tokens, tiles, constants = _tiles(x)
    inputs = (t if t is None else t.contiguous() for t in (x, branch, weight, bias, keep))
    launch(kernels.post_norm_forward, tiles, *inputs, *results, tokens, eps, **constants)
    return results


def _forward_results(x: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    statistics = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), *statistics


def _backward(
    grad_out: Tensor, branch: Tensor, weight: Tensor, keep: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from . import post_norm_kernels as kernels

    tokens, tiles, constants = _tiles(branch)
    programs = min(tiles, PROGRAMS)
    grad_branch = branch.new_empty(branch.shape)
    parts = [branch.new_empty(programs, len(weight), dtype=torch.float32) for _ in range(2)]
    inputs = (t if t is None else t.contiguous() for t in (grad_out, branch, weight, keep, mean, rstd))
    launch(kernels.post_norm_backward, programs, *inputs, grad_branch, *parts, tokens, tiles, **constants)
    return grad_branch, *(part.sum(0).to(weight.dtype) for part in parts)


def _backward_results(grad_out: Tensor, branch: Tensor, weight: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(t.new_empty(t.shape) for t in (branch, weight, weight))


def _tiles(x: Tensor) -> tuple[int, int, dict]:
    """Tokens of a sample, tiles of the batch, and what the kernels are compiled for."""
    batch, *spatial_shape, channels = x.shape
    tokens, block = math.prod(spatial_shape), next_power_of_2(channels)
    rows = max(1, ELEMENTS // block)
    options = {'num_warps': 4 if block <= ELEMENTS else 8, 'enable_fp_fusion': True}
    return tokens, batch * -(-tokens // rows), {'C': channels, 'BLOCK_C': block, 'ROWS': rows, **options}


LIBRARY = torch.library.Library('swinv2_mm', 'FRAGMENT')  # what it defines lasts as long as it does
OPERATORS = torch.ops.swinv2_mm


def _register(schema: str, run: Callable, results: Callable) -> None:
    """Make an operator, with the function that tells the shapes of its results."""
    name = LIBRARY.define(f'{schema} -> (Tensor, Tensor, Tensor)')
    LIBRARY.impl(name, run, 'CompositeExplicitAutograd')
    LIBRARY.impl(name, results, 'Meta')


_register(
    'post_norm(Tensor x, Tensor branch, Tensor weight, Tensor bias, Tensor? keep, float eps)',
    _forward,
    _forward_results,
)
_register(
    'post_norm_backward(Tensor grad_out, Tensor branch, Tensor weight, Tensor? keep, Tensor mean, Tensor rstd)',
    _backward,
    _backward_results,
)


def check(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Compare the kernels with PyTorch's operators on a small map, with gradients enabled and autocast disabled.

    Args:
        device: Of the map.
        dtype: Of the branch; all else is float32, as under autocast, and then of this type too.

    Returns:
        Largest errors of the result and the gradients, and those that are allowed: three times the error of PyTorch's
        operators, and some rounding. They are parts of the largest value in float64.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 5, 7, 96), (3, 5, 7, 96), (96,), (96,), (3, 5, 7, 96)
    inputs = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    keep = torch.tensor([0.0, 1.0, 1.25], device=device)
    errors = {}
    for other in dict.fromkeys((torch.float32, dtype)):
        exact = _results(_add_by_operators, inputs, keep.double(), torch.float64, torch.float64)
        peer = _results(_add_by_operators, inputs, keep.to(other), other, other)
        ours = _results(add_post_norm, inputs, keep, other, dtype)
        for name, expected, *found in zip(('out', 'x', 'branch', 'weight', 'bias'), exact, peer, ours, strict=True):
            allowed, error = (float((t.double() - expected).abs().max() / expected.abs().max()) for t in found)
            rounding = 4 * torch.finfo(dtype if name == 'branch' else other).eps
            errors[f'{name} with {other}'] = error, 3 * allowed + rounding
    return errors


def _add_by_operators(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float, keep: Tensor) -> Tensor:
    return x + F.layer_norm(branch, weight.shape, weight, bias, eps) * keep.view(-1, *(1,) * (x.dim() - 1))


def _results(
    add: Callable, inputs: list[Tensor], keep: Tensor, dtype: torch.dtype, branch_dtype: torch.dtype
) -> list[Tensor]:
    """The sum and all gradients."""
    *leaves, grad_out = (t.detach().to(branch_dtype if i == 1 else dtype) for i, t in enumerate(inputs))
    leaves = [t.requires_grad_() for t in leaves]
    out = add(*leaves, 1e-5, keep)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]
