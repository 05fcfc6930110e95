"""DeepSpeed's ZeRO for any config, with an unchanged training recipe.

ZeRO ("ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", Rajbhandari et al. 2020, Sec. 5) shards
the model states among the processes: the optimizer states (stage 1; the Swin V2 paper trained SwinV2-G with it, Sec.
3.4), also the gradients (stage 2), and also the parameters (stage 3).

mmengine's strategy of the same name cannot be built with DeepSpeed 0.19, because it imports an optimizer that was
removed. It reads the recipe from DeepSpeed's configuration, neither loads ordinary checkpoints (open-mmlab/mmengine
#1499) nor writes them (#1408), and calls no hooks when it saves and loads.
"""

import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import mmengine
import torch
from mmengine._strategy import BaseStrategy
from mmengine._strategy.deepspeed import DeepSpeedOptimWrapper, MMDeepSpeedEngineWrapper
from mmengine.device import get_device
from mmengine.dist import barrier, init_dist, is_main_process
from mmengine.logging import MessageHub
from mmengine.optim import BaseOptimWrapper
from mmengine.runner.checkpoint import CheckpointLoader, _load_checkpoint_to_model, save_checkpoint, weights_to_cpu
from mmengine.utils import get_git_hash
from torch import nn

from swinv2_mm.arguments import check_arguments
from swinv2_mm.checkpoints.files import FOLDER_WEIGHTS, read_checkpoint
from swinv2_mm.registry import STRATEGIES

try:
    import deepspeed
except ImportError:
    deepspeed = None

FOLDER_TRAINING = 'training.pth'
FOLDER_OPTIMIZER = 'optimizer_rank{}.pth'
# options of DeepSpeed's configuration that optim_wrapper and train_dataloader set
RECIPE = (
    'amp',
    'bf16',
    'fp16',
    'gradient_accumulation_steps',
    'gradient_clipping',
    'inputs_to_half',
    'optimizer',
    'scheduler',
    'torch_autocast',
    'train_batch_size',
    'train_micro_batch_size_per_gpu',
)
# Python objects in the state of DeepSpeed's optimizers; only the scaler is read again, and it never changes
NO_DATA = ('loss_scaler', 'param_slice_mappings', 'zero_stage')


