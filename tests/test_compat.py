"""Each workaround with the real packages, and the bug itself in a process without the workaround.

When a test that reproduces a bug fails, the workaround is no longer needed.
"""

import argparse
import importlib.util
import io
import os
import pickle
import sys
import sysconfig
import types
import zipfile
from pathlib import Path
from unittest import mock

import mmengine
import numpy as np
import pytest
import torch
from bare_python import run_python
from mmengine.hooks import logger_hook
from mmengine.logging import HistoryBuffer

import swinv2_mm
from swinv2_mm import compat


def runner_state():
    """What mmengine's Runner stores besides tensors."""
    log = HistoryBuffer([1.0, 3.0], [1, 1])
    values = [
        np.float64(0.5),
        np.float32(2),
        np.int64(3),
        np.bool_(True),
        np.arange(3),
        np.array(['a']),
        np.zeros(2, 'f4'),
    ]
    return dict(message_hub=dict(log_scalars=dict(loss=log)), meta=dict(dataset_meta=values))


def test_apply_is_idempotent():
    def state():
        return mmengine.utils.is_installed, np.in1d, sys.modules.get('mmaction.models.localizers.drn')

    before = state()
    compat.apply()
    assert state() == before


# ---------------------------------------------------------------- checkpoints


def test_allow_data_classes_loads_runner_state_with_weights_only(tmp_path):
    torch.save(runner_state(), tmp_path / 'a.pth')
    state = torch.load(tmp_path / 'a.pth', weights_only=True)
    assert state['message_hub']['log_scalars']['loss'].mean() == 2
    for left, right in zip(state['meta']['dataset_meta'], runner_state()['meta']['dataset_meta'], strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize('core', [b'numpy.core.', b'numpy._core.'])
def test_allow_data_classes_of_numpy_1_and_2(tmp_path, core):
    """NumPy 2 moved the functions that its pickles refer to."""
    torch.save(runner_state(), tmp_path / 'a.pth')
    with zipfile.ZipFile(tmp_path / 'a.pth') as old, zipfile.ZipFile(tmp_path / 'b.pth', 'w') as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, data.replace(b'numpy._core.', b'numpy.core.').replace(b'numpy.core.', core))
    assert torch.load(tmp_path / 'b.pth', weights_only=True)['meta']['dataset_meta'][2] == 3


class GetsAttribute:
    """Pickles as the look-up of an attribute through which code could be executed."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, '__init__')


def test_allow_data_classes_refuses_other_attributes(tmp_path):
    torch.save(GetsAttribute(), tmp_path / 'a.pth')
    with pytest.raises(Exception, match='refused to load a checkpoint'):
        torch.load(tmp_path / 'a.pth', weights_only=True)


def test_allow_data_classes_of_the_official_code_without_their_packages(tmp_path):
    """Yacs is not installed: a fake class is saved, and removed before loading."""
    module = types.ModuleType('yacs.config')
    module.CfgNode = type('CfgNode', (dict,), dict(__module__='yacs.config'))
    node = module.CfgNode(A=1)
    node.__dict__['__deprecated_keys__'] = set()
    sys.modules.update({'yacs': types.ModuleType('yacs'), 'yacs.config': module})
    torch.save(dict(config=node, args=argparse.Namespace(lr=0.1)), tmp_path / 'a.pth')
    del sys.modules['yacs.config'], sys.modules['yacs']
    state = torch.load(tmp_path / 'a.pth', weights_only=True)
    assert dict(state['config']) == dict(A=1)
    assert state['args'].lr == 0.1


class RunsCommand:
    """Pickles as the execution of a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


@pytest.mark.parametrize('mmap', [False, True])
def test_load_data_before_torch_2_6_loads_only_data(tmp_path, monkeypatch, mmap):
    monkeypatch.setattr(compat, 'torch_release', lambda: (2, 1))
    torch.save(dict(runner_state(), weight=torch.ones(3)), tmp_path / 'a.pth')
    state = compat.load_data(tmp_path / 'a.pth', 'cpu', mmap=mmap)
    assert state['message_hub']['log_scalars']['loss'].mean() == 2
    assert state['weight'].sum() == 3
    for content in (RunsCommand(tmp_path / 'effect'), GetsAttribute()):
        torch.save(content, tmp_path / 'b.pth')
        with pytest.raises(pickle.UnpicklingError, match=f'{os.system.__module__}.system|refused'):
            compat.load_data(tmp_path / 'b.pth', 'cpu', mmap=mmap)
    assert not (tmp_path / 'effect').exists()


