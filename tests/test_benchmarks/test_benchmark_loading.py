"""Measurements against jobs of known size, files against the libraries they imitate, then the whole command."""

import mmap
import multiprocessing
import subprocess
import sys
import time

import benchmark_loading
import pytest
import torch
from oracles import find_peers, timm_name
from processes import CONTEXT, start_server
from tool_runs import refuse, run

MIB = 2**20
HELD = 0.5  # seconds for which a job keeps its memory: the sampling may have to wait for a core

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='the benchmark reads /proc')


@pytest.fixture
def forked(monkeypatch):
    """Fork processes from one that has imported torch; `run` starts them as the benchmark does."""
    start_server()
    monkeypatch.setattr(multiprocessing, 'get_context', lambda kind: CONTEXT)


class Idle:
    """A job that does nothing."""

    def prepare(self):
        pass

    def run(self):
        pass

    def check(self):
        pass


class Allocate(Idle):
    """Allocate 64 MiB in `run`, after a preparation with a peak of 200 MiB that keeps 100.

    `run` takes three seconds of a fake clock, the rest takes longer.
    """

    def prepare(self):
        self.now = 100.0
        time.perf_counter = lambda: self.now  # in the process of the job, which ends with it
        peak = b'x' * (200 * MIB)
        del peak
        self.kept = b'x' * (100 * MIB)

    def run(self):
        held = b'x' * (64 * MIB)
        time.sleep(HELD)
        del held
        self.now += 3

    def check(self):
        self.now += 100
        self.kept = b'x' * (150 * MIB)


class MapFile(Idle):
    """Read 32 MiB of a mapped file and allocate 16 MiB."""

    def __init__(self, path):
        self.path = path

    def run(self):
        with open(self.path, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
            assert sum(pages[:: mmap.PAGESIZE]) > 0
            own = b'x' * (16 * MIB)
            time.sleep(HELD)
            del own


class Fail(Idle):
    def run(self):
        raise KeyError('head.weight')


class Incomplete(Idle):
    def check(self):
        raise RuntimeError('it loaded 0 of 3 tensors')


class Die(Idle):
    def run(self):
        import os

        os._exit(9)


def assert_near(measured, expected):
    assert abs(measured / MIB - expected) < 6


@pytest.mark.usefixtures('forked')
def test_measure_counts_only_the_memory_and_time_of_run():
    usage = benchmark_loading.measure(Allocate())
    assert_near(usage.anonymous, 64)
    assert_near(usage.mapped, 0)
    assert_near(usage.total, 64)
    assert usage.seconds == 3


@pytest.mark.usefixtures('forked')
def test_measure_separates_mapped_pages_from_anonymous_memory(tmp_path):
    path = tmp_path / 'file'
    path.write_bytes(b'x' * (32 * MIB))
    usage = benchmark_loading.measure(MapFile(path))
    assert_near(usage.mapped, 32)
    assert_near(usage.anonymous, 16)
    assert_near(usage.total, 48)


def test_memory_of_a_process_that_has_ended_is_zero():
    ended = subprocess.Popen(['true'])
    ended.wait()
    assert benchmark_loading.Memory.of(ended.pid) == benchmark_loading.Memory(0, 0, 0)


@pytest.mark.usefixtures('forked')
@pytest.mark.parametrize(
    ('job', 'message'),
    [(Fail(), "KeyError: 'head.weight'"), (Incomplete(), 'loaded 0 of 3 tensors'), (Die(), 'died with exit code 9')],
)
def test_measure_reports_the_error_of_a_job(job, message):
    with pytest.raises(RuntimeError, match=message):
        benchmark_loading.measure(job)


def written(tmp_path, layout, file_format):
    path = tmp_path / f'weights{benchmark_loading.FORMATS[file_format]}'
    benchmark_loading.write_file(path, 'tiny', layout, file_format)
    return benchmark_loading.read_stock(path), path


def shapes(tensors):
    return {name: tuple(value.shape) for name, value in tensors}


def test_write_file_official_has_the_names_that_timm_reads(tmp_path):
    find_peers()
    from timm.models.swin_transformer_v2 import swinv2_tiny_window8_256

    weights, path = written(tmp_path, 'official', 'pth')
    assert list(torch.load(path)) == ['model']
    twin = swinv2_tiny_window8_256(num_classes=0)
    assert shapes((timm_name(k), v) for k, v in weights.items()) == shapes(twin.named_parameters())


def test_write_file_hf_has_the_names_of_transformers(tmp_path):
    find_peers()
    from transformers import Swinv2Config, Swinv2ForImageClassification

    weights, _ = written(tmp_path, 'hf', 'safetensors')
    config = Swinv2Config(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=8, image_size=256)
    with torch.device('meta'):
        twin = Swinv2ForImageClassification(config)
    expected = shapes((k, v) for k, v in twin.named_parameters() if not k.startswith('classifier.'))
    assert shapes(weights.items()) == expected


def test_write_file_legacy_is_not_a_zip(tmp_path):
    _, path = written(tmp_path, 'official', 'legacy')
    assert path.read_bytes()[:2] == b'\x80\x02'  # a pickle of protocol 2


def test_usage_cells_are_relative_to_the_file_size():
    usage = benchmark_loading.Usage(
        seconds=1.5,
        anonymous=3 * benchmark_loading.GIB // 10,
        mapped=benchmark_loading.GIB,
        total=13 * benchmark_loading.GIB // 10,
    )
    assert benchmark_loading.usage_cells(usage, benchmark_loading.GIB) == [
        '1.50',
        '0.30 (0.30)',
        '1.00 (1.00)',
        '1.30 (1.30)',
        'yes',
        'NO',
    ]


def test_main_names_a_missing_folder(tmp_path):
    assert refuse(tmp_path, benchmark_loading.__file__, '--dir', 'no_such') == 'error: --dir no_such is no folder'


def check_table(printed, forms):
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in printed.splitlines() if '|' in line]
    rows = [row for row in rows if row[0] in forms]
    assert [row[:2] for row in rows] == [[form, loader] for form in forms for loader in ('ours', 'stock')]
    for row in rows:
        assert row[2] == '0.10'  # 27.6 million numbers of four bytes, in GiB
        assert float(row[3]) > 0
        assert set(row[7:]) <= {'yes', 'NO'}


