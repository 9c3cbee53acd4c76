"""The entry for torch.hub: encoder = torch.hub.load(REPOSITORY, "snclr", FILE)."""

import os

dependencies = ["torch", "torchvision", "timm", "numpy"]


def snclr(file: str | os.PathLike, branch: str = "online", **settings):
    """The frozen encoder in a weight file: normalised images (B, C, S, S) to features (B, F).

    encoder.info has the mean and std of the images, and notes on what was loaded.

    file       path or URL of a checkpoint, an export, or weights in any layout that
               snclr.load_encoder reads; a URL is downloaded once, into torch.hub.get_dir()
    branch     'online' or 'momentum'
    settings   those of snclr.load_encoder, for files that lack them
    """
    from snclr import load_encoder

    path = _downloaded(file) if "://" in str(file) else file
    encoder, encoder.info = load_encoder(path, branch, **settings)
    return encoder


def _downloaded(url):
    import hashlib
    import os

    import torch

    # files of different runs can have the same name
    digest, name = hashlib.sha256(url.encode()).hexdigest(), os.path.basename(url.partition("?")[0])
    path = os.path.join(torch.hub.get_dir(), "checkpoints", f"{digest[:8]}_{name}")
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.hub.download_url_to_file(url, path)
    return path
