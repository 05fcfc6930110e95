"""Behaviour of the backbone beyond features: input sizes, modes, memory, initialisation, weights, errors."""

import copy
import math
from collections import Counter

import numpy as np
import oracles
import pytest
import torch
from mmcv.cnn.bricks import DropPath
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from swinv2_mm.models import BFloat16SwinTransformerV2, SwinTransformerV2
from swinv2_mm.models.block import SwinBlock
from swinv2_mm.ops import reference

ARCH = dict(embed_dims=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))


def build(**kwargs) -> SwinTransformerV2:
    kwargs = dict(arch=ARCH, window_size=4, drop_path_rate=0.0) | kwargs
    return oracles.randomize(SwinTransformerV2(**kwargs))


def image(*size: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def grads(backbone: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    backbone.zero_grad()
    torch.manual_seed(3)  # the same drop path in all runs
    sum(o.square().mean() for o in backbone(x)).backward()
    return {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('size', [(64, 64), (64, 96), (65, 129), (100, 44), (7, 200), (1, 1)])
@torch.no_grad()
def test_swin_v2_takes_any_input_size(size):
    outs = build().eval()(image(*size))
    assert [tuple(o.shape) for o in outs] == [
        (1, 16 * 2**i, math.ceil(size[0] / s), math.ceil(size[1] / s)) for i, s in enumerate((4, 8, 16, 32))
    ]
    assert all(o.isfinite().all() for o in outs)


@torch.no_grad()
def test_swin_v2_shrinks_a_window_larger_than_the_feature_map():
    x, pretrained = image(64, 40), (4, 4, 4, 2)
    large = build(window_size=16, pretrained_window_sizes=pretrained).eval()
    exact = build(window_size=((16, 10), (8, 5), (4, 3), (2, 2)), pretrained_window_sizes=pretrained).eval()
    for a, b in zip(large(x), exact(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_swin_v2_masks_padding_unless_mask_padding_is_false():
    x = image(72, 56)
    masked, unmasked = build().eval()(x), build(mask_padding=False).eval()(x)
    whole = image(64, 128)
    assert not torch.allclose(masked[0], unmasked[0], atol=1e-3)
    for a, b in zip(build().eval()(whole)[:2], build(mask_padding=False).eval()(whole)[:2], strict=True):
        assert torch.equal(a, b)  # nothing is padded in the first two stages


@torch.no_grad()
def test_swin_v2_with_a_window_of_one_token_is_finite():
    assert all(o.isfinite().all() for o in build(window_size=1).eval()(image(32, 32)))


# --- half precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('dtype', 'mask_padding'), [(torch.float16, True), (torch.float16, False), (torch.bfloat16, True)]
)
def test_swin_v2_gradients_are_finite_under_autocast_with_padding(dtype, mask_padding):
    backbone = build(mask_padding=mask_padding)
    with torch.autocast('cpu', dtype=dtype):
        loss = sum(o.float().square().mean() for o in backbone(image(72, 56)))
    (loss * 1024).backward()  # loss scaling, as in fp16 training
    for name, p in backbone.named_parameters():
        assert p.grad.isfinite().all(), name


def test_bfloat16_swin_v2_computes_under_autocast_and_returns_float32():
    backbone = build().train()
    ours = BFloat16SwinTransformerV2(arch=ARCH, window_size=4, drop_path_rate=0.0).train()
    ours.load_state_dict(backbone.state_dict())
    x = image(64, 40)
    with torch.autocast('cpu', torch.bfloat16):
        expected = backbone(x)
    features = ours(x)
    assert expected[0].dtype == torch.bfloat16
    assert {feature_map.dtype for feature_map in features} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))
    sum(feature_map.sum() for feature_map in features).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in ours.parameters())


@torch.no_grad()
def test_swin_v2_with_bfloat16_weights_gives_bfloat16_features():
    x = image(40, 40)
    backbone = build().eval()
    expected = backbone(x)[0]
    out = backbone.bfloat16()(x.bfloat16())[0]
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).norm() < 0.05 * expected.norm()


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('options', [dict(sequential_stages=(0, 1, 2, 3)), dict(with_cp=True, sequential_stages=(1,))])
def test_sequential_stages_keep_every_gradient(monkeypatch, options):
    monkeypatch.setattr(reference, 'CHUNK', 1)  # one window at a time
    x, kwargs = image(40, 56, batch=3), dict(drop_path_rate=0.5, attention_backend='reference')
    plain, saving = build(**kwargs), build(**kwargs, **options)
    expected = grads(plain.train(), x)
    for name, grad in grads(saving.train(), x).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(('with_cp', 'autocast'), [(True, False), ((0, 2), True)])
