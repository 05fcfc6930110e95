"""The Triton kernels compared with the reference in float64: on a GPU if there is one, else in Triton's interpreter.

The interpreter takes some milliseconds per tile of any size. So feature maps have few windows here, and windows have
one tile unless a test is about several.
"""

import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from attention_oracle import NAMES, draw, draw_small, expected_of_pairs

pytest.importorskip('triton')
import triton
import triton.language as tl
import triton_interpreter
from triton_interpreter import OnGpu, poisoned_memory

from swinv2_mm.models import SwinTransformerV2
from swinv2_mm.ops import sdpa, window_attention
from swinv2_mm.ops.reference import reference_window_attention
from swinv2_mm.ops.triton import attention as triton_backend
from swinv2_mm.ops.triton import kernels, selfcheck, tiles
from swinv2_mm.ops.triton.launch import recorded

module = sys.modules['swinv2_mm.ops.window_attention']  # the package shows the function under this name
COMPILE_KERNELS = Path(__file__).parents[1] / 'helpers/compile_kernels.py'
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
BACKENDS = {
    'reference': reference_window_attention,
    'sdpa': sdpa.sdpa_window_attention,
    'triton': triton_backend.triton_window_attention,
}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Without a GPU, the kernels run in Triton's interpreter."""
    if DEVICE == 'cpu':
        triton_interpreter.patch(monkeypatch)
        triton_interpreter.use_large_tiles(monkeypatch)


@pytest.fixture
def set_tiles(monkeypatch):
    """A function that sets the tokens of a box, the tile sizes, and the number of programs that loop over windows.

    Windows of more tokens than a box are cut into tiles.
    """

    def set_all(box: int, block_m: int, block_n: int, programs: int = 1024) -> None:
        config = tiles.TileConfig(block_m, block_n, warps=4, stages=1)
        monkeypatch.setattr(triton_backend, 'choose_tiles', lambda *_: config)
        monkeypatch.setattr(triton_backend, 'box_tokens', lambda *_: box)
        monkeypatch.setattr(tiles, 'LARGEST_WINDOW', box)
        monkeypatch.setattr(triton_backend, 'PROGRAMS', dict.fromkeys(tiles.KERNELS, programs))

    return set_all


def attention(*inputs_and_sizes):
    """As `window_attention`, without `can_run`: the interpreter runs the kernels on a CPU."""
    *inputs, window, shift, backend = inputs_and_sizes
    return BACKENDS[backend](*(t.to(DEVICE) for t in inputs), window, shift).cpu()


def assert_as_exact_as_sdpa(inputs, window, shift, dtype=torch.float32):
    """Assert that each error, compared with the reference in float64, is about that of `sdpa` in the same dtype.

    Returns:
        The results.
    """
    inputs = [t.to(dtype) if i == 0 else t for i, t in enumerate(inputs)]
    exact = run(inputs, window, shift, 'reference', torch.float64)
    peer, ours = (run(inputs, window, shift, backend, dtype) for backend in ('sdpa', 'triton'))
    for name, expected in exact.items():
        largest = expected.abs().max() or 1.0
        assert ours[name].isfinite().all(), name
        error, allowed = (float((t[name].double() - expected).abs().max() / largest) for t in (ours, peer))
        # Float32 rounds logits of 116 by up to 32 eps. Unit vectors are float16 for float16 and bfloat16, times scales
        # of up to 100. The gradient of the scale is a sum over tokens of q * grad_q, which cancels for the most part.
        rounding = {torch.float32: 4e-6, torch.float16: 0.008, torch.bfloat16: 0.016}[dtype]
        if name == 'logit_scale':
            rounding = 1e-4 if dtype == torch.float32 else 0.03
        assert error < 3 * allowed + rounding, (name, error, allowed)
    return ours


