"""Detection configs: they build, they hold the paper's numbers, and HTC is mmdet's HTC."""

import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from swinv2_mm.checkpoints import releases

pytest.importorskip('mmdet')

CONFIGS = Path(__file__).parents[2] / 'configs' / 'det'
LEAVES = sorted(p.stem for p in CONFIGS.glob('*.py'))
PAPER = sorted(set(LEAVES) - {'htc_swinv2_demo'})
NANO = dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))


@pytest.fixture(autouse=True)
def _mmdet_scope():
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


def read(name: str) -> Config:
    return Config.fromfile(CONFIGS / f'{name}.py')


def nano(name: str) -> torch.nn.Module:
    model = copy.deepcopy(read(name).model)
    model.backbone.update(arch=NANO, window_size=8, with_cp=False, init_cfg=None)
    model.neck.in_channels = [16, 32, 64, 128]
    model.data_preprocessor.pop('batch_augments', None)
    for stage in model.train_cfg.rcnn:
        stage.sampler.num = 16
    for head in model.roi_head.bbox_head:
        head.pop('norm_cfg', None)  # SyncBN has no CPU form
    model = MODELS.build(model)
    model.init_weights()
    return model


def batch(model: torch.nn.Module, height: int = 96, width: int = 128) -> dict:
    from mmdet.testing import demo_mm_inputs

    inputs = demo_mm_inputs(2, [[3, height, width]] * 2, num_classes=80, with_mask=True, with_semantic=True)
    return model.data_preprocessor(inputs, True)


@pytest.mark.parametrize('name', LEAVES)
def test_builds(name):
    with torch.device('meta'):
        model = MODELS.build(read(name).model)
    assert type(model.backbone).__name__ == 'SwinTransformerV2'
    assert [conv.in_channels for conv in (c.conv for c in model.neck.lateral_convs)] == model.backbone.num_features


def test_every_config_of_the_metafile_exists_and_none_is_left_out():
    import yaml

    metafile = yaml.safe_load((CONFIGS / 'metafile.yml').read_text())
    assert sorted(Path(m['Config']).stem for m in metafile['Models']) == PAPER


# facts of the paper (A1, A2.1, A2.2): learning rate, images a step, window, and epochs or steps
RECIPES = {
    'cascade_mask_rcnn_swinv2': (1e-4, 16, 16, 36),
    'htc_swinv2': (4e-4, 64, 32, 36),
    'htc_swinv2_g': (6e-4, 96, 32, 45_000),
}


@pytest.mark.parametrize('name', PAPER)
def test_holds_the_numbers_of_the_paper(name):
    lr, images, window, length = RECIPES.get(name) or RECIPES[name[:-2]]
    cfg = read(name)
    optimizer = cfg.optim_wrapper.optimizer
    accumulate = cfg.optim_wrapper.get('accumulative_counts', 1)
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', lr, 0.05)
    assert 8 * cfg.train_dataloader.batch_size * accumulate == images
    assert cfg.auto_scale_lr.base_batch_size * accumulate == images
    assert cfg.model.backbone.window_size == window
    assert cfg.train_cfg.get('max_epochs') == length or cfg.train_cfg.max_iters == length * accumulate
    assert (cfg.optim_wrapper.type, cfg.optim_wrapper.dtype) == ('AmpOptimWrapper', 'bfloat16')
    last_scheduler = cfg.param_scheduler[-1]
    assert last_scheduler.end == (cfg.train_cfg.get('max_epochs') or cfg.train_cfg.max_iters)
    if name.startswith('htc'):
        assert cfg.optim_wrapper.paramwise_cfg.custom_keys.backbone.lr_mult == 0.1
        assert cfg.model.test_cfg.rcnn.nms.type == 'soft_nms'
        assert cfg.model.data_preprocessor.batch_augments[0].size == (1536, 1536)
        resize = cfg.train_dataloader.dataset.pipeline[2]
        assert (resize.scale, resize.ratio_range) == ((1536, 1536), (0.1, 2.0))


