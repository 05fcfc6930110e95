"""What is computed in full precision whatever autocast says."""

import torch


def no_autocast(device: torch.device) -> torch.autocast:
    """Turn autocast off for tensors of a device; the meta device, which has none of its own, stands for any."""
    return torch.autocast('cpu' if device.type == 'meta' else device.type, enabled=False)
