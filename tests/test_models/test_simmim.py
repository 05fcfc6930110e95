"""SimMIM against transformers' `Swinv2ForMaskedImageModeling` with the same weights, images and masks."""

import functools

import oracles
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from swinv2_mm.models import SimMIMSwinTransformerV2, SwinTransformerV2

# no stage with one head: the rounding of PyTorch's product with a single row depends on the number of rows
ARCH = dict(embed_dims=16, depths=(2, 2, 2, 2), num_heads=(2, 4, 8, 16))
SIZE, WINDOWS = 128, (8, 8, 8, 4)  # transformers shrinks window 8 to the feature map of the last stage


def build_backbone(cls: type = SimMIMSwinTransformerV2, **options) -> SwinTransformerV2:
    return oracles.randomize(cls(ARCH, WINDOWS, drop_path_rate=0.0, **options)).double()


def build_model(attention_backend: str) -> nn.Module:
    """SimMIM of mmpretrain with random weights, in float64."""
    pytest.importorskip('mmpretrain.models')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(
            dict(
                type='SimMIM',
                backbone=build_backbone(attention_backend=attention_backend),
                neck=dict(type='SimMIMLinearDecoder', in_channels=128, encoder_stride=32),
                head=dict(
                    type='SimMIMHead',
                    patch_size=4,
                    loss=dict(type='PixelReconstructionLoss', criterion='L1', channel=3),
                ),
            )
        )
    oracles.randomize(model.neck)
    return model.double()


def random_images() -> Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def random_masks() -> Tensor:
    """(2, 32, 32): masks of 32x32 pixels, that is 8x8 patches, over 10 of 16 places."""
    generator = torch.Generator().manual_seed(2)
    masks = torch.stack([(torch.randperm(16, generator=generator) < 10).view(4, 4) for _ in range(2)])
    return masks.repeat_interleave(8, 1).repeat_interleave(8, 2).long()


def hf_names(model: nn.Module) -> dict[str, Tensor]:
    """Parameters of SimMIM by their names in transformers; its final norm is the output norm of our last stage."""
    weights = {f'swinv2.{name}': value for name, value in oracles.hf_weights(model.backbone).items()}
    weights['swinv2.embeddings.mask_token'] = weights.pop('swinv2.mask_token')
    weights |= {f'swinv2.layernorm.{name}': value for name, value in model.backbone.norm3.named_parameters()}
    return weights | {f'decoder.{name}': value for name, value in model.neck.decoder.named_parameters()}


