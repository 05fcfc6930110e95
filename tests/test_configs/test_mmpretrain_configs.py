"""What the configs of classification and of self-supervised pre-training have in common: README and metafile."""

from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS
from nano import smaller_backbone

from swinv2_mm.cli import launch

pytest.importorskip('mmpretrain')

FOLDERS = [Path(__file__).parents[2] / 'configs' / name for name in ('cls', 'ssl')]
PAPER = {folder: sorted(p for p in folder.glob('*.py') if 'demo' not in p.stem) for folder in FOLDERS}
pytestmark = pytest.mark.usefixtures('mmpretrain_scope')


@pytest.mark.parametrize('path', sum(PAPER.values(), []), ids=lambda path: path.stem)
def test_the_smaller_backbone_of_the_readme_fits(path):
    cfg = launch.load_config(str(path), smaller_backbone(path.parent))
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    layer = model.head if path.parent.name == 'cls' else model.neck.decoder[0]
    assert model.backbone.num_features[-1] == layer.in_channels == 256
    assert cfg.model.backbone.get('init_cfg') is None
