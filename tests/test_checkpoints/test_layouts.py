"""Every public layout of Swin V2 on every loading path: written files bitwise, real models by their features."""

import re
from collections import Counter

import layouts
import oracles
import pytest
import torch
from layouts import (
    ARCH,
    EXTRA_NORMS,
    IMAGE,
    PRETRAINED,
    WINDOWS,
    WITHOUT_TABLES,
    WRITERS,
    arch_of,
    pretrained_of,
    save,
    source,
    weights_in_file,
)
from mmengine.runner import load_checkpoint
from safetensors.torch import save_file
from torch import nn

from swinv2_mm.checkpoints import CheckpointError, load_swinv2_state_dict
from swinv2_mm.models import SimMIMSwinTransformerV2, SwinTransformerV2

NANO = dict(embed_dims=4, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))


def build(arch=ARCH, window=WINDOWS, pretrained=None, **kwargs):
    return SwinTransformerV2(arch, window, pretrained, drop_path_rate=0.0, **kwargs)


def assert_weights(backbone, expected, fresh):
    """Assert the weights of the file, new weights of norms that it lacks, and the windows of all blocks."""
    for name, value in layouts.canonical(backbone).items():
        assert torch.equal(value, expected.get(name, fresh[name])), name
    assert set(expected) <= set(fresh)
    for i, stage in enumerate(backbone.layers):
        for block in stage.blocks:
            assert block.attn.cpb_mlp.pretrained_window_size.tolist() == [PRETRAINED[i]] * 2


@pytest.mark.parametrize('writer', WRITERS)
def test_load_swinv2_state_dict_of_every_layout(writer, tmp_path):
    weights, model = source(writer)
    loaded = load_swinv2_state_dict(save(writer, model, tmp_path / 'file.pth'))
    windows = {k: loaded.pop(k).tolist() for k in list(loaded) if k.endswith('pretrained_window_size')}
    expected = weights_in_file(writer, weights)
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(loaded[name], value), name
    if writer in WITHOUT_TABLES:
        assert windows == {}
    else:
        assert windows == {
            f'layers.{i}.blocks.{j}.attn.cpb_mlp.pretrained_window_size': [PRETRAINED[i]] * 2
            for i in range(4)
            for j in range(2)
        }


# every layout as a dict; as a file, layouts that differ in the prefix of the backbone and in the container
FILES = ('official', 'simmim_pretrained', 'msra_dense', 'hf_classifier')
LOADING_PATHS = [('load_state_dict', writer) for writer in WRITERS]
LOADING_PATHS += [(path, writer) for path in ('init_cfg_with_prefix', 'load_checkpoint') for writer in FILES]
LOADING_PATHS += [('init_cfg', 'mmpretrain'), ('init_cfg', 'torchvision')]


@pytest.mark.parametrize(('loading_path', 'writer'), LOADING_PATHS)
def test_every_layout_on_every_loading_path(writer, loading_path, tmp_path):
    weights, model = source(writer)
    path = save(writer, model, tmp_path / 'file.pth')
    init_cfg = {
        'init_cfg': dict(type='Pretrained', checkpoint=path),
        'init_cfg_with_prefix': dict(type='Pretrained', checkpoint=path, prefix='backbone.'),
    }.get(loading_path)
    backbone = build(arch_of(writer), pretrained=pretrained_of(writer), init_cfg=init_cfg)
    fresh = layouts.canonical(backbone)
    if loading_path == 'load_checkpoint':
        load_checkpoint(backbone, path)
    elif loading_path == 'load_state_dict':
        backbone.load_state_dict(model)
    else:
        backbone.init_weights()
    assert_weights(backbone, weights_in_file(writer, weights), fresh)


@pytest.mark.parametrize('stored', ['relative_coords_table', 'relative_position_index', 'attn_mask'])
def test_buffers_of_older_releases_are_dropped(stored):
    """Files of transformers on its hub have them: they are dropped after reading the windows from the tables."""
    weights, model = source('hf_classifier')
    for name, value in layouts.stored_buffers(weights, WINDOWS, PRETRAINED, IMAGE).items():
        if name.endswith(stored):
            model['swinv2.' + oracles.hf_names(name)] = value
    backbone = build(pretrained=None if stored == 'relative_coords_table' else PRETRAINED)
    fresh = layouts.canonical(backbone)
    backbone.load_state_dict(model)
    assert_weights(backbone, weights_in_file('hf_classifier', weights), fresh)


