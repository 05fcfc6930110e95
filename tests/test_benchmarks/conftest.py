"""Shared by the tests of the benchmarks."""

import importlib
import sys

import pytest
import torch
from mmengine.logging import MMLogger
from oracles import find_peers
from tool_runs import BENCHMARKS


@pytest.fixture(scope='module')
def load():
    """A function that imports a module of the benchmarks by its name, as they import each other."""
    find_peers()
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def quiet():
    """No log line for each set of loaded weights; one thread, because models are so small."""
    logger = MMLogger.get_current_instance()
    level, threads = logger.level, torch.get_num_threads()
    logger.setLevel('WARNING')
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    logger.setLevel(level)
