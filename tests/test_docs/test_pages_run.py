"""Every command and code block of the README and the docs, run at nano size in a folder laid out like this one."""

import re
import shlex
import shutil
from pathlib import Path

import nano.cls
import nano.det
import nano.seg
import nano.ssl
import nano.starting_points
import nano.video
import oracles
import pytest
import torch
from doc_pages import CODE, COMMANDS, blocks, script_call
from mmengine.config import Config
from mmengine.registry import DATASETS, HOOKS, MODELS, DefaultScope
from tool_runs import REPOSITORY, call, run

from swinv2_mm.checkpoints.loaders import find_release
from swinv2_mm.cli import launch
from swinv2_mm.models import SwinTransformerV2
from swinv2_mm.registry import OPTIM_WRAPPER_CONSTRUCTORS

for toolbox in ('mmdet', 'mmseg', 'mmaction', 'mmpretrain'):
    pytest.importorskip(toolbox)

pytestmark = pytest.mark.slow
TASKS = dict(
    cls=(nano.cls.shrink, nano.cls.write_imagenet),
    det=(nano.det.shrink, nano.det.write_shapes),
    seg=(nano.seg.shrink, nano.seg.write_ade20k),
    ssl=(nano.ssl.shrink, nano.ssl.write_images),
    video=(nano.video.shrink, nano.video.write_kinetics400),
)
STARTING_POINTS = 'dino', 'faster_rcnn', 'mask2former', 'retinanet'
CHECKPOINT = 'nano.pth'
RELEASE = re.compile(r'swinv2://\w+')
EXAMPLES = (  # of the pages
    ('make_shapes_coco.py', 'shapes_coco'),
    ('make_motion_clips.py', 'motion_clips'),
    ('make_digits.py', 'digits'),
)
PROCESSES = 'benchmark_loading.py', 'benchmark_memory.py', 'kernel_report.py', 'study_ablations.py'  # start some
# run by CI as they are, or by tests of their own: downloads, GPUs, many machines
ELSEWHERE = (
    r'(git|pip|make|source|cd|export) ',
    r'(TINY=1 )?benchmarks/gpu_run\.sh ',
    r'(TRITON_INTERPRET=1 )?python -m swinv2_mm\.ops\.selfcheck',
    r'python tools/demo\.py',
    r'python tools/misc/with_swinv2\.py',
)
# what makes a command small: of repeated options the last one counts
SMALL = {
    r'benchmark_(attention|backbone)\.py': '--shapes nano --repeats 1 --implementations *eager',
    r'benchmark_loading\.py': '--arch tiny --layouts hf --formats pth',
    r'benchmark_memory\.py --task sizes': '--sizes 64 96 --window 4',
    r'benchmark_memory\.py --task (?!sizes)': '--task nano --techniques sdpa',
    r'kernel_report\.py': '--shapes nano --json report.json',
    r'tools/benchmark\.py': '--max-iter 1 --num-warmup 0',
    r'make_shapes_coco\.py': '--train 2 --val 1 --size 96',
    r'make_motion_clips\.py': '--train 4 --val 4',
    # nano configs start from random weights
    r' model\.backbone\.init_cfg\.checkpoint=': 'model.backbone.init_cfg._delete_=True'
    ' model.backbone.init_cfg.type=Pretrained',
    r'study_ablations\.py': '--window 4 --factors 1 2 --steps 2 --batch-size 2 --train-scenes 9 --test-scenes 4'
    ' --seeds 4',
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """A working folder with the repository's configs at nano size, data sets, and checkpoints for them."""
    root = tmp_path_factory.mktemp('docs')
    for script, name in EXAMPLES:
        call(root, f'misc/{script}', f'data/{name}', *small(script))
    for task, (shrink_task, write_data) in TASKS.items():
        (root / 'data' / task).mkdir(parents=True)
        data = write_data(root / 'data' / task)
        (root / 'configs' / task).mkdir(parents=True)
        for path in (REPOSITORY / 'configs' / task).glob('*.py'):
            is_demo = 'demo' in path.name  # small already, with data of its own
            place = data / folder_in_data(task, path.stem)
            shrink = nano.starting_points.shrink if path.name.startswith(STARTING_POINTS) else shrink_task
            cfg = launch.load_config(str(path), {} if is_demo else dict(data_root=f'{place}/'))
            (cfg if is_demo else shrink(cfg)).dump(root / 'configs' / task / path.name)
    backbone = oracles.randomize(SwinTransformerV2(nano.ARCH, window_size=8, pretrained_window_sizes=8))
    torch.save(dict(state_dict=backbone.state_dict(), meta={}), root / CHECKPOINT)
    (root / 'work_dirs').mkdir()
    return root


def folder_in_data(task: str, config: str) -> str:
    """Where the data of a config lie in what `write_data` writes for its task."""
    if task == 'det':
        return 'objects365' if 'objects365' in config else 'coco'
    return 'v2' if 'imagenet_v2' in config else '.'


def checkpoint_of(path: str, folder: Path) -> None:
    """Write the checkpoint that a command expects from an earlier training: work_dirs/CONFIG/NAME.pth."""
    target = folder / path
    if target.exists():
        return
    cfg = Config.fromfile(next(folder.glob(f'configs/*/{target.parent.name}.py')))
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta={})), target)


