"""What with_swinv2 prints, and its errors."""

import re
import subprocess
from pathlib import Path

import pytest
from mmengine.config import Config
from tool_runs import REPOSITORY, TOOLS, command, environment, load_tool, refuse, restored_process

from swinv2_mm.checkpoints.loaders import find_release
from swinv2_mm.models.sizes import ARCHS

pytest.importorskip('mmseg')

TOOL = 'misc/with_swinv2.py'
WRAPPER = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-4))


def write_base(folder: Path, **more) -> Config:
    """Write a config of a segmentor to base.py: a ResNet-18 of two channels, and a head of its last feature map."""
    head = dict(type='FCNHead', in_channels=16, channels=8, num_classes=2)
    preprocessor = dict(type='SegDataPreProcessor', mean=[128.0] * 3, std=[64.0] * 3, bgr_to_rgb=True, size=(64, 64))
    model = dict(
        type='EncoderDecoder',
        data_preprocessor=preprocessor,
        backbone=dict(type='ResNet', depth=18, base_channels=2, stem_channels=2) | more.pop('backbone', {}),
        decode_head=head,
    )
    cfg = Config(dict(default_scope='mmseg', model=model, optim_wrapper=WRAPPER) | more)
    cfg.dump(folder / 'base.py')
    return cfg


def printed(folder: Path, capsys, monkeypatch, *args) -> str:
    """What the tool prints to the standard output."""
    monkeypatch.chdir(folder)
    with restored_process():
        load_tool(TOOLS / TOOL).main(list(args))
    return capsys.readouterr().out


