"""The parts of mmengine and mmcv that the backbones use, with substitutes for machines without them.

Without mmengine and mmcv, as on a machine for benchmarks, the backbones are plain PyTorch modules with the same layers.
Registry, `init_cfg`, `init_weights` and drop path are not available: use `SwinTransformerV2(..., drop_path_rate=0.0)`.
"""

import logging

from torch import nn

from .version import HAS_OPENMMLAB, check_dependencies

if HAS_OPENMMLAB:
    from mmcv.cnn.bricks import DropPath
    from mmengine.logging import print_log
    from mmengine.model import BaseModule

    from .registry import MODELS
else:

    class DropPath(nn.Module):
        """Substitute for mmcv's DropPath that raises an ImportError."""

        def __init__(self, *args, **kwargs) -> None:
            check_dependencies()

    class BaseModule(nn.Module):
        """Substitute for mmengine's BaseModule without `init_cfg`."""

        def __init__(self, init_cfg: None = None) -> None:
            super().__init__()
            if init_cfg is not None:
                check_dependencies()

        def init_weights(self) -> None:
            """Raise an ImportError."""
            check_dependencies()

    class MODELS:
        """Substitute for the registry that registers nothing."""

        @staticmethod
        def register_module():
            """Return a decorator that leaves the class unchanged."""
            return lambda cls: cls

    def print_log(message: str, logger: str | None = None, level: int = logging.INFO) -> None:
        """Log a message to the logger of this package."""
        logging.getLogger('swinv2_mm').log(level, message)


__all__ = ['MODELS', 'BaseModule', 'DropPath', 'print_log']
