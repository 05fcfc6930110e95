"""Hooks and the optimizer constructor, registered in `swinv2_mm.registry`; needs no toolbox."""

from .hooks import AtomicCheckpointHook, ReproducibleResumeHook
from .optim_wrapper_constructor import SwinV2OptimWrapperConstructor

__all__ = ['AtomicCheckpointHook', 'ReproducibleResumeHook', 'SwinV2OptimWrapperConstructor']
