"""Conversion of values to the model at hand: pre-training windows, channels and patch size, images to video.

Keys are those of this package here, see `layouts`.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..openmmlab import print_log
from ..ops.coordinates import invert_coords, max_coord
from . import CheckpointError
from .layouts import COORDS_TABLE, PATCH_KERNEL, Weights, num_stages

RGB = 3
CPB_MLP = 'attn.cpb_mlp.'
WINDOW_BUFFER = f'{CPB_MLP}pretrained_window_size'  # of each block, (axes,), saved in our own checkpoints
Windows = Sequence[tuple[int, ...]]  # one entry per stage, each with one number per axis; 0 for unknown
WindowsByStage = Mapping[int, tuple[int, ...]]  # the same, of some stages


# ---------------------------------------------------------------- pre-training windows


def block_prefixes(weights: Collection[str]) -> list[str]:
    """Prefixes of the blocks to which some weights belong, such as `layers.0.blocks.1.`."""
    found = map(re.compile(r'layers\.\d+\.blocks\.\d+\.').match, weights)
    return list(dict.fromkeys(match[0] for match in found if match))


def stage_index(key: str) -> int:
    """Stage of a key or prefix that begins with `layers.N.`."""
    return int(key.split('.')[1])


def make_window_buffers(windows: Windows | WindowsByStage, weights: Collection[str]) -> Weights:
    """Buffers with the pre-training windows, for each block to which some weights belong."""
    return {f'{block}{WINDOW_BUFFER}': torch.tensor(windows[stage_index(block)]) for block in block_prefixes(weights)}


def read_windows(weights: Weights, named_windows: Sequence[int] | None) -> Windows | None:
    """Read the pre-training windows of a file from all sources: buffers, tables of coordinates, the name of the file.

    Args:
        weights: Weights with the buffers of the file.
        named_windows: Pre-training window of each stage by the name of the file, if it is a published one.

    Raises:
        CheckpointError: Sources contradict each other, or a table is not log-spaced.
    """
    per_stage: list[dict[str, tuple[int, ...]]] = [{} for _ in range(num_stages(weights))]
    for name, value in weights.items():
        if name.endswith(WINDOW_BUFFER):
            window = _read_buffer(name, value)
        elif name.endswith(COORDS_TABLE):
            window = _read_table(name, value)
        else:
            continue
        per_stage[stage_index(name)][name] = window
    if named_windows is not None:
        axes = weights[PATCH_KERNEL].dim() - 2 if PATCH_KERNEL in weights else 2
        for stage, window in zip(per_stage, named_windows, strict=False):
            stage['the name of the file'] = (window,) * axes
    if not any(per_stage):
        return None
    axes = {name: len(window) for found in per_stage for name, window in found.items()}
    if len(set(axes.values())) > 1:
        listed = {count: name for name, count in axes.items()}
        raise CheckpointError(
            'its parts contradict each other about the number of axes: '
            + ', '.join(f'{name} has {count}' for count, name in listed.items())
        )
    return [_agreed(i, found, next(iter(axes.values()))) for i, found in enumerate(per_stage)]


def _read_buffer(name: str, value: Tensor) -> tuple[int, ...]:
    if value.dim() != 1 or value.is_floating_point() or value.is_complex() or (value < 0).any():
        raise CheckpointError(f'{name} must be one whole number for each axis, got {value}')
    return tuple(value.tolist())


def _read_table(name: str, value: Tensor) -> tuple[int, ...]:
    try:
        return invert_coords(value)
    except ValueError as error:
        raise CheckpointError(f'{name}: {error}') from None


def _agreed(stage: int, found: Mapping[str, tuple[int, ...]], num_axes: int) -> tuple[int, ...]:
    """Pre-training window of a stage on which all sources agree; 0 in a source is an axis that it does not have."""
    agreed = []
    for axis in range(num_axes):
        sizes = {name: window[axis] for name, window in found.items() if window[axis]}
        if len(set(sizes.values())) > 1:
            first, second = list({size: name for name, size in sizes.items()}.items())[:2]
            raise CheckpointError(
                f'its parts contradict each other about the pre-training window of stage {stage}: {first[0]} in '
                f'{first[1]}, {second[0]} in {second[1]}'
            )
        agreed.append(next(iter(sizes.values()), 0))
    return tuple(agreed)


def write_windows(weights: Weights, sizes: Sequence[int]) -> Weights:
    """Add buffers with the pre-training windows, one number per stage for height and width, to weights without them.

    Raises:
        CheckpointError: There are more or fewer stages, or the weights have other windows.
    """
    if len(sizes) != num_stages(weights) or min(sizes) < 1:
        raise CheckpointError(
            f'pre-training windows must be {num_stages(weights)} positive numbers, got {tuple(sizes)}'
        )
    axes = weights[PATCH_KERNEL].dim() - 2
    windows = [(0,) * (axes - 2) + (size, size) for size in sizes]
    stored = match_window_buffers(weights, dict(enumerate(windows)))
    return weights | make_window_buffers(resolve_pretrained_windows(stored, windows, windows), weights)


def read_window_buffers(weights: Weights) -> dict[int, tuple[int, ...]]:
    """Pre-training window of each stage with buffers for it."""
    return {stage_index(name): tuple(v.tolist()) for name, v in weights.items() if name.endswith(WINDOW_BUFFER)}


def match_window_buffers(weights: Weights, windows: WindowsByStage) -> WindowsByStage:
    """Pre-training windows of the stages of a model, by the buffers of converted weights; 0 without a buffer.

    Args:
        weights: Weights with or without the buffers.
        windows: Windows of these stages in the model.

    Raises:
        CheckpointError: The buffers have another number of axes than the model.
    """
    buffers = read_window_buffers(weights)
    stored = {stage: buffers.get(stage, (0,) * len(window)) for stage, window in windows.items()}
    for stage, pretrained in stored.items():
        window = windows[stage]
        if len(pretrained) != len(window):
            raise CheckpointError(
                f'its pre-training window of stage {stage} is {_size(pretrained)}, which has another number of axes '
                f'than that of the model, {_size(window)}'
            )
    return stored


def resolve_pretrained_windows(stored: WindowsByStage, cfg_windows: Windows, windows: Windows) -> WindowsByStage:
    """Choose the pre-training window of each stage and axis: that of the config, else that of the checkpoint.

    Args:
        stored: Pre-training windows in the checkpoint, of the stages to resolve; 0 for unknown.
        cfg_windows: `pretrained_window_sizes` of the config; 0 for unset.
        windows: Windows of the model.

    Raises:
        CheckpointError: They disagree, or neither has it for a window of more than one token.
    """
    resolved = {}
    for stage, of_file in stored.items():
        of_config, window = cfg_windows[stage], windows[stage]
        if any(f and c and f != c for f, c in zip(of_file, of_config, strict=True)):
            raise CheckpointError(
                f'its pre-training window of stage {stage} is {_size(of_file)}, but the config has {_size(of_config)}: '
                'leave pretrained_window_sizes out of the config, or correct it'
            )
        # with windows of one token, the only offset of an axis is 0, which does not depend on the scale
        chosen = tuple(c or f or int(w == 1) for f, c, w in zip(of_file, of_config, window, strict=True))
        if 0 in chosen:
            raise CheckpointError(
                f'its pre-training window of stage {stage} is unknown: pass pretrained_window_sizes to the backbone, '
                'one number per stage, such as (8, 8, 8, 8) for the models of 256 pixels with window 8, '
                '(16, 16, 16, 8) for window 16, and (12, 12, 12, 6) for all that were pre-trained with 192 pixels '
                '(22k, 12to16, 12to24, SimMIM)'
            )
        resolved[stage] = chosen
    return resolved


def log_window_transfer(resolved: WindowsByStage, stored: WindowsByStage, windows: Windows) -> None:
    """Log the pre-training window and the window of each stage, and how far the bias extrapolates (Sec. 3.3)."""
    for stage, before in resolved.items():
        of_file, after = stored[stage], windows[stage]
        reach = [(max_coord(p, p), max_coord(w, p)) for p, w in zip(before, after, strict=True)]
        beyond = max(new / old - 1 if old else 0.0 for old, new in reach)
        source = 'the checkpoint' if all(of_file) else 'the config'
        print_log(
            f'SwinV2 stage {stage}: pre-training window {_size(before)} (from {source}), used with '
            f'{_size(after)}; ' + (f'extrapolates by {beyond:.2f} in log space' if beyond > 0 else 'no extrapolation'),
            logger='current',
        )


def _size(window: Sequence[int]) -> str:
    return 'x'.join(map(str, window))


# ---------------------------------------------------------------- patch embedding


def adapt_patch_embed(kernel: Tensor, channels: int, patch: tuple[int, ...]) -> Tensor:
    """Adapt the kernel of a patch embedding to the channels and the patch size of a model, by the rules of timm.

    Args:
        kernel: (C, channels, [frames,] height, width).
        channels: Channels of the model's input.
        patch: Patch size of the model on the same axes as the kernel's.

    Returns:
        (C, channels, *patch) in the dtype of `kernel`.

    Raises:
        CheckpointError: The kernel has other channels and is not for RGB, or its patches have other frames.
    """
    *frames, height, width = kernel.shape[2:]
    if kernel.shape[1] not in (channels, RGB):
        raise CheckpointError(
            f'its patch embedding takes {kernel.shape[1]} channels and that of the model {channels}, but only one for '
            f'{RGB} (RGB) can be adapted: set in_channels={kernel.shape[1]}, or put a patch_embed.proj.weight of shape '
            f'{(len(kernel), channels, *patch)} into the checkpoint'
        )
    if frames != list(patch[:-2]):
        raise CheckpointError(
            f'its patches have {frames[0]} frames and those of the model {patch[0]}: set '
            f'patch_size={(*frames, *patch[-2:])}; only height and width can be resampled'
        )
    changes = []
    adapted = kernel.double()
    if kernel.shape[1] != channels:
        adapted = _adapt_channels(adapted, channels)
        changes.append(f'from {RGB} channels to {channels}')
    if (height, width) != patch[-2:]:
        adapted = _resample_kernel(adapted, patch[-2:])
        changes.append(f'from patches of {height}x{width} to {patch[-2]}x{patch[-1]}')
    if not changes:
        return kernel
    print_log(f'SwinV2: the patch embedding is adapted {" and ".join(changes)}', logger='current')
    return adapted.to(kernel.dtype)


def _adapt_channels(kernel: Tensor, channels: int) -> Tensor:
    """Sum over RGB for one channel; for other numbers repeat RGB cyclically, and rescale to keep the sum."""
    if channels == 1:
        return kernel.sum(1, keepdim=True)
    return kernel[:, torch.arange(channels) % RGB] * (RGB / channels)


def _resample_kernel(kernel: Tensor, patch: tuple[int, int]) -> Tensor:
    """Kernel that embeds resized patches as the old kernel embeds the patches (FlexiViT, arXiv 2212.08013).

    Exact for larger patches; a least-squares solution for smaller ones.
    """
    old = kernel.shape[-2:]
    pixels = torch.eye(math.prod(old), dtype=kernel.dtype).view(-1, 1, *old)
    resized = F.interpolate(pixels, size=patch, mode='bicubic', antialias=True).flatten(1)  # one row for each old pixel
    return (kernel.flatten(-2) @ torch.linalg.pinv(resized).T.to(kernel.device)).unflatten(-1, patch)


# ---------------------------------------------------------------- images to video


def is_image_model(weights: Weights) -> bool:
    """Whether the patches have two axes."""
    return PATCH_KERNEL in weights and weights[PATCH_KERNEL].dim() == 4


def inflate(weights: Weights, patch_frames: int, cfg_windows: Windows, windows: Windows) -> Weights:
    """Inflate the weights of an image model to a video model with the same output for a clip of equal frames.

    The paper gives no rule. This is that of Video Swin (arXiv 2106.13230, `inflate_weights` in its code) for Log-CPB:
    the kernel of the patch embedding is divided among the frames of a patch, and the MLP of the position bias gets a
    column of zeros for time, before those of height and width. The pre-training window of height and width stays; that
    of time is taken from the config, else from the model.

    Args:
        weights: Weights with patches of two axes.
        patch_frames: Frames of a patch.
        cfg_windows: `pretrained_window_sizes` of the config; 0 for unset.
        windows: Windows of the video model.
    """
    inflated = dict(weights)
    for name, value in weights.items():
        if value.layout is not torch.strided:
            continue  # refused later, with all else that does not fit
        if name == PATCH_KERNEL:
            inflated[name] = (value.unsqueeze(2).repeat(1, 1, patch_frames, 1, 1) / patch_frames).to(value.dtype)
        elif name.endswith('cpb_mlp.0.weight') and value.dim() == 2:
            inflated[name] = F.pad(value, (1, 0))
    spatial = read_window_buffers(weights)
    resolved = [
        (of_config[0] or window[0], *spatial.get(stage, (0, 0)))
        for stage, (of_config, window) in enumerate(zip(cfg_windows, windows, strict=True))
    ]
    print_log(
        f'SwinV2: inflated from images to video with {patch_frames} frames a patch; the position bias does not depend '
        f'on time yet, whose coordinates are scaled by windows of {", ".join(str(time) for time, *_ in resolved)}',
        logger='current',
    )
    stages = tuple(f'layers.{stage}.' for stage in range(len(windows)))  # later ones are refused elsewhere
    return inflated | make_window_buffers(resolved, [name for name in inflated if name.startswith(stages)])
