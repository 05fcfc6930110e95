# DeepSpeed's ZeRO-2: as deepspeed_zero1.py, and each process keeps the gradients of its share alone. With gradient
# accumulation it exchanges them in every iteration, where ZeRO-1 does once for a step.
_base_ = './deepspeed_zero1.py'

strategy = dict(zero_optimization=dict(stage=2))