def test_with_swinv2_prints_a_config_that_inherits_from_a_file(tmp_path, capsys, monkeypatch):
    base = write_base(tmp_path)
    (tmp_path / 'a.pth').touch()
    text = printed(tmp_path, capsys, monkeypatch, 'base.py', '--arch', 'small', '--window', '4', '--weights', 'a.pth')
    (tmp_path / 'mine.py').write_text(text)
    cfg = Config.fromfile(tmp_path / 'mine.py')
    base.model.backbone = dict(
        type='swinv2_mm.SwinTransformerV2',
        arch='small',
        window_size=4,
        out_indices=(0, 1, 2, 3),
        init_cfg=dict(type='Pretrained', checkpoint='a.pth'),
    )
    base.model.data_preprocessor.update(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
    base.model.decode_head.in_channels = 768
    base.optim_wrapper.constructor = 'swinv2_mm.SwinV2OptimWrapperConstructor'
    base.find_unused_parameters = True  # the head reads the last of four feature maps
    assert cfg.to_dict() == base.to_dict()
    assert "_base_ = 'base.py'" in text
    assert all(f'# {part}: ' in text for part in ('data_preprocessor', 'find_unused_parameters'))


def test_with_swinv2_leaves_out_what_does_not_change(tmp_path, capsys, monkeypatch):
    write_base(tmp_path, find_unused_parameters=True)
    assert 'find_unused_parameters' not in printed(tmp_path, capsys, monkeypatch, 'base.py')
    write_base(tmp_path, backbone=dict(out_indices=(3,)))
    assert 'find_unused_parameters' not in printed(tmp_path, capsys, monkeypatch, 'base.py')


def test_default_weights_of_with_swinv2_are_releases_of_the_size():
    for arch, weights in load_tool(TOOLS / TOOL).WEIGHTS.items():
        assert arch in ARCHS
        assert arch.removesuffix('_simmim') in weights
        find_release(weights)


@pytest.mark.parametrize(
    ('change', 'args', 'text'),
    [
        ({}, ['--window', '0'], '--window must be between 1 and 128, got 0'),
        ({}, ['--window', '1000'], '--window must be between 1 and 128, got 1000'),
        ({}, ['--weights', 'swinv2://none'], 'none'),
        ({}, ['--weights', 'swinv2://base_window8_256'], 'base_window8_256 are of a base model, but --arch is tiny'),
        ({}, ['--weights', 'none.pth'], r'--weights none.pth does not exist \(relative to '),
        (dict(custom_imports=dict(imports=['my_module'])), [], 'my_module.*: modules of your own .* PYTHONPATH=FOLDER'),
        (dict(backbone=dict(in_channels=4)), [], 'model.backbone of type ResNet takes 4 channels, not RGB'),
        (dict(default_scope='mmrotate'), [], "default_scope of the config must be one of .*, got 'mmrotate'"),
        (dict(optim_wrapper=dict(WRAPPER, paramwise_cfg=dict(fc_lr5=True))), [], 'paramwise_cfg has options'),
    ],
)
def test_with_swinv2_refuses_in_one_line_and_prints_no_config(tmp_path, capsys, change, args, text):
    write_base(tmp_path, **change)
    assert re.search(text, refuse(tmp_path, TOOL, 'base.py', *args))
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('name', ['missing.py', 'mmseg::missing/missing.py', 'missing::a/b.py', 'mmseg::missing'])
def test_with_swinv2_names_a_config_that_does_not_exist(tmp_path, name):
    assert 'missing' in refuse(tmp_path, TOOL, name)


def test_with_swinv2_refuses_a_lazy_config(tmp_path):
    (tmp_path / 'other.py').write_text('model = dict()\n')
    lazy = 'from mmengine.config import read_base\nwith read_base():\n    from .other import *\n'
    (tmp_path / 'base.py').write_text(lazy)
    assert 'config base.py cannot be inherited by a config with `_base_`: ' in refuse(tmp_path, TOOL, 'base.py')


def test_with_swinv2_takes_a_preprocessor_outside_of_the_model(tmp_path, capsys, monkeypatch):
    cfg = write_base(tmp_path)
    cfg.data_preprocessor = cfg.model.pop('data_preprocessor')
    cfg.dump(tmp_path / 'base.py')
    (tmp_path / 'mine.py').write_text(printed(tmp_path, capsys, monkeypatch, 'base.py', '--weights', ''))
    mine = Config.fromfile(tmp_path / 'mine.py')
    assert mine.data_preprocessor.mean == [123.675, 116.28, 103.53]
    assert mine.data_preprocessor.type == 'SegDataPreProcessor'
    assert not {'init_cfg', 'data_preprocessor'} & {*mine.model, *mine.model.backbone}


@pytest.mark.slow
@pytest.mark.parametrize('number', range(5))
def test_with_swinv2_prints_what_the_page_shows(number, tmp_path, capsys, monkeypatch):
    page = (REPOSITORY / 'docs/any_config.md').read_text()
    args, shown = re.findall(r'with_swinv2\.py (mm[^`]*) > mine\.py\n```.*?```python\n(.*?)```', page, re.DOTALL)[
        number
    ]
    text = printed(tmp_path, capsys, monkeypatch, *args.replace('\\\n', ' ').split())
    assert re.sub(r'^#.*\n', '', text, flags=re.MULTILINE) == shown


@pytest.mark.slow
def test_with_swinv2_writes_a_config_as_users_call_it(tmp_path):
    write_base(tmp_path)
    (tmp_path / 'mine').mkdir()
    program, args = command(TOOL, 'base.py')
    with (tmp_path / 'mine/mine.py').open('w') as file:
        subprocess.run([*program, *args], cwd=tmp_path, env=environment(), stdout=file, check=True)
    cfg = Config.fromfile(tmp_path / 'mine/mine.py')  # finds its base from there
    assert cfg.model.decode_head.in_channels == 768


@pytest.mark.slow
def test_with_swinv2_takes_the_name_of_a_stock_config(tmp_path):
    program, args = command(TOOL, 'mmseg::fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512.py', '--arch', 'base')
    with (tmp_path / 'mine.py').open('w') as file:
        subprocess.run([*program, *args], cwd=tmp_path, env=environment(), stdout=file, check=True)
    assert Config.fromfile(tmp_path / 'mine.py').model.decode_head.in_channels == 1024
