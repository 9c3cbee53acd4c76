"""The confusion matrix of a classifier: the accuracy of each class, and a picture."""

import numpy as np
from PIL import Image, ImageDraw

from ..pictures.canvas import INK, MARGIN, font, page

CELL = 44  # pixels of a cell
LEGIBLE = 25  # up to this number of classes, the picture has names and numbers
LOW, HIGH = np.array([247, 249, 252]), np.array([16, 78, 139])  # colours of 0 and 100 %


def class_accuracies(counts: np.ndarray) -> list[float | None]:
    """Accuracy of each class in percent, from counts (C, C); None for a class without images."""
    return [
        float(100 * row[label] / row.sum()) if row.sum() else None
        for label, row in enumerate(counts)
    ]


def picture(counts: np.ndarray, classes: list[str], title: str) -> Image.Image:
    """Draw the matrix of counts (C, C): rows are true classes, columns predicted ones. Colour and
    number of a cell show its percentage of the row.
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    legible = len(classes) <= LEGIBLE
    cell = CELL if legible else max(1, 1000 // len(classes))
    names = 10 + max(int(font().getlength(name)) for name in classes) if legible else 0
    left, side = MARGIN + names, cell * len(classes)
    legend = "rows: true class, columns: prediction; percent of the row"
    image, draw, top = page(names + side, side + names, title, legend)
    colours = (LOW + (HIGH - LOW) * shares[..., None]).round().astype(np.uint8)
    matrix = Image.fromarray(colours).resize((side, side), Image.Resampling.NEAREST)
    image.paste(matrix, (left, top))
    if not legible:
        return image
    for row, name in enumerate(classes):
        draw.text((left - 10, top + (row + 0.5) * cell), name, fill=INK, font=font(), anchor="rm")
        for column in range(len(classes)):
            if (percent := 100 * shares[row, column]) >= 0.5:
                center = (left + (column + 0.5) * cell, top + (row + 0.5) * cell)
                ink = "white" if percent > 50 else INK
                draw.text(center, f"{percent:.0f}", fill=ink, font=font(), anchor="mm")
        label = Image.new("RGB", (names, 18), "white")
        ImageDraw.Draw(label).text((names - 6, 9), name, fill=INK, font=font(), anchor="rm")
        corner = (int(left + (row + 0.5) * cell) - 9, top + side + 4)
        image.paste(label.rotate(90, expand=True), corner)
    return image
