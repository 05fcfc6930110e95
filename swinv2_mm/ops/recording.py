"""Whether PyTorch runs a model as it is, or records, transforms or counts it."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace
from torch.utils import _python_dispatch

# of torch 2.3; `torch.compile` of older ones gets the reference if it is named
is_compiling = getattr(getattr(torch, 'compiler', None), 'is_compiling', lambda: False)
# Decorates what is to run when a model is compiled, and not to be a part of it
at_compilation = getattr(getattr(torch, 'compiler', None), 'assume_constant_result', lambda function: function)


def is_tracing() -> bool:
    """Tell whether a tracer or an exporter records the model, which knows PyTorch's own operators alone."""
    return torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()


def is_graphed() -> bool:
    """Tell whether the operators that run are kept as a graph, for a compiler or another program to run them."""
    return is_compiling() or is_tracing() or _symbolic_trace._is_fx_tracing_flag


def is_recorded() -> bool:
    """Tell whether what runs is kept, as a graph or of CUDA: loops are written out there, and caches are constants."""
    return is_graphed() or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def is_transformed() -> bool:
    """Tell whether `torch.func` or forward-mode AD transforms what runs: both need PyTorch's own operators."""
    if is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def flop_counter() -> Any:
    """Return the `FlopCounterMode` that counts what runs, or None.

    It knows formulas for operators, and looks into none of them.
    """
    # a compiled graph is counted by its operators; the import of the module brings Triton along
    if is_compiling() or 'torch.utils.flop_counter' not in sys.modules:
        return None
    modes = _python_dispatch._get_current_dispatch_mode_stack()
    found = (mode for mode in modes if type(mode).__name__.lstrip('_') == 'FlopCounterMode')
    mode = next(found, None)
    return getattr(mode, 'counter', mode)


def is_counted() -> bool:
    """Tell whether a `FlopCounterMode` counts what runs."""
    return flop_counter() is not None


def has_hooks(module: torch.nn.Module) -> bool:
    """Tell whether something is to be done before or after a module runs, apart from what is done for all modules."""
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return any(hooks)


def has_hooks_of_all() -> bool:
    """Tell whether something is to be done before or after any module runs."""
    kinds = 'forward_pre_hooks', 'forward_hooks', 'backward_pre_hooks', 'backward_hooks'
    return any(getattr(torch.nn.modules.module, f'_global_{kind}') for kind in kinds)


def are_plain(modules: Iterable[torch.nn.Module], kinds: Sequence[type]) -> bool:
    """Tell whether modules are of exactly these classes, and do nothing but what these do when they are called."""
    modules = list(modules)
    changed = any(has_hooks(module) or 'forward' in vars(module) for module in modules)
    return [type(module) for module in modules] == list(kinds) and not changed
