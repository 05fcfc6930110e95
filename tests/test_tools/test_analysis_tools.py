"""FLOPs compared with a formula from the paper, curves with the lines of a log, and what the tools print and draw.

The tools run in this process. One slow test of each starts it as a user does.
"""

import importlib.util
import json
import math
from types import SimpleNamespace

import cv2
import matplotlib
import numpy as np
import pytest
import torch
from mmengine.config import Config
from nano import ARCH, NANO_CONFIGS, starting_points
from nano.cls import write_classes
from nano.seg import write_segments
from nano.video import shrink, write_frames, write_kinetics400
from tool_runs import REPOSITORY, TOOLS, call, load_tool, refuse, run
from torch import nn

from swinv2_mm.cli import launch
from swinv2_mm.cli.inputs import input_shape

AS_USERS = pytest.param(run, marks=pytest.mark.slow, id='as_users')
HOWS = pytest.mark.parametrize('how', [pytest.param(call, id='called'), AS_USERS])
NANO = dict(embed_dims=16, depths=(2, 1, 3, 1), num_heads=(1, 2, 4, 8))
TINY_ARCH = dict(embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))
SMALL_ARCH = dict(TINY_ARCH, depths=(2, 2, 18, 2))
BASE_ARCH = dict(embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
LARGE_ARCH = dict(embed_dims=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48))
VIDEO = REPOSITORY / 'configs/video/swinv2_t_k400_224x224x32.py'
DISPLAYS = ('DISPLAY', 'WAYLAND_DISPLAY')
FLOPS, BENCHMARK, BROWSE, LOGS = (
    f'analysis_tools/{name}.py' for name in ('get_flops', 'benchmark', 'browse_dataset', 'analyze_logs')
)


@pytest.fixture
def tool():
    """A function that imports a tool by its name."""
    return lambda name: load_tool(TOOLS / f'analysis_tools/{name}.py')


@pytest.fixture(autouse=True)
def _no_display(monkeypatch):
    """Hide the display of the machine, and restore the style of figures after each test."""
    for name in DISPLAYS:
        monkeypatch.delenv(name, raising=False)
    with matplotlib.rc_context():
        yield


# ---------------------------------------------------------------- FLOPs


def multiply_adds(arch, window, size, patch=(4, 4), norm=5, bias=True):
    """Multiply-adds of Swin V2 without its output norms, from the sizes of all matrix products.

    `window`, `size` and `patch` have a number per axis. `norm` is the count per element of a LayerNorm, `bias`
    whether the MLP of the position bias counts.
    """
    count = 0
    dim = arch['embed_dims']
    grid = [math.ceil(s / p) for s, p in zip(size, patch, strict=True)]
    count += math.prod(grid) * dim * (3 * math.prod(patch) + norm)  # patch embedding and its norm
    stages = list(zip(arch['depths'], arch['num_heads'], strict=True))
    for i, (depth, heads) in enumerate(stages):
        clipped = [min(g, w) for g, w in zip(grid, window, strict=True)]
        # tokens that attention sees
        padded = math.prod(math.ceil(g / w) * w for g, w in zip(grid, clipped, strict=True))
        tokens = math.prod(grid)
        offsets = math.prod(2 * w - 1 for w in window)
        block = tokens * 3 * dim * dim  # queries, keys, values
        block += 2 * padded * math.prod(clipped) * dim  # queries with keys, and weights with values
        block += bias * math.ceil(offsets / 64) * 64 * 512 * (len(grid) + heads)  # rows come in blocks of 64
        block += tokens * dim * dim  # projection
        block += 2 * tokens * dim * 4 * dim  # MLP
        block += 2 * tokens * dim * norm  # after attention and MLP
        count += depth * block
        if i < len(stages) - 1:
            grid = [*grid[:-2], math.ceil(grid[-2] / 2), math.ceil(grid[-1] / 2)]
            count += math.prod(grid) * (4 * dim * 2 * dim + 2 * dim * norm)  # merging and its norm
            dim *= 2
    return count


def output_norm(arch, tokens):
    """The norm of the last stage."""
    return tokens * arch['embed_dims'] * 8 * 5


