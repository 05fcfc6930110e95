# HTC++ on SwinV2-L, tested at several scales with window 48, from a checkpoint of htc_swinv2_l.py.
# Paper: 60.2 box AP and 52.1 mask AP on val (Table 3).
#   tools/dist_test.sh configs/det/htc_swinv2_l_w48_tta.py CHECKPOINT 8 --tta
_base_ = ['./htc_swinv2_l_w48.py', '../_base_/tta/coco_multiscale.py']
