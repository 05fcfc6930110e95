"""No loading path executes code in a checkpoint. A payload writes a file if it is executed."""

import argparse
import contextlib
import fractions
import functools
import importlib
import importlib.util
import io
import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from loading_paths import (
    LOADING_PATHS,
    PRETRAINED,
    by_load_checkpoint,
    by_resume,
    detector_config,
    folder_with_shapes,
    official_weights,
    source_backbone,
    start_training,
    train_once,
)
from mmengine.config import Config
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.runner import CheckpointLoader
from tool_runs import call, refuse

from swinv2_mm import config_path
from swinv2_mm.checkpoints import CheckpointError, UnsafeCheckpointError, load_swinv2_state_dict

CONVERTER = 'model_converters/swinv2_to_mm.py'


@pytest.fixture(scope='module')
def folder(tmp_path_factory, shapes):
    return folder_with_shapes(tmp_path_factory.mktemp('safety'), shapes)


@pytest.fixture(scope='module')
def state(folder):
    """A checkpoint of a Runner after one iteration."""
    return torch.load(train_once(folder), weights_only=True)


@pytest.fixture(scope='module')
def weights():
    return official_weights(source_backbone())


@pytest.fixture
def marker(tmp_path):
    return tmp_path / 'it_was_executed'


def load(path):
    """The first call of every loading path of mmengine."""
    return CheckpointLoader.load_checkpoint(str(path), map_location='cpu')


# ---------------------------------------------------------------- pickles


class Call:
    """Pickles as a call of a function with these arguments; both may be a `Call`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call

    def __call__(self):
        """Pickle wants something callable where a function stands."""


def touch(marker):
    return f'open({str(marker)!r}, "w")'


def lookup(*names):
    """A builtin, found through attributes and `dict.get` only, from a class that mmengine's logs need."""
    value = HistoryBuffer
    for name in ('__init__', '__globals__'):
        value = Call(getattr, value, name)
    for name in ('__builtins__', *names):
        value = Call(Call(getattr, value, 'get'), name)
    return value


def pickled(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


# the payload, and a name that the error must contain
PAYLOADS = {
    'os.system': (lambda marker: Call(os.system, f'touch {marker}'), r'posix\.system'),
    'exec': (lambda marker: Call(exec, touch(marker)), r'\bexec\b'),
    'import and getattr': (
        lambda marker: Call(Call(getattr, Call(importlib.import_module, 'os'), 'system'), f'touch {marker}'),
        r'import_module|getattr',
    ),
    'getattr only': (lambda marker: Call(lookup('exec'), touch(marker)), r'getattr|__init__'),
    'a pickle within': (
        lambda marker: Call(torch.storage._load_from_bytes, pickled(Call(os.system, f'touch {marker}'))),
        r'_load_from_bytes',
    ),
}
CONTAINERS = {
    'torch': torch.save,
    'old torch': lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    'pickle 2': lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2)),
    'pickle 4': lambda value, path: path.write_bytes(pickle.dumps(value, protocol=4)),
    'pickle 5': lambda value, path: path.write_bytes(pickle.dumps(value, protocol=5)),
}


def hide(payload, weights, container='torch'):
    """Add a payload to real weights. A plain pickle gets arrays, because it pickles tensors as code."""
    if container.startswith('pickle'):
        weights = {name: value.numpy() for name, value in weights.items()}
    return {'model': weights, 'optimizer': {'state': payload}}


# every payload as torch writes it, and in pickles that name classes in one way or another; every container
HIDDEN = [(payload, container) for payload in PAYLOADS for container in ('torch', 'pickle 2', 'pickle 4')]
HIDDEN += [('os.system', 'old torch'), ('getattr only', 'old torch'), ('os.system', 'pickle 5')]


@pytest.mark.parametrize(('payload', 'container'), HIDDEN)
def test_payload_is_refused_in_every_kind_of_file(payload, container, weights, marker, tmp_path):
    make, named = PAYLOADS[payload]
    path = tmp_path / 'a.pth'
    some = {name: value for name, value in weights.items() if name.startswith('patch_embed')}
    CONTAINERS[container](hide(make(marker), some, container), path)
    with pytest.raises(UnsafeCheckpointError, match=named) as refusal:
        load(path)
    assert not marker.exists()
    for text in (str(path), 'Nothing in it was executed', '--trust', 'trust=True'):
        assert text in str(refusal.value)

    # without protection, the payload is executed
    if container.startswith('pickle'):
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize('place', ['state_dict', 'meta', 'message_hub', 'param_schedulers', 'optimizer', 'unknown'])
def test_payload_is_refused_in_every_entry(place, state, marker, tmp_path):
    payload = Call(os.system, f'touch {marker}')
    value = {
        'state_dict': state['state_dict'] | {'backbone.payload': payload},
        'meta': state['meta'] | {'time': payload},
        'message_hub': state['message_hub'] | {'log_scalars': {'loss': payload}},
        'param_schedulers': [{'last_step': [payload]}],
    }.get(place, payload)
    torch.save(state | {place: value}, tmp_path / 'a.pth')
    with pytest.raises(UnsafeCheckpointError, match=r'posix\.system'):
        load(tmp_path / 'a.pth')
    assert not marker.exists()


