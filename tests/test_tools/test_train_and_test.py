"""The tools as users run them: processes, signals and files. Tiny models, generated data, CPU."""

import json
import os
import pickle
import signal
import socket
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
from nano_video import shrink, write_kinetics400
from tiny_data import write_frames, write_segments
from tool_runs import REPOSITORY, TOOLS, check_training, command, environment, free_port, run

import swinv2_mm  # noqa: F401  lets torch.load read checkpoints of mmengine
from swinv2_mm.engine import launch

TINY = Path(__file__).parent / 'tiny'
VIDEO = REPOSITORY / 'configs/video/swinv2_t_k400_224x224x32.py'

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason='tests what happens without a GPU'),
]


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shapes')
    arguments = ['--train', '8', '--val', '5', '--size', '64', '--seed', '0']
    subprocess.run([sys.executable, TOOLS / 'misc/make_shapes_coco.py', folder, *arguments], check=True)
    return folder


@pytest.fixture(scope='module')
def trained(shapes, tmp_path_factory):
    """A training of four epochs on two processes, never interrupted."""
    folder = tmp_path_factory.mktemp('trained')
    log = run(
        folder,
        'dist_train.sh',
        TINY / 'det.py',
        2,
        '--work-dir',
        'work',
        '--seed',
        3,
        '--cfg-options',
        f'data_root={shapes}',
    )
    assert log.count('training in fp32 (OptimWrapper)') == 1
    return folder / 'work'


def weights(path):
    return torch.load(path, weights_only=True)['state_dict']


def test_killed_training_resumes_to_the_same_weights(shapes, trained, tmp_path):
    """SIGKILL to the launcher alone: its processes end too. The resumed run is not told the seed."""
    program, args = command(
        'dist_train.sh', TINY / 'det.py', 2, '--work-dir', 'work', '--cfg-options', f'data_root={shapes}'
    )
    with (tmp_path / 'log').open('w') as log:
        process = subprocess.Popen(
            [*program, *args, '--seed', '3'], cwd=tmp_path, env=environment(), stdout=log, stderr=log
        )
    try:
        wait_for(lambda: (tmp_path / 'work/last_checkpoint').exists() or process.poll() is not None, 120)
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_for(lambda: not any(child.is_running() and child.status() != 'zombie' for child in children), 30)
    last = Path((tmp_path / 'work/last_checkpoint').read_text())
    assert weights(last)
    assert last.name != 'epoch_4.pth', 'the kill came too late to test anything'

    log = run(
        tmp_path,
        'dist_train.sh',
        TINY / 'det.py',
        2,
        '--work-dir',
        'work',
        '--resume',
        '--cfg-options',
        f'data_root={shapes}',
    )
    assert 'resumed epoch' in log
    whole, resumed = weights(trained / 'epoch_4.pth'), weights(tmp_path / 'work/epoch_4.pth')
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def wait_for(condition, seconds):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.02)


def test_one_and_two_processes_predict_and_score_the_same(shapes, trained, tmp_path):
    """Five images on two processes: one of them is seen twice, and must count once."""
    options = ['--cfg-options', f'data_root={shapes}']
    run(
        tmp_path,
        'test.py',
        TINY / 'det.py',
        trained / 'epoch_4.pth',
        '--work-dir',
        'one',
        '--out',
        'one.pkl',
        '--show-dir',
        'drawn',
        *options,
    )
    run(
        tmp_path,
        'dist_test.sh',
        TINY / 'det.py',
        trained / 'epoch_4.pth',
        2,
        '--work-dir',
        'two',
        '--out',
        'two.pkl',
        *options,
    )
    one, two = (pickle.loads((tmp_path / name).read_bytes()) for name in ('one.pkl', 'two.pkl'))
    assert len(one) == len(two) == 5
    for left, right in zip(one, two, strict=True):
        assert left['img_id'] == right['img_id']
        assert len(left['pred_instances']['scores']) > 0
        for key, value in left['pred_instances'].items():
            torch.testing.assert_close(value, right['pred_instances'][key], rtol=1e-4, atol=1e-4)
    one, two = (scores(tmp_path / name) for name in ('one', 'two'))
    assert one == pytest.approx(two, abs=1e-3)
    assert len(list((tmp_path / 'one').rglob('drawn/*.jpg'))) == 5


