"""Soft-neighbour contrastive learning.

In a notebook: encoder, info = snclr.load_encoder("checkpoint_last.pth.tar")
"""

import os

__version__ = "0.1.0"


def load_encoder(path: str | os.PathLike, branch: str = "online", **settings) -> tuple:
    """The backbone in a file, frozen, and its info, a dictionary.

    The backbone maps normalised images (B, C, S, S) to features (B, F). info has the mean and std
    of the images, and notes on what was loaded.

    branch     'online' or 'momentum'
    settings   for files that lack them: arch, img_size, channels, patch_size, num_heads, width,
               small_stem, timm_kwargs; see snclr.weights.load.open_encoder
    """
    from .weights.load import open_encoder  # torch is imported only here

    encoder, info = open_encoder(os.fspath(path), branch, **settings)
    return encoder.requires_grad_(False), info