@functools.cache  # shared by the backends
def hf_simmim() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Reconstruction, loss and gradients of transformers in float64."""
    oracles.find_peers()
    from transformers import Swinv2Config, Swinv2ForMaskedImageModeling

    sizes = dict(image_size=SIZE, window_size=8, encoder_stride=32)
    arch = dict(embed_dim=ARCH['embed_dims'], depths=list(ARCH['depths']), num_heads=list(ARCH['num_heads']))
    twin = Swinv2ForMaskedImageModeling(Swinv2Config(**sizes, **arch, drop_path_rate=0.0)).double()
    missing, unexpected = twin.load_state_dict(hf_names(build_model('reference')), strict=False)
    assert ([name for name in missing if 'relative' not in name], unexpected) == ([], [])
    out = twin(random_images(), bool_masked_pos=random_masks().flatten(1).bool())
    out.loss.backward()
    return out.reconstruction.detach(), out.loss.detach(), {name: p.grad for name, p in twin.named_parameters()}


@pytest.mark.parametrize('backend', ['reference', 'auto'])
def test_loss_and_gradients_equal_transformers(backend):
    model, images, masks = build_model(backend), random_images(), random_masks()
    from mmpretrain.structures import DataSample

    reconstruction, loss, gradients = hf_simmim()
    torch.testing.assert_close(model.neck(model.backbone(images, masks)[0]), reconstruction, rtol=1e-11, atol=1e-11)
    found = model.loss(images, [DataSample().set_mask(mask) for mask in masks])['loss']
    # transformers divides by the number of masked pixels + 1e-5, in float32, where a number from 256 on stays the same
    torch.testing.assert_close(found, loss, rtol=1e-13, atol=0)
    found.backward()
    for p in model.parameters():
        p.data = p.grad
    found = hf_names(model)
    assert found.keys() == gradients.keys()
    for name, expected in gradients.items():
        assert expected.abs().max() > 0 or name.endswith('logit_scale'), name
        atol = 1e-12 * float(expected.abs().max() + 1)
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=atol, msg=name)


@torch.no_grad()
def test_without_a_mask_it_is_the_plain_backbone():
    plain, backbone = build_backbone(SwinTransformerV2, out_indices=(3,)), build_backbone()
    backbone.load_state_dict(plain.state_dict(), strict=False)
    images = random_images()
    for outs in (backbone(images), backbone(images, torch.zeros(2, 32, 32))):
        assert all(map(torch.equal, outs, plain(images)))


def test_features_do_not_depend_on_masked_pixels():
    backbone, images, masks = build_backbone(), random_images().requires_grad_(), random_masks()
    backbone(images, masks)[0].square().sum().backward()
    pixels = masks.repeat_interleave(4, 1).repeat_interleave(4, 2).bool()
    seen = images.grad.abs().sum(1) > 0
    assert not seen[pixels].any()
    assert seen[~pixels].all()


def test_a_mask_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r'shape \(2, 32, 32\), got \(2, 16, 16\): set input_size'):
        build_backbone()(random_images(), torch.zeros(2, 16, 16))


def test_several_outputs_are_an_error():
    with pytest.raises(ValueError, match=r'SimMIM decodes one stage, but out_indices=\(0, 3\)'):
        SimMIMSwinTransformerV2('tiny', out_indices=(0, 3))


def test_the_mask_token_starts_as_in_the_official_code():
    backbone = SimMIMSwinTransformerV2(dict(embed_dims=1024, depths=(1,), num_heads=(32,)), out_indices=(0,))
    nn.init.ones_(backbone.mask_token)
    backbone.init_weights()
    assert backbone.mask_token.shape == (1, 1, 1024)
    assert abs(backbone.mask_token.mean()) < 0.002
    assert 0.018 < backbone.mask_token.std() < 0.022


def test_the_target_is_normalized_by_the_pixels_around_each_pixel():
    pytest.importorskip('mmpretrain')
    from swinv2_mm.models.pretraining import NormalizedSimMIMHead

    head = NormalizedSimMIMHead(4, dict(type='mmpretrain.PixelReconstructionLoss', criterion='L1', channel=3), 7)
    target = torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = torch.empty_like(target)
    for y in range(12):
        for x in range(16):
            around = target[:, :, max(y - 3, 0) : y + 4, max(x - 3, 0) : x + 4].flatten(2)
            expected[..., y, x] = (target[..., y, x] - around.mean(2)) / (around.var(2) + 1e-6).sqrt()
    prediction = torch.randn_like(target, requires_grad=True)
    mask = torch.zeros(2, 3, 4)
    mask[:, 0, 1] = mask[1, 2, 3] = 1  # three patches of 16 pixels
    pixels = mask.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
    loss = ((prediction - expected).abs() * pixels).sum() / (3 * 16 * 3)
    torch.testing.assert_close(head.loss(prediction, target, mask), loss, rtol=1e-12, atol=0)


def test_the_window_of_the_target_must_be_odd():
    pytest.importorskip('mmpretrain')
    from swinv2_mm.models.pretraining import NormalizedSimMIMHead

    with pytest.raises(ValueError, match='norm_window must be an odd number above 1, such as 47, got 48'):
        NormalizedSimMIMHead(4, dict(type='mmpretrain.PixelReconstructionLoss', criterion='L1'), 48)