def test_with_cp_is_bitwise_equal_and_keeps_random_numbers(with_cp, autocast):
    def run(**options):
        torch.manual_seed(1)
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            found = grads(build(drop_path_rate=0.5, **options).train(), image(40, 56, batch=3))
        return found, torch.get_rng_state()

    expected, state = run()
    found, state_after = run(with_cp=with_cp)
    assert torch.equal(state, state_after)
    for name, grad in found.items():
        assert torch.equal(grad, expected[name]), name


@pytest.mark.parametrize('stages', [(0,), (1, 3)])
def test_with_cp_of_some_stages_recomputes_only_their_blocks(stages):
    backbone, calls = build(with_cp=stages).train(), Counter()
    for i, stage in enumerate(backbone.layers):
        for block in stage.blocks:
            block.mlp.register_forward_pre_hook(lambda *_, i=i: calls.update([i]))
    sum(out.sum() for out in backbone(image(32, 32))).backward()
    for i, stage in enumerate(backbone.layers):
        assert calls[i] == len(stage.blocks) * (2 if i in stages else 1)


def saved_bytes(backbone: nn.Module, x: torch.Tensor) -> int:
    seen = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.setdefault(t.data_ptr(), t), lambda t: t):
        outs = backbone(x)
    own = {p.data_ptr() for p in backbone.parameters()}
    del outs
    return sum(t.untyped_storage().nbytes() for pointer, t in seen.items() if pointer not in own)


def test_with_cp_and_sequential_stages_save_less_for_the_backward_pass():
    def saved(backend, **options):
        arch = ARCH | dict(num_heads=(8, 8, 8, 8))
        backbone = build(arch=arch, window_size=(16, 4, 4, 4), attention_backend=backend, **options)
        return saved_bytes(backbone, image(256, 256))

    plain, sequential = saved('reference'), saved('reference', sequential_stages=(0, 1, 2, 3))
    assert sequential < 0.3 * plain
    assert saved('reference', with_cp=True) < 0.1 * plain
    assert saved('auto') <= sequential
    assert saved('auto', with_cp=True) < 0.1 * plain


class HalfTensors(TorchDispatchMode):
    """Weak references to the bfloat16 tensors of some shapes that operators returned."""

    def __init__(self, shapes: set[tuple[int, ...]]):
        super().__init__()
        self.shapes, self.found = shapes, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.bfloat16 and tuple(out.shape) in self.shapes:
            self.found.append(StorageWeakRef(out.untyped_storage()))
        return out

    def alive(self) -> int:
        return sum(not found.expired() for found in self.found)


@pytest.mark.parametrize('with_cp', [False, True])
def test_with_cp_keeps_no_half_precision_copy_of_a_weight(with_cp):
    # 24 channels: no activation has the shape of a weight
    backbone, x = build(with_cp=with_cp, arch=ARCH | dict(embed_dims=24)).train(), image(32, 32)
    weights = {tuple(block.mlp.fc1.weight.shape) for stage in backbone.layers for block in stage.blocks}
    with torch.autocast('cpu', torch.bfloat16), HalfTensors(weights) as tensors:
        outs = backbone(x)
        assert tensors.found
        assert (tensors.alive() == 0) == with_cp
    assert torch.is_autocast_cache_enabled()
    sum(out.sum() for out in outs).backward()


# --- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('frozen_stages', [0, 1, 3])
def test_frozen_stages_have_no_gradient_and_stay_in_eval_mode(frozen_stages):
    backbone = build(frozen_stages=frozen_stages, drop_path_rate=0.5).train()
    found = grads(backbone, image(64, 64))
    frozen = (
        'patch_embed.',
        *(f'layers.{i}.' for i in range(frozen_stages)),
        *(f'norm{i}.' for i in range(frozen_stages)),
    )
    assert {n for n, _ in backbone.named_parameters()} - set(found) == {
        n for n, _ in backbone.named_parameters() if n.startswith(frozen)
    }
    for name, module in backbone.named_modules():
        assert module.training != f'{name}.'.startswith(frozen), name


