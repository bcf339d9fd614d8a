"""What tells the weights of one model from those of another, and images from others.

Knows nothing about sweeps.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from distiller.names import canonical_state_dict


def weights_fingerprint(model: nn.Module) -> str:
    """A SHA-256 of the parameters and buffers: their canonical names, types, shapes and bits."""
    digest = hashlib.sha256()
    for name, value in sorted(canonical_state_dict(model).items()):
        if isinstance(value, Tensor):  # a module's own extra state may be anything
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(_bytes(value))
    return digest.hexdigest()


def images_fingerprint(images: Tensor, labels: Tensor) -> str:
    """The beginning of a SHA-256 of images and their labels: types, shapes and bits."""
    digest = hashlib.sha256()
    for value in (images, labels):
        digest.update(f"{value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()[:16]


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