def test_norms_of_stages_that_are_not_returned_are_not_needed():
    weights, model = source('official')
    backbone = build(out_indices=(1, 2))
    fresh = layouts.canonical(backbone)
    backbone.load_state_dict(model)
    expected = {k: v for k, v in weights.items() if not k.startswith(('norm', 'layers.2.downsample', 'layers.3'))}
    assert_weights(backbone, expected, fresh)


@pytest.mark.parametrize(
    ('writer', 'suffix', 'dtype'),
    [
        ('official', '.pth', torch.bfloat16),
        ('official', '.safetensors', torch.float16),
        ('hf_classifier', '.pth', torch.float64),
        ('hf_classifier', '.safetensors', torch.bfloat16),
    ],
)
def test_files_of_another_precision_load_as_float32(writer, suffix, dtype, tmp_path):
    weights, model = source(writer)
    model = {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.items()}
    path = str(tmp_path / f'file{suffix}')
    torch.save(model, path) if suffix == '.pth' else save_file(model, path)
    rounded = {k: v.to(dtype).float() for k, v in weights_in_file(writer, weights).items()}
    loaded = load_swinv2_state_dict(path)
    for name, value in rounded.items():
        assert torch.equal(loaded[name].float(), value), name
    backbone = build(pretrained=PRETRAINED, init_cfg=dict(type='Pretrained', checkpoint=path))
    fresh = layouts.canonical(backbone)
    backbone.init_weights()
    assert_weights(backbone, rounded, fresh)


# Real models


def timm_model(image=256, window=8):
    oracles.find_peers()
    from timm.models.swin_transformer_v2 import SwinTransformerV2 as Peer

    arch = dict(embed_dim=ARCH['embed_dims'], depths=ARCH['depths'], num_heads=ARCH['num_heads'])
    return oracles.randomize(Peer(image, window_size=window, num_classes=5, drop_path_rate=0.0, **arch)).eval()


def hf_model(name):
    oracles.find_peers()
    import transformers

    config = transformers.Swinv2Config(
        image_size=256,
        window_size=8,
        embed_dim=ARCH['embed_dims'],
        depths=list(ARCH['depths']),
        num_heads=list(ARCH['num_heads']),
        drop_path_rate=0.0,
        num_labels=5,
        encoder_stride=32,
        out_features=['stage1', 'stage2', 'stage3', 'stage4'],
    )
    return oracles.randomize(getattr(transformers, name)(config)).eval()


def torchvision_model():
    oracles.find_peers()
    from torchvision.models import swin_transformer as peer

    model = peer.SwinTransformer(
        [4, 4],
        ARCH['embed_dims'],
        ARCH['depths'],
        ARCH['num_heads'],
        [8, 8],
        stochastic_depth_prob=0.0,
        num_classes=5,
        block=peer.SwinTransformerBlockV2,
        downsample_layer=peer.PatchMergingV2,
    )
    return oracles.randomize(model).eval()


def hf_features(model, x):
    trunk = getattr(model, 'swinv2', model)
    embedded, size = trunk.embeddings(x)
    states = trunk.encoder(
        embedded, size, output_hidden_states=True, output_hidden_states_before_downsampling=True
    ).reshaped_hidden_states
    return states[1:], getattr(trunk, 'layernorm', None)


def torchvision_features(model, x):
    features = []
    for i, part in enumerate(model.features):
        x = part(x)
        if i % 2:
            features.append(x.permute(0, 3, 1, 2))
    return features, model.norm


def timm_features(model, x):
    return model.forward_intermediates(x, intermediates_only=True, norm=False, output_fmt='NCHW'), model.norm


