"""Arrows between the packages point one way, and toolboxes are imported only by the file that extends them."""

import ast
import sys
from pathlib import Path

from bare_python import WITHOUT_OPENMMLAB, run_python

PACKAGE = Path(__file__).parents[1] / 'swinv2_mm'
# what each folder may import from this package
ALLOWED = {
    'ops': {'ops'},
    'checkpoints': {'checkpoints', 'compat', 'openmmlab', 'ops', 'version'},
    'models': {'arguments', 'checkpoints', 'models', 'openmmlab', 'ops', 'registry'},
    'engine': {'arguments', 'engine', 'registry', 'version'},
    'parallel': {'arguments', 'checkpoints', 'compat', 'models', 'parallel', 'registry', 'version'},
    'cli': {'arguments', 'checkpoints', 'cli', 'models', 'ops', 'parallel', 'registry'},
    'datasets': {'arguments', 'datasets', 'registry'},
}
BENCHMARKS = (
    'benchmark_attention',
    'benchmark_backbone',
    'benchmark_memory',
    'benchmark_operator',
    'gpu_tables',
    'kernel_report',
    'tune_kernels',
)
TOOLBOXES = {'mmdet', 'mmseg', 'mmaction', 'mmpretrain'}
EXTENSIONS = {
    'cli/inputs.py': {'mmdet'},
    'datasets/imagenet_v2.py': {'mmpretrain'},
    'datasets/transforms.py': {'mmdet'},
    'datasets/video.py': {'mmaction'},
    'engine/det_visualization.py': {'mmdet'},
    'engine/video_visualization.py': {'mmaction'},
    'models/classification.py': {'mmpretrain'},
    'models/det_tta.py': {'mmdet'},
    'models/detection.py': {'mmdet'},
    'models/pretraining.py': {'mmpretrain'},
    'models/recognition.py': {'mmaction'},
}


def imports(path: Path) -> set[str]:
    """Top-level names of what a file imports, with `swinv2_mm.x` written as '.x'."""
    folder = path.relative_to(PACKAGE).parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            origin = folder[: len(folder) + 1 - node.level]
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            names |= {'swinv2_mm.' + '.'.join((*origin, module)) for module in modules}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    own = {'.' + name.split('.')[1] for name in names if name.startswith('swinv2_mm.')}
    return own | {name.split('.')[0] for name in names if not name.startswith('swinv2_mm')}


def test_folders_import_only_what_lies_below_them():
    for folder, allowed in ALLOWED.items():
        for path in (PACKAGE / folder).rglob('*.py'):
            own = {name[1:] for name in imports(path) if name.startswith('.')}
            assert own <= allowed, f'{path.name} imports {own - allowed}'


def test_modules_of_checkpoints_import_only_those_below_them():
    order = ('layouts', 'conversion', 'backbone', 'pickles', 'files', 'loaders')
    folder = PACKAGE / 'checkpoints'
    assert {path.stem for path in folder.glob('*.py')} == {'__init__', *order}
    for i, module in enumerate(order):
        nodes = ast.walk(ast.parse((folder / f'{module}.py').read_text()))
        siblings = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 1}
        assert siblings <= {None, *order[:i]}, module  # None: errors, from the package itself


def test_ops_need_torch_alone():
    files = {path.relative_to(PACKAGE / 'ops').as_posix(): path for path in (PACKAGE / 'ops').rglob('*.py')}
    found = {name: imports(path) - {'.ops'} - sys.stdlib_module_names for name, path in files.items()}
    assert found.pop('triton/kernels.py') == found.pop('triton/post_norm_kernels.py') == {'triton'}
    assert set.union(*found.values()) == {'torch'}


def test_importing_the_package_imports_no_toolbox():
    result = run_python('import sys, swinv2_mm; print(*sys.modules)')
    loaded = set(result.stdout.split())
    assert 'swinv2_mm.compat' in loaded, result.stderr
    assert not (TOOLBOXES | {'pkg_resources', 'mmcv.ops', 'triton'}) & loaded


def test_importing_its_folders_imports_no_toolbox_no_compiled_op_and_no_kernel():
    """Triton's kernels are imported when they run."""
    folders = ', '.join(f'swinv2_mm.{folder}' for folder in ALLOWED)
    result = run_python(f'import sys, {folders}; print(*sys.modules)')
    loaded = set(result.stdout.split())
    assert {f'swinv2_mm.{folder}' for folder in ALLOWED} <= loaded, result.stderr
    kernels = {'swinv2_mm.ops.triton.kernels', 'swinv2_mm.ops.triton.post_norm_kernels'}
    assert not (TOOLBOXES | kernels | {'torchvision', 'mmcv._ext', 'instaboostfast'}) & loaded


def test_toolboxes_are_imported_only_by_the_files_that_extend_them():
    found = {path.relative_to(PACKAGE).as_posix(): imports(path) & TOOLBOXES for path in PACKAGE.rglob('*.py')}
    assert {name: toolboxes for name, toolboxes in found.items() if toolboxes} == EXTENSIONS


def test_benchmarks_need_nothing_of_openmmlab():
    code = f"""{WITHOUT_OPENMMLAB}
import {', '.join(BENCHMARKS)}
import ours, shapes, torch
shape = shapes.SHAPES['nano']
model = ours.build_backbone(shape, 'reference').eval()
x = torch.rand(1, 3, *shape.size)
same = ours.build_reference_backbone(shape, model).eval()
assert (same(x.double())[0] - model(x)[0]).abs().max() < 1e-4
assert not PACKAGES & {{name.split('.')[0] for name in sys.modules}}
for kwargs in (dict(drop_path_rate=0.1), dict(init_cfg=dict(type='Pretrained', checkpoint='x.pth'))):
    try:
        type(model)('tiny', **kwargs)
    except ImportError as error:
        print(error)
"""
    result = run_python(code, path=(PACKAGE.parent, PACKAGE.parent / 'benchmarks'))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count('needs mmengine>=0.10.0 (not installed), mmcv>=2.0.0 (not installed)') == 2
