"""Backgrounds that prompts can name: plain colours, patterns and ten drawn scenes.

Each background is drawn by Pillow at twice its size with random details and scaled down, so that
"on the beach" is a family of pictures and not one picture.
"""

from collections.abc import Callable
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 44, 44),
    "orange": (240, 136, 40),
    "yellow": (246, 214, 56),
    "green": (62, 160, 72),
    "teal": (32, 150, 150),
    "blue": (48, 98, 214),
    "purple": (126, 66, 184),
    "pink": (244, 140, 184),
    "brown": (126, 82, 50),
    "black": (22, 22, 26),
    "white": (246, 246, 246),
    "grey": (136, 138, 142),
}
Colour = tuple[int, int, int]


def _jitter(colour: Colour, random: Random, amount: int = 10) -> Colour:
    r, g, b = (min(255, max(0, c + random.randint(-amount, amount))) for c in colour)
    return r, g, b


def _vertical(size: int, top: Colour, bottom: Colour) -> Image.Image:
    ramp = np.linspace(0, 1, size)[:, None, None]
    pixels = (1 - ramp) * np.array(top) + ramp * np.array(bottom)
    return Image.fromarray(np.broadcast_to(pixels, (size, size, 3)).astype(np.uint8))


def _blobs(
    draw: ImageDraw.ImageDraw,
    random: Random,
    n: int,
    box: tuple[float, float, float, float],
    radius: tuple[float, float],
    colour: Colour,
) -> None:
    """Draws `n` flat ellipses with centres in `box` and radii in `radius`, all in pixels."""
    for _ in range(n):
        x, y = random.uniform(box[0], box[2]), random.uniform(box[1], box[3])
        r = random.uniform(*radius)
        draw.ellipse((x - r, y - r * 0.6, x + r, y + r * 0.6), fill=_jitter(colour, random))


def _plain(size: int, random: Random) -> tuple[Image.Image, str]:
    name = random.choice(list(COLOURS))
    return Image.new("RGB", (size, size), _jitter(COLOURS[name], random)), f"on a {name} background"


def _gradient(size: int, random: Random) -> tuple[Image.Image, str]:
    first, second = random.sample(list(COLOURS), 2)
    image = _vertical(size, _jitter(COLOURS[first], random), _jitter(COLOURS[second], random))
    return image, f"on a {first} and {second} gradient"


def _stripes(size: int, random: Random) -> tuple[Image.Image, str]:
    first, second = random.sample(list(COLOURS), 2)
    image = Image.new("RGB", (size, size), _jitter(COLOURS[first], random))
    draw = ImageDraw.Draw(image)
    width = size / random.choice((4, 6, 8))
    vertical, offset = random.random() < 0.5, random.uniform(0, width)
    fill = _jitter(COLOURS[second], random)
    for i in range(-1, 9):
        a = offset + 2 * i * width
        draw.rectangle((a, 0, a + width, size) if vertical else (0, a, size, a + width), fill=fill)
    return image, f"on {first} and {second} stripes"


def _checks(size: int, random: Random) -> tuple[Image.Image, str]:
    first, second = random.sample(list(COLOURS), 2)
    image = Image.new("RGB", (size, size), _jitter(COLOURS[first], random))
    draw = ImageDraw.Draw(image)
    n = random.choice((4, 6, 8))
    side, fill = size / n, _jitter(COLOURS[second], random)
    for row in range(n):
        for column in range(row % 2, n, 2):
            x, y = column * side, row * side
            draw.rectangle((x, y, x + side - 1, y + side - 1), fill=fill)
    return image, f"on {first} and {second} checks"


def _grass(size: int, random: Random) -> Image.Image:
    horizon = int(size * random.uniform(0.25, 0.5))
    image = _vertical(size, _jitter((120, 190, 240), random), _jitter((200, 230, 250), random))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, horizon, size, size), fill=_jitter((96, 180, 70), random, 14))
    for _ in range(90):
        x, y = random.uniform(0, size), random.uniform(horizon, size)
        height = size * random.uniform(0.02, 0.06)
        draw.line(
            (x, y, x + height * 0.3, y - height), fill=_jitter((60, 140, 50), random, 24), width=2
        )
    return image


