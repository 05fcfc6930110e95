"""Whole classifiers from public files: logits against timm and transformers, heads of every layout, other classes."""

import layouts
import oracles
import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from torch import nn

from swinv2_mm.checkpoints import CheckpointError

# no stage with one head: the rounding of PyTorch's product with a single row depends on the number of rows
ARCH = dict(embed_dims=16, depths=(2, 2, 2, 2), num_heads=(2, 4, 8, 16))
CLASSES = 5
# image size, window and pre-training windows of the released models
GEOMETRIES = [
    (256, 8, (0, 0, 0, 0)),
    (256, 16, (0, 0, 0, 0)),
    (192, 12, (0, 0, 0, 0)),
    (256, 16, (12, 12, 12, 6)),
    (384, 24, (12, 12, 12, 6)),
]
WITH_CLASSIFIER = ('official', 'simmim_finetuned', 'mmpretrain', 'torchvision', 'timm_old', 'timm_new', 'hf_classifier')


def build(window, pretrained=None, num_classes=CLASSES, arch=ARCH) -> nn.Module:
    init_default_scope('mmpretrain')
    cfg = dict(
        type='ImageClassifier',
        backbone=dict(
            type='swinv2_mm.SwinTransformerV2',
            arch=arch,
            window_size=window,
            pretrained_window_sizes=pretrained,
            out_indices=(3,),
            drop_path_rate=0.0,
            attention_backend='reference',
        ),
        neck=dict(type='swinv2_mm.models.classification.TokenAveragePooling'),
        head=dict(
            type='swinv2_mm.models.classification.SwinV2ClsHead',
            num_classes=num_classes,
            in_channels=8 * arch['embed_dims'],
        ),
    )
    return MODELS.build(cfg).eval()


def timm_classifier(image, window, pretrained):
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    return SwinTransformerV2(
        image,
        window_size=window,
        pretrained_window_sizes=pretrained,
        num_classes=CLASSES,
        embed_dim=ARCH['embed_dims'],
        depths=ARCH['depths'],
        num_heads=ARCH['num_heads'],
        drop_path_rate=0.0,
    )


def hf_classifier(image, window, pretrained):
    import transformers

    config = transformers.Swinv2Config(
        image_size=image,
        window_size=window,
        pretrained_window_sizes=pretrained,
        num_labels=CLASSES,
        embed_dim=ARCH['embed_dims'],
        depths=list(ARCH['depths']),
        num_heads=list(ARCH['num_heads']),
        drop_path_rate=0.0,
    )
    return transformers.Swinv2ForImageClassification(config)


@pytest.mark.parametrize('peer', [timm_classifier, hf_classifier])
@pytest.mark.parametrize('geometry', GEOMETRIES, ids=str)
@torch.no_grad()
def test_load_checkpoint_gives_logits_of_timm_and_transformers(geometry, peer, tmp_path):
    oracles.find_peers()
    image, window, pretrained = geometry
    expected = oracles.randomize(peer(*geometry)).eval()
    torch.save(expected.state_dict(), tmp_path / 'file.pth')
    if not any(pretrained):  # the peers use the window in effect, which may be shrunk
        pretrained = tuple(min(window, image // stride) for stride in (4, 8, 16, 32))
    model = build(window, pretrained)
    load_checkpoint(model, str(tmp_path / 'file.pth'))
    x = torch.randn(1, 3, image, image, generator=torch.Generator().manual_seed(0))
    logits = expected(x)
    assert torch.equal(model(x), getattr(logits, 'logits', logits))


@pytest.mark.parametrize('writer', WITH_CLASSIFIER)
def test_load_checkpoint_loads_classifier_of_every_layout(writer, tmp_path):
    _, weights = layouts.source(writer)
    names = ('head.fc', 'head', 'classifier')
    prefix = next(name for name in names if f'{name}.weight' in weights)
    expected = oracles.randomize(nn.Linear(8 * ARCH['embed_dims'], CLASSES))
    weights |= {f'{prefix}.{name}': value.detach() for name, value in expected.named_parameters()}
    path = layouts.save(writer, weights, tmp_path / 'file.pth')
    model = build(layouts.WINDOWS, layouts.pretrained_of(writer), arch=layouts.arch_of(writer))
    load_checkpoint(model, path)
    assert torch.equal(model.head.fc.weight, expected.weight)
    assert torch.equal(model.head.fc.bias, expected.bias)


@pytest.mark.parametrize('writer', ['official', 'mmpretrain'])
def test_load_checkpoint_of_other_classes_is_an_error(writer, tmp_path):
    _, weights = layouts.source(writer)
    path = layouts.save(writer, weights, tmp_path / 'file.pth')
    model = build(layouts.WINDOWS, num_classes=3, arch=layouts.arch_of(writer))
    with pytest.raises(CheckpointError, match=r'file\.pth .*classifies into \d+ classes.*num_classes=3'):
        load_checkpoint(model, path)


def test_init_cfg_of_backbone_keeps_the_head_fresh(tmp_path):
    weights, file = layouts.source('official')
    path = layouts.save('official', file, tmp_path / 'file.pth')
    model = build(layouts.WINDOWS, num_classes=3)
    model.backbone.init_cfg = dict(type='Pretrained', checkpoint=path)
    with layouts.recorded_log() as messages:
        model.init_weights()
    assert torch.equal(model.backbone.norm3.weight, weights['norm3.weight'])
    assert 0.01 < model.head.fc.weight.std() < 0.03  # the official initialisation: 0.02
    assert any('left out of the backbone, as parts of other heads: head' in message for message in messages)


@pytest.mark.parametrize(
    ('name', 'shape'),
    [('classifier', (CLASSES, 128, 1, 1)), ('encoder.head', (CLASSES, 128, 1, 1)), ('head', (CLASSES, 128))],
)
def test_load_checkpoint_leaves_out_other_heads(name, shape, tmp_path):
    """The convolution of a segmentation head, and a linear layer outside of the backbone."""
    _, weights = layouts.source('official')
    weights = {f'encoder.{key}': value for key, value in weights.items() if not key.startswith('head.')}
    torch.save(weights | {f'{name}.weight': torch.ones(shape), f'{name}.bias': torch.ones(CLASSES)}, tmp_path / 'a.pth')
    model = build(layouts.WINDOWS)
    fresh = model.head.fc.bias.clone()
    load_checkpoint(model, str(tmp_path / 'a.pth'))
    assert torch.equal(model.head.fc.bias, fresh)
