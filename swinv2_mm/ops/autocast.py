"""Computation in full precision under autocast."""

import torch


def no_autocast(device: torch.device) -> torch.autocast:
    """Context manager that disables autocast for a device; meta tensors, which have no autocast, count as CPU."""
    return torch.autocast('cpu' if device.type == 'meta' else device.type, enabled=False)
