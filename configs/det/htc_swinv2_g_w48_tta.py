# HTC++ on SwinV2-G, tested at several scales with window 48, from a checkpoint of htc_swinv2_g.py.
# Paper: 62.5 box AP and 53.7 mask AP on val (Table 3).
#   tools/dist_test.sh configs/det/htc_swinv2_g_w48_tta.py CHECKPOINT 8 --tta
_base_ = ['./htc_swinv2_g_w48.py', '../_base_/tta/coco_multiscale.py']
