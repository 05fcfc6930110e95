"""Shared by all tests."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # `import oracles`
torch.set_num_threads(min(torch.get_num_threads(), 2))
