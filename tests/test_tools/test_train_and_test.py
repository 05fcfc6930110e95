"""Training and testing with the tools: in this process, in two, and as users start them. Nano models and data sets."""

import contextlib
import json
import os
import pickle
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import torch
from decord import VideoReader
from mmengine.registry import DefaultScope
from nano import NANO_CONFIGS
from nano.cls import write_classes
from nano.seg import write_segments
from nano.video import shrink, write_frames, write_kinetics400
from tool_runs import (
    HELPERS,
    REPOSITORY,
    TOOLS,
    call,
    call_together,
    check_training,
    command,
    environment,
    free_port,
    load_tool,
    restored_process,
    run,
    taken_port,
)

import swinv2_mm  # noqa: F401  lets torch.load read checkpoints of mmengine
from swinv2_mm.cli import launch

DET = NANO_CONFIGS / 'det.py'
CLS = NANO_CONFIGS / 'cls.py'
VIDEO = REPOSITORY / 'configs/video/swinv2_t_k400_224x224x32.py'
CLIP, FRAMES = 8, 40  # frames of a clip (every second one of the video) and of a video
PLOT = 'analysis_tools/analyze_logs.py'
# the default of torchrun, for the same order of summation with every launcher
ONE_THREAD = dict(OMP_NUM_THREADS='1')

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason='tests what happens without a GPU')


# ---------------------------------------------------------------- a detector on one and two processes


@pytest.fixture(scope='module')
def trained(shapes, tmp_path_factory):
    """An uninterrupted training of four epochs on two processes."""
    folder = tmp_path_factory.mktemp('trained')
    options = ['--work-dir', 'work', '--seed', 3, '--cfg-options', f'data_root={shapes}']
    log = call_together(folder, 'train.py', DET, *options, **ONE_THREAD)
    assert log.count('training in fp32 (OptimWrapper)') == 1
    return folder / 'work'


@pytest.fixture(scope='module')
def tested(shapes, trained, tmp_path_factory):
    """A test of `trained` in one process, with predictions saved and drawn."""
    folder = tmp_path_factory.mktemp('tested')
    options = ['--out', 'a.pkl', '--show-dir', 'drawn', '--cfg-options', f'data_root={shapes}']
    call(folder, 'test.py', DET, trained / 'epoch_4.pth', '--work-dir', 'work', *options)
    return folder


def test_test_draws_each_image_of_a_detector(tested):
    assert len(list(tested.rglob('drawn/*.jpg'))) == 5


def weights(path):
    return torch.load(path, weights_only=True)['state_dict']


def predictions(path: Path) -> list[dict]:
    """The predictions that a test has saved."""
    return pickle.loads(path.read_bytes())


def scores(work_dir):
    file = next(path for path in work_dir.glob('*/*.json') if path.stem == path.parent.name)
    return {key: value for key, value in json.loads(file.read_text()).items() if 'time' not in key}


def check_same_test(one: Path, two: Path) -> None:
    """Compare a.pkl and work/ of two folders: of five images, two processes test one twice, which must count once."""
    ours, theirs = predictions(one / 'a.pkl'), predictions(two / 'a.pkl')
    assert len(ours) == len(theirs) == 5
    for left, right in zip(ours, theirs, strict=True):
        assert left['img_id'] == right['img_id']
        assert len(left['pred_instances']['scores']) > 0
        for key, value in left['pred_instances'].items():
            torch.testing.assert_close(value, right['pred_instances'][key], rtol=1e-4, atol=1e-4)
    assert scores(one / 'work') == pytest.approx(scores(two / 'work'), abs=1e-3)


def test_test_on_one_and_two_processes(shapes, trained, tested, tmp_path):
    options = ['--work-dir', 'work', '--out', 'a.pkl', '--cfg-options', f'data_root={shapes}']
    call_together(tmp_path, 'test.py', DET, trained / 'epoch_4.pth', *options)
    check_same_test(tested, tmp_path)


@pytest.mark.slow
def test_dist_test_predicts_like_one_process(shapes, trained, tested, tmp_path):
    """As users start it."""
    options = ['--work-dir', 'work', '--out', 'a.pkl', '--cfg-options', f'data_root={shapes}']
    run(tmp_path, 'dist_test.sh', DET, trained / 'epoch_4.pth', 2, *options)
    check_same_test(tested, tmp_path)


