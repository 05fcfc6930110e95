"""The checks before a launch: each error is one line, with exit code 2. The commands that the launch scripts start."""

import contextlib
import importlib.util
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from nano import NANO_CONFIGS
from nano.cls import write_classes
from tool_runs import TOOLS, call, environment, folder_on_path, free_port, refuse, run, taken_port

from swinv2_mm.cli import checks, classes, launch

CLS = NANO_CONFIGS / 'cls.py'
DET = Path(__file__).parents[2] / 'configs/det'
SCRIPTS = sorted(
    str(path.relative_to(TOOLS)) for path in TOOLS.rglob('*.py') if 'def main(' in path.read_text(encoding='utf-8')
)
SHAPES = ('annotations/instances_train2017.json', 'annotations/instances_val2017.json', 'train2017/', 'val2017/')


@pytest.fixture
def data(tmp_path):
    """A data set of empty files: the checks read only their names."""
    for name in SHAPES:
        path = tmp_path / 'shapes' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith('/') else path.touch()
    return tmp_path / 'shapes'


@pytest.fixture
def error_of(tmp_path):
    """Call train.py or test.py with invalid arguments; returns the line that it prints before it exits with code 2."""
    return lambda tool, *args: refuse(tmp_path, f'{tool}.py', *args)


def test_load_config_names_a_missing_toolbox(error_of, tmp_path):
    config = tmp_path / 'config.py'
    config.write_text("_base_ = 'mmpose::_base_/default_runtime.py'")
    assert 'mmpose is not installed' in error_of('train', config)


@pytest.mark.parametrize('text', ["_base_ = 'mmpretrain::_base_/default_runtime.py'", "default_scope = 'mmpretrain'"])
def test_load_config_names_the_extra_of_a_missing_toolbox(error_of, tmp_path, monkeypatch, text):
    config = tmp_path / 'config.py'
    config.write_text(text)
    monkeypatch.setitem(sys.modules, 'mmpretrain', None)
    line = error_of('train', config)
    assert 'mmpretrain' in line
    assert line.endswith(": pip install 'swinv2_mm[cls]'")


