"""tasks/pictures.py: pixels that say what the content says, and pictures of every kind as RGB."""

import struct

import numpy as np
import pytest
from data_files import geometry, only, opened, stored
from PIL import Image, ImageSequence

from tasks import ArrowPath, DiceSum
from tasks.arrows import DIRECTIONS
from tasks.dataset import DatasetTask
from tasks.pictures import to_rgb

# ------------------------------------------------------------------------------ what is drawn


def cells_of(image):
    pixels = np.asarray(image).astype(int)  # (H, W, 3)
    corners = range(0, len(pixels), 16)
    return [pixels[top : top + 16, left : left + 16] for top in corners for left in corners]


def ink_of(cell):
    """Where a cell has ink, its edge left out: (14, 14) bool."""
    return cell[1:15, 1:15].sum(axis=2) < 180


@pytest.mark.parametrize("task", [DiceSum(), DiceSum(n=7), DiceSum(n=25)], ids=str)
def test_the_pips_can_be_counted_in_the_picture(task):
    for index in range(10):
        one = task.example_at(index)
        cells = cells_of(one.image)
        for face, cell in zip(one.content[0], cells, strict=False):
            assert ink_of(cell).sum() == 4 * int(face)  # a pip is 2 x 2 pixels
        for cell in cells[task.n :]:  # no die, only the ground
            assert cell.std(axis=(0, 1)).max() == 0


def nearest_direction(lean):
    return max(DIRECTIONS, key=lambda arrow: np.dot(DIRECTIONS[arrow], lean))


def test_the_arrows_can_be_weighed_in_the_picture_and_the_start_is_gold():
    for index in range(20):
        one = ArrowPath().example_at(index)
        (start,), arrows = one.content
        for (name, arrow), cell in zip(arrows.items(), cells_of(one.image), strict=True):
            rows, columns = np.nonzero(ink_of(cell))
            lean = columns.mean() - 6.5, rows.mean() - 6.5  # the head is the heavier end
            assert nearest_direction(lean) == arrow and np.abs(lean).min() < 1e-9
            assert (cell[2, 2, 2] < 100) == (name == start)  # only gold has so little blue


def test_every_arrow_that_stays_in_the_grid_occurs():
    met = set()
    for index in range(60):
        _, arrows = ArrowPath().example_at(index).content
        met |= set(arrows.items())
    roads = ArrowPath().roads
    assert met == {(cell, arrow) for cell, targets in roads.items() for arrow in targets}


# --------------------------------------------------------------------- pictures of every kind

TRANSPARENT = [(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128), (0, 255, 0, 255)]
ON_WHITE = [[255, 0, 0], [255, 255, 255], [127, 127, 127], [0, 255, 0]]


def line(mode, values):
    """A picture one pixel high."""
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


def deep(dtype, values):
    """A picture one pixel high, of 16 or 32 bits."""
    return Image.fromarray(np.array([values], dtype))


