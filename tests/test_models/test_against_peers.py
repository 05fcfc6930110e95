"""Features and gradients against timm and transformers, with the same random weights."""

import functools

import oracles
import pytest
import torch
from torch import Tensor

from swinv2_mm.models import SwinTransformerV2

# no stage with one head: the rounding of PyTorch's product with a single row depends on the number of rows
ARCH = dict(embed_dims=16, depths=(2, 2, 2, 2), num_heads=(2, 4, 8, 16))
# image size, window, pre-training windows; 0 where the peers use the window itself
GEOMETRIES = [
    (256, 8, (0, 0, 0, 0)),  # divisible in every stage; one window in the last
    (224, 7, (12, 12, 12, 6)),  # an odd window, shifted by 3, with a larger pre-training window
    (128, 8, (6, 6, 6, 3)),  # the last stage is smaller than its window
    (128, 16, (0, 0, 0, 0)),  # the last two stages are
]
# Tolerance of features in float32, relative to the largest. The reference does the same operations as the peers in the
# same order; the default backend rounds differently.
BACKENDS = [('reference', 0.0), ('auto', 2e-5)]


def build(image: int, window: int, pretrained: tuple[int, ...], **kwargs) -> SwinTransformerV2:
    if not any(pretrained):  # the peers use the window in effect, which may be shrunk
        pretrained = tuple(min(window, image // stride) for stride in (4, 8, 16, 32))
    kwargs = dict(window_size=window, pretrained_window_sizes=pretrained, drop_path_rate=0.0) | kwargs
    return oracles.randomize(SwinTransformerV2(ARCH, **kwargs)).eval()


def assert_close(outs: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for ours, theirs in zip(outs, expected, strict=True):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def random_image(*size: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def weighted_sum(outs: list[Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return sum((o * torch.randn(o.shape, dtype=o.dtype, generator=generator)).sum() for o in outs)


@functools.cache  # shared by the backends
def timm(geometry: tuple) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Features in float32, and gradients in float64."""
    backbone, x = build(*geometry), random_image(geometry[0], geometry[0], batch=2)
    twin = oracles.timm_twin(backbone, geometry[0], ARCH, *geometry[1:]).eval()
    with torch.no_grad():
        features = oracles.timm_features(twin, backbone, x)
    weighted_sum(oracles.timm_features(twin.double(), backbone.double(), x[:1].double())).backward()
    return features, {name: p.grad for name, p in twin.named_parameters() if not name.startswith('norm')}


@pytest.mark.parametrize(('backend', 'tolerance'), BACKENDS)
@pytest.mark.parametrize('geometry', GEOMETRIES, ids=str)
def test_swin_v2_features_and_gradients_equal_timm(geometry, backend, tolerance):
    if geometry[1] % 2:
        # the size of the peers' bias is no multiple of 16, and some CPUs compute the last elements by another routine
        tolerance = max(tolerance, 1e-6)
    backbone, x = build(*geometry, attention_backend=backend), random_image(geometry[0], geometry[0], batch=2)
    features, gradients = timm(geometry)
    with torch.no_grad():
        assert_close(backbone(x), features, tolerance)
    weighted_sum(backbone.double()(x[:1].double())).backward()
    found = {oracles.timm_name(n): p.grad for n, p in backbone.named_parameters() if not n.startswith('norm')}
    assert found.keys() == gradients.keys()
    for name, expected in gradients.items():
        assert expected.abs().max() > 0 or name.endswith('logit_scale'), name
        scale = float(expected.abs().max() + 1)
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12 * scale, msg=name)


@pytest.mark.parametrize('geometry', GEOMETRIES[:3:2], ids=str)
@torch.no_grad()
def test_swin_v2_features_equal_transformers(geometry):
    backbone, x = build(*geometry, attention_backend='reference'), random_image(geometry[0], geometry[0], batch=2)
    twin = oracles.hf_twin(backbone, geometry[0], ARCH, *geometry[1:])
    assert_close(backbone(x), oracles.hf_features(twin, backbone, x), 0.0)


@torch.no_grad()
def test_swin_v2_without_mask_padding_equals_transformers():
    """Transformers attends to padding where the window does not divide the feature map, as does MSRA's dense code."""
    x = random_image(230, 197)  # patches do not divide the image either
    for backend, tolerance in BACKENDS:
        backbone = build(256, 8, (8, 8, 8, 8), mask_padding=False, attention_backend=backend)
        twin = oracles.hf_twin(backbone, 256, ARCH, 8, (0, 0, 0, 0))
        assert_close(backbone(x), oracles.hf_features(twin, backbone, x), tolerance)