@pytest.mark.slow
@pytest.mark.smoke
def test_train_resumes_after_kill_to_the_same_weights(shapes, trained, tmp_path):
    """As users start it, while torchrun's default port is in use. The resumed run does not set the seed."""
    (tmp_path / 'config.py').write_text(f"""
_base_ = '{DET}'
custom_imports = dict(imports=['nano.training'], allow_failed_imports=False)
custom_hooks = [dict(type='swinv2_mm.ReproducibleResumeHook'), dict(type='StallInSecondEpoch')]
""")
    options = ['--work-dir', 'work', '--cfg-options', f'data_root={shapes}']
    with taken_port(29500):
        kill_in_second_epoch(tmp_path, *options, '--seed', 3)
        last = Path((tmp_path / 'work/last_checkpoint').read_text())
        assert last.name == 'epoch_1.pth'
        assert weights(last)
        log = run(tmp_path, 'dist_train.sh', DET, 2, '--resume', *options, **ONE_THREAD)
    assert 'resumed epoch' in log
    assert log.count('training in fp32 (OptimWrapper)') == 1
    expected, resumed = weights(trained / 'epoch_4.pth'), weights(tmp_path / 'work/epoch_4.pth')
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)


def kill_in_second_epoch(folder: Path, *options) -> None:
    """Train with config.py, and SIGKILL only the launcher: its processes and their data workers must end too."""
    program, args = command('dist_train.sh', 'config.py', 2, *options)
    env = environment(**ONE_THREAD, PYTHONPATH=str(HELPERS))
    with (folder / 'log').open('w') as log:
        process = subprocess.Popen([*program, *args], cwd=folder, env=env, stdout=log, stderr=log)
    children = []
    try:
        stall_files = [folder / f'stalled_{rank}' for rank in range(2)]
        wait_for(lambda: all(file.exists() for file in stall_files) or process.poll() is not None, 600)
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(children) >= 4, (folder / 'log').read_text()[-3000:]
    wait_for(lambda: not any(is_alive(child) for child in children), 300)


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):  # it may end between the calls
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def wait_for(condition, seconds):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_slurm_train_starts_processes(shapes, trained, tmp_path):
    """SLURM cannot run here: a fake `srun` sets its variables and starts the same command."""
    (tmp_path / 'srun').write_text("""#!/usr/bin/env bash
        while [[ $1 == -* ]]; do [[ $1 == -p ]] && shift; shift; done
        export SLURM_NTASKS=2 SLURM_NODELIST=here
        SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & SLURM_PROCID=0 SLURM_LOCALID=0 "$@" && wait $!""")
    (tmp_path / 'scontrol').write_text('#!/usr/bin/env bash\necho localhost')
    for name in ('srun', 'scontrol'):
        (tmp_path / name).chmod(0o755)
    options = ['--work-dir', 'work', '--cfg-options', f'data_root={shapes}']
    path = f'{tmp_path}:{os.environ["PATH"]}'
    checkpoint = trained / 'epoch_4.pth'
    run(tmp_path, 'slurm_test.sh', 'gpus', 'job', DET, checkpoint, *options, PATH=path, MASTER_PORT=str(free_port()))
    assert 'bbox_mAP' in json.dumps(scores(tmp_path / 'work'))


# ---------------------------------------------------------------- a segmentor


def test_train_and_test_segmentation(tmp_path):
    """With mmseg: iterations, saved label images, merged flips, curves."""
    write_segments(tmp_path / 'seg')
    options = ['--work-dir', 'work', '--cfg-options', 'data_root=seg', 'default_hooks.logger.type=LoggerHook']
    options += ['default_hooks.logger.interval=1']
    call(tmp_path, 'train.py', NANO_CONFIGS / 'seg.py', *options)
    assert (tmp_path / 'work/last_checkpoint').read_text().endswith('iter_4.pth')
    check_curves(next(tmp_path.glob('work/*/vis_data/2*.json')), tmp_path / 'miou.png')
    saved = ['--tta', '--out', 'labels', '--dump', 'a.pkl']
    call(tmp_path, 'test.py', NANO_CONFIGS / 'seg.py', 'work/iter_4.pth', *saved, *options)
    assert {path.name for path in (tmp_path / 'labels').iterdir()} == {f'{i}.png' for i in range(4)}
    assert len(predictions(tmp_path / 'a.pkl')) == 4


def check_curves(log: Path, figure: Path, *options: str) -> None:
    """analyze_logs reads a log; without `--keys`, the curve is that of the toolbox's metric."""
    call(log.parent, PLOT, 'plot_curve', log, '--out', figure)
    assert cv2.imread(str(figure)).std() > 1
    assert 's/iter' in call(log.parent, PLOT, 'cal_train_time', log, *options)


