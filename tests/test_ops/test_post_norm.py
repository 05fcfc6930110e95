"""The Triton kernels of the post-norm residual against PyTorch's operators in float64, and the blocks that use them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip('triton')
import triton
import triton.language as tl
import triton_interpreter
from triton_interpreter import OnGpu, poisoned_memory

from swinv2_mm.models.block import SwinBlock, checkpoint_module
from swinv2_mm.ops.triton import post_norm, post_norm_kernels, selfcheck
from swinv2_mm.ops.triton.launch import recorded

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
EPS = 1e-5
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
can_run = post_norm.can_run


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Without a GPU, the kernels run in Triton's interpreter."""
    if DEVICE == 'cpu':
        triton_interpreter.patch(monkeypatch)


def draw(*shape, dtype=FP32, seed=0):
    """Main branch, residual branch with a mean that is not zero, weight, bias and gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    shapes = shape, shape, shape[-1:], shape[-1:], shape
    drawn = [torch.randn(s, generator=generator) for s in shapes]
    drawn[1] = 3 * drawn[1] + 1
    return [t.to(DEVICE, dtype) for t in drawn]


def torch_reference(x, branch, weight, bias, eps, kept=None, keep_prob=1.0):
    normed = F.layer_norm(branch.to(weight.dtype), weight.shape, weight, bias, eps)
    return x + (normed if kept is None else normed.div(keep_prob) * kept.view(-1, *(1,) * (x.dim() - 1)))


def results(add, inputs, kept=None, keep_prob=1.0):
    """The sum, and gradients of both branches, weight and bias."""
    *leaves, grad_out = (t.detach() for t in inputs)
    leaves = [t.requires_grad_() for t in leaves]
    out = add(*leaves, EPS, kept, keep_prob)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


@pytest.mark.parametrize('types', [(FP32, FP32), (BF16, BF16), (FP16, FP16), (FP32, BF16), (FP32, FP16)], ids=str)
@pytest.mark.parametrize(
    ('shape', 'kept', 'keep_prob'),
    [
        ((2, 19, 96), None, 1.0),
        ((3, 5, 7, 128), (0.0, 1.0, 1.0), 0.8),
        ((2, 2, 3, 1, 352), (0.0, 0.0), 0.6),
        ((2, 1, 3, 1000), (1.0, 0.0), 0.5),
    ],
    ids=str,
)
def test_post_norm_is_as_accurate_as_pytorch(monkeypatch, types, shape, kept, keep_prob):
    """One to three axes, channels that are a power of 2 or not, full and partial tiles."""
    monkeypatch.setattr(post_norm, 'PROGRAMS', 2)  # so that each processes several tiles
    dtype, branch_dtype = types
    inputs = [t.to(branch_dtype if i == 1 else dtype) for i, t in enumerate(draw(*shape))]
    kept = kept and torch.tensor(kept, device=DEVICE, dtype=dtype)
    exact = results(torch_reference, [t.double() for t in inputs], kept, keep_prob)
    peer, ours = (results(add, inputs, kept, keep_prob) for add in (torch_reference, post_norm.add_post_norm))
    for expected, theirs, found in zip(exact, peer, ours, strict=True):
        assert found.dtype == theirs.dtype
        allowed, error = (float((t.double() - expected).abs().max()) for t in (theirs, found))
        assert error <= allowed + torch.finfo(found.dtype).eps * float(expected.abs().max())
    for sample in [] if kept is None else (kept == 0).nonzero().flatten().tolist():
        assert torch.equal(ours[0][sample], inputs[0][sample])
        assert not ours[2][sample].any()


def test_post_norm_of_an_empty_batch():
    found = results(post_norm.add_post_norm, draw(0, 4, 5, 96), torch.ones(0, device=DEVICE), 0.5)
    assert [tuple(t.shape) for t in found] == [(0, 4, 5, 96), (0, 4, 5, 96), (0, 4, 5, 96), (96,), (96,)]
    assert not any(t.any() for t in found)


def test_post_norm_refuses_second_derivatives():
    leaves = [t.requires_grad_() for t in draw(1, 3, 96)[:4]]
    grad = torch.autograd.grad(post_norm.add_post_norm(*leaves, EPS).square().sum(), leaves[1], create_graph=True)[0]
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grad.sum().backward()


def test_post_norm_of_non_contiguous_inputs():
    inputs = draw(2, 3, 5, 96)
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in inputs]
    strided[2] = torch.stack([inputs[2], inputs[2]], -1)[:, 0]
    kept = torch.tensor([0.0, 1.0], device=DEVICE)
    strided_kept = torch.stack([kept, kept], -1)[:, 0]
    ours = results(post_norm.add_post_norm, strided, strided_kept, 0.5)
    expected = results(post_norm.add_post_norm, inputs, kept, 0.5)
    assert all(map(torch.equal, ours, expected))


@triton.jit
def store_offsets(offsets, tile, tokens, C: tl.constexpr):
    """Store the memory offsets of a tile."""
    _, _, _, offs, _ = post_norm_kernels._tile_of_tokens(tile, tokens, C, 512, 4)
    tl.store(offsets + tl.arange(0, 4)[:, None] * 512 + tl.arange(0, 512)[None, :], offs)


@pytest.mark.parametrize(('tokens', 'sample'), [(384 * 384, 40), (2**24, 0), (2**24, 3)])
def test_post_norm_offsets_beyond_32_bits(tokens, sample):
    """The last tokens of a sample, for many samples and for a large feature map."""
    offsets = torch.zeros(4, 512, dtype=torch.int64, device=DEVICE)
    store_offsets[(1,)](offsets, (sample + 1) * tokens // 4 - 1, tokens, C=512)
    end = (sample + 1) * tokens * 512
    assert end > 2**31
    assert torch.equal(offsets.flatten().cpu(), torch.arange(end - 4 * 512, end))


def test_post_norm_is_deterministic_and_writes_every_element(monkeypatch):
    """With memory filled with NaN before, and without."""
    monkeypatch.setattr(post_norm, 'PROGRAMS', 3)
    inputs, kept = draw(3, 5, 9, 96), torch.tensor([0.0, 1.0, 1.0], device=DEVICE)
    with poisoned_memory():
        first = results(post_norm.add_post_norm, inputs, kept, 0.8)
    assert all(map(torch.equal, first, results(post_norm.add_post_norm, inputs, kept, 0.8)))
    with torch.no_grad():
        assert torch.equal(post_norm.add_post_norm(*inputs[:4], EPS, kept, 0.8), first[0])


@pytest.mark.parametrize('types', [(FP32, FP32), (BF16, BF16), (FP32, BF16), (BF16, FP32), (FP32, FP16)], ids=str)
@pytest.mark.parametrize('autocast', [False, True])
def test_post_norm_dtype_equals_pytorch(types, autocast):
    """On fake CUDA tensors, for which autocast works without a GPU."""
    former = torch.is_autocast_enabled('cuda')
    with recorded(), FakeTensorMode():
        x, branch = (torch.empty(2, 3, 4, 16, dtype=dtype, device='cuda') for dtype in types)
        weight = torch.empty(16, dtype=FP32 if autocast else branch.dtype, device='cuda')
        torch.set_autocast_enabled('cuda', autocast)
        try:
            found = post_norm.add_post_norm(x, branch, weight, weight, EPS)
            expected = x + F.layer_norm(branch, (16,), weight, weight)
        finally:
            torch.set_autocast_enabled('cuda', former)
    assert (found.dtype, found.shape, found.device) == (expected.dtype, expected.shape, expected.device)


# ---------------------------------------------------------------- self-check


@pytest.mark.parametrize('dtype', [FP32, FP16, BF16])
def test_post_norm_check_finds_a_wrong_kernel(monkeypatch, dtype):
    deviations = post_norm.check(torch.device(DEVICE), dtype)
    assert {name.split()[0] for name in deviations} == {'out', 'x', 'branch', 'weight', 'bias'}
    assert all(error <= allowed for error, allowed in deviations.values())

    def launch_with_error(kernel, programs, *args, **constants):
        post_norm_launch(kernel, programs, *args, **constants)
        if kernel is post_norm_kernels.post_norm_backward:
            args[5][1, 2] *= 1.2

    post_norm_launch = post_norm.launch
    monkeypatch.setattr(post_norm, 'launch', launch_with_error)
    wrong = {name for name, (error, allowed) in post_norm.check(torch.device(DEVICE), dtype).items() if error > allowed}
    assert wrong
    assert {name.split()[0] for name in wrong} == {'branch'}


def test_post_norm_can_run(monkeypatch):
    x = torch.empty(1).expand(2, 128, 128, 64)
    assert "on 'cpu'" in post_norm._why_not.__wrapped__(torch.device('cpu'), FP32)
    monkeypatch.setattr(post_norm.attention, 'can_run', lambda qkv: 'float64' if qkv.dtype == torch.float64 else None)
    monkeypatch.setattr(post_norm, '_why_not', post_norm._why_not.__wrapped__)
    assert post_norm.can_run(x, x) is None
    assert post_norm.can_run(x, x.bfloat16()) is None
    assert post_norm.can_run(x, x.double()) == 'float64'
    assert "got (2, 128, 128, 64) on 'cpu' and (2, 128, 128, 1) on 'cpu'" in post_norm.can_run(x, x[..., :1])
    assert "(2, 128, 128, 64) on 'meta'" in post_norm.can_run(x, x.to('meta'))
    wide = x[..., :1].expand(-1, -1, -1, 5000)
    assert 'up to 4096 channels, but the feature map has 5000' in post_norm.can_run(wide, wide)
    assert 'below 2097152 elements, got 1048576' in post_norm.can_run(x[:1], x[:1])
    assert 'no operators' in post_norm.can_run(x, x.as_subclass(OnGpu))
    with FlopCounterMode(display=False):
        assert 'no operators' in post_norm.can_run(x, x)


# ---------------------------------------------------------------- blocks


def build(drop_path=0.5, backend='auto', **kwargs):
    torch.manual_seed(0)
    sizes = dict(num_heads=2, window_size=(2, 2), shift_size=(1, 1), pretrained_window_size=(2, 2))
    block = SwinBlock(16, drop_path, extra_norm=True, backend=backend, **sizes | kwargs)
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.bias)
    return block.to(DEVICE)


@pytest.fixture
def fused(monkeypatch):
    """Makes blocks use the kernels on a CPU too; the arguments of their calls."""
    calls = []

    def add(*args):
        calls.append(args)
        return post_norm_add(*args)

    post_norm_add = post_norm.add_post_norm
    monkeypatch.setattr(post_norm, 'add_post_norm', add)
    monkeypatch.setattr(post_norm, 'can_run', lambda x, branch: None)
    monkeypatch.setattr(selfcheck, 'why_not_post_norm', lambda branch: None)
    return calls


def run(block, x, call=lambda block, x: block(x)):
    """Output, gradients and the random state afterwards."""
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    out = call(block, x)
    grads = torch.autograd.grad(out, (x, *block.parameters()), torch.ones_like(out) + out.detach().sin())
    return [out.detach(), *grads], (torch.cuda if DEVICE == 'cuda' else torch).get_rng_state()


@pytest.mark.parametrize('call', [lambda block, x: block(x), checkpoint_module], ids=['', 'recomputed'])
@pytest.mark.parametrize(('dtype', 'tolerance'), [(FP32, 1e-5), (BF16, 0.1)])
@pytest.mark.parametrize('drop_path', [0.0, 0.4])
def test_block_with_post_norm_kernel_is_equal_and_drops_the_same_samples(
    fused, monkeypatch, call, dtype, tolerance, drop_path
):
    block, x = build(drop_path).to(dtype), draw(8, 3, 5, 16, dtype=dtype)[0]
    ours, state = run(block, x, call)
    assert len(fused) == (4 if call is checkpoint_module else 2)
    drawn = [args[5] for args in fused]
    monkeypatch.setattr(selfcheck, 'why_not_post_norm', lambda branch: 'wrong results')
    expected, expected_state = run(block, x, call)
    assert len(fused) == len(drawn)
    assert torch.equal(state, expected_state)
    assert all(0 < int(kept.sum()) < 8 for kept in drawn if drop_path)
    for found, wanted in zip(ours, expected, strict=True):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=0.0, atol=tolerance * float(wanted.abs().max()) + 1e-6)
    if dtype == FP32:
        twin = run(copy.deepcopy(block).double(), x.double())[0] if not drop_path else expected
        torch.testing.assert_close(ours[0].double(), twin[0].double(), rtol=1e-4, atol=1e-5)


def test_block_with_post_norm_kernel_drops_nothing_in_eval_mode(fused):
    block, x = build().eval(), draw(2, 3, 5, 16)[0]
    block(x)
    assert [args[5] for args in fused] == [None, None]


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def replace(name, module):
    return lambda block: setattr(block, name, module)


CHANGES = {
    'hook': lambda block: block.norm1.register_forward_hook(lambda *_: None),
    'hook of drop path': lambda block: block.drop_path.register_forward_pre_hook(lambda *_: None),
    'parametrization': lambda block: parametrize.register_parametrization(block.norm1, 'weight', Doubled()),
    'forward': lambda block: setattr(block.norm1, 'forward', lambda x: x),
    'another norm': replace('norm1', nn.Identity()),
    'no weight': replace('norm1', nn.LayerNorm(16, elementwise_affine=False)),
    'more axes': replace('norm1', nn.LayerNorm((5, 16))),
    'another drop path': replace('drop_path', type('Other', (DropPath,), {})(0.5)),
}


@pytest.mark.parametrize('change', CHANGES)
def test_block_calls_changed_layers_instead_of_the_kernel(fused, change):
    block, x = build(), draw(2, 3, 5, 16)[0]
    CHANGES[change](block.to(DEVICE))
    block.to(DEVICE)(x)
    expected = [] if 'drop path' in change else [block.norm2.weight]
    assert [id(args[2]) for args in fused] == list(map(id, expected))


def test_block_calls_global_hooks_instead_of_the_kernel(fused):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    block = build()
    try:
        block(draw(2, 3, 5, 16)[0])
    finally:
        handle.remove()
    assert not fused
    assert {block.norm1, block.norm2, block.drop_path} <= set(seen)


@pytest.mark.parametrize('backend', ['sdpa', 'reference', 'auto'])
def test_block_with_other_backends_does_not_use_the_kernel(monkeypatch, backend):
    """'auto' too, if the self-check failed."""
    monkeypatch.setattr(post_norm, 'can_run', lambda x, branch: None)
    monkeypatch.setattr(post_norm, 'add_post_norm', None)
    monkeypatch.setattr(selfcheck, 'why_not_post_norm', lambda branch: 'wrong results')
    build(backend=backend)(draw(2, 3, 5, 16)[0])
    assert build(backend='triton')._uses_triton(*draw(2, 3, 5, 16)[:2], nn.LayerNorm(16))


def compiled(block, x):
    torch.compile(block, backend='eager', fullgraph=True)(x)
    torch._dynamo.reset()


def differentiated(block, x):
    weights = dict(block.named_parameters())
    torch.func.grad(lambda weights: functional_call(block, weights, (x,)).sum())(weights)


@pytest.mark.parametrize(
    'record',
    [
        compiled,
        differentiated,
        lambda block, x: torch.fx.symbolic_trace(block),
        lambda block, x: torch.jit.trace(block, x, check_trace=False),
        lambda block, x: torch.func.vmap(block)(x[None]),
    ],
    ids=['compile', 'func.grad', 'fx', 'jit.trace', 'vmap'],
)
@pytest.mark.filterwarnings('ignore')
def test_block_does_not_use_the_kernel_when_compiled_traced_or_transformed(fused, record):
    block, x = build(drop_path=0.0), draw(2, 3, 5, 16)[0]
    record(block, x)
    assert not fused
    block(x)
    assert fused


def test_block_does_not_use_the_kernel_in_dispatch_modes(fused, monkeypatch):
    """`FlopCounterMode`, and a trace by make_fx."""
    monkeypatch.setattr(post_norm, '_why_not', lambda *_: None)
    monkeypatch.setattr(post_norm, 'MIN_ELEMENTS', 0)
    monkeypatch.setattr(post_norm, 'can_run', can_run)
    block, x = build(drop_path=0.0), draw(2, 3, 5, 16)[0]
    with torch.no_grad():
        traced = make_fx(block)(x)
        torch.testing.assert_close(traced(x + 1), block(x + 1))
    with FlopCounterMode(display=False) as counter:
        block(x).sum().backward()
    assert counter.get_total_flops() > 0


# ---------------------------------------------------------------- the compiler
