"""The name of a release, an address or a path -> weights; also registered as mmengine's loaders."""

import re
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from mmengine.dist import barrier, get_dist_info
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader
from torch.hub import download_url_to_file

from . import CheckpointError
from .backbone import check_complete, extract_backbone, in_file, unwrap
from .files import read_checkpoint
from .layouts import Weights, find_backbone, find_backbones, has_log_cpb, pop_classifier

# ---------------------------------------------------------------- releases

SCHEME = 'swinv2://'
OFFICIAL_URL = 'https://github.com/SwinTransformer/storage/releases/download/v2.0.0/'
TORCHVISION_URL = 'https://download.pytorch.org/models/'
SIMMIM_URL = 'https://huggingface.co/zdaxie/SimMIM/resolve/main/'

DIGEST = re.compile(r'-(?!20\d{6}\.)([0-9a-f]{8,64})\.\w+$')  # name-<beginning of SHA-256>.pth; dates are excluded

# Pre-training windows, per stage; in the last stage, windows of 12 and 16 were shrunk to the size of the feature map.
W8, W12, W16 = (8, 8, 8, 8), (12, 12, 12, 6), (16, 16, 16, 8)


@dataclass(frozen=True)
class Release:
    """A published file and the pre-training window of each of its stages."""

    url: str
    windows: tuple[int, ...]

    @property
    def file_name(self) -> str:
        """Name of the file in the cache, as published."""
        return Path(urlsplit(self.url).path).name


def _official() -> dict[str, Release]:
    windows = {f'{size}_window8_256': W8 for size in ('tiny', 'small', 'base')}
    windows |= {f'{size}_window16_256': W16 for size in ('tiny', 'small', 'base')}
    for size in ('base', 'large'):
        windows |= {f'{size}_window12_192_22k': W12}
        windows |= {f'{size}_window12to{w}_192to{pixels}_22kto1k': W12 for w, pixels in ((16, 256), (24, 384))}
    return {
        name: Release(
            f'{OFFICIAL_URL}swinv2_{name.replace("_", "_patch4_", 1)}{"_ft" if "to1k" in name else ""}.pth', windows
        )
        for name, windows in windows.items()
    }


def _torchvision() -> dict[str, Release]:
    files = {'tiny': 'swin_v2_t-b137f0e2', 'small': 'swin_v2_s-637d8ceb', 'base': 'swin_v2_b-781e5279'}
    return {f'torchvision_{size}': Release(f'{TORCHVISION_URL}{name}.pth', W8) for size, name in files.items()}


def _simmim() -> dict[str, Release]:
    small = ('1kper10', '1kper20', '1kper50', '1k')
    data = {'small': small, 'base': (*small, '22k'), 'large': (*small, '22k')}
    data |= {'huge': ('1kper20', '1kper50', '1k', '22k'), 'giant': ('1kper50', '1k', '22k')}
    releases = {}
    for size, sets in data.items():
        for name in (f'{size}_{images}_{steps}' for images in sets for steps in ('125k', '250k', '500k')):
            releases[f'simmim_{name}'] = Release(f'{SIMMIM_URL}simmim_swinv2_pretrain_models/swinv2_{name}.pth', W12)
            releases[f'simmim_{name}_ft'] = Release(
                f'{SIMMIM_URL}simmim_swinv2_finetune_models/finetune_swinv2_{name}.pth', W12
            )
    return releases


RELEASES = {**_official(), **_torchvision(), **_simmim()}


def _published_names() -> dict[str, tuple[int, ...]]:
    """Names of files and of model repositories (timm, transformers) without suffix, and their windows."""
    windows = {Path(release.file_name).stem: release.windows for release in RELEASES.values()}
    for name, release in _official().items():
        windows[Path(release.file_name).stem.replace('_', '-')] = release.windows  # transformers
        timm = f'swinv2_{name.removesuffix("_22k").removesuffix("_22kto1k")}'
        data = 'ms_in22k_ft_in1k' if 'to1k' in name else 'ms_in22k' if '22k' in name else 'ms_in1k'
        windows[f'{timm}.{data}'] = release.windows
    return windows


PUBLISHED_NAMES = _published_names()


def find_named_windows(path: str | Path) -> tuple[int, ...] | None:
    """Pre-training window of each stage, by the name under which a file was published; None for other names.

    Repositories of timm and transformers call every file `model` or `pytorch_model`; there, the folder has the name.
    """
    path = Path(path).absolute()
    names = [path.stem]
    if path.stem in ('model', 'pytorch_model'):
        # <name>/model.safetensors, models--<owner>--<name>/snapshots/<hash>/... in the cache of huggingface_hub, or
        # <name>/resolve/main/... in an address
        names += [folder.split('--')[-1] for folder in reversed(path.parts[-4:-1])]
    return next((PUBLISHED_NAMES[name] for name in names if name in PUBLISHED_NAMES), None)