def log_of_a_training(folder: Path) -> Path:
    """The scalars that a training and its validation have logged."""
    work_dir = folder / 'work_dirs/logged'
    if not work_dir.exists():
        options = ['train_dataloader.dataset.indices=2', 'train_dataloader.batch_size=1']
        config = 'configs/det/cascade_mask_rcnn_swinv2_t.py'
        call(folder, 'train.py', config, '--work-dir', work_dir, '--cfg-options', *options)
    return next(work_dir.glob('*/vis_data/2*.json'))


def small(command: str) -> list[str]:
    """Options that make a command small."""
    return [word for pattern, options in SMALL.items() if re.search(pattern, command) for word in options.split()]


RUN_HERE = sorted({c for _, c in COMMANDS if not any(re.match(pattern, c) for pattern in ELSEWHERE)})


@pytest.mark.parametrize('command', RUN_HERE)
def test_a_command_runs(command, folder):
    if command.startswith('python -c'):
        exec(shlex.split(command)[2], {})
        return
    tested = re.search(r'test\.(?:py|sh) (?:.* )?configs/\w+/(\w+)\.py', command)  # whole models
    checkpoint = f'work_dirs/{tested[1]}/whole.pth' if tested else CHECKPOINT
    script, *arguments = script_call(shlex.split(RELEASE.sub(checkpoint, command), comments=True))
    if '--launcher' in arguments:  # here it runs in one process
        at = arguments.index('--launcher')
        del arguments[at : at + 2]
    if script.startswith('tools/misc/make_'):
        shutil.rmtree(folder / arguments[0], ignore_errors=True)
    for word in [*arguments, checkpoint]:
        for path in re.findall(r'work_dirs/\w+/\w+\.pth', word):
            checkpoint_of(path, folder)
    names = {'CHECKPOINT': checkpoint, 'SRC': CHECKPOINT, 'DST': 'converted.pth'}
    if 'LOG.json' in arguments:
        names['LOG.json'] = log_of_a_training(folder)
    arguments = [names.get(word, word) for word in arguments] + small(command)
    if Path(script).name in PROCESSES:
        run(folder, REPOSITORY / script, *arguments, TRITON_INTERPRET='0')
    else:
        call(folder, REPOSITORY / script, *arguments)


# ---------------------------------------------------------------- code


def is_config(text: str) -> bool:
    return not re.search(r'^(import|from) ', text, re.MULTILINE)


CONFIGS = [(page, i) for page, i in CODE if is_config(blocks(REPOSITORY / page, 'python')[i])]


def without_channels(text: str) -> str:
    """Output without lines of the log and without the channels of feature maps, in which the nano model differs."""
    text = re.sub(r'.* - mmengine - .*\n', '', text)
    return re.sub(r'\(1, \d+, (\d+, \d+)\)', r'(1, C, \1)', text)


@pytest.mark.parametrize(('page', 'number'), sorted(set(CODE) - set(CONFIGS)))
def test_a_script_prints_what_the_page_shows(page, number, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    code = blocks(REPOSITORY / page, 'python')[number]
    text = RELEASE.sub(CHECKPOINT, re.sub(r"arch='\w+'", f'arch={nano.ARCH}', code))
    exec(compile(text, page, 'exec'), {})
    shown = re.search(r'```console\n(.*?)```', (REPOSITORY / page).read_text().split(code)[1], re.DOTALL)[1]
    assert without_channels(capsys.readouterr().out) == without_channels(shown)


@pytest.mark.parametrize(('page', 'number'), CONFIGS)
def test_a_config_builds(page, number, folder, tmp_path, monkeypatch):
    """Its model or backbone, its data sets, hooks and the optimizer's constructor."""
    monkeypatch.chdir(folder)
    path = tmp_path / 'mine.py'
    path.write_text(blocks(REPOSITORY / page, 'python')[number])
    cfg = Config.fromfile(path)
    for name in RELEASE.findall(path.read_text()):
        assert find_release(name)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        model = cfg.get('model', {})
        part = model if 'type' in model else cfg.get('backbone', model.get('backbone', {}))
        if 'type' in part:
            with torch.device('meta'):
                MODELS.build(part)
        for name, loader in cfg.items():
            if name.endswith('_dataloader') and 'data_root = ' in path.read_text() and loader:
                assert DATASETS.build(loader.dataset)[0]
        for hook in cfg.get('custom_hooks', []):
            HOOKS.build(hook)
        if 'constructor' in cfg.get('optim_wrapper', {}):
            assert OPTIM_WRAPPER_CONSTRUCTORS.get(cfg.optim_wrapper.constructor)
