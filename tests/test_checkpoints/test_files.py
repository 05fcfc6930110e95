"""Reading files: weights are memory-mapped, training states are not."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from swinv2_mm.checkpoints.files import read_checkpoint

WEIGHTS = {'a': torch.arange(1e5), 'b': torch.ones(3, dtype=torch.float16)}


def is_mapped(path: Path) -> bool:
    return str(path) in Path('/proc/self/maps').read_text()


@pytest.mark.skipif(sys.platform != 'linux', reason='looks into /proc')
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_read_checkpoint_maps_weights(tmp_path, suffix):
    path = tmp_path / f'weights{suffix}'
    save_file(WEIGHTS, path) if suffix == '.safetensors' else torch.save(WEIGHTS, path)
    weights = read_checkpoint(path)
    assert is_mapped(path)
    assert all(torch.equal(weights[name], value) for name, value in WEIGHTS.items())
    del weights
    assert not is_mapped(path)


def test_read_checkpoint_does_not_map_a_training_state(tmp_path):
    """Optimizers keep the loaded tensors, and the next checkpoint may overwrite the file."""
    path = tmp_path / 'epoch_1.pth'
    torch.save({'state_dict': WEIGHTS, 'optimizer': {'state': {0: WEIGHTS}}}, path)
    checkpoint = read_checkpoint(path)
    path.write_bytes(bytes(path.stat().st_size))
    for weights in (checkpoint['state_dict'], checkpoint['optimizer']['state'][0]):
        assert all(torch.equal(weights[name], value) for name, value in WEIGHTS.items())


def test_read_checkpoint_from_before_torch_1_6(tmp_path):
    torch.save(WEIGHTS, tmp_path / 'a.pth', _use_new_zipfile_serialization=False)
    weights = read_checkpoint(tmp_path / 'a.pth')
    assert all(torch.equal(weights[name], value) for name, value in WEIGHTS.items())


def test_read_checkpoint_map_location(tmp_path):
    torch.save(WEIGHTS, tmp_path / 'a.pth')
    assert read_checkpoint(tmp_path / 'a.pth', map_location='meta')['a'].is_meta
