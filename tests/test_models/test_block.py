"""The chunked MLP against its formula over all tokens."""

import copy

import pytest
import torch
import torch.nn.functional as F

from swinv2_mm.models.block import CPU_TOKENS, Mlp

SHAPES = [(0, 4, 16), (1, 1, 16), (2, 7, 9, 16), (CPU_TOKENS, 16), (1, CPU_TOKENS + 1, 16), (2, 3, 40, 30, 16)]


@pytest.fixture(scope='module')
def mlp():
    torch.manual_seed(0)
    return Mlp(16)


def formula(mlp: Mlp, x: torch.Tensor) -> torch.Tensor:
    hidden = x @ mlp.fc1.weight.T + mlp.fc1.bias
    return F.gelu(hidden) @ mlp.fc2.weight.T + mlp.fc2.bias


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_mlp_equals_its_formula_for_any_number_of_tokens(mlp, shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    mlp = mlp.double()
    inputs = x, *mlp.parameters()
    out, expected = mlp(x), formula(mlp, x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(out)
    grads, expected = torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad)
    torch.testing.assert_close(grads, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_mlp_in_chunks_is_bitwise_equal(mlp, shape):
    mlp, x = mlp.float(), torch.randn(shape)
    with torch.no_grad():
        assert torch.equal(mlp(x), mlp.fc2(F.gelu(mlp.fc1(x))))


def test_mlp_computes_hidden_channels_in_chunks(mlp, monkeypatch):
    mlp, sizes = mlp.float(), []
    monkeypatch.setattr(F, 'gelu', lambda x, gelu=F.gelu, **kwargs: sizes.append(len(x)) or gelu(x, **kwargs))
    with torch.no_grad():
        mlp(torch.randn(2, 40, 30, 16))
    assert sizes == [800, 800, 800]


def test_mlp_passes_all_tokens_at_once_to_a_replaced_layer(mlp):
    class Centred(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x - x.mean((0, 1, 2)))

    mlp, x = copy.deepcopy(mlp).float(), torch.randn(2, 40, 30, 16)
    mlp.fc1.__class__ = Centred
    with torch.no_grad():
        assert torch.equal(mlp(x), mlp.fc2(F.gelu(mlp.fc1(x))))


def test_mlp_passes_all_tokens_at_once_to_a_hook(mlp):
    mlp, x, seen = mlp.float(), torch.randn(2, 40, 30, 16), []
    handle = mlp.fc1.register_forward_hook(lambda module, inputs, out: seen.append((inputs[0], out)))
    with torch.no_grad():
        mlp(x)
        handle.remove()
        assert [inputs is x for inputs, _ in seen] == [True]
        assert torch.equal(seen[0][1], mlp.fc1(x))