def find_release(name: str) -> Release:
    """Release of this name, with or without the scheme.

    Raises:
        CheckpointError: There is none; the message lists the names.
    """
    name = name.removeprefix(SCHEME)
    if name not in RELEASES:
        others = ', '.join(known for known in RELEASES if not known.startswith('simmim_'))
        raise CheckpointError(
            f'there is no Swin V2 release {name!r}; there are {others}, and those of SimMIM, named after size, data '
            'and steps, such as simmim_base_1k_500k, and simmim_base_1k_500k_ft for its fine-tuned one'
        )
    return RELEASES[name]


def download(url: str) -> Path:
    """Download a file once, with a progress bar, into torch's own folder for checkpoints.

    A published SHA-256 is verified: the one in the file's name (torchvision), or in the Git LFS pointer of a file on
    huggingface.co. `huggingface_hub` is not used: over plain HTTP it verifies only the size, and it has another cache.
    Of several processes, the first one downloads; another one does so only if it does not see the file.

    Returns:
        Local path, see `cached_path`.

    Raises:
        CheckpointError: It cannot be downloaded, or is damaged; the message names the file and where to put it.
    """
    path = cached_path(url)
    rank, _ = get_dist_info()
    error = None
    if rank == 0:
        error = _try_download(url, path)
    barrier()
    if rank > 0:
        error = _try_download(url, path)
    if error is not None:
        raise CheckpointError(
            f'cannot download {url}: {error}. Without a network, get this file elsewhere and put it at {path}'
        ) from error
    return path


def cached_path(url: str) -> Path:
    """Path of a download: `$TORCH_HOME/hub/checkpoints/<file name>`, as for torch's own downloads.

    A name of no release and without a digest (`model.safetensors`, `epoch_12.pth`) is not unique, so such files are
    saved below folders named after their address.

    Raises:
        CheckpointError: The address contains `..`, which would lead out of that folder.
    """
    address = urlsplit(url)
    if '..' in address.path.split('/'):
        raise CheckpointError(f'the address {url} leads out of the folder for downloads')
    name = Path(address.path).name
    is_unique = DIGEST.search(name) or any(release.url == url for release in RELEASES.values())
    return Path(torch.hub.get_dir(), 'checkpoints', name if is_unique else address.netloc + address.path)


def _try_download(url: str, path: Path) -> Exception | None:
    """Return an error instead of raising it, so that every process reaches the barrier."""
    if path.exists():
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        download_url_to_file(url, str(path), hash_prefix=published_digest(url))
    except (OSError, RuntimeError) as error:  # no network, no such page, no space; a digest that differs
        return error
    return None


def published_digest(url: str) -> str | None:
    """Beginning of the file's SHA-256, or None if none is published."""
    if match := DIGEST.search(url):
        return match[1]
    if '/resolve/' in url:  # a model repository, where /raw/ is the Git LFS pointer of the file
        with urllib.request.urlopen(url.replace('/resolve/', '/raw/', 1), timeout=60) as answer:
            pointer = answer.read(1024).decode(errors='replace')
        match = re.search(r'oid sha256:([0-9a-f]{64})', pointer)
        return match[1] if match else None
    return None


# ---------------------------------------------------------------- loading


def load_swinv2_state_dict(path: str | Path, trust: bool = False) -> Weights:
    """Load the backbone of any public Swin V2 checkpoint under the names of this package.

    Args:
        path: Local file, address, or `swinv2://NAME` of a release.
        trust: Whether the file may execute code. Without it, nothing that the file contains is executed.

    Returns:
        Weights by name. Where the pre-training windows are known, each block has a buffer
        `attn.cpb_mlp.pretrained_window_size` of shape (axes,), with 0 for an unknown axis.

    Raises:
        FileNotFoundError: There is no such file.
        UnsafeCheckpointError: The file contains more than data.
        CheckpointError: It cannot be read, or contains no complete Swin V2.
    """
    local = local_path(path)
    checkpoint = read_checkpoint(local, trust=trust)
    with in_file(local):
        weights = extract_backbone(unwrap(checkpoint), find_named_windows(local))
        check_complete(weights)
    return weights


def local_path(path: str | Path) -> Path:
    """Path of a local file, downloaded if necessary.

    Raises:
        CheckpointError: No such release, or no network.
    """
    if str(path).startswith(SCHEME):
        return download(find_release(str(path)).url)
    if str(path).startswith(('http://', 'https://')):
        return download(str(path))
    return Path(path)


