"""From a file, an address or the name of a release to weights; every road of mmengine's passes through here."""

from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader

from . import releases
from .backbone import check_complete, extract_backbone, unwrap
from .errors import CheckpointError, in_file
from .files import read_checkpoint
from .layouts import Weights, claims_swin_v2, find_backbone, find_backbones


def load_swinv2_state_dict(path: str | Path, trust: bool = False) -> Weights:
    """Load the backbone of any public Swin V2 checkpoint under the names of this package.

    Args:
        path: Local file, address, or `swinv2://NAME` of a release.
        trust: Whether the file may execute code. Without it, nothing that the file contains is executed.

    Returns:
        Weights by name. Where the pre-training windows are known, each block has its entry
        `attn.cpb_mlp.pretrained_window_size` of shape (axes,), with 0 for an axis that is not known.

    Raises:
        FileNotFoundError: There is no such file.
        UnsafeCheckpointError: The file holds more than data.
        CheckpointError: It cannot be read, or holds no complete Swin V2.
    """
    local = local_path(path)
    checkpoint = read_checkpoint(local, trust=trust)
    with in_file(local):
        weights = extract_backbone(unwrap(checkpoint), release=releases.windows_of(local))
        check_complete(weights)
    return weights


def local_path(path: str | Path) -> Path:
    """Path of a local file, after a download if need be.

    Raises:
        CheckpointError: No such release, or no network.
    """
    if str(path).startswith(releases.SCHEME):
        return releases.download(releases.find(str(path)).url)
    if str(path).startswith(('http://', 'https://')):
        return releases.download(str(path))
    return Path(path)


# ---------------------------------------------------------------- mmengine

_with_prefix = mmengine_checkpoint._load_checkpoint_with_prefix


def load_from_local(filename: str, map_location: Any = None) -> dict:
    """Take the place of mmengine's loader of local files, see `register_loaders`."""
    return _load(Path(filename).expanduser(), map_location)


def load_from_http(filename: str, map_location: Any = None) -> dict:
    """Take the place of mmengine's loader of http(s) addresses, which lets files execute code."""
    return _load(releases.download(filename), map_location)


def load_from_release(filename: str, map_location: Any = None) -> dict:
    """Load `swinv2://NAME`."""
    return _load(local_path(filename), map_location)


def load_with_prefix(prefix: str, filename: str, map_location: Any = None) -> OrderedDict:
    """Take the place of mmengine's function for `init_cfg` with a `prefix`, which forgets the metadata."""
    return _with_source(_with_prefix(prefix, filename, map_location), filename)


def register_loaders() -> None:
    """Let mmengine read local files and addresses as data alone, and know `swinv2://` and safetensors.

    This goes for every model, since no loader knows which one a file is for; what it hands on differs for backbones of
    Swin V2 alone.
    """
    CheckpointLoader.register_scheme('', load_from_local, force=True)
    CheckpointLoader.register_scheme(('http://', 'https://'), load_from_http, force=True)
    CheckpointLoader.register_scheme(releases.SCHEME, load_from_release, force=True)
    mmengine_checkpoint.load_from_http = load_from_http  # what torchvision://, open-mmlab:// and mmcls:// call
    mmengine_checkpoint._load_checkpoint_with_prefix = load_with_prefix


def _load(path: Path, map_location: Any) -> dict:
    checkpoint = read_checkpoint(path, map_location)
    with in_file(path):
        return _for_toolboxes(checkpoint, path)


def _for_toolboxes(checkpoint: Any, path: Path) -> dict:
    """Put a backbone that stands alone where the toolboxes' models have theirs, and note where it comes from.

    All of them call it `backbone`, and mmengine hands a module those entries alone that lie under its own name: this is
    what lets `load_from` take a file of Microsoft's for a whole detector. Checkpoints of whole models and of other
    backbones are handed on as they are.

    Raises:
        CheckpointError: The file holds no weights, or a Swin V2 that cannot be understood.
    """
    weights = unwrap(checkpoint)
    if 'state_dict' in checkpoint and checkpoint['state_dict'] is not weights:
        raise CheckpointError(f'its state_dict is a {type(checkpoint["state_dict"]).__name__} instead of a dict')
    if not all(isinstance(name, str) for name in weights):
        raise CheckpointError('its entries have no names, so it holds no weights')
    try:
        _, root = find_backbone(list(weights))
    except CheckpointError:  # none, or several; what is being loaded will see which of them it needs
        if 'state_dict' not in checkpoint:
            return _with_source(checkpoint, path, names=weights)
        checkpoint['state_dict'] = _with_source(weights, path)
        return checkpoint
    is_of_mm = isinstance(checkpoint.get('meta'), dict) and checkpoint.get('state_dict') is weights
    if root.endswith('backbone.') or (root.removeprefix('module.') and is_of_mm):
        found = checkpoint if is_of_mm else {'state_dict': weights, 'meta': {}}
    else:
        backbone = extract_backbone(weights, releases.windows_of(path))
        meta = checkpoint['meta'] if is_of_mm else {}
        found = {'state_dict': {f'backbone.{name}': value for name, value in backbone.items()}, 'meta': meta}
    found['state_dict'] = _with_source(found['state_dict'], path)
    return found


def _with_source(weights: dict, path: str | Path, names: Collection[str] | None = None) -> OrderedDict:
    """Note in the metadata, which modules are given when they load, the file and what it has of a Swin V2."""
    names = [name for name in (weights if names is None else names) if isinstance(name, str)]
    noted = OrderedDict(weights)
    noted._metadata = OrderedDict(getattr(weights, '_metadata', {}))
    found = dict(roots=[root for _, root in find_backbones(names)], claims_swin_v2=claims_swin_v2(names))
    for module in ('', 'backbone'):
        noted._metadata[module] = dict(noted._metadata.get(module, {}), source=str(path), **found)
    return noted