# ---------------------------------------------------------------- a classifier


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    """A nano classifier after two epochs, in epoch_2.pth of the folder, and its data in `cls`."""
    folder = tmp_path_factory.mktemp('classifier')
    write_classes(folder / 'cls')
    options = ['--work-dir', '.', '--seed', 3, '--cfg-options', f'data_root={folder}/cls']
    call(folder, 'train.py', CLS, *options)
    return folder


def test_train_equals_the_script_of_mmpretrain(classifier, tmp_path):
    data = [f'{split}_dataloader.dataset.data_root={classifier}/cls' for split in ('train', 'val', 'test')]
    options = ['--work-dir', '.', '--no-persistent-workers', '--cfg-options', *data, 'randomness.seed=3']
    run_mmpretrain(tmp_path, 'train.py', CLS, *options)
    expected, ours = weights(tmp_path / 'epoch_2.pth'), weights(classifier / 'epoch_2.pth')
    assert expected.keys() == ours.keys()
    assert all(torch.equal(expected[key], ours[key]) for key in expected)
    check_curves(next(classifier.glob('2*/vis_data/2*.json')), tmp_path / 'top1.png')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda weights: {k: v for k, v in weights.items() if k.startswith('backbone.')}, 'no weights for head, which'),
        (
            lambda weights: weights | {'head.fc.weight': torch.zeros(3, 128), 'head.fc.bias': torch.zeros(3)},
            r'head.fc.weight has the shape (3, 128), and (2, 128) in the model. If the classes differ, set num_classes',
        ),
    ],
    ids=['backbone', 'other_classes'],
)
@pytest.mark.parametrize('flags', [(), ('--tta',)])
def test_test_refuses_a_checkpoint_without_the_head(classifier, tmp_path, change, message, flags):
    checkpoint = torch.load(classifier / 'epoch_2.pth', weights_only=True)
    torch.save(dict(checkpoint, state_dict=change(checkpoint['state_dict'])), tmp_path / 'other.pth')
    options = [*flags, '--cfg-options', f'data_root={classifier}/cls', 'model.head.type=LinearClsHead']
    with pytest.raises(AssertionError) as error:  # exit code 2
        call(tmp_path, 'test.py', CLS, 'other.pth', *options)
    assert 'error: checkpoint other.pth cannot be tested: ' in str(error.value)
    assert message in str(error.value)


def run_mmpretrain(folder: Path, script: str, *args) -> None:
    """Run a script of mmpretrain in this process."""
    with restored_process():
        os.chdir(folder)
        path = load_tool(TOOLS / 'analysis_tools/browse_dataset.py').toolbox_script('mmpretrain', script)
        sys.argv = [str(path), *map(str, args)]
        runpy.run_path(str(path), run_name='__main__')


def test_test_of_a_classifier_on_one_and_two_processes(classifier, tmp_path):
    """Of five images, two processes test one twice, which must count once. The metrics are those of the predictions.

    Grey images get three equal channels, from OpenCV and from Pillow, which reads them in the second test.
    """
    write_classes(tmp_path / 'cls')
    cv2.imwrite(str(tmp_path / 'cls/val/dark/grey.png'), np.full((40, 48), 255, np.uint8))  # too bright for its class
    options = ['--cfg-options', 'data_root=cls']
    call(tmp_path, 'test.py', CLS, classifier / 'epoch_2.pth', '--out', 'one.pkl', '--show-dir', 'drawn', *options)
    two = ['--dump', 'two.pkl', '--out', 'metrics.json', '--out-item', 'metrics']
    options.append('test_dataloader.dataset.pipeline.0.imdecode_backend=pillow')
    call_together(tmp_path, 'test.py', CLS, classifier / 'epoch_2.pth', *two, *options)
    one, two = predictions(tmp_path / 'one.pkl'), predictions(tmp_path / 'two.pkl')
    for left, right in zip(one, two, strict=True):
        assert left['img_path'] == right['img_path']
        assert_close(left['pred_score'], right['pred_score'])
    accuracy = sum((image['pred_label'] == image['gt_label']).item() for image in one) / 5
    assert json.loads((tmp_path / 'metrics.json').read_text()) == pytest.approx({'accuracy/top1': 100 * accuracy})
    assert len(list(tmp_path.glob('drawn/*.png'))) == 5


