# FSDP2 of PyTorch: parameters, gradients and optimizer states are sharded among the processes, as in ZeRO-3, and the
# parameters of a block are gathered while it runs. Checkpoints and results are those of DDP. Needs torch 2.7 or newer.
# Not supported: EMAHook. Add it to the bases of any config:
#   _base_ = ['./htc_swinv2_l.py', '../_base_/memory/fsdp.py']
runner_type = 'swinv2_mm.ShardedRunner'
model_wrapper_cfg = dict(type='swinv2_mm.FullyShardedModel')
