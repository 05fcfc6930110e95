"""Hints for arguments of other Swin Transformer implementations: what to write instead."""

_ARCH = 'write arch=dict(embed_dims=..., depths=..., num_heads=...), or the name of a size, such as arch="tiny"'
_ANY_SIZE = 'leave it out: any input size works'
_WINDOWS = 'write window_size for the window in use, pretrained_window_sizes for that of the checkpoint'
_NO_DROPOUT = 'leave it out: no Swin V2 was trained with dropout; drop_path_rate is stochastic depth'
_POSITIONS = 'leave it out: Swin V2 has its position bias instead of absolute positions'
_INIT_CFG = 'write init_cfg=dict(type="Pretrained", checkpoint=...)'
_NO_CLASSES = 'leave it out: the backbone returns feature maps; classes belong to the head'
_OUTPUTS = 'write out_indices for the stages to return'
_NORMS = 'leave it out: norms are LayerNorm, as in the official code'
_ACTIVATIONS = 'leave it out: activations are GELU, as in the official code'

# arguments of Swin V1 in mmdet, mmsegmentation and mmaction2, and of Swin V1 and V2 in mmpretrain, timm, transformers,
# torchvision and the official code
FOREIGN_ARGUMENTS = {
    # sizes
    **dict.fromkeys(('embed_dims', 'embed_dim', 'hidden_size', 'depths', 'num_heads', 'head_dim'), _ARCH),
    **dict.fromkeys(('stage_cfgs', 'extra_norm_every_n_blocks', 'num_layers'), _ARCH),
    **dict.fromkeys(('mlp_ratio', 'intermediate_size'), 'leave it out: MLPs have 4 times the channels'),
    **dict.fromkeys(('in_chans', 'num_channels'), 'write in_channels'),
    **dict.fromkeys(('img_size', 'image_size', 'pretrain_img_size', 'input_size', 'resolution'), _ANY_SIZE),
    **dict.fromkeys(('strict_img_size', 'dynamic_img_size', 'encoder_stride'), _ANY_SIZE),
    'strides': 'write patch_size for the first stage; each later stage halves the feature map',
    'patch_cfg': 'write patch_size; the rest is fixed',
    # windows
    **dict.fromkeys(('window_sizes', 'windows'), 'write window_size, one number or one per stage'),
    **dict.fromkeys(('pretrained_window_size', 'pretrain_window_size'), 'write pretrained_window_sizes'),
    **dict.fromkeys(('pad_small_map', 'always_partition'), 'leave it out: feature maps smaller than a window work'),
    'shift_size': f'leave it out: windows are shifted by half their size in every second block; {_WINDOWS}',
    # attention
    'qkv_bias': 'leave it out: queries and values always have a bias, keys never',
    'qk_scale': 'leave it out: each head of Swin V2 learns its own scale',
    **dict.fromkeys(('use_abs_pos_embed', 'use_absolute_embeddings', 'ape', 'interpolate_mode'), _POSITIONS),
    # regularisation
    **dict.fromkeys(('drop_path', 'stochastic_depth_prob'), 'write drop_path_rate'),
    **dict.fromkeys(('drop_rate', 'attn_drop_rate', 'proj_drop_rate', 'pos_drop_rate'), _NO_DROPOUT),
    **dict.fromkeys(('dropout', 'attention_dropout'), _NO_DROPOUT),
    **dict.fromkeys(('hidden_dropout_prob', 'attention_probs_dropout_prob'), _NO_DROPOUT),
    # layers
    **dict.fromkeys(('norm_cfg', 'norm_layer', 'layer_norm_eps'), _NORMS),
    'patch_norm': 'leave it out: the patch embedding always has its norm',
    **dict.fromkeys(('act_cfg', 'act_layer', 'hidden_act'), _ACTIVATIONS),
    **dict.fromkeys(('embed_layer', 'block', 'downsample_layer'), 'leave it out: it is fixed'),
    # memory
    **dict.fromkeys(('use_checkpoint', 'grad_checkpointing', 'gradient_checkpointing'), 'write with_cp'),
    'fused_window_process': 'leave it out: attention_backend="auto" takes the fastest backend that can run',
    # weights
    **dict.fromkeys(('pretrained', 'pretrained2d', 'pretrained_cfg', 'checkpoint_path'), _INIT_CFG),
    'convert_weights': f'leave it out: weights are converted when they are loaded; {_INIT_CFG}',
    **dict.fromkeys(('weight_init', 'initializer_range'), 'leave it out: layers start as in the official code'),
    **dict.fromkeys(('device', 'dtype'), 'leave it out: use .to(...)'),
    # outputs
    **dict.fromkeys(('features_only', 'output_cls_token', 'out_features', 'out_type'), _OUTPUTS),
    'output_hidden_states': _OUTPUTS,
    'out_after_downsample': 'leave it out: feature maps are those before patch merging',
    **dict.fromkeys(('num_classes', 'global_pool', 'num_labels'), _NO_CLASSES),
}