def backbone_config(arch, window, **others):
    """A segmentor whose head is on the last stage."""
    cfg = Config.fromfile(NANO_CONFIGS / 'seg.py')
    cfg.model.backbone = dict(
        type='swinv2_mm.SwinTransformerV2', arch=arch, window_size=window, out_indices=(3,), **others
    )
    cfg.model.decode_head.in_channels = arch['embed_dims'] * 8
    return cfg


def count_backbone(get_flops, cfg, shape):
    result = get_flops.complexity(cfg, shape)
    return next(flops for name, flops, _ in result.parts if name == 'backbone')


@pytest.mark.parametrize(
    ('window', 'size', 'others'),
    [
        (4, (64, 96), {}),
        (8, (96, 64), {}),  # windows larger than the last feature maps
        (3, (64, 96), {}),  # feature maps that need padding
        (4, (64, 96), dict(sequential_stages=(0, 1), with_cp=True)),  # both hide operations from a tracer
    ],
)
def test_get_flops_of_the_backbone(tool, window, size, others):
    cfg = backbone_config(NANO, window, **others)
    expected = multiply_adds(NANO, (window, window), size) + output_norm(NANO, 2 * 3)
    assert count_backbone(tool('get_flops'), cfg, (3, *size)) == expected


def test_get_flops_of_a_product_added_to_another(tool):
    x = torch.rand(2, 3, 4)
    flops, uncounted = tool('get_flops')._trace(nn.Module(), x, lambda x: torch.baddbmm(x @ x.mT, x, x.mT))
    assert (sum(flops.values()), uncounted) == (2 * 2 * 3 * 4 * 3, [])


def test_get_flops_of_a_segmentor_whose_head_needs_data_samples(tool):
    cfg = starting_points.shrink(Config.fromfile(REPOSITORY / 'configs/seg/mask2former_swinv2_t_ade20k.py'))
    result = tool('get_flops').complexity(cfg, (3, 64, 64))
    assert (result.skipped, result.uncounted) == ('', [])
    assert [name for name, flops, _ in result.parts if flops] == ['backbone', 'decode_head']


@pytest.mark.parametrize(
    ('arch', 'window', 'published'), [(TINY_ARCH, 8, 5.9), (TINY_ARCH, 16, 6.6), (BASE_ARCH, 8, 20.3)]
)
def test_multiply_adds_are_the_flops_of_microsoft(arch, window, published):
    """Microsoft leaves out the position bias and counts 1 per element of a LayerNorm, which is up to 2% less."""
    windows, size = (window, window), (256, 256)
    assert round(multiply_adds(arch, windows, size, norm=1, bias=False) / 1e9, 1) == published
    flops = multiply_adds(arch, windows, size) + output_norm(arch, 8 * 8)
    assert flops / 1e9 == pytest.approx(published, rel=0.02)


def video_config(arch, window, **others):
    """SwinV2-T's recognizer with another backbone."""
    cfg = Config.fromfile(VIDEO)
    cfg.model.backbone.update(arch=arch, window_size=window, init_cfg=None, **others)
    cfg.model.cls_head.in_channels = arch['embed_dims'] * 8
    return cfg


@pytest.mark.parametrize(
    ('window', 'size', 'patch', 'others'),
    [
        ((2, 4, 4), (8, 64, 96), (2, 4, 4), {}),
        ((8, 7, 7), (8, 64, 96), (2, 4, 4), {}),  # windows longer than the clip, padding, and both in the last stages
        ((3, 4, 4), (7, 64, 96), (2, 4, 4), {}),  # half a patch at the end, and half a window
        ((4, 4, 4), (4, 64, 96), (1, 4, 4), dict(sequential_stages=(0, 1), with_cp=True)),
    ],
)
def test_get_flops_of_the_video_backbone(tool, window, size, patch, others):
    cfg = video_config(NANO, window, patch_size=patch, **others)
    tokens = math.ceil(size[0] / patch[0]) * 2 * 3  # only height and width are merged
    expected = multiply_adds(NANO, window, size, patch) + output_norm(NANO, tokens)
    assert count_backbone(tool('get_flops'), cfg, (1, 3, *size)) == expected


