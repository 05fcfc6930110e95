# mmaction's runtime, with checkpoints written atomically, runs that resume exactly, and images of predictions for
# --show-dir.
_base_ = 'mmaction::_base_/default_runtime.py'

default_hooks = dict(
    checkpoint=dict(type='swinv2_mm.AtomicCheckpointHook', max_keep_ckpts=2),
    visualization=dict(type='swinv2_mm.engine.video_visualization.VideoVisualizationHook'),
)
custom_hooks = [dict(type='swinv2_mm.ReproducibleResumeHook')]
