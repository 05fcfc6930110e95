"""Loading of every public Swin V2 checkpoint. Importing it makes mmengine read checkpoints as data alone."""

from .errors import CheckpointError, UnsafeCheckpointError
from .loaders import load_swinv2_state_dict, register_loaders

register_loaders()

__all__ = ['CheckpointError', 'UnsafeCheckpointError', 'load_swinv2_state_dict']
