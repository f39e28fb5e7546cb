"""Pictures: how dice, arrows and scans are shown, and how any picture becomes plain RGB."""

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from tasks.base import CELL

# ------------------------------------------------------------------- glyphs: a cell's content

GROUND, TILE, INK, GOLD = range(4)  # numbers of colours; each example has its own four shades

# {face: the places of its pips}. A die has nine places, numbered
#     0 1 2
#     3 4 5
#     6 7 8
PIPS = {
    "1": (4,),
    "2": (0, 8),
    "3": (0, 4, 8),
    "4": (0, 2, 6, 8),
    "5": (0, 2, 4, 6, 8),
    "6": (0, 2, 3, 5, 6, 8),
}


def _glyph(tile, boxes):
    """A cell with a tile, and boxes of ink on it: (CELL, CELL) uint8, numbers of colours.

    A box is (left, top, right, bottom) in pixels, the last ones included.
    """
    cell = Image.new("P", (CELL, CELL), GROUND)
    pen = ImageDraw.Draw(cell)
    pen.rounded_rectangle((1, 1, 14, 14), 2, tile)
    for box in boxes:
        pen.rectangle(box, INK)
    return np.array(cell)


def _die(places):
    pips = []
    for place in places:
        row, column = divmod(place, 3)
        left, top = 3 + 4 * column, 3 + 4 * row
        pips.append((left, top, left + 1, top + 1))  # 2 x 2 pixels
    return _glyph(TILE, pips)


def _arrow(tile, quarter_turns):
    """An arrow to the right, turned to the left: a shaft, then ever shorter columns."""
    shaft = (3, 6, 7, 9)
    head = [(8 + i, 3 + i, 8 + i, 12 - i) for i in range(5)]
    return np.rot90(_glyph(tile, [shaft, *head]), quarter_turns)


_DICE = {face: _die(places) for face, places in PIPS.items()}
_ARROWS = {arrow: _arrow(TILE, turns) for turns, arrow in enumerate("RULD")}
_GOLDEN_ARROWS = {arrow: _arrow(GOLD, turns) for turns, arrow in enumerate("RULD")}


# -------------------------------------------------------------------------- pictures of cells


def dice_picture(faces, side, rng):
    """Dice with these faces, "1" to "6", in side x side cells, row by row: an RGB picture."""
    glyphs = [_DICE[face] for face in faces]
    return _picture(glyphs, side, (58, 104, 96), rng)


def arrows_picture(arrows, start, side, rng):
    """The arrows, {cell: arrow} row by row, in side x side cells, the start on gold: RGB."""
    glyphs = []
    for cell, arrow in arrows.items():
        glyphs.append(_GOLDEN_ARROWS[arrow] if cell == start else _ARROWS[arrow])
    return _picture(glyphs, side, (66, 78, 104), rng)


def scans_picture(scans, side, rng):
    """Grey scans, each (height, width) from 0 for paper to 1 for ink, in side x side cells: RGB.

    Each is scaled to 14 x 14 pixels, and lies where it happens to lie in its cell of 16.
    """
    edge, room = CELL - 2, 3  # pixels along a scan's edge; places for it in each direction
    cells = []
    for scan in scans:
        grey = Image.fromarray((scan * 255).astype(np.uint8)).resize((edge, edge))
        cell = Image.new("L", (CELL, CELL))
        cell.paste(grey, tuple(int(offset) for offset in rng.integers(room, size=2)))
        cells.append(np.array(cell))
    ink = _side_by_side(cells, side)[..., None] / 255  # (H, W, 1)
    paper, pen = np.array([(236, 232, 222), (40, 44, 92)]) + rng.integers(-12, 13, (2, 3))
    return Image.fromarray((paper + (pen - paper) * ink).astype(np.uint8))  # (H, W, 3)


def _side_by_side(cells, side):
    """side x side cells, (CELL, CELL) uint8 each, filled row by row and then with 0: (H, W)."""
    filled = np.zeros((side * side, CELL, CELL), np.uint8)
    filled[: len(cells)] = cells
    filled = filled.reshape(side, side, CELL, CELL)  # (cell row, cell column, pixel row, column)
    filled = filled.swapaxes(1, 2)  # (cell row, pixel row, cell column, pixel column)
    return filled.reshape(side * CELL, side * CELL)


def _picture(glyphs, side, ground, rng):
    """side x side cells, filled row by row; the colours vary a little from example to example."""
    numbers = _side_by_side(glyphs, side)  # (H, W)
    colours = np.array([ground, (232, 228, 218), (34, 32, 46), (242, 172, 40)])  # (4, 3)
    colours = colours + rng.integers(-12, 13, (4, 3))
    return Image.fromarray(colours.astype(np.uint8)[numbers])  # (H, W, 3)


# --------------------------------------------------------------------- pictures from anywhere


def to_rgb(image):
    """A picture of any mode as upright 8-bit RGB.

    EXIF's rotation is applied, transparency laid on white, 16 bits and floats are scaled (not
    clipped) to 8 bits, and of an animation it is the first frame.
    """
    image = ImageOps.exif_transpose(image)
    is_deep = image.mode.startswith(("I", "F"))  # integers of 16 or 32 bits: I;16, I;16B, I
    if is_deep:
        return _scaled_to_8_bits(image).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _scaled_to_8_bits(image):
    """White is 65535 for integers, 1 for floats, or the highest value, if that is above."""
    values = np.nan_to_num(np.asarray(image).astype(np.float32)).clip(0)  # (H, W)
    usual_white = 65535 if image.mode.startswith("I") else 1
    white = max(values.max(), usual_white)
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8))