# the different ways to a file: ours, mmengine's loaders of files and addresses, and what is built upon them
FILE_PATHS = ('load_state_dict_of_the_dict', 'load_checkpoint', 'http', 'init_cfg_with_prefix', 'init_model', 'resume')


@pytest.mark.parametrize('loading_path', FILE_PATHS)
def test_payload_is_refused_on_every_loading_path(loading_path, state, weights, marker, tmp_path, folder):
    payload = Call(os.system, f'touch {marker}')
    path = tmp_path / 'swinv2_tiny_patch4_window8_256.pth'  # also for the name of a release
    torch.save(state | {'optimizer': payload} if loading_path == 'resume' else hide(payload, weights), path)
    with pytest.raises(UnsafeCheckpointError, match=r'posix\.system'):
        (LOADING_PATHS | dict(resume=by_resume))[loading_path](path, folder)
    assert not marker.exists()


def test_resume_refuses_a_payload(state, marker, tmp_path, folder):
    """With the tool: all its options use the same loader."""
    torch.save(state | {'optimizer': Call(os.system, f'touch {marker}')}, tmp_path / 'a.pth')
    detector_config(folder).dump(tmp_path / 'config.py')
    with pytest.raises(AssertionError, match=r'error: checkpoint .* is refused: .*posix\.system') as refusal:
        call(folder, 'train.py', tmp_path / 'config.py', '--resume', tmp_path / 'a.pth')
    assert str(tmp_path / 'a.pth') in str(refusal.value)
    assert not marker.exists()


def test_swinv2_to_mm_refuses_a_payload(weights, marker, tmp_path):
    source, target = tmp_path / 'a.pth', tmp_path / 'b.pth'
    torch.save(hide(Call(os.system, f'touch {marker}'), weights), source)
    message = refuse(tmp_path, CONVERTER, source, target)
    assert 'posix.system' in message
    assert str(source) in message
    assert not marker.exists()
    assert not target.exists()


# ---------------------------------------------------------------- configs within checkpoints


def quoted(code):
    """Code in a string literal without quotes, for templates."""
    return code.replace("'", r'\047').replace('"', r'\042')


# Python that mmengine executes when it resumes; {code} touches the marker, {file} and {module} do so when executed
CODE = {
    'statements': 'import os\n{code}',
    'expression': 'a = {code}.name',
    'argument': 'model = dict(type=dict(a=[1, ({code}, 2)]))',
    'unpacking': 'a = dict(**vars({code}))',
    'argument of a dict': 'model = dict({{"a.b": {code}}})',
    'dict of pairs': 'model = dict([("a", {code})])',
    'another dict': 'dict = exec\na = dict({quoted})',
    'f-string': 'a = f"""{{{code}}}"""',
    'comprehension': 'a = [{code}.name for i in (1,)]',
    'lambda': 'a = (lambda: {code}.name)()',
    'class': 'class A:\n    a = {code}',
    'default': 'def f(a={code}):\n    pass',
    'decorator': '@(lambda f: {code}.name)\ndef f():\n    pass',
    'annotation': 'a: {code} = 1',
    'condition': 'if {code}:\n    pass',
    'operator': 'a = 1 if {code} else 2',
    'comparison': 'a = {code} == 1',
    'base': "_base_ = '{file}'",
    'bases': "_base_ = ['{file}']",
    'base after data': "a = 1\n_base_ = '{file}'",
    # mmengine replaces templates first: what was a string becomes code
    'base variable': r"""a = "\{{{{_base_.b}}}}+str({code})#" """,
    'environment variable': r'a = "{{{{$NOT_SET:b={escaped}.name#|.*}}}}"',
}


RESUMED = ('statements', 'base', 'environment variable')  # by a Runner; the others as it reads the file


