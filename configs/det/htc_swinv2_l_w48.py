# HTC++ on SwinV2-L, tested at 1100 with window 48, from a checkpoint of htc_swinv2_l.py, which was trained with 32.
# Paper: 58.9 box AP and 51.2 mask AP on val (Table 3).
#   tools/dist_test.sh configs/det/htc_swinv2_l_w48.py CHECKPOINT 8
_base_ = './htc_swinv2_l.py'

model = dict(backbone=dict(window_size=48))
