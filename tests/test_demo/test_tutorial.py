"""The notebook, run on a small checkpoint."""

import json
import re
from pathlib import Path

import layouts
import matplotlib
import matplotlib.pyplot as plt
import oracles
import pytest
import torch

NOTEBOOK = Path(__file__).parents[2] / 'demo/swinv2_tutorial.ipynb'
ARCH = dict(embed_dims=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
CLASSES = 7


@pytest.fixture(scope='module')
def timm_model():
    oracles.find_peers()
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    model = SwinTransformerV2(
        img_size=256, window_size=8, embed_dim=32, depths=(1,) * 4, num_heads=(1, 2, 4, 8), num_classes=CLASSES
    )
    return oracles.randomize(model).eval()


def official_file(model: torch.nn.Module, path: Path) -> Path:
    """The weights of timm's model, named as in the official files, with the coordinates that these hold."""
    weights = {}
    for name, value in model.state_dict().items():
        name = re.sub(r'layers\.(\d)\.downsample', lambda match: f'layers.{int(match[1]) - 1}.downsample', name)
        weights[name.replace('head.fc.', 'head.')] = value
    for stage in range(4):
        weights[f'layers.{stage}.blocks.0.attn.relative_coords_table'] = layouts.coords_table(8, 8)
    torch.save(dict(model=weights), path)
    return path


@pytest.fixture(scope='module')
def namespace(timm_model, tmp_path_factory) -> dict:
    """What the notebook leaves behind."""
    checkpoint = official_file(timm_model, tmp_path_factory.mktemp('tutorial') / 'nano.pth')
    matplotlib.use('Agg')
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())['cells'] if cell['cell_type'] == 'code']
    assert 'parameters' in cells[0]['metadata']['tags']
    names = {}
    for cell in cells:
        exec(compile(''.join(cell['source']), NOTEBOOK.name, 'exec'), names)
        if cell is cells[0]:
            assert {'CHECKPOINT', 'ARCH', 'IMAGE'} <= set(names)
            names |= dict(CHECKPOINT=str(checkpoint), ARCH=ARCH)
    yield names
    plt.close('all')


@pytest.mark.slow
def test_the_notebook_predicts_what_timm_predicts(timm_model, namespace):
    with torch.inference_mode():
        expected = timm_model(namespace['preprocess'](namespace['image'], 256))[0].softmax(0)
    assert expected.std() > 0.01
    torch.testing.assert_close(namespace['probabilities'], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_notebook_draws_the_same_bias_at_every_window(namespace):
    """A larger window adds distances, and leaves those of the smaller one as they are."""
    maps = [axis.images[0].get_array() for axis in namespace['axes']]
    assert [len(bias) for bias in maps] == [15, 31, 63]
    for small, large in zip(maps, maps[1:], strict=False):
        margin = (len(large) - len(small)) // 2
        torch.testing.assert_close(large[margin:-margin, margin:-margin].data, small.data, rtol=0, atol=1e-4)