def test_get_flops_shares_the_position_bias_between_views(tool):
    window, size, patch = (2, 4, 4), (4, 32, 32), (2, 4, 4)
    one, two = (count_backbone(tool('get_flops'), video_config(ARCH, window), (views, 3, *size)) for views in (1, 2))
    assert two - one == multiply_adds(ARCH, window, size, patch, bias=False) + output_norm(ARCH, 2)


@pytest.mark.parametrize(
    ('arch', 'published'),
    [(TINY_ARCH, 88), (SMALL_ARCH, 166), (BASE_ARCH, 282), (LARGE_ARCH, 604)],
)
def test_multiply_adds_are_the_flops_of_video_swin(arch, published):
    """At 32x224x224, as in mmaction's metafile. Swin V1 has no MLP for its position bias."""
    assert round(multiply_adds(arch, (8, 7, 7), (32, 224, 224), (2, 4, 4), bias=False) / 1e9) == published


def test_get_flops_of_a_view_of_a_video(clips, tmp_path):
    output = call(tmp_path, FLOPS, clips / 'config.py', '--shape', 8, 64, 64)
    assert 'Input shape: 1 3 8 64 64' in output
    flops = multiply_adds(ARCH, (8, 7, 7), (8, 64, 64), (2, 4, 4)) + output_norm(ARCH, 4 * 2 * 2)
    assert f'{flops / 1e6:.3f} M' in output
    assert '51.200 K' in output  # 128 channels for each of 400 classes


def two_stage_config(proposals, masks):
    """Mask R-CNN with small heads."""
    cfg = Config.fromfile(NANO_CONFIGS / 'det.py')
    extractor = dict(
        type='SingleRoIExtractor',
        roi_layer=dict(type='RoIAlign', output_size=4, sampling_ratio=0),
        out_channels=16,
        featmap_strides=[8],
    )
    cfg.model = dict(
        type='MaskRCNN',
        data_preprocessor=cfg.model.data_preprocessor,
        backbone=cfg.model.backbone,
        neck=cfg.model.neck,
        rpn_head=dict(
            type='RPNHead',
            in_channels=16,
            feat_channels=16,
            anchor_generator=dict(type='AnchorGenerator', scales=[4], ratios=[1.0], strides=[8, 16, 32]),
        ),
        roi_head=dict(
            type='StandardRoIHead',
            bbox_roi_extractor=extractor,
            bbox_head=dict(
                type='Shared2FCBBoxHead', in_channels=16, fc_out_channels=32, roi_feat_size=4, num_classes=3
            ),
            mask_roi_extractor=extractor,
            mask_head=dict(type='FCNMaskHead', num_convs=1, in_channels=16, conv_out_channels=16, num_classes=3),
        ),
        train_cfg=None,
        test_cfg=dict(
            rpn=dict(nms_pre=1000, max_per_img=proposals, nms=dict(type='nms', iou_threshold=0.1), min_bbox_size=0),
            rcnn=dict(score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=masks, mask_thr_binary=0.5),
        ),
    )
    return cfg


def test_get_flops_of_a_roi_head(tool):
    """With more proposals than in the trace, and fewer masks."""
    proposals, masks = 300, 7
    result = tool('get_flops').complexity(two_stage_config(proposals, masks), (3, 64, 64))
    flops = {name: flops for name, flops, _ in result.parts}
    box = 16 * 4 * 4 * 32 + 32 * 32 + 32 * (4 + 4 * 3)  # two layers, then classes and boxes
    assert flops['roi_head.bbox_head'] == proposals * box
    mask = 4 * 4 * 16 * 16 * 9 + 4 * 4 * 16 * 16 * 4 + 8 * 8 * 16 * 3  # convolution, upsampling, classes
    assert flops['roi_head.mask_head'] == masks * mask
    assert result.regions == dict(proposals=proposals, masks=masks)