def config_text(form, marker, folder, monkeypatch):
    code = touch(marker)
    file = folder / f'payload_{folder.name}.py'
    file.write_text(f'made = {code}.name\n')
    monkeypatch.syspath_prepend(folder)
    return CODE[form].format(
        code=code.replace('"', "'") if form == 'base variable' else code,
        quoted=repr(code),
        escaped=quoted(code).replace(' ', ''),
        file=file,
    )


@pytest.mark.parametrize('form', CODE)
def test_check_configs_refuses_code(form, state, marker, tmp_path, folder, monkeypatch):
    text = config_text(form, marker, tmp_path, monkeypatch)
    kept = state if form in RESUMED else {'meta': {}}
    torch.save(kept | {'meta': kept['meta'] | {'config': text}}, tmp_path / 'a.pth')
    with pytest.raises(UnsafeCheckpointError, match='config') as refusal:
        by_resume(tmp_path / 'a.pth', folder) if form in RESUMED else load(tmp_path / 'a.pth')
    assert not marker.exists()
    assert str(tmp_path / 'a.pth') in str(refusal.value)

    with contextlib.suppress(Exception):  # as in Runner.resume; some forms fail after they were executed
        Config.fromstring(text, '.py')
    assert marker.exists()


@pytest.mark.parametrize('place', ['config', 'cfg'])
def test_check_configs_imports_no_module(place, state, marker, tmp_path, folder, monkeypatch):
    module = tmp_path / f'payload_{tmp_path.name}.py'
    module.write_text(f'made = {touch(marker)}.name\n')
    monkeypatch.syspath_prepend(tmp_path)
    text = f"custom_imports = dict(imports=['{module.stem}'], allow_failed_imports=False)"
    torch.save(state | {'meta': state['meta'] | {place: text}}, tmp_path / 'a.pth')
    if place == 'config':  # mmengine executes it when it resumes
        by_resume(tmp_path / 'a.pth', folder)
    else:
        assert place not in load(tmp_path / 'a.pth')['meta']
    assert not marker.exists()
    Config.fromstring(text, '.py')
    assert marker.exists()


@pytest.mark.parametrize('place', [('meta', 'cfg'), ('message_hub', 'runtime_info', 'cfg')])
def test_check_configs_of_inferencers(place, marker, tmp_path):
    """Mmengine's BaseInferencer reads it from these places if only weights are passed."""
    holder = state = {'state_dict': {}, 'meta': {}}
    for key in place[:-1]:
        holder = holder.setdefault(key, {})
    holder[place[-1]] = touch(marker)
    torch.save(state, tmp_path / 'a.pth')
    with pytest.raises(UnsafeCheckpointError, match='config'):
        load_swinv2_state_dict(tmp_path / 'a.pth')
    assert not marker.exists()


REAL_CONFIGS = {
    'det': lambda: config_path('det/htc_swinv2_t.py'),
    'det, with numbers as keys': lambda: config_path('det/htc_swinv2_l_w48_tta.py'),
    'det, with dots in keys': lambda: stock('mmdet', 'mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py'),
    'seg': lambda: stock('mmseg', 'swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'),
    'video': lambda: stock(
        'mmaction',
        'recognition/swin/swin-tiny-p244-w877_in1k-pre_8xb8-amp-32x2x1-30e_kinetics400-rgb.py',
    ),
}


def stock(toolbox, name):
    spec = pytest.importorskip(toolbox).__spec__
    return os.path.join(os.path.dirname(spec.origin), '.mim', 'configs', name)


@functools.cache
def real_config(task):
    """Its text, as stored by a Runner."""
    return Config.fromfile(REAL_CONFIGS[task]()).pretty_text


@pytest.mark.parametrize('task', REAL_CONFIGS)
def test_check_configs_accepts_real_configs(task, tmp_path):
    text = real_config(task)
    assert len(text) > 3000
    torch.save({'state_dict': {}, 'meta': {'config': text}}, tmp_path / 'a.pth')
    assert load(tmp_path / 'a.pth')['meta']['config'] == text


def test_resume_with_a_real_config(state, tmp_path, folder):
    """Modules that the running config has imported are accepted."""
    text = real_config('det') + "\ncustom_imports = dict(imports=['swinv2_mm.models'], allow_failed_imports=False)\n"
    torch.save(state | {'meta': state['meta'] | {'config': text}}, tmp_path / 'a.pth')
    by_resume(tmp_path / 'a.pth', folder)
    assert load(tmp_path / 'a.pth')['meta']['config'] == text


# ---------------------------------------------------------------- accepted content


