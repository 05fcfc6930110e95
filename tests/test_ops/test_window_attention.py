"""Each backend of `window_attention` against a loop over token pairs, and its documented behaviour."""

import logging
import math
import sys

import pytest
import torch
from attention_oracle import brute_force_attention, expected_of_pairs
from attention_oracle import draw_small as draw

from swinv2_mm.ops import reference, window_attention

module = sys.modules['swinv2_mm.ops.window_attention']  # the package shows the function under this name
BACKENDS = ['sdpa', 'reference']  # those that support float64; triton has tests of its own
# spatial shape, window, shift: divisible, padded, one more than a multiple, shrunk windows, non-square, 1 to 3 axes
CASES = [
    ((8,), (4,), (2,)),
    ((7,), (4,), (1,)),
    ((6, 6), (3, 3), (1, 1)),
    ((6, 6), (3, 3), (0, 0)),
    ((5, 7), (3, 3), (1, 1)),
    ((4, 9), (4, 4), (2, 2)),
    ((3, 5), (4, 2), (2, 1)),
    ((2, 3), (4, 4), (2, 2)),
    ((5, 4), (1, 4), (0, 2)),
    ((4, 4, 4), (2, 2, 2), (1, 1, 1)),
    ((3, 3, 5), (2, 2, 3), (1, 1, 1)),
    ((2, 5, 3), (4, 3, 3), (2, 1, 1)),
    ((5, 2, 3), (3, 4, 2), (1, 2, 1)),
    ((3, 3, 2), (2, 2, 4), (1, 1, 2)),
    ((2, 3, 2), (4, 4, 4), (2, 2, 2)),
    ((1, 4, 5), (1, 3, 3), (0, 1, 1)),
]


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize(('size', 'window', 'shift'), CASES)
def test_window_attention_equals_a_loop_over_token_pairs(size, window, shift, backend):
    out = window_attention(*draw(size, window, batch=2), window, shift, backend)
    torch.testing.assert_close(out, expected_of_pairs(size, window, shift), rtol=1e-10, atol=1e-10)


# chunks of one window, of a divisor of the number of windows, of no divisor, and of more windows than there are;
# padded, shifted and shrunk windows, 1 to 3 axes
@pytest.mark.parametrize(
    ('size', 'window', 'shift', 'chunk_windows'),
    [
        ((8,), (4,), (2,), 1),
        ((6, 6), (3, 3), (0, 0), 3),
        ((5, 7), (3, 3), (1, 1), 4),
        ((5, 7), (3, 3), (1, 1), 3),
        ((3, 5), (4, 2), (2, 1), 1000),
        ((3, 3, 5), (2, 2, 3), (1, 1, 1), 5),
    ],
)
def test_sequential_attention_keeps_output_and_gradients(monkeypatch, size, window, shift, chunk_windows):
    def run(sequential):
        inputs = [t.requires_grad_() for t in draw(size, window, batch=2)]
        out = window_attention(*inputs, window, shift, 'reference', sequential)
        out.square().sum().backward()
        return [out, *(t.grad for t in inputs)]

    fitted = reference.fit_window(size, window, shift)[0]
    monkeypatch.setattr(reference, 'CHUNK', chunk_windows * 2 * math.prod(fitted) ** 2)
    torch.testing.assert_close(run(True), run(False), rtol=1e-12, atol=1e-12)


def test_sequential_attention_saves_no_attention_weights(monkeypatch):
    inputs = [t.requires_grad_() for t in draw((16, 16), (8, 8))]
    monkeypatch.setattr(reference, 'CHUNK', 1)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        window_attention(*inputs, (8, 8), (4, 4), 'reference', sequential=True)
    assert max(sizes) <= 2 * 64**2  # the bias of one window; all attention weights are four times as large


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize(('size', 'window', 'shift'), [((7, 2), (4, 2), (1, 0)), ((2, 3, 2), (4, 2, 2), (2, 1, 1))])
def test_window_attention_gradients_equal_finite_differences(size, window, shift, backend):
    inputs = [t.requires_grad_() for t in draw(size, window)]
    with torch.no_grad():
        inputs[1][1] = 3.0  # below the clamp, which is not differentiable at its limit
    assert torch.autograd.gradcheck(lambda *t: window_attention(*t, window, shift, backend), inputs)


