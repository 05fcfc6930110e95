"""The backend `sdpa` against the reference in float64, eager and compiled, and its memory."""

import math

import pytest
import torch
from attention_oracle import NAMES, draw
from torch._subclasses.fake_tensor import FakeTensorMode

from swinv2_mm.cli.memory import MemoryTracker
from swinv2_mm.ops import sdpa, window_attention
from swinv2_mm.ops.window_groups import window_groups

# 49 to 1024 tokens, one and three axes; at 64 and 576 tokens, fused kernels are known to fail with masks
WINDOWS = [(7, 7), (8, 8), (12,), (16, 16), (24, 24), (32, 32), (4, 7, 7)]


def results(inputs, window, shift, backend, dtype, attention=window_attention):
    """Output and gradients of the inputs, for the same gradient of the output in each call."""
    inputs = [t.detach().to(dtype, copy=True).requires_grad_() for t in inputs]
    out = attention(*inputs, window, shift, backend)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    out.backward(grad)
    return dict(zip(NAMES, (out.detach(), *(t.grad for t in inputs)), strict=True))


def assert_as_accurate_as_the_reference(size, window, shift, attention=window_attention, heads=3):
    """Compare the error of each result in float32, relative to float64, with that of the reference."""
    inputs = draw(size, heads, window)
    exact = results(inputs, window, shift, 'reference', torch.float64)
    peer = results(inputs, window, shift, 'reference', torch.float32)
    ours = results(inputs, window, shift, 'sdpa', torch.float32, attention)
    for name, expected in exact.items():
        scale = expected.abs().max()
        error, allowed = ((t[name] - expected).abs().max() / scale for t in (ours, peer))
        assert ours[name].isfinite().all(), name
        # the gradient of the scale is a sum of q * grad_q over tokens, with much cancellation
        assert error < 3 * allowed + (1e-4 if name == 'logit_scale' else 1e-5), (name, float(error), float(allowed))


@pytest.mark.parametrize(('padded', 'shifted'), [(False, False), (False, True), (True, False), (True, True)])
def test_sdpa_is_as_accurate_as_the_reference(padded, shifted):
    size = (22, 18) if padded else (16, 16)  # with a shift, padding is in the middle of a window
    assert_as_accurate_as_the_reference(size, (8, 8), (4, 4) if shifted else (0, 0))


