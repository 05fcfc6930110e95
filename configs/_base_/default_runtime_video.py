# mmaction's, with checkpoints that survive a kill and a resumed run that ends like an uninterrupted one.
_base_ = 'mmaction::_base_/default_runtime.py'

default_hooks = dict(checkpoint=dict(type='swinv2_mm.AtomicCheckpointHook', max_keep_ckpts=2))
custom_hooks = [dict(type='swinv2_mm.ReproducibleResumeHook')]
