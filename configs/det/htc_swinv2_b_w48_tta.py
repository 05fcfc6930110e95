# HTC++ on SwinV2-B, tested at several scales with window 48, from a checkpoint of htc_swinv2_b.py.
# The paper has no row for B.
#   tools/dist_test.sh configs/det/htc_swinv2_b_w48_tta.py CHECKPOINT 8 --tta
_base_ = ['./htc_swinv2_b_w48.py', '../_base_/tta/coco_multiscale.py']