def scores(work_dir):
    file = next(path for path in work_dir.glob('*/*.json') if path.stem == path.parent.name)
    return {key: value for key, value in json.loads(file.read_text()).items() if 'time' not in key}


def test_slurm_starts_the_processes(shapes, trained, tmp_path):
    """SLURM itself cannot run here; in its place a program sets the same variables and starts the same command."""
    (tmp_path / 'srun').write_text("""#!/usr/bin/env bash
        echo "srun $*"
        while [[ $1 == -* ]]; do [[ $1 == -p ]] && shift; shift; done
        export SLURM_NTASKS=2 SLURM_NODELIST=here
        SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & SLURM_PROCID=0 SLURM_LOCALID=0 "$@" && wait $!""")
    (tmp_path / 'scontrol').write_text('#!/usr/bin/env bash\necho localhost')
    for name in ('srun', 'scontrol'):
        (tmp_path / name).chmod(0o755)
    log = run(
        tmp_path,
        'slurm_test.sh',
        'gpus',
        'job',
        TINY / 'det.py',
        trained / 'epoch_4.pth',
        '--work-dir',
        'work',
        '--cfg-options',
        f'data_root={shapes}',
        PATH=f'{tmp_path}:{os.environ["PATH"]}',
        MASTER_PORT=str(free_port()),
        GPUS='2',
        GPUS_PER_NODE='2',
        SRUN_ARGS='--time=5 --qos=a',
    )
    assert 'srun -p gpus --job-name=job --gres=gpu:2 --ntasks=2 --ntasks-per-node=2' in log
    assert '--kill-on-bad-exit=1 --time=5 --qos=a' in log
    assert 'bbox_mAP' in json.dumps(scores(tmp_path / 'work'))


@pytest.mark.parametrize(
    ('env', 'args', 'text'),
    [
        ({}, [TINY / 'det.py', '2'], 'train data: data/shapes/annotations/instances_train2017.json does not exist'),
        (dict(PORT='1'), [TINY / 'det.py', '2'], None),
        ({}, [TINY / 'det.py', 'two'], "GPUS must be a positive number, got 'two'"),
    ],
)
def test_mistakes_are_found_before_any_process_starts(shapes, tmp_path, env, args, text):
    """A port in use, in the second case; it needs data, and the first case needs none."""
    with socket.socket() as taken:
        if 'PORT' in env:
            taken.bind(('', 0))
            taken.listen()
            env = dict(PORT=str(taken.getsockname()[1]))
            args, text = [*args, '--cfg-options', f'data_root={shapes}'], f'port {env["PORT"]} cannot be used'
        program, args = command('dist_train.sh', *args)
        result = subprocess.run(
            [*program, *args], cwd=tmp_path, env=environment(**env), capture_output=True, text=True, check=False
        )
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if 'rror' in line]
    assert len(errors) == 1
    assert errors[0].startswith(f'error: {text}')
    assert not (tmp_path / 'work_dirs').exists()


def test_segmentation_trains_and_tests(tmp_path):
    """mmseg: iterations, labels saved as pictures, flips merged."""
    write_segments(tmp_path / 'seg')
    options = ['--work-dir', 'work', '--cfg-options', 'data_root=seg']
    run(tmp_path, 'train.py', TINY / 'seg.py', *options)
    assert (tmp_path / 'work/last_checkpoint').read_text().endswith('iter_4.pth')
    run(
        tmp_path, 'test.py', TINY / 'seg.py', 'work/iter_4.pth', '--tta', '--out', 'labels', '--dump', 'a.pkl', *options
    )
    assert {path.name for path in (tmp_path / 'labels').iterdir()} == {f'{i}.png' for i in range(4)}
    assert len(pickle.loads((tmp_path / 'a.pkl').read_bytes())) == 4


