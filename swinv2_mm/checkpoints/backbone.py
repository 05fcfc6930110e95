"""Loading a state dict of any layout into a backbone; it is strict: whatever does not fit is an error.

`SwinV2._load_from_state_dict`, which every way of loading in torch and mmengine calls, calls `fit_backbone`.
"""

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..openmmlab import print_log
from . import CheckpointError
from .conversion import (
    CPB_MLP,
    WINDOW_BUFFER,
    Windows,
    adapt_patch_embed,
    block_prefixes,
    inflate,
    is_image_model,
    log_window_transfer,
    make_window_buffers,
    match_window_buffers,
    read_windows,
    resolve_pretrained_windows,
    stage_index,
)
from .layouts import (
    BUFFERS,
    OTHER_HEADS,
    PATCH_KERNEL,
    Weights,
    convert_keys,
    describe_arch,
    find_backbone,
    has_log_cpb,
    num_stages,
    required_keys,
)

OUTPUT_NORM = re.compile(r'norm\d+\.')
PART = re.compile(r'layers\.\d+(\.downsample)?|[^.]*')  # of a model, for messages


@contextmanager
def in_file(path: str | Path | None) -> Iterator[None]:
    """Add the path of the file to errors about its content."""
    try:
        yield
    except CheckpointError as error:
        raise (type(error)(f'checkpoint {path} cannot be loaded: {error}') if path else error) from None


def unwrap(checkpoint: Any) -> dict[str, Any]:
    """Find the weights in the object in a file: under `state_dict` (mm, timm), `model` (official), or the file itself.

    Raises:
        CheckpointError: They are not a dict.
    """
    for key in ('state_dict', 'model'):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            return checkpoint[key]
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'it contains a {type(checkpoint).__name__} instead of a dict of weights')
    return checkpoint


def extract_backbone(
    state_dict: dict[str, Any], named_windows: Sequence[int] | None = None, model_keys: Collection[str] = ()
) -> Weights:
    """Extract the backbone from a state dict of any layout, with our keys and buffers of its pre-training windows.

    Args:
        state_dict: Weights by name; those of the backbone are removed from it.
        named_windows: Pre-training window of each stage by the name of the file, if it is a published one.
        model_keys: Keys of the module that will be loaded; entries with these keys are kept, even those of other heads.

    Raises:
        CheckpointError: There is no backbone, an entry is not a tensor, or entries contradict each other.
    """
    names = [name for name in state_dict if isinstance(name, str)]
    layout, prefix = find_backbone(names)
    inside = {name.removeprefix(prefix): state_dict.pop(name) for name in names if name.startswith(prefix)}
    _check_tensors(inside)
    weights = convert_keys(inside, layout)
    heads = [name for name in weights if OTHER_HEADS.match(name) and name not in model_keys]
    others = [name for name in names if not name.startswith(prefix)] + heads
    if others:
        _log(f'left out of the backbone, as parts of other heads: {_parts(others)}')
    windows = read_windows(weights, named_windows)

    def is_weight(name: str) -> bool:
        is_other = OTHER_HEADS.match(name) or BUFFERS.search(name) or name.endswith(WINDOW_BUFFER)
        return name in model_keys or not is_other

    weights = {name: value for name, value in weights.items() if is_weight(name)}
    return weights if windows is None else weights | make_window_buffers(windows, weights)


def _check_tensors(weights: Mapping[str, Any]) -> None:
    wrong = [
        f'{name} ({type(value).__name__})'
        for name, value in weights.items()
        if not isinstance(value, Tensor) and not name.endswith('_extra_state')  # which may be of any type in torch
    ]
    if wrong:
        raise CheckpointError(f'these entries are not tensors: {_list(wrong)}')


def _log(message: str, level: int = logging.INFO) -> None:
    print_log(f'SwinV2: {message}', logger='current', level=level)


def _list(names: Sequence[str], limit: int = 8) -> str:
    return ', '.join(names[:limit]) + (f' and {len(names) - limit} more' if len(names) > limit else '')


def _parts(names: Collection[str]) -> str:
    """Parts of the model to which some keys belong, each with its number of keys."""
    parts = Counter(PART.match(name)[0] for name in names)
    return ', '.join(f'{part} ({count} entries)' if count > 1 else part for part, count in parts.items())


