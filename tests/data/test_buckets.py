"""Bucket sizes: their rule, and which photo goes where."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nora_diffusion.data.buckets import (
    MAX_ASPECT,
    bucket_sizes,
    closest_bucket,
    cut_share,
    enlargement,
)

sizes = st.tuples(st.integers(1, 9000), st.integers(1, 9000))
grids = st.sampled_from([(64, 16), (256, 16), (512, 64), (768, 64), (1024, 16), (1024, 64)])


@given(grids)
def test_buckets_follow_the_rule(grid):
    resolution, multiple = grid
    buckets = bucket_sizes(resolution, multiple)
    assert buckets[0] == (resolution, resolution)
    assert len(set(buckets)) == len(buckets) > 1
    step = max(multiple, resolution // 16 // multiple * multiple)
    for width, height in buckets:
        assert width % step == 0 and height % step == 0 and step % multiple == 0
        assert max(width, height) <= MAX_ASPECT * min(width, height)
        # Rounded down to the step on one side: that much area may be missing, and none is added.
        assert resolution**2 - step * max(width, height) < width * height <= resolution**2
        assert (height, width) in buckets


def test_the_buckets_of_512_px_are_written_down():
    """A change would train runs on other pictures after a resume."""
    assert bucket_sizes(512, 64) == ((512, 512), (576, 448), (448, 576), (640, 384), (384, 640))
    assert (1152, 896) in bucket_sizes(1024, 64) and (832, 1216) in bucket_sizes(1024, 64)


@given(sizes, grids)
def test_a_photo_goes_where_least_is_cut_off(photo, grid):
    buckets = bucket_sizes(*grid)
    chosen = closest_bucket(photo, buckets)
    assert all(cut_share(photo, chosen) <= cut_share(photo, other) for other in buckets)
    upright = closest_bucket(photo[::-1], buckets)
    assert cut_share(photo[::-1], upright) == pytest.approx(cut_share(photo, chosen))


def test_shares_and_enlargement_are_of_area_and_side():
    assert cut_share((400, 300), (300, 300)) == 0.25
    assert cut_share((300, 400), (300, 300)) == 0.25
    assert cut_share((400, 300), (800, 600)) == 0
    assert enlargement((400, 300), (600, 600)) == 2
    assert enlargement((4000, 3000), (600, 600)) == 0.2
