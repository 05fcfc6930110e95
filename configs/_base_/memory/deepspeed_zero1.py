# DeepSpeed's ZeRO-1, with which the paper trained G (Sec. 3.4): optimizer states are sharded among the processes.
# Recipe and results are those of DDP. A checkpoint is a folder, which loads like a file. Needs
# `pip install swinv2_mm[deepspeed]`. Add it to the bases of any config:
#   _base_ = ['./htc_swinv2_l.py', '../_base_/memory/deepspeed_zero1.py']
runner_type = 'swinv2_mm.FlexibleRunner'
strategy = dict(type='swinv2_mm.DeepSpeedStrategy', zero_optimization=dict(stage=1))
