"""From a state dict of any layout to weights under our names, and to what fills a given backbone completely."""

import logging
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..openmmlab import print_log
from .errors import CheckpointError
from .inflation import inflate, is_for_images
from .layouts import (
    BUFFERS,
    OTHER_HEADS,
    PATCH,
    Weights,
    claims_swin_v2,
    describe,
    find_backbone,
    num_stages,
    required_names,
    to_ours,
)
from .patches import adapt_patches
from .windows import (
    BIAS,
    ENTRY,
    Windows,
    blocks_of,
    log_transfer,
    settle_windows,
    stage_of,
    stored_windows,
    window_entries,
    windows_per_stage,
)

OUTPUT_NORM = re.compile(r'norm\d+\.')
PART = re.compile(r'layers\.\d+(\.downsample)?|[^.]*')  # of a model, for messages


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
        own: Names in the module that will be filled. Whatever has such a name is kept.

    Raises:
        CheckpointError: There is no backbone, an entry is no tensor, or entries contradict each other.
    """
    names = [name for name in state_dict if isinstance(name, str)]
    layout, root = find_backbone(names)
    inside = {name.removeprefix(root): state_dict.pop(name) for name in names if name.startswith(root)}
    _check_tensors(inside)
    weights = to_ours(inside, layout)
    heads = [name for name in weights if OTHER_HEADS.match(name) and name not in own]
    others = [name for name in names if not name.startswith(root)] + heads
    if others:
        _log(f'left out of the backbone, as parts of other heads: {_parts(others)}')
    windows = stored_windows(weights, release)

    def is_weight(name: str) -> bool:
        return name in own or not (OTHER_HEADS.match(name) or BUFFERS.search(name) or name.endswith(ENTRY))

    weights = {name: value for name, value in weights.items() if is_weight(name)}
    return weights if windows is None else weights | window_entries(windows, weights)


def _check_tensors(weights: Mapping[str, Any]) -> None:
    no_tensors = [
        f'{name} ({type(value).__name__})'
        for name, value in weights.items()
        if not isinstance(value, Tensor) and not name.endswith('_extra_state')  # torch's name for what may be anything
    ]
    if no_tensors:
        raise CheckpointError(f'these entries are no tensors: {_list(no_tensors)}')


def _log(message: str, level: int = logging.INFO) -> None:
    print_log(f'SwinV2: {message}', logger='current', level=level)


def _list(names: Sequence[str], limit: int = 8) -> str:
    return ', '.join(names[:limit]) + (f' and {len(names) - limit} more' if len(names) > limit else '')


def _parts(names: Collection[str]) -> str:
    """Say which parts of a model some names belong to, and how many each has."""
    parts = Counter(PART.match(name)[0] for name in names)
    return ', '.join(f'{part} ({count} entries)' if count > 1 else part for part, count in parts.items())


@dataclass(frozen=True)
class Target:
    """What a backbone tells of itself to those who fill it.

    Args:
        state: What its state dict holds now, by name. Where FSDP has cut parameters in parts, it is what they were when
            the backbone was built, and None where nothing is known but a name.
        built: What its state dict held when it was built, of which the shapes are known. What has come later may be
            missing from a checkpoint: layers of a subclass, adapters.
        told: `pretrained_window_sizes` of the config, 0 for not told.
        windows: Its windows.
    """

    state: Mapping[str, Any]
    built: Mapping[str, Tensor]
    told: Windows
    windows: Windows

    def lacks(self, weights: Collection[str]) -> tuple[list[str], list[str]]:
        """Names that a checkpoint must have and these weights do not; and those of whole output norms beside them."""
        missing = [name for name in self.built if name in self.state and name not in weights]
        present = {name.split('.')[0] for name in weights}
        norms = [name for name in missing if OUTPUT_NORM.match(name) and name.split('.')[0] not in present]
        return [name for name in missing if name not in norms], norms


def check_file(prefix: str, roots: Sequence[str] = (), claims_swin_v2: bool = False, **_) -> None:
    """Check that nothing of a Swin V2 is passed over, in a file that has nothing for the backbone of the model.

    Args:
        prefix: Where the backbone lies in the model.
        roots: Where the file has a Swin V2.
        claims_swin_v2: Whether it has something of one.

    Raises:
        CheckpointError: It has one elsewhere, or a damaged one.
    """
    if claims_swin_v2 and not roots:
        raise CheckpointError(f'it holds a Swin V2 that is not whole, and nothing under {prefix!r}')
    if roots:
        found, there = _list([repr(root) for root in roots]), f'with prefix={roots[0]!r}' if roots[0] else 'as it is'
        raise CheckpointError(
            f'it holds a Swin V2 under {found}, and nothing under {prefix!r}, where the backbone of the model is: load '
            f'it by the init_cfg of the backbone, {there}'
        )


def fit_backbone(given: dict[str, Any], target: Target, is_file: bool, is_part: bool) -> Weights:
    """Turn entries of any layout into entries of a backbone, or raise before anything is touched.

    Entries that all have names of the backbone are its own and need no conversion. These may be a part of it, unless
    they come from a file that claims to hold a Swin V2.

    Args:
        given: Weights by name.
        target: The backbone.
        is_file: Whether they come from a file.
        is_part: Whether the backbone is a part of the model that is loaded. It may then be another architecture that
            has these entries, or none.

    Returns:
        Weights under the names of the backbone. It keeps its own where they have none; all of them, where `given` is no
        Swin V2 and need not be one.

    Raises:
        CheckpointError: Something is missing, unexpected, of another shape or no floating-point number, or the
            pre-training windows are not known.
    """
    given = unwrap(given)
    is_own = given.keys() <= target.state.keys()
    is_needed = is_file and not is_part
    if is_part and not is_own and not claims_swin_v2(given):
        _log(
            f"the checkpoint's backbone is of another architecture (it has {_list(list(given), 2)}) and is left out; "
            'the whole backbone stays as it is',
            logging.WARNING,
        )
        return {}
    if is_own and (given or not is_needed):
        weights = dict(given)
        _check_tensors({name: value for name, value in weights.items() if isinstance(target.state[name], Tensor)})
        stored_windows(weights, None)  # which checks them
    else:
        weights = _leave_out(extract_backbone(dict(given), own=target.state), target)
    weights = _fit_windows(_fit_patches(weights, target), target)
    claims_all = is_needed or is_file and any(name in target.built for name in weights)
    _check_names_and_shapes(weights, target, must_be_whole=claims_all or not is_own)
    _log_kept(weights, target)
    return weights


def _log_kept(weights: Weights, target: Target) -> None:
    kept = [name for name in target.state if name not in weights]
    if not weights:
        _log('the checkpoint has nothing for the backbone, which stays as it is', logging.WARNING)
    elif kept:
        _log(f'the checkpoint lacks {_parts(kept)}, which stay as they are')


def _leave_out(weights: Weights, target: Target) -> Weights:
    """Leave out complete stages that follow the last of the module, and output norms that it does not have."""
    end = num_stages(target.state)
    merging = f'layers.{end - 1}.downsample.'
    later = tuple(f'layers.{stage}.' for stage in range(end, num_stages(weights)))
    if later and not any(name.startswith(merging) for name in target.state):
        later += (merging,)
    if not all(name in weights for name in required_names(weights) if name.startswith(later)):
        later = ()
    left_out = [
        name for name in weights if name.startswith(later) or OUTPUT_NORM.match(name) and name not in target.state
    ]
    listed = [name for name in left_out if not name.endswith(ENTRY)]
    if listed:
        _log(f'left out, as parts that the model does not have: {_parts(listed)}')
    return {name: value for name, value in weights.items() if name not in left_out}


def _fit_patches(weights: Weights, target: Target) -> Weights:
    """Adapt the patch embedding to channels and patch size, and inflate an image model for a video model."""
    kernel, own = weights.get(PATCH), target.state.get(PATCH)
    if kernel is None or own is None or own.shape != target.built[PATCH].shape:  # another stem fits no public file
        return weights
    is_inflated = own.dim() == 5 and is_for_images(weights)
    can_fit = (kernel.dim() == own.dim() or is_inflated) and len(kernel) == len(own)  # else refused, with what else is
    if can_fit and kernel.numel() and _is_dense(kernel):
        patch = tuple(own.shape[3:] if is_inflated else own.shape[2:])
        weights = weights | {PATCH: adapt_patches(kernel, own.shape[1], patch)}
    return inflate(weights, own.shape[2], target.told, target.windows) if is_inflated else weights


def _fit_windows(weights: Weights, target: Target) -> Weights:
    """Settle the pre-training windows of the blocks whose whole position bias is replaced; others keep theirs."""

    def is_replaced(block: str) -> bool:
        if stage_of(block) >= len(target.windows):  # a stage that was appended, of whose windows nothing is known
            return False
        bias = [name for name in target.state if name.startswith(block + BIAS) and not name.endswith(ENTRY)]
        return bool(bias) and all(name in weights for name in bias)

    blocks = [block for block in blocks_of(weights) if is_replaced(block)]
    stored = windows_per_stage(weights, {stage: target.windows[stage] for stage in sorted(set(map(stage_of, blocks)))})
    settled = settle_windows(stored, target.told, target.windows)
    log_transfer(settled, stored, target.windows)
    return weights | window_entries(settled, blocks)


def _is_dense(value: Tensor) -> bool:
    return value.is_floating_point() and value.layout is torch.strided and not value.is_meta


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


def _raise_if_any(problems: Mapping[str, Sequence[str]], more: str = '') -> None:
    listed = '; '.join(f'{kind}: {_list(names)}' for kind, names in problems.items() if names)
    if listed:
        raise CheckpointError(f'it does not fit: {listed}{more}')


def _check_names_and_shapes(weights: Weights, target: Target, must_be_whole: bool) -> None:
    missing, _ = target.lacks(weights)
    unexpected = [name for name in weights if name not in target.state]
    gone = [name for name in unexpected if name in target.built]
    own = {name: value for name, value in target.state.items() if isinstance(value, Tensor)}
    shared = {name: value for name, value in weights.items() if name in own}
    shapes = {name: value.shape for name, value in weights.items() if isinstance(value, Tensor)}
    ours, theirs = describe({name: value.shape for name, value in own.items()}), describe(shapes)
    _raise_if_any(
        {
            'missing': missing if must_be_whole else [],
            'unexpected': unexpected,
            'of another shape': [
                f'{name} {tuple(value.shape)} for {tuple(own[name].shape)}'
                for name, value in shared.items()
                if value.shape != own[name].shape
            ],
            'not of dense floating-point numbers': [
                f'{name} ({value.dtype}, {value.layout}, {value.device})'
                for name, value in shared.items()
                if own[name].is_floating_point() and own[name].layout is torch.strided and not _is_dense(value)
            ],
        },
        (f'. The checkpoint has {theirs}; the model has {ours}' if ours != theirs else '')
        + (f'. {gone[0]} has gone since the model was built: load first, then change the model' if gone else ''),
    )
