"""Hooks and the optimizer constructors, registered in `swinv2_mm.registry`; needs no toolbox."""

from ..version import HAS_OPENMMLAB, check_dependencies

__all__ = [
    'AtomicCheckpointHook',
    'LearningRateDecayOptimWrapperConstructor',
    'ReproducibleResumeHook',
    'SwinV2OptimWrapperConstructor',
]

if HAS_OPENMMLAB:  # else there is `engine.memory` only
    from .hooks import AtomicCheckpointHook, ReproducibleResumeHook
    from .optim_wrapper_constructor import LearningRateDecayOptimWrapperConstructor, SwinV2OptimWrapperConstructor
else:

    def __getattr__(name: str) -> None:
        if name in __all__:
            check_dependencies()
        raise AttributeError(name)