@pytest.mark.parametrize('backend', BACKENDS)
def test_window_attention_clamps_the_scale_to_100_without_gradient(backend):
    qkv, scale, table = draw((4, 4), (2, 2))
    scale = scale.requires_grad_()
    out = window_attention(qkv, scale, table, (2, 2), (1, 1), backend)
    clamped = window_attention(qkv, scale.detach().clamp(max=math.log(100)), table, (2, 2), (1, 1), backend)
    assert torch.equal(out, clamped)
    out.square().sum().backward()
    assert scale.grad[1] == 0
    assert scale.grad[0] != 0


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize(('size', 'window', 'shift'), [((5, 7), (3, 3), (1, 1)), ((7,), (4,), (2,))])
def test_window_attention_does_not_depend_on_the_amount_of_padding(size, window, shift, backend):
    """Equal to a feature map padded by further windows, at a scale small enough for the shift mask of -100."""
    qkv, _, table = draw(size, window)
    scale = torch.zeros(2, 1, 1, dtype=torch.float64)
    expected = brute_force_attention(qkv[0], scale, table, window, shift, extra_windows=1)
    out = window_attention(qkv, scale, table, window, shift, backend)[0]
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('backend', BACKENDS)
def test_window_attention_shrinks_a_window_larger_than_the_feature_map(backend):
    qkv, scale, table = draw((3, 5), (8, 8))
    grid = table.view(2, 15, 15)[:, 5:10, 3:12]  # offsets -2..2 and -4..4
    shrunk = window_attention(qkv, scale, grid.flatten(1), (3, 5), (0, 0), backend)
    assert torch.equal(window_attention(qkv, scale, table, (8, 8), (4, 4), backend), shrunk)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_window_attention_in_half_precision_is_close_to_float64_with_finite_gradients(dtype, backend):
    qkv, scale, table = draw((5, 7), (4, 4), dim=32)
    qkv[0, 0, 0] = 0  # a zero token, as made by padding before the projection
    half = qkv.to(dtype).requires_grad_()
    scale32 = scale.float().requires_grad_()
    out = window_attention(half, scale32, table.float(), (4, 4), (2, 2), backend)
    assert out.dtype == dtype
    expected = window_attention(half.detach().double(), scale, table, (4, 4), (2, 2), 'reference')
    step = torch.finfo(dtype).eps * expected.abs().max()  # the weights and the sum are rounded to dtype
    assert (out - expected).abs().max() < 4 * step
    out.float().square().sum().backward()
    assert half.grad.isfinite().all()
    assert scale32.grad.isfinite().all()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(backend='cuda'), "'cuda' is not known; use 'auto' or one of 'triton', 'sdpa', 'reference'"),
        (dict(window_size=(3,)), 'has 2 spatial axes, but window_size is'),
        (dict(shift_size=(3, 0)), 'must lie between 0 and window_size'),
        (dict(bias_table=torch.zeros(2, 9)), 'need bias_table'),
        (dict(qkv=torch.zeros(1, 6, 6, 2, 3)), 'must have the shape'),
    ],
)
def test_window_attention_names_invalid_arguments(change, message):
    qkv, scale, table = draw((6, 6), (3, 3))
    arguments = dict(qkv=qkv, logit_scale=scale, bias_table=table, window_size=(3, 3), shift_size=(1, 1)) | change
    with pytest.raises(ValueError, match=message):
        window_attention(**arguments)


def raise_error(*_):
    raise AssertionError('must not run')


def test_window_attention_auto_falls_back_in_order_and_logs_each_reason_once(monkeypatch, caplog):
    inputs = draw((6, 6), (3, 3))
    monkeypatch.setitem(module.BACKENDS, 'triton', module.Backend(raise_error, lambda qkv: 'it is for GPUs'))
    module._log_skipped_once.cache_clear()
    with caplog.at_level(logging.INFO, logger='swinv2_mm'):
        outs = [window_attention(*inputs, (3, 3), (1, 1)) for _ in range(2)]
        assert torch.equal(outs[1], window_attention(*inputs, (3, 3), (1, 1), 'sdpa'))
        monkeypatch.setitem(module.BACKENDS, 'sdpa', module.Backend(raise_error, lambda qkv: 'it is too old'))
        outs = [window_attention(*inputs, (3, 3), (1, 1)) for _ in range(2)]
    assert torch.equal(outs[1], window_attention(*inputs, (3, 3), (1, 1), 'reference'))
    assert [r.getMessage() for r in caplog.records] == [
        "attention backend 'triton' is not used: it is for GPUs",
        "attention backend 'sdpa' is not used: it is too old",
    ]