def test_tta_of_a_classifier_averages_an_image_and_its_mirror_image(classifier, tmp_path):
    for path in list(write_classes(tmp_path / 'cls').glob('val/*/*.png')):
        cv2.imwrite(str(path.with_name(f'mirrored_{path.name}')), cv2.imread(str(path))[:, ::-1])
    options = ['--cfg-options', 'data_root=cls']
    checkpoint = classifier / 'epoch_2.pth'
    call(tmp_path, 'test.py', CLS, checkpoint, '--out', 'one.pkl', *options)
    call(tmp_path, 'test.py', CLS, checkpoint, '--tta', '--out', 'tta.pkl', *options)
    one, tta = (
        {Path(image['img_path']).name: image['pred_score'] for image in predictions(tmp_path / name)}
        for name in ('one.pkl', 'tta.pkl')
    )
    for name, scores in tta.items():
        mirrored = name.removeprefix('mirrored_') if name.startswith('mirrored_') else f'mirrored_{name}'
        assert_close(scores, (one[name] + one[mirrored]) / 2)
        assert not torch.equal(one[name], one[mirrored])


# ---------------------------------------------------------------- recognizers


def test_train_and_test_video(tmp_path):
    """With mmaction, the workarounds for its wheel, and frames drawn in place of its broken visualization hook."""
    write_frames(tmp_path / 'video')
    options = ['--work-dir', 'work', '--cfg-options', 'data_root=video']
    call(tmp_path, 'train.py', NANO_CONFIGS / 'video.py', *options)
    options += ['test_dataloader.dataset.indices=3']  # in batches of two
    saved = ['--dump', 'a.pkl', '--show-dir', 'drawn']
    call(tmp_path, 'test.py', NANO_CONFIGS / 'video.py', 'work/epoch_1.pth', *saved, *options)
    assert len(predictions(tmp_path / 'a.pkl')) == 3
    assert 0 <= scores(tmp_path / 'work')['acc/top1'] <= 1
    drawn = sorted(path.relative_to(tmp_path / 'drawn').as_posix() for path in tmp_path.glob('drawn/**/*.png'))
    assert drawn == [f'{video}_0/frames_0/{frame}.png' for video in range(3) for frame in range(2)]


@pytest.fixture(scope='module')
def recognizer(tmp_path_factory):
    """A nano recognizer after an epoch on two processes, and its predictions; a random head makes them differ."""
    folder = tmp_path_factory.mktemp('recognizer')
    write_kinetics400(folder / 'kinetics400', FRAMES)
    cfg = shrink(launch.load_config(str(VIDEO), dict(data_root=str(folder / 'kinetics400'))))
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        next(step for step in loader.dataset.pipeline if step.type == 'SampleFrames').clip_len = CLIP
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline
    cfg.dump(folder / 'config.py')
    call_together(folder, 'train.py', 'config.py', '--work-dir', 'work', '--seed', 0)
    check_training(folder / 'work')
    checkpoint = torch.load(folder / 'work/epoch_1.pth', weights_only=True)
    head = checkpoint['state_dict']['cls_head.fc_cls.weight']
    head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(0)))
    torch.save(dict(state_dict=checkpoint['state_dict']), folder / 'model.pth')
    call(folder, 'test.py', 'config.py', 'model.pth', '--dump', 'predictions.pkl')
    return folder


def test_test_of_videos_on_one_and_two_processes(recognizer, tmp_path):
    """Three videos on two processes. Labels: the best class of the first prediction, the second best of others."""
    config, checkpoint = recognizer / 'config.py', recognizer / 'model.pth'
    first = predictions(recognizer / 'predictions.pkl')
    labels = [video['pred_score'].topk(2).indices[min(i, 1)].item() for i, video in enumerate(first)]
    (tmp_path / 'list.txt').write_text(''.join(f'{i}.avi {label}\n' for i, label in enumerate(labels)))
    options = ['--cfg-options', f'test_dataloader.dataset.ann_file={tmp_path}/list.txt']
    one = ['--work-dir', 'one', '--out', 'one.pkl', '--show-dir', 'drawn', *options]
    call(tmp_path, 'test.py', config, checkpoint, *one)
    two = ['--work-dir', 'two', '--dump', 'two.pkl', '--show-dir', 'drawn_by_two', *options]
    call_together(tmp_path, 'test.py', config, checkpoint, *two)
    one, two = predictions(tmp_path / 'one.pkl'), predictions(tmp_path / 'two.pkl')
    for prediction, left, right, label in zip(first, one, two, labels, strict=True):
        assert left['gt_label'].item() == right['gt_label'].item() == label
        assert_close(left['pred_score'], right['pred_score'])
        assert_close(left['pred_score'], prediction['pred_score'])
    one, two = scores(tmp_path / 'one'), scores(tmp_path / 'two')
    assert one == two
    assert one['acc/top1'] == pytest.approx(1 / 3, abs=1e-4)
    assert one['acc/top5'] == 1
    check_frames(tmp_path / 'drawn', [0, 1, 2])
    check_frames(tmp_path / 'drawn_by_two', [0, 2])  # by the first process


