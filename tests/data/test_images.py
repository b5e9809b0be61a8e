"""Photos of every kind, and every kind of file that is none."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from nora_diffusion.config import UserError
from nora_diffusion.data.images import Photo, describe_skipped, read_image, read_photos, square

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def picture(width: int = 40, height: int = 30) -> Image.Image:
    """Red left half, blue right half, with a green bar at the top."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    image.paste(GREEN, (0, 0, width, height // 3))
    return image


def close(image: Image.Image, xy: tuple[int, int], colour: tuple[int, ...], within: int = 12):
    assert image.mode == "RGB"
    found = np.array(image.getpixel(xy), dtype=int)
    assert np.abs(found - colour).max() <= within, (found, colour)


FORMATS = ["png", "jpg", "webp", "bmp", "tiff", "gif", "ppm", "tga", "jp2", "ico", "avif"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_formats(tmp_path, suffix):
    codec = {"avif": "avif", "jp2": "jpg_2000", "webp": "webp"}.get(suffix)
    if codec is not None and not features.check(codec):
        pytest.skip(f"this build of Pillow has no {codec}")
    path = tmp_path / f"a.{suffix}"
    picture(48, 48).save(path)
    image = read_image(path)
    assert image.size == (48, 48)
    for xy, colour in (((4, 40), RED), ((44, 40), BLUE), ((24, 4), GREEN)):
        close(image, xy, colour, 40)


def test_heic(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    path = tmp_path / "a.heic"
    heif.from_pillow(picture(64, 64)).save(path, quality=95)
    (photo,), skipped = read_photos(tmp_path)
    assert skipped == []
    close(photo.open(), (5, 50), RED, 40)


MODES = ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F", "LAB"]


@pytest.mark.parametrize("mode", MODES)
def test_modes_keep_their_brightness(tmp_path, mode):
    """A light and a dark half stay light and dark, at the right level."""
    values = np.full((8, 8), 64, np.uint8)
    values[:, 4:] = 192
    if mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16) * 257)
    elif mode == "I":
        image = Image.fromarray(values.astype(np.int32) * 257)
    elif mode == "F":
        image = Image.fromarray(values.astype(np.float32) / 255)
    elif mode == "LAB":
        lab = ImageCms.buildTransform(
            ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
        )
        rgb = Image.fromarray(values).convert("RGB")
        image = ImageCms.applyTransform(rgb, lab)
    elif mode == "1":
        image = Image.fromarray((values > 128) * np.uint8(255)).convert("1")
    elif mode == "P":
        image = Image.fromarray(values).quantize(2)
    else:
        image = Image.fromarray(values).convert("RGB").convert(mode)
    assert image is not None and image.mode == mode
    path = tmp_path / ("a.png" if mode in ("1", "L", "LA", "P", "RGBA", "I;16") else "a.tiff")
    # Pillow 12.3 cannot read its own uncompressed YCbCr.
    image.save(path, compression="tiff_deflate" if mode == "YCbCr" else None)
    dark, light = (0, 255) if mode == "1" else (64, 192)
    close(read_image(path), (1, 4), (dark,) * 3, 6)
    close(read_image(path), (6, 4), (light,) * 3, 6)


def test_16_bit_colour(tmp_path):
    """Pillow cannot write such a file, cameras and scanners do."""
    row = b"\0" + struct.pack(">3H", 65535, 32768, 0) * 4
    chunks = [
        (b"IHDR", struct.pack(">2I5B", 4, 1, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(row)),
        (b"IEND", b""),
    ]
    path = tmp_path / "a.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d))
            for t, d in chunks
        )
    )
    close(read_image(path), (0, 0), (255, 128, 0), 1)


def test_float_pictures_survive_nan_and_infinity(tmp_path):
    values = np.linspace(0, 1000, 64, dtype=np.float32).reshape(8, 8)
    values[0, 0], values[0, 1] = np.nan, np.inf
    path = tmp_path / "a.tiff"
    Image.fromarray(values).save(path)
    image = read_image(path)
    close(image, (7, 7), (4, 4, 4), 1)  # 1000 of 65535: the range of 16 bits
    close(image, (0, 0), (0, 0, 0), 0)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "colour key", "gif"])
