"""gpu_run.sh and its tables, without a GPU and without OpenMMLab."""

import json
import subprocess

import pytest
import torch
from bare_python import WITHOUT_OPENMMLAB
from tool_runs import BENCHMARKS, call, environment, refuse, run

SCRIPT, TABLES = BENCHMARKS / 'gpu_run.sh', BENCHMARKS / 'gpu_tables.py'


@pytest.mark.parametrize('arguments', [[], ['out', '6'], ['out', 'all']])
def test_gpu_run_prints_its_usage_on_wrong_arguments(arguments, tmp_path):
    result = subprocess.run([SCRIPT, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert 'benchmarks/gpu_run.sh OUT [STAGE]' in result.stderr
    assert not list(tmp_path.iterdir())


def test_gpu_run_names_a_failed_stage_in_the_last_line(tmp_path):
    """The other stages run."""
    python = tmp_path / 'python'
    python.write_text('#!/bin/sh\ncase "$*" in *benchmark_memory*) exit 3;; esac\n')
    python.chmod(0o755)
    for stages, code in ((['4'], 1), (['3'], 0), ([], 1)):
        result = subprocess.run(
            [SCRIPT, 'out', *stages],
            cwd=tmp_path,
            env=environment(PYTHON=str(python), TINY='1'),
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == code, result.stdout + result.stderr
        failed = f'not complete: memory (failed: see {tmp_path}/out/memory/*.code and *.txt)'
        assert (result.stdout.splitlines()[-1] == failed) == bool(code)
    complete = {path.parent.name for path in (tmp_path / 'out').glob('*/complete')}
    assert complete == {'check', 'tune', 'benchmark', 'profile'}


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def test_gpu_tables_has_measured_and_published_results(tmp_path):
    write(tmp_path / 'check' / 'selfcheck.code', '1')
    write(tmp_path / 'check' / 'selfcheck.txt', 'wrong: nan')
    key = 'forward 576 32 torch.bfloat16'
    default, best = '64, 32, 4, 2', '64, 64, 4, 1'
    write(tmp_path / 'tune' / 'times.json', {'a GPU': {key: dict(default=default, ms={default: 2.0, best: 1.5})}})
    rows = [dict(backend='triton', tokens=576, dtype='float16', forward=0.5, forward_backward=4.25)]
    write(tmp_path / 'benchmark' / 'operator.json', dict(rows=rows))
    row = dict(case='b_w24_384', mode='step', implementation='timm compiled', batch=16, dtype='bfloat16', note='WRONG')
    write(tmp_path / 'benchmark' / 'b_w24_384-step.json', dict(rows=[row]))
    part = {'part': 'SwinV2-G', 'technique': 'triton', 'size': 1536, 'allocated': 2**35, 'seconds': 3.0}
    write(tmp_path / 'memory' / 'memory.json', [part])
    printed = call(tmp_path, TABLES, '.')
    assert 'selfcheck: exit code 1\n\n```\nwrong: nan\n```' in printed
    assert f'| a GPU | {key} | 2.000 | 1.500 | {best} |' in printed
    assert '| 576 | float16 | ours triton | 0.500 | 4.250 |' in printed
    assert '| 576 | float16 | flash-window-attention-v2 (published) | 1.007 | 9.34 |' in printed
    assert '| timm compiled  |     WRONG |' in printed
    assert 'SwinV2-G, window 32, measured at 1536x1536' in printed
    assert '32.000' in printed


def test_gpu_tables_prints_versions(tmp_path):
    assert 'torch 2.' in call(tmp_path, TABLES, '--versions')


def test_gpu_tables_names_a_missing_folder(tmp_path):
    assert 'there is no folder nowhere of results of gpu_run.sh' in refuse(tmp_path, TABLES, 'nowhere')


@pytest.mark.slow
def test_gpu_run_runs_all_stages_without_a_gpu_and_without_openmmlab(tmp_path):
    write(tmp_path / 'site' / 'sitecustomize.py', WITHOUT_OPENMMLAB)
    env = dict(TINY='1', PYTHONPATH=str(tmp_path / 'site'), XDG_CACHE_HOME=str(tmp_path / 'cache'))
    printed = run(tmp_path, SCRIPT, 'out', **env)
    out = tmp_path / 'out'
    complete = {path.parent.name for path in out.glob('*/complete')}
    assert complete == {'check', 'tune', 'benchmark', 'memory', 'profile'}, printed
    tables = (out / 'tables.md').read_text()
    assert f'torch {torch.__version__}, triton ' in tables
    assert 'selfcheck: exit code 0' in tables
    assert '| interpreter | ' in tables
    assert '| 64 | float32 | ours sdpa | ' in tables
    assert '| 64 | float16 | flash-window-attention-v2 (published) | ' in tables
    for title in ('nano, inference', 'nano, step', 'nano stage 1, inference', 'nano, window 32', 'nano, step: ms in'):
        assert title in tables
    assert '| timm sdpa eager   |' in tables
    assert run(tmp_path, SCRIPT, 'out', **env) == f'tables: {out}/tables.md\n'  # all stages are complete
