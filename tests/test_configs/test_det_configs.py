"""Detection configs build, have the paper's numbers, and their HTC is mmdet's."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner, load_checkpoint
from nano import ConfigFolder, closest, train_a_step
from tool_runs import TOOLS, load_tool

from swinv2_mm.checkpoints import loaders
from swinv2_mm.cli import launch

pytest.importorskip('mmdet')
from nano.det import narrow, shrink, shrink_model, write_shapes

CONFIGS = Path(__file__).parents[2] / 'configs' / 'det'
LEAVES = sorted(p.stem for kind in ('cascade', 'htc') for p in CONFIGS.glob(f'{kind}_*.py'))
PAPER = sorted(set(LEAVES) - {'htc_swinv2_demo'})
TEST_SYSTEMS = [name for name in PAPER if 'w48' in name]
TRAINED = ['cascade_mask_rcnn_swinv2_t', 'htc_swinv2_t', 'htc_swinv2_g', 'htc_swinv2_g_objects365']
FOLDER = ConfigFolder(CONFIGS, shrink)
read = FOLDER.read


@pytest.fixture(autouse=True)
def _mmdet_scope():
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


def nano(name: str) -> torch.nn.Module:
    cfg = read(name)
    launch.adapt_to_cpu(cfg)
    model = narrow(shrink_model(cfg.model))
    model.backbone.with_cp = False
    model.data_preprocessor.pop('batch_augments', None)
    model = MODELS.build(model)
    model.init_weights()
    return model


def batch(model: torch.nn.Module, height: int = 96, width: int = 128, num_items: list[int] | None = None) -> dict:
    from mmdet.testing import demo_mm_inputs

    inputs = demo_mm_inputs(
        2,
        [[3, height, width]] * 2,
        num_classes=80,
        with_mask=model.with_mask,
        with_semantic=getattr(model, 'with_semantic', False),
        num_items=num_items,
    )
    return model.data_preprocessor(inputs, True)


@pytest.mark.parametrize('name', sorted(set(LEAVES) - set(TEST_SYSTEMS)))
def test_builds(name):
    with torch.device('meta'):
        model = MODELS.build(read(name).model)
    assert type(model.backbone).__name__ == 'SwinTransformerV2'
    *attention, fpn = [model.neck] if name.startswith('cascade') else model.neck
    assert [type(layer).__name__ for layer in attention] == ['GlobalAttention'] * name.startswith('htc')
    assert [c.conv.in_channels for c in fpn.lateral_convs] == model.backbone.num_features


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp('shapes'))


def load(name: str, shapes: Path, work_dir: Path) -> Config:
    return FOLDER.load(name, shapes / ('objects365' if 'objects365' in name else 'coco'), work_dir)


@pytest.mark.parametrize('name', TRAINED)
def test_trains_a_step_and_tests_an_image(name, shapes, tmp_path):
    """The recipe's data, transforms, losses, optimizer, schedule and metric; only sizes are smaller."""
    runner = train_a_step(load(name, shapes, tmp_path))
    kinds = {'bbox', 'segm'} if runner.model.with_mask else {'bbox'}
    figures = {key.split('_')[0] for key in runner.message_hub.log_scalars if 'mAP' in key}
    assert figures == {f'val/coco/{kind}' for kind in kinds}


@pytest.mark.parametrize('name', sorted(set(PAPER) - set(TRAINED)))
def test_differs_only_in_numbers_from_a_config_trained_above(name):
    """The numbers and the initial weights are tested below."""
    assert closest(shrink(read(name)), [shrink(read(other)) for other in TRAINED]) == []


def test_scales_and_flips_of_one_image_are_merged(shapes, tmp_path):
    """With one multi-scale config, because all have the same views."""
    cfg, *others = [load(name, shapes, tmp_path) for name in TEST_SYSTEMS if name.endswith('_tta')]
    for other in others:
        assert (other.tta_model, other.tta_pipeline) == (cfg.tta_model, cfg.tta_pipeline)
    load_tool(TOOLS / 'test.py').use_tta(cfg)
    assert len(cfg.test_dataloader.dataset.pipeline[-1].transforms[0]) == 6
    figures = Runner.from_cfg(cfg).test()
    assert {'coco/bbox_mAP', 'coco/segm_mAP'} <= set(figures)