def run(inputs, window, shift, backend, dtype):
    """Results with qkv in `dtype`; scale and table are float32, like parameters, unless all is float64."""
    exact = torch.promote_types(dtype, torch.float32)
    qkv, scale, table = (
        t.detach().to(dtype if i == 0 else exact, copy=True).requires_grad_() for i, t in enumerate(inputs)
    )
    out = attention(qkv, scale, table, window, shift, backend)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype))
    return dict(zip(NAMES, (out.detach(), qkv.grad, scale.grad, table.grad), strict=True))


# feature map, window, shift: divisible and padded, shifted or not, smaller than the window, non-square, 1 to 3 axes
CASES = [
    ((7,), (4,), (1,)),
    ((6, 6), (3, 3), (0, 0)),
    ((5, 7), (3, 3), (1, 1)),
    ((3, 5), (4, 2), (2, 1)),
    ((2, 3), (4, 4), (2, 2)),
    ((3, 3, 5), (2, 2, 3), (1, 1, 1)),
    ((5, 2, 3), (3, 4, 2), (1, 2, 1)),
]


@pytest.mark.parametrize(('size', 'window', 'shift'), CASES)
def test_triton_window_attention_equals_brute_force(size, window, shift):
    out = attention(*(t.float() for t in draw_small(size, window, batch=2)), window, shift, 'triton')
    torch.testing.assert_close(out.double(), expected_of_pairs(size, window, shift), rtol=1e-4, atol=1e-5)


def draw_scaled(size, heads, window, head_dim, dtype):
    """As `draw`, but for bfloat16 with scales up to 10: at 100, rounding cancels the gradients of so few tokens."""
    qkv, scale, table = draw(size, heads, window, head_dim=head_dim)
    return qkv, scale.clamp(max=2.3) if dtype == torch.bfloat16 else scale, table


