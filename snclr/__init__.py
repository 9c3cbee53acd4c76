"""Soft-neighbour contrastive learning. For a notebook: encoder, info = snclr.load_encoder("checkpoint_last.pth.tar")"""

__version__ = "0.1.0"


def load_encoder(path: str, which: str = "online", **settings) -> tuple:
    """The backbone in a file, frozen, as a module from normalised images (B, 3, S, S) to features (B, C), and its info.

    See snclr.weights.reading.open_encoder, which this calls; torch is imported only then.
    """
    from .weights.reading import open_encoder

    encoder, info = open_encoder(path, which, **settings)
    return encoder.requires_grad_(False), info
