"""Shared by all tests."""

import copy
import functools
import gc
import os
import sys
import tempfile
from pathlib import Path

import mmengine.config.config
import pytest
import torch
from mmengine.config import Config

sys.path.insert(0, str(Path(__file__).parent / 'helpers'))
if 'PYTEST_XDIST_WORKER' in os.environ:  # each core has a worker; what tests start inherits the variable
    os.environ['OMP_NUM_THREADS'] = '1'
if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'  # read when kernels are imported: they run on a CPU, slowly
if 'TORCH_EXTENSIONS_DIR' not in os.environ:
    # Anew for each run, what DeepSpeed compiles for a CPU: a process that is killed meanwhile leaves a lock there, for
    # which all others wait forever.
    EXTENSIONS = tempfile.TemporaryDirectory(prefix='torch_extensions')
    os.environ['TORCH_EXTENSIONS_DIR'] = EXTENSIONS.name
# where `auto` keeps what it has found out about a GPU
CACHE = tempfile.TemporaryDirectory(prefix='cache')
os.environ['XDG_CACHE_HOME'] = CACHE.name
torch.set_num_threads(min(torch.get_num_threads(), int(os.environ.get('OMP_NUM_THREADS', 2))))

from tool_runs import REPOSITORY, make_shapes, no_trace  # noqa: E402  a helper beside the tests

# ---------------------------------------------------------------- what mmengine does again and again

# A Runner lays out its config with yapf five times, which takes longer than a step of a nano model.
mmengine.config.config.FormatCode = lambda text, **_: (text, True)

file2dict = Config._file2dict


@functools.cache
def read_once(filename: str, *args, **kwargs):
    """What mmengine makes of a config file that no test changes."""
    return file2dict(filename, *args, **kwargs)


def read_config(filename: str, *args, **kwargs):
    """As mmengine does, but a config of this repository, or a base of it in a toolbox, is read once."""
    path = os.path.abspath(filename)
    stays = path.startswith((f'{REPOSITORY}/configs/', f'{REPOSITORY}/tests/', sys.prefix))
    return copy.deepcopy(read_once(path, *args, **kwargs)) if stays else file2dict(filename, *args, **kwargs)


Config._file2dict = staticmethod(read_config)


# ---------------------------------------------------------------- what is imported stays

frozen_modules = 0


@pytest.fixture(autouse=True)
def _freeze_modules():
    """Keep imported modules out of later searches for garbage, as each dataset of mmdet starts one: they take 0.2 s."""
    global frozen_modules
    if len(sys.modules) > frozen_modules + 200:
        frozen_modules = len(sys.modules)
        gc.collect()
        gc.freeze()


# ---------------------------------------------------------------- no test sees what another has left


@pytest.fixture(autouse=True)
def _leave_no_trace():
    """Take back what a Runner or a tool's `main` leaves in the process."""
    with no_trace():
        yield


# ---------------------------------------------------------------- data, made once


@pytest.fixture(scope='session')
def shapes(tmp_path_factory) -> Path:
    """Eight images of shapes for training and five for validation, in COCO's layout; for helpers/tiny/det.py."""
    folder = tmp_path_factory.mktemp('shapes')
    make_shapes(folder, train=8, val=5, size=64)
    return folder


# ---------------------------------------------------------------- order

# Each file goes to one core; with these first, none is left to run alone at the end.
LONGEST = (
    'test_coco_mini.py',
    'test_sharded_training.py',
    'test_deepspeed.py',
    'test_plan_memory.py',
    'test_train_and_test.py',
    'test_triton.py',
    'test_compile.py',
    'test_benchmarks.py',
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the longest files begin."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))
