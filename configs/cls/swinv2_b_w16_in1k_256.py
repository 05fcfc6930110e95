# swinv2_b_in1k_256.py with window 16; stage 4 is one window of 8x8 (official
# swinv2_base_patch4_window16_256.yaml). Published: 84.6 top-1.
#   tools/dist_train.sh configs/cls/swinv2_b_w16_in1k_256.py 8
#   tools/dist_test.sh configs/cls/swinv2_b_w16_in1k_256.py swinv2://base_window16_256 8
_base_ = './swinv2_b_in1k_256.py'

model = dict(backbone=dict(window_size=(16, 16, 16, 8)))