def palette():
    image = line("P", [0, 1, 2, 3])
    image.putpalette([9, 8, 7, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    return image


def grey(*values):
    return [[value] * 3 for value in values]


PLAIN = Image.new("RGB", (2, 1), (1, 2, 3))
SMALL = Image.new("RGB", (1, 1), (5, 6, 7))
RED_INK = Image.new("CMYK", (1, 1), (0, 255, 255, 0))
COLOURS = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
PICTURES = {  # name: (a file, its mode, its pixels as RGB)
    "rgb": (stored(PLAIN), "RGB", [[1, 2, 3], [1, 2, 3]]),
    "alpha": (stored(line("RGBA", TRANSPARENT)), "RGBA", ON_WHITE),
    "alpha in webp": (
        stored(line("RGBA", TRANSPARENT), "WEBP", lossless=True, exact=True),
        "RGBA",
        ON_WHITE,
    ),
    "grey": (stored(line("L", [0, 100, 255])), "L", grey(0, 100, 255)),
    "grey and alpha": (
        stored(line("LA", [(0, 255), (0, 0), (200, 255)])),
        "LA",
        grey(0, 255, 200),
    ),
    "grey with a transparent value": (
        stored(line("L", [0, 100]), transparency=100),
        "L",
        grey(0, 255),
    ),
    "rgb with a transparent colour": (stored(SMALL, transparency=(5, 6, 7)), "RGB", grey(255)),
    "black and white": (stored(line("1", [0, 1, 1])), "1", grey(0, 255, 255)),
    "palette": (stored(palette()), "P", [[9, 8, 7], *COLOURS]),
    "palette with a transparent entry": (
        stored(palette(), transparency=1),
        "P",
        [[9, 8, 7], [255] * 3, *COLOURS[1:]],
    ),
    "16 bits": (
        stored(deep(np.uint16, [0, 257, 32896, 65535])),
        "I;16",
        grey(0, 1, 128, 255),
    ),
    "16 bits, dark": (stored(deep(np.uint16, [0, 255, 2570])), "I;16", grey(0, 1, 10)),
    "16 bits in tiff": (
        stored(deep(np.uint16, [0, 25700, 65535]), "TIFF"),
        "I;16",
        grey(0, 100, 255),
    ),
    "32 bits": (stored(deep(np.int32, [0, 25700, 65535]), "TIFF"), "I", grey(0, 100, 255)),
    "32 bits, large": (stored(deep(np.int32, [-5, 0, 2**30]), "TIFF"), "I", grey(0, 0, 255)),
    "floats": (stored(deep(np.float32, [0, 0.2, 1]), "TIFF"), "F", grey(0, 51, 255)),
    "floats, large": (
        stored(deep(np.float32, [0, 20, np.nan, 100]), "TIFF"),
        "F",
        grey(0, 51, 0, 255),
    ),
    "cmyk": (stored(RED_INK, "TIFF"), "CMYK", [[255, 0, 0]]),
}


def check_pixels(name, image):
    _, _, pixels = PICTURES[name]
    tolerance = 1 if "alpha" in name else 0  # blending rounds
    assert image.mode == "RGB" and np.asarray(image).dtype == np.uint8
    assert np.abs(np.asarray(image)[0].astype(int) - pixels).max() <= tolerance


@pytest.mark.parametrize("name", PICTURES)
def test_every_mode_becomes_rgb(name):
    """And is of the mode that it should test: Pillow may change what it writes."""
    content, mode, _ = PICTURES[name]
    assert opened(content).mode == mode
    check_pixels(name, to_rgb(opened(content)))


@pytest.mark.parametrize("name", PICTURES)
def test_every_mode_becomes_rgb_in_a_data_set(tmp_path, name, dataset_cache):
    content, _, _ = PICTURES[name]
    path = geometry(tmp_path / "rows.parquet", [([content], "q", "1")] * 2)
    check_pixels(name, only(DatasetTask(path)).image)


def test_big_endian_16_bits():
    image = Image.frombytes("I;16B", (2, 1), struct.pack(">HH", 257, 65535))
    assert np.asarray(to_rgb(image)).tolist() == [[[1] * 3, [255] * 3]]


def test_a_cmyk_jpeg():
    red = to_rgb(opened(stored(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")))
    assert np.abs(np.asarray(red).astype(int) - [255, 0, 0]).max() < 12


@pytest.mark.parametrize(
    "orientation, size, corner",
    [(1, (3, 2), (0, 0)), (3, (3, 2), (2, 1)), (6, (2, 3), (1, 0)), (8, (2, 3), (0, 2))],
)
def test_the_cameras_rotation_is_applied(orientation, size, corner):
    image = Image.new("RGB", (3, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = to_rgb(opened(stored(image, "PNG", exif=exif)))
    assert turned.size == size and turned.getpixel(corner) == (255, 255, 255)
    assert np.asarray(turned).sum() == 3 * 255
    assert to_rgb(turned).tobytes() == turned.tobytes()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    content = stored(frames[0], kind, save_all=True, append_images=frames[1:])
    assert len(list(ImageSequence.Iterator(opened(content)))) == 3
    assert np.abs(np.asarray(to_rgb(opened(content))).astype(int) - [255, 0, 0]).max() <= 2