def test_get_flops_of_global_attention(tool):
    cfg = Config.fromfile(NANO_CONFIGS / 'det.py')
    attention = dict(type='swinv2_mm.GlobalAttention', in_channels=128, num_heads=4)
    without = {name: flops for name, flops, _ in tool('get_flops').complexity(cfg, (3, 64, 96)).parts}
    cfg.model.neck = [attention, cfg.model.neck]
    result = tool('get_flops').complexity(cfg, (3, 64, 96))
    flops = {name: flops for name, flops, _ in result.parts}
    length, channels = 2 * 3, 128
    layers = length * channels * channels * (3 + 1 + 4 + 4) + 3 * 5 * length * channels  # linear ones, norms
    assert flops['neck'] - without['neck'] == layers + 2 * length * length * channels
    assert not result.uncounted


def test_get_flops_without_the_auxiliary_head(tool):
    cfg = Config.fromfile(NANO_CONFIGS / 'seg.py')
    expected = tool('get_flops').complexity(cfg, (3, 64, 64)).parts
    cfg.model.auxiliary_head = dict(cfg.model.decode_head)
    assert tool('get_flops').complexity(cfg, (3, 64, 64)).parts == expected
    head = next(flops for name, flops, _ in expected if name == 'decode_head')
    assert head == 16 * 16 * (8 * 16 * 9 + 8 * 2 + 8 * 2)  # convolution, batch norm at 2 for each element, classes


def test_get_flops_of_a_classifier(tool):
    cfg = launch.load_config(str(NANO_CONFIGS / 'cls.py'))
    flops = {name: flops for name, flops, _ in tool('get_flops').complexity(cfg, (3, 64, 96)).parts}
    assert flops['backbone'] == multiply_adds(ARCH, (4, 4), (64, 96)) + output_norm(ARCH, 2 * 3)
    assert flops['head'] == 128 * 2


def test_get_flops_of_simmim(tool):
    """With its decoder, a convolution of one pixel to the pixels of a patch of the last stage."""
    cfg = pretraining_config()
    flops = {name: flops for name, flops, _ in tool('get_flops').complexity(cfg, (3, 64, 96)).parts}
    assert flops['backbone'] == multiply_adds(ARCH, (4, 4), (64, 96)) + output_norm(ARCH, 2 * 3)
    assert flops['neck'] == 2 * 3 * 128 * 32 * 32 * 3


def pretraining_config() -> Config:
    """SimMIM of a nano backbone."""
    cfg = launch.load_config(str(REPOSITORY / 'configs/ssl/simmim_swinv2_b_in1k_192.py'))
    cfg.model.backbone.update(arch=ARCH, window_size=4)
    cfg.model.neck.in_channels = 128
    return cfg


def test_get_flops_names_a_head_that_cannot_be_traced(tool):
    from mmseg.models.decode_heads import FCNHead

    class PromptedHead(FCNHead):
        def forward(self, inputs, prompt):
            return super().forward(inputs) + prompt

    get_flops = tool('get_flops')
    cfg = launch.load_config(str(NANO_CONFIGS / 'seg.py'))
    cfg.model.decode_head = dict(type=PromptedHead, in_channels=128, channels=8, num_classes=2)
    result = get_flops.complexity(cfg, (3, 64, 64))
    flops = {name: flops for name, flops, _ in result.parts}
    assert flops['backbone'] > 0
    assert flops['decode_head'] == 0
    text = get_flops.report(result, (3, 64, 64))
    assert 'The heads are not counted, because they cannot be traced (TypeError: ' in text


@pytest.mark.parametrize(
    ('format_shape', 'numbers', 'shape'),
    [
        ('NCHW', [64], (1, 3, 64, 64)),
        ('NCHW', [8, 64, 96], (8, 3, 64, 96)),
        ('NCTHW', [8, 64, 96], (1, 3, 8, 64, 96)),
        ('NCTHW', None, (1, 3, 32, 224, 224)),
        ('NCTHW', [2, 3, 8, 64, 96], (2, 3, 8, 64, 96)),
    ],
)
def test_input_shape_of_video_models(tool, format_shape, numbers, shape):
    cfg = Config.fromfile(NANO_CONFIGS / 'video.py')
    cfg.model.data_preprocessor.format_shape = format_shape
    assert input_shape(cfg, numbers) == shape


