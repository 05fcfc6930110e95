# UperNet on SwinV2-G, tested with the shorter side at 896 and window 56, from a checkpoint of
# upernet_swinv2_g.py, which was trained at 640 with window 40. The paper has 59.3
# mIoU on val, and 59.9 at several scales, which is --tta here (Table 4).
#   tools/dist_test.sh configs/seg/upernet_swinv2_g_w56.py CHECKPOINT 8
_base_ = './upernet_swinv2_g.py'

model = dict(backbone=dict(window_size=56))
load, _, labels, check, pack = _base_.test_pipeline
test_pipeline = [load, dict(_scope_='mmseg', type='Resize', scale=(3584, 896), keep_ratio=True), labels, check, pack]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
scales = [(int(r * 3584), int(r * 896)) for r in _base_.ratios]
tta_pipeline = [
    load,
    dict(
        _scope_='mmseg',
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale=scale, keep_ratio=True) for scale in scales],
            *_base_.tta_pipeline[-1].transforms[1:],
        ],
    ),
]
