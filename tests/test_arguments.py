"""Constructors name invalid arguments, and accept valid ones unchanged."""

import ast
import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import peer_packages
import pytest
from mmengine.config import ConfigDict
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS, Registry

import swinv2_mm
from swinv2_mm import registry
from swinv2_mm.arguments import Positive, Rate, arguments_of, check_arguments, check_value
from swinv2_mm.engine import AtomicCheckpointHook, ReproducibleResumeHook
from swinv2_mm.models import SwinTransformer3DV2, SwinTransformerV2
from swinv2_mm.models.foreign import FOREIGN_ARGUMENTS

PACKAGE = Path(swinv2_mm.__file__).parent
ARCH = dict(embed_dims=16, depths=(1, 1), num_heads=(1, 2))


@check_arguments(foreign=dict(colour='write tint'))
class Base:
    def __init__(self, size: Positive, rate: Rate = 0.1, *, tint: str | None = None) -> None:
        self.values = size, rate, tint


@check_arguments()
class Derived(Base):
    def __init__(self, *args, flags: Sequence[bool] = (), **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.flags = flags


# ---------------------------------------------------------------- signatures and subclasses


def test_check_arguments_keeps_signature_name_and_docstring():
    def __init__(self, a: int, *, b: str = 'c') -> None:
        """Doc."""

    cls = check_arguments()(type('Some', (), dict(__init__=__init__, __module__=__name__)))
    assert inspect.signature(cls.__init__) == inspect.signature(__init__)
    assert (cls.__init__.__name__, cls.__init__.__doc__) == ('__init__', 'Doc.')
    assert list(inspect.signature(SwinTransformerV2).parameters)[:3] == [
        'arch',
        'window_size',
        'pretrained_window_sizes',
    ]
    assert inspect.signature(AtomicCheckpointHook) == inspect.signature(CheckpointHook)
    assert not inspect.signature(ReproducibleResumeHook).parameters


def test_check_arguments_passes_positional_and_keyword_arguments():
    assert Base(3, tint='red').values == (3, 0.1, 'red')
    derived = Derived(3, 0, flags=[True])
    assert (derived.values, derived.flags) == ((3, 0, None), [True])


def test_arguments_of_includes_base_classes():
    assert list(arguments_of(Derived)) == ['size', 'rate', 'tint', 'flags']
    assert {'interval', 'save_best'} <= arguments_of(AtomicCheckpointHook).keys()


def test_check_arguments_in_a_subclass_with_further_arguments():
    class Mine(SwinTransformerV2):
        def __init__(self, *args, mine: int = 0, **kwargs):
            super().__init__(*args, **kwargs)
            self.mine = mine

    assert Mine(ARCH, out_indices=[1], mine=1.5).mine == 1.5
    with pytest.raises(TypeError, match=r'^Mine has no argument windowsize \(did you mean window_size\?\)'):
        Mine(ARCH, windowsize=4)


def test_check_arguments_with_cooperative_inheritance():
    class Sibling(CheckpointHook):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.called = True

    class Both(AtomicCheckpointHook, Sibling):
        pass

    assert Both(interval=2).called


# ---------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ('cls', 'args', 'kwargs', 'error', 'message'),
    [
        (Base, (3,), dict(colour=1), TypeError, 'Base has no argument colour (write tint). Its arguments are size,'),
        (Base, (3,), dict(tnt=1, x=2), TypeError, 'no argument tnt (did you mean tint?); x. Its arguments are'),
        (Derived, (3,), dict(flag=1), TypeError, 'Derived has no argument flag (did you mean flags?)'),
        (Base, (), {}, TypeError, 'Base needs the argument size'),
        (Base, (0,), {}, ValueError, 'size must be at least 1, got 0'),
        (Base, (3.0,), {}, TypeError, 'size must be a whole number, got 3.0 of type float'),
        (Derived, (True,), {}, TypeError, 'size must be a whole number, got True of type bool'),
        (Base, (3, 1), {}, ValueError, 'rate must lie in [0, 1), got 1'),
        (Base, (3, '0.2'), {}, TypeError, "rate must be a number, got '0.2' of type str"),
        (Base, (3, float('nan')), {}, ValueError, 'rate must lie in [0, 1), got nan'),
        (Base, (3,), dict(tint=3), TypeError, 'tint must be a string or None, got 3 of type int'),
        (Derived, (3,), dict(flags='ab'), TypeError, "flags must be a list, got 'ab' of type str"),
        (Derived, (3,), dict(flags=(True, 0)), TypeError, 'flags[1] must be True or False, got 0 of type int'),
    ],
)
def test_check_arguments_names_argument_value_and_hint_in_one_line(cls, args, kwargs, error, message):
    with pytest.raises(error) as raised:
        cls(*args, **kwargs)
    assert message in str(raised.value)
    assert '\n' not in str(raised.value)
    assert type(raised.value) is error  # mmengine re-raises an error of the same type


@pytest.mark.parametrize(
    ('value', 'hint'),
    [
        ([1, 2], tuple[int, int]),
        ((dict(a=1),), list[dict]),
        (ConfigDict(a=1), dict),
        (np.int64(3), Positive),
        (np.float32(0.5), Rate),
        (0, float),
        (None, int | None),
        ([[1, 2], 3], int | Sequence[int | Sequence[int]]),
        (range(2), Sequence[int]),
        (np.array([1, 2]), Sequence[Positive]),
        ('anything', type),
    ],
)
def test_check_value_accepts_values_of_configs(value, hint):
    check_value('it', value, hint)


def test_check_value_rejects_a_tuple_of_another_length():
    with pytest.raises(ValueError, match=r'it must have 2 entries, got \(1, 2, 3\)'):
        check_value('it', (1, 2, 3), tuple[int, int])