@pytest.mark.parametrize('window', WINDOWS)
def test_sdpa_is_as_accurate_as_the_reference_at_each_window_size(window):
    """Padded and shifted: windows within the map, at its edges, and in the corner."""
    size, shift = tuple(w + w // 3 for w in window), tuple(w // 2 for w in window)
    assert_as_accurate_as_the_reference(size, window, shift, heads=1 if math.prod(window) > 256 else 3)


@pytest.mark.slow
@pytest.mark.parametrize('window', [(8, 8), (4, 7, 7)])
def test_sdpa_is_as_accurate_as_the_reference_when_compiled(window):
    compiled = torch.compile(window_attention, fullgraph=True)
    shift = tuple(w // 2 for w in window)
    assert_as_accurate_as_the_reference(tuple(2 * w for w in window), window, shift, compiled)
    # another size, padded: the same operator
    assert_as_accurate_as_the_reference(tuple(w + w // 3 for w in window), window, shift, compiled)
    torch._dynamo.reset()


def test_sdpa_compiled_is_one_graph_with_equal_results():
    """The graph contains the operator itself, and serves a second size too."""
    graphs = []

    def spy(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(window_attention, fullgraph=True, dynamic=True, backend=spy)
    for size in [(9, 14), (12, 10)]:
        inputs = draw(size)
        ours = results(inputs, (4, 4), (2, 2), 'sdpa', torch.float32, compiled)
        expected = results(inputs, (4, 4), (2, 2), 'sdpa', torch.float32)
        assert all(torch.equal(ours[name], expected[name]) for name in NAMES)
    assert len(graphs) == 1
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == 'call_function']
    assert len([name for name in called if 'swinv2_mm.window_attention' in name]) == 1
    torch._dynamo.reset()


def test_sdpa_splits_batches_beyond_the_limit_of_a_cuda_grid(monkeypatch):
    assert sdpa.MAX_BATCH == 65535
    monkeypatch.setattr(sdpa, 'MAX_BATCH', 5)
    inputs = draw((7, 8), heads=1, window=(2, 2), head_dim=4)  # 16 windows, of which 9 are in one group
    batches = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(q, *args, **kwargs):
        batches.append(len(q))
        return attention(q, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, 'scaled_dot_product_attention', spy)
    ours = results(inputs, (2, 2), (1, 1), 'sdpa', torch.float32)
    assert max(batches) == 5
    assert sum(batches) == 16
    expected = results(inputs, (2, 2), (1, 1), 'reference', torch.float64)
    for name, value in ours.items():
        limit = 1e-4 * float(expected[name].abs().max())
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=limit)


@pytest.mark.parametrize('chunk', [1, 1000, 2**19])
def test_sdpa_results_do_not_depend_on_the_chunk_size(monkeypatch, chunk):
    inputs = draw((9, 14), heads=4, window=(4, 4), dtype=torch.float64)
    expected = results(inputs, (4, 4), (2, 2), 'reference', torch.float64)
    monkeypatch.setitem(sdpa.CHUNKS, 'cpu', chunk)
    ours = results(inputs, (4, 4), (2, 2), 'sdpa', torch.float64)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_sdpa_saves_only_its_inputs_for_the_backward_pass():
    inputs = [t.requires_grad_() for t in draw((32, 32), window=(16, 16))]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        window_attention(*inputs, (16, 16), (8, 8), 'sdpa')
    assert set(saved) == {t.data_ptr() for t in inputs}


def test_sdpa_memory_has_the_attention_weights_of_one_chunk_only(monkeypatch):
    """Peak memory from 16 to 32 windows grows by the inputs, but not by attention weights."""
    monkeypatch.setitem(sdpa.CHUNKS, 'cpu', 2 * 256**2)

    def peak(backend, side):
        inputs = [t.requires_grad_() for t in draw((side, 64), window=(16, 16), head_dim=4)]
        with MemoryTracker() as tracker:
            tracker.watch(inputs)
            window_attention(*inputs, (16, 16), (8, 8), backend).sum().backward()
        return tracker.peak

    growth = {backend: peak(backend, 128) - peak(backend, 64) for backend in ('sdpa', 'reference')}
    weights = 16 * 3 * 256**2 * 4  # of 16 windows
    assert growth['sdpa'] < 0.6 * weights
    assert growth['reference'] > 3 * weights


def test_sdpa_gradients_are_deterministic():
    inputs = draw((32, 40), window=(16, 16))
    first, second = (results(inputs, (16, 16), (8, 8), 'sdpa', torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_sdpa_is_unaffected_by_autocast():
    qkv, scale, table = draw((8, 8), window=(4, 4))
    expected = results((qkv, scale, table), (4, 4), (2, 2), 'sdpa', torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        ours = results((qkv, scale, table), (4, 4), (2, 2), 'sdpa', torch.float32)
    assert all(torch.equal(ours[name], expected[name]) for name in NAMES)


def test_sdpa_caches_nothing_of_fake_tensors_and_inference_mode():
    window_groups.cache_clear()
    with FakeTensorMode():
        fake = window_attention(*draw_fake((12, 12)), (8, 8), (4, 4), 'sdpa')
    assert fake.shape == (1, 12, 12, 64)
    assert window_groups.cache_info().currsize == 0
    inputs = draw((12, 12), window=(8, 8), dtype=torch.float64)
    with torch.inference_mode():
        window_attention(*inputs, (8, 8), (4, 4), 'sdpa')
    expected = results(inputs, (8, 8), (4, 4), 'reference', torch.float64)
    torch.testing.assert_close(results(inputs, (8, 8), (4, 4), 'sdpa', torch.float64), expected, rtol=1e-10, atol=1e-10)


def draw_fake(size):
    return torch.empty(1, *size, 3, 2, 32), torch.empty(2, 1, 1), torch.empty(2, 225)


def test_sdpa_operators_pass_opcheck():
    inputs = [t.requires_grad_() for t in draw((9, 6), window=(4, 4), dtype=torch.float64)]
    torch.library.opcheck(torch.ops.swinv2_mm.window_attention.default, (*inputs, [4, 4], [2, 2]))


def test_sdpa_refuses_second_derivatives():
    inputs = [t.requires_grad_() for t in draw((8, 8), dtype=torch.float64)]
    (grad,) = torch.autograd.grad(
        window_attention(*inputs, (4, 4), (2, 2), 'sdpa').square().sum(), inputs[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grad.sum().backward()


def test_sdpa_is_refused_in_a_trace_where_auto_takes_the_reference():
    inputs = draw((8, 8))
    traced = torch.jit.trace(lambda *t: window_attention(*t, (4, 4), (2, 2)), inputs, check_trace=False)
    expected = window_attention(*inputs, (4, 4), (2, 2), 'reference')
    assert torch.equal(traced(*inputs), expected)
    with pytest.raises(
        ValueError, match="'sdpa' cannot run: its custom operator cannot be exported; 'auto' takes another"
    ):
        torch.jit.trace(lambda *t: window_attention(*t, (4, 4), (2, 2), 'sdpa'), inputs, check_trace=False)