@dataclass(frozen=True)
class Target:
    """The backbone that is loaded.

    Args:
        state: Its current state dict. Parameters that FSDP has sharded are replaced by those of `built`, or by None if
            they were added later.
        built: Its state dict when it was built, on the meta device. Only what was added later may be missing from a
            checkpoint: layers of a subclass, adapters.
        cfg_windows: `pretrained_window_sizes` of the config; 0 for unset.
        windows: Its windows.
    """

    state: Mapping[str, Any]
    built: Mapping[str, Tensor]
    cfg_windows: Windows
    windows: Windows

    def missing_keys(self, weights: Collection[str]) -> tuple[list[str], list[str]]:
        """Required keys that `weights` lack, and apart from them, those of output norms that are missing as a whole."""
        missing = [name for name in self.built if name in self.state and name not in weights]
        present = {name.split('.')[0] for name in weights}
        norms = [name for name in missing if OUTPUT_NORM.match(name) and name.split('.')[0] not in present]
        return [name for name in missing if name not in norms], norms


def check_prefix(prefix: str, swin_v2_prefixes: Sequence[str] = (), is_swin_v2: bool = False, **_) -> None:
    """Check that a file without entries for the backbone of a model has no Swin V2 under another prefix.

    Args:
        prefix: Prefix of the backbone in the model.
        swin_v2_prefixes: Prefixes of the Swin V2 in the file.
        is_swin_v2: Whether the file has any entry of a Swin V2.

    Raises:
        CheckpointError: It has one under another prefix, or a damaged one.
    """
    if is_swin_v2 and not swin_v2_prefixes:
        raise CheckpointError(f'it contains an incomplete Swin V2, and nothing under {prefix!r}')
    if swin_v2_prefixes:
        first = swin_v2_prefixes[0]
        raise CheckpointError(
            f'it contains a Swin V2 under {_list(list(map(repr, swin_v2_prefixes)))}, and nothing under {prefix!r}, '
            'the prefix of the backbone in the model: load it by the init_cfg of the backbone, '
            + (f'with prefix={first!r}' if first else 'without a prefix')
        )


def fit_backbone(entries: dict[str, Any], target: Target, from_file: bool, in_model: bool) -> Weights:
    """Convert entries of any layout to entries of a backbone, or raise before any parameter is changed.

    Entries whose keys are all keys of the backbone need no conversion. They may be a part of a state dict, unless they
    come from a file with a Swin V2.

    Args:
        entries: Entries of a state dict, without the prefix of the backbone.
        target: The backbone.
        from_file: Whether they come from a file.
        in_model: Whether the backbone is a submodule of the model that is loaded. Then the entries may be those of
            another architecture, or there may be none.

    Returns:
        Weights with the keys of the backbone. Parameters without an entry stay as they are; so do all of them if the
        entries are of another architecture, which is allowed within a model.

    Raises:
        CheckpointError: An entry is missing, unexpected, of another shape or not of floating-point numbers, or the
            pre-training windows are unknown.
    """
    entries = unwrap(entries)
    has_model_keys = entries.keys() <= target.state.keys()
    is_required = from_file and not in_model
    if in_model and not has_model_keys and not has_log_cpb(entries):
        _log(
            f"the checkpoint's backbone is of another architecture (it has {_list(list(entries), 2)}) and is left out; "
            'the whole backbone stays as it is',
            logging.WARNING,
        )
        return {}
    if has_model_keys and (entries or not is_required):
        weights = dict(entries)
        _check_tensors({name: value for name, value in weights.items() if isinstance(target.state[name], Tensor)})
        read_windows(weights, None)  # to check that they agree
    else:
        weights = _drop_unused_stages(extract_backbone(dict(entries), model_keys=target.state), target)
    weights = _fit_windows(_fit_patch_embed(weights, target), target)
    is_whole = is_required or from_file and any(name in target.built for name in weights)
    _check_keys_and_shapes(weights, target, must_be_whole=is_whole or not has_model_keys)
    _log_kept(weights, target)
    return weights


def _log_kept(weights: Weights, target: Target) -> None:
    kept = [name for name in target.state if name not in weights]
    if not weights:
        _log('the checkpoint has nothing for the backbone, which stays as it is', logging.WARNING)
    elif kept:
        _log(f'the checkpoint lacks {_parts(kept)}, which stay as they are')


def _drop_unused_stages(weights: Weights, target: Target) -> Weights:
    """Drop complete stages after the last one of the model, and output norms that it does not have."""
    end = num_stages(target.state)
    merging = f'layers.{end - 1}.downsample.'
    later = tuple(f'layers.{stage}.' for stage in range(end, num_stages(weights)))
    if later and not any(name.startswith(merging) for name in target.state):
        later += (merging,)
    if not all(name in weights for name in required_keys(weights) if name.startswith(later)):
        later = ()
    dropped = [
        name for name in weights if name.startswith(later) or OUTPUT_NORM.match(name) and name not in target.state
    ]
    listed = [name for name in dropped if not name.endswith(WINDOW_BUFFER)]
    if listed:
        _log(f'left out, as parts that the model does not have: {_parts(listed)}')
    return {name: value for name, value in weights.items() if name not in dropped}