def _beach(size: int, random: Random) -> Image.Image:
    sea, sand = size * random.uniform(0.25, 0.4), size * random.uniform(0.5, 0.65)
    image = _vertical(size, _jitter((110, 190, 245), random), _jitter((190, 228, 250), random))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, sea, size, size), fill=_jitter((40, 150, 200), random))
    draw.rectangle((0, sand, size, size), fill=_jitter((240, 214, 150), random))
    waves = [
        (x, sand + size * 0.02 * np.sin(x / size * 12 + random.random()))
        for x in range(0, size + 8, 8)
    ]
    draw.line(waves, fill=(250, 250, 250), width=max(2, size // 28))
    _blobs(draw, random, 14, (0, sand + 6, size, size), (1, 3), (205, 175, 110))
    return image


def _snow(size: int, random: Random) -> Image.Image:
    horizon = size * random.uniform(0.3, 0.5)
    image = _vertical(size, _jitter((150, 175, 205), random), _jitter((205, 218, 232), random))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, horizon, size, size), fill=_jitter((240, 245, 252), random, 5))
    _blobs(
        draw, random, 3, (0, horizon, size, horizon + 4), (size * 0.2, size * 0.5), (232, 240, 250)
    )
    _blobs(draw, random, 50, (0, 0, size, size), (1.5, 3.5), (250, 252, 255))
    return image


def _night(size: int, random: Random) -> Image.Image:
    image = _vertical(size, _jitter((10, 14, 50), random, 6), _jitter((40, 40, 96), random, 8))
    draw = ImageDraw.Draw(image)
    for _ in range(46):
        x, y, r = random.uniform(0, size), random.uniform(0, size), random.uniform(0.8, 2.4)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(250, 245, 210))
    x, y, r = random.uniform(0.1, 0.9) * size, random.uniform(0.08, 0.25) * size, size * 0.08
    draw.ellipse((x - r, y - r, x + r, y + r), fill=(250, 240, 190))
    return image