def test_video_trains_and_tests(tmp_path):
    """mmaction: with the mends that its wheel needs, and with pictures where the config names its hook, which fails."""
    write_frames(tmp_path / 'video')
    options = ['--work-dir', 'work', '--cfg-options', 'data_root=video']
    run(tmp_path, 'train.py', TINY / 'video.py', *options)
    options += ['test_dataloader.dataset.indices=3']  # in batches of two
    run(tmp_path, 'test.py', TINY / 'video.py', 'work/epoch_1.pth', '--dump', 'a.pkl', '--show-dir', 'drawn', *options)
    assert len(predictions(tmp_path / 'a.pkl')) == 3
    assert 0 <= scores(tmp_path / 'work')['acc/top1'] <= 1
    drawn = sorted(path.relative_to(tmp_path / 'drawn').as_posix() for path in tmp_path.glob('drawn/**/*.png'))
    assert drawn == [f'{video}_0/frames_0/{frame}.png' for video in range(3) for frame in range(2)]


# ---------------------------------------------------------------- clips


@pytest.fixture(scope='module')
def recognizer(tmp_path_factory):
    """A nano recognizer after an epoch on two processes, and its predictions; a larger head makes these differ."""
    folder = tmp_path_factory.mktemp('recognizer')
    write_kinetics400(folder / 'kinetics400', frames=80)
    cfg = shrink(launch.load_config(str(VIDEO), dict(data_root=str(folder / 'kinetics400'))))
    cfg.dump(folder / 'config.py')
    run(folder, 'dist_train.sh', 'config.py', 2, '--work-dir', 'work', '--seed', 0)
    check_training(folder / 'work')
    checkpoint = torch.load(folder / 'work/epoch_1.pth', weights_only=True)
    head = checkpoint['state_dict']['cls_head.fc_cls.weight']
    head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(0)))
    torch.save(dict(state_dict=checkpoint['state_dict']), folder / 'model.pth')
    run(folder, 'test.py', 'config.py', 'model.pth', '--dump', 'predictions.pkl')
    return folder


def predictions(path: Path) -> list[dict]:
    """What a test has saved."""
    return pickle.loads(path.read_bytes())


def test_one_and_two_processes_recognize_the_same(recognizer, tmp_path):
    """Three videos on two processes. The list has the first prediction's class, and the second best of the others."""
    config, checkpoint = recognizer / 'config.py', recognizer / 'model.pth'
    first = predictions(recognizer / 'predictions.pkl')
    labels = [video['pred_score'].topk(2).indices[min(i, 1)].item() for i, video in enumerate(first)]
    (tmp_path / 'list.txt').write_text(''.join(f'{i}.avi {label}\n' for i, label in enumerate(labels)))
    options = ['--cfg-options', f'test_dataloader.dataset.ann_file={tmp_path}/list.txt']
    one = ['--work-dir', 'one', '--out', 'one.pkl', '--show-dir', 'drawn', *options]
    run(tmp_path, 'test.py', config, checkpoint, *one)
    two = ['--work-dir', 'two', '--dump', 'two.pkl', '--show-dir', 'drawn_by_two', *options]
    run(tmp_path, 'dist_test.sh', config, checkpoint, 2, *two)
    one, two = predictions(tmp_path / 'one.pkl'), predictions(tmp_path / 'two.pkl')
    for alone, left, right, label in zip(first, one, two, labels, strict=True):
        assert left['gt_label'].item() == right['gt_label'].item() == label
        assert_close(left['pred_score'], right['pred_score'])
        assert_close(left['pred_score'], alone['pred_score'])
    one, two = scores(tmp_path / 'one'), scores(tmp_path / 'two')
    assert one == two
    assert one['acc/top1'] == pytest.approx(1 / 3, abs=1e-4)
    assert one['acc/top5'] == 1
    check_pictures(tmp_path / 'drawn', [0, 1, 2])
    check_pictures(tmp_path / 'drawn_by_two', [0, 2])  # by the first process


