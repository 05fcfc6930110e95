"""Features and gradients against timm and transformers, with the same random weights."""

import functools

import oracles
import pytest
import torch

from swinv2_mm.models import SwinTransformerV2

ARCH = dict(embed_dims=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))
# image, window, pre-training windows; the last stage of all but the first is smaller than its window
GEOMETRIES = [
    (256, 8, (0, 0, 0, 0)),
    (256, 16, (0, 0, 0, 0)),
    (192, 12, (0, 0, 0, 0)),
    (256, 16, (12, 12, 12, 6)),
    (384, 24, (12, 12, 12, 6)),
]
# Largest difference of features, relative to the largest feature. The reference makes the same sums in the order of the
# peers; the default backend rounds differently.
BACKENDS = [('reference', 0.0), ('auto', 2e-5)]


def build(
    image: int, window: int, pretrained: tuple[int, ...], dtype: torch.dtype = torch.float32, **kwargs
) -> SwinTransformerV2:
    if not any(pretrained):  # the oracles normalise by the window in effect, so ours has to be told of the shrunk one
        pretrained = tuple(min(window, image // stride) for stride in (4, 8, 16, 32))
    kwargs = dict(window_size=window, pretrained_window_sizes=pretrained, drop_path_rate=0.0) | kwargs
    return oracles.randomize(SwinTransformerV2(ARCH, **kwargs)).to(dtype).eval()


def assert_close(outs: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for ours, theirs in zip(outs, expected, strict=True):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def random_image(*size: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, 3, *size, dtype=dtype, generator=torch.Generator().manual_seed(1))


@functools.cache  # every backend is held against the same
@torch.no_grad()
def features_of(peer: str, image: int, window: int, pretrained: tuple[int, ...]) -> list[torch.Tensor]:
    backbone = build(image, window, pretrained)
    twin = getattr(oracles, f'{peer}_twin')(backbone, image, ARCH, window, pretrained).eval()
    return getattr(oracles, f'{peer}_features')(twin, backbone, random_image(image, image, batch=2))


@pytest.mark.parametrize(('backend', 'tolerance'), BACKENDS)
@pytest.mark.parametrize(('image', 'window', 'pretrained'), GEOMETRIES)
@pytest.mark.parametrize('peer', ['timm', 'hf'])
@torch.no_grad()
def test_features_are_those_of_the_peer(peer, image, window, pretrained, backend, tolerance):
    backbone = build(image, window, pretrained, attention_backend=backend)
    outs = backbone(random_image(image, image, batch=2))
    assert_close(outs, features_of(peer, image, window, pretrained), tolerance)


def weighted_sum(outs: list[torch.Tensor]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return sum((o * torch.randn(o.shape, dtype=o.dtype, generator=generator)).sum() for o in outs)


@functools.cache
def gradients_of_timm(image: int, window: int, pretrained: tuple[int, ...]) -> dict[str, torch.Tensor]:
    backbone = build(image, window, pretrained, torch.float64)
    twin = oracles.timm_twin(backbone, image, ARCH, window, pretrained).eval()
    weighted_sum(oracles.timm_features(twin, backbone, random_image(image, image, dtype=torch.float64))).backward()
    return {n: p.grad for n, p in twin.named_parameters() if not n.startswith('norm')}


@pytest.mark.parametrize('backend', ['reference', 'auto'])
@pytest.mark.parametrize(('image', 'window', 'pretrained'), [GEOMETRIES[0], GEOMETRIES[3]])
def test_gradients_of_every_parameter_are_those_of_timm(image, window, pretrained, backend):
    backbone = build(image, window, pretrained, torch.float64, attention_backend=backend)
    weighted_sum(backbone(random_image(image, image, dtype=torch.float64))).backward()
    grads = {oracles.timm_name(n): p.grad for n, p in backbone.named_parameters() if not n.startswith('norm')}
    peer = gradients_of_timm(image, window, pretrained)
    assert grads.keys() == peer.keys()
    for name, grad in grads.items():
        assert peer[name].abs().max() > 0 or name.endswith('logit_scale'), name
        torch.testing.assert_close(
            grad, peer[name], rtol=1e-9, atol=1e-12 * float(peer[name].abs().max() + 1), msg=name
        )


@pytest.mark.parametrize(('backend', 'tolerance'), BACKENDS)
@torch.no_grad()
def test_unmasked_padding_is_that_of_transformers(backend, tolerance):
    """MSRA's dense code attends padding, as transformers does for sizes that its windows do not divide."""
    backbone = build(256, 8, (8, 8, 8, 8), mask_padding=False, attention_backend=backend)
    x = random_image(232, 200)
    twin = oracles.hf_twin(backbone, 256, ARCH, 8, (0, 0, 0, 0))
    assert_close(backbone(x), oracles.hf_features(twin, backbone, x), tolerance)
