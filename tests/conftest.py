"""Shared by all tests."""

import sys
from pathlib import Path

import torch

for folder in ('.', 'test_ops'):  # helpers beside the tests
    sys.path.insert(0, str(Path(__file__).parent / folder))
torch.set_num_threads(min(torch.get_num_threads(), 2))