def test_get_flops_of_a_model_of_single_frames(tool):
    cfg = Config.fromfile(NANO_CONFIGS / 'video.py')
    one, eight = (tool('get_flops').complexity(cfg, (frames, 3, 64, 64)) for frames in (1, 8))
    assert dict((p[0], p[1]) for p in eight.parts)['backbone'] == 8 * dict((p[0], p[1]) for p in one.parts)['backbone']


@HOWS
def test_get_flops_prints_every_part(tmp_path, how):
    output = how(tmp_path, FLOPS, NANO_CONFIGS / 'det.py', '--shape', 64, 96)
    rows = [line.split()[0] for line in output.splitlines() if line]
    assert {'backbone', 'neck', 'bbox_head', 'total'} <= set(rows)
    assert 'Input shape: 3 64 96' in output
    assert 'One FLOP is one multiply-add' in output


@pytest.mark.parametrize(
    ('config', 'numbers', 'text'),
    [
        ('det.py', [1, 2, 3], 'image takes one or two numbers'),
        ('det.py', [64, 0], 'must be positive'),
        ('video.py', [1, 2, 3, 4, 5], 'all 4 axes'),
    ],
)
def test_input_shape_refuses_a_wrong_number_of_axes(tool, config, numbers, text):
    with pytest.raises(ValueError, match=text):
        input_shape(Config.fromfile(NANO_CONFIGS / config), numbers)


# ---------------------------------------------------------------- benchmark


def test_benchmark_median_ignores_a_slow_iteration(tool):
    figures = tool('benchmark').Figures(seconds=[0.2, 0.2, 0.4, 9.0, 0.4], images=[1, 1, 2, 1, 2], memory=0)
    median, fastest, rate = figures.rates()
    assert (median, fastest, rate) == pytest.approx((200, 200, 5))


def test_benchmark_times_neither_warmup_nor_data(tool, monkeypatch):
    """With a fake clock: the first two steps and every batch take 5 s, the measured steps 1 s."""
    benchmark = tool('benchmark')
    clock, seen = [0.0], []
    monkeypatch.setattr(benchmark, 'time', SimpleNamespace(perf_counter=lambda: clock[0]))

    def step(batch):
        seen.append(batch)
        clock[0] += 5 if len(seen) <= 2 else 1

    def data():
        while True:
            clock[0] += 5
            yield dict(inputs=[torch.zeros(3, 8, 8)] * 2)

    figures = benchmark.measure(step, data(), iterations=4, warmup=2, log_interval=100)
    assert len(seen) == 6
    assert figures.images == [2] * 4
    assert figures.seconds == [1.0] * 4


def test_benchmark_counts_views_as_clips(tool):
    assert tool('benchmark').count([torch.zeros(12, 3, 4, 8, 8), torch.zeros(3, 3, 4, 8, 8)]) == 15
    assert tool('benchmark').count([torch.zeros(8, 3, 8, 8)]) == 1  # frames of one clip


@pytest.mark.parametrize(
    ('config', 'how'),
    [
        *[(f'{task}.py', call) for task in ('det', 'seg', 'cls', 'video')],
        pytest.param('det.py', run, marks=pytest.mark.slow),
    ],
    ids=['det', 'seg', 'cls', 'video', 'as_users'],
)
def test_benchmark_inference_on_random_inputs(tmp_path, config, how):
    output = how(tmp_path, BENCHMARK, NANO_CONFIGS / config, '--shape', 64, '--max-iter', 3, '--repeat-num', 2)
    rows = [line.split() for line in output.splitlines() if line[:5].strip().isdigit()]
    assert [row[:2] for row in rows] == [['1', '3'], ['2', '3']]
    for row in rows:
        assert float(row[4]) == pytest.approx(1000 / float(row[2]), rel=0.05)
        assert float(row[5]) > 1
    assert 'Memory: ' in output


def test_benchmark_on_the_data_of_the_config(shapes, tmp_path):
    for task in ('inference', 'train'):
        options = ['--task', task, '--max-iter', 9, '--num-warmup', 1]  # more batches than there are
        output = call(tmp_path, BENCHMARK, NANO_CONFIGS / 'det.py', *options, '--cfg-options', f'data_root={shapes}')
        assert ' img/s' in output


