# Parameters, gradients and optimizer states are split among the processes (PyTorch's FSDP2; ZeRO-3 in other words), and
# a block's parameters are together while it is computed. Checkpoints are those of ordinary training, and so are the
# results. Needs torch 2.7 or newer; no EMAHook.
#   _base_ = ['./htc_swinv2_l.py', '../_base_/memory/fsdp.py']
runner_type = 'swinv2_mm.ShardedRunner'
model_wrapper_cfg = dict(type='swinv2_mm.FullyShardedModel')
