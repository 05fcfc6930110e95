"""From a state dict of any layout to weights under our names, and to what fills a given backbone completely."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor

from .errors import CheckpointError
from .inflation import inflate, is_for_images
from .layouts import BUFFERS, OTHER_HEADS, PATCH, Weights, describe, find_backbone, required_names, to_ours
from .windows import ENTRY, Windows, log_transfer, settle_windows, stored_windows, window_entries, windows_per_stage

OUTPUT_NORM = re.compile(r'(norm\d+)\.')


def unwrap(checkpoint: Any) -> dict[str, Any]:
    """Find the weights in what a file holds: under `state_dict` (mm, timm), `model` (official), or the file itself.

    Raises:
        CheckpointError: They are no dict.
    """
    for key in ('state_dict', 'model'):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            return checkpoint[key]
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'it holds a {type(checkpoint).__name__} instead of a dict of weights')
    return checkpoint


def extract_backbone(
    state_dict: dict[str, Any], release: Sequence[int] | None = None, own: Collection[str] = ()
) -> Weights:
    """Take the backbone out of a state dict of any layout, under our names, and settle what it says about windows.

    Args:
        state_dict: Weights by name; those of the backbone leave it.
        release: Pre-training window of each stage that the name of a release tells.
        own: Names of the parameters of the module that will be filled. Whatever has such a name is kept.

    Raises:
        CheckpointError: There is no backbone, an entry is no tensor, or entries contradict each other.
    """
    names = [name for name in state_dict if isinstance(name, str)]
    layout, root = find_backbone(names)
    inside = {name.removeprefix(root): state_dict.pop(name) for name in names if name.startswith(root)}
    no_tensors = [f'{name} ({type(value).__name__})' for name, value in inside.items() if not isinstance(value, Tensor)]
    if no_tensors:
        raise CheckpointError(f'these entries are no tensors: {_list(no_tensors)}')
    weights = to_ours(inside, layout)
    heads = [name for name in weights if OTHER_HEADS.match(name) and name not in own]
    _log_others([name for name in names if not name.startswith(root)] + heads)
    windows = stored_windows(weights, release)

    def is_weight(name: str) -> bool:
        return name in own or not (OTHER_HEADS.match(name) or BUFFERS.search(name) or name.endswith(ENTRY))

    weights = {name: value for name, value in weights.items() if is_weight(name)}
    return weights if windows is None else weights | window_entries(windows, weights)


def _log_others(names: list[str]) -> None:
    parts = Counter(name.split('.')[0] for name in names)
    if parts:
        listed = ', '.join(f'{part} ({count})' if count > 1 else part for part, count in parts.items())
        print_log(f'SwinV2: left out of the backbone, as parts of other heads: {listed}', logger='current')


def _list(names: Sequence[str], limit: int = 8) -> str:
    return ', '.join(names[:limit]) + (f' and {len(names) - limit} more' if len(names) > limit else '')


def fit_backbone(
    state_dict: dict[str, Any],
    shapes: Mapping[str, torch.Size],
    told: Windows,
    windows: Windows,
    own: Collection[str],
) -> Weights:
    """Convert a state dict of any layout so that it fills a backbone completely, or raise before anything is touched.

    Args:
        state_dict: Weights by name.
        shapes: Shapes of what the backbone needs, by name.
        told: `pretrained_window_sizes` of the config, 0 for not told.
        windows: Windows of the backbone.
        own: Names that a subclass has added, whose entries are passed on as they are.

    Raises:
        CheckpointError: Something is missing, unexpected, of another shape or no floating-point number, or the
            pre-training windows are not known.
    """
    weights = extract_backbone(dict(unwrap(state_dict)), own=own)
    patch = shapes[PATCH]
    if len(patch) == 5 and is_for_images(weights):
        weights = inflate(weights, patch[2], told, windows)
    stored = windows_per_stage(weights, windows)
    weights = {name: value for name, value in weights.items() if not name.endswith(ENTRY)}
    others = [name for name in weights if OUTPUT_NORM.match(name) and name not in shapes and name not in own]
    _log_others(others)
    weights = {name: value for name, value in weights.items() if name not in others}
    _check_names_and_shapes(weights, {n: s for n, s in shapes.items() if not n.endswith(ENTRY)}, own)
    settled = settle_windows(stored, told, windows)
    log_transfer(settled, stored, windows)
    return weights | window_entries(settled, shapes)


def check_complete(weights: Weights) -> None:
    """Check that converted weights are those of some Swin V2, without knowing which.

    Raises:
        CheckpointError: Something is missing or left over.
    """
    required = required_names(weights)
    optional = re.compile(
        rf'norm\d+\.(weight|bias)|layers\.\d+\.blocks\.\d+\.(enorm\.(weight|bias)|{re.escape(ENTRY)})'
    )
    unexpected = [name for name in weights.keys() - set(required) if not optional.fullmatch(name)]
    _raise_if_any({'missing': [name for name in required if name not in weights], 'unexpected': sorted(unexpected)})


def _raise_if_any(problems: Mapping[str, Sequence[str]], sizes: str = '') -> None:
    listed = '; '.join(f'{kind}: {_list(names)}' for kind, names in problems.items() if names)
    if listed:
        raise CheckpointError(f'it does not fit: {listed}{sizes}')


def _check_names_and_shapes(weights: Weights, shapes: Mapping[str, torch.Size], own: Collection[str]) -> None:
    missing = [name for name in shapes if name not in weights]
    fresh = {name.split('.')[0] for name in missing if OUTPUT_NORM.match(name)}
    fresh = {norm for norm in fresh if not any(name.startswith(f'{norm}.') for name in weights)}
    shared = {name: value for name, value in weights.items() if name in shapes}
    ours, theirs = describe(shapes), describe({name: value.shape for name, value in weights.items()})
    _raise_if_any(
        {
            'missing': [name for name in missing if name.split('.')[0] not in fresh],
            'unexpected': [name for name in weights if name not in shapes and name not in own],
            'of another shape': [
                f'{name} {tuple(value.shape)} for {tuple(shapes[name])}'
                for name, value in shared.items()
                if value.shape != shapes[name]
            ],
            'not of dense floating-point numbers': [
                f'{name} ({value.dtype}, {value.layout}, {value.device})'
                for name, value in shared.items()
                if not value.is_floating_point() or value.layout is not torch.strided or value.is_meta
            ],
        },
        sizes=f'. The checkpoint has {theirs}; the model has {ours}' if ours != theirs else '',
    )
    if fresh:
        print_log(
            f'SwinV2: the checkpoint has no {", ".join(sorted(fresh))}; these output norms stay as they are',
            logger='current',
        )