# Each dtype, 1 to 3 axes, one or two heads; head dimensions and windows that fill a tile or not; divisible and padded
# feature maps, and one smaller than the window; one or several windows per program.
@pytest.mark.parametrize(
    ('size', 'window', 'dtype', 'heads', 'head_dim', 'programs'),
    [
        ((10,), (4,), torch.float16, 2, 4, 1024),
        ((7, 8), (4, 4), torch.bfloat16, 2, 24, 4),
        ((15, 16), (8, 8), torch.float16, 1, 32, 1024),
        ((4, 3, 5), (2, 3, 3), torch.float16, 2, 16, 4),
        ((2, 4, 5), (2, 3, 3), torch.bfloat16, 1, 16, 2),
        ((1, 7), (5, 5), torch.bfloat16, 1, 16, 1024),
    ],
)
def test_one_tile_kernels_are_as_exact_as_sdpa(monkeypatch, size, window, dtype, heads, head_dim, programs):
    """Windows inside the feature map, at each edge and in the corners, shifted and padded."""
    monkeypatch.setattr(triton_backend, 'PROGRAMS', dict.fromkeys(tiles.KERNELS, programs))
    inputs, shift = draw_scaled(size, heads, window, head_dim, dtype), tuple(w // 2 for w in window)
    geometry = triton_backend.Geometry(inputs[0].to(dtype), window, shift)
    assert geometry.is_one_tile
    assert (-(-programs // heads) < most_windows(geometry)) == (programs < 1024)
    assert_as_exact_as_sdpa(inputs, window, shift, dtype)


def most_windows(geometry):
    """Number of windows of the largest launch."""
    return geometry.batch * max(len(ids) for ids, _ in geometry.window_groups())


# The same for windows of several tiles, and of one tile whose heads are too large for the one-tile kernels: BLOCK_N
# smaller and larger than BLOCK_M, first tiles without any key (shifted feature maps slightly larger than a window), and
# two or three boxes along an axis.
@pytest.mark.parametrize(
    ('size', 'window', 'dtype', 'heads', 'head_dim', 'tiles', 'programs'),
    [
        ((9, 8), (7, 7), torch.float32, 1, 24, (32, 32, 16), 6),
        ((5, 6), (5, 6), torch.bfloat16, 2, 16, (16, 32, 16), 1024),
        ((5, 4, 3), (4, 3, 3), torch.float16, 1, 32, (16, 16, 16), 1024),
        ((3, 4, 5), (3, 4, 2), torch.float32, 2, 4, (16, 16, 32), 2),
        ((4, 3, 5), (2, 3, 3), torch.float32, 2, 128, (16, 32, 32), 2),
        ((12, 3), (12, 4), torch.bfloat16, 1, 128, (16, 32, 32), 1024),
        ((7, 33), (4, 16), torch.bfloat16, 1, 32, (32, 32, 32), 1),
    ],
)
def test_tiled_kernels_are_as_exact_as_sdpa(set_tiles, size, window, dtype, heads, head_dim, tiles, programs):
    set_tiles(*tiles, programs)
    inputs, shift = draw_scaled(size, heads, window, head_dim, dtype), tuple(w // 2 for w in window)
    geometry = triton_backend.Geometry(inputs[0].to(dtype), window, shift)
    assert not geometry.is_one_tile
    displacements = math.prod(2 * n - 1 for n in geometry.box.counts)
    assert (-(-programs // (heads * displacements)) < most_windows(geometry)) == (programs < 1024)
    assert_as_exact_as_sdpa(inputs, window, shift, dtype)


@pytest.mark.skipif(DEVICE == 'cuda', reason='a GPU rounds as it does')
@pytest.mark.parametrize('block', [64, 32])
@pytest.mark.parametrize('side', [0, 1])
def test_fused_multiply_add_gives_no_nan(monkeypatch, set_tiles, side, block):
    """In windows at the edges, the first keys of a program are all padding: their logits are huge and equal."""
    triton_interpreter.fuse_multiply_add(monkeypatch, side)
    set_tiles(block, block, 32)
    assert_as_exact_as_sdpa(draw((10, 16), heads=1, window=(8, 8), head_dim=16), (8, 8), (4, 4))


@pytest.mark.parametrize(
    ('window', 'dtype'),
    [
        ((12, 12), torch.float16),
        ((8, 7, 7), torch.bfloat16),
        pytest.param((24, 24), torch.bfloat16, marks=pytest.mark.slow),
        pytest.param((32, 32), torch.float32, marks=pytest.mark.slow),
    ],
)
def test_large_windows_are_as_exact_as_sdpa(window, dtype):
    size, shift = tuple(w + w // 3 for w in window), tuple(w // 2 for w in window)
    assert_as_exact_as_sdpa(draw(size, heads=1, window=window), window, shift, dtype)


@pytest.mark.parametrize(
    ('dtype', 'one_tile'), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_selfcheck_of_the_kernels(dtype, one_tile):
    assert selfcheck.check(torch.device(DEVICE), dtype, 32, one_tile) == ''


@pytest.mark.skipif(DEVICE == 'cuda', reason='a GPU has TF32')
def test_selfcheck_of_the_kernels_in_tf32(monkeypatch):
    triton_interpreter.truncate_to_tf32(monkeypatch)
    assert 'grad of qkv is off by' in selfcheck.check(torch.device(DEVICE), torch.float32, 32, one_tile=False)
    monkeypatch.setattr(triton_backend, '_is_tf32_allowed', lambda: True)
    assert selfcheck.check(torch.device(DEVICE), torch.float32, 32, one_tile=False) == ''


@pytest.mark.slow
def test_window_of_4096_tokens():
    assert_as_exact_as_sdpa(draw((64, 64), heads=1, window=(64, 64), head_dim=16), (64, 64), (0, 0))


def test_clamped_logit_scale_and_tokens_of_zeros():
    qkv, _, table = draw((4, 6), heads=2, window=(3, 3), head_dim=16)
    qkv[0, :3] = 0
    scale = torch.tensor([5.0, 2.0]).view(-1, 1, 1)
    ours = assert_as_exact_as_sdpa((qkv, scale, table), (3, 3), (1, 1))
    assert ours['logit_scale'][0] == 0


@triton.jit
def store_addresses(numbers, place, window_ids, num_windows, tokens, heads, row, stride, LARGE: tl.constexpr):
    """Store the offset of the sample of a window, and that of a row in the sample."""
    _, sample = kernels._window_of(place, window_ids, num_windows, tokens, heads)
    tl.store(numbers, sample)
    tl.store(numbers + 1, kernels._offsets(tl.load(row), stride, LARGE))


def test_offsets_beyond_32_bits():
    """Sample 9 where two samples exceed 32 bits, and the last token of a sample that exceeds them itself."""
    numbers = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    ids = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    for size, heads in (((384, 384), 64), ((1500, 1500), 16)):
        tokens, stride = math.prod(size), 3 * heads * 32
        geometry = triton_backend.Geometry(torch.empty(10, *size, 3, heads, 32, device='meta'), (32, 32), (0, 0))
        row = torch.tensor(tokens - 1, dtype=torch.int32, device=DEVICE)
        is_large = geometry.constants('forward')['LARGE']
        store_addresses[(1,)](numbers, 3 * 9, ids, 3, 2**28, 4, row, stride, LARGE=is_large)
        assert numbers.tolist() == [9 * 2**30, (tokens - 1) * stride]
        assert is_large == (tokens * stride >= 2**31) == (heads == 16)


def test_more_than_65535_windows(monkeypatch):
    """The second axis of a CUDA grid ends at 65535 blocks. The interpreter is slow and runs only some programs."""
    size, window = (257, 257), (1, 1)  # 66,049 windows of one token, which attends to itself
    programs = [0, 1, 256, 257, 40000, 65535, 65536, 257**2 - 1]
    if DEVICE == 'cpu':
        some = lambda *bounds: programs if bounds == (257**2,) else range(*bounds)  # noqa: E731
        monkeypatch.setattr(triton_interpreter.interpreter, 'range', some, raising=False)
    monkeypatch.setattr(triton_backend, 'PROGRAMS', dict.fromkeys(tiles.KERNELS, 257**2))
    qkv, scale, table = draw(size, heads=1, window=window, head_dim=4)
    ours = run((qkv, scale, table), window, (0, 0), 'triton', torch.float32)
    torch.testing.assert_close(ours['out'].flatten(1, 2)[:, programs], qkv[..., 2, 0, :].flatten(1, 2)[:, programs])
    expected = run((qkv, scale, table), window, (0, 0), 'reference', torch.float64)['qkv']
    found, expected = (t.flatten(1, 2)[:, programs] for t in (ours['qkv'], expected))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('block', [32, 16])
def test_results_are_deterministic_and_fully_written(set_tiles, block):
    """With memory of former contents, and with memory of NaN."""
    set_tiles(block, block, block, programs=2)
    size, window = ((40, 45), (5, 5)) if DEVICE == 'cuda' else ((6, 9), (5, 5))
    inputs = draw(size, heads=1, window=window, head_dim=24)
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        first = run(inputs, window, (2, 2), 'triton', torch.bfloat16)
    second = run(inputs, window, (2, 2), 'triton', torch.bfloat16)
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_non_contiguous_inputs():
    qkv, scale, table = draw((3, 4), heads=2, window=(2, 2), head_dim=4)
    strided = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    table = table.t().contiguous().t()
    ours = run((strided, scale, table), (2, 2), (1, 1), 'triton', torch.float32)
    expected = run((qkv, scale, table.contiguous()), (2, 2), (1, 1), 'triton', torch.float32)
    assert all(torch.equal(ours[name], expected[name]) for name in NAMES)


@pytest.mark.parametrize('head_dim', [16, 40])  # windows of one tile, and of several
@pytest.mark.parametrize('name', ['logit_scale', 'bias_table'])
def test_nan_of_parameters_propagates(head_dim, name):
    qkv, scale, table = draw((4, 4), heads=1, window=(4, 4), head_dim=head_dim)
    (scale if name == 'logit_scale' else table)[:] = math.nan
    ours = run((qkv, scale, table), (4, 4), (0, 0), 'triton', torch.bfloat16)
    assert all(ours[result].isnan().all() for result in ('out', 'qkv'))


@pytest.mark.parametrize('head_dim', [16, 40])
@pytest.mark.parametrize(('values', 'gradients'), [(1e6, 1.0), (1.0, 1e-12), (1.0, 1e12)])
def test_bfloat16_with_large_values_and_any_gradients(head_dim, values, gradients):
    qkv, scale, table = draw_scaled((5, 6), 1, (4, 4), head_dim, torch.bfloat16)
    qkv[..., 2, :, :] *= values
    inputs = [t.to(DEVICE) for t in (qkv.bfloat16(), scale, table)]
    grad = gradients * torch.randn(1, 5, 6, head_dim, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    results = []
    for attention_of, dtype in ((BACKENDS['triton'], torch.bfloat16), (reference_window_attention, torch.float64)):
        leaves = [t.detach().to(dtype if i == 0 else t.dtype).requires_grad_() for i, t in enumerate(inputs)]
        out = attention_of(*leaves, (4, 4), (2, 2))
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(dtype))])
    for found, wanted in zip(*results, strict=True):
        limit = 0.05 * float(wanted.detach().abs().max())
        torch.testing.assert_close(found.double(), wanted.double(), rtol=0.05, atol=limit)


@pytest.mark.parametrize('head_dim', [16, 40])
def test_empty_batch(head_dim):
    qkv, scale, table = draw((5, 6), heads=2, window=(4, 4), head_dim=head_dim)
    ours = run((qkv[:0], scale, table), (4, 4), (2, 2), 'triton', torch.bfloat16)
    assert ours['out'].shape == (0, 5, 6, 2 * head_dim)
    assert not any(ours[name].any() for name in NAMES)


@pytest.mark.parametrize('head_dim', [16, 40])
@pytest.mark.parametrize('types', [(torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16)])
def test_dtypes_of_logit_scale_and_bias_table(head_dim, types):
    dtype, other = types
    qkv, scale, table = draw((5, 6), heads=1, window=(4, 4), head_dim=head_dim)
    inputs = [
        t.detach().to(DEVICE, d).requires_grad_()
        for t, d in ((qkv, dtype), (scale.clamp(max=2), other), (table, other))
    ]
    out = triton_backend.triton_window_attention(*inputs, (4, 4), (2, 2))
    out.sum().backward()  # its gradient is an expanded scalar
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = reference_window_attention(*exact, (4, 4), (2, 2))
    expected.sum().backward()
    assert [out.dtype, *(t.grad.dtype for t in inputs)] == [dtype, dtype, other, other]
    for found, wanted in zip((out, *(t.grad for t in inputs)), (expected, *(t.grad for t in exact)), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=0.05, atol=0.05 * float(wanted.detach().abs().max()))


@pytest.mark.parametrize('block', [32, 16])
def test_opcheck_of_the_operator(set_tiles, block):
    set_tiles(block, block, block)
    inputs = [t.to(DEVICE).requires_grad_() for t in draw((3, 6), heads=1, window=(4, 6), head_dim=16)]
    # values are tested above; this tests the registration: shapes, strides and autograd
    torch.library.opcheck(torch.ops.swinv2_mm.triton_window_attention.default, (*inputs, [4, 6], [2, 2]))


def test_compile_gives_one_graph():
    """The operator is one node, and a second size does not recompile."""
    graphs = []

    def watched(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(triton_backend.triton_window_attention, fullgraph=True, dynamic=True, backend=watched)
    for size in [(5, 7), (4, 5)]:
        inputs = [t.to(DEVICE) for t in draw(size, heads=2, window=(2, 2), head_dim=16)]
        expected = triton_backend.triton_window_attention(*inputs, (2, 2), (1, 1))
        assert torch.equal(compiled(*inputs, (2, 2), (1, 1)), expected)
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_memory_is_not_quadratic_in_tokens(monkeypatch, set_tiles):
    """For a window of 1024 tokens, forward and backward allocate no tensor of N x N elements.

    The kernels allocate nothing and do not run.
    """
    set_tiles(64, 128, 64)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            tensors = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
            sizes.extend(t.numel() for t in tensors if t.dtype.is_floating_point)
            return result

    inputs = [t.to(DEVICE) for t in draw((32, 32), heads=1, window=(32, 32), head_dim=16)]
    with Watch(), recorded() as launches:
        out, lse = triton_backend.triton_forward(*inputs, (32, 32), (0, 0))
        triton_backend.triton_backward(torch.ones_like(out), *inputs, out, lse, (32, 32), (0, 0))
    names = [launch.kernel.__name__ for launch in launches]
    assert names[:3] == ['expand_bias', 'normalize', 'forward']
    assert names[3:] == ['expand_bias', 'normalize', *tiles.KERNELS[1:4], 'fold_bias']
    # the gradient of the bias has a tile per displacement of boxes: it grows with N, not with N**2
    assert max(sizes) < 1024**2 / 3


def test_training_follows_the_reference(monkeypatch):
    """Losses of a few steps of a backbone, whose feature map is padded in one stage and fits a window in the other."""
    monkeypatch.setitem(
        module.BACKENDS, 'triton', module.Backend(triton_backend.triton_window_attention, lambda qkv: None)
    )
    images = torch.randn(1, 3, 20, 24, generator=torch.Generator().manual_seed(0), device='cpu').to(DEVICE)

    def losses(backend):
        torch.manual_seed(0)
        arch = dict(embed_dims=16, depths=(2, 1), num_heads=(1, 2))
        model = SwinTransformerV2(
            arch, window_size=4, out_indices=(0, 1), drop_path_rate=0.0, attention_backend=backend
        ).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        found = []
        for _ in range(4):
            loss = sum((x - 1).square().mean() for x in model(images))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    ours, expected = losses('triton'), losses('reference')
    assert ours == pytest.approx(expected, rel=1e-3)
    assert expected[-1] < 0.95 * expected[0]


@pytest.mark.skipif(DEVICE == 'cuda', reason='on a GPU it can run')
def test_window_attention_on_a_cpu_is_an_error():
    reason = r"its kernels are for GPUs, but the feature map is on 'cpu'"
    with pytest.raises(ValueError, match=f"'triton' cannot run: {reason}; 'auto' takes another"):
        window_attention(*draw((8, 8)), (4, 4), (2, 2), 'triton')


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        (lambda qkv: qkv.double(), r'compute in float32, but the feature map is of type torch.float64'),
        (
            lambda qkv: qkv[..., :1].expand(*qkv.shape[:-1], 96),
            'heads of up to 64 channels in torch.float32, and these have 96',
        ),
        (lambda qkv: qkv.half()[..., :1].expand(*qkv.shape[:-1], 160), 'up to 128 channels in torch.float16'),
        (lambda qkv: qkv[:, :, :, None, None], 'feature maps of up to 3 axes, but this one has 4'),
    ],
)
def test_can_run_names_the_reason(monkeypatch, change, reason):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (8, 0))
    qkv = torch.empty(1, 4, 4, 3, 2, 32).as_subclass(OnGpu)
    assert reason in triton_backend.can_run(change(qkv))
    assert triton_backend.can_run(qkv) is None


def test_can_run_needs_a_new_gpu_and_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (7, 5))
    qkv = torch.empty(1, 4, 4, 3, 2, 32).as_subclass(OnGpu)
    assert (
        triton_backend.can_run(qkv) == 'its kernels are for GPUs of compute capability 8 or more, and this one has 7.5'
    )
    monkeypatch.setattr(triton, '__version__', '3.3.1')
    assert triton_backend.can_run(qkv) == 'its kernels need triton 3.4 or newer, this is 3.3.1'

    def recorded(x):
        return x + triton_backend._capability(x.device)[0] + len(triton_backend._triton_version())

    assert torch.compile(recorded, fullgraph=True, backend='eager')(torch.zeros(1)) == 7 + len('3.3.1')


def test_can_run_not_in_torch_func_or_forward_mode(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (8, 0))
    qkv, reasons = torch.empty(1, 4, 4, 3, 2, 32).as_subclass(OnGpu), []
    torch.func.vmap(lambda x: reasons.append(triton_backend.can_run(qkv)) or x)(torch.zeros(1))
    with torch.autograd.forward_ad.dual_level():
        reasons.append(triton_backend.can_run(qkv))
    assert reasons == ['torch.func and forward-mode AD transform only operators of PyTorch'] * 2


def test_can_run_needs_triton(monkeypatch):
    monkeypatch.setattr(triton_backend, 'HAS_TRITON', False)
    assert 'triton is not installed' in triton_backend.can_run(torch.empty(1, 4, 4, 3, 2, 32).as_subclass(OnGpu))


@pytest.fixture
def matmul():
    """Default settings of matrix products on GPUs."""
    settings = torch.backends.cuda.matmul
    former = getattr(settings, 'fp32_precision', None)
    yield settings
    torch.set_float32_matmul_precision('highest')
    if former:
        settings.fp32_precision = former


def precision(dtype):
    geometry = triton_backend.Geometry(torch.empty(1, 4, 4, 3, 1, 16, dtype=dtype), (4, 4), (2, 2))
    return geometry.constants('window_forward')['PRECISION']


@pytest.mark.parametrize('setting', ['high', 'medium', 'allow_tf32', 'fp32_precision'])
def test_tf32_follows_the_settings_of_torch(matmul, setting):
    assert precision(torch.float32) == 'ieee'
    if setting in ('high', 'medium'):
        torch.set_float32_matmul_precision(setting)
    elif setting == 'allow_tf32':
        matmul.allow_tf32 = True
    elif hasattr(matmul, 'fp32_precision'):
        matmul.fp32_precision = 'tf32'
    else:
        pytest.skip('of torch 2.9')
    assert precision(torch.float32) == 'tf32'
    assert precision(torch.bfloat16) == 'ieee'


@pytest.mark.parametrize('allowed', [False, True])
def test_tf32_before_torch_2_9(monkeypatch, allowed):
    monkeypatch.setattr(torch.backends.cuda, 'matmul', types.SimpleNamespace(allow_tf32=allowed))
    assert precision(torch.float32) == ('tf32' if allowed else 'ieee')


def test_interpreter_only_without_a_gpu():
    assert type(kernels.forward).__name__ == ('InterpretedFunction' if DEVICE == 'cpu' else 'JITFunction')


@pytest.mark.parametrize(
    ('head_dim', 'dtype', 'fits'),
    [(16, torch.float32, False), (32, torch.bfloat16, True), (33, torch.bfloat16, False), (16, torch.float16, True)],
)
def test_is_one_tile_depends_on_head_dim(head_dim, dtype, fits):
    geometry = triton_backend.Geometry(torch.empty(1, 8, 8, 3, 1, head_dim, dtype=dtype), (8, 8), (4, 4))
    assert geometry.is_one_tile == fits


@pytest.mark.slow
def test_kernels_compile_and_fit_shared_memory(tmp_path):
    """Code that the interpreter runs may still not compile; the compiler needs no GPU."""
    env = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    command = [sys.executable, COMPILE_KERNELS, tmp_path / 'kernels.json']
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    kernels = json.loads((tmp_path / 'kernels.json').read_text())
    assert {name for name, *_ in kernels} >= {*tiles.KERNELS, 'post_norm_forward', 'post_norm_backward'}
    assert not [kernel for kernel in kernels if kernel[-1]['programs_per_sm'] < 1]
    # bytes of spilled registers per thread; `window_backward` spills on all GPUs but Hopper
    limits = {'window_backward': 160}
    assert not [kernel for kernel in kernels if kernel[-1]['stack'] > limits.get(kernel[0], 64)]