def test_runner_state_is_restored(state, tmp_path, folder):
    """Logs, NumPy scalars and arrays."""
    values = dict(palette=np.arange(6).reshape(2, 3), classes=('a', 'b'), names=np.array(['a', 'b']))
    hub = state['message_hub']
    info = hub['runtime_info'] | dict(best_score=np.float64(0.5), seen=np.int64(7), flag=np.bool_(True))
    changed = state | {
        'meta': state['meta'] | {'dataset_meta': values},
        'message_hub': hub | {'runtime_info': info, 'resumed_keys': hub['resumed_keys'] | dict.fromkeys(info, True)},
    }
    torch.save(changed, tmp_path / 'a.pth')
    cfg = detector_config(folder)
    cfg.update(load_from=str(tmp_path / 'a.pth'), resume=True)
    runner = start_training(cfg)
    assert runner.epoch == 1
    assert runner.message_hub.get_info('best_score') == 0.5
    assert runner.message_hub.get_info('seen') == 7
    scalars = MessageHub.get_current_instance().log_scalars
    assert scalars.keys() >= {'train/loss'}
    assert scalars['train/loss'].current() == hub['log_scalars']['train/loss'].current()
    assert runner.optim_wrapper.optimizer.state_dict()['state'].keys() == state['optimizer']['state'].keys()


def install_yacs(patch):
    """Its CfgNode is a dict with attributes. A fake class replaces that of yacs, which is not installed."""
    module = types.ModuleType('yacs.config')

    class CfgNode(dict):
        def __init__(self, values):
            super().__init__(values)
            self.__dict__['__immutable__'] = True
            self.__dict__['__deprecated_keys__'] = set()

    CfgNode.__module__, CfgNode.__qualname__ = 'yacs.config', 'CfgNode'
    module.CfgNode = CfgNode
    patch.setitem(sys.modules, 'yacs', types.ModuleType('yacs'))
    patch.setitem(sys.modules, 'yacs.config', module)
    return CfgNode


@pytest.mark.parametrize('container', ['torch', 'old torch'])
def test_configs_in_official_files_are_data(container, weights, tmp_path, monkeypatch):
    """`config` of the official code, `args` of timm and DeiT; yacs need not be installed."""
    if importlib.util.find_spec('yacs'):
        pytest.skip('yacs is installed')
    path = tmp_path / 'a.pth'
    with monkeypatch.context() as patch:
        node = install_yacs(patch)
        config = node(dict(MODEL=node(dict(TYPE='swinv2', DEPTHS=[2, 2, 6, 2])), TAG='default'))
        args = argparse.Namespace(lr=0.1, model=argparse.Namespace(name='swinv2'))
        CONTAINERS[container]({'model': weights, 'config': config, 'args': args, 'epoch': 299}, path)
    assert 'yacs' not in sys.modules
    loaded = load_swinv2_state_dict(path)
    assert torch.equal(loaded['patch_embed.proj.weight'], weights['patch_embed.proj.weight'])
    by_load_checkpoint(path, tmp_path)


# ---------------------------------------------------------------- trusted files


@pytest.fixture
def with_a_class(weights, tmp_path):
    """Real weights next to an instance of an unknown class, which is harmless."""
    torch.save({'model': weights, 'ratio': fractions.Fraction(1, 2)}, tmp_path / 'a.pth')
    return tmp_path / 'a.pth'


def test_trusted_file_is_loaded(with_a_class, weights):
    with pytest.raises(UnsafeCheckpointError, match=r'fractions\.Fraction'):
        load_swinv2_state_dict(with_a_class)
    loaded = load_swinv2_state_dict(with_a_class, trust=True)
    for name, value in source_backbone().state_dict().items():
        if name in loaded:
            assert torch.equal(loaded[name], value), name
    assert len(loaded) > 50
    assert loaded['layers.3.blocks.0.attn.cpb_mlp.pretrained_window_size'].tolist() == [PRETRAINED[3]] * 2


def test_swinv2_to_mm_of_a_trusted_file(with_a_class, tmp_path):
    target = tmp_path / 'b.safetensors'
    call(tmp_path, CONVERTER, with_a_class, target, '--trust')
    state = by_load_checkpoint(target, tmp_path).state_dict()
    assert all(torch.equal(state[name], value) for name, value in source_backbone().state_dict().items())


def test_unsafe_checkpoint_error_is_a_checkpoint_error():
    assert issubclass(UnsafeCheckpointError, CheckpointError)
    assert issubclass(CheckpointError, ValueError)