def test_benchmark_of_training_without_data(tmp_path):
    """On a random image with a label, or with SimMIM's mask."""
    pretraining_config().dump(tmp_path / 'simmim.py')
    for config in (NANO_CONFIGS / 'cls.py', 'simmim.py'):
        options = ['--task', 'train', '--shape', 64, '--max-iter', 2, '--num-warmup', 1]
        assert ' img/s' in call(tmp_path, BENCHMARK, config, *options)


def test_benchmark_of_a_recognizer(clips, tmp_path):
    """On a random clip, which needs no data, and on the test data of the config, with 12 views."""
    for task, data in (('train', ['--shape', 32, 28, 28]), ('inference', [])):
        options = ['--task', task, '--max-iter', 2, '--num-warmup', 1]
        assert 'median ms/clip' in call(tmp_path, BENCHMARK, clips / 'config.py', *options, *data)


def test_benchmark_data_loading(shapes, tmp_path):
    options = ['--task', 'dataloader', '--max-iter', 2, '--num-warmup', 0, '--cfg-options', f'data_root={shapes}']
    assert 'batch/s' in call(tmp_path, BENCHMARK, NANO_CONFIGS / 'det.py', *options)


# ---------------------------------------------------------------- browse_dataset


@pytest.fixture(autouse=True)
def _restore_visualizers(monkeypatch):
    """Restore after each test what browse_dataset.py patches: visualizers of the toolboxes, and matplotlib."""
    from matplotlib import _tight_bbox
    from mmaction.visualization import ActionVisualizer
    from mmdet.visualization import DetLocalVisualizer
    from mmseg.visualization import SegLocalVisualizer

    for owner, name in (
        (DetLocalVisualizer, '_draw_sem_seg'),
        (SegLocalVisualizer, 'add_datasample'),
        (ActionVisualizer, 'add_datasample'),
        (_tight_bbox, 'adjust_bbox'),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))


@pytest.fixture
def segments(tmp_path):
    return write_segments(tmp_path / 'seg')


@pytest.fixture
def frames(tmp_path):
    return write_frames(tmp_path / 'video')


@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    """A nano recognizer's config.py, and its data."""
    folder = tmp_path_factory.mktemp('clips')
    data = write_kinetics400(folder / 'kinetics400')
    cfg = shrink(launch.load_config(str(VIDEO), dict(data_root=str(data))))
    cfg.dump(folder / 'config.py')
    return folder


def assert_not_blank(path):
    assert cv2.imread(str(path)).std() > 1, path


def test_browse_dataset_of_a_detector(shapes, tmp_path):
    """The data set of the config is a RepeatDataset, over which the script of mmdet loops forever."""
    options = ['--not-show', '--output-dir', tmp_path, '--cfg-options', f'data_root={shapes}']
    call(tmp_path, BROWSE, NANO_CONFIGS / 'det.py', *options)
    images = sorted(tmp_path.glob('*.jpg'))
    assert [path.name for path in images] == sorted(path.name for path in (shapes / 'train2017').iterdir())
    for path in images:
        plain, drawn = (cv2.imread(str(p)).astype(int) for p in (shapes / 'train2017' / path.name, path))
        drawn = cv2.resize(drawn.astype(np.uint8), (64, 64)).astype(int)
        assert_not_blank(path)
        assert all(abs(drawn - image).max() > 60 for image in (plain, plain[:, ::-1]))  # original or flipped


def test_browse_dataset_of_semantic_maps(shapes, tmp_path):
    options = ['--not-show', '--output-dir', tmp_path, '--cfg-options', f'data_root={shapes}/']
    options += ['train_dataloader.dataset.indices=2']
    call(tmp_path, BROWSE, REPOSITORY / 'configs/det/htc_swinv2_demo.py', *options)
    assert len(list(tmp_path.glob('*.jpg'))) == 2


@HOWS
def test_browse_dataset_of_a_segmentor(segments, tmp_path, how):
    options = ['--not-show', '--output-dir', tmp_path / 'out', '--cfg-options', f'data_root={segments}']
    how(tmp_path, BROWSE, NANO_CONFIGS / 'seg.py', *options)
    images = sorted((tmp_path / 'out').iterdir())
    assert [path.name for path in images] == [f'{i}.png' for i in range(4)]
    for path in images:
        assert_not_blank(path)


