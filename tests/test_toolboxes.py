"""The backbones in stock configs of the toolboxes, found by their registered names."""

import importlib.util

import pytest
from bare_python import run_python

# base config of the toolbox, and overrides for the channels of the backbone (and for smaller heads)
STOCK = {
    'mmdet': (
        'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
        'neck=dict(in_channels=[96, 192, 384, 768]), roi_head=dict(bbox_head=dict(fc_out_channels=16))',
    ),
    'mmseg': (
        'swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
        'pretrained=None, decode_head=dict(in_channels=[96, 192, 384, 768], channels=16)',
    ),
    'mmaction': (
        'recognition/tsn/tsn_imagenet-pretrained-r50_8xb32-1x1x3-100e_kinetics400-rgb.py',
        'cls_head=dict(in_channels=768)',
    ),
    'mmaction-3d': (
        'recognition/swin/swin-tiny-p244-w877_in1k-pre_8xb8-amp-32x2x1-30e_kinetics400-rgb.py',
        'cls_head=dict(num_classes=7)',
    ),
}
CONFIG = """
_base_ = '{toolbox}::{base}'
model = dict(
    backbone=dict(_delete_=True, type='swinv2_mm.{backbone}', arch='tiny', window_size=8),
    {rest})
"""
# this package is imported only through the registry, except that mmaction2's wheel needs its workarounds first; so does
# mmpretrain, which mmdet and mmaction import if it is installed
CHECK = """
import sys, torch
sys.modules['mmpretrain'] = None
if sys.argv[1] == 'mmaction':
    import swinv2_mm
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
for path, output in zip(sys.argv[2::2], sys.argv[3::2]):
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model).eval()
    with torch.no_grad():
        shape = tuple(eval(output).shape)
    print(cfg.default_scope, type(model).__name__, type(model.backbone).__module__, shape)
"""
OUTPUT = {
    'mmdet': 'model.extract_feat(torch.rand(1, 3, 64, 96))[0]',
    'mmseg': 'model.encode_decode(torch.rand(2, 3, 64, 96), [dict(img_shape=(64, 96))] * 2)',
    'mmaction': 'model.backbone(torch.rand(1, 3, 64, 96))[3]',
    'mmaction-3d': "model(torch.rand(2, 1, 3, 4, 64, 96), stage='head')",
}
EXPECTED = {
    'mmdet': 'mmdet MaskRCNN swinv2_mm.models.swin_v2 (1, 256, 16, 24)',
    'mmseg': 'mmseg EncoderDecoder swinv2_mm.models.swin_v2 (2, 150, 64, 96)',
    'mmaction': 'mmaction Recognizer2D swinv2_mm.models.swin_v2 (1, 768, 2, 3)',
    'mmaction-3d': 'mmaction Recognizer3D swinv2_mm.models.swin_v2 (2, 7)',
}


@pytest.mark.parametrize('toolbox', ['mmdet', 'mmseg', 'mmaction'])
def test_stock_configs_without_custom_imports(toolbox, tmp_path):
    if importlib.util.find_spec(toolbox) is None:
        pytest.skip(f'{toolbox} is not installed')
    arguments, expected = [toolbox], []
    for kind in (kind for kind in STOCK if kind.startswith(toolbox)):
        base, rest = STOCK[kind]
        backbone = 'SwinTransformer3DV2' if '3d' in kind else 'SwinTransformerV2'
        config = tmp_path / f'config-{kind}.py'
        config.write_text(CONFIG.format(toolbox=toolbox, base=base, rest=rest, backbone=backbone))
        arguments += [config, OUTPUT[kind]]
        expected.append(EXPECTED[kind])
    result = run_python(CHECK, *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert [line for line in result.stdout.splitlines() if line in expected] == expected