def check_frames(folder: Path, videos: list[int]) -> None:
    """Each video has the frames of a clip of its own, in which something moves."""
    assert {path.name for path in folder.iterdir()} == {f'{video}_0' for video in videos}
    for video in videos:
        paths = [folder / f'{video}_0/frames_0/{frame}.png' for frame in range(CLIP)]
        assert sorted(paths) == sorted(folder.glob(f'{video}_0/*/*'))
        frames = np.stack([cv2.imread(str(path)) for path in paths]).astype(int)
        assert frames.shape[1:] == (28, 28, 3)
        assert frames[:, 16:].std() > 10  # below the text
        assert abs(frames[0, 16:] - frames[-1, 16:]).max() > 50


def test_test_averages_the_views_of_a_video(recognizer):
    """4 clips x 3 crops, predicted one by one and averaged by hand: as probabilities, and as logits."""
    from mmaction.apis import init_recognizer
    from mmaction.registry import DATASETS

    cfg = launch.load_config(str(recognizer / 'config.py'))
    model = init_recognizer(cfg, str(recognizer / 'model.pth'), device='cpu')
    with DefaultScope.overwrite_default_scope('mmaction'):
        videos = list(DATASETS.build(cfg.test_dataloader.dataset))
    for video, saved in zip(videos, predictions(recognizer / 'predictions.pkl'), strict=True):
        logits = predict_each_view(model, video)
        mean = logits.softmax(1).mean(0)
        assert (mean - logits.mean(0).softmax(0)).abs().max() > 1e-3  # the order matters
        assert_close(saved['pred_score'], mean)
        model.test_cfg = dict(max_testing_views=5)  # as in the configs with many views
        assert_close(predict(model, video), mean)
        model.test_cfg = None
        model.cls_head.average_clips = 'score'
        assert_close(predict(model, video), logits.mean(0))
        model.cls_head.average_clips = 'prob'


def predict_each_view(model, video: dict) -> torch.Tensor:
    """Logits (12, 400) of the views of a video, each passed to the model as one video."""
    assert video['inputs'].shape == (12, 3, CLIP, 28, 28)
    logits = []
    for view in video['inputs']:
        data = model.data_preprocessor(dict(inputs=[view[None]], data_samples=[video['data_samples']]))
        with torch.no_grad():
            logits.append(model.extract_feat(data['inputs'], stage='head')[0])
    return torch.cat(logits)


def predict(model, video: dict) -> torch.Tensor:
    """Scores (400,) of a video with all its views."""
    with torch.no_grad():
        return model.test_step(dict(inputs=[video['inputs']], data_samples=[video['data_samples']]))[0].pred_score


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Assert that scores are equal up to rounding."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_mmaction_apis_predict_like_test(recognizer):
    """A video by its path: with all views, or with the single view of mmaction's inferencers."""
    from mmaction.apis import inference_recognizer, init_recognizer
    from mmaction.apis.inferencers import ActionRecogInferencer, MMAction2Inferencer

    config, checkpoint = str(recognizer / 'config.py'), str(recognizer / 'model.pth')
    video, saved = str(recognizer / 'kinetics400/videos_val/1.avi'), predictions(recognizer / 'predictions.pkl')[1]
    model = init_recognizer(config, checkpoint, device='cpu')
    assert_close(inference_recognizer(model, video).pred_score, saved['pred_score'])

    answers = [
        ActionRecogInferencer(config, checkpoint, device='cpu')(video)['predictions'][0]['pred_scores'],
        MMAction2Inferencer(config, checkpoint, device='cpu')(video)['predictions'][0]['rec_scores'][0],
    ]
    start = (FRAMES - 2 * CLIP) // 2
    clip = VideoReader(video).get_batch([start + 2 * i for i in range(CLIP)]).asnumpy()
    frames = np.stack([cv2.resize(frame, (37, 28), interpolation=cv2.INTER_LINEAR)[:, 4:32] for frame in clip])
    view = torch.from_numpy(frames).permute(3, 0, 1, 2)[None]
    data = model.data_preprocessor(dict(inputs=[view], data_samples=None))
    with torch.no_grad():
        expected = model.extract_feat(data['inputs'], stage='head')[0].softmax(1)[0]
    for answer in answers:
        assert_close(torch.tensor(answer), expected)


def test_analyze_logs_of_a_recognizer(recognizer, tmp_path):
    check_curves(next(recognizer.glob('work/2*/vis_data/2*.json')), tmp_path / 'top1.png', '--include-outliers')
