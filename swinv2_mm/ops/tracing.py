"""How PyTorch runs a model at the moment: eagerly, compiled, traced, transformed by torch.func, or counted.

Used where a fast path of this package would be wrong in one of these modes, or invisible to it.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace
from torch.utils import _python_dispatch

# since torch 2.3; with `torch.compile` of older ones, only an explicit backend='reference' works
is_compiling = getattr(getattr(torch, 'compiler', None), 'is_compiling', lambda: False)
# decorates functions that torch.compile calls once instead of compiling them
assume_constant_result = getattr(getattr(torch, 'compiler', None), 'assume_constant_result', lambda function: function)


def is_tracing() -> bool:
    """Whether `torch.jit.trace` or an ONNX export runs the model, which support only PyTorch's own operators."""
    return torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()


def is_compiling_or_tracing() -> bool:
    """Whether the operators are captured as a graph: by torch.compile, torch.fx, `torch.jit.trace` or an export."""
    return is_compiling() or is_tracing() or _symbolic_trace._is_fx_tracing_flag


def is_capturing() -> bool:
    """Whether the operators are captured as any graph, CUDA graphs included.

    There, a loop is unrolled, and a cached tensor becomes a constant of the graph.
    """
    return is_compiling_or_tracing() or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def is_transformed() -> bool:
    """Whether `torch.func` or forward-mode AD is active; both support only PyTorch's own operators."""
    if is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def active_flop_counter() -> Any:
    """Return the active `FlopCounterMode`, or None.

    It counts an operator by a registered formula, and does not see the operators that a custom one calls.
    """
    # torch.compile counts the operators of its graph; importing the module here would import Triton
    if is_compiling() or 'torch.utils.flop_counter' not in sys.modules:
        return None
    modes = _python_dispatch._get_current_dispatch_mode_stack()
    counters = (mode for mode in modes if type(mode).__name__.lstrip('_') == 'FlopCounterMode')
    mode = next(counters, None)
    return getattr(mode, 'counter', mode)  # newer versions of torch wrap the counter in a private mode


def is_counting_flops() -> bool:
    """Whether a `FlopCounterMode` is active."""
    return active_flop_counter() is not None


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether a module has forward or backward hooks of its own."""
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return any(hooks)


def has_global_hooks() -> bool:
    """Whether there are global forward or backward hooks, which run for all modules."""
    kinds = 'forward_pre_hooks', 'forward_hooks', 'backward_pre_hooks', 'backward_hooks'
    return any(getattr(torch.nn.modules.module, f'_global_{kind}') for kind in kinds)


def are_plain(modules: Iterable[torch.nn.Module], kinds: Sequence[type]) -> bool:
    """Whether modules are of exactly these classes, without hooks of their own and without a patched `forward`."""
    modules = list(modules)
    changed = any(has_hooks(module) or 'forward' in vars(module) for module in modules)
    return [type(module) for module in modules] == list(kinds) and not changed