@pytest.mark.usefixtures('forked')
def test_main_prints_a_row_for_each_file_and_loader(tmp_path, capfd):
    """Each layout and each format."""
    forms = {('official',): ('pth', 'legacy'), ('hf',): ('safetensors',)}
    for layouts, formats in forms.items():
        with pytest.raises(SystemExit) as end:
            benchmark_loading.main(
                ['--arch', 'tiny', '--dir', str(tmp_path), '--layouts', *layouts, '--formats', *formats]
            )
        assert not end.value.code
    check_table(capfd.readouterr().out, ['official pth', 'official legacy', 'hf safetensors'])
    assert not list(tmp_path.iterdir())


def test_main_reports_a_loader_that_fails_and_exits_with_1(tmp_path, monkeypatch, capsys):
    def fail(job):
        raise RuntimeError('it loaded 0 of 3 tensors')

    monkeypatch.setattr(benchmark_loading, 'measure', fail)
    monkeypatch.setattr(benchmark_loading, 'write_file', lambda path, *_: path.write_bytes(b'x'))
    with pytest.raises(SystemExit) as end:
        benchmark_loading.main(['--arch', 'tiny', '--dir', str(tmp_path), '--layouts', 'hf', '--formats', 'pth'])
    assert end.value.code == 1
    printed = capsys.readouterr()
    assert printed.out.count('| failed  |') == 2
    errors = [f'hf pth, {loader}: it loaded 0 of 3 tensors' for loader in ('ours', 'stock')]
    assert printed.err.splitlines()[-2:] == errors
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_command_measures_in_new_processes(tmp_path):
    options = ['--arch', 'tiny', '--layouts', 'hf', '--formats', 'pth']
    printed = run(tmp_path, benchmark_loading.__file__, *options, '--dir', tmp_path)
    check_table(printed, ['hf pth'])
    assert not list(tmp_path.iterdir())