@STRATEGIES.register_module()
@check_arguments()
class DeepSpeedStrategy(BaseStrategy):
    """Trains with ZeRO; everything else is configured as for a plain Runner.

        runner_type = 'swinv2_mm.FlexibleRunner'
        strategy = dict(type='swinv2_mm.DeepSpeedStrategy', zero_optimization=dict(stage=2))

    The recipe comes from the config's `optim_wrapper`, an OptimWrapper or an AmpOptimWrapper of dtype bfloat16: its
    optimizer and constructor, `clip_grad` by the global norm of the gradients, and `accumulative_counts`. Under
    AmpOptimWrapper, parameters, gradients and communication stay in fp32, as with DistributedDataParallel. One
    difference: if training ends between two multiples of `accumulative_counts`, the last accumulated gradients are not
    applied.

    A checkpoint is a folder: `weights.pth`, which loads like the checkpoint of a plain training; `training.pth`, the
    training state to resume from; and one file per process with its shard of the optimizer states. DeepSpeed's own
    files are not written: they would repeat the same data, and loading them executes code from them. Best checkpoints,
    and those written with `save_optimizer=False`, are plain files.

    Args:
        zero_optimization: DeepSpeed's section of that name, with `stage` 1, 2 or 3.
        config: Further sections of DeepSpeed's configuration, other than those of the recipe.
        **kwargs: Arguments that FlexibleRunner adds.

    Raises:
        ImportError: DeepSpeed is not installed.
        TypeError: An argument is unknown or of another type.
        ValueError: `config` sets an option of the recipe, or the stage is not 1, 2 or 3.
    """

    def __init__(self, *, zero_optimization: dict, config: dict | None = None, **kwargs) -> None:
        require_deepspeed()
        _check_sections(config or {}, zero_optimization)
        super().__init__(**kwargs)
        # DeepSpeed's default is to print every tenth step
        self.config = {'steps_per_print': None, **(config or {}), 'zero_optimization': dict(zero_optimization)}

    def _setup_distributed(self, launcher: str, **kwargs) -> None:
        init_dist(launcher, **kwargs)  # DeepSpeed uses this process group

    @staticmethod
    def check(cfg: Mapping) -> None:
        """Check a config before the training starts.

        Raises:
            ImportError: DeepSpeed is not installed.
            ValueError: See `DeepSpeedStrategy` and `translate`; or EMAHook would copy sharded parameters.
        """
        require_deepspeed()
        zero = cfg['strategy'].get('zero_optimization', {})
        _check_sections(cfg['strategy'].get('config', {}), zero)
        if cfg.get('optim_wrapper'):
            translate(cfg['optim_wrapper'])
        if zero['stage'] == 3 and any('EMAHook' in str(hook.get('type')) for hook in cfg.get('custom_hooks') or ()):
            raise ValueError(
                'EMAHook copies the parameters, which are sharded at ZeRO stage 3: use stage 1 or 2 '
                '(strategy.zero_optimization.stage=2), or leave the hook out'
            )

    # ---------------------------------------------------------------- model and optimizer

    def prepare(
        self,
        model: nn.Module | dict,
        *,
        optim_wrapper: BaseOptimWrapper | dict | None = None,
        param_scheduler: dict | list | None = None,
        compile: dict | bool = False,
        dispatch_kwargs: dict | None = None,
    ) -> nn.Module | list:
        """Build model, optimizer and schedulers, and initialise DeepSpeed's engine; a test has no engine and no shards.

        Unlike mmengine's, scales the learning rate if `auto_scale_lr` is enabled.

        Raises:
            ValueError: `optim_wrapper` cannot be translated, see `translate`; or there is no launcher.
        """
        if self._prepared:
            return self._prepared_components()
        self.dispatch_kwargs.update(dispatch_kwargs or {})
        model = self._init_model_weights(self.build_model(model))
        if optim_wrapper is None:
            self.model = model.to(get_device())
        else:
            self._start_engine(model, optim_wrapper)
            self._scale_lr()
        if param_scheduler is not None:
            self.param_schedulers = self.build_param_scheduler(param_scheduler, self.optim_wrapper)
        self._prepared = True
        return self._prepared_components()

    def _start_engine(self, model: nn.Module, optim_wrapper: dict) -> None:
        if not self.distributed:
            raise ValueError(
                'DeepSpeed needs a launcher, even for a single process: tools/dist_train.sh CONFIG 1 (or torchrun and '
                '--launcher pytorch)'
            )
        recipe, sections = translate(optim_wrapper)
        batch_size = self.dispatch_kwargs['train_micro_batch_size_per_gpu']
        self.config.update(sections, train_micro_batch_size_per_gpu=batch_size)
        self.optim_wrapper = self.build_optim_wrapper(recipe, model)
        for group in self.optim_wrapper.optimizer.param_groups:  # frozen ones would take up part of the shards
            group['params'] = [param for param in group['params'] if param.requires_grad]
        # at stage 3 all processes must run modules in the same order; whether losses and RoI layers run depends on the
        # image, and DeepSpeed needs no hooks on modules without parameters
        with _without_hooks(module for module in model.modules() if next(module.parameters(), None) is None):
            engine, self.optim_wrapper.optimizer, *_ = deepspeed.initialize(
                model=model, optimizer=self.optim_wrapper.optimizer, config=self.config
            )
        self.model = self.optim_wrapper.model = EngineWrapper(model=engine)

    # ---------------------------------------------------------------- checkpoints

    def load_checkpoint(
        self,
        filename: str,
        *,
        map_location: str | Callable = 'cpu',
        strict: bool = False,
        revise_keys: Sequence[tuple[str, str]] = ((r'^module\.', ''),),
        callback: Callable | None = None,
    ) -> dict:
        """Load weights from any checkpoint that a plain Runner accepts, or from a folder written by `save_checkpoint`.

        Args:
            filename: File, folder, address, or `swinv2://NAME` of a release.
            map_location: As in `torch.load`.
            strict: Whether the keys of the file and the model must be the same.
            revise_keys: Patterns and replacements for the keys of the file.
            callback: Called with the checkpoint before its weights are loaded.
        """
        checkpoint = CheckpointLoader.load_checkpoint(filename, map_location=map_location, logger=self.logger)
        self._load_weights(checkpoint, strict, revise_keys, callback)
        self.logger.info(f'Load checkpoint from {filename}')
        return checkpoint

    def resume(
        self,
        filename: str,
        *,
        resume_optimizer: bool = True,
        resume_param_scheduler: bool = True,
        map_location: str | Callable = 'default',
        callback: Callable | None = None,
    ) -> dict:
        """Resume from a folder written by `save_checkpoint`, with the same number of processes and the same stage.

        Raises:
            ValueError: It is not such a folder, or it is from another stage or number of processes.
        """
        folder = Path(filename)
        if not (folder / FOLDER_TRAINING).is_file():
            raise ValueError(
                f'{filename} cannot be resumed with DeepSpeed: it has no {FOLDER_TRAINING}; to start from its '
                'weights, set load_from instead of resume'
            )
        training = read_checkpoint(folder / FOLDER_TRAINING)
        self._check_same(training.pop('deepspeed'), filename)
        checkpoint = CheckpointLoader.load_checkpoint(filename, map_location='cpu', logger=self.logger)
        checkpoint = {**checkpoint, **training, 'meta': {**checkpoint['meta'], **training['meta']}}
        self._load_weights(checkpoint, callback=callback)
        if resume_optimizer:
            self._load_optimizer(read_checkpoint(folder / FOLDER_OPTIMIZER.format(self.rank))['optimizer'])
            self.load_optim_state_dict(checkpoint.pop('optim_wrapper'))
        if resume_param_scheduler and hasattr(self, 'param_schedulers'):
            self.load_scheduler_state_dict(checkpoint.pop('param_schedulers'))
        self._resume_seed(checkpoint['meta'].get('seed'))
        self.logger.info(f'Resume checkpoint from {filename}')
        return checkpoint

    def save_checkpoint(
        self,
        filename: str,
        *,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        extra_ckpt: dict | None = None,
        callback: Callable | None = None,
    ) -> None:
        """Write a checkpoint; every process calls this.

        Args:
            filename: Path of the folder, or of the file if the optimizer is left out.
            save_optimizer: Whether to save the optimizer states, so that training can be resumed.
            save_param_scheduler: Whether to save the state of the schedulers.
            extra_ckpt: Further entries: `meta` and `message_hub`.
            callback: Called with the checkpoint before it is written.

        Raises:
            ValueError: The path of the folder is that of a remote storage.
        """
        if save_optimizer and '://' in filename:
            raise ValueError(
                f'{filename}: a checkpoint of DeepSpeed is a folder, which can only be written to a local path'
            )
        checkpoint = dict(extra_ckpt or {})
        checkpoint['meta'] = dict(
            checkpoint.get('meta', {}),
            seed=self.seed,
            time=time.strftime('%Y%m%d_%H%M%S', time.localtime()),
            mmengine_version=mmengine.__version__ + get_git_hash(),
        )
        with self.model.gathered():
            checkpoint['state_dict'] = weights_to_cpu(self.model.module.state_dict())
            if save_param_scheduler and hasattr(self, 'param_schedulers'):
                checkpoint['param_schedulers'] = self.scheduler_state_dict()
            if callback is not None:
                callback(checkpoint)
            if not save_optimizer:
                if is_main_process():
                    save_checkpoint(checkpoint, filename)
                return
            folder = Path(filename)
            if is_main_process():
                folder.mkdir(parents=True, exist_ok=True)
                self._save_folder(checkpoint, folder)
        barrier()
        optimizer = self.optim_wrapper.optimizer.state_dict()
        state = {key: value for key, value in optimizer.items() if key not in NO_DATA}
        torch.save({'optimizer': state}, folder / FOLDER_OPTIMIZER.format(self.rank))

    def _save_folder(self, checkpoint: dict, folder: Path) -> None:
        """Write the state that is the same in all processes: the weights, and the rest of the training state.

        Epoch and iteration are not in the file of weights, so that a plain Runner does not resume from it.
        """
        meta = checkpoint.pop('meta')
        training = {key: meta.pop(key) for key in ('epoch', 'iter') if key in meta}
        save_checkpoint({'meta': meta, 'state_dict': checkpoint.pop('state_dict')}, str(folder / FOLDER_WEIGHTS))
        same = dict(stage=self.model.zero_optimization_stage(), processes=self.world_size)
        save_checkpoint(
            {**checkpoint, 'meta': training, 'optim_wrapper': self.optim_state_dict(), 'deepspeed': same},
            str(folder / FOLDER_TRAINING),
        )

    def _check_same(self, saved: dict, filename: str) -> None:
        """Check that the optimizer states were sharded in the same way; DeepSpeed does not reshard them."""
        now = dict(stage=self.model.zero_optimization_stage(), processes=self.world_size)
        if saved != now:
            raise ValueError(
                f'{filename} cannot be resumed here: it was written at ZeRO stage {saved["stage"]} by '
                f'{saved["processes"]} processes, and this is stage {now["stage"]} with {now["processes"]}. Resume '
                f'with those, or set load_from to load only the weights'
            )

    def _load_weights(
        self,
        checkpoint: dict,
        strict: bool = False,
        revise_keys: Sequence[tuple[str, str]] = ((r'^module\.', ''),),
        callback: Callable | None = None,
    ) -> None:
        if callback is not None:
            callback(checkpoint)
        if not isinstance(self.model, EngineWrapper):  # in a test
            _load_checkpoint_to_model(self.model, checkpoint, strict, revise_keys=revise_keys)
            return
        with self.model.gathered(change=True):
            _load_checkpoint_to_model(self.model.module, checkpoint, strict, revise_keys=revise_keys)
        self.optim_wrapper.optimizer.refresh_fp32_params()  # the optimizer has copies, even of fp32 parameters

    def _load_optimizer(self, state: dict) -> None:
        optimizer = self.optim_wrapper.optimizer
        state['loss_scaler'] = optimizer.loss_scaler
        with self.model.partitioned():
            # a list with the state of each rank, of which DeepSpeed loads that of its own
            optimizer.load_state_dict([state] * self.world_size, load_from_fp32_weights=True)

    def _resume_seed(self, seed: int | None) -> None:
        former = self._randomness.get('seed')
        if seed is None or seed == former:
            return
        if former is not None:
            self.logger.warning(f'randomness.seed={former} of the config is replaced by {seed} of the checkpoint')
        self._randomness.update(seed=seed)
        self._set_randomness(**self._randomness)


