# DeepSpeed's ZeRO-3: as deepspeed_zero2.py, and each process keeps its share of the parameters alone; a module's are
# gathered while it is computed. No EMAHook. A process needs the whole model for a moment when it starts, reads or
# writes a checkpoint, and for each image of a validation.
_base_ = './deepspeed_zero1.py'

strategy = dict(zero_optimization=dict(stage=3))