@pytest.mark.parametrize('protocol', range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_restricted_pickle_refuses_commands_in_every_protocol(tmp_path, protocol):
    with pytest.raises(pickle.UnpicklingError, match='system'):
        compat.restricted_pickle().load(io.BytesIO(pickle.dumps(RunsCommand(tmp_path / 'effect'), protocol)))
    assert not (tmp_path / 'effect').exists()


def test_bug_of_checkpoints_is_present(tmp_path):
    torch.save(runner_state(), tmp_path / 'a.pth')
    result = run_python(f'import mmengine.runner.checkpoint as c; c._load_checkpoint({str(tmp_path / "a.pth")!r})')
    assert 'weights_only' in result.stderr or torch.__version__ < '2.6'


# ---------------------------------------------------------------- package lookup


def test_get_installed_path_of_packages():
    assert compat.get_installed_path('swinv2_mm') == str(Path(swinv2_mm.__file__).parent)
    assert compat.get_installed_path('mmengine') == str(Path(mmengine.__file__).parent)
    assert compat.is_installed('mmengine')
    assert not compat.is_installed('no_such_package')
    with pytest.raises(ModuleNotFoundError):
        compat.get_installed_path('no_such_package')


@pytest.mark.parametrize(('distribution', 'module'), [('mmsegmentation', 'mmseg'), ('mmaction2', 'mmaction')])
def test_get_installed_path_of_distributions_with_another_name(distribution, module):
    spec = importlib.util.find_spec(module)
    if spec is None:
        pytest.skip(f'{distribution} is not installed')
    assert compat.get_installed_path(distribution) == str(Path(spec.origin).parent)


def test_bug_of_package_lookup_is_present_and_fixed():
    code = 'import os; from mmengine.utils import get_installed_path as f; print(os.path.isdir(f("swinv2_mm")))'
    stock, patched = run_python(code), run_python(f'import swinv2_mm; {code}')
    if importlib.util.find_spec('pkg_resources') is None:
        assert 'pkg_resources' in stock.stderr
    elif not swinv2_mm.__file__.startswith(sysconfig.get_path('purelib')):  # an editable install
        assert stock.stdout.strip() == 'False'
    assert patched.stdout.strip() == 'True'


# ---------------------------------------------------------------- NumPy names, mmaction2


def test_restore_numpy_names():
    assert np.float is float
    assert np.Inf == np.inf
    assert np.isnan(np.NAN)
    assert np.trapz([1.0, 2.0, 3.0]) == 4
    assert np.in1d([[1, 2], [3, 4]], [2, 3]).tolist() == [False, True, True, False]


@pytest.mark.parametrize('name', ['float', 'Inf', 'NAN', 'trapz', 'in1d'])
def test_toolboxes_still_use_the_numpy_name(name):
    """When this fails, remove the name from `restore_numpy_names`."""
    specs = [importlib.util.find_spec(package) for package in ('mmdet', 'mmaction')]
    if None in specs:
        pytest.skip('needs mmdet and mmaction2')
    sources = [path.read_text() for spec in specs for path in Path(spec.origin).parent.rglob('*.py')]
    assert any(f'np.{name})' in text or f'np.{name}(' in text or f'np.{name}\n' in text for text in sources)


needs_mmaction = pytest.mark.skipif(importlib.util.find_spec('mmaction') is None, reason='needs mmaction2')


@needs_mmaction
def test_stub_drn_localizer_makes_mmaction_importable():
    from mmaction.models.localizers import DRN

    if DRN.__module__.startswith('mmaction'):
        pytest.skip('this mmaction2 has DRN')
    with pytest.raises(ImportError, match='#2714'):
        DRN()


@needs_mmaction
def test_bug_of_mmaction_is_present():
    """Either of the two missing modules makes the import of mmaction's models fail."""
    result = run_python('import mmaction.models')
    assert 'drn' in result.stderr or 'importlib_metadata' in result.stderr


# ---------------------------------------------------------------- metrics


@pytest.mark.parametrize(('patched', 'writing'), [(True, [0]), (False, [0, 1])], ids=['patched', 'stock'])
def test_write_metrics_once(patched, writing, tmp_path, monkeypatch):
    """Without the workaround, all processes write to the same file."""
    if not patched:
        monkeypatch.setattr(logger_hook, 'dump', logger_hook.dump.__wrapped__)
    for rank in (0, 1):
        runner = mock.MagicMock(log_dir=str(tmp_path))
        runner.log_processor.get_log_after_epoch.return_value = dict(mIoU=0.5), ''
        hook = logger_hook.LoggerHook()
        hook.json_log_path = f'{rank}.json'
        monkeypatch.setattr('mmengine.dist.utils.get_rank', lambda group=None, rank=rank: rank)
        hook.after_test_epoch(runner)
    assert sorted(path.name for path in tmp_path.glob('*.json')) == [f'{rank}.json' for rank in writing]


# ---------------------------------------------------------------- mmpretrain

IMPORT_TRANSFORMS = 'import mmpretrain.datasets.transforms'
# a transformers release without the functions that mmpretrain's BERT models use, found before a real one
NEW_TRANSFORMERS = {'__init__.py': '', 'modeling_utils.py': 'class PreTrainedModel: pass\n'}


def test_declare_torchvision_operators_makes_mmpretrain_importable():
    broken = run_python('import torchvision')
    if broken.returncode == 0:
        pytest.skip('this torchvision fits this torch')
    assert 'operator torchvision::nms does not exist' in broken.stderr
    mended = run_python(f'import swinv2_mm\n{IMPORT_TRANSFORMS}')
    assert mended.returncode == 0, mended.stderr


def test_stub_mmpretrain_multimodal_makes_mmpretrain_importable(tmp_path):
    package = tmp_path / 'transformers'
    package.mkdir()
    for name, code in NEW_TRANSFORMERS.items():
        (package / name).write_text(code)
    metadata = tmp_path / 'transformers-5.23.0.dist-info'
    metadata.mkdir()
    (metadata / 'METADATA').write_text('Metadata-Version: 2.1\nName: transformers\nVersion: 5.23.0\n')
    unpatched = 'import sys, swinv2_mm\ndel sys.modules["mmpretrain.utils.dependency"]\nimport mmpretrain.models'
    assert run_python(unpatched, path=(tmp_path,)).returncode != 0
    mended = run_python('import swinv2_mm\nimport mmpretrain.models', path=(tmp_path,))
    assert mended.returncode == 0, mended.stderr


def test_import_next_to_a_folder_that_is_no_package(tmp_path):
    """Python takes a folder without `__init__.py` for a package if there is no other of its name."""
    (tmp_path / 'transformers').mkdir()
    result = run_python('import swinv2_mm', path=(tmp_path,))
    assert result.returncode == 0, result.stderr
