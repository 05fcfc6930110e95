# HTC++ on SwinV2-B, tested at 1100 with window 48, from a checkpoint of htc_swinv2_b.py, which was trained with 32.
# The paper has no row for B.
#   tools/dist_test.sh configs/det/htc_swinv2_b_w48.py CHECKPOINT 8
_base_ = './htc_swinv2_b.py'

model = dict(backbone=dict(window_size=48))
