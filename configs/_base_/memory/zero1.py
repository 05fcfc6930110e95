# ZeRO-1 (Sec. 3.4): optimizer states are sharded among the processes; in fp32 with AdamW they take 8 of the 16 bytes
# per parameter. Weights, gradients, checkpoints and results are those of DDP. Add it to the bases of any config:
#   _base_ = ['./htc_swinv2_l.py', '../_base_/memory/zero1.py']
runner_type = 'swinv2_mm.ShardedRunner'
model_wrapper_cfg = dict(type='swinv2_mm.ZeroDistributedDataParallel')