@torch.no_grad()
def assert_same_features(backbone, features, model, image=256):
    x = torch.randn(1, 3, image, image, generator=torch.Generator().manual_seed(1))
    expected, final_norm = features(model, x)
    for i, (ours, theirs) in enumerate(zip(backbone.eval()(x), expected, strict=True)):
        assert theirs.std() > 0.1, 'the features of the stage are constant'
        assert (ours - oracles.apply_output_norm(backbone, i, theirs)).abs().max() == 0.0, i
    if final_norm is not None:
        last = final_norm(expected[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        assert (ours - last).abs().max() == 0.0


def pretrained_backbone(path, pretrained=8):
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    # the backend that is bitwise equal to the libraries
    backbone = build(window=8, pretrained=pretrained, attention_backend='reference', init_cfg=init_cfg)
    backbone.init_weights()
    return backbone


def test_features_of_a_timm_file_are_those_of_timm(tmp_path):
    model = timm_model()
    path = tmp_path / 'model.safetensors'
    save_file(model.state_dict(), path)
    assert_same_features(pretrained_backbone(path), timm_features, model)


@pytest.mark.parametrize(
    ('name', 'form'),
    [
        ('Swinv2ForImageClassification', 'model.safetensors'),
        ('Swinv2Backbone', 'pytorch_model.bin'),
        ('Swinv2ForMaskedImageModeling', 'pytorch_model.bin'),
    ],
)
def test_features_of_a_transformers_file_are_those_of_transformers(name, form, tmp_path):
    model = hf_model(name)
    if form == 'pytorch_model.bin':
        torch.save(model.state_dict(), tmp_path / form)
    else:
        model.save_pretrained(tmp_path)
    assert_same_features(pretrained_backbone(tmp_path / form), hf_features, model)


def test_features_of_a_torchvision_file_are_those_of_torchvision(tmp_path):
    """Its tables determine the pre-training windows. The bias of its keys is random and unused."""
    model = torchvision_model()
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    assert_same_features(pretrained_backbone(tmp_path / 'model.pth', pretrained=None), torchvision_features, model)


@pytest.mark.parametrize(
    ('writer', 'model'),
    [
        ('timm_new', timm_model),
        ('torchvision', torchvision_model),
        ('hf_classifier', lambda: hf_model('Swinv2ForImageClassification')),
        ('hf_backbone', lambda: hf_model('Swinv2Backbone')),
        ('hf_masked_image', lambda: hf_model('Swinv2ForMaskedImageModeling')),
    ],
)
def test_layout_writers_fit_real_models(writer, model):
    """Compare the writers with the libraries; buffers of torchvision are bitwise equal."""
    weights = layouts.canonical(oracles.randomize(build()))
    written, model = getattr(layouts, writer)(weights, (8,) * 4, (8,) * 4), model()
    for name, value in model.state_dict().items():
        if 'relative' in name:
            assert torch.equal(written[name], value), name
    model.load_state_dict(written)


def test_buffers_are_those_that_timm_computes():
    """Timm computes them like the official code, and does not store them."""
    oracles.find_peers()
    from timm.models.swin_transformer_v2 import SwinTransformerV2 as Peer

    arch = dict(embed_dim=ARCH['embed_dims'], depths=ARCH['depths'], num_heads=ARCH['num_heads'])
    peer = Peer(IMAGE, window_size=8, pretrained_window_sizes=PRETRAINED, **arch)
    theirs = {k: v for k, v in peer.named_buffers() if k.endswith(('_table', '_index', '_mask'))}
    written = layouts.stored_buffers(layouts.canonical(build()), WINDOWS, PRETRAINED, IMAGE)
    assert len(written) == len(theirs) == 18
    for name, value in theirs.items():
        assert torch.equal(written[name], value), name


@torch.no_grad()
def test_mmpretrain_columns_are_those_of_unfold():
    """Mmpretrain's unfold and linear layer with permuted columns equal the official concatenation."""
    x = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    reduction = torch.randn(6, 12, dtype=torch.float64)
    patches = [x[..., h::2, w::2] for h, w in ((0, 0), (1, 0), (0, 1), (1, 1))]
    merged = torch.einsum('oc,bchw->bohw', reduction, torch.cat(patches, 1))
    unfolded = nn.Unfold(kernel_size=2, stride=2)(x)
    theirs = (layouts.mmpretrain_columns(reduction) @ unfolded).view(2, 6, 3, 2)
    torch.testing.assert_close(theirs, merged)
    assert not torch.allclose((reduction @ unfolded).view(2, 6, 3, 2), merged)


# Errors


def test_init_cfg_error_names_the_file(tmp_path):
    """Other errors and loading paths are in `test_damaged_files.py`."""
    _, model = source('official')
    del model['layers.2.blocks.1.attn.proj.weight']
    path = save('official', model, tmp_path / 'file.pth')
    with pytest.raises(CheckpointError, match=re.escape(path) + r'.*layers\.2\.blocks\.1\.attn\.proj\.weight'):
        build(init_cfg=dict(type='Pretrained', checkpoint=path)).init_weights()


def test_missing_key_is_named_in_any_layout():
    _, model = source('hf_classifier')
    del model['swinv2.encoder.layers.2.blocks.1.intermediate.dense.bias']
    with pytest.raises(CheckpointError, match=r'layers\.2\.blocks\.1\.(mlp\.fc1|intermediate\.dense)\.bias'):
        build(pretrained=PRETRAINED).load_state_dict(model)


@pytest.mark.parametrize('missing', ['query', 'key', 'value'])
def test_missing_part_of_qkv_is_named(missing):
    _, model = source('hf_classifier')
    del model[f'swinv2.encoder.layers.2.blocks.1.attention.self.{missing}.weight']
    with pytest.raises(CheckpointError, match=rf'layers\.2\.blocks\.1\.(attn\.qkv|attention\.self\.{missing})\.weight'):
        build(pretrained=PRETRAINED).load_state_dict(model)


def test_bias_of_keys_is_refused():
    """No SwinV2 has one, so the file is of another model."""
    _, model = source('hf_classifier')
    model['swinv2.encoder.layers.2.blocks.1.attention.self.key.bias'] = torch.ones(64)
    with pytest.raises(CheckpointError, match=r'layers\.2\.blocks\.1\.(attn|attention\.self)\.key\.bias'):
        build(pretrained=PRETRAINED).load_state_dict(model)


@pytest.mark.parametrize(
    ('writer', 'dropped'),
    [
        ('official', {'head'}),
        ('timm_new', {'head'}),
        ('hf_classifier', {'head'}),  # the classifier under its name in mmpretrain
        ('hf_masked_image', {'mask_token', 'decoder'}),
        ('simmim_pretrained', {'mask_token', 'decoder'}),
        ('msra_dense', {'rpn_head', 'neck'}),
        ('timm_old without head', set()),
    ],
)
def test_parts_of_other_heads_are_dropped_and_logged_once(writer, dropped, tmp_path):
    writer, _, headless = writer.partition(' ')
    _, model = source(writer)
    if headless:
        model = {k: v for k, v in model.items() if not k.startswith('head.')}
    path = save(writer, model, tmp_path / 'file.pth')
    init_cfg = dict(type='Pretrained', checkpoint=path)
    backbone = build(arch_of(writer), pretrained=pretrained_of(writer), init_cfg=init_cfg)
    with layouts.recorded_log() as messages:
        backbone.init_weights()
    words = Counter(word for m in messages if 'other heads' in m for word in re.findall(r'\w+', m))
    known = {'head', 'mask_token', 'decoder', 'rpn_head', 'neck', 'norm', 'layers', 'patch_embed'}
    assert {word: count for word, count in words.items() if word in known} == dict.fromkeys(dropped, 1)


@pytest.mark.parametrize('loading_path', ['load_state_dict', 'init_cfg', 'load_checkpoint'])
@pytest.mark.parametrize('writer', ['simmim_pretrained', 'hf_masked_image'])
def test_simmim_files_load_into_a_simmim_backbone_with_the_mask_token(writer, loading_path, tmp_path):
    weights, model = source(writer)
    path = save(writer, model, tmp_path / 'file.pth')
    init_cfg = dict(type='Pretrained', checkpoint=path)
    backbone = SimMIMSwinTransformerV2(ARCH, WINDOWS, pretrained_of(writer), drop_path_rate=0.0, init_cfg=init_cfg)
    if loading_path == 'load_checkpoint':
        load_checkpoint(backbone, path)
    elif loading_path == 'load_state_dict':
        backbone.load_state_dict(model)
    else:
        backbone.init_weights()
    token = torch.ones(1, 1, 16)  # what the writers write
    expected = {k: v for k, v in weights.items() if not k.startswith(('norm0', 'norm1', 'norm2'))}
    assert_weights(backbone, expected | dict(mask_token=token), layouts.canonical(backbone))


def test_new_output_norms_are_logged_once():
    _, model = source('official')
    with layouts.recorded_log() as messages:
        build().load_state_dict(model)
    logged = [m for m in messages if 'norm0' in m]
    assert len(logged) == 1
    assert 'norm2' in logged[0]
    assert 'norm3' not in logged[0]


def swin_v1():
    oracles.find_peers()
    from timm.models.swin_transformer import SwinTransformer

    arch = dict(embed_dim=ARCH['embed_dims'], depths=ARCH['depths'], num_heads=ARCH['num_heads'])
    return SwinTransformer(128, window_size=4, num_classes=5, **arch)


def torchvision_v1():
    oracles.find_peers()
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer([4, 4], ARCH['embed_dims'], ARCH['depths'], ARCH['num_heads'], [4, 4], num_classes=5)


def vision_transformer():
    oracles.find_peers()
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(64, 16, embed_dim=16, depth=2, num_heads=2, num_classes=5)


def pre_release_v2():
    """The `swinv2_cr` of timm has other parameters and another bias: its weights fit no SwinV2."""
    oracles.find_peers()
    from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr

    arch = dict(embed_dim=ARCH['embed_dims'], depths=ARCH['depths'], num_heads=ARCH['num_heads'])
    return SwinTransformerV2Cr(128, window_size=4, num_classes=5, **arch)


@pytest.mark.parametrize(
    ('model', 'message'),
    [
        (swin_v1, r'(?i)\bV1\b'),
        (torchvision_v1, r'(?i)\bV1\b'),
        (vision_transformer, r'(?i)swin ?(transformer )?v2'),
        (pre_release_v2, r'(?i)swin'),
        (lambda: nn.Linear(2, 2), r'(?i)swin ?(transformer )?v2'),
    ],
    ids=['Swin V1 of timm', 'Swin V1 of torchvision', 'ViT', 'swinv2_cr', 'anything'],
)
def test_files_of_other_models_are_named(model, message, tmp_path):
    weights = model().state_dict()
    path = save('', weights, tmp_path / 'file.pth')
    with pytest.raises(CheckpointError, match=message):
        load_swinv2_state_dict(path)
    backbone = SwinTransformerV2(NANO, 4, 4, init_cfg=dict(type='Pretrained', checkpoint=path))
    with pytest.raises(CheckpointError, match=message):
        backbone.init_weights()
    with pytest.raises(CheckpointError, match=message):
        backbone.load_state_dict(weights)


@pytest.mark.parametrize(
    ('arch', 'named'),
    [
        (dict(ARCH, embed_dims=32), 'patch_embed.proj.weight'),
        (dict(ARCH, depths=(2, 2, 6, 2)), 'layers.2.blocks.2.'),
        (dict(ARCH, num_heads=(1, 2, 4, 8)), 'layers.0.blocks.0.attn.logit_scale'),
        (EXTRA_NORMS, 'enorm'),
    ],
    ids=['channels', 'depths', 'heads', 'extra norms'],
)
def test_error_of_a_model_of_another_size(arch, named):
    _, model = source('official')
    with pytest.raises(CheckpointError, match=re.escape(named)):
        build(arch).load_state_dict(model)


def test_error_of_a_large_difference_is_short():
    _, model = source('official')
    with pytest.raises(CheckpointError) as error:
        build(dict(ARCH, embed_dims=32, depths=(2, 2, 18, 2))).load_state_dict(model)
    assert len(str(error.value)) < 3000
