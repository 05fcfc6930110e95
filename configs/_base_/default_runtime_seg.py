# mmseg's, with a resumed run that ends like an uninterrupted one.
_base_ = 'mmseg::_base_/default_runtime.py'

custom_hooks = [dict(type='swinv2_mm.ReproducibleResumeHook')]
