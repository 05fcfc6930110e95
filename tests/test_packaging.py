"""Configs are inherited outside the repository, with the package installed as a wheel and in editable mode."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('mmdet')
REPOSITORY = Path(__file__).parents[1]

USER_CONFIG = """
_base_ = {base}
model = dict(backbone=dict(drop_path_rate=0.125))
pipeline = [*_base_.train_pipeline]  # what a base's variable becomes depends on the way it was named
train_dataloader = dict(dataset=dict(pipeline=pipeline))
"""
CHECK = """
import copy, sys, torch, swinv2_mm
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import MODELS, init_default_scope
print('package', swinv2_mm.__file__)
for path in sys.argv[1:]:
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    Compose(cfg.train_dataloader.dataset.pipeline)
    print(path, type(model).__name__, model.backbone.layers[3].blocks[1].drop_path.drop_prob)
"""


@pytest.fixture(scope='module')
def wheel_site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('wheel')
    pip = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check']
    subprocess.run([*pip, 'wheel', '--no-deps', '--no-build-isolation', '-w', folder, REPOSITORY], check=True)
    subprocess.run([*pip, 'install', '--no-deps', '--target', folder / 'site', *folder.glob('*.whl')], check=True)
    return folder / 'site'


@pytest.fixture(params=['editable', 'wheel'])
def environment(request) -> dict[str, str]:
    """Environment variables under which `import swinv2_mm` takes that installation."""
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    if request.param == 'wheel':
        env['PYTHONPATH'] = str(request.getfixturevalue('wheel_site'))
    return env


def run(arguments: list, folder: Path, env: dict[str, str]) -> str:
    result = subprocess.run(
        [str(a) for a in arguments], cwd=folder, env=env, text=True, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


@pytest.mark.parametrize(
    ('config', 'model'),
    [
        ('det/htc_swinv2_t.py', 'HybridTaskCascade'),
        ('seg/upernet_swinv2_t.py', 'EncoderDecoder'),
        ('video/swinv2_t_k400_224x224x32.py', 'Recognizer3D'),
    ],
)
def test_every_way_to_name_a_base_config_works(environment, config, model, tmp_path):
    package = run(
        [sys.executable, '-c', 'import swinv2_mm; print(swinv2_mm.__path__[0])'], tmp_path, environment
    ).strip()
    assert ('site' in package) == ('PYTHONPATH' in environment)
    bases = dict(
        relative=repr(os.path.relpath(f'{package}/.mim/configs/{config}', tmp_path)),
        by_function=f"[__import__('swinv2_mm').config_path('{config}')]",
        by_scope=f"'swinv2_mm::{config}'",
    )
    paths = []
    for name, base in bases.items():
        paths.append(tmp_path / f'{name}.py')
        paths[-1].write_text(USER_CONFIG.format(base=base))
    lines = run([sys.executable, '-c', CHECK, *paths], tmp_path, environment).splitlines()
    assert lines[-3:] == [f'{path} {model} 0.125' for path in paths]


def test_get_config_and_get_model_find_configs_by_name(environment, tmp_path):
    code = (
        'import swinv2_mm; from mmengine.hub import get_config, get_model; '
        "print(get_config('swinv2_mm::det/cascade_mask_rcnn_swinv2_t.py').model.type, "
        "type(get_model('swinv2_mm::det/cascade_mask_rcnn_swinv2_t.py')).__name__)"
    )
    assert run([sys.executable, '-c', code], tmp_path, environment).split()[-2:] == ['CascadeRCNN', 'CascadeRCNN']


def test_an_unknown_config_is_named_with_those_there_are():
    import swinv2_mm

    with pytest.raises(FileNotFoundError, match=r"no config 'det/htc_swinv2_x.py'; it has .*det/htc_swinv2_t.py"):
        swinv2_mm.config_path('det/htc_swinv2_x.py')


@pytest.mark.slow
def test_mim_trains_from_the_wheel(wheel_site, tmp_path):
    """`mim train` looks a package up beside its metadata, so it works with a wheel and not with an editable install."""
    run(
        [
            sys.executable,
            wheel_site / 'swinv2_mm/.mim/tools/misc/make_shapes_coco.py',
            'data',
            '--train',
            '4',
            '--val',
            '2',
        ],
        tmp_path,
        os.environ | dict(PYTHONPATH=str(wheel_site)),
    )
    (tmp_path / 'mine.py').write_text("_base_ = 'swinv2_mm::det/htc_swinv2_demo.py'\n")
    run(
        [
            Path(sys.executable).parent / 'mim',
            'train',
            'swinv2_mm',
            'mine.py',
            '--gpus',
            '0',
            '--work-dir',
            'out',
            '--cfg-options',
            'data_root=data/',
            'train_cfg.max_epochs=1',
            'train_dataloader.batch_size=2',
        ],
        tmp_path,
        os.environ | dict(PYTHONPATH=str(wheel_site)),
    )
    assert (tmp_path / 'out' / 'last_checkpoint').exists()
