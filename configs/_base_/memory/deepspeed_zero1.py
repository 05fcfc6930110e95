# DeepSpeed's ZeRO-1, with which the paper trained G (Sec. 3.4): each process keeps the optimizer states of its share of
# the parameters. Recipe and results are those of ordinary training; a checkpoint is a folder that loads as a file does.
# Needs pip install swinv2_mm[deepspeed].
#   _base_ = ['./htc_swinv2_l.py', '../_base_/memory/deepspeed_zero1.py']
runner_type = 'swinv2_mm.FlexibleRunner'
strategy = dict(type='swinv2_mm.DeepSpeedStrategy', zero_optimization=dict(stage=1))
