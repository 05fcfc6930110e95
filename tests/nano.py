"""Configs at a size that a CPU trains in a second: what they have in common."""

ARCH = dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
CHANNELS = [16, 32, 64, 128]


def shrink_sizes(value, factor: int, key: str = ''):
    """A config value with the sizes of its transforms divided."""
    if isinstance(value, dict):
        return type(value)({k: shrink_sizes(v, factor, k) for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(shrink_sizes(item, factor, key) for item in value)
    return value // factor if key in ('scale', 'scales', 'crop_size', 'size') else value
