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

sys.path[:0] = str(Path(__file__).parent / 'helpers'), str(Path(__file__).parents[1] / 'benchmarks')
if 'PYTEST_XDIST_WORKER' in os.environ:  # each core has a worker; what tests start inherits the variable
    os.environ['OMP_NUM_THREADS'] = '1'
if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'  # read when kernels are imported: they run on a CPU, slowly
if 'TORCH_EXTENSIONS_DIR' not in os.environ:
    # A new folder for each run: a process that is killed while DeepSpeed compiles leaves a lock there, and all others
    # would wait for it forever.
    EXTENSIONS = tempfile.TemporaryDirectory(prefix='torch_extensions')
    os.environ['TORCH_EXTENSIONS_DIR'] = EXTENSIONS.name
# where the backend `auto` caches its check of the GPU
CACHE = tempfile.TemporaryDirectory(prefix='cache')
os.environ['XDG_CACHE_HOME'] = CACHE.name
torch.set_num_threads(min(torch.get_num_threads(), int(os.environ.get('OMP_NUM_THREADS', 2))))

from tool_runs import REPOSITORY, make_shapes, restored_process  # noqa: E402  found by the path above

# ---------------------------------------------------------------- what mmengine repeats

# A Runner formats its config with yapf five times, which takes longer than a step of a nano model.
mmengine.config.config.FormatCode = lambda text, **_: (text, True)

file2dict = Config._file2dict


@functools.cache
def read_once(filename: str, *args, **kwargs):
    """Read a config file that no test changes, once."""
    return file2dict(filename, *args, **kwargs)


def read_config(filename: str, *args, **kwargs):
    """Read a config file; one of this repository, or a base of it in a toolbox, is read once."""
    path = os.path.abspath(filename)
    stays = path.startswith((f'{REPOSITORY}/configs/', f'{REPOSITORY}/tests/', sys.prefix))
    return copy.deepcopy(read_once(path, *args, **kwargs)) if stays else file2dict(filename, *args, **kwargs)


Config._file2dict = staticmethod(read_config)


# ---------------------------------------------------------------- garbage collection

frozen_modules = 0


@pytest.fixture(autouse=True)
def _freeze_modules():
    """Exempt imported modules from garbage collection: each dataset of mmdet starts one, which would take 0.2 s."""
    global frozen_modules
    if len(sys.modules) > frozen_modules + 200:
        frozen_modules = len(sys.modules)
        gc.collect()
        gc.freeze()


# ---------------------------------------------------------------- state of the process


@pytest.fixture(autouse=True)
def _leave_restored_process():
    """Restore the state of the process that a Runner or a tool's `main` changes."""
    with restored_process():
        yield


# ---------------------------------------------------------------- data, made once


@pytest.fixture(scope='session')
def shapes(tmp_path_factory) -> Path:
    """Eight images of shapes for training and five for validation, in COCO's layout: data of nano/configs/det.py."""
    folder = tmp_path_factory.mktemp('shapes')
    make_shapes(folder, train=8, val=5, size=64)
    return folder


# ---------------------------------------------------------------- order

# Each file runs on one core. The longest start first, so that no core waits for them at the end.
LONGEST = (
    'test_coco_mini.py',
    'test_sharded_training.py',
    'test_deepspeed.py',
    'test_benchmark_memory.py',
    'test_plan_memory.py',
    'test_train_and_test.py',
    'test_triton.py',
    'test_compile.py',
    'test_harness.py',
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))
