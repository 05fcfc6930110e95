"""Backbones with changed layers: adapters, hooks, parametrizations, pruning, quantization, replaced layers.

The oracle is an unchanged backbone with the resulting weights, or the float model.
"""

import copy
import pickle

import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from swinv2_mm.models import SwinTransformerV2

ARCH = dict(embed_dims=16, depths=(2, 1), num_heads=(2, 4))
X = torch.randn(1, 3, 40, 52, generator=torch.Generator().manual_seed(1))
LINEAR = ['qkv', 'proj', 'fc1', 'fc2', 'cpb_mlp.0', 'cpb_mlp.2', 'reduction']


@pytest.fixture
def plain() -> SwinTransformerV2:
    backbone = SwinTransformerV2(ARCH, window_size=4, out_indices=(0, 1), drop_path_rate=0.0)
    return oracles.randomize(backbone).eval()


def layers(backbone: nn.Module, name: str) -> list[tuple[nn.Module, str]]:
    """(parent module, child name) of the linear layers whose name ends in `name`."""
    found = [path.rpartition('.') for path, _ in backbone.named_modules() if path.endswith(f'.{name}')]
    found = [(parent, child) for parent, _, child in found if (name == 'proj') <= parent.endswith('attn')]
    return [(backbone.get_submodule(parent), child) for parent, child in found]


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    with torch.no_grad():
        for ours, theirs in zip(model(X), expected(X), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def assert_every_gradient(model: nn.Module) -> None:
    sum(out.square().mean() for out in model(X)).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and not (p.grad != 0).any()] == []


@pytest.mark.parametrize('targets', [*([name] for name in LINEAR), 'all-linear'], ids=str)
def test_lora_of_peft_changes_the_features_and_trains(plain, targets):
    oracles.find_peers()
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(plain), config)
    assert_every_gradient(model)
    with torch.no_grad():
        assert (model(X)[1] - plain(X)[1]).abs().max() > 1e-2
    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged.layers[0].blocks[0].attn.qkv) is type(plain.layers[0].blocks[0].attn.qkv)
    assert_same(model, merged)


class Wrapper(nn.Module):
    """An adapter whose forward takes only the input, like mmpretrain's LoRALinear."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.layer(x)


@pytest.mark.parametrize('name', LINEAR)
def test_replaced_layer(plain, name):
    other, expected = copy.deepcopy(plain), copy.deepcopy(plain)
    for parent, child in layers(other, name):
        setattr(parent, child, Wrapper(getattr(parent, child)))
    for parent, child in layers(expected, name):
        layer = getattr(parent, child)
        layer.weight.data.mul_(2)
        if layer.bias is not None:
            layer.bias.data.mul_(2)
    assert_same(other, expected)


def test_hooks_run_on_every_leaf_in_every_call(plain):
    leaves = {name: module for name, module in plain.named_modules() if not list(module.children())}
    fired = []
    for name, module in leaves.items():
        module.register_forward_hook(lambda *_, name=name: fired.append(name))
    for _ in range(2):
        fired.clear()
        with torch.no_grad():
            plain(X)
        assert set(fired) == leaves.keys()
    fired.clear()
    for name, module in leaves.items():
        module.register_full_backward_hook(lambda *_, name=name: fired.append(f'backward {name}'))
    sum(out.sum() for out in plain(X)).backward()
    assert set(fired) == leaves.keys() | {f'backward {name}' for name in leaves}


def test_forward_pre_hook_may_replace_the_input(plain):
    hooked = copy.deepcopy(plain)
    for name, module in hooked.named_modules():
        if isinstance(module, nn.Linear) and 'cpb_mlp' not in name:
            module.register_forward_pre_hook(lambda _, inputs: tuple(2 * x for x in inputs))
            plain.get_submodule(name).weight.data.mul_(2)
    assert_same(hooked, plain)


@pytest.mark.parametrize('name', LINEAR)
def test_patched_forward_of_a_layer(plain, name):
    patched = copy.deepcopy(plain)
    for (parent, child), (of_plain, _) in zip(layers(patched, name), layers(plain, name), strict=True):
        layer = getattr(parent, child)
        layer.forward = lambda x, original=layer.forward: 2 * original(x)
        setattr(of_plain, child, Wrapper(getattr(of_plain, child)))
    assert_same(patched, plain)


def test_layer_of_a_user_defined_class(plain):
    other = copy.deepcopy(plain)
    attention = other.layers[0].blocks[0].attn

    class Doubled(type(attention.qkv)):
        def forward(self, x):
            return 2 * super().forward(x)

    attention.qkv.__class__ = Doubled
    plain.layers[0].blocks[0].attn.qkv.weight.data.mul_(2)
    assert_same(other, plain)


def test_log_cpb_with_further_layers(plain):
    before = plain(X)[0].detach()
    with torch.no_grad():
        plain(X)
        for block in plain.layers[0].blocks:
            block.attn.cpb_mlp.append(nn.Hardtanh(-0.1, 0.1))
        assert (plain(X)[0] - before).abs().max() > 1e-3
    assert torch.equal(plain(X)[0].detach(), plain(X)[0].detach())


def test_pickle_and_copy_after_a_cached_bias(plain, tmp_path):
    with torch.no_grad():
        expected = plain(X)
        torch.save(plain, tmp_path / 'model.pth')
        copies = [pickle.loads(pickle.dumps(plain)), copy.deepcopy(plain)]
        copies.append(torch.load(tmp_path / 'model.pth', weights_only=False))
        for twin in copies:
            assert torch.equal(twin(X)[1], expected[1])
            twin.layers[0].blocks[0].attn.cpb_mlp[2].weight.mul_(-1)
            assert not torch.equal(twin(X)[1], expected[1])


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


CHANGES = {
    'parametrize': lambda layer: parametrize.register_parametrization(layer, 'weight', Doubled()),
    'weight_norm': parametrizations.weight_norm,
    'old weight_norm': nn.utils.weight_norm,
    'spectral_norm': parametrizations.spectral_norm,
    'prune': lambda layer: prune.l1_unstructured(layer, 'weight', 0.5),
}


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_parametrized_weights_are_used_and_trained(plain, change):
    model = copy.deepcopy(plain)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in names:
        CHANGES[change](model.get_submodule(name))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        assert_every_gradient(model)
        optimizer.step()
    assert_same(model, with_effective_weights(model, plain, names))


@torch.no_grad()
def with_effective_weights(model: nn.Module, plain: nn.Module, names: list[str]) -> nn.Module:
    """An unchanged backbone with the weights that the layers of `model` use in their forward pass."""
    model(X)  # hooks compute them
    twin = copy.deepcopy(plain)
    for name, parameter in twin.named_parameters():
        owner, _, kind = name.rpartition('.')
        parameter.copy_(getattr(model.get_submodule(owner), kind))
    return twin


@pytest.mark.filterwarnings('ignore')
def test_dynamic_quantization(plain):
    model = torch.ao.quantization.quantize_dynamic(copy.deepcopy(plain), {nn.Linear})
    assert not isinstance(model.layers[0].blocks[0].attn.cpb_mlp[0], nn.Linear)
    with torch.no_grad():
        for ours, theirs in zip(model(X), plain(X), strict=True):
            assert 0 < (ours - theirs).abs().max() < 0.2 * theirs.abs().max()
