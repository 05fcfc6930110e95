"""The windows that a position bias was learnt with: found in a checkpoint, agreed with the config, never guessed."""

import re
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ..openmmlab import print_log
from ..ops.coordinates import invert_coords, max_coord
from .errors import CheckpointError
from .layouts import PATCH, TABLE, Weights, num_stages

BIAS = 'attn.cpb_mlp.'
ENTRY = f'{BIAS}pretrained_window_size'  # (axes,), in each block: what our own checkpoints store
Windows = Sequence[tuple[int, ...]]  # one entry per stage, each with one number per axis; 0 for not known
StageWindows = Mapping[int, tuple[int, ...]]  # the same, of some stages


def blocks_of(weights: Collection[str]) -> list[str]:
    """Names of the blocks that some weights belong to, each with the dot that follows it."""
    found = map(re.compile(r'layers\.\d+\.blocks\.\d+\.').match, weights)
    return list(dict.fromkeys(match[0] for match in found if match))


def stage_of(block: str) -> int:
    """Stage of a block, by its name."""
    return int(block.split('.')[1])


def window_entries(windows: Windows | StageWindows, weights: Collection[str]) -> Weights:
    """Return the entries that carry the pre-training windows, for each block among the names of some weights."""
    return {f'{block}{ENTRY}': torch.tensor(windows[stage_of(block)]) for block in blocks_of(weights)}


def stored_windows(weights: Weights, release: Sequence[int] | None) -> Windows | None:
    """Pre-training windows as the file tells them: its own entry, else its tables of coordinates, else its name.

    Raises:
        CheckpointError: Its parts contradict each other, or a table is none of Log-CPB.
    """
    per_stage: list[dict[str, tuple[int, ...]]] = [{} for _ in range(num_stages(weights))]
    for name, value in weights.items():
        if name.endswith(ENTRY):
            window = _read_entry(name, value)
        elif name.endswith(TABLE):
            window = _read_table(name, value)
        else:
            continue
        per_stage[int(name.split('.')[1])][name] = window
    if release is not None:
        axes = weights[PATCH].dim() - 2 if PATCH in weights else 2
        for stage, window in zip(per_stage, release, strict=False):
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


def _read_entry(name: str, value: Tensor) -> tuple[int, ...]:
    if value.dim() != 1 or value.is_floating_point() or value.is_complex() or (value < 0).any():
        raise CheckpointError(f'{name} must hold one whole number for each axis, got {value}')
    return tuple(value.tolist())


def _read_table(name: str, value: Tensor) -> tuple[int, ...]:
    try:
        return invert_coords(value)
    except ValueError as error:
        raise CheckpointError(f'{name}: {error}') from None


def _agreed(stage: int, found: Mapping[str, tuple[int, ...]], num_axes: int) -> tuple[int, ...]:
    """Pre-training window of a stage that all of its sources agree on; a source with 0 says nothing of that axis."""
    agreed = []
    for axis in range(num_axes):
        sizes = {name: window[axis] for name, window in found.items() if window[axis]}
        if len(set(sizes.values())) > 1:
            first, second = list({size: name for name, size in sizes.items()}.items())[:2]
            raise CheckpointError(
                f'its parts contradict each other about the pre-training window of stage {stage}: {first[0]} says '
                f'{first[1]}, {second[0]} says {second[1]}'
            )
        agreed.append(next(iter(sizes.values()), 0))
    return tuple(agreed)


def set_windows(weights: Weights, sizes: Sequence[int]) -> Weights:
    """Add pre-training windows, one number per stage for height and width, to weights that do not carry them.

    Raises:
        CheckpointError: There are more or fewer stages, or the weights carry other windows.
    """
    if len(sizes) != num_stages(weights) or min(sizes) < 1:
        raise CheckpointError(
            f'pre-training windows must be {num_stages(weights)} positive numbers, got {tuple(sizes)}'
        )
    axes = weights[PATCH].dim() - 2
    told = [(0,) * (axes - 2) + (size, size) for size in sizes]
    stored = windows_per_stage(weights, dict(enumerate(told)))
    return weights | window_entries(settle_windows(stored, told, told), weights)


def stored_entries(weights: Weights) -> dict[int, tuple[int, ...]]:
    """Pre-training window of each stage whose blocks have an entry for it."""
    return {stage_of(name): tuple(v.tolist()) for name, v in weights.items() if name.endswith(ENTRY)}


def windows_per_stage(weights: Weights, windows: StageWindows) -> StageWindows:
    """Pre-training windows that converted weights carry, for stages with these windows; 0 where they say nothing.

    Raises:
        CheckpointError: They have another number of axes than the model.
    """
    entries = stored_entries(weights)
    stored = {stage: entries.get(stage, (0,) * len(window)) for stage, window in windows.items()}
    for stage, entry in stored.items():
        window = windows[stage]
        if len(entry) != len(window):
            raise CheckpointError(
                f'its position bias of stage {stage} was learnt with windows of {_size(entry)}, which have another '
                f'number of axes than those of the model, {_size(window)}'
            )
    return stored


def settle_windows(stored: StageWindows, told: Windows, windows: Windows) -> StageWindows:
    """Choose the pre-training window of each stage and axis: what the config tells, else what the checkpoint stores.

    Args:
        stored: What the checkpoint stores for each stage that is asked for, 0 for nothing.
        told: What the config tells (`pretrained_window_sizes`), 0 for nothing.
        windows: Windows of the model.

    Raises:
        CheckpointError: They disagree, or neither says anything about a window of more than one token.
    """
    settled = {}
    for stage, of_file in stored.items():
        of_config, window = told[stage], windows[stage]
        if any(f and c and f != c for f, c in zip(of_file, of_config, strict=True)):
            raise CheckpointError(
                f'its position bias was learnt with windows of {_size(of_file)} in stage {stage}, but the config says '
                f'{_size(of_config)}: leave pretrained_window_sizes out of the config, or correct it'
            )
        # an axis with windows of one token has the offset 0 alone, which no scale changes
        chosen = tuple(c or f or int(w == 1) for f, c, w in zip(of_file, of_config, window, strict=True))
        if 0 in chosen:
            raise CheckpointError(
                f'it does not say which windows its position bias was learnt with (stage {stage}): pass '
                'pretrained_window_sizes to the backbone, one number per stage, such as (8, 8, 8, 8) for the models of '
                '256 pixels with window 8, (16, 16, 16, 8) for window 16, and (12, 12, 12, 6) for all that were '
                'pre-trained with 192 pixels (22k, 12to16, 12to24, SimMIM)'
            )
        settled[stage] = chosen
    return settled


def log_transfer(settled: StageWindows, stored: StageWindows, windows: Windows) -> None:
    """Say for each stage what the position bias was learnt with, and how far it has to extrapolate (Sec. 3.3)."""
    for stage, before in settled.items():
        of_file, after = stored[stage], windows[stage]
        reach = [(max_coord(p, p), max_coord(w, p)) for p, w in zip(before, after, strict=True)]
        beyond = max(new / old - 1 if old else 0.0 for old, new in reach)
        source = 'the checkpoint' if all(of_file) else 'the config'
        print_log(
            f'SwinV2 stage {stage}: position bias learnt with windows of {_size(before)} (says {source}), used with '
            f'{_size(after)}; ' + (f'extrapolates by {beyond:.2f} in log space' if beyond > 0 else 'no extrapolation'),
            logger='current',
        )


def _size(window: Sequence[int]) -> str:
    return 'x'.join(map(str, window))
