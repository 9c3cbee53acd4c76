"""The confusion matrix of a classifier as a picture."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL, LEGIBLE = 44, 25  # pixels of a cell, and up to how many classes cells have names and numbers
LOW, HIGH = np.array([247, 249, 252]), np.array([16, 78, 139])  # colours of 0 and 100 %


def picture(counts: np.ndarray, classes: list[str], title: str) -> Image.Image:
    """Rows are true classes, columns what was said; colour and number are percent of the row. counts (C, C) integers."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    legible = len(classes) <= LEGIBLE
    cell = CELL if legible else max(1, 1000 // len(classes))
    font, large = ImageFont.load_default(13), ImageFont.load_default(17)
    left = 30 + (max(int(font.getlength(name)) for name in classes) if legible else 20)
    side, top = cell * len(classes), 74
    width = max(left + side + 30, left + int(large.getlength(title)) + 30)
    image = Image.new("RGB", (width, top + side + (left if legible else 40)), "white")
    draw = ImageDraw.Draw(image)
    draw.text((left, 16), title, fill="black", font=large)
    draw.text((left, 46), "rows: true class, columns: answer; percent of the row", fill=(90, 90, 90), font=font)
    colours = (LOW + (HIGH - LOW) * shares[..., None]).round().astype(np.uint8)
    image.paste(Image.fromarray(colours).resize((side, side), Image.Resampling.NEAREST), (left, top))
    if not legible:
        return image
    for row, name in enumerate(classes):
        draw.text((left - 10, top + (row + 0.5) * cell), name, fill="black", font=font, anchor="rm")
        for column in range(len(classes)):
            share = 100 * shares[row, column]
            if share >= 0.5:
                place = (left + (column + 0.5) * cell, top + (row + 0.5) * cell)
                draw.text(place, f"{share:.0f}", fill="white" if share > 50 else "black", font=font, anchor="mm")
        label = Image.new("RGB", (left, 18), "white")
        ImageDraw.Draw(label).text((left - 6, 9), name, fill="black", font=font, anchor="rm")
        turned = label.rotate(90, expand=True)
        image.paste(turned, (int(left + (row + 0.5) * cell) - 9, top + side + 4))
    return image