def check_pictures(folder: Path, videos: list[int]) -> None:
    """There are 32 frames of each video, in which something moves, and which is that video's."""
    assert {path.name for path in folder.iterdir()} == {f'{video}_0' for video in videos}
    for video in videos:
        paths = [folder / f'{video}_0/frames_0/{frame}.png' for frame in range(32)]
        assert sorted(paths) == sorted(folder.glob(f'{video}_0/*/*'))
        frames = np.stack([cv2.imread(str(path)) for path in paths]).astype(int)
        assert frames.shape[1:] == (28, 28, 3)
        assert frames[:, 16:].std() > 10  # below the text
        assert abs(frames[0, 16:] - frames[8, 16:]).max() > 50


def test_the_views_of_a_video_are_averaged_as_the_head_says(recognizer):
    """4 clips x 3 crops, each of them predicted alone and averaged by hand: as probabilities, and as logits."""
    from mmaction.apis import init_recognizer
    from mmaction.registry import DATASETS

    cfg = launch.load_config(str(recognizer / 'config.py'))
    model = init_recognizer(cfg, str(recognizer / 'model.pth'), device='cpu')
    with DefaultScope.overwrite_default_scope('mmaction'):
        videos = list(DATASETS.build(cfg.test_dataloader.dataset))
    for video, saved in zip(videos, predictions(recognizer / 'predictions.pkl'), strict=True):
        logits = predict_views_alone(model, video)
        mean = logits.softmax(1).mean(0)
        assert (mean - logits.mean(0).softmax(0)).abs().max() > 1e-3  # the order matters
        assert_close(saved['pred_score'], mean)
        model.test_cfg = dict(max_testing_views=5)  # as the configs with many views have it
        assert_close(predict(model, video), mean)
        model.test_cfg = None
        model.cls_head.average_clips = 'score'
        assert_close(predict(model, video), logits.mean(0))
        model.cls_head.average_clips = 'prob'


def predict_views_alone(model, video: dict) -> torch.Tensor:
    """Logits (12, 400) of the views of a video, each of which is a video of its own for the model."""
    assert video['inputs'].shape == (12, 3, 32, 28, 28)
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
    """Scores are equal apart from rounding."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_apis_of_mmaction_recognize_as_the_tools_do(recognizer):
    """A video by its path: with all views, or with the one that mmaction's inferencers take."""
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
    clip = VideoReader(video).get_batch([8 + 2 * i for i in range(32)]).asnumpy()  # in the middle of 80 frames
    frames = np.stack([cv2.resize(frame, (37, 28), interpolation=cv2.INTER_LINEAR)[:, 4:32] for frame in clip])
    view = torch.from_numpy(frames).permute(3, 0, 1, 2)[None]
    data = model.data_preprocessor(dict(inputs=[view], data_samples=None))
    with torch.no_grad():
        expected = model.extract_feat(data['inputs'], stage='head')[0].softmax(1)[0]
    for answer in answers:
        assert_close(torch.tensor(answer), expected)


def test_curves_of_a_recognizer_are_plotted(recognizer, tmp_path):
    """Without `--keys`, the curve is that of top-1."""
    log = next(recognizer.glob('work/2*/vis_data/2*.json'))
    tool = 'analysis_tools/analyze_logs.py'
    run(tmp_path, tool, 'plot_curve', log, '--out', 'top1.png')
    assert cv2.imread(str(tmp_path / 'top1.png')).std() > 1
    assert 's/iter' in run(tmp_path, tool, 'cal_train_time', log, '--include-outliers')