def test_check_arguments_uses_only_hints_of_numbers_of_other_packages():
    assert AtomicCheckpointHook(interval=2, save_best=['acc'], save_last=1).save_last == 1
    with pytest.raises(TypeError, match="interval must be a number, got '2' of type str"):
        AtomicCheckpointHook(interval='2')
    with pytest.raises(TypeError, match=r'AtomicCheckpointHook has no argument intervall \(did you mean interval\?\)'):
        HOOKS.build(dict(type='swinv2_mm.AtomicCheckpointHook', intervall=2))
    with pytest.raises(TypeError, match='ReproducibleResumeHook has no argument seed. Its arguments are none'):
        ReproducibleResumeHook(seed=0)
    assert isinstance(ReproducibleResumeHook(), Hook)


# ---------------------------------------------------------------- all constructors


def public_classes() -> dict[str, type]:
    """Classes available in a config: registered ones, and those given by their full path."""
    for path in PACKAGE.glob('[mepd]*/*.py'):  # models, engine, parallel, datasets
        importlib.import_module(f'swinv2_mm.{path.parent.name}.{path.stem}')
    found = {}
    for node in vars(registry).values():
        if isinstance(node, Registry) and node.scope == 'swinv2_mm':
            found |= {key: cls for key, cls in node.module_dict.items() if cls.__module__.startswith('swinv2_mm.')}
    paths = ('datasets.video.VideoDataset', 'engine.video_visualization.VideoVisualizationHook')
    for module, name in (path.rsplit('.', 1) for path in paths):
        found[name] = getattr(importlib.import_module(f'swinv2_mm.{module}'), name)
    return found


def test_check_arguments_decorates_every_class_available_in_a_config():
    for package in ('mmdet', 'mmseg', 'mmaction', 'decord'):
        pytest.importorskip(package)
    classes = public_classes()
    assert len(classes) >= 19
    classes['VideoVisualizationHook'].__init__.check('it', {}, True, 10, True, None)  # in mmaction's order
    classes['VideoVisualizationHook'].__init__.check('it', dict(draw_gt=False, fps=3))
    for name, cls in classes.items():
        with pytest.raises(TypeError, match=rf'^{name} has no argument nonsense\. Its arguments are ') as error:
            cls.__init__(cls.__new__(cls), nonsense=1)
        assert '\n' not in str(error.value)


# ---------------------------------------------------------------- other Swin Transformers

# mmpretrain 1.2.0
MMPRETRAIN = 'img_size drop_rate use_abs_pos_embed interpolate_mode pad_small_map norm_cfg stage_cfgs patch_cfg'
# other names of such arguments, in timm's factories, the official code and its configs
ELSEWHERE = (
    'pretrained_window_size drop_path features_only ape use_checkpoint window_sizes output_cls_token hidden_size '
    'embed_dims pretrained_cfg fused_window_process'
)


SITE = Path(inspect.getfile(CheckpointHook)).parents[2]


def arguments_in(path: Path, name: str) -> set[str]:
    """Arguments of a class, or fields of a dataclass, parsed instead of imported: other tests need them unimported."""
    (cls,) = [node for node in ast.parse(path.read_text()).body if getattr(node, 'name', None) == name]
    for node in cls.body:
        if getattr(node, 'name', None) == '__init__':
            return {arg.arg for arg in (*node.args.args, *node.args.kwonlyargs)} - {'self'}
    fields = {node.target.id for node in cls.body if isinstance(node, ast.AnnAssign)}
    return {field for field in fields if not field.startswith('_')}


@pytest.mark.parametrize(
    ('path', 'name'),
    [
        ('mmdet/models/backbones/swin.py', 'SwinTransformer'),
        ('mmseg/models/backbones/swin.py', 'SwinTransformer'),
        ('mmaction/models/backbones/swin.py', 'SwinTransformer3D'),
        ('timm/models/swin_transformer.py', 'SwinTransformer'),
        ('timm/models/swin_transformer_v2.py', 'SwinTransformerV2'),
        ('torchvision/models/swin_transformer.py', 'SwinTransformer'),
        ('transformers/models/swinv2/configuration_swinv2.py', 'Swinv2Config'),
    ],
)
def test_foreign_arguments_cover_other_implementations(path, name):
    found = [folder / path for folder in (SITE, Path(peer_packages.FOLDER)) if (folder / path).exists()]
    if not found:
        pytest.skip(f'{path.split("/")[0]} is not installed')
    names = arguments_in(found[0], name)
    assert len(names) > 8
    assert names - arguments_of(SwinTransformerV2).keys() <= FOREIGN_ARGUMENTS.keys()


@pytest.mark.parametrize('cls', [SwinTransformerV2, SwinTransformer3DV2])
def test_foreign_arguments_are_in_the_error_message(cls):
    assert set((MMPRETRAIN + ' ' + ELSEWHERE).split()) <= FOREIGN_ARGUMENTS.keys()
    for name, hint in FOREIGN_ARGUMENTS.items():
        with pytest.raises(TypeError) as error:
            cls(**{name: 1})
        assert str(error.value).startswith(f'{cls.__name__} has no argument {name} ({hint}). Its arguments are arch')


def test_foreign_arguments_suggest_existing_arguments():
    ours = arguments_of(SwinTransformerV2).keys()
    assert not ours & FOREIGN_ARGUMENTS.keys()
    for hint in FOREIGN_ARGUMENTS.values():
        words = {word.strip('=.,;()').split('=')[0] for word in hint.split()}
        assert hint.startswith('leave it out') or words & ours, hint
