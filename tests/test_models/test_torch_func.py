"""Backbones under torch.func, forward-mode AD, torch.fx, the meta device and `FlopCounterMode`."""

import contextlib
import copy

import oracles
import pytest
import torch
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.utils.flop_counter import FlopCounterMode

from swinv2_mm.models import SwinTransformer3DV2, SwinTransformerV2

ARCH = dict(embed_dims=16, depths=(2, 1), num_heads=(2, 4))
X = torch.randn(2, 3, 40, 52, generator=torch.Generator().manual_seed(1))


def build(kind=SwinTransformerV2, seed=0, **kwargs):
    kwargs = dict(arch=ARCH, window_size=4, out_indices=(0, 1), drop_path_rate=0.0) | kwargs
    return oracles.randomize(kind(**kwargs), seed).eval()


def scalar(backbone, x=X):
    return lambda weights: sum(out.square().mean() for out in functional_call(backbone, weights, (x,)))


@pytest.mark.parametrize('options', [{}, dict(sequential_stages=(0,)), dict(with_cp=True)], ids=str)
def test_torch_func_grad_and_jvp_equal_autograd(options):
    backbone = build(**options).double()
    weights, loss = dict(backbone.named_parameters()), scalar(backbone, X.double())
    expected = dict(zip(weights, torch.autograd.grad(loss(weights), tuple(weights.values())), strict=True))
    found = grad(loss)(weights)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)
    tangents = {name: torch.randn_like(value) for name, value in weights.items()}
    _, derivative = jvp(loss, (weights,), (tangents,))
    torch.testing.assert_close(derivative, sum((expected[name] * tangents[name]).sum() for name in weights))


@torch.no_grad()
def test_torch_func_vmap_over_an_ensemble():
    models = [build(seed=seed) for seed in range(3)]
    weights, buffers = stack_module_state(models)
    outs = vmap(lambda w, b: functional_call(models[0], (w, b), (X,)))(weights, buffers)
    for i, model in enumerate(models):
        for out, expected in zip(outs, model(X), strict=True):
            torch.testing.assert_close(out[i], expected, rtol=1e-4, atol=1e-4)


def test_functional_call_gives_gradients_of_its_weights():
    """The backward pass runs after the module got its own weights back."""
    backbone, other = build(), build(seed=1)
    weights = {name: value.detach().clone().requires_grad_() for name, value in other.named_parameters()}
    scalar(backbone)(weights).backward()
    scalar(other)(dict(other.named_parameters())).backward()
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(weights[name].grad, parameter.grad, rtol=1e-6, atol=1e-9, msg=name)


def test_reference_second_derivative_equals_finite_differences():
    backbone = build(attention_backend='reference').double()
    x = X[:1].double().requires_grad_()

    def penalty():
        slope = torch.autograd.grad(sum(out.square().sum() for out in backbone(x)), x, create_graph=True)[0]
        return slope.square().mean()

    weight = backbone.layers[0].blocks[1].attn.cpb_mlp[2].weight
    found = torch.autograd.grad(penalty(), weight)[0]
    step = torch.randn_like(weight) * 1e-6
    values = []
    for sign in (1, -2):
        weight.data += sign * step
        values.append(penalty().detach())
    torch.testing.assert_close((found * step).sum(), (values[0] - values[1]) / 2, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(
    ('kind', 'sizes', 'options'),
    [
        (SwinTransformerV2, [(40, 52), (32, 32)], {}),
        (SwinTransformerV2, [(40, 52), (32, 32)], dict(attention_backend='reference', mask_padding=False)),
        (SwinTransformer3DV2, [(5, 40, 52)], dict(attention_backend='reference', window_size=(2, 4, 4))),
    ],
)
@torch.no_grad()
def test_symbolic_trace_is_equal_at_any_size(kind, sizes, options):
    backbone = build(kind, **options)
    traced = torch.fx.symbolic_trace(backbone)
    for size in sizes:
        x = torch.randn(1, 3, *size)
        for ours, expected in zip(traced(x), backbone(x), strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize(('kind', 'size'), [(SwinTransformerV2, (40, 52)), (SwinTransformer3DV2, (5, 40, 52))])
def test_meta_device_gives_the_output_shapes(kind, size):
    backbone, x = build(kind), torch.randn(2, 3, *size)
    expected = [out.shape for out in backbone(x)]
    with torch.autocast('cpu', torch.bfloat16):
        assert [out.shape for out in copy.deepcopy(backbone).to('meta')(x.to('meta'))] == expected


def count(model, *inputs) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize('with_cp', [False, True])
def test_flop_counter_around_the_backward_pass_only(with_cp):
    backbone = build(with_cp=with_cp)
    for before, after in ((False, True), (True, False)):
        with contextlib.ExitStack() as stack:
            if before:
                stack.enter_context(FlopCounterMode(display=False))
            loss = sum(out.square().sum() for out in backbone(X))
        with contextlib.ExitStack() as stack:
            if after:
                stack.enter_context(FlopCounterMode(display=False))
            loss.backward()


@pytest.mark.parametrize('backend', ['auto', 'reference'])
def test_flop_counter_counts_attention_as_for_timm(backend):
    arch = dict(embed_dims=96, depths=(2, 2), num_heads=(3, 6))
    backbone = build(arch=arch, window_size=8, attention_backend=backend)
    twin = oracles.timm_twin(backbone, 64, arch, 8, (8, 8)).eval()
    x = torch.randn(1, 3, 64, 64)
    # this package pads the rows of the position bias
    assert count(backbone, x) == pytest.approx(count(twin, x), rel=0.01)
    attention = 4 * 64 * 96 * (2 * 256 + 2 * 2 * 64)  # query-key pairs times channels, in both stages
    assert attention > 0.05 * count(twin, x)