def test_browse_dataset_of_a_classifier(tmp_path):
    write_classes(tmp_path / 'cls')
    options = ['--not-show', '--output-dir', tmp_path / 'out', '--show-number', 1]  # each takes seconds
    call(tmp_path, BROWSE, NANO_CONFIGS / 'cls.py', *options, '--cfg-options', f'data_root={tmp_path}/cls')
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['bright_0.png']
    assert_not_blank(tmp_path / 'out/bright_0.png')


def test_browse_dataset_with_the_arguments_of_mmaction(frames, tmp_path):
    options = ['--show-number', 2, '--cfg-options', f'data_root={frames}/']
    call(tmp_path, BROWSE, NANO_CONFIGS / 'video.py', 'out', *options)
    drawn = [path for path in (tmp_path / 'out').rglob('*') if path.is_file()]
    assert len({path.relative_to(tmp_path / 'out').parts[0] for path in drawn}) == 2
    for path in drawn:
        if path.suffix == '.png':  # not the videos that moviepy writes where it is installed
            assert_not_blank(path)


def test_browse_dataset_of_a_recognizer(clips, tmp_path):
    """With our arguments for the script of mmaction: all frames of a clip of both videos."""
    call(tmp_path, BROWSE, clips / 'config.py', '--not-show', '--output-dir', tmp_path)
    images = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob('*.png'))
    if importlib.util.find_spec('moviepy') is None:  # otherwise they are videos
        assert images == sorted(f'video_{video}/frames_0/{frame}.png' for video in range(2) for frame in range(32))
    for path in tmp_path.rglob('*.png'):
        assert_not_blank(path)


# ---------------------------------------------------------------- analyze_logs

EPOCHS = [  # two epochs of six iterations, logged every second one, as mmdet does
    dict(loss=6.0, time=9.0, epoch=1, iter=2, step=2),
    dict(loss=5.0, time=0.2, epoch=1, iter=4, step=4),
    dict(loss=4.0, time=0.4, epoch=1, iter=6, step=6),
    {'coco/bbox_mAP': 0.1, 'coco/segm_mAP': 0.05, 'time': 7.0, 'step': 1},
    dict(loss=3.0, time=8.0, epoch=2, iter=8, step=8),
    dict(loss=2.0, time=0.5, epoch=2, iter=10, step=10),
    dict(loss=1.0, time=0.7, epoch=2, iter=12, step=12),
    {'coco/bbox_mAP': 0.3, 'coco/segm_mAP': 0.15, 'time': 7.0, 'step': 2},
]
ITERATIONS = [  # as in mmseg: no epochs, and metrics without a prefix
    dict(loss=2.0, time=0.5, iter=50, step=50),
    dict(loss=1.0, time=0.1, iter=100, step=100),
    {'aAcc': 60.0, 'mIoU': 30.0, 'time': 7.0, 'step': 100},
]


@pytest.fixture
def log_file(tmp_path):
    def write(lines, name='log.json'):
        (tmp_path / name).write_text(''.join(json.dumps(line) + '\n' for line in lines))
        return str(tmp_path / name)

    return write


def test_analyze_logs_curves_are_those_of_the_log(tool, log_file):
    analyze_logs = tool('analyze_logs')
    log = analyze_logs.read_log(log_file(EPOCHS))
    assert analyze_logs.curve(log, 'loss') == ([2, 4, 6, 8, 10, 12], [6, 5, 4, 3, 2, 1], False)
    assert analyze_logs.curve(log, 'bbox_mAP') == ([6, 12], [0.1, 0.3], True)
    assert analyze_logs.curve(log, 'coco/segm_mAP', start_epoch=2) == ([12], [0.15], True)
    assert analyze_logs.curve(log, 'loss', start_epoch=2) == ([8, 10, 12], [3, 2, 1], False)
    log = analyze_logs.read_log(log_file(ITERATIONS))
    assert analyze_logs.curve(log, 'mIoU') == ([100], [30.0], True)
    assert analyze_logs.curve(log, 'time') == ([50, 100], [0.5, 0.1], False)


