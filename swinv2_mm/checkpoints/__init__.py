"""Loading of every public Swin V2 checkpoint. Importing it makes mmengine read checkpoints as data alone."""

from ..version import HAS_OPENMMLAB, check_dependencies
from .errors import CheckpointError, UnsafeCheckpointError

__all__ = ['CheckpointError', 'UnsafeCheckpointError']

if HAS_OPENMMLAB:
    from .loaders import load_swinv2_state_dict, register_loaders

    register_loaders()
    __all__ += ['load_swinv2_state_dict']
else:

    def __getattr__(name: str) -> None:
        if name in ('load_swinv2_state_dict', 'register_loaders'):
            check_dependencies()
        raise AttributeError(name)
