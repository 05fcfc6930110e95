"""The folder of timm, transformers and torchvision, which `make setup` keeps out of the environment.

mmengine imports any torchvision that it finds, and mmdet any transformers.
"""

import sys
from pathlib import Path

import torch

FOLDER = str(Path(sys.prefix, 'oracles'))
# operators that torchvision expects of its compiled part
TORCHVISION_OPS = ('nms', 'qnms', 'roi_align', 'ps_roi_align', 'roi_pool', 'ps_roi_pool', 'deform_conv2d')


def add_to_path() -> None:
    """Make the packages importable from now on."""
    if FOLDER not in sys.path:
        sys.path.append(FOLDER)
        _declare_torchvision_ops()


def _declare_torchvision_ops() -> None:
    """Make torchvision importable with a torch that it was not compiled for: Swin in torchvision is plain PyTorch."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError:  # its operators do not exist
        library = torch.library.Library('torchvision', 'DEF')
        for name in (*TORCHVISION_OPS, *(f'_{name}_backward' for name in TORCHVISION_OPS)):
            library.define(f'{name}(Tensor x) -> Tensor')
        globals()['_torchvision_ops'] = library  # the declarations live as long as this object