def _fit_patch_embed(weights: Weights, target: Target) -> Weights:
    """Adapt the patch embedding to channels and patch size, and inflate an image model for a video model."""
    kernel, current = weights.get(PATCH_KERNEL), target.state.get(PATCH_KERNEL)
    if kernel is None or current is None or current.shape != target.built[PATCH_KERNEL].shape:  # a replaced stem
        return weights
    is_inflated = current.dim() == 5 and is_image_model(weights)
    can_fit = (kernel.dim() == current.dim() or is_inflated) and len(kernel) == len(current)  # else refused later
    if can_fit and kernel.numel() and _is_dense(kernel):
        patch = tuple(current.shape[3:] if is_inflated else current.shape[2:])
        weights = weights | {PATCH_KERNEL: adapt_patch_embed(kernel, current.shape[1], patch)}
    return inflate(weights, current.shape[2], target.cfg_windows, target.windows) if is_inflated else weights


def _fit_windows(weights: Weights, target: Target) -> Weights:
    """Resolve the pre-training windows of the blocks whose whole position bias is loaded; others keep theirs."""

    def has_position_bias(block: str) -> bool:
        if stage_index(block) >= len(target.windows):  # a stage that was appended, whose windows are unknown
            return False
        bias = [name for name in target.state if name.startswith(block + CPB_MLP) and not name.endswith(WINDOW_BUFFER)]
        return bool(bias) and all(name in weights for name in bias)

    blocks = [block for block in block_prefixes(weights) if has_position_bias(block)]
    stages = sorted(set(map(stage_index, blocks)))
    stored = match_window_buffers(weights, {stage: target.windows[stage] for stage in stages})
    resolved = resolve_pretrained_windows(stored, target.cfg_windows, target.windows)
    log_window_transfer(resolved, stored, target.windows)
    return weights | make_window_buffers(resolved, blocks)


def _is_dense(value: Tensor) -> bool:
    return value.is_floating_point() and value.layout is torch.strided and not value.is_meta


def check_complete(weights: Weights) -> None:
    """Check that converted weights are a complete Swin V2 of any size.

    Raises:
        CheckpointError: Something is missing or left over.
    """
    required = required_keys(weights)
    optional = re.compile(
        rf'norm\d+\.(weight|bias)|layers\.\d+\.blocks\.\d+\.(enorm\.(weight|bias)|{re.escape(WINDOW_BUFFER)})'
    )
    unexpected = [name for name in weights.keys() - set(required) if not optional.fullmatch(name)]
    _raise_if_any({'missing': [name for name in required if name not in weights], 'unexpected': sorted(unexpected)})


def _raise_if_any(problems: Mapping[str, Sequence[str]], more: str = '') -> None:
    listed = '; '.join(f'{kind}: {_list(names)}' for kind, names in problems.items() if names)
    if listed:
        raise CheckpointError(f'it does not fit: {listed}{more}')


def _check_keys_and_shapes(weights: Weights, target: Target, must_be_whole: bool) -> None:
    missing, _ = target.missing_keys(weights)
    unexpected = [name for name in weights if name not in target.state]
    removed = [name for name in unexpected if name in target.built]
    current = {name: value for name, value in target.state.items() if isinstance(value, Tensor)}
    shared = {name: value for name, value in weights.items() if name in current}
    shapes = {name: value.shape for name, value in weights.items() if isinstance(value, Tensor)}
    model, checkpoint = describe_arch({name: value.shape for name, value in current.items()}), describe_arch(shapes)
    _raise_if_any(
        {
            'missing': missing if must_be_whole else [],
            'unexpected': unexpected,
            'of another shape': [
                f'{name} {tuple(value.shape)} for {tuple(current[name].shape)}'
                for name, value in shared.items()
                if value.shape != current[name].shape
            ],
            'not of dense floating-point numbers': [
                f'{name} ({value.dtype}, {value.layout}, {value.device})'
                for name, value in shared.items()
                if current[name].is_floating_point() and current[name].layout is torch.strided and not _is_dense(value)
            ],
        },
        (f'. The checkpoint has {checkpoint}; the model has {model}' if model != checkpoint else '')
        + (
            f'. {removed[0]} was removed after the model was built: load first, then change the model'
            if removed
            else ''
        ),
    )
