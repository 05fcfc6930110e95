"""A hook that ends a training at the first loss or gradient that is infinite or NaN."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import all_gather_object, all_reduce, barrier, get_rank, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.structures import BaseDataElement
from torch import Tensor

from swinv2_mm.arguments import check_arguments
from swinv2_mm.registry import HOOKS

FILE_KEYS = ('img_path', 'filename', 'frame_dir')  # of an image, a video, a folder of frames
FILES_SHOWN = 16
PLAIN = (str, int, float, bool, type(None))


@HOOKS.register_module()
@check_arguments()
class TerminateOnNonFiniteHook(Hook):
    """End the training at the first loss or gradient that is infinite or NaN, before the weights are updated.

    A FloatingPointError names the iteration, the loss or the parameter, and the files of the batch. If several
    gradients are not finite, it names the parameter that comes last in the model: the backward pass reached it first.
    All processes end together, with the same message, even if the loss of only one of them is not finite. Files are
    those in the data samples: PackActionInputs of mmaction packs them with `meta_keys=('img_shape', 'filename')`.

    Gradients are checked after each backward pass and before they are clipped: a norm that is NaN makes all of them
    NaN. In fp16 they may overflow: the loss scaler skips these iterations and lowers its scale, and only once that is
    at most 1 an infinite gradient is an error. DeepSpeed does not show its gradients, so only losses are checked there.

    Args:
        keep_batch: Whether to write the batch of each process to the work folder, as the data loader returned it.
            `torch.load(path, weights_only=True)` gives it back as tensors, dicts, lists, strings and numbers: data
            samples become dicts of their entries, and instance masks become tensors (N, H, W).

    Examples:
        >>> custom_hooks = [dict(type='swinv2_mm.TerminateOnNonFiniteHook', keep_batch=True)]
    """

    def __init__(self, keep_batch: bool = False) -> None:
        self.keep_batch = keep_batch
        self._batch = self._losses = None
        self._installed = ExitStack()  # removes the check when it is closed

    def before_train(self, runner) -> None:
        """Add the check to the backward pass."""
        self._remove()  # after an exception or Ctrl-C, mmengine does not call `after_train`
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self._parameters = list(model.named_parameters())  # also those that are unfrozen later
        self._installed.callback(model.register_forward_hook(self._remember_losses).remove)
        # no hook of mmengine runs between the backward pass and the clipping of gradients
        wrapper = runner.optim_wrapper
        wrapper.backward = functools.partial(self._backward, runner, wrapper.backward)
        self._installed.callback(delattr, wrapper, 'backward')  # the method of the class remains

    def after_train(self, runner) -> None:
        """Remove the check."""
        self._remove()

    def _remove(self) -> None:
        self._installed.close()
        self._batch = self._losses = None

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Remember the batch."""
        self._batch = data_batch

    def _remember_losses(self, model: torch.nn.Module, args: tuple, losses: dict) -> None:
        if model.training:
            self._losses = losses

    def _backward(self, runner, backward: Callable, loss: Tensor, **kwargs) -> None:
        """Run the backward pass, then check loss and gradients.

        Raises:
            FloatingPointError: The loss or a gradient of any process is not finite.
        """
        backward(loss, **kwargs)
        non_finite = (~self._total(loss).isfinite()).float()
        all_reduce(non_finite, op='max')
        if non_finite:
            self._terminate(runner, loss)
        self._batch = self._losses = None  # so that their memory is freed

    def _total(self, loss: Tensor) -> Tensor:
        """A number that is infinite or NaN if the loss or a gradient is; reading it is the only wait for the GPU."""
        gradients = [gradient for _, gradient in self._gradients()]
        norms = torch._foreach_norm(gradients) if gradients else []  # as in torch.nn.utils.clip_grad_norm_
        return torch.stack([loss.detach().abs().float(), *(norm.to(loss.device).float() for norm in norms)]).sum()

    def _gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Name and gradient of each parameter; with FSDP, the shard of this process."""
        for name, parameter in self._parameters:
            gradient = parameter.grad
            if gradient is not None:
                yield name, gradient.to_local() if hasattr(gradient, 'to_local') else gradient

    def _terminate(self, runner, loss: Tensor) -> None:
        """Find what is not finite and raise the error; returns if that is only the sum of the norms.

        Raises:
            FloatingPointError: See `_backward`.
        """
        path = Path(runner.work_dir, f'non_finite_iter_{runner.iter + 1}_rank_{get_rank()}.pth')
        report = dict(
            losses=non_finite_losses(self._losses or {}, loss),
            gradients=[] if may_overflow(runner.optim_wrapper) else self._non_finite_gradients(),
            files=list(find_files(self._batch)),
            path=str(path),
        )
        reports = all_gather_object(report)
        culprits = [r for r in reports if r['losses']] or [r for r in reports if r['gradients']]
        if not culprits:
            return
        message = f'a loss or gradient of iteration {runner.iter + 1} is not finite: {describe(culprits)}'
        if self.keep_batch:
            paths = [r['path'] for r in culprits]
            if str(path) in paths:
                torch.save(to_data(self._batch), path)
            message += f'; kept in {join(paths)}'
        if is_main_process():
            runner.logger.error(message)
        self._remove()
        for _, parameter in self._parameters:
            parameter.grad = None  # else a training that is started again in this process would add to it
        barrier()  # when a process fails, the launcher ends the others
        raise FloatingPointError(message)

    def _non_finite_gradients(self) -> list[tuple[int, str, float]]:
        """Position and name of each parameter with such a gradient, and the first value that is not finite."""
        found = []
        for position, (name, gradient) in enumerate(self._gradients()):
            values = gradient[~gradient.isfinite()]
            if len(values):
                found.append((position, name, values[0].item()))
        return found


def may_overflow(optim_wrapper) -> bool:
    """Whether gradients are computed in fp16, with a loss scale that can still be lowered."""
    scaler = getattr(optim_wrapper, 'loss_scaler', None)
    return scaler is not None and optim_wrapper.cast_dtype in (None, torch.float16) and scaler.get_scale() > 1


def non_finite_losses(losses: dict[str, Tensor | list[Tensor]], total: Tensor) -> dict[str, float]:
    """Names and values of the losses of a model that are not finite; `loss` if only their sum is not."""
    values = {}
    for name, value in losses.items():
        if 'loss' in name:  # as in mmengine; others, such as accuracies, are not trained
            parts = [value] if isinstance(value, Tensor) else value
            values[name] = sum(part.mean().item() for part in parts)
    values = {name: value for name, value in values.items() if not math.isfinite(value)}
    return values or ({} if total.isfinite() else dict(loss=total.item()))


def describe(reports: Sequence[dict]) -> str:
    """Text of what is not finite, and of the batches of the processes that have reported it."""
    losses = {name: value for report in reports for name, value in report['losses'].items()}
    what = ', '.join(f'{name} is {value}' for name, value in losses.items())
    if not losses:
        gradients = {gradient[:2]: gradient[2] for report in reports for gradient in report['gradients']}
        (position, name), value = max(gradients.items())
        more = f', as are {len(gradients) - 1} more' if len(gradients) > 1 else ''
        what = f'the gradient of {name} is {value}{more}'
    files = [file for report in reports for file in report['files']]
    return f'{what}, in the batch {join(files) or "(the pipeline names no files: see meta_keys of its last step)"}'


def join(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f' and {len(names) - FILES_SHOWN} more' if len(names) > FILES_SHOWN else ''
    return ', '.join(names[:FILES_SHOWN]) + more


def find_files(batch) -> Iterator[str]:
    """Yield the files of the data samples at any depth of a batch."""
    if isinstance(batch, BaseDataElement):
        yield from (str(batch.metainfo[key]) for key in FILE_KEYS if key in batch.metainfo)
    elif isinstance(batch, (dict, list, tuple)):
        for item in batch.values() if isinstance(batch, dict) else batch:
            yield from find_files(item)


def to_data(value):
    """A batch as tensors on the CPU, dicts, lists, strings and numbers; what has no such form becomes its `str`."""
    if isinstance(value, BaseDataElement):
        return to_data(dict(value.items(), metainfo=value.metainfo))
    if isinstance(value, dict):
        return {key: to_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_data(item) for item in value]
    if isinstance(value, np.ndarray) and value.dtype.kind in 'biufc':
        return torch.from_numpy(value.copy())
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if hasattr(value, 'to_tensor'):  # instance masks of mmdet
        return value.to_tensor(torch.uint8, 'cpu')
    value = getattr(value, 'tensor', value)  # boxes of mmdet
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()  # a view would be saved with all that it is a view of
    return value if type(value) in PLAIN else str(value)
