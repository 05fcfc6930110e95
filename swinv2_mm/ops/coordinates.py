"""Relative coordinates in log space, and the pre-training window that stored ones were made with."""

import math

import torch
from torch import Tensor


def log_spaced_coords(window_size: tuple[int, ...], pretrained_window_size: Tensor) -> Tensor:
    """Relative coordinates of a window in log space (Eq. 4), scaled as in the official code.

    The largest offset of the window that the MLP was pre-trained with is 8 before the logarithm and log2(9) / 3 after
    it; larger windows extrapolate.

    Args:
        window_size: Tokens of the window along each axis.
        pretrained_window_size: (axes,), tokens of the window that the MLP was pre-trained with.

    Returns:
        (prod(2 * window - 1), axes) in float32, the last axis varying fastest, on the device of the second argument.
    """
    device = pretrained_window_size.device
    offsets = [torch.arange(1 - w, w, dtype=torch.float32, device=device) for w in window_size]
    coords = torch.stack(torch.meshgrid(*offsets, indexing='ij'), -1).flatten(0, -2)
    # a window of one token has the offset 0 alone, whatever divides it
    coords = coords / (pretrained_window_size - 1).clamp(min=1) * 8
    return coords.sign() * torch.log2(coords.abs() + 1.0) / math.log2(8)


def largest_coord(window_size: int, pretrained_window_size: int) -> float:
    """Coordinate of the largest offset along one axis."""
    return math.log2(8 * (window_size - 1) / max(pretrained_window_size - 1, 1) + 1) / 3


def invert_coords(table: Tensor) -> tuple[int, ...]:
    """Find the pre-training window that a table of log-spaced coordinates was made with.

    The extent of the table gives its window, its largest value then gives the pre-training window. The result is exact:
    it reproduces the whole table, and no other window does.

    Args:
        table: (1, 2 * window - 1 for each axis, axes), the buffer `relative_coords_table` of the official code, in any
            floating type.

    Returns:
        One number per axis, 0 where the window is a single token and the table tells nothing.

    Raises:
        ValueError: The table is not log-spaced as the official ones are, or its type is too coarse for one answer.
    """
    num_axes = table.shape[-1] if table.dim() else 0
    sizes = tuple(table.shape[1:-1])
    if table.shape[:1] != (1,) or num_axes != len(sizes) or any(size % 2 == 0 for size in sizes):
        raise ValueError(f'a table of relative coordinates cannot have the shape {tuple(table.shape)}')
    if not table.is_floating_point():
        raise ValueError(f'a table of relative coordinates cannot be of type {table.dtype}')
    window = tuple((size + 1) // 2 for size in sizes)
    values = table.float()
    if 1 in window:  # the official code divides a single token's offset, zero, by zero
        values = values.nan_to_num(0.0)
    tolerance = max(0.75 * torch.finfo(table.dtype).eps, 2e-6)  # rounding is half an eps
    found = tuple(_invert_axis(w, values[..., axis].max().item(), tolerance) for axis, w in enumerate(window))
    expected = log_spaced_coords(window, torch.tensor(found)).view(values.shape)
    if not torch.allclose(values, expected, rtol=tolerance, atol=tolerance):
        raise ValueError('the table of relative coordinates is not log-spaced as the official ones are')
    return found


def _invert_axis(window_size: int, largest: float, tolerance: float) -> int:
    if window_size == 1:
        return 0
    scaled = 2 ** min(3 * largest, 60.0) - 1
    guess = round(8 * (window_size - 1) / scaled) + 1 if scaled > 0 else 0
    fits = [
        p
        for p in range(max(guess - 2, 2), guess + 3)
        if math.isclose(largest_coord(window_size, p), largest, rel_tol=tolerance)
    ]
    if len(fits) != 1:
        raise ValueError(
            f'a table of relative coordinates that reaches {largest:.4g} in a window of {window_size} tokens fits '
            f'{"several pre-training windows: " + ", ".join(map(str, fits)) if fits else "no pre-training window"}'
        )
    return fits[0]