def test_analyze_logs_time_of_an_iteration(tool, log_file):
    analyze_logs = tool('analyze_logs')
    log = analyze_logs.read_log(log_file(EPOCHS))
    assert analyze_logs.train_times(log) == pytest.approx({1: 0.3, 2: 0.6})
    assert analyze_logs.train_times(log, include_outliers=True) == pytest.approx({1: 9.6 / 3, 2: 9.2 / 3})
    assert analyze_logs.train_times(analyze_logs.read_log(log_file(ITERATIONS))) == pytest.approx({1: 0.1})


@HOWS
def test_analyze_logs_plots_several_logs(log_file, tmp_path, how):
    logs = [log_file(EPOCHS), log_file(EPOCHS[:4], 'other.json')]
    keys = ['--keys', 'bbox_mAP', 'loss', '--legend', 'a', 'b', 'c', 'd', '--title', 'title']
    how(tmp_path, LOGS, 'plot_curve', *logs, *keys, '--out', tmp_path / 'curves.png')
    assert_not_blank(tmp_path / 'curves.png')


def test_analyze_logs_prints_times(log_file, tmp_path):
    output = call(tmp_path, LOGS, 'cal_train_time', log_file(EPOCHS))
    assert 'slowest epoch 2, average time is 0.6000 s/iter' in output
    assert 'average iter time: 0.4500 s/iter' in output


@pytest.mark.parametrize(
    ('lines', 'args', 'text'),
    [
        (EPOCHS, ['--keys', 'mIoU', '--out', 'a.png'], 'log.json has no mIoU; it has coco/bbox_mAP'),
        (EPOCHS, [], 'there is no display for a window: use --out FILE.png'),
        (EPOCHS, ['--out', 'a.docx'], '--out a.docx: the file must end in one of'),
        (EPOCHS, ['--keys', 'loss', '--legend', 'a', 'b', '--out', 'a.png'], '--legend must name 1 curves, got 2'),
        ([[1, 2]], ['--out', 'a.png'], 'log.json, line 1 is not a JSON object'),
        ([dict(mIoU=1.0)], ['--out', 'a.png'], 'log.json contains no record of a training or validation'),
    ],
)
def test_analyze_logs_errors(log_file, tmp_path, lines, args, text):
    log_file(lines)
    assert refuse(tmp_path, LOGS, 'plot_curve', 'log.json', *args).startswith(f'error: {text}')


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ('script', 'args', 'text'),
    [
        ('get_flops.py', ['no.py'], 'config no.py does not exist'),
        ('get_flops.py', [NANO_CONFIGS / 'det.py', '--shape', 1, 2, 3], '--shape of an image takes one or two numbers'),
        (
            'benchmark.py',
            [NANO_CONFIGS / 'det.py', '--shape', 64, '--checkpoint', 'no.pth'],
            '--checkpoint: checkpoint no.pth',
        ),
        (
            'benchmark.py',
            [NANO_CONFIGS / 'det.py', '--task', 'train', '--shape', 64],
            '--shape makes inputs without labels',
        ),
        (
            'benchmark.py',
            [REPOSITORY / 'configs/ssl/simmim_swinv2_demo.py', '--shape', 32],
            'a model for pre-training predicts nothing: measure it with --task train',
        ),
        ('benchmark.py', [NANO_CONFIGS / 'det.py', '--max-iter', 0], '--max-iter must be at least 1, got 0'),
        (
            'benchmark.py',
            [NANO_CONFIGS / 'det.py', '--task', 'dataset'],
            'test data: data/shapes/annotations/instances_val2017',
        ),
        (
            'browse_dataset.py',
            [NANO_CONFIGS / 'det.py'],
            'there is no display for windows: use --not-show --output-dir DIR',
        ),
        ('browse_dataset.py', [NANO_CONFIGS / 'seg.py', '--not-show'], 'train data: data/seg/images does not exist'),
        ('analyze_logs.py', ['cal_train_time', 'no.json'], 'log no.json does not exist'),
    ],
)
def test_analysis_tools_errors(tmp_path, script, args, text):
    assert refuse(tmp_path, f'analysis_tools/{script}', *args).startswith(f'error: {text}')
