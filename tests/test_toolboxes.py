"""The backbone inside configs of the toolboxes themselves, found by its name alone."""

import importlib.util
import subprocess
import sys

import pytest

# base config of the toolbox, and where the channels of the backbone go
STOCK = {
    'mmdet': ('mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', 'neck=dict(in_channels=[96, 192, 384, 768])'),
    'mmseg': (
        'swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
        'pretrained=None, decode_head=dict(in_channels=[96, 192, 384, 768])',
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
# nothing of this package is imported but through the registry; mmaction2's wheel needs the mends that come with it
CHECK = """
import sys, torch
{mend}
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
cfg = Config.fromfile(sys.argv[1])
init_default_scope(cfg.default_scope)
model = MODELS.build(cfg.model).eval()
with torch.no_grad():
    {run}
print(cfg.default_scope, type(model).__name__, type(model.backbone).__module__, shape)
"""
RUN = {
    'mmdet': 'shape = [tuple(f.shape) for f in model.extract_feat(torch.rand(1, 3, 64, 96))][0]',
    'mmseg': 'shape = tuple(model.encode_decode(torch.rand(2, 3, 64, 96), [dict(img_shape=(64, 96))] * 2).shape)',
    'mmaction': 'shape = tuple(model.backbone(torch.rand(1, 3, 64, 96))[3].shape)',
    'mmaction-3d': "shape = tuple(model(torch.rand(2, 1, 3, 4, 64, 96), stage='head').shape)",
}
EXPECTED = {
    'mmdet': 'mmdet MaskRCNN swinv2_mm.models.swin_v2 (1, 256, 16, 24)',
    'mmseg': 'mmseg EncoderDecoder swinv2_mm.models.swin_v2 (2, 150, 64, 96)',
    'mmaction': 'mmaction Recognizer2D swinv2_mm.models.swin_v2 (1, 768, 2, 3)',
    'mmaction-3d': 'mmaction Recognizer3D swinv2_mm.models.swin_v2 (2, 7)',
}


@pytest.mark.parametrize('kind', STOCK)
def test_a_stock_config_takes_the_backbone_without_custom_imports(kind, tmp_path):
    toolbox, backbone = kind.split('-')[0], 'SwinTransformer3DV2' if '3d' in kind else 'SwinTransformerV2'
    if importlib.util.find_spec(toolbox) is None:
        pytest.skip(f'{toolbox} is not installed')
    base, rest = STOCK[kind]
    config = tmp_path / 'config.py'
    config.write_text(CONFIG.format(toolbox=toolbox, base=base, rest=rest, backbone=backbone))
    code = CHECK.format(mend='import swinv2_mm' if toolbox == 'mmaction' else '', run=RUN[kind])
    result = subprocess.run(
        [sys.executable, '-c', code, str(config)], cwd=tmp_path, text=True, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines()[-1] == EXPECTED[kind]


def test_importing_the_package_or_its_backbone_imports_no_toolbox():
    code = (
        'import sys, swinv2_mm, swinv2_mm.models, swinv2_mm.ops, swinv2_mm.engine; '
        "names = 'mmdet', 'mmseg', 'mmaction', 'torchvision', 'mmcv._ext', 'swinv2_mm.ops.kernels'; "
        'print([name for name in names if name in sys.modules])'
    )
    result = subprocess.run([sys.executable, '-c', code], text=True, capture_output=True, check=True)
    assert result.stdout.splitlines()[-1] == '[]'  # DeepSpeed, where it is installed, prints a line of its own
