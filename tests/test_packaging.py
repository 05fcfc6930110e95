"""Configs are inherited outside the repository, with the package installed as a wheel and in editable mode."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bare_python import run_python
from tool_runs import make_shapes

for toolbox in ('mmdet', 'mmseg', 'mmaction'):
    pytest.importorskip(toolbox)
REPOSITORY = Path(__file__).parents[1]

CONFIGS = {
    'det/htc_swinv2_t.py': 'HybridTaskCascade',
    'seg/upernet_swinv2_t.py': 'EncoderDecoder',
    'video/swinv2_t_k400_224x224x32.py': 'Recognizer3D',
}
USER_CONFIG = """
_base_ = {base}
model = dict(backbone=dict(drop_path_rate=0.125))
pipeline = [*_base_.train_pipeline]  # its type depends on the way the base was named
train_dataloader = dict(dataset=dict(pipeline=pipeline))
"""
CHECK = """
import sys, torch, swinv2_mm
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.hub import get_config, get_model
from mmengine.registry import MODELS, init_default_scope
print('package', swinv2_mm.__path__[0])
name = 'swinv2_mm::det/htc_swinv2_demo.py'
print('hub', get_config(name).model.type, type(get_model(name)).__name__)
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
    """The wheel, installed in a folder. It is built in a copy: setuptools writes build/ and an .egg-info there."""
    folder = tmp_path_factory.mktemp('wheel')
    source = folder / 'source'
    for name in ('swinv2_mm', 'configs', 'tools'):
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True)
    for name in ('model-index.yml', 'pyproject.toml', 'setup.cfg', 'README.md', 'LICENSE'):
        shutil.copy(REPOSITORY / name, source)
    pip = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check']
    subprocess.run([*pip, 'wheel', '--no-deps', '--no-build-isolation', '-w', folder, source], check=True)
    subprocess.run([*pip, 'install', '--no-deps', '--target', folder / 'site', *folder.glob('*.whl')], check=True)
    return folder / 'site'


def check_names(package: Path, folder: Path, path: tuple = ()) -> None:
    """Every way to name a config works in an interpreter that imports the package from `package`."""
    _, seg, video = CONFIGS
    bases = [(config, f"'swinv2_mm::{config}'") for config in CONFIGS]
    bases.append((seg, repr(os.path.relpath(f'{package}/.mim/configs/{seg}', folder))))
    bases.append((video, f"[__import__('swinv2_mm').config_path('{video}')]"))
    paths, expected = [], [f'package {package}', 'hub HybridTaskCascade HybridTaskCascade']
    for number, (config, base) in enumerate(bases):
        paths.append(folder / f'{number}.py')
        paths[-1].write_text(USER_CONFIG.format(base=base))
        expected.append(f'{paths[-1]} {CONFIGS[config]} 0.125')
    result = run_python(CHECK, *paths, cwd=folder, path=path)
    assert result.returncode == 0, result.stderr[-4000:]
    assert set(expected) <= set(result.stdout.splitlines())


def test_config_names_of_an_editable_install(tmp_path):
    check_names(REPOSITORY / 'swinv2_mm', tmp_path)


@pytest.mark.slow
def test_config_names_of_a_wheel(wheel_site, tmp_path):
    check_names(wheel_site / 'swinv2_mm', tmp_path, path=(wheel_site,))


@pytest.mark.filterwarnings('ignore::setuptools.warnings.SetuptoolsDeprecationWarning')
def test_wheel_has_all_modules_configs_and_tools(monkeypatch):
    """The files that setuptools selects, without building a wheel."""
    setuptools = pytest.importorskip('setuptools')
    monkeypatch.chdir(REPOSITORY)
    distribution = setuptools.Distribution(dict(script_name='setup.py'))
    distribution.parse_config_files()
    build = distribution.get_command_obj('build_py')
    build.ensure_finalized()
    selected = {Path(path).resolve() for _, _, path in build.find_all_modules()}
    selected |= {Path(source, name).resolve() for _, source, _, names in build.data_files for name in names}
    files = [REPOSITORY / 'model-index.yml']
    for folder in ('configs', 'tools', 'swinv2_mm'):
        files += [path for path in (REPOSITORY / folder).rglob('*') if path.suffix in ('.py', '.sh', '.yml', '.md')]
    assert len(files) > 100
    assert {path.resolve() for path in files} <= selected


def test_config_path_of_an_unknown_config_lists_the_configs():
    import swinv2_mm

    with pytest.raises(FileNotFoundError, match=r"no config 'det/htc_swinv2_x.py'; it has .*det/htc_swinv2_t.py"):
        swinv2_mm.config_path('det/htc_swinv2_x.py')


@pytest.mark.slow
def test_mim_train_from_the_wheel(wheel_site, tmp_path):
    """`mim train` looks for a package next to its metadata: a wheel works, an editable install does not."""
    env = os.environ | dict(PYTHONPATH=str(wheel_site))
    make_shapes(tmp_path / 'data', train=4, val=2, size=64)
    (tmp_path / 'user.py').write_text("_base_ = 'swinv2_mm::det/htc_swinv2_demo.py'\n")
    options = ['data_root=data/', 'train_cfg.max_epochs=1', 'train_dataloader.batch_size=2']
    mim = [Path(sys.executable).parent / 'mim', 'train', 'swinv2_mm', 'user.py', '--gpus', '0', '--work-dir', 'out']
    result = subprocess.run(
        [*mim, '--cfg-options', *options], cwd=tmp_path, env=env, text=True, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert (tmp_path / 'out' / 'last_checkpoint').exists()
