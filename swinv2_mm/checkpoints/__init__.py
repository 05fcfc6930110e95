"""Loading of every public Swin V2 checkpoint; importing this package makes mmengine read checkpoints as data only.

The path of a checkpoint:

1. `loaders`: the name of a release, an address or a path becomes a local file; mmengine's loaders end here too.
2. `files`: the file (zip of `torch.save`, safetensors, old pickle) is read as data; its checksums are verified.
3. `pickles`: a pickle is inspected without executing it: sizes of tensors, names of refused code, configs.
4. `layouts`: the layout (official, timm, transformers, torchvision, mmpretrain) is recognised; keys are renamed.
5. `conversion`: values change to fit the model: pre-training windows, channels, patch size, images to video.
6. `backbone`: the loading hook of the backbone calls 4 and 5, and checks that every entry fits and none is missing.
"""

from ..version import HAS_OPENMMLAB, check_dependencies

__all__ = ['CheckpointError', 'UnsafeCheckpointError']


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit the model."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint contains more than data; nothing in it was executed."""


if HAS_OPENMMLAB:
    from .loaders import load_swinv2_state_dict, register_loaders  # after the errors, which these modules import

    register_loaders()
    __all__ += ['load_swinv2_state_dict']
else:

    def __getattr__(name: str) -> None:
        if name in ('load_swinv2_state_dict', 'register_loaders'):
            check_dependencies()
        raise AttributeError(name)
