"""The public Swin V2 weights by name: where they are, and which window their position bias was learnt with."""

import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
from mmengine.dist import barrier, get_dist_info
from torch.hub import download_url_to_file

from .errors import CheckpointError

SCHEME = 'swinv2://'
OFFICIAL_URL = 'https://github.com/SwinTransformer/storage/releases/download/v2.0.0/'
TORCHVISION_URL = 'https://download.pytorch.org/models/'
SIMMIM_URL = 'https://huggingface.co/zdaxie/SimMIM/resolve/main/'

DIGEST = re.compile(r'-(?!20\d{6}\.)([0-9a-f]{8,64})\.\w+$')  # name-<beginning of SHA-256>.pth, but not a date

# Windows of pre-training, per stage; the last stage's map is smaller than the window of 12 or 16, which shrank to it.
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


def windows_of(path: str | Path) -> tuple[int, ...] | None:
    """Pre-training windows of a file that has the name under which it was published, else None.

    Repositories of timm and transformers call every file `model` or `pytorch_model`; there, the folder tells.
    """
    path = Path(path).absolute()
    names = [path.stem]
    if path.stem in ('model', 'pytorch_model'):
        # <name>/model.safetensors, models--<owner>--<name>/snapshots/<hash>/... in the cache of huggingface_hub, or
        # <name>/resolve/main/... in an address
        names += [folder.split('--')[-1] for folder in reversed(path.parts[-4:-1])]
    return next((PUBLISHED_NAMES[name] for name in names if name in PUBLISHED_NAMES), None)


def find(name: str) -> Release:
    """Release of this name, with or without the scheme.

    Raises:
        CheckpointError: There is none; the message says which there are.
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
    """Download a file once, with a progress bar, into the folder where torch keeps such files.

    A digest is verified where one is published: in the file's name, as torchvision does, or beside a file on
    huggingface.co. With several processes, the first one downloads, and the others do if they do not see its file.

    Returns:
        Local path, see `cached_path`.

    Raises:
        CheckpointError: It cannot be downloaded, or is damaged; the message says which file to put where.
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
    """Where a download lies: `$TORCH_HOME/hub/checkpoints/<file name>`, as for torch's own downloads.

    A name that neither belongs to a release nor carries a digest (`model.safetensors`, `epoch_12.pth`) does not tell
    one file from another, so such files lie below folders named after their address.

    Raises:
        CheckpointError: The address has parts that would lead elsewhere.
    """
    address = urlsplit(url)
    if '..' in address.path.split('/'):
        raise CheckpointError(f'the address {url} leads out of the folder for downloads')
    name = Path(address.path).name
    is_unique = DIGEST.search(name) or any(release.url == url for release in RELEASES.values())
    return Path(torch.hub.get_dir(), 'checkpoints', name if is_unique else address.netloc + address.path)


def _try_download(url: str, path: Path) -> Exception | None:
    """Return what went wrong instead of raising it, so that no process waits for one that left."""
    if path.exists():
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        download_url_to_file(url, str(path), hash_prefix=published_digest(url))
    except (OSError, RuntimeError) as error:  # no network, no such page, no space; a digest that differs
        return error
    return None


def published_digest(url: str) -> str | None:
    """Beginning of the file's SHA-256, or None where its publisher gives none."""
    if match := DIGEST.search(url):
        return match[1]
    if '/resolve/' in url:  # a model repository: beside the file lies its Git LFS pointer
        with urllib.request.urlopen(url.replace('/resolve/', '/raw/', 1), timeout=60) as answer:
            pointer = answer.read(1024).decode(errors='replace')
        match = re.search(r'oid sha256:([0-9a-f]{64})', pointer)
        return match[1] if match else None
    return None
