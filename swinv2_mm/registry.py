"""Registries of swinv2_mm, children of mmengine's.

In a config of any toolbox, `type='swinv2_mm.SwinTransformerV2'` finds the class without `custom_imports`: the prefix
makes mmengine import this module, and the first look-up imports `locations`. This file imports only mmengine, because
mmengine swallows an ImportError raised here and then reports a missing name instead.
"""

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODEL_WRAPPERS as MMENGINE_MODEL_WRAPPERS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import RUNNERS as MMENGINE_RUNNERS
from mmengine.registry import STRATEGIES as MMENGINE_STRATEGIES
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

MODELS = Registry('model', parent=MMENGINE_MODELS, scope='swinv2_mm', locations=['swinv2_mm.models'])
# without `locations`: transforms import a toolbox, so a config gives their full path
TRANSFORMS = Registry('transform', parent=MMENGINE_TRANSFORMS, scope='swinv2_mm')
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='swinv2_mm', locations=['swinv2_mm.engine'])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='swinv2_mm',
    locations=['swinv2_mm.engine'],
)
MODEL_WRAPPERS = Registry(
    'model_wrapper', parent=MMENGINE_MODEL_WRAPPERS, scope='swinv2_mm', locations=['swinv2_mm.parallel.sharding']
)
RUNNERS = Registry(
    'runner',
    parent=MMENGINE_RUNNERS,
    scope='swinv2_mm',
    locations=['swinv2_mm.parallel.flexible_runner', 'swinv2_mm.parallel.sharding'],
)
STRATEGIES = Registry(
    'strategy', parent=MMENGINE_STRATEGIES, scope='swinv2_mm', locations=['swinv2_mm.parallel.deepspeed']
)
