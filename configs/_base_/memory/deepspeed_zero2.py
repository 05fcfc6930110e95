# DeepSpeed's ZeRO-2: gradients are sharded too. With gradient accumulation they are reduced in every iteration, with
# ZeRO-1 once per optimizer step.
_base_ = './deepspeed_zero1.py'

strategy = dict(zero_optimization=dict(stage=2))