def test_transparency_is_laid_over_white(tmp_path, kind):
    path = tmp_path / ("a.gif" if kind == "gif" else "a.png")
    alpha = Image.new("L", (8, 8), 0)
    alpha.paste(255, (4, 0, 8, 8))
    if kind in ("RGBA", "LA"):
        image = Image.new("RGB", (8, 8), RED).convert(kind[:-1])
        image.putalpha(alpha)
        image.save(path)
    elif kind in ("palette", "gif"):
        image = Image.new("P", (8, 8), 0)
        image.putpalette([*BLUE, *RED])
        image.paste(1, (4, 0, 8, 8))
        image.save(path, transparency=0)
    else:
        image = Image.new("RGB", (8, 8), BLUE)
        image.paste(RED, (4, 0, 8, 8))
        image.save(path, transparency=BLUE)
    close(read_image(path), (1, 4), WHITE, 0)
    assert read_image(path).getpixel((6, 4)) != WHITE


def test_half_transparent_is_half_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "a.png")
    close(read_image(tmp_path / "a.png"), (1, 1), (255, 127, 127), 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    upright = picture()
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    stored.save(path, exif=exif, **({"quality": 95, "subsampling": 0} if suffix == "jpg" else {}))
    (photo,), _ = read_photos(tmp_path)
    assert photo.size == photo.open().size == (40, 30)
    for xy, colour in (((4, 26), RED), ((36, 26), BLUE), ((20, 4), GREEN)):
        close(photo.open(), xy, colour, 60)


def test_a_damaged_exif_block_does_not_lose_the_photo(tmp_path):
    picture().save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff" + b"\xff" * 30)
    (photo,), skipped = read_photos(tmp_path)
    assert (photo.size, skipped) == ((40, 30), [])


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_of_an_animation_the_first_frame_counts(tmp_path, suffix):
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN, BLUE)]
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    close(read_image(path), (8, 8), RED, 30)