class EngineWrapper(MMDeepSpeedEngineWrapper):
    """DeepSpeed's engine with the methods that loops and hooks call; `module` is the wrapped model."""

    def val_step(self, data: dict | tuple | list) -> list:
        """Predict with the module itself, in full precision.

        At stage 3 all parameters are gathered first: which modules run depends on the image (no mask head without
        boxes), and processes that gather different modules would wait for each other forever.
        """
        with self.gathered(), _without_hooks(self.module.modules() if self._is_partitioned else ()):
            return self.module.val_step(data)

    test_step = val_step

    @property
    def _is_partitioned(self) -> bool:
        return self.model.zero_optimization_partition_weights()

    @contextlib.contextmanager
    def gathered(self, change: bool = False) -> Iterator[None]:
        """Gather all parameters in each process; at stages 1 and 2 they always are. A collective operation.

        Args:
            change: Whether to keep the changes that rank 0 makes to them.
        """
        params = list(self.module.parameters()) if self._is_partitioned else []
        with (
            self.partitioned(),
            deepspeed.zero.GatheredParameters(params, modifier_rank=0 if change else None),
        ):
            yield

    @contextlib.contextmanager
    def partitioned(self) -> Iterator[None]:
        """At stage 3, partition all parameters, including the small ones that DeepSpeed keeps gathered."""
        if self._is_partitioned:
            self.model.optimizer.checkpoint_event_prologue()
        yield
        if self._is_partitioned:
            self.model.optimizer.checkpoint_event_epilogue()