def test_swin_v2_has_a_gradient_for_every_parameter():
    assert set(grads(build().train(), image(64, 64))) == {n for n, _ in build().named_parameters()}


def test_out_indices_builds_no_stage_after_the_last():
    """15.4 of the 27.6 million parameters of T belong to its last stage and the patch merging before it."""
    with torch.device('meta'):
        sizes = [sum(p.numel() for p in SwinTransformerV2(out_indices=(0, 1, 2)[:n]).parameters()) for n in (1, 3)]
        whole = SwinTransformerV2()
    later = [p for name, p in whole.named_parameters() if name.startswith(('layers.3', 'layers.2.downsample', 'norm3'))]
    assert sizes[1] == sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in later)
    assert (sizes[1] / 1e6, sum(p.numel() for p in later) / 1e6) == pytest.approx((12.2, 15.4), abs=0.05)
    assert sizes[0] < sizes[1] / 10
    backbone = build(out_indices=(1, 0), drop_path_rate=0.0).train()
    assert set(grads(backbone, image(64, 64))) == {n for n, _ in backbone.named_parameters()}


@torch.no_grad()
def test_out_indices_loads_a_checkpoint_with_further_stages():
    whole = build().eval()
    part = SwinTransformerV2(ARCH, 4, out_indices=(0, 2)).eval()
    part.load_state_dict(whole.state_dict())
    for ours, expected in zip(part(image(64, 64)), whole(image(64, 64))[::2], strict=True):
        assert torch.equal(ours, expected)


def test_norm_eval_keeps_norms_in_eval_mode():
    backbone = build(norm_eval=True).train()
    assert backbone.layers[0].blocks[0].training
    assert not any(m.training for m in backbone.modules() if isinstance(m, nn.LayerNorm))


def test_train_and_eval_return_the_backbone():
    backbone = build()
    assert backbone.eval() is backbone
    assert backbone.train() is backbone


@torch.no_grad()
def test_deepcopy_is_equal_and_independent():
    backbone = build().eval()
    twin, x = copy.deepcopy(backbone), image(40, 40)
    assert torch.equal(twin(x)[3], backbone(x)[3])
    before = backbone(x)[3]
    for p in twin.parameters():
        p.zero_()
    assert torch.equal(backbone(x)[3], before)


@torch.no_grad()
def test_drop_path_drops_a_branch_with_the_bias_of_its_norm():
    block = build(drop_path_rate=0.999).layers[3].blocks[1].train()
    assert isinstance(block.drop_path, DropPath)
    assert block.norm1.bias.abs().min() > 0.1
    x = torch.randn(8, 4, 4, 128)
    torch.manual_seed(0)  # eight samples, two branches: all are dropped
    assert torch.equal(block(x), x)


def test_drop_path_rate_grows_linearly_over_the_blocks():
    with torch.device('meta'):
        backbone = SwinTransformerV2('tiny', drop_path_rate=0.2)
    rates = [getattr(m.drop_path, 'drop_prob', 0.0) for m in backbone.modules() if isinstance(m, SwinBlock)]
    assert rates == pytest.approx(torch.linspace(0, 0.2, 12).tolist())


# --- weights ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_new_block_is_the_identity():
    backbone = SwinTransformerV2(ARCH, window_size=4).eval()
    x = image(32, 32)
    expected = backbone.norm0(backbone.patch_embed(x)).permute(0, 3, 1, 2)
    assert torch.equal(backbone(x)[0], expected)


def test_init_weights_as_in_the_official_code():
    backbone = SwinTransformerV2(ARCH | dict(embed_dims=32))
    attn, mlp = backbone.layers[2].blocks[0].attn, backbone.layers[2].blocks[0].mlp
    assert attn.logit_scale.flatten().tolist() == pytest.approx([math.log(10)] * 4)
    assert float(attn.qkv.weight.std()) == pytest.approx(0.02, rel=0.02)
    assert float(attn.cpb_mlp[0].weight.std()) == pytest.approx(0.02, rel=0.2)
    for zero in (attn.q_bias, attn.v_bias, attn.proj.bias, attn.cpb_mlp[0].bias, mlp.fc1.bias):
        assert zero.eq(0).all()
    assert backbone.norm2.weight.eq(1).all()


