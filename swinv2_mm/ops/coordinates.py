"""Log-spaced relative coordinates (Sec. 3.3), and the pre-training window inferred from a stored table of them."""

import math

import torch
from torch import Tensor


def log_spaced_coords(window_size: tuple[int, ...], pretrained_window_size: Tensor) -> Tensor:
    """Relative coordinates of a window in log space (Eq. 4), scaled as in the official code.

    The largest offset of the pre-training window is scaled to 8, which is log2(9) / 3 in log space. Larger windows
    extrapolate.

    Args:
        window_size: Tokens of the window along each axis.
        pretrained_window_size: (axes,), tokens of the window that the bias MLP was pre-trained with.

    Returns:
        (prod(2 * window - 1), axes) in float32, the last axis varying fastest, on the device of
        `pretrained_window_size`.
    """
    device = pretrained_window_size.device
    offsets = [torch.arange(1 - w, w, dtype=torch.float32, device=device) for w in window_size]
    coords = torch.stack(torch.meshgrid(*offsets, indexing='ij'), -1).flatten(0, -2)
    # a window of one token has only the offset 0; clamp avoids 0 / 0
    coords = coords / (pretrained_window_size - 1).clamp(min=1) * 8
    return coords.sign() * torch.log2(coords.abs() + 1.0) / math.log2(8)


def max_coord(window_size: int, pretrained_window_size: int) -> float:
    """Log-spaced coordinate of the largest offset of a window along one axis."""
    return math.log2(8 * (window_size - 1) / max(pretrained_window_size - 1, 1) + 1) / 3


def invert_coords(table: Tensor) -> tuple[int, ...]:
    """Infer the pre-training window from a table of log-spaced coordinates.

    The shape of the table gives its window size, and its maximum then gives the pre-training window. The result is
    exact: it reproduces the whole table, and no other pre-training window does.

    Args:
        table: (1, 2 * window - 1 for each axis, axes), the buffer `relative_coords_table` of the official code, in any
            floating type.

    Returns:
        Pre-training window along each axis, 0 where the window is one token and any pre-training window fits.

    Raises:
        ValueError: The table is not log-spaced as in the official code, or its floating type is too coarse to decide.
    """
    num_axes = table.shape[-1] if table.dim() else 0
    sizes = tuple(table.shape[1:-1])
    if table.shape[:1] != (1,) or num_axes != len(sizes) or any(size % 2 == 0 for size in sizes):
        raise ValueError(f'a table of relative coordinates cannot have the shape {tuple(table.shape)}')
    if not table.is_floating_point():
        raise ValueError(f'a table of relative coordinates cannot be of type {table.dtype}')
    window = tuple((size + 1) // 2 for size in sizes)
    values = table.float()
    if 1 in window:  # 0 / 0 in the official code
        values = values.nan_to_num(0.0)
    tolerance = max(0.75 * torch.finfo(table.dtype).eps, 2e-6)  # rounding error is up to half an eps
    found = tuple(_invert_axis(w, values[..., axis].max().item(), tolerance) for axis, w in enumerate(window))
    expected = log_spaced_coords(window, torch.tensor(found)).view(values.shape)
    if not torch.allclose(values, expected, rtol=tolerance, atol=tolerance):
        raise ValueError('the table of relative coordinates is not log-spaced as the official ones are')
    return found


def _invert_axis(window_size: int, maximum: float, tolerance: float) -> int:
    if window_size == 1:
        return 0
    scaled = 2 ** min(3 * maximum, 60.0) - 1
    guess = round(8 * (window_size - 1) / scaled) + 1 if scaled > 0 else 0
    fits = [
        p
        for p in range(max(guess - 2, 2), guess + 3)
        if math.isclose(max_coord(window_size, p), maximum, rel_tol=tolerance)
    ]
    if len(fits) != 1:
        raise ValueError(
            f'a table of relative coordinates that reaches {maximum:.4g} in a window of {window_size} tokens fits '
            f'{"several pre-training windows: " + ", ".join(map(str, fits)) if fits else "no pre-training window"}'
        )
    return fits[0]
