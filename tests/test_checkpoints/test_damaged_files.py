"""About 250 damaged checkpoints: each is an error that names the file, and loads nothing.

All are made from one good checkpoint, with a seeded generator, so that a case that fails can be run again by its name.
"""

import functools
import gzip
import io
import json
import random
import re
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import layouts
import pytest
import torch
from loading_paths import ALL_STAGES, ARCH, detector_config, official_weights, source_backbone
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from safetensors.torch import save_file

from swinv2_mm.checkpoints import CheckpointError
from swinv2_mm.models import SwinTransformerV2

Weights = dict[str, object]


@functools.cache
def good() -> Weights:
    """An official checkpoint without its optional parts: head, final norm, buffers, redundant tables."""
    spare = re.compile(r'^head|^norm\.|attn_mask$|relative_position_index$|blocks\.[1-9].*relative_coords_table$')
    weights = official_weights(source_backbone())
    return {name: value.contiguous() for name, value in weights.items() if not spare.search(name)}


def save_torch(weights: object, path: Path) -> None:
    torch.save({'model': weights}, path)


def save_old_torch(weights: object, path: Path) -> None:
    torch.save({'model': weights}, path, _use_new_zipfile_serialization=False)


def save_safetensors(weights: Weights, path: Path) -> None:
    save_file(weights, path)


CONTAINERS = {'.pth': save_torch, '.old.pth': save_old_torch, '.safetensors': save_safetensors}


@functools.cache
def good_file(container: str) -> bytes:
    with io.BytesIO() as buffer:
        if container == '.safetensors':
            from safetensors.torch import save

            return save(good())
        CONTAINERS[container](good(), buffer)
        return buffer.getvalue()


# ---------------------------------------------------------------- damaged files: (path) -> None

CASES: dict[str, Callable[[Path], None]] = {}
SUFFIX: dict[str, str] = {}


def add(name: str, content, suffix: str = '.pth') -> None:
    """Add a case whose file has this content, or is written by a function of the path."""
    assert name not in CASES
    CASES[name] = content if callable(content) else lambda path: path.write_bytes(content)
    SUFFIX[name] = suffix