# ---------------------------------------------------------------- loaders of mmengine

_stock_load_with_prefix = mmengine_checkpoint._load_checkpoint_with_prefix


def load_from_local(filename: str, map_location: Any = None) -> dict:
    """Replace mmengine's loader of local files, see `register_loaders`."""
    return _load(Path(filename).expanduser(), map_location)


def load_from_http(filename: str, map_location: Any = None) -> dict:
    """Replace mmengine's loader of http(s) addresses, which lets files execute code."""
    return _load(download(filename), map_location)


def load_from_release(filename: str, map_location: Any = None) -> dict:
    """Load `swinv2://NAME`."""
    return _load(local_path(filename), map_location)


def load_with_prefix(prefix: str, filename: str, map_location: Any = None) -> OrderedDict:
    """Replace mmengine's function for `init_cfg` with a `prefix`, which drops the metadata."""
    return _add_metadata(_stock_load_with_prefix(prefix, filename, map_location), filename)


def register_loaders() -> None:
    """Make mmengine read local files and addresses as data only, and support `swinv2://` and safetensors.

    This applies to every model, because a loader does not know which model a file is for. What it returns differs from
    mmengine's only for files with a Swin V2.
    """
    CheckpointLoader.register_scheme('', load_from_local, force=True)
    CheckpointLoader.register_scheme(('http://', 'https://'), load_from_http, force=True)
    CheckpointLoader.register_scheme(SCHEME, load_from_release, force=True)
    mmengine_checkpoint.load_from_http = load_from_http  # what torchvision://, open-mmlab:// and mmcls:// call
    mmengine_checkpoint._load_checkpoint_with_prefix = load_with_prefix


def _load(path: Path, map_location: Any) -> dict:
    checkpoint = read_checkpoint(path, map_location)
    with in_file(path):
        return _place_under_backbone(checkpoint, path)


def _place_under_backbone(checkpoint: Any, path: Path) -> dict:
    """Put the weights of a Swin V2 under `backbone.`, and add the source to their metadata.

    Every toolbox has its backbone under this name, and a module gets only the entries under its own name. So
    `load_from` accepts an official file for a whole detector. The classifier of the file stays with the backbone, which
    gives it to the head of an image classifier. SimMIM's mask token stays too; only `SimMIMSwinTransformerV2` has one.
    Checkpoints of whole models and of other backbones are returned unchanged.

    Raises:
        CheckpointError: The file contains no weights, or a Swin V2 that cannot be converted.
    """
    weights = unwrap(checkpoint)
    if 'state_dict' in checkpoint and checkpoint['state_dict'] is not weights:
        raise CheckpointError(f'its state_dict is a {type(checkpoint["state_dict"]).__name__} instead of a dict')
    if not all(isinstance(name, str) for name in weights):
        raise CheckpointError('its keys are not strings, so it contains no weights')
    try:
        _, prefix = find_backbone(list(weights))
    except CheckpointError:  # none or several: the module that loads selects its own by prefix
        if 'state_dict' not in checkpoint:
            return _add_metadata(checkpoint, path, names=weights)
        checkpoint['state_dict'] = _add_metadata(weights, path)
        return checkpoint
    is_of_mm = isinstance(checkpoint.get('meta'), dict) and checkpoint.get('state_dict') is weights
    if prefix.endswith('backbone.') or (prefix.removeprefix('module.') and is_of_mm):
        placed = checkpoint if is_of_mm else {'state_dict': weights, 'meta': {}}
    else:
        classifier = pop_classifier(weights, prefix)
        backbone = extract_backbone(weights, find_named_windows(path), model_keys=['mask_token']) | classifier
        meta = checkpoint['meta'] if is_of_mm else {}
        placed = {'state_dict': {f'backbone.{name}': value for name, value in backbone.items()}, 'meta': meta}
    placed['state_dict'] = _add_metadata(placed['state_dict'], path)
    return placed


def _add_metadata(weights: dict, path: str | Path, names: Collection[str] | None = None) -> OrderedDict:
    """Add the file, and what it contains of a Swin V2, to the metadata that torch passes to each loading module."""
    names = [name for name in (weights if names is None else names) if isinstance(name, str)]
    prefixes = [prefix for _, prefix in find_backbones(names)]
    added = dict(source=str(path), swin_v2_prefixes=prefixes, is_swin_v2=has_log_cpb(names))
    state_dict = OrderedDict(weights)
    state_dict._metadata = OrderedDict(getattr(weights, '_metadata', {}))
    for module in ('', 'backbone', 'head'):
        state_dict._metadata[module] = state_dict._metadata.get(module, {}) | added
    return state_dict
