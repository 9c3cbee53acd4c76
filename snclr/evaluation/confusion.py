"""The confusion matrix of a classifier as a picture."""

import numpy as np
from PIL import Image, ImageDraw

from ..pictures.canvas import INK, MARGIN, font, page

CELL, LEGIBLE = 44, 25  # pixels of a cell, and up to how many classes cells have names and numbers
LOW, HIGH = np.array([247, 249, 252]), np.array([16, 78, 139])  # colours of 0 and 100 %


def picture(counts: np.ndarray, classes: list[str], title: str) -> Image.Image:
    """Rows are true classes, columns what was said; colour and number are percent of the row. counts (C, C) integers."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    legible = len(classes) <= LEGIBLE
    cell = CELL if legible else max(1, 1000 // len(classes))
    names = 10 + max(int(font().getlength(name)) for name in classes) if legible else 0
    left, side = MARGIN + names, cell * len(classes)
    told = "rows: true class, columns: answer; percent of the row"
    image, draw, top = page(names + side, side + names, title, told)
    colours = (LOW + (HIGH - LOW) * shares[..., None]).round().astype(np.uint8)
    image.paste(
        Image.fromarray(colours).resize((side, side), Image.Resampling.NEAREST), (left, top)
    )
    if not legible:
        return image
    for row, name in enumerate(classes):
        draw.text((left - 10, top + (row + 0.5) * cell), name, fill=INK, font=font(), anchor="rm")
        for column in range(len(classes)):
            share = 100 * shares[row, column]
            if share >= 0.5:
                place = (left + (column + 0.5) * cell, top + (row + 0.5) * cell)
                draw.text(
                    place,
                    f"{share:.0f}",
                    fill="white" if share > 50 else INK,
                    font=font(),
                    anchor="mm",
                )
        label = Image.new("RGB", (names, 18), "white")
        ImageDraw.Draw(label).text((names - 6, 9), name, fill=INK, font=font(), anchor="rm")
        turned = label.rotate(90, expand=True)
        image.paste(turned, (int(left + (row + 0.5) * cell) - 9, top + side + 4))
    return image