def test_init_weights_after_the_meta_device_initialises_everything():
    """FSDP builds on the meta device, allocates uninitialised memory, and calls init_weights."""
    with torch.device('meta'):
        backbone = SwinTransformerV2(ARCH, window_size=4)
    backbone.to_empty(device='cpu')
    for p in backbone.parameters():
        nn.init.constant_(p, math.nan)
    backbone.init_weights()
    assert all(p.isfinite().all() for p in backbone.parameters())
    assert all(o.isfinite().all() for o in backbone(image(40, 40)))


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_init_cfg_loads_a_checkpoint_of_this_package(tmp_path, prefix):
    trained = build()
    torch.save(dict(state_dict={prefix + k: v for k, v in trained.state_dict().items()}), tmp_path / 'a.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth'), prefix=prefix or None)
    backbone = SwinTransformerV2(ARCH, window_size=4, init_cfg=init_cfg)
    backbone.init_weights()
    assert all(torch.equal(a, b) for a, b in zip(backbone.parameters(), trained.parameters(), strict=True))


def test_state_dict_has_only_parameters_and_pretrained_windows():
    backbone = SwinTransformerV2(ARCH, window_size=4)
    backbone.eval()(image(40, 40))
    others = set(backbone.state_dict()) - {n for n, _ in backbone.named_parameters()}
    assert others == {f'layers.{i}.blocks.{j}.attn.cpb_mlp.pretrained_window_size' for i in range(4) for j in range(2)}


# of the official code, with the final norm but without the classifier; H and G plus their extra norms
COUNTS = dict(
    tiny=27_578_154,
    small=48_959_418,
    base=86_893_816,
    large=195_202_932,
    huge=655_210_922 + 8_448,
    giant_simmim=1_060_976_996,
    giant=2_997_815_008 + 28_672,
)


@pytest.mark.parametrize(('arch', 'count'), COUNTS.items())
def test_parameter_counts_of_the_official_code(arch, count):
    with torch.device('meta'):
        backbone = SwinTransformerV2(arch, out_indices=(3,))
    assert sum(p.numel() for p in backbone.parameters()) == count


@pytest.mark.parametrize(('arch', 'last'), [('huge', 17), ('giant', 41)])
def test_extra_norm_in_every_sixth_block_of_huge_and_giant(arch, last):
    with torch.device('meta'):
        backbone = SwinTransformerV2(arch)
    normed = {name for name, m in backbone.named_modules() if isinstance(m, SwinBlock) and m.enorm is not None}
    assert normed == {f'layers.2.blocks.{i}' for i in range(5, last + 1, 6)}


