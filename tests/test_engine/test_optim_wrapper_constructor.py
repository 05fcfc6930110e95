"""Learning rate and weight decay of every parameter of a small detector-like model."""

from mmengine.optim import build_optim_wrapper
from torch import nn

import swinv2_mm  # noqa: F401
from swinv2_mm.models import SimMIMSwinTransformerV2


def test_constructor_exempts_norms_biases_scales_cpb_mlps_and_mask_tokens_from_weight_decay():
    arch = dict(embed_dims=16, depths=(1, 2), num_heads=(1, 2), extra_norm_every_n_blocks=2)
    model = nn.ModuleDict(
        dict(
            backbone=SimMIMSwinTransformerV2(arch, out_indices=(1,)),
            head=nn.Sequential(nn.Conv2d(32, 4, 1), nn.BatchNorm2d(4)),
        )
    )
    wrapper = build_optim_wrapper(
        model,
        dict(
            constructor='swinv2_mm.SwinV2OptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
            paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.1)}),
        ),
    )
    assert len(wrapper.optimizer.param_groups) == 4  # decayed or not, in the backbone or not
    groups = {id(p): g for g in wrapper.optimizer.param_groups for p in g['params']}
    assert len(groups) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        # matrices of projections and convolutions, and nothing else
        decayed = name.endswith('weight') and 'norm' not in name and 'cpb_mlp' not in name and name != 'head.1.weight'
        assert groups[id(p)]['weight_decay'] == (0.05 if decayed else 0.0), name
        assert groups[id(p)]['lr'] == (1e-4 if name.startswith('backbone') else 1e-3), name


def test_constructor_without_paramwise_cfg():
    model = nn.Linear(2, 2)
    wrapper = build_optim_wrapper(
        model,
        dict(
            constructor='swinv2_mm.SwinV2OptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=1.0, weight_decay=1.0),
        ),
    )
    assert {tuple(g['params'][0].shape): g['weight_decay'] for g in wrapper.optimizer.param_groups} == {
        (2, 2): 1.0,
        (2,): 0.0,
    }
