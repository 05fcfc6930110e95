"""Swin Transformer V2 for OpenMMLab 3.x. Importing this package imports no toolbox.

Without mmengine and mmcv, operators and backbones still work as plain PyTorch modules: see `openmmlab`.
"""

from pathlib import Path

from .version import HAS_OPENMMLAB, __version__, check_dependencies

if HAS_OPENMMLAB:
    check_dependencies()

    from mmengine.config.utils import MODULE2PACKAGE

    from . import compat

    compat.apply()
    # mmengine resolves only OpenMMLab packages in `_base_ = 'swinv2_mm::...'` and get_config('swinv2_mm::...')
    MODULE2PACKAGE.setdefault('swinv2_mm', 'swinv2_mm')


def config_path(name: str) -> str:
    """Absolute path of a config of this package, for `_base_` and for the tools.

    Args:
        name: Path below `configs/`, such as 'det/htc_swinv2_t.py'.

    Raises:
        FileNotFoundError: There is no such config; the message lists all configs.
    """
    root = Path(__file__).parent / '.mim' / 'configs'
    path = root / name
    if not path.is_file():
        known = sorted(p.relative_to(root).as_posix() for p in root.glob('*/*.py') if p.parent.name != '_base_')
        raise FileNotFoundError(f'swinv2_mm has no config {name!r}; it has {", ".join(known)}')
    return str(path)


__all__ = ['__version__', 'config_path']
