# HTC++ on SwinV2-G, tested at 1100 with window 48, from a checkpoint of htc_swinv2_g.py, which was trained with 32.
# Paper: 61.9 box AP and 53.4 mask AP on val (Table 3).
#   tools/dist_test.sh configs/det/htc_swinv2_g_w48.py CHECKPOINT 8
_base_ = './htc_swinv2_g.py'

model = dict(backbone=dict(window_size=48))