@torch.no_grad()
def test_extra_norm_is_after_the_second_residual():
    backbone = build(arch=ARCH | dict(extra_norm_every_n_blocks=2)).eval()
    block, x = backbone.layers[0].blocks[1], torch.randn(1, 8, 8, 16)
    norm, block.enorm = block.enorm, None
    expected = nn.functional.layer_norm(block(x), (16,), norm.weight, norm.bias)
    block.enorm = norm
    assert torch.equal(block(x), expected)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(arch='titanic'), "'titanic' is not known; use one of tiny, small"),
        (dict(arch=dict(embed_dims=16, depths=(2, 2))), 'must have the keys'),
        (dict(arch=dict(embed_dims=16, depths=(2, 2), num_heads=(1, 2, 4))), 'one entry per stage'),
        (dict(arch=ARCH | dict(num_heads=(1, 3, 4, 8))), '3 does not divide the 32 of stage 1'),
        (
            dict(window_size=(8, 8, 8)),
            'window_size must be one number, 2 for the axes, or one entry for each of the 4 stages',
        ),
        (dict(window_size=(8, 8, 0, 8)), 'window_size of stage 2 must be a number of at least 1'),
        (dict(window_size=((8, 8, 8),) * 4), 'window_size of stage 0 must be a number of at least 1, or 2 of them'),
        (dict(pretrained_window_sizes=(12, 12, 6)), 'pretrained_window_sizes must be one number'),
        (dict(out_indices=(0, 4)), 'out_indices must be different stages between 0 and 3'),
        (dict(out_indices=()), 'at least one stage'),
        (dict(sequential_stages=(-1,)), 'sequential_stages must be different stages'),
        (dict(with_cp=(1, 1)), 'with_cp must be different stages'),
        (dict(frozen_stages=5), 'frozen_stages must lie between -1 and 4'),
        (dict(drop_path_rate=1.0), r'drop_path_rate must lie in \[0, 1\)'),
        (dict(attention_backend='flash'), "'flash' is not known"),
        (dict(patch_size=0), 'patch_size must be a number of at least 1'),
        (dict(in_channels=0), 'in_channels must be at least 1, got 0'),
        (dict(arch=ARCH | dict(depths=(2, -1, 2, 2))), r'arch.depths\[1\] must be at least 0, got -1'),
        (dict(arch=ARCH | dict(num_heads=(1, 2, 4, 0))), r'arch.num_heads\[3\] must be at least 1, got 0'),
        (dict(arch=ARCH | dict(extra_norm_every_n_blocks=-1)), 'arch.extra_norm_every_n_blocks must be at least 0'),
    ],
)
def test_swin_v2_names_invalid_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SwinTransformerV2(**dict(arch=ARCH, window_size=4) | kwargs)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(out_indices=3), 'out_indices must be a list, got 3 of type int'),
        (dict(with_cp=1), 'with_cp must be True or False or a list, got 1 of type int'),
        (dict(window_size=7.0), 'window_size must be a whole number or a list, got 7.0 of type float'),
        (dict(window_size=(8, 8, None, 8)), r'window_size\[2\] must be a whole number or a list, got None'),
        (
            dict(pretrained_window_sizes='12'),
            "pretrained_window_sizes must be a whole number or a list or None, got '12'",
        ),
        (dict(patch_size=True), 'patch_size must be a whole number or a list, got True of type bool'),
        (dict(drop_path_rate='0.2'), "drop_path_rate must be a number, got '0.2' of type str"),
        (dict(frozen_stages='1'), 'frozen_stages must be a whole number'),
        (dict(norm_eval=None), 'norm_eval must be True or False, got None'),
        (dict(attention_backend=None), 'attention_backend must be a string'),
        (dict(init_cfg='a.pth'), "init_cfg must be a dict or a list or None, got 'a.pth'"),
        (dict(arch=3), 'arch must be a string or a dict, got 3'),
        (dict(arch=ARCH | dict(depths=2)), 'arch.depths must be a list, got 2 of type int'),
        (dict(arch=ARCH | dict(depths=(2, 2, '2', 2))), r"arch.depths\[2\] must be a whole number, got '2'"),
        (dict(arch=ARCH | dict(embed_dims='96')), "arch.embed_dims must be a whole number, got '96'"),
    ],
)
def test_swin_v2_names_arguments_of_another_type(kwargs, message):
    with pytest.raises(TypeError, match=message):
        SwinTransformerV2(**dict(arch=ARCH, window_size=4) | kwargs)


def test_swin_v2_takes_numpy_numbers_and_lists():
    arch = dict(embed_dims=np.int64(16), depths=[1, np.int32(1)], num_heads=np.array([1, 2]))
    sizes = dict(window_size=np.int64(4), in_channels=np.int64(3), out_indices=[np.int64(1)], frozen_stages=np.int64(0))
    backbone = SwinTransformerV2(arch, drop_path_rate=np.float32(0.5), with_cp=[0], init_cfg=[], **sizes)
    plain = SwinTransformerV2(dict(embed_dims=16, depths=(1, 1), num_heads=(1, 2)), 4, out_indices=(1,))
    assert {n: p.shape for n, p in backbone.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    assert backbone.windows == plain.windows == [(4, 4), (4, 4)]


@pytest.mark.parametrize('shape', [(3, 32, 32), (1, 4, 32, 32), (1, 3, 8, 32, 32)])
def test_swin_v2_names_the_expected_input_shape(shape):
    with pytest.raises(ValueError, match=r'takes an input of shape \(N, 3, H, W\), got'):
        build()(torch.zeros(shape))
