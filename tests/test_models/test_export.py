"""Backbones exported to ONNX by both of PyTorch's exporters, run in onnxruntime."""

import oracles
import pytest
import torch

from swinv2_mm.models import SwinTransformer3DV2, SwinTransformerV2

ARCH = dict(embed_dims=16, depths=(2, 1), num_heads=(1, 2))
# without padding, and padded for patches and windows
CASES = [
    (SwinTransformerV2, (32, 32), 4),
    (SwinTransformerV2, (38, 51), 4),
    (SwinTransformer3DV2, (6, 32, 38), (4, 4, 4)),
]


@pytest.mark.parametrize(
    ('kind', 'size', 'window', 'dynamo'),
    [(*case, False) for case in CASES] + [pytest.param(*case, True, marks=pytest.mark.slow) for case in CASES[1:]],
)
@pytest.mark.filterwarnings('ignore')
def test_onnx_export_keeps_features(tmp_path, kind, size, window, dynamo):
    oracles.find_peers()
    import onnxruntime

    backbone = kind(ARCH, window_size=window, out_indices=(0, 1))
    oracles.randomize(backbone).eval()
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    file = tmp_path / 'backbone.onnx'
    torch.onnx.export(backbone, (x,), file, input_names=['x'], dynamo=dynamo)
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    with torch.no_grad():
        expected = backbone(x)
    for ours, theirs in zip(session.run(None, {'x': x.numpy()}), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
