"""mmengine's FlexibleRunner with the fixes that DeepSpeed training needs."""

import copy
from collections.abc import Mapping

from mmengine.runner import FlexibleRunner as MMEngineFlexibleRunner

from swinv2_mm.arguments import check_arguments
from swinv2_mm.registry import RUNNERS, STRATEGIES

# options of a config that Runner uses and FlexibleRunner ignores
IGNORED = ('activation_checkpointing', 'compile', 'efficient_conv_bn_eval', 'model_wrapper_cfg', 'sync_bn')


@RUNNERS.register_module()
@check_arguments()
class FlexibleRunner(MMEngineFlexibleRunner):
    """mmengine's FlexibleRunner, which leaves distributed training to a strategy.

        runner_type = 'swinv2_mm.FlexibleRunner'
        strategy = dict(type='swinv2_mm.DeepSpeedStrategy', zero_optimization=dict(stage=2))

    As in Runner, checkpoints are loaded after the hooks' `before_run`. mmengine's class loads them earlier, when hooks
    that modify the loaded checkpoint are not ready: EMAHook has no `ema_model` yet (no upstream issue is known).
    """

    @classmethod
    def from_cfg(cls, cfg: Mapping) -> 'FlexibleRunner':
        """Build a runner from a config.

        Raises:
            ImportError: See `check`.
            ValueError: See `check`.
        """
        cls.check(cfg)
        cfg = copy.deepcopy(cfg)
        cfg.setdefault('env_cfg', dict(dist_cfg=dict(backend='nccl')))  # as in Runner; mmengine fails without one
        return super().from_cfg(cfg)

    @staticmethod
    def check(cfg: Mapping) -> None:
        """Check that no option of the config would be ignored, and that its strategy supports the config.

        Raises:
            ImportError: The strategy needs a package that is not installed.
            ValueError: Anything else.
        """
        for option in IGNORED:
            if cfg.get(option):
                raise ValueError(
                    f'{option}={cfg[option]!r} has no effect with runner_type={cfg["runner_type"]}: set {option}=None, '
                    'or train without runner_type and strategy'
                )
        strategy = STRATEGIES.get(cfg['strategy']['type'])
        if hasattr(strategy, 'check'):
            strategy.check(cfg)

    def load_or_resume(self) -> None:
        """Do nothing yet: this is called before `before_run`."""

    def call_hook(self, fn_name: str, **kwargs) -> None:
        """Call a method of all hooks; after `before_run`, load or resume the checkpoint."""
        super().call_hook(fn_name, **kwargs)
        if fn_name == 'before_run':
            super().load_or_resume()
