"""A checkpoint of SimMIM's pre-training loads into the backbones of all toolboxes, with its pre-training windows."""

from pathlib import Path

import pytest
import torch
from loading_paths import (
    ALL_STAGES,
    ARCH,
    LOADING_PATHS,
    PRETRAINED,
    features,
    folder_with_shapes,
    same,
)
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner, load_checkpoint
from nano.ssl import shrink, write_images

from swinv2_mm.cli import launch
from swinv2_mm.models import SimMIMSwinTransformerV2, SwinTransformer3DV2, SwinTransformerV2

pytest.importorskip('mmpretrain')

CONFIG = Path(__file__).parents[2] / 'configs/ssl/simmim_swinv2_b_in1k_192.py'


@pytest.fixture(scope='module')
def folder(tmp_path_factory, shapes):
    return folder_with_shapes(tmp_path_factory.mktemp('simmim'), shapes)


@pytest.fixture(scope='module')
def pretrained(folder) -> tuple[Path, SimMIMSwinTransformerV2]:
    """The checkpoint of a training with the windows of PRETRAINED, and its backbone."""
    cfg = launch.load_config(str(CONFIG), dict(data_root=str(write_images(folder / 'images'))))
    launch.adapt_to_cpu(cfg)
    cfg.work_dir = str(folder / 'pretrained')
    cfg.param_scheduler, cfg.optim_wrapper.optimizer.lr = None, 0.1  # the one step changes every parameter by 0.1
    cfg.model.backbone.window_size = PRETRAINED
    runner = Runner.from_cfg(shrink(cfg, ARCH))
    runner.train()
    return folder / 'pretrained/epoch_1.pth', runner.model.backbone


@pytest.fixture(scope='module')
def expected(pretrained) -> SwinTransformerV2:
    """A backbone with other windows, the pre-training windows in its config, and weights copied without loading code.

    Norms of other stages than the last, which SimMIM does not have, are those of a new backbone.
    """
    _, source = pretrained
    weights = dict(source.named_parameters())
    backbone = SwinTransformerV2(**ALL_STAGES, pretrained_window_sizes=PRETRAINED)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if not name.startswith(('norm0', 'norm1', 'norm2')):
                parameter.copy_(weights[name])
    return backbone


def build_classifier(**backbone) -> torch.nn.Module:
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(
            dict(
                type='ImageClassifier',
                backbone=dict(ALL_STAGES, type='swinv2_mm.SwinTransformerV2', **backbone),
                head=dict(type='swinv2_mm.models.classification.SwinV2ClsHead', num_classes=2, in_channels=128),
            )
        )


def by_load_from_in_a_classifier(path: Path, folder: Path) -> SwinTransformerV2:
    model = build_classifier()
    load_checkpoint(model, str(path))
    return model.backbone


def by_init_cfg_in_a_classifier(path: Path, folder: Path) -> SwinTransformerV2:
    model = build_classifier(init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    model.init_weights()
    return model.backbone


# of mmdet twice, of mmsegmentation, mmaction2 and mmpretrain
TASKS = {name: LOADING_PATHS[name] for name in ('init_cfg_in_a_runner', 'load_from', 'init_model', 'init_recognizer')}
TASKS |= dict(
    load_from_in_a_classifier=by_load_from_in_a_classifier, init_cfg_in_a_classifier=by_init_cfg_in_a_classifier
)


@pytest.mark.parametrize('loading_path', TASKS)
def test_the_checkpoint_loads_into_every_toolbox(loading_path, pretrained, expected, folder):
    path, _ = pretrained
    backbone = TASKS[loading_path](path, folder)
    state, wanted = backbone.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(state[name], wanted[name])] == []
    assert same(features(backbone), features(expected))


def test_the_pretraining_windows_matter(expected):
    other = SwinTransformerV2(**ALL_STAGES, pretrained_window_sizes=8)
    other.load_state_dict({name: value for name, value in expected.named_parameters()})
    assert not any(map(torch.equal, features(other), features(expected)))


@torch.no_grad()
def test_the_checkpoint_loads_into_a_video_backbone(pretrained, expected):
    """It is inflated: a clip of equal frames has the features of the frame."""
    path, _ = pretrained
    options = ALL_STAGES | dict(window_size=(2, 8, 8), init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    video = SwinTransformer3DV2(**options)
    video.init_weights()
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    stills = expected.double().eval()(image)
    clips = video.double().eval()(image[:, :, None].repeat(1, 1, 4, 1, 1))
    for still, clip in zip(stills, clips, strict=True):
        torch.testing.assert_close(clip, still[:, :, None].expand_as(clip), rtol=1e-9, atol=1e-9)


def test_pretraining_continues_from_the_checkpoint_at_another_window(pretrained):
    path, source = pretrained
    assert source.mask_token.abs().min() > 0.03  # trained
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    backbone = SimMIMSwinTransformerV2(ARCH, 8, drop_path_rate=0.0, init_cfg=init_cfg)
    backbone.init_weights()
    assert all(map(torch.equal, backbone.parameters(), source.parameters()))
    windows = {
        tuple(v.tolist()) for k, v in backbone.state_dict().items() if k.startswith('layers.0') and 'window' in k
    }
    assert windows == {(6, 6)}
