# DeepSpeed's ZeRO-3: parameters are sharded too, and those of a module are gathered while it runs. Not supported:
# EMAHook. A process needs memory for the whole model at the start, when it reads or writes a checkpoint, and for each
# image of a validation.
_base_ = './deepspeed_zero1.py'

strategy = dict(zero_optimization=dict(stage=3))
