# SimMIM pre-training of SwinV2-L, as simmim_swinv2_b_in1k_192.py. No settings were published for SwinV2-L; those for
# Swin-L (V1) differ from those for Swin-B only in the window.
#   tools/dist_train.sh configs/ssl/simmim_swinv2_l_in1k_192.py 8
_base_ = './simmim_swinv2_b_in1k_192.py'

model = dict(backbone=dict(arch='large', with_cp=True), neck=dict(in_channels=1536))
