"""What the backbones use of mmengine and mmcv.

Benchmarks also run on machines that have neither. There the backbones are plain PyTorch modules: they have the same
layers, but no config, no `init_cfg`, no `init_weights` and no drop path: `SwinTransformerV2(..., drop_path_rate=0.0)`.
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
        """Raises the error that names what is not installed."""

        def __init__(self, *args, **kwargs) -> None:
            check_dependencies()

    class BaseModule(nn.Module):
        """A module of PyTorch, which takes no `init_cfg`."""

        def __init__(self, init_cfg: None = None) -> None:
            super().__init__()
            if init_cfg is not None:
                check_dependencies()

        def init_weights(self) -> None:
            """Raise the error that names what is not installed."""
            check_dependencies()

    class MODELS:
        """A registry that registers nothing."""

        @staticmethod
        def register_module():
            """Decorate a class, which stays as it is."""
            return lambda cls: cls

    def print_log(message: str, logger: str | None = None, level: int = logging.INFO) -> None:
        """Log a message; there is only one logger."""
        logging.getLogger('swinv2_mm').log(level, message)


__all__ = ['MODELS', 'BaseModule', 'DropPath', 'print_log']