# the paper (A1, A2.1, A2.2): learning rate, images a step, window, and epochs or steps
RECIPES = {
    'cascade_mask_rcnn_swinv2': (1e-4, 16, 16, 36),
    'htc_swinv2': (4e-4, 64, 32, 36),
    'htc_swinv2_g': (6e-4, 96, 32, 45_000),
    'htc_swinv2_g_objects365': (1.2e-3, 96, 32, 67_500),
}
RECIPE_NAMES = sorted(set(PAPER) - set(TEST_SYSTEMS))


@pytest.mark.parametrize('name', RECIPE_NAMES)
def test_has_the_numbers_of_the_paper(name):
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
    pipeline = {t.type.split('.')[-1]: t for t in cfg.train_dataloader.dataset.pipeline}
    if name.startswith('cascade'):
        scales = pipeline['RandomChoiceResize'].scales
        assert {long for long, _ in scales} == {1333}
        assert (min(scales), max(scales)) == ((1333, 480), (1333, 800))
        return
    assert cfg.optim_wrapper.paramwise_cfg.custom_keys.backbone.lr_mult == 0.1
    assert cfg.model.test_cfg.rcnn.nms.type == 'soft_nms'
    if name.endswith('objects365'):
        assert pipeline['RandomResize'].scale == [(1600, 800), (1600, 1024)]
        return
    assert cfg.model.data_preprocessor.batch_augments[0].size == (1536, 1536)
    assert (pipeline['RandomResize'].scale, pipeline['RandomResize'].ratio_range) == ((1536, 1536), (0.1, 2.0))
    assert pipeline['RandomCrop'].crop_size == (1536, 1536)
    assert list(pipeline).index('LoadAnnotations') < list(pipeline).index('InstaBoost')
    assert cfg.test_dataloader.dataset.pipeline[1].scale == (1600, 1100)


@pytest.mark.parametrize('name', TEST_SYSTEMS)
def test_a_test_config_changes_only_the_window(name):
    """A checkpoint of the config without `_w48` then fits. The multi-scale configs add what `--tta` reads."""
    cfg, trained = read(name), read(name[: name.index('_w48')])
    assert (trained.model.backbone.window_size, cfg.model.backbone.window_size) == (32, 48)
    trained.model.backbone.window_size = 48
    for key in set(cfg) | set(trained):
        if key not in ('views', 'meta_keys', 'tta_model', 'tta_pipeline'):
            assert cfg[key] == trained[key], key
    assert ('tta_model' in cfg) == ('tta_pipeline' in cfg) == name.endswith('_tta')


@pytest.mark.parametrize('name', PAPER)
def test_starts_from_weights_of_its_size_and_windows(name):
    backbone = read(name).model.backbone
    if backbone.arch in ('huge', 'giant'):  # never released
        assert backbone.init_cfg is None
        return
    windows = backbone.pretrained_window_sizes
    assert backbone.init_cfg.type == 'Pretrained'
    assert backbone.arch in backbone.init_cfg.checkpoint
    release = loaders.find_release(backbone.init_cfg.checkpoint)
    assert release.windows == (windows if isinstance(windows, tuple) else (windows,) * 4)


def test_htc_is_that_of_mmdet():
    """The same as mmdet's HTC config but for backbone, bf16 parts, soft-NMS, padding and anchors."""
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