@pytest.mark.parametrize('tool', ['train', 'test'])
def test_load_config_gives_data_loaders_the_defaults_of_mmpretrain(monkeypatch, tool):
    """Those of its scripts. Without a GPU, pinned memory would only make torch warn."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    script = Path(importlib.util.find_spec('mmpretrain').origin).parent / f'.mim/tools/{tool}.py'
    args = SimpleNamespace(**dict.fromkeys(['cfg_options', 'resume', 'work_dir', 'show_dir', 'checkpoint']), config='a')
    flags = ('amp', 'auto_scale_lr', 'no_validate', 'no_pin_memory', 'no_persistent_workers', 'show', 'tta')
    args.__dict__.update(dict.fromkeys(flags, False), launcher='none')
    loader = f'{tool}_dataloader'
    options = {f'{loader}.num_workers': 2}
    cfg = Config.fromfile(CLS)
    cfg.merge_from_dict(options)
    expected = runpy.run_path(str(script))['merge_args'](cfg, args)[loader]
    ours = launch.load_config(str(CLS), options)[loader]
    assert {**expected, 'persistent_workers': True} == ours  # its test.py starts the workers once anyway


def test_load_config_keeps_the_loaders_of_a_config():
    options = {'train_dataloader.collate_fn.type': 'pseudo_collate', 'train_dataloader.pin_memory': False}
    loader = launch.load_config(str(CLS), options).train_dataloader
    assert loader.collate_fn.type == 'pseudo_collate'
    assert not loader.pin_memory
    assert not loader.persistent_workers  # torch refuses it without workers


def test_load_config_names_a_missing_config(error_of):
    assert 'config no_such.py does not exist (relative to ' in error_of('train', 'no_such.py')


def test_load_config_names_a_line_that_is_not_python(tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text('model = dict(\n    a b\n)\n')
    with pytest.raises(ValueError, match=r"config \S*mine.py or .* not valid Python: .*line 2.*, '    a b'"):
        launch.load_config(str(path))


@pytest.mark.parametrize(
    ('tool', 'missing', 'option', 'split'),
    [
        ('train', SHAPES[0], 'train_dataloader.dataset.dataset.ann_file', 'train'),
        ('train', SHAPES[2], 'train_dataloader.dataset.dataset.data_prefix.img', 'train'),
        ('train', SHAPES[1], 'val_dataloader.dataset.ann_file', 'val'),
        ('test', SHAPES[3], 'test_dataloader.dataset.data_prefix.img', 'test'),
    ],
)
def test_check_data_names_a_missing_path(error_of, data, tmp_path, tool, missing, option, split):
    path = data / missing
    path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / 'a.pth').touch()
    arguments = [NANO_CONFIGS / 'det.py', *([tmp_path / 'a.pth'] if tool == 'test' else [])]
    line = error_of(tool, *arguments, '--cfg-options', f'data_root={data}')
    assert f'{split} data: {data}/{missing} does not exist; it is set by {option}.' in line
    assert '--cfg-options data_root=DIR' in line


def test_check_data_of_an_evaluator(error_of, data, tmp_path):
    line = error_of(
        'train', NANO_CONFIGS / 'det.py', '--cfg-options', f'data_root={data}', 'val_evaluator.ann_file=gone.json'
    )
    assert 'gone.json' in line
    assert 'val_evaluator.ann_file=PATH' in line


def test_check_data_of_stuff_maps(error_of, data):
    line = error_of('train', DET / 'htc_swinv2_t.py', '--cfg-options', f'data_root={data}')
    assert f'{data}/stuffthingmaps/train2017/ does not exist' in line
    assert 'it is set by train_dataloader.dataset.data_prefix.seg' in line


@pytest.mark.parametrize('package', ['instaboostfast', 'skimage'])
def test_check_transforms_of_instaboost(error_of, data, monkeypatch, package):
    (data / 'stuffthingmaps/train2017').mkdir(parents=True)
    for name in [name for name in sys.modules if name.split('.')[0] == 'instaboostfast']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    line = error_of('train', DET / 'htc_swinv2_t.py', '--cfg-options', f'data_root={data}')
    assert 'InstaBoost needs the package instaboostfast' in line
    assert 'pip install' in line


@pytest.mark.parametrize('evaluator', ['test_evaluator.metric=[bbox,segm]', 'test_evaluator.metric=segm'])
def test_check_metrics_masks_of_a_box_detector(error_of, tmp_path, monkeypatch, evaluator):
    (tmp_path / 'a.pth').touch()
    monkeypatch.setattr(checks, 'check_data', lambda cfg, splits: None)
    config = DET / 'htc_swinv2_g_objects365.py'
    line = error_of('test', config, tmp_path / 'a.pth', '--cfg-options', evaluator)
    assert line.startswith('error: test_evaluator.metric=')
    assert 'the model predicts only boxes: --cfg-options test_evaluator.metric=bbox' in line


def test_check_data_skips_remote_storage():
    dataset = dict(ann_file='s3://bucket/a.json', data_prefix=dict(img='s3://bucket/images'))
    checks.check_data(Config(dict(train_dataloader=dict(dataset=dataset))), ['train'])
    dataset = dict(data_root='data/', ann_file='a.json', backend_args=dict(backend='petrel'))
    checks.check_data(Config(dict(train_dataloader=dict(dataset=dataset))), ['train'])


def test_check_data_of_concatenated_data_sets(data):
    good = dict(data_root=str(data), ann_file=SHAPES[0])
    cfg = Config(dict(train_dataloader=dict(dataset=dict(datasets=[good, dict(good, ann_file='gone.json')]))))
    with pytest.raises(FileNotFoundError, match='train_dataloader.dataset.datasets.1.ann_file'):
        checks.check_data(cfg, ['train'])


@pytest.mark.parametrize(('split', 'missing'), [('train', 'images'), ('val', 'labels')])
def test_check_data_of_segmentation(tmp_path, split, missing):
    (tmp_path / ({'images', 'labels'} - {missing}).pop()).mkdir()
    cfg = launch.load_config(str(NANO_CONFIGS / 'seg.py'), dict(data_root=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match=f'{tmp_path}/{missing}'):
        checks.check_data(cfg, [split])


@pytest.fixture
def classes_data(tmp_path):
    return write_classes(tmp_path / 'cls')


def test_check_data_of_classes_accepts(classes_data):
    (classes_data / 'val/bright/bright_0.png').rename(classes_data / 'val/dark/other.PNG')
    (classes_data / 'val/bright/bright_1.png').unlink()  # mmpretrain needs the folder for the numbers of the classes
    (classes_data / 'train/dark/deeper').mkdir()
    (classes_data / 'train/dark/dark_0.png').rename(classes_data / 'train/dark/deeper/a.png')
    checks.check_data(launch.load_config(str(CLS), dict(data_root=str(classes_data))), ['train', 'val', 'test'])


@pytest.mark.parametrize(
    ('change', 'text'),
    [
        (lambda root: shutil.rmtree(root / 'train'), 'train data: {root}/train does not exist; it is set by '),
        (
            lambda root: [path.rename(f'{path}.txt') for path in root.glob('train/*/*')],
            'train data: no image (.jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif) in the folders of {root}/train. Each '
            'class has a folder there, as in {root}/train/cat/1.jpg; or list images and classes in a file: '
            '--cfg-options train_dataloader.dataset.ann_file=PATH',
        ),
        (
            lambda root: [path.rename(root / 'val' / path.name) for path in root.glob('val/*/*')],
            'val data: no image (.jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif) in the folders of {root}/val. ',
        ),
        (
            lambda root: [path.unlink() for path in root.glob('train/dark/*')],
            'train data: no image (.jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif) in {root}/train/dark. Each folder of ',
        ),
        (
            lambda root: shutil.copytree(root / 'train/dark', root / 'train/grey'),
            'train data: {root}/train has 3 folders, one for each class, but model.head.num_classes=2: '
            '--cfg-options model.head.num_classes=3 data_preprocessor.num_classes=3',
        ),
        (
            lambda root: (root / 'val/bright').rename(root / 'val/light'),
            'val data: its class folders are not those of train: only one of them has bright, light. ',
        ),
    ],
    ids=['no_folder', 'no_image', 'no_folders', 'empty_class', 'too_many_classes', 'other_classes'],
)
def test_check_data_of_classes(error_of, classes_data, change, text):
    change(classes_data)
    line = error_of('train', CLS, '--cfg-options', f'data_root={classes_data}')
    assert line.startswith('error: ' + text.format(root=classes_data))


@pytest.mark.parametrize(
    ('options', 'text'),
    [
        (
            ['model.train_cfg.augments=Mixup', 'model.head.num_classes=3'],
            'model.data_preprocessor.num_classes=2, for Mixup and CutMix, but model.head.num_classes=3: both must be',
        ),
        (['val_evaluator.topk=[1,5]'], 'val_evaluator.topk=[1, 5] of 2 classes: --cfg-options val_evaluator.topk=1'),
    ],
)
def test_check_num_classes(error_of, classes_data, options, text):
    line = error_of('train', CLS, '--cfg-options', f'data_root={classes_data}', *options)
    assert line.startswith(f'error: {text}')


@pytest.mark.parametrize(
    ('dataset', 'text'),
    [
        (dict(type='ImageNet', split='train'), '2 folders, one for each class, but test_dataloader.dataset has 1000'),
        (dict(type='ImageNet', split='train', metainfo=dict(classes=('a', 'b'))), None),
        (dict(type='ImageNet', split='val'), None),  # listed in meta/val.txt
        (dict(type='mmpretrain.ImageNet', split='test'), ' no image '),
        (dict(type='ImageNet21k', split='train'), None),
        (dict(type='CustomDataset'), None),
        (dict(type='CustomDataset', data_prefix='train', classes=('a',)), 'but test_dataloader.dataset has 1 classes'),
        (dict(type='CustomDataset', data_prefix=dict(img_path='train')), None),
        (dict(type='CustomDataset', data_prefix='~/cls/train'), None),
        (dict(type='CustomDataset', data_prefix='train', with_label=False), None),
        (dict(type='CustomDataset', data_prefix='test', with_label=False), ' no image '),
        (dict(type='CustomDataset', data_prefix='train', extensions=('.gif',)), 'no image (.gif) in the folders of '),
        (dict(type='CustomDataset', data_prefix='test', ann_file='meta/val.txt'), None),
        (dict(type='CustomDataset', data_prefix='train', ann_file='gone.txt'), 'gone.txt does not exist'),
    ],
    ids=str,
)
def test_check_data_of_classes_fails_where_mmpretrain_fails(classes_data, monkeypatch, dataset, text):
    from mmpretrain.registry import DATASETS

    monkeypatch.setenv('HOME', str(classes_data.parent))
    (classes_data / 'test').mkdir()
    (classes_data / 'meta').mkdir()
    (classes_data / 'meta/val.txt').write_text('a.png 0')
    cfg = launch.load_config(str(CLS), {'model.head.num_classes': 1000})
    cfg.test_dataloader.dataset = dict(dataset, data_root=str(classes_data))
    errors = (AssertionError, FileNotFoundError, RuntimeError, ValueError)
    mmpretrain = DefaultScope.overwrite_default_scope('mmpretrain')
    with mmpretrain, contextlib.nullcontext() if text is None else pytest.raises(errors):
        DATASETS.build(cfg.test_dataloader.dataset)
    with contextlib.nullcontext() if text is None else pytest.raises(errors, match=re.escape(text)):
        checks.check_data(cfg, ['test'])


def test_check_data_of_classes_lists_no_folder_to_its_end(classes_data, monkeypatch):
    """ImageNet has 1.28 M images in 1000 folders; after the first image of a folder no other is looked at."""
    for i in range(500):
        (classes_data / f'train/dark/{i}.png').touch()
    seen = []
    monkeypatch.setattr(os, 'scandir', lambda path, scan=os.scandir: Counted(scan(path), seen))
    checks.check_data(launch.load_config(str(CLS), dict(data_root=str(classes_data))), ['train'])
    assert len(seen) == 2 + 2  # folders, and the first image in each


class Counted:
    """Entries of a folder, which are noted when they are asked for."""

    def __init__(self, entries, seen: list) -> None:
        self.entries, self.seen = entries, seen

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.entries.close()

    def __iter__(self):
        for entry in self.entries:
            self.seen.append(entry.name)
            yield entry


def test_check_data_of_videos(tmp_path):
    cfg = launch.load_config(str(NANO_CONFIGS / 'video.py'), dict(data_root=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match='train_dataloader.dataset.ann_file=PATH'):
        checks.check_data(cfg, ['train'])


@pytest.mark.parametrize(
    ('option', 'text'),
    [
        ('model.backbone.arch=petite', 'petite'),
        ('model.backbone.arch.num_heads=(1,2,3,8)', 'num_heads|heads'),
        ('model.backbone.out_indices=(1,2,9)', 'out_indices'),
        ('model.backbone.window_size=-3', 'window_size'),
    ],
)
def test_check_classes_wrong_backbone_arguments(error_of, data, option, text):
    line = error_of('train', NANO_CONFIGS / 'det.py', '--cfg-options', f'data_root={data}', option)
    assert any(word in line for word in text.split('|'))


@pytest.mark.parametrize(
    ('option', 'text'),
    [
        ('model.backbone.type=swinv2_mm.Swin', 'model.backbone.type: there is no swinv2_mm.Swin'),
        ('model.backbone.type=swinv2_mm.SwinTransformrV2', '(did you mean swinv2_mm.SwinTransformerV2 or'),
        ('model.backbone.type=SwinTransformerV2', '(did you mean swinv2_mm.SwinTransformerV2 or'),
        ('model.backbone.type=swinv2_mm.modls.SwinTransformerV2', 'there is no swinv2_mm.modls.SwinTransformerV2'),
        ('model.type=Nope', 'model.type: there is no Nope'),
        ('model.type=RetinaNett', 'model.type: there is no RetinaNett (did you mean RetinaNet?)'),
        ('model.neck.type=FPNN', 'model.neck.type: there is no FPNN (did you mean FPN?)'),
        ('model.bbox_head.type=RetinHead', 'model.bbox_head.type: there is no RetinHead (did you mean RetinaHead'),
        ('model.backbone.windowsize=3', 'no argument windowsize (did you mean window_size?). Its arguments are arch'),
        (
            'model.backbone.mlp_ratio=4',
            'model.backbone: SwinTransformerV2 has no argument mlp_ratio (leave it out: MLPs',
        ),
        ('model.backbone.with_cp=1', 'model.backbone: with_cp must be True or False or a list, got 1 of type int'),
        ('model.backbone.in_channels=0', 'model.backbone: in_channels must be at least 1, got 0'),
        ('custom_hooks.0.type=swinv2_mm.ResumeHook', 'custom_hooks.0.type: there is no swinv2_mm.ResumeHook'),
        (
            'custom_hooks.0.seed=1',
            'custom_hooks.0: ReproducibleResumeHook has no argument seed. Its arguments are none',
        ),
        (
            'default_hooks.checkpoint.intervall=1',
            'AtomicCheckpointHook has no argument intervall (did you mean interval',
        ),
        ('optim_wrapper.constructor=swinv2_mm.SwinV2OptimConstructor', 'did you mean swinv2_mm.SwinV2OptimWrapperCons'),
        ('model=Nope', "model must be a dict, got 'Nope'"),
        ('model.backbone=swinv2_mm.SwinTransformerV2', "model.backbone must be a dict, got 'swinv2_mm.Swin"),
        ('train_dataloader=5', 'train_dataloader must be a dict, got 5'),
        ('model.backbone.arch=swin_t', "model.backbone: arch 'swin_t' is not known"),
        ('model.neck.in_channels.7.x=3', '--cfg-options do not fit'),
    ],
)
@pytest.mark.parametrize('tool', ['train', 'test'])
def test_check_classes_wrong_names(error_of, data, tmp_path, tool, option, text):
    (tmp_path / 'a.pth').touch()
    arguments = [NANO_CONFIGS / 'det.py', *([tmp_path / 'a.pth'] if tool == 'test' else [])]
    assert text in error_of(tool, *arguments, '--cfg-options', f'data_root={data}', option)


@pytest.mark.parametrize(
    ('tool', 'arguments'),
    [
        ('get_flops', ['--shape', '64', '64']),
        ('benchmark', []),
        ('browse_dataset', ['--not-show', '--output-dir', 'out']),
        ('plan_memory', ['--shape', '64', '64']),
    ],
)
@pytest.mark.parametrize(
    ('option', 'text'),
    [('model.backbone.windowsize=3', 'did you mean window_size?'), ('model.type=A', 'there is no A')],
)
def test_check_classes_in_analysis_tools(tmp_path, tool, arguments, option, text):
    line = refuse(tmp_path, f'analysis_tools/{tool}.py', NANO_CONFIGS / 'det.py', *arguments, '--cfg-options', option)
    assert text in line


@pytest.mark.parametrize(
    ('options', 'text'),
    [
        (['checkpoint=gone.pth'], 'init_cfg.type: there is no None; to load weights, set it to Pretrained'),
        (['type=pretrained', 'checkpoint=gone.pth'], 'there is no pretrained (did you mean Pretrained?)'),
        (['type=Pretrained'], 'init_cfg.checkpoint must be a file, an address or swinv2://NAME, got None'),
        (['type=Pretrained', 'checkpoint=gone.pth'], 'init_cfg.checkpoint: checkpoint gone.pth does not exist'),
    ],
)
def test_check_init_cfg(error_of, data, options, text):
    options = [f'data_root={data}', *(f'model.backbone.init_cfg.{option}' for option in options)]
    assert text in error_of('train', NANO_CONFIGS / 'det.py', '--cfg-options', *options)


def test_get_flops_needs_no_package_of_the_data(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, 'swinv2_mm.datasets.video', raising=False)
    monkeypatch.setitem(sys.modules, 'decord', None)
    config = tmp_path / 'config.py'
    dataset = "dict(type='swinv2_mm.datasets.video.VideoDataset', ann_file='a', pipeline=[])"
    config.write_text(
        f"_base_ = '{NANO_CONFIGS / 'det.py'}'\ntrain_dataloader = dict(dataset=dict(_delete_=True, **{dataset}))"
    )
    printed = call(tmp_path, 'analysis_tools/get_flops.py', config, '--shape', '64', '64')
    assert 'Params' in printed


def test_check_classes_of_the_optimizer_constructor(error_of, data):
    options = ['optim_wrapper.constructor=swinv2_mm.SwinV2OptimWrapperConstructor']
    options.append('optim_wrapper.paramwise_cfg.decay_rate=0.9')
    line = error_of('train', NANO_CONFIGS / 'det.py', '--cfg-options', f'data_root={data}', *options)
    assert 'but not decay_rate (write layer_decay_rate=0.9' in line


def test_check_classes_allows_hook_priority_and_wrapped_model(data, tmp_path):
    cfg = Config.fromfile(NANO_CONFIGS / 'det.py')
    cfg.custom_hooks[0].priority = 'LOW'
    cfg.model_wrapper_cfg = dict(type='swinv2_mm.ZeroDistributedDataParallel', bucket_cap_mb=5)
    classes.check_classes(cfg)
    cfg.model_wrapper_cfg.buckets = 5
    with pytest.raises(ValueError, match='model_wrapper_cfg: ZeroDistributedDataParallel has no argument buckets'):
        classes.check_classes(cfg)


def test_check_classes_in_the_scope_of_a_part():
    cfg = Config(dict(default_scope='mmaction', model=dict(type='FastRCNN', _scope_='mmdet', neck=dict(type='FPN'))))
    classes.check_classes(cfg)
    cfg.model.pop('_scope_')
    with pytest.raises(ValueError, match='model.type: there is no FastRCNN'):
        classes.check_classes(cfg)


def test_check_classes_names_a_missing_package(monkeypatch):
    monkeypatch.delitem(sys.modules, 'swinv2_mm.datasets.video', raising=False)
    monkeypatch.setitem(sys.modules, 'decord', None)
    dataset = dict(type='swinv2_mm.datasets.video.VideoDataset', ann_file='a', pipeline=[])
    with pytest.raises(ImportError, match='train_dataloader.dataset.type: .*VideoDataset needs a package that is not'):
        classes.check_classes(Config(dict(train_dataloader=dict(dataset=dataset))))


@pytest.mark.parametrize(
    ('flags', 'text'),
    [
        (['--resume', 'gone.pth'], '--resume: checkpoint gone.pth does not exist'),
        (['--resume', 'swinv2://gone'], "no Swin V2 release 'gone'"),
        (
            ['--cfg-options', 'model.backbone.init_cfg.type=Pretrained', 'model.backbone.init_cfg.checkpoint=gone.pth'],
            'model.backbone.init_cfg.checkpoint: checkpoint gone.pth does not exist',
        ),
        (['--cfg-options', 'runner_type=swinv2_mm.Split'], 'runner_type: there is no swinv2_mm.Split'),
        (['--cfg-options', 'model_wrapper_cfg.type=Split'], 'model_wrapper_cfg.type: there is no Split'),
        (
            ['--cfg-options', 'model_wrapper_cfg.type=swinv2_mm.FullyShardedModel'],
            'needs runner_type=swinv2_mm.ShardedRunner, but it is Runner',
        ),
        (
            ['--cfg-options', 'optim_wrapper.optimizer.type=ZeroRedundancyOptimizer'],
            'shard its state with configs/_base_/memory/zero1.py',
        ),
        (['--auto-scale-lr'], '--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...)'),
        pytest.param(
            ['--amp'], '--amp needs a GPU', marks=pytest.mark.skipif(torch.cuda.is_available(), reason='has a GPU')
        ),
    ],
)
def test_train_wrong_flags(error_of, data, flags, text):
    assert text in error_of('train', NANO_CONFIGS / 'det.py', '--cfg-options', f'data_root={data}', *flags)


@pytest.mark.parametrize(
    ('config', 'flags', 'text'),
    [
        ('det', ['--out', 'a.json'], '--out a.json: the file must end in .pkl'),
        (
            'det',
            ['--tta', '--cfg-options', 'model.mask_head.type=FCNMaskHead', 'tta_model.type=DetTTAModel'],
            'DetTTAModel of mmdet merges only boxes',
        ),
        ('video', ['--tta'], '--tta: the config has no tta_model and no tta_pipeline'),
        ('cls', ['--tta', '--show-dir', 'a'], '--show and --show-dir draw one view of each image'),
        ('cls', ['--out-item', 'metrics'], '--out-item says what --out saves: add --out FILE'),
        ('cls', ['--out-item', 'metrics', '--out', 'a.txt'], '--out a.txt: the file must end in .json or .pkl or .yml'),
        ('cls', ['--cfg-options', 'test_dataloader=None'], 'the config has no test_dataloader: it is for training'),
        (
            'det',
            ['--show-dir', 'a', '--cfg-options', 'default_hooks.visualization=None'],
            'need default_hooks.visualization',
        ),
    ],
)
def test_test_wrong_flags(error_of, monkeypatch, tmp_path, config, flags, text):
    (tmp_path / 'a.pth').touch()
    monkeypatch.setattr(checks, 'check_data', lambda cfg, splits: None)
    assert text in error_of('test', NANO_CONFIGS / f'{config}.py', tmp_path / 'a.pth', *flags)


def test_check_checkpoint_missing(error_of):
    assert 'CHECKPOINT: checkpoint gone.pth does not exist' in error_of('test', NANO_CONFIGS / 'det.py', 'gone.pth')


def test_check_last_checkpoint_missing(error_of, data, tmp_path):
    (tmp_path / 'last_checkpoint').write_text('/elsewhere/epoch_3.pth')
    line = error_of(
        'train', NANO_CONFIGS / 'det.py', '--work-dir', tmp_path, '--resume', '--cfg-options', f'data_root={data}'
    )
    assert 'names /elsewhere/epoch_3.pth, which does not exist' in line


def test_check_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    checks.check_gpus(2)
    with pytest.raises(ValueError, match='3 GPUs asked for, but this machine has 2'):
        checks.check_gpus(3)


def test_check_port_only_on_the_first_machine(monkeypatch):
    with taken_port() as port:
        monkeypatch.setenv('PORT', str(port))
        with pytest.raises(ValueError, match=f'port {port} cannot be used .*PORT={port + 1}'):
            checks.check_processes(preflight=1)
        checks.check_processes(preflight=None)  # torchrun's processes: it has opened the port by then
        monkeypatch.setenv('NODE_RANK', '1')
        checks.check_processes(preflight=1)
    with socket.socket() as probe:  # not the port above: a process that was started meanwhile may still use it
        probe.bind(('', 0))
        port = probe.getsockname()[1]
    checks.check_port(port)


def test_check_processes_without_a_configured_port(monkeypatch):
    monkeypatch.delenv('PORT', raising=False)
    with taken_port(29500):
        checks.check_processes(preflight=2)


@pytest.mark.parametrize('port', ['abc', '0', '-1', '65536', '1.5'])
def test_check_processes_invalid_port(monkeypatch, port):
    monkeypatch.setenv('PORT', port)
    with pytest.raises(ValueError, match=f"PORT must be a number from 1 to 65535, got '{port}'"):
        checks.check_processes(preflight=2)


def test_one_line_errors_only_in_the_first_process(monkeypatch, capsys):
    monkeypatch.setenv('RANK', '1')
    with pytest.raises(SystemExit), launch.one_line_errors(ValueError):
        raise ValueError('one')
    assert capsys.readouterr().err == ''


def test_one_line_errors_keeps_other_tracebacks():
    with pytest.raises(KeyError), launch.one_line_errors(ValueError):
        raise KeyError('a bug')


def test_load_config_data_root_moves_copied_paths():
    cfg = launch.load_config(
        str(NANO_CONFIGS / 'det.py'), {'data_root': '/new', 'val_dataloader.dataset.data_root': '/other'}
    )
    assert cfg.train_dataloader.dataset.dataset.data_root == '/new/'
    assert cfg.val_dataloader.dataset.data_root == '/other'
    assert cfg.test_evaluator.ann_file == '/new/annotations/instances_val2017.json'


@pytest.mark.skipif(torch.cuda.is_available(), reason='has a GPU')
def test_adapt_to_cpu_mixed_precision():
    cfg = Config.fromfile(NANO_CONFIGS / 'det.py')
    launch.adapt_to_cpu(cfg)
    assert dict(cfg.optim_wrapper) == dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))


@pytest.mark.skipif(torch.cuda.is_available(), reason='has a GPU')
@pytest.mark.parametrize(('rank', 'times'), [('0', 1), ('1', 0)])
def test_adapt_to_cpu_logs_only_in_the_first_process(monkeypatch, rank, times):
    logged = []
    monkeypatch.setattr(launch, 'print_log', lambda text, **_: logged.append(text))
    monkeypatch.setenv('RANK', rank)
    launch.adapt_to_cpu(Config.fromfile(NANO_CONFIGS / 'det.py'))
    assert logged == ['No GPU: training in fp32 (OptimWrapper) instead of mixed precision (AmpOptimWrapper).'] * times


@pytest.mark.skipif(torch.cuda.is_available(), reason='has a GPU')
def test_adapt_to_cpu_sync_bn():
    cfg = Config.fromfile(DET / 'cascade_mask_rcnn_swinv2_t.py')
    assert 'SyncBN' in str(cfg.model)
    launch.adapt_to_cpu(cfg)
    assert 'SyncBN' not in str(cfg.model)
    assert [head.norm_cfg for head in cfg.model.roi_head.bbox_head] == [dict(type='BN', requires_grad=True)] * 3


# ---------------------------------------------------------------- the launch scripts


@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh', 'slurm_test.sh'])
def test_launch_scripts_print_usage(script):
    result = subprocess.run([TOOLS / script], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith('usage: ')


def write_program(program: Path, lines: str) -> Path:
    """Write a program that replaces one that must not start, or that this machine does not have."""
    program.write_text(f'#!/usr/bin/env bash\n{lines}\n')
    program.chmod(0o755)
    return program


@pytest.fixture
def start(tmp_path):
    """Run a script with an interpreter that only prints its arguments; returns the lines."""
    python = write_program(tmp_path / 'python', 'echo "${PORT:-none}: $*"')
    return lambda *args, **env: run(tmp_path, *args, PYTHON=str(python), **env).splitlines()


FREE_PORT = '--standalone --nnodes=1 --local_addr=127.0.0.1'


@pytest.mark.parametrize(
    ('env', 'port', 'rendezvous'),
    [
        ({}, 'none', FREE_PORT),
        (dict(NNODES='1', NODE_RANK='0', PORT=''), 'none', FREE_PORT),
        (dict(PORT='1234'), '1234', '--nnodes=1 --node_rank=0 --master_addr=127.0.0.1 --master_port=1234'),
        (dict(NNODES='2'), '29500', '--nnodes=2 --node_rank=0 --master_addr=127.0.0.1 --master_port=29500'),
        (
            dict(NNODES='3', NODE_RANK='1', MASTER_ADDR='10.0.0.1', PORT='5'),
            '5',
            '--nnodes=3 --node_rank=1 --master_addr=10.0.0.1 --master_port=5',
        ),
    ],
)
def test_dist_train_port_and_rendezvous(start, env, port, rendezvous):
    checked, started = start('dist_train.sh', 'a b.py', '2', '--resume', **env)
    command = f'{TOOLS}/train.py a b.py --resume --launcher pytorch'
    assert checked == f'{port}: {command} --preflight 2'
    assert started == f'{port}: -m torch.distributed.run {rendezvous} --nproc_per_node=2 {command}'


def test_dist_test_starts_processes(start):
    checked, started = start('dist_test.sh', 'a.py', 'b.pth', '3', '--out', 'c d')
    command = f'{TOOLS}/test.py a.py b.pth --out c d --launcher pytorch'
    assert checked == f'none: {command} --preflight 3'
    assert started == f'none: -m torch.distributed.run {FREE_PORT} --nproc_per_node=3 {command}'


def test_slurm_scripts_request_processes(start, tmp_path):
    write_program(tmp_path / 'srun', 'printf "<%s>" "$@"')
    path = dict(PATH=f'{tmp_path}:{environment()["PATH"]}')
    (line,) = start('slurm_train.sh', 'part', 'job', 'a b.py', 'work', '--resume', **path, SRUN_ARGS='--time=5 --qos=a')
    python = f'<{tmp_path}/python><-u>'
    resources = '<--gres=gpu:8><--ntasks=8><--ntasks-per-node=8><--cpus-per-task=5><--kill-on-bad-exit=1>'
    command = f'<{TOOLS}/train.py><a b.py><--work-dir><work><--launcher><slurm><--resume>'
    assert line == f'<-p><part><--job-name=job>{resources}<--time=5><--qos=a>{python}{command}'
    size = dict(GPUS='16', GPUS_PER_NODE='4', CPUS_PER_TASK='3')
    (line,) = start('slurm_test.sh', 'part', 'job', 'a.py', 'b c.pth', '--tta', **path, **size)
    resources = '<--gres=gpu:4><--ntasks=16><--ntasks-per-node=4><--cpus-per-task=3><--kill-on-bad-exit=1>'
    command = f'<{TOOLS}/test.py><a.py><b c.pth><--launcher><slurm><--tta>'
    assert line == f'<-p><part><--job-name=job>{resources}{python}{command}'


def script_error(folder: Path, *args, **env: str) -> str:
    """Run a script with invalid arguments; returns its line of the error."""
    command = [TOOLS / args[0], *map(str, args[1:])]
    result = subprocess.run(command, cwd=folder, env=environment(**env), capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stdout + result.stderr
    (line,) = [line for line in result.stderr.splitlines() if 'rror' in line]
    assert not (folder / 'work_dirs').exists()
    return line


@pytest.mark.parametrize('gpus', ['two', '0'])
def test_dist_train_invalid_gpus(tmp_path, gpus):
    line = script_error(tmp_path, 'dist_train.sh', 'a.py', gpus, PYTHON='false')
    assert line == f"error: GPUS must be a positive number, got '{gpus}'"


@pytest.mark.parametrize('variable', ['NNODES', 'NODE_RANK'])
def test_dist_train_invalid_nodes(tmp_path, variable):
    line = script_error(tmp_path, 'dist_train.sh', 'a.py', '2', PYTHON='false', **{variable: '1:2'})
    assert line.startswith(f'error: {variable} must be a')
    assert line.endswith(", got '1:2'")


def test_dist_train_through_a_symlink(tmp_path):
    (tmp_path / 'train.sh').symlink_to(TOOLS / 'dist_train.sh')
    python = write_program(tmp_path / 'python', 'echo "$1"')
    result = subprocess.run(
        [tmp_path / 'train.sh', 'a.py', '2'], env=environment(PYTHON=str(python)), capture_output=True, text=True
    )
    assert result.stdout.splitlines()[0] == str(TOOLS / 'train.py')


def test_dist_train_stops_if_preflight_fails(tmp_path):
    python = write_program(tmp_path / 'python', 'echo "error: $*" >&2\nexit 2')
    assert script_error(tmp_path, 'dist_train.sh', 'a.py', '2', PYTHON=str(python)).endswith('--preflight 2')


def test_dist_train_port_in_use(data, tmp_path):
    """As users start it. The other errors are tested above with train.py."""
    options = ['--cfg-options', f'data_root={data}']
    with taken_port() as port:
        line = script_error(tmp_path, 'dist_train.sh', NANO_CONFIGS / 'det.py', 2, *options, PORT=str(port))
    assert line.startswith(f'error: port {port} cannot be used')


def test_preflight_unused_outputs(data, tmp_path):
    options = [f'data_root={data}', 'model.neck.start_level=1', 'model.neck.num_outs=2']
    arguments = [NANO_CONFIGS / 'det.py', '--launcher', 'pytorch', '--preflight', '2', '--cfg-options', *options]
    line = refuse(tmp_path, 'train.py', *arguments)
    assert 'nothing uses output 1 of model.backbone.out_indices=(1, 2, 3)' in line
    assert ' model.backbone.out_indices="[2,3]" model.neck.in_channels="[64,128]" model.neck.start_level=0' in line


def test_preflight_only_checks(data, tmp_path, monkeypatch):
    monkeypatch.setenv('PORT', str(free_port()))
    flags = ['--launcher', 'pytorch', '--preflight', '2']
    arguments = [NANO_CONFIGS / 'det.py', *flags, '--cfg-options', f'data_root={data}']
    call(tmp_path, 'train.py', *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ['shapes']
    (data / SHAPES[0]).unlink()
    assert 'does not exist' in refuse(tmp_path, 'train.py', *arguments)


# ---------------------------------------------------------------- every tool


@pytest.mark.parametrize('script', SCRIPTS)
def test_tools_print_usage(script, monkeypatch, capsys):
    """As Python runs a script, but in this process, which has imported everything."""
    monkeypatch.setattr(sys, 'argv', [script, '--help'])
    with folder_on_path(TOOLS / script), pytest.raises(SystemExit) as end:
        runpy.run_path(str(TOOLS / script), run_name='__main__')
    assert not end.value.code
    assert capsys.readouterr().out.startswith(f'usage: {Path(script).name}')


# ---------------------------------------------------------------- print_config.py


@pytest.mark.parametrize('how', [call, pytest.param(run, marks=pytest.mark.slow)], ids=['called', 'as_users'])
def test_print_config(tmp_path, how):
    options = ['--cfg-options', 'train_cfg.max_iters=7']
    assert 'max_iters=7' in how(
        tmp_path, 'misc/print_config.py', NANO_CONFIGS / 'seg.py', '--save-path', 'a.py', *options
    )
    assert Config.fromfile(tmp_path / 'a.py').train_cfg.max_iters == 7


def test_print_config_refuses_an_unknown_suffix(tmp_path):
    line = refuse(tmp_path, 'misc/print_config.py', NANO_CONFIGS / 'seg.py', '--save-path', 'a.txt')
    assert line == 'error: --save-path a.txt: the file must end in .py, .json or .yml'


# ---------------------------------------------------------------- process_group


@pytest.fixture
def meet(tmp_path):
    """Start a group of one process, as mmengine and `init_cpu_processes` do."""
    group = torch.distributed

    yield lambda: group.init_process_group('gloo', store=group.FileStore(str(tmp_path / 'store')), rank=0, world_size=1)
    if group.is_initialized():
        group.destroy_process_group()


def test_process_group_is_destroyed(meet):
    with launch.process_group():
        meet()
    assert not torch.distributed.is_initialized()


def test_process_group_of_the_caller_stays(meet):
    meet()
    with launch.process_group():
        pass
    assert torch.distributed.is_initialized()


def test_process_group_after_an_error(meet):
    """A barrier or the end of the group could deadlock with processes that wait for this one."""

    def fail():
        meet()
        raise ValueError('of one process')

    with pytest.raises(ValueError, match='of one process'), launch.process_group():
        fail()
    assert torch.distributed.is_initialized()
