"""Small pictures for tests: as PIL images, as tensors, and in folders of PNGs."""

import numpy as np
import torch
from PIL import Image, ImageOps


def picture(height=24, width=32, seed=0):
    """A smooth colour picture that differs from each of its rotations and mirror images."""
    y, x = np.mgrid[0:height, 0:width] / 32
    phase = np.random.default_rng(seed).uniform(0, 2, 3)
    levels = [0.5 + 0.45 * np.sin(2 * x + p) * np.cos(3 * y * p + x * y) for p in phase]
    return Image.fromarray((np.stack(levels, axis=2) * 255).round().astype(np.uint8))


def rgb(image):
    """A picture decoded by PIL: (3, H, W) int."""
    return (
        torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("RGB")))
        .permute(2, 0, 1)
        .int()
    )


def levels_apart(one, other):
    assert one.shape == other.shape
    return int((one.int() - other.int()).abs().max())


def save_folder(root, sizes, split="train", classes=("ant", "bee")):
    """One small PNG for each (height, width), alternating between the class folders."""
    for number, (height, width) in enumerate(sizes):
        folder = root / split / classes[number % len(classes)]
        folder.mkdir(parents=True, exist_ok=True)
        picture(height, width, seed=number).save(folder / f"{number:03}.png")
    return root
