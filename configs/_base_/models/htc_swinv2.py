# HTC++ with a Swin V2 backbone: mmdet's Hybrid Task Cascade with semantic branch, and "an extra global self-attention
# layer appended at the output of last stage" (Swin V1, A2.2). The config that inherits it sets `arch` and the whole
# list of necks, because lists do not merge; the extra layer takes the backbone's drop path.
_base_ = './cascade_mask_rcnn_swinv2.py'

mask_head = dict(
    type='HTCMaskHead',
    num_convs=4,
    in_channels=256,
    conv_out_channels=256,
    num_classes=80,
    loss_mask=dict(type='CrossEntropyLoss', use_mask=True, loss_weight=1.0),
)
model = dict(
    type='HybridTaskCascade',
    data_preprocessor=dict(
        pad_seg=True,
        batch_augments=[
            dict(type='BatchFixedSizePad', size=(1536, 1536), pad_mask=True, pad_seg=True, seg_pad_value=255),
        ],
    ),
    neck=[
        dict(type='swinv2_mm.GlobalAttention', in_channels=768, num_heads=24),
        dict(type='FPN', in_channels=[96, 192, 384, 768], out_channels=256, num_outs=5),
    ],
    roi_head=dict(
        type='HybridTaskCascadeRoIHead',
        interleaved=True,
        mask_info_flow=True,
        mask_head=[dict(mask_head, with_conv_res=False), mask_head, mask_head],
        semantic_roi_extractor=dict(
            type='swinv2_mm.models.detection.Float32RoIExtractor',
            roi_layer=dict(type='RoIAlign', output_size=14, sampling_ratio=0),
            out_channels=256,
            featmap_strides=[8],
        ),
        semantic_head=dict(
            type='FusedSemanticHead',
            num_ins=5,
            fusion_level=1,
            seg_scale_factor=1 / 8,
            num_convs=4,
            in_channels=256,
            conv_out_channels=256,
            num_classes=183,  # thing and stuff classes of COCO's stuffthingmaps
            loss_seg=dict(type='CrossEntropyLoss', ignore_index=255, loss_weight=0.2),
        ),
    ),
    # scale jitter gives images so small that no anchor lies inside some of them, which would be an error in mmdet
    train_cfg=dict(rpn=dict(allowed_border=-1)),
    # soft-NMS (A2.1, A2.2); its threshold is not stated
    test_cfg=dict(rcnn=dict(score_thr=0.001, nms=dict(type='soft_nms', iou_threshold=0.5))),
)
