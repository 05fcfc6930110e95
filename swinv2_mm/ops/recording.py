"""Whether PyTorch runs a model, or records it for later."""

import torch

# of torch 2.3; `torch.compile` of older ones gets the reference if it is named
is_compiling = getattr(getattr(torch, 'compiler', None), 'is_compiling', lambda: False)
# Decorates what is to run when a model is compiled, and not to be a part of it
at_compilation = getattr(getattr(torch, 'compiler', None), 'assume_constant_result', lambda function: function)


def is_tracing() -> bool:
    """Tell whether a tracer or an exporter records the model, which knows PyTorch's own operators alone."""
    return torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()


def is_recorded() -> bool:
    """Tell whether what runs is kept as a graph, in which loops are written out and caches are constants."""
    return is_compiling() or is_tracing()
