"""Shared by all tests."""

import os
import sys
import tempfile
from pathlib import Path

import mmengine.config.config
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # helpers beside the tests
if 'PYTEST_XDIST_WORKER' in os.environ:  # each core has a worker; what tests start inherits the variable
    os.environ['OMP_NUM_THREADS'] = '1'
if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'  # read when kernels are imported: they run on a CPU, slowly
if 'TORCH_EXTENSIONS_DIR' not in os.environ:
    # Anew for each run, what DeepSpeed compiles for a CPU: a process that is killed meanwhile leaves a lock there, for
    # which all others wait forever.
    EXTENSIONS = tempfile.TemporaryDirectory(prefix='torch_extensions')
    os.environ['TORCH_EXTENSIONS_DIR'] = EXTENSIONS.name
torch.set_num_threads(min(torch.get_num_threads(), int(os.environ.get('OMP_NUM_THREADS', 2))))


@pytest.fixture(autouse=True)
def _configs_are_not_laid_out(monkeypatch):
    """A Runner lays out its config with yapf five times, which takes longer than a step of a nano model."""
    monkeypatch.setattr(mmengine.config.config, 'FormatCode', lambda text, **_: (text, True))


# Each file goes to one core; with these first, none is left to run alone at the end.
LONGEST = (
    'test_sharded_training.py',
    'test_train_and_test.py',
    'test_coco_mini.py',
    'test_fused.py',
    'test_deepspeed.py',
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the longest files begin."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))
