"""The measuring against jobs of known size, the files against the libraries they imitate, then the tool as a whole."""

import importlib
import mmap
import multiprocessing
import subprocess
import sys
import time

import pytest
import torch
from oracles import find_peers, timm_name
from processes import CONTEXT, start_server
from tool_runs import BENCHMARKS, refuse, run

NAME = BENCHMARKS / 'benchmark_loading.py'
MIB = 2**20
HELD = 0.5  # seconds for which a job holds what is to be seen: the sampling may have to wait for a core

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='the tool reads /proc')


@pytest.fixture(scope='module')
def tool():
    """The tool under a name that fresh processes can import too: they are given this process's sys.path."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module('benchmark_loading')
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def forked(monkeypatch):
    """Processes are forked from one that has imported torch; `run` starts them as the tool does."""
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
    """Hold 64 MiB while it runs, after a preparation that took 200 MiB for a moment and keeps 100.

    By a clock of its own it runs for three seconds; what is before and after that takes longer.
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
    """Read 32 MiB of a file through a mapping, beside 16 MiB of its own."""

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
def test_only_the_memory_that_the_job_takes_while_it_runs_counts(tool):
    usage = tool.measure(Allocate())
    assert_near(usage.anonymous, 64)
    assert_near(usage.mapped, 0)
    assert_near(usage.total, 64)
    assert usage.seconds == 3


@pytest.mark.usefixtures('forked')
def test_mapped_pages_of_a_file_are_told_from_anonymous_memory(tool, tmp_path):
    path = tmp_path / 'file'
    path.write_bytes(b'x' * (32 * MIB))
    usage = tool.measure(MapFile(path))
    assert_near(usage.mapped, 32)
    assert_near(usage.anonymous, 16)
    assert_near(usage.total, 48)


def test_memory_of_a_process_that_has_ended_is_none(tool):
    ended = subprocess.Popen(['true'])
    ended.wait()
    assert tool.Memory.of(ended.pid) == tool.Memory(0, 0, 0)


@pytest.mark.usefixtures('forked')
@pytest.mark.parametrize(
    ('job', 'message'),
    [(Fail(), "KeyError: 'head.weight'"), (Incomplete(), 'loaded 0 of 3 tensors'), (Die(), 'died with exit code 9')],
)
def test_a_job_that_fails_says_why(tool, job, message):
    with pytest.raises(RuntimeError, match=message):
        tool.measure(job)


def written(tool, tmp_path, layout, file_format):
    path = tmp_path / f'weights{tool.FORMATS[file_format]}'
    tool.write_file(path, 'tiny', layout, file_format)
    return tool.read_by_stock(path), path


def shapes(tensors):
    return {name: tuple(value.shape) for name, value in tensors}


def test_an_official_file_has_the_names_that_timm_reads(tool, tmp_path):
    find_peers()
    from timm.models.swin_transformer_v2 import swinv2_tiny_window8_256

    weights, path = written(tool, tmp_path, 'official', 'pth')
    assert list(torch.load(path)) == ['model']
    twin = swinv2_tiny_window8_256(num_classes=0)
    assert shapes((timm_name(k), v) for k, v in weights.items()) == shapes(twin.named_parameters())


def test_an_hf_file_has_the_names_of_transformers(tool, tmp_path):
    find_peers()
    from transformers import Swinv2Config, Swinv2ForImageClassification

    weights, _ = written(tool, tmp_path, 'hf', 'safetensors')
    config = Swinv2Config(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=8, image_size=256)
    with torch.device('meta'):
        twin = Swinv2ForImageClassification(config)
    expected = shapes((k, v) for k, v in twin.named_parameters() if not k.startswith('classifier.'))
    assert shapes(weights.items()) == expected


def test_a_legacy_file_is_no_zip(tool, tmp_path):
    _, path = written(tool, tmp_path, 'official', 'legacy')
    assert path.read_bytes()[:2] == b'\x80\x02'  # a pickle of protocol 2


def test_the_verdict_is_about_the_size_of_the_file(tool):
    usage = tool.Usage(seconds=1.5, anonymous=3 * tool.GIB // 10, mapped=tool.GIB, total=13 * tool.GIB // 10)
    assert tool.usage_cells(usage, tool.GIB) == ['1.50', '0.30 (0.30)', '1.00 (1.00)', '1.30 (1.30)', 'yes', 'NO']


def test_a_missing_folder_gives_one_line(tmp_path):
    assert refuse(tmp_path, NAME, '--dir', 'no_such') == 'error: --dir no_such is no folder'


def check_table(printed, forms):
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in printed.splitlines() if '|' in line]
    rows = [row for row in rows if row[0] in forms]
    assert [row[:2] for row in rows] == [[form, loader] for form in forms for loader in ('ours', 'stock')]
    for row in rows:
        assert row[2] == '0.10'  # 27.6 million numbers of four bytes, in GiB
        assert float(row[3]) > 0
        assert set(row[7:]) <= {'yes', 'NO'}


@pytest.mark.usefixtures('forked')
def test_every_file_form_is_loaded_by_both_loaders_and_gets_its_row(tool, tmp_path, capfd):
    """Each layout and each format."""
    forms = {('official',): ('pth', 'legacy'), ('hf',): ('safetensors',)}
    for layouts, formats in forms.items():
        with pytest.raises(SystemExit) as end:
            tool.main(['--arch', 'tiny', '--dir', str(tmp_path), '--layouts', *layouts, '--formats', *formats])
        assert not end.value.code
    check_table(capfd.readouterr().out, ['official pth', 'official legacy', 'hf safetensors'])
    assert not list(tmp_path.iterdir())


def test_a_loader_that_fails_is_a_row_and_the_exit_code(tool, tmp_path, monkeypatch, capsys):
    def fail(job):
        raise RuntimeError('it loaded 0 of 3 tensors')

    monkeypatch.setattr(tool, 'measure', fail)
    monkeypatch.setattr(tool, 'write_file', lambda path, *_: path.write_bytes(b'x'))
    with pytest.raises(SystemExit) as end:
        tool.main(['--arch', 'tiny', '--dir', str(tmp_path), '--layouts', 'hf', '--formats', 'pth'])
    assert end.value.code == 1
    printed = capsys.readouterr()
    assert printed.out.count('| failed  |') == 2
    assert printed.err.splitlines()[-2:] == [f'hf pth, {road}: it loaded 0 of 3 tensors' for road in ('ours', 'stock')]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_tool_measures_in_processes_of_its_own(tmp_path):
    options = ['--arch', 'tiny', '--layouts', 'hf', '--formats', 'pth']
    printed = run(tmp_path, NAME, *options, '--dir', tmp_path)
    check_table(printed, ['hf pth'])
    assert not list(tmp_path.iterdir())