@pytest.mark.parametrize(
    ('name', 'num_items'),
    [
        ('htc_swinv2_t', [0, 6]),
        ('htc_swinv2_t', [0, 0]),
        ('cascade_mask_rcnn_swinv2_t', [0, 6]),
        ('cascade_mask_rcnn_swinv2_t', [0, 0]),
        ('htc_swinv2_g_objects365', [0, 6]),
    ],
)
def test_losses_and_gradients_are_finite_in_bfloat16(name, num_items):
    """The whole detector under autocast, where mmdet's RoIAlign raises an error; also on images without instances."""
    model = nano(name).train()
    data = batch(model, num_items=num_items)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = model.loss(data['inputs'], data['data_samples'])
    total, logged = model.parse_losses(losses)
    total.backward()
    assert total.isfinite()
    assert {'s0.loss_cls', 's1.loss_bbox', 'loss_rpn_bbox'} <= set(logged)
    assert ('s2.loss_mask' in logged) == model.with_mask
    assert ('loss_semantic_seg' in logged) == name.startswith('htc_swinv2_t')
    without = {n for n, p in model.named_parameters() if p.grad is None}
    assert not without
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_only_masks_and_classifiers_are_initialized_after_objects365(tmp_path):
    """Objects365, then COCO (A2.2). Objects365 has no masks, no semantic segmentation maps, and other classes."""
    first, second = nano('htc_swinv2_g_objects365'), nano('htc_swinv2_g')
    torch.save(dict(state_dict=first.state_dict()), tmp_path / 'objects365.pth')
    fresh = {name: value.clone() for name, value in second.state_dict().items()}
    load_checkpoint(second, str(tmp_path / 'objects365.pth'))
    of_masks = ('roi_head.mask_head.', 'roi_head.semantic_head.')
    kept = {name for name, value in second.state_dict().items() if name.startswith(of_masks) or '.fc_cls.' in name}
    assert len([name for name in kept if '.fc_cls.' in name]) == 6  # weights and biases of three stages
    for name, value in second.state_dict().items():
        assert torch.equal(value, (fresh if name in kept else first.state_dict())[name]), name


def test_a_checkpoint_of_window_32_fits_at_48():
    trained, tested = nano('htc_swinv2_g'), nano('htc_swinv2_g_w48')
    tested.load_state_dict(trained.state_dict(), strict=True)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():  # both windows are larger than all feature maps
        for ours, theirs in zip(tested.eval().backbone(images), trained.eval().backbone(images), strict=True):
            assert torch.equal(ours, theirs)


def test_proposals_keep_their_pixels_in_bfloat16():
    """Anchors and proposals have the positions of float32; bfloat16 represents only every eighth pixel at 1500."""
    model = nano('htc_swinv2_t').eval()
    head = model.rpn_head
    head.in_channels = head.feat_channels = 8  # some CPUs take minutes for a wide convolution in bfloat16
    head._init_layers()
    for p in head.rpn_reg.parameters():
        torch.nn.init.zeros_(p)  # proposals are anchors
    features = tuple(torch.randn(1, 8, 1200 // s, 1600 // s) for s in (4, 8, 16, 32, 64))
    metas = [dict(img_shape=(1200, 1600), scale_factor=(1.0, 1.0))]
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        scores, deltas = head(features)
        boxes = head.predict_by_feat(
            scores, deltas, batch_img_metas=metas, cfg=read('htc_swinv2_t').model.test_cfg.rpn, rescale=False
        )[0].bboxes
    anchors = torch.cat(head.prior_generator.grid_priors([f.shape[-2:] for f in features], device='cpu'))
    anchors[:, 0::2].clamp_(0, 1600)
    anchors[:, 1::2].clamp_(0, 1200)
    known = {tuple(a) for a in anchors.round(decimals=2).tolist()}
    assert boxes.dtype == torch.float32
    assert boxes[:, 2].max() > 1500
    assert {tuple(b) for b in boxes.round(decimals=2).tolist()} <= known


def test_the_page_on_large_models_changes_nothing_but_the_number_of_gpus(tmp_path):
    page = (CONFIGS.parents[1] / 'docs/large_models.md').read_text()
    leaf = tmp_path / 'leaf.py'
    leaf.write_text(re.search(r"```python\n(_base_ = 'swinv2_mm::[^`]*accumulative_counts[^`]*)```", page)[1])
    base, cfg = read('htc_swinv2_g'), Config.fromfile(leaf)
    images = [
        gpus * c.train_dataloader.batch_size * c.optim_wrapper.accumulative_counts for gpus, c in ((8, base), (64, cfg))
    ]
    assert images == [96, 128]
    assert cfg.optim_wrapper.optimizer.lr / images[1] == pytest.approx(base.optim_wrapper.optimizer.lr / images[0])
    # the same schedule in images
    for at in (
        lambda c: c.train_cfg.max_iters,
        lambda c: c.train_cfg.val_interval,
        lambda c: c.default_hooks.checkpoint.interval,
        lambda c: c.param_scheduler[0].end,
        lambda c: c.param_scheduler[1].end,
        lambda c: c.param_scheduler[1].milestones[0],
        lambda c: c.param_scheduler[1].milestones[1],
    ):
        assert 64 * at(cfg) == pytest.approx(8 * at(base), rel=1e-3)