@contextlib.contextmanager
def _without_hooks(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Remove the forward hooks of modules and restore them at the end; hooks added meanwhile are dropped."""
    hooks = [(module, module._forward_pre_hooks, module._forward_hooks) for module in modules]
    for module, *_ in hooks:
        module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, before, after in hooks:
            module._forward_pre_hooks, module._forward_hooks = before, after


class OptimWrapper(DeepSpeedOptimWrapper):
    """mmengine's wrapper, which also logs the norm of the gradients as `grad_norm` if they are clipped."""

    def step(self, **kwargs) -> None:
        """Update the parameters once enough gradients have been accumulated."""
        engine = self.model.model
        clips = engine.gradient_clipping() > 0 and engine.is_gradient_accumulation_boundary()
        engine.step()
        if clips:
            MessageHub.get_current_instance().update_scalar('train/grad_norm', float(engine.get_global_grad_norm()))


# ---------------------------------------------------------------- the recipe


def require_deepspeed() -> None:
    """Check that DeepSpeed is installed.

    Raises:
        ImportError: It is not.
    """
    if deepspeed is None:
        raise ImportError('DeepSpeedStrategy needs DeepSpeed: pip install swinv2_mm[deepspeed]')


def translate(optim_wrapper: Mapping) -> tuple[dict, dict]:
    """Split a config's `optim_wrapper` into the config of the optimizer and sections of DeepSpeed's configuration.

    Args:
        optim_wrapper: Config of an OptimWrapper or AmpOptimWrapper.

    Returns:
        Config of an optimizer wrapper for DeepSpeed, and sections of DeepSpeed's configuration.

    Raises:
        ValueError: Not supported with DeepSpeed: another type of wrapper, gradient clipping other than by the 2-norm,
            fp16, or an unknown option.
    """
    recipe = {key: value for key, value in optim_wrapper.items() if value is not None}
    kind = str(recipe.pop('type', 'OptimWrapper')).split('.')[-1]
    clip = dict(recipe.pop('clip_grad', {}))
    sections = dict(
        gradient_accumulation_steps=recipe.pop('accumulative_counts', 1), gradient_clipping=clip.pop('max_norm', 0.0)
    )
    if clip.pop('type', 'norm') != 'norm' or clip.pop('norm_type', 2) != 2 or clip:
        raise ValueError(
            f'optim_wrapper.clip_grad={optim_wrapper["clip_grad"]}: DeepSpeed clips only by the 2-norm of all '
            'gradients, clip_grad=dict(max_norm=...)'
        )
    if kind == 'AmpOptimWrapper':
        sections['torch_autocast'] = _autocast(recipe.pop('dtype', 'float16'))
        for option in ('loss_scale', 'use_fsdp'):  # bfloat16 has the exponents of fp32
            recipe.pop(option, None)
    elif kind != 'OptimWrapper':
        raise ValueError(f'optim_wrapper.type={kind}: with DeepSpeed it must be OptimWrapper or AmpOptimWrapper')
    unknown = recipe.keys() - {'optimizer', 'constructor', 'paramwise_cfg', '_scope_'}
    if unknown:
        raise ValueError(f'optim_wrapper.{min(unknown)} has no counterpart in DeepSpeed: leave it out')
    return dict(recipe, type=OptimWrapper), sections


def _autocast(dtype: str | torch.dtype) -> dict:
    dtype = str(dtype).removeprefix('torch.')
    if dtype != 'bfloat16':
        raise ValueError(
            f'optim_wrapper.dtype={dtype} (the default of AmpOptimWrapper is float16): Swin V2 diverges in fp16 '
            '(open-mmlab/mmpretrain #1862), so DeepSpeed does not accept it; set optim_wrapper.dtype=bfloat16'
        )
    # without safe modules, gradients are reduced in fp32; with them, those of linear layers in bf16
    return dict(enabled=True, dtype=dtype, lower_precision_safe_modules=[])


def _check_sections(options: Mapping, zero: Mapping) -> None:
    for option in RECIPE:
        if option in options:
            raise ValueError(
                f'strategy.config.{option}={options[option]!r}: DeepSpeed takes this from optim_wrapper '
                'and train_dataloader; set it there'
            )
    if zero.get('stage') not in (1, 2, 3):
        raise ValueError(f'strategy.zero_optimization.stage must be 1, 2 or 3, got {zero.get("stage")!r}')