@pytest.mark.parametrize('name', PAPER)
def test_starts_from_weights_of_its_size_and_windows(name):
    backbone = read(name).model.backbone
    if backbone.arch in ('huge', 'giant'):  # never released
        assert backbone.init_cfg is None
        return
    told = backbone.pretrained_window_sizes
    assert backbone.init_cfg.type == 'Pretrained'
    assert backbone.arch in backbone.init_cfg.checkpoint
    assert releases.find(backbone.init_cfg.checkpoint).windows == (told if isinstance(told, tuple) else (told,) * 4)


def test_htc_is_that_of_mmdet():
    """All that differs from mmdet's own HTC config: backbone, bf16 parts, soft-NMS, padding, and Cascade's defaults."""
    ours = read('htc_swinv2_t').model
    stock = Config.fromstring("_base_ = 'mmdet::htc/htc_r50_fpn_1x_coco.py'", '.py').model
    with torch.device('meta'):
        mine, theirs = MODELS.build(ours), MODELS.build(stock)
    for part in ('rpn_head', 'roi_head'):
        shapes = [{n: p.shape for n, p in getattr(m, part).named_parameters()} for m in (mine, theirs)]
        assert shapes[0] == shapes[1]
    for key in ('interleaved', 'mask_info_flow', 'stage_loss_weights', 'num_stages', 'semantic_head', 'type'):
        assert ours.roi_head[key] == stock.roi_head[key], key
    for head in ('bbox_head', 'mask_head'):
        assert [dict(h) for h in ours.roi_head[head]] == [dict(h) for h in stock.roi_head[head]]
    assert ours.train_cfg.rpn_proposal == stock.train_cfg.rpn_proposal
    assert ours.test_cfg.rcnn.score_thr == stock.test_cfg.rcnn.score_thr
    for a, b in zip(ours.train_cfg.rcnn, stock.train_cfg.rcnn, strict=True):
        assert (a.assigner.pos_iou_thr, a.sampler, a.mask_size) == (b.assigner.pos_iou_thr, b.sampler, b.mask_size)


@pytest.mark.parametrize('name', ['htc_swinv2_t', 'cascade_mask_rcnn_swinv2_t'])
def test_losses_and_gradients_are_finite_in_bfloat16(name):
    """The whole detector under autocast, where stock mmdet stops at RoIAlign."""
    model = nano(name).train()
    data = batch(model)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = model.loss(data['inputs'], data['data_samples'])
    total, logged = model.parse_losses(losses)
    total.backward()
    assert total.isfinite()
    assert {'s0.loss_cls', 's1.loss_bbox', 's2.loss_mask', 'loss_rpn_bbox'} <= set(logged)
    assert ('loss_semantic_seg' in logged) == name.startswith('htc')
    without = {n for n, p in model.named_parameters() if p.grad is None}
    assert not without
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_proposals_keep_their_pixels_in_bfloat16():
    """Anchors and proposals lie where they do in float32, though bfloat16 knows only every eighth pixel out there."""
    model = nano('htc_swinv2_t').eval()
    head = model.rpn_head
    for p in head.rpn_reg.parameters():
        torch.nn.init.zeros_(p)  # proposals are anchors
    features = tuple(torch.randn(1, 256, 1200 // s, 1600 // s) for s in (4, 8, 16, 32, 64))
    metas = [dict(img_shape=(1200, 1600), scale_factor=(1.0, 1.0))]
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        scores, deltas = head(features)
        boxes = head.predict_by_feat(scores, deltas, batch_img_metas=metas, cfg=model.test_cfg.rpn, rescale=False)[
            0
        ].bboxes
    anchors = torch.cat(head.prior_generator.grid_priors([f.shape[-2:] for f in features], device='cpu'))
    anchors[:, 0::2].clamp_(0, 1600)
    anchors[:, 1::2].clamp_(0, 1200)
    known = {tuple(a) for a in anchors.round(decimals=2).tolist()}
    assert boxes.dtype == torch.float32
    assert boxes[:, 2].max() > 1500
    assert {tuple(b) for b in boxes.round(decimals=2).tolist()} <= known