def _wood(size: int, random: Random) -> Image.Image:
    base = _jitter((176, 120, 70), random, 14)
    image = Image.new("RGB", (size, size), base)
    draw = ImageDraw.Draw(image)
    planks = random.choice((3, 4, 5))
    for i in range(planks):
        top = i * size / planks
        draw.rectangle((0, top, size, top + size / planks), fill=_jitter(base, random, 12))
        for _ in range(5):
            y = random.uniform(top, top + size / planks)
            grain = [(x, y + 2 * np.sin(x / 20 + i)) for x in range(0, size + 8, 8)]
            draw.line(grain, fill=_jitter((146, 94, 52), random), width=1)
        draw.line((0, top, size, top), fill=(96, 60, 32), width=max(2, size // 50))
    return image


def _water(size: int, random: Random) -> Image.Image:
    image = _vertical(size, _jitter((70, 170, 220), random), _jitter((20, 90, 170), random))
    draw = ImageDraw.Draw(image)
    for _ in range(26):
        x, y = random.uniform(-10, size), random.uniform(0, size)
        length = size * random.uniform(0.1, 0.25)
        box = (x, y, x + length, y + length * 0.3)
        draw.arc(box, 180, 360, fill=_jitter((170, 220, 245), random), width=max(2, size // 60))
    return image


def _city(size: int, random: Random) -> Image.Image:
    image = _vertical(size, _jitter((150, 190, 225), random), _jitter((225, 225, 220), random))
    draw = ImageDraw.Draw(image)
    street, x = size * 0.82, -size * 0.05
    while x < size:
        width, top = size * random.uniform(0.13, 0.22), size * random.uniform(0.1, 0.45)
        draw.rectangle((x, top, x + width, street), fill=_jitter((112, 116, 132), random, 24))
        step = size * 0.055
        for wy in np.arange(top + step * 0.6, street - step, step):
            for wx in np.arange(x + step * 0.5, x + width - step * 0.6, step):
                lit = (250, 226, 130) if random.random() < 0.5 else (70, 80, 104)
                draw.rectangle((wx, wy, wx + step * 0.45, wy + step * 0.5), fill=lit)
        x += width + 1
    draw.rectangle((0, street, size, size), fill=_jitter((74, 76, 82), random))
    return image


def _mountains(size: int, random: Random) -> Image.Image:
    image = _vertical(size, _jitter((130, 180, 230), random), _jitter((220, 232, 242), random))
    draw = ImageDraw.Draw(image)
    ground = size * random.uniform(0.68, 0.8)
    for _ in range(random.randint(3, 4)):
        x, half = random.uniform(0, size), size * random.uniform(0.25, 0.45)
        top = size * random.uniform(0.12, 0.32)
        draw.polygon(
            [(x - half, ground), (x, top), (x + half, ground)],
            fill=_jitter((112, 112, 128), random),
        )
        cap = 0.28
        tip = [
            (x - half * cap, top + (ground - top) * cap),
            (x, top),
            (x + half * cap, top + (ground - top) * cap),
        ]
        draw.polygon(tip, fill=(246, 248, 252))
    draw.rectangle((0, ground, size, size), fill=_jitter((84, 130, 84), random))
    return image


def _leaves(size: int, random: Random) -> Image.Image:
    image = Image.new("RGB", (size, size), _jitter((150, 90, 40), random))
    draw = ImageDraw.Draw(image)
    shades = [(216, 96, 30), (236, 160, 40), (190, 56, 30), (150, 96, 40), (244, 196, 70)]
    for _ in range(150):
        x, y, r = (
            random.uniform(0, size),
            random.uniform(0, size),
            size * random.uniform(0.025, 0.06),
        )
        angle = random.uniform(0, 3.14)
        dx, dy = r * np.cos(angle), r * np.sin(angle)
        points = [
            (x - dx, y - dy),
            (x + dy * 0.5, y - dx * 0.5),
            (x + dx, y + dy),
            (x - dy * 0.5, y + dx * 0.5),
        ]
        draw.polygon(points, fill=_jitter(random.choice(shades), random, 12))
    return image


def _indoors(size: int, random: Random) -> Image.Image:
    image = Image.new("RGB", (size, size), _jitter((236, 222, 196), random, 8))
    draw = ImageDraw.Draw(image)
    floor = size * random.uniform(0.62, 0.74)
    draw.rectangle((0, floor, size, size), fill=_jitter((158, 110, 74), random))
    draw.rectangle((0, floor - size * 0.03, size, floor), fill=(250, 246, 238))
    x, y, w, h = size * random.uniform(0.05, 0.6), size * 0.1, size * 0.3, size * 0.32
    draw.rectangle((x - 5, y - 5, x + w + 5, y + h + 5), fill=(250, 250, 250))
    draw.rectangle((x, y, x + w, y + h), fill=_jitter((150, 205, 240), random))
    draw.line((x + w / 2, y, x + w / 2, y + h), fill=(250, 250, 250), width=4)
    draw.line((x, y + h / 2, x + w, y + h / 2), fill=(250, 250, 250), width=4)
    return image


SCENES: dict[str, Callable[[int, Random], Image.Image]] = {
    "in the grass": _grass,
    "on the beach": _beach,
    "in the snow": _snow,
    "in the night sky": _night,
    "on a wooden table": _wood,
    "in the water": _water,
    "in the city": _city,
    "in the mountains": _mountains,
    "in autumn leaves": _leaves,
    "indoors": _indoors,
}
_PATTERNS = (_plain, _plain, _plain, _gradient, _stripes, _checks)


def draw_background(
    size_px: int, random: Random, where: str | None = None
) -> tuple[np.ndarray, str]:
    """Draws one background and returns it with the phrase that names it.

    Args:
        size_px: side of the square picture.
        random: source of every random detail.
        where: a scene's phrase, "on a COLOUR background", or None for a random background: half
            scenes, a quarter plain colours, a quarter patterns.

    Returns:
        uint8 array (3, size_px, size_px) and the phrase.

    Raises:
        ValueError: `where` names neither a scene nor a plain colour.
    """
    size = 2 * size_px
    if where is None:
        if random.random() < 0.5:
            where = random.choice(list(SCENES))
        else:
            image, phrase = random.choice(_PATTERNS)(size, random)
            return _finish(image, size_px), phrase
    if where in SCENES:
        return _finish(SCENES[where](size, random), size_px), where
    colour = where.removeprefix("on a ").removesuffix(" background")
    if colour not in COLOURS:
        raise ValueError(f"no background is called {where!r}; scenes: {', '.join(SCENES)}")
    image = Image.new("RGB", (size, size), _jitter(COLOURS[colour], random))
    return _finish(image, size_px), where


def _finish(image: Image.Image, size_px: int) -> np.ndarray:
    image = image.filter(ImageFilter.GaussianBlur(0.6)).resize(
        (size_px, size_px), Image.Resampling.BOX
    )
    return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))