def test_colour_profiles_are_applied(tmp_path):
    """A profile whose red and blue primaries are swapped swaps red and blue."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"....").replace(b"bXYZ", b"rXYZ").replace(b"....", b"bXYZ")
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    image.save(tmp_path / "srgb.png", icc_profile=srgb)
    image.save(tmp_path / "swapped.png", icc_profile=swapped)
    image.save(tmp_path / "broken.png", icc_profile=b"not a profile")
    close(read_image(tmp_path / "srgb.png"), (1, 1), (200, 100, 50), 1)
    close(read_image(tmp_path / "broken.png"), (1, 1), (200, 100, 50), 0)
    close(read_image(tmp_path / "swapped.png"), (1, 1), (50, 100, 200), 2)


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (3000, 7), (512, 512), (63, 64)])
def test_any_size_becomes_the_square(tmp_path, size):
    Image.new("RGB", size, RED).save(tmp_path / "a.png")
    result = square(read_image(tmp_path / "a.png"), 64)
    assert result.size == (64, 64)
    close(result, (32, 32), RED, 0)


def test_square_takes_the_asked_place_and_mirrors():
    image = picture(90, 30)
    left, right = square(image, 30, (0.0, 0.5)), square(image, 30, (1.0, 0.5))
    close(left, (15, 25), RED)
    close(right, (15, 25), BLUE)
    middle = square(image, 30)
    close(middle, (3, 25), RED)
    close(middle, (27, 25), BLUE)
    close(square(image, 30, flip=True), (3, 25), BLUE)
    assert square(picture(30, 30), 30).tobytes() == picture(30, 30).tobytes()


def bomb(width: int = 30_000, height: int = 30_000) -> bytes:
    """A PNG of a hundred bytes that claims to be 900 million pixels."""
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks
    )


@pytest.fixture
def zoo(tmp_path) -> Path:
    """Two photos among everything that people leave in a photo folder."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    picture().save(folder / "b.jpg")
    picture(30, 40).save(folder / "a.PNG")
    encoded = io.BytesIO()
    picture(200, 200).save(encoded, "png")
    (folder / "truncated.png").write_bytes(encoded.getvalue()[: len(encoded.getvalue()) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0" * 50)
    (folder / "page.html.jpg").write_text("<html>404</html>")
    (folder / "script.eps").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
    )
    (folder / "bomb.png").write_bytes(bomb())
    (folder / "notes.txt").write_text("not a caption of any photo")
    (folder / "b.jpg.txt").write_text("a caption under another program's name")
    (folder / "b.txt").write_text("a photo of\n  {trigger}, smiling ")
    (folder / "more").mkdir()
    os.symlink(folder / "gone.jpg", folder / "link.jpg")
    os.mkfifo(folder / "pipe.jpg")
    return folder


def test_photos_are_found_among_everything_else_which_is_listed_with_reasons(zoo):
    photos, skipped = read_photos(zoo)
    assert [(photo.path.name, photo.size, photo.caption) for photo in photos] == [
        ("a.PNG", (30, 40), None),
        ("b.jpg", (40, 30), "a photo of {trigger}, smiling"),
    ]
    reasons = {skip.path.name: skip.reason for skip in skipped}
    assert reasons == {
        "Thumbs.db": "not an image",
        "b.jpg.txt": "not an image; a caption is read from b.txt",
        "bomb.png": "more than 178 million pixels; scale it down",
        "empty.jpg": "empty (0 bytes)",
        "link.jpg": "not a regular file",
        "more": "a folder",
        "notes.txt": "not an image",
        "page.html.jpg": "not an image",
        "pipe.jpg": "not a regular file",
        "script.eps": "not an image",
        "truncated.png": reasons["truncated.png"],
    }
    assert reasons["truncated.png"].startswith("broken (")
    assert "  bomb.png: more than" in describe_skipped(skipped)


def test_every_cut_of_a_file_is_a_photo_or_a_reason(tmp_path):
    for suffix in ("jpg", "png", "webp", "gif", "tiff", "bmp"):
        encoded = io.BytesIO()
        picture(24, 24).save(encoded, {"jpg": "jpeg"}.get(suffix, suffix))
        data = encoded.getvalue()
        (tmp_path / "whole.png").write_bytes(_png())
        for size in range(0, len(data), max(1, len(data) // 25)):
            (tmp_path / f"cut.{suffix}").write_bytes(data[:size])
            photos, skipped = read_photos(tmp_path)
            assert len(photos) + len(skipped) == 2
        (tmp_path / f"cut.{suffix}").unlink()


def _png() -> bytes:
    encoded = io.BytesIO()
    picture().save(encoded, "png")
    return encoded.getvalue()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: None, "no such folder; give the folder that holds the photos"),
        (lambda path: path.write_bytes(_png()), "is a file; give the folder"),
        (lambda path: path.mkdir(), "holds no usable photo; it is empty"),
        (
            lambda path: (path.mkdir(), (path / "x.jpg").write_bytes(b"")),
            "holds no usable photo; it holds:\n  x.jpg: empty (0 bytes)",
        ),
        (
            lambda path: (path.mkdir(), (path / "x.png").write_bytes(bomb())),
            "holds no usable photo; it holds:\n  x.png: more than 178 million pixels",
        ),
        (
            lambda path: (path.mkdir(), [picture().save(path / f"{i}.png") for i in range(21)]),
            "holds 21 photos; keep the best 1 to 20",
        ),
    ],
)  # fmt: skip
def test_unusable_folders_are_errors_that_name_the_key(tmp_path, prepare, message):
    folder = tmp_path / "photos"
    prepare(folder)
    with pytest.raises(UserError) as caught:
        read_photos(folder)
    assert str(caught.value).startswith(f'data.subject = "{folder}": ')
    assert message in str(caught.value)


def test_class_images_have_no_limit_and_their_own_key(tmp_path):
    for index in range(21):
        (tmp_path / f"{index}.png").write_bytes(_png())
    photos, _ = read_photos(tmp_path, key="data.class_images", limit=None)
    assert len(photos) == 21
    with pytest.raises(UserError, match="^data.class_images = "):
        read_photos(tmp_path / "none", key="data.class_images", limit=None)


def test_a_caption_in_another_encoding_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(_png())
    (tmp_path / "a.txt").write_bytes("ein süßer Hund".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8 text"):
        read_photos(tmp_path)


def test_empty_captions_are_none(tmp_path):
    (tmp_path / "a.png").write_bytes(_png())
    (tmp_path / "a.txt").write_text(" \n")
    (photo,), skipped = read_photos(tmp_path)
    assert (photo.caption, skipped) == (None, [])


def test_the_digest_follows_the_bytes_not_the_name(tmp_path):
    (tmp_path / "a.png").write_bytes(_png())
    (tmp_path / "b.png").write_bytes(_png())
    picture(41, 30).save(tmp_path / "c.png")
    a, b, c = read_photos(tmp_path)[0]
    assert a.digest == b.digest != c.digest
    assert isinstance(a, Photo) and a != b
