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

import psutil
import pytest
import torch
from tiny_data import write_frames, write_segments
from tool_runs import TOOLS, command, environment, free_port, run

import swinv2_mm  # noqa: F401  lets torch.load read checkpoints of mmengine

TINY = Path(__file__).parent / 'tiny'

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
    """mmaction: with the mends that its wheel needs."""
    write_frames(tmp_path / 'video')
    options = ['--work-dir', 'work', '--cfg-options', 'data_root=video']
    run(tmp_path, 'train.py', TINY / 'video.py', *options)
    run(tmp_path, 'test.py', TINY / 'video.py', 'work/epoch_1.pth', '--dump', 'a.pkl', *options)
    assert len(pickle.loads((tmp_path / 'a.pkl').read_bytes())) == 4
    assert 0 <= scores(tmp_path / 'work')['acc/top1'] <= 1
