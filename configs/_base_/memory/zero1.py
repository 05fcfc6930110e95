# ZeRO-1 (Sec. 3.4): each process keeps the optimizer states of its share of the parameters, 8 of their 16 bytes in fp32
# with AdamW. Weights, gradients and checkpoints are those of ordinary training, and so are the results.
#   _base_ = ['./htc_swinv2_l.py', '../_base_/memory/zero1.py']
runner_type = 'swinv2_mm.ShardedRunner'
model_wrapper_cfg = dict(type='swinv2_mm.ZeroDistributedDataParallel')