def flip(data: bytes, offset: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[offset] ^= 1 << bit
    return bytes(changed)


def add_truncated(rng: random.Random) -> None:
    for container in CONTAINERS:
        data = good_file(container)
        lengths = [1, 7, 8, 9, len(data) // 2, len(data) - 100, len(data) - 1]
        lengths += [rng.randrange(10, len(data) - 100) for _ in range(5)]
        for length in lengths:
            add(f'{container} cut to {length} bytes', data[:length], container)


def record_offsets(data: bytes) -> dict[str, range]:
    """The position of the content of each record of a zip file."""
    found = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for record in archive.infolist():
            assert record.compress_type == zipfile.ZIP_STORED
            name_length, extra_length = struct.unpack_from('<HH', data, record.header_offset + 26)
            start = record.header_offset + 30 + name_length + extra_length
            found[record.filename.split('/', 1)[1]] = range(start, start + record.file_size)
    return found


def add_flipped_bits(rng: random.Random) -> None:
    """In records of a zip file, which have checksums, and in the header of safetensors, whose data have none."""
    data = good_file('.pth')
    records = record_offsets(data)
    tensors = [name for name in records if name.startswith('data/')]
    others = [name for name in records if not name.startswith('data/')]
    chosen = ['data.pkl'] * 11 + others + rng.sample(tensors, 14)
    for i, name in enumerate(chosen):
        changed = flip(data, rng.choice(records[name]), rng.randrange(8))
        add(f'bit {i} flipped in {name}', changed)

    data = good_file('.safetensors')
    header = 8 + struct.unpack_from('<Q', data)[0]
    for offset in [0, 1, 5, 8, header - 1, *(rng.randrange(9, header) for _ in range(25))]:
        bit = rng.randrange(8)
        add(f'bit {bit} of byte {offset} flipped in a header', flip(data, offset, bit), '.safetensors')


def rewritten(change: Callable[[str, bytes], object]) -> Callable[[Path], None]:
    """A zip file with valid checksums, its records changed by `change`: None drops a record, a list makes several."""

    def write(path: Path) -> None:
        with (
            zipfile.ZipFile(io.BytesIO(good_file('.pth'))) as old,
            zipfile.ZipFile(path, 'w') as new,
            warnings.catch_warnings(action='ignore'),  # duplicate names
        ):
            for name in old.namelist():
                result = change(name.split('/', 1)[1], old.read(name))
                for content in result if isinstance(result, list) else [result]:
                    if content is not None:
                        new.writestr(name, content)

    return write


def add_zips() -> None:
    def only(target, function):
        return rewritten(lambda name, data: function(data) if name == target else data)

    add('a tensor is missing in the zip', only('data/3', lambda data: None))
    add('a tensor is too short', only('data/3', lambda data: data[:-4]))
    add('a tensor is empty', only('data/3', lambda data: b''))
    add('the pickle is missing', only('data.pkl', lambda data: None))
    add('the pickle is empty', only('data.pkl', lambda data: b''))
    add('the pickle is cut', only('data.pkl', lambda data: data[: len(data) // 2]))
    add('the pickle is another file', only('data.pkl', lambda data: b'not a pickle'))
    other = functools.partial(re.sub, rb'(?<=X\x01\0\0\0)3', b'a')
    add('the pickle names another tensor', only('data.pkl', other))
    add('two pickles', only('data.pkl', lambda data: [data, data.replace(b'layers.1', b'layers.0')]))
    add('two tensors of one name', only('data/3', lambda data: [data, bytes(len(data))]))
    add('another byte order', only('byteorder', lambda data: b'middle'))

    def zipped(**files):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, 'w') as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return buffer.getvalue()

    add('a zip of something else', zipped(README='hello'))
    add('an empty zip', zipped())
    add('a checkpoint within a zip', zipped(checkpoint=good_file('.pth')))


def add_headers() -> None:
    """Headers of safetensors that are valid JSON, but wrong."""
    data = good_file('.safetensors')
    size = struct.unpack_from('<Q', data)[0]
    header, tensors = json.loads(data[8 : 8 + size]), data[8 + size :]
    first, second = 'layers.0.blocks.0.norm1.bias', 'layers.0.blocks.0.norm1.weight'

    def build(text: str) -> bytes:
        return struct.pack('<Q', len(text)) + text.encode() + tensors

    def changed(**values) -> bytes:
        return build(json.dumps(header | {first: header[first] | values}))

    add('header without tensors', build('{}'), '.safetensors')
    add('header that is a list', build('[1, 2]'), '.safetensors')
    add('header of the wrong length', struct.pack('<Q', size + 40) + data[8:], '.safetensors')
    add('header with an unknown type', changed(dtype='F33'), '.safetensors')
    add('header with a type of another width', changed(dtype='F64'), '.safetensors')
    add('header with offsets beyond the file', changed(data_offsets=[0, 1 << 40]), '.safetensors')
    add('header with negative offsets', changed(data_offsets=[-4, 0]), '.safetensors')
    add('header with offsets of another tensor', changed(data_offsets=header[second]['data_offsets']), '.safetensors')
    add('header with another shape', changed(shape=[1, 1]), '.safetensors')
    twice = json.dumps(header)[:-1] + f', {json.dumps(first)}: {json.dumps(header[second])}}}'
    add('header with a name twice', build(twice), '.safetensors')


def add_other_files(rng: random.Random) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as archive:
        archive.addfile(tarfile.TarInfo('checkpoint'))
    files = {
        'empty': b'',
        'web page': b'<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head></html>\n',
        'XML': b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>',
        'Git LFS pointer': b'version https://git-lfs.github.com/spec/v1\noid sha256:' + b'0' * 64 + b'\nsize 113\n',
        'JSON': b'{"model": "swinv2_tiny", "weights": [1, 2, 3]}',
        'text': b'Checkpoints are at another place.\n',
        'noise': rng.randbytes(5000),
        'short noise': rng.randbytes(3),
        'zeros': bytes(5000),
        'image': b'\x89PNG\r\n\x1a\n' + rng.randbytes(500),
        'gzip': gzip.compress(good_file('.pth')),
        'tar': buffer.getvalue(),
        'begins as a pickle': b'\x80\x02' + rng.randbytes(500),
        'begins as a zip': b'PK\x03\x04' + rng.randbytes(500),
        'begins as safetensors': struct.pack('<Q', 500) + b'{' + rng.randbytes(600),
    }
    for suffix in ('.pth', '.safetensors'):
        for name, content in files.items():
            add(f'{name} as {suffix}', content, suffix)
    add('a folder', Path.mkdir)


OTHER_OBJECTS = {
    'list': [torch.ones(2)],
    'tuple': (torch.ones(2), 3),
    'tensor': torch.ones(2),
    'number': 3,
    'text': 'layers.0.blocks.0',
    'none': None,
    'empty dict': {},
    'dict of numbers': {0: torch.ones(2), 1: torch.ones(2)},
    'empty model': {'model': {}},
    'empty state_dict': {'state_dict': {}, 'meta': {}},
    'no state_dict': {'state_dict': None, 'meta': {}},
    'model that is a text': {'model': 'swinv2_tiny'},
    'model that is a list': {'model': [torch.ones(2)]},
    'training state without weights': {'optimizer': {'state': {}, 'param_groups': []}, 'epoch': 3},
    'another network': {'state_dict': {'conv1.weight': torch.ones(8, 3, 7, 7), 'layer1.0.conv1.weight': torch.ones(8)}},
    'another detector': {
        'state_dict': {'backbone.conv1.weight': torch.ones(8, 3, 7, 7), 'bbox_head.weight': torch.ones(8)},
        'meta': {},
    },
    'Swin V1': {
        'model': {
            'patch_embed.proj.weight': torch.ones(16, 3, 4, 4),
            'layers.0.blocks.0.attn.relative_position_bias_table': torch.ones(225, 1),
            'layers.0.blocks.0.attn.qkv.weight': torch.ones(48, 16),
        }
    },
}


# ---------------------------------------------------------------- damaged weights

# description, and a name that the error must contain
STATE_DICTS: dict[str, tuple[Callable[[], Weights], str]] = {}
BLOCK = 'layers.0.blocks.1.'
WEIGHT, TABLE, SCALE = (
    f'{BLOCK}attn.{name}' for name in ('qkv.weight', 'relative_coords_table', 'logit_scale')
)  # fmt: skip
REQUIRED = [
    'patch_embed.proj.weight',
    'patch_embed.proj.bias',
    'patch_embed.norm.weight',
    'layers.0.downsample.reduction.weight',
    'layers.1.downsample.norm.bias',
    'layers.0.blocks.0.attn.cpb_mlp.0.weight',
    'layers.3.blocks.0.mlp.fc2.weight',
]  # fmt: skip
REQUIRED += [
    BLOCK + name
    for name in (
        'attn.qkv.weight',
        'attn.q_bias',
        'attn.v_bias',
        'attn.logit_scale',
        'attn.cpb_mlp.0.weight',
        'attn.cpb_mlp.0.bias',
        'attn.cpb_mlp.2.weight',
        'attn.proj.weight',
        'norm1.weight',
        'norm2.bias',
        'mlp.fc1.weight',
    )
]


def add_weights(name: str, make: Callable[[], Weights], named: str) -> None:
    assert name not in STATE_DICTS
    STATE_DICTS[name] = make, named


def with_entry(name: str, value: object) -> Callable[[], Weights]:
    return lambda: good() | {name: value}


def without(*names: str) -> Callable[[], Weights]:
    return lambda: {name: value for name, value in good().items() if name not in names}


def renamed(old: str, new: str) -> Callable[[], Weights]:
    return lambda: {name.replace(old, new): value for name, value in good().items()}


def add_names() -> None:
    for name in REQUIRED:
        add_weights(f'{name} is missing', without(name), name)
    norm = {'norm.weight': torch.ones(8 * ARCH['embed_dims'])}
    add_weights('half of the final norm is missing', lambda: good() | norm, 'norm3.bias')
    norms = {f'{name}.{kind}': norm['norm.weight'] for name in ('norm', 'norm3') for kind in ('weight', 'bias')}
    add_weights('two final norms', lambda: good() | norms, 'norm')
    for old, new, named in (
        (WEIGHT, WEIGHT.replace('qkv', 'QKV'), WEIGHT),
        (WEIGHT, f'{WEIGHT} ', WEIGHT),
        (WEIGHT, f'{WEIGHT}_orig', WEIGHT),
        (SCALE, SCALE.replace('logit_scale', 'tau'), SCALE),
        ('layers.3.', 'layers.4.', 'layers.3.'),
        ('layers.2.blocks.1', 'layers.2.blocks.2', 'layers.2.blocks.1'),
        ('.mlp.fc1.', '.mlp.w1.', 'mlp.fc1'),
        ('patch_embed.', 'stem.', 'patch_embed.'),
        ('attn.cpb_mlp.', 'attn.meta_mlp.', 'no Swin V2'),
    ):
        add_weights(f'{old} is called {new}', renamed(old, new), named)
    for name in (
        f'{BLOCK}attn.qkv.bias',
        f'{BLOCK}attn.k_proj.weight',
        f'{BLOCK}norm3.weight',
        f'{BLOCK}enorm.bias',
        f'{BLOCK}lora.weight',
        'layers.0.blocks.2.norm1.weight',
        'layers.4.blocks.0.norm1.weight',
        'layers.3.downsample.norm.weight',
        'patch_embed.proj2.weight',
    ):
        add_weights(f'{name} is too much', with_entry(name, torch.ones(16)), name)
    double = f'{BLOCK}attn.rpe_mlp.0.bias'
    add_weights('a parameter under two names', with_entry(double, torch.ones(512)), double)
    for prefixes in (('student.', 'teacher.'), ('encoder_q.', 'encoder_k.')):
        twins = lambda prefixes=prefixes: {p + name: value for p in prefixes for name, value in good().items()}  # noqa: E731
        add_weights(f'two backbones, {prefixes[0]} and {prefixes[1]}', twins, 'wi')


def add_shapes() -> None:
    changes = {
        'transposed': lambda value: value.mT.contiguous(),
        'cut': lambda value: value[:-1],
        'repeated': lambda value: torch.cat([value, value]),
        'a number': lambda value: value.flatten()[0],
        'flat': lambda value: value.flatten(),
        'empty': lambda value: value[:0],
        'deeper': lambda value: value[None],
    }
    for kind, change in changes.items():
        for name in (WEIGHT, f'{BLOCK}mlp.fc1.weight'):
            add_weights(f'{name} is {kind}', with_entry(name, change(good()[name])), name)
    for name in ('patch_embed.proj.weight', SCALE, f'{BLOCK}attn.q_bias', 'layers.2.blocks.0.norm2.weight'):
        for kind in ('cut', 'repeated', 'deeper'):
            add_weights(f'{name} is {kind}', with_entry(name, changes[kind](good()[name])), name)


def add_types() -> None:
    values = {
        'int': torch.Tensor.long,
        'bool': torch.Tensor.bool,
        'complex': lambda value: value.to(torch.complex64),
        'sparse': torch.Tensor.to_sparse,
        'without data': lambda value: value.to('meta'),
        'None': lambda value: None,
        'a text': lambda value: 'weights',
        'a float': lambda value: 0.5,
        'a dict': lambda value: {'weight': value},
        'a list': lambda value: [value],
        'a shape': lambda value: value.shape,
        'an array': torch.Tensor.numpy,
    }
    for kind, change in values.items():
        for name in (WEIGHT, f'{BLOCK}attn.cpb_mlp.0.bias'):
            add_weights(f'{name} is {kind}', with_entry(name, change(good()[name])), name)


def add_windows() -> None:
    tables = {
        'of another window than its stage': layouts.coords_table(7, 7),
        'of even size': torch.zeros(1, 12, 12, 2),
        'of no window': layouts.coords_table(6, 6) * 1.03,
        'of zeros': torch.zeros(1, 11, 11, 2),
        'of no numbers': torch.full((1, 11, 11, 2), torch.nan),
        'flat': layouts.coords_table(6, 6).flatten(),
        'integers': layouts.coords_table(6, 6).long(),
        'a text': 'table',
    }
    for kind, table in tables.items():
        named = 'stage 0' if 'stage' in kind else TABLE
        add_weights(f'a table of coordinates is {kind}', with_entry(TABLE, table), named)
    entry = f'{BLOCK}attn.cpb_mlp.pretrained_window_size'
    windows = {
        'another one': torch.tensor([7, 7]),
        'negative': torch.tensor([-6, -6]),
        'no integer': torch.tensor([6.0, 6.0]),
        'of three axes': torch.tensor([6, 6, 6]),
        'a number': torch.tensor(6),
        'a list': [6, 6],
    }
    for kind, window in windows.items():
        named = {'another one': 'stage 0', 'of three axes': 'axes'}.get(kind, entry)
        add_weights(f'a stored window is {kind}', with_entry(entry, window), named)
    no_tables = [name for name in good() if name.endswith('relative_coords_table')]
    blocks = [name.removesuffix('logit_scale') for name in good() if name.endswith('logit_scale')]
    negative = {f'{block}cpb_mlp.pretrained_window_size': torch.tensor([-6, -6]) for block in blocks}
    all_negative = lambda: without(*no_tables)() | negative  # noqa: E731
    add_weights('only negative windows', all_negative, 'pretrained_window_size must be')
    add_weights('no table to read the windows from', without(*no_tables), 'pretrained_window_sizes')


def make_cases() -> None:
    rng = random.Random(2111)
    add_truncated(rng)
    add_flipped_bits(rng)
    add_zips()
    add_headers()
    add_other_files(rng)
    for name, value in OTHER_OBJECTS.items():
        add(f'{name} in a file', functools.partial(torch.save, value))
    for function in (add_names, add_shapes, add_types, add_windows):
        function()


make_cases()


# ---------------------------------------------------------------- models


@functools.cache
def model_and_state(kind: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model and a copy of its state, built once: no case may change it."""
    torch.manual_seed(1)
    if kind == 'backbone':
        model = SwinTransformerV2(**ALL_STAGES)
    else:
        init_default_scope('mmdet')
        model = MODELS.build(detector_config(Path('unused')).model)
    return model, {name: value.clone() for name, value in state(model).items()}


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, with those that are not in checkpoints."""
    return dict(model.named_parameters()) | {f'buffer {name}': value for name, value in model.named_buffers()}


def assert_refused(load: Callable[[torch.nn.Module], object], kind: str, *named: str) -> None:
    """Assert that loading fails with an error of these texts and more, and changes no parameter or buffer."""
    model, before = model_and_state(kind)
    with pytest.raises(CheckpointError) as refusal:
        load(model)
    message = str(refusal.value)
    assert [text for text in named if text not in message] == [], message
    assert len(message.replace(named[0], '').split()) >= 3
    after = state(model)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert [name for name in before if before[name].dtype != after[name].dtype] == []


@pytest.fixture(autouse=True)
def _new_models_after_a_change():
    yield
    for kind in ('backbone', 'detector'):
        model, before = model_and_state(kind)
        if not all(torch.equal(before[name], value) for name, value in state(model).items()):
            model_and_state.cache_clear()


# ---------------------------------------------------------------- tests


def test_number_of_damaged_cases():
    assert len(CASES) + len(STATE_DICTS) >= 200


@pytest.mark.parametrize('container', CONTAINERS)
@pytest.mark.parametrize('kind', ['backbone', 'detector'])
def test_undamaged_checkpoint_loads(kind, container, tmp_path):
    path = tmp_path / f'checkpoint{container}'
    path.write_bytes(good_file(container))
    model, _ = model_and_state(kind)
    load_checkpoint(model, str(path))
    backbone = model if kind == 'backbone' else model.backbone
    for name, parameter in backbone.named_parameters():
        if not name.startswith('norm'):
            assert torch.equal(parameter, good()[name]), name


@pytest.mark.parametrize('name', CASES)
def test_damaged_file_is_refused(name, tmp_path):
    path = tmp_path / f'checkpoint{SUFFIX[name]}'
    CASES[name](path)
    assert_refused(lambda model: load_checkpoint(model, str(path)), 'backbone', str(path))


NO_WEIGHTS = ('list', 'tuple', 'tensor', 'number', 'text', 'none', 'dict of numbers', 'no state_dict')


@pytest.mark.parametrize('name', NO_WEIGHTS)
def test_detector_refuses_a_file_without_weights(name, tmp_path):
    """Unreadable files fail before a model is involved, so that readable ones suffice here."""
    path = tmp_path / 'checkpoint.pth'
    CASES[f'{name} in a file'](path)
    assert_refused(lambda model: load_checkpoint(model, str(path)), 'detector', str(path))


@pytest.mark.parametrize('name', [name for name in OTHER_OBJECTS if name not in NO_WEIGHTS])
def test_detector_warns_about_a_file_without_its_backbone(name, tmp_path):
    """Like torch, which reports all keys as missing; the backbone refuses such a file."""
    path = tmp_path / 'checkpoint.pth'
    CASES[f'{name} in a file'](path)
    model, before = model_and_state('detector')
    with layouts.recorded_log() as log:
        load_checkpoint(model, str(path))
    (line,) = [line for line in log if 'SwinV2' in line]
    assert ('of another architecture' if name == 'another detector' else 'nothing for the backbone') in line
    assert all(torch.equal(before[key], value) for key, value in state(model).items())


@pytest.mark.parametrize('name', STATE_DICTS)
def test_damaged_weights_are_refused(name, tmp_path):
    """As a dict and as a file, with `strict=False`, which makes no difference."""
    make, named = STATE_DICTS[name]
    assert_refused(lambda model: model.load_state_dict(make(), strict=False), 'backbone', named)
    path = tmp_path / 'checkpoint.pth'
    save_old_torch(make(), path)  # the faster format to read
    assert_refused(lambda model: load_checkpoint(model, str(path)), 'backbone', str(path), named)


# for keys of another architecture, see `test_partial.py`
KNOWN = [name for name, (_, named) in STATE_DICTS.items() if named != 'no Swin V2']


@pytest.mark.parametrize('name', KNOWN[::7])
def test_detector_refuses_a_damaged_backbone(name, tmp_path):
    make, named = STATE_DICTS[name]
    path = tmp_path / 'checkpoint.pth'
    save_torch(make(), path)
    assert_refused(lambda model: load_checkpoint(model, str(path)), 'detector', str(path), named)
    assert_refused(lambda model: model.load_state_dict(make()), 'backbone', named)  # torch's, strict


@pytest.mark.parametrize('name', KNOWN[::7])
def test_damaged_weights_of_a_detector_are_refused(name, tmp_path):
    """Nothing of the detector is loaded."""
    make, named = STATE_DICTS[name]
    path = tmp_path / 'checkpoint.pth'
    others = {
        key: value + 1 for key, value in model_and_state('detector')[0].state_dict().items() if 'backbone' not in key
    }
    weights = {f'backbone.{key}': value for key, value in make().items()}
    torch.save({'state_dict': weights | others, 'meta': {}}, path)
    assert_refused(lambda model: load_checkpoint(model, str(path)), 'detector', str(path), named)


@pytest.mark.parametrize('name', list(STATE_DICTS)[3::14])
def test_backbone_refuses_a_damaged_detector(name, tmp_path):
    make, named = STATE_DICTS[name]
    path = tmp_path / 'checkpoint.pth'
    torch.save({'state_dict': {f'backbone.{key}': value for key, value in make().items()}, 'meta': {}}, path)
    assert_refused(lambda model: load_checkpoint(model, str(path)), 'backbone', str(path), named)


@pytest.mark.parametrize('name', ['missing.pth', 'missing.safetensors', 'missing/missing.pth'])
def test_missing_file_is_named(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=name):
        load_checkpoint(model_and_state('backbone')[0], str(tmp_path / name))
