"""Hooks and optimizer wrapper constructors, registered in `swinv2_mm.registry`; needs no toolbox."""

from ..version import HAS_OPENMMLAB, check_dependencies

if HAS_OPENMMLAB:
    from .hooks import AtomicCheckpointHook, ReproducibleResumeHook
    from .non_finite import TerminateOnNonFiniteHook
    from .optim_wrapper_constructor import LearningRateDecayOptimWrapperConstructor, SwinV2OptimWrapperConstructor
else:
    check_dependencies()

__all__ = [
    'AtomicCheckpointHook',
    'LearningRateDecayOptimWrapperConstructor',
    'ReproducibleResumeHook',
    'SwinV2OptimWrapperConstructor',
    'TerminateOnNonFiniteHook',
]
