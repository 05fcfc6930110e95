# mmseg's runtime, with runs that resume exactly. The schedule has the checkpoint hook.
_base_ = 'mmseg::_base_/default_runtime.py'

custom_hooks = [dict(type='swinv2_mm.ReproducibleResumeHook')]
