"""Hooks and optimizer wrapper constructors, registered in `swinv2_mm.registry`; needs no toolbox."""

from .hooks import AtomicCheckpointHook, ReproducibleResumeHook
from .optim_wrapper_constructor import LearningRateDecayOptimWrapperConstructor, SwinV2OptimWrapperConstructor

__all__ = [
    'AtomicCheckpointHook',
    'LearningRateDecayOptimWrapperConstructor',
    'ReproducibleResumeHook',
    'SwinV2OptimWrapperConstructor',
]
