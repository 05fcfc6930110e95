"""Features and gradients against timm and transformers, with the same random weights."""

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


def build(
    image: int, window: int, pretrained: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> SwinTransformerV2:
    if not any(pretrained):  # the oracles normalise by the window in effect, so ours has to be told of the shrunk one
        pretrained = tuple(min(window, image // stride) for stride in (4, 8, 16, 32))
    backbone = SwinTransformerV2(ARCH, window_size=window, pretrained_window_sizes=pretrained, drop_path_rate=0.0)
    return oracles.randomize(backbone).to(dtype).eval()


@pytest.mark.parametrize(('image', 'window', 'pretrained'), GEOMETRIES)
@pytest.mark.parametrize('peer', ['timm', 'hf'])
@torch.no_grad()
def test_features_are_those_of_the_peer(peer, image, window, pretrained):
    backbone = build(image, window, pretrained)
    x = torch.randn(2, 3, image, image, generator=torch.Generator().manual_seed(1))
    twin = getattr(oracles, f'{peer}_twin')(backbone, image, ARCH, window, pretrained).eval()
    expected = getattr(oracles, f'{peer}_features')(twin, backbone, x)
    for ours, theirs in zip(backbone(x), expected, strict=True):
        assert (ours - theirs).abs().max() == 0.0


@pytest.mark.parametrize(('image', 'window', 'pretrained'), [GEOMETRIES[0], GEOMETRIES[3]])
def test_gradients_of_every_parameter_are_those_of_timm(image, window, pretrained):
    backbone = build(image, window, pretrained, torch.float64)
    twin = oracles.timm_twin(backbone, image, ARCH, window, pretrained).eval()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 3, image, image, dtype=torch.float64, generator=generator)
    outs = backbone(x)
    weights = [torch.randn(o.shape, dtype=o.dtype, generator=generator) for o in outs]
    sum((o * w).sum() for o, w in zip(outs, weights, strict=True)).backward()
    grads = {oracles.timm_name(n): p.grad.clone() for n, p in backbone.named_parameters() if not n.startswith('norm')}
    theirs = oracles.timm_features(twin, backbone, x)
    sum((o * w).sum() for o, w in zip(theirs, weights, strict=True)).backward()
    peer = {n: p.grad for n, p in twin.named_parameters() if not n.startswith('norm')}
    assert grads.keys() == peer.keys()
    for name, grad in grads.items():
        assert peer[name].abs().max() > 0 or name.endswith('logit_scale'), name
        torch.testing.assert_close(
            grad, peer[name], rtol=1e-9, atol=1e-12 * float(peer[name].abs().max() + 1), msg=name
        )


@torch.no_grad()
def test_unmasked_padding_is_that_of_transformers():
    """MSRA's dense code attends padding, as transformers does for sizes that its windows do not divide."""
    backbone = SwinTransformerV2(ARCH, window_size=8, drop_path_rate=0.0, mask_padding=False)
    oracles.randomize(backbone).eval()
    x = torch.randn(1, 3, 232, 200, generator=torch.Generator().manual_seed(1))
    twin = oracles.hf_twin(backbone, 256, ARCH, 8, (0, 0, 0, 0))
    for ours, theirs in zip(backbone(x), oracles.hf_features(twin, backbone, x), strict=True):
        assert (ours - theirs).abs().max() == 0.0
