"""Sizes of training pictures that keep a photo's proportions: aspect-ratio buckets.

The rule, for a resolution R and a base that wants multiples of m px: sides are multiples of
R / 16, rounded down to a multiple of m (at least m); no bucket has more pixels than the R x R
square, which is a bucket itself; none is longer than twice its width. As novelai and kohya do it,
but for the finest step. A photo goes to the bucket that cuts off least of it.
"""

from collections.abc import Sequence

Size = tuple[int, int]
"""Width and height in px."""

MAX_ASPECT = 2.0
"""Longer side over shorter side of the narrowest bucket: bases draw badly beyond."""

STEPS_A_SIDE = 16
"""How finely sides differ, in parts of the resolution: finer ones would hold one photo each."""


def bucket_sizes(resolution_px: int, multiple_px: int) -> tuple[Size, ...]:
    """All buckets, the square first, then wider and wider ones, each before its upright twin.

    Args:
        resolution_px: side of the square; no bucket has a larger area.
        multiple_px: sides are multiples of it, except the square's, which is as asked for.
    """
    step = max(multiple_px, resolution_px // STEPS_A_SIDE // multiple_px * multiple_px)
    sizes: list[Size] = [(resolution_px, resolution_px)]
    width = resolution_px // step * step + step
    while (height := resolution_px**2 // width // step * step) and width <= MAX_ASPECT * height:
        sizes += [(width, height), (height, width)]
        width += step
    return tuple(sizes)


def closest_bucket(photo: Size, buckets: Sequence[Size]) -> Size:
    """The bucket that cuts off least of a photo; of equal ones the first."""
    return min(buckets, key=lambda bucket: cut_share(photo, bucket))


def cut_share(photo: Size, target: Size) -> float:
    """Share of a photo's area that is cut off to give it the target's proportions, 0 to 1."""
    (width, height), (to_width, to_height) = photo, target
    across, down = width * to_height, height * to_width
    return 1 - min(across, down) / max(across, down)


def enlargement(photo: Size, target: Size) -> float:
    """Factor by which a photo is scaled to fill the target; above 1 it has too few pixels."""
    return max(target[0] / photo[0], target[1] / photo[1])
