"""Boxes drawn on films, and lines of text below them."""

if __name__ == "__main__":
    raise SystemExit(__doc__)

import textwrap

import matplotlib
from PIL import Image, ImageDraw, ImageFont

FONT = matplotlib.get_data_path() + "/fonts/ttf/DejaVuSans.ttf"  # Pillow's own has hardly more than ASCII


def draw_boxes(image, boxes, colour=(255, 64, 64), width=448):
    """uint8 image and boxes in its pixels -> RGB picture at least `width` pixels wide, the boxes in outline."""
    picture = Image.fromarray(image).convert("RGB")
    scale = max(1.0, width / picture.width)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for box in boxes:
        x0, y0, x1, y1 = (v * scale for v in box)
        pen.rectangle(
            [min(x0, x1), min(y0, y1), max(x0, x1) - 1, max(y0, y1) - 1],
            outline=colour,
            width=max(2, picture.width // 220),
        )
    return picture


def with_caption(picture, text, size=14):
    """The picture with lines of text below it."""
    font = ImageFont.truetype(FONT, size)
    lines = [
        part
        for line in text.split("\n")
        for part in textwrap.wrap(line, max(10, round(picture.width / (size * 0.6)))) or [""]
    ]
    page = Image.new("RGB", (picture.width, picture.height + round(len(lines) * size * 1.35) + 10), "white")
    page.paste(picture)
    pen = ImageDraw.Draw(page)
    for i, line in enumerate(lines):
        pen.text((6, picture.height + 5 + i * size * 1.35), line, fill="black", font=font)
    return page
