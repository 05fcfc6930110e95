# mmpretrain's runtime, with checkpoints written atomically and runs that resume exactly.
_base_ = 'mmpretrain::_base_/default_runtime.py'

default_hooks = dict(checkpoint=dict(type='swinv2_mm.AtomicCheckpointHook', max_keep_ckpts=2))
custom_hooks = [dict(type='swinv2_mm.ReproducibleResumeHook')]
