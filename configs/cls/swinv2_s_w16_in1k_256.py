# swinv2_s_in1k_256.py with window 16; stage 4 is one window of 8x8 (official
# swinv2_small_patch4_window16_256.yaml). Published: 84.1 top-1.
_base_ = './swinv2_s_in1k_256.py'

model = dict(backbone=dict(window_size=(16, 16, 16, 8)))
