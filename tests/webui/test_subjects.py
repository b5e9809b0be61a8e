"""Subjects: what is kept of uploads, what is said of them, and that deleted means gone."""

from __future__ import annotations

import io
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from nora_diffusion.config import UserError
from nora_diffusion.data.images import read_photos
from webui.bin import DAY_S, DailyRound
from webui.models import Job
from webui.photos import FILE_LIMIT_BYTES
from webui.studio import Studio
from webui.subject_photos import CAPTION_LIMIT

ROOT = Path(__file__).parent.parent.parent
SAMPLES = sorted((ROOT / "sample_data" / "subject").glob("*.jpg"))


def scene(seed: int, size: tuple[int, int] = (600, 600)) -> Image.Image:
    """A picture with detail, another one for each seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.NEAREST)


def write(folder: Path, **images: Image.Image) -> list[Path]:
    paths = []
    for name, image in images.items():
        paths.append(folder / f"{name}.png")
        image.save(paths[-1])
    return paths


def bomb(width: int = 30_000, height: int = 30_000) -> bytes:
    """A PNG of a hundred bytes that claims to be 900 million pixels."""
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks
    )


def test_photos_are_kept_as_they_came_under_names_of_ours(studio, upload, subject):
    assert [photo.shown_name for photo in subject.photos] == [path.name for path in SAMPLES]
    for photo, source in zip(subject.photos, SAMPLES, strict=True):
        assert photo.path.read_bytes() == source.read_bytes()
        assert photo.size == Image.open(source).size
        assert max(Image.open(photo.thumbnail).size) <= 256
    folder = studio.subjects.files.photos(subject.id)
    assert folder.is_relative_to(studio.folder.root)
    assert sorted(path.name for path in folder.iterdir()) == [
        f"photo-{n:03}.jpg" for n in range(1, 6)
    ]
    assert len(read_photos(folder)[0]) == 5


def test_a_subject_survives_a_restart(studio, subject):
    studio.subjects.photos.set_caption("", subject.id, subject.photos[1].id, "{trigger} on a lawn")
    again = Studio.open(studio.folder)
    again.subjects.tidy()
    (found,) = again.subjects.all("")
    assert found == studio.subjects.get("", subject.id)
    assert found.photos[1].caption == "{trigger} on a lawn"
    again.close()


@pytest.mark.parametrize(
    ("name", "suffix"), [("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp"), ("HEIF", ".heic")]
)
def test_the_ending_is_that_of_the_content(studio, upload, tmp_path, name, suffix):
    if name == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    path = tmp_path / "no-picture.txt"
    scene(1).save(path, name)
    subject, _ = studio.subjects.create("", "A", "toy", "sks", upload(path))
    (photo,) = subject.photos
    assert photo.path.name == f"photo-001{suffix}" and photo.shown_name == "no-picture.txt"
    assert photo.size == (600, 600)
    assert Image.open(studio.subjects.photos.cropped("", subject.id, photo.id, 64)).size == (64, 64)


def test_each_fault_is_told_with_the_name_of_the_photo(studio, upload, tmp_path):
    sharp = scene(1)
    files = write(
        tmp_path,
        good=scene(0),
        small=scene(2, (100, 100)),
        blurred=scene(3).resize((200, 200)).filter(ImageFilter.GaussianBlur(9)).resize((600, 600)),
        twin_a=sharp,
        twin_b=sharp.resize((700, 700)),
        panorama=scene(4, (1800, 600)),
    )
    _, checks = studio.subjects.create("", "A", "toy", "sks", upload(*files))
    assert all(check.level == "warning" for check in checks)
    said = {(check.photo, check.reason) for check in checks}
    assert said == {
        (
            "small.png",
            "too small: 100 x 100 px, enlarged 5.1 times for 512 px; use a larger one if you can",
        ),
        ("blurred.png", "blurred, or without detail; use a sharper one"),
        ("twin_b.png", "nearly the same picture as twin_a.png; keep one of them"),
        ("panorama.png", "very wide: 67% of it is cut off; crop it around the subject yourself"),
    }


def test_what_is_too_small_depends_on_the_base(studio, subject):
    def small(px: int) -> int:
        checks = studio.subjects.photos.checks("", subject.id, px)
        return sum("too small" in check.reason for check in checks)

    assert (small(64), small(512)) == (0, 5)


def test_unusable_files_are_left_out_and_named(studio, upload, tmp_path):
    encoded = io.BytesIO()
    scene(1).save(encoded, "png")
    contents = {
        "cut-off.png": encoded.getvalue()[:3000],
        "empty.jpg": b"",
        "page.jpg": b"<html>404</html>",
        "bomb.png": bomb(),
        "moving.gif": b"GIF89a" + b"\0" * 20,
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    scene(1).save(tmp_path / "drawing.bmp")
    bad = [*(tmp_path / name for name in contents), tmp_path / "drawing.bmp"]
    subject, checks = studio.subjects.create("", "A", "toy", "sks", upload(*SAMPLES, *bad))
    assert len(subject.photos) == 5
    reasons = {check.photo: check.reason for check in checks if check.level == "unusable"}
    assert set(reasons) == {path.name for path in bad}
    assert "million pixels" in reasons["bomb.png"]
    assert "empty" in reasons["empty.jpg"]
    assert "BMP" in reasons["drawing.bmp"]
    for reason in reasons.values():
        assert reason.startswith("cannot be used: ") and "JPEG, PNG, WebP or HEIC" in reason
    with pytest.raises(UserError, match=r"no photo can be used: cut-off\.png .*page\.jpg"):
        studio.subjects.create("", "A", "toy", "sks", upload(*bad))
    assert len(list(studio.folder.part("subjects").iterdir())) == 1


def test_a_file_that_is_too_large_is_not_opened(studio, upload, tmp_path):
    large = tmp_path / "large.jpg"
    large.write_bytes(SAMPLES[0].read_bytes())
    with large.open("r+b") as file:
        file.truncate(FILE_LIMIT_BYTES + 1)  # sparse
    with pytest.raises(UserError, match=r"large\.jpg 64 MB; at most 64 MB"):
        studio.subjects.create("", "A", "toy", "sks", upload(large))


def test_few_photos_are_a_warning_and_too_many_are_refused(studio, upload, subject):
    (two, checks) = studio.subjects.create("", "A", "flower", "sks", upload(*SAMPLES[:2]))
    assert ("", "only 2 photos: 3 to 20 teach it better") in [(c.photo, c.reason) for c in checks]
    with pytest.raises(UserError, match="that would be 21 photos; a subject has at most 20"):
        studio.subjects.create("", "A", "flower", "sks", upload(*SAMPLES * 4, SAMPLES[0]))
    with pytest.raises(UserError, match="that would be 22 photos"):
        studio.subjects.photos.add("", two.id, upload(*SAMPLES * 4))
    assert len(studio.subjects.get("", two.id).photos) == 2
    assert len(studio.subjects.all("")) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("", "dog", "sks"), "name: missing"),
        (("Bello", " \u200b\n", "sks"), "class word: missing"),
        (("Bello", "dog", "\x00"), "trigger word: missing"),
        (("B" * 81, "dog", "sks"), "name: 81 letters; give at most 80"),
    ],
)
def test_each_word_is_needed(studio, upload, words, said):
    with pytest.raises(UserError, match=said):
        studio.subjects.create("", *words, upload(*SAMPLES))
    assert studio.subjects.all("") == []
    assert list(studio.folder.part("subjects").iterdir()) == []


def test_only_uploads_are_read(studio, upload, tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(SAMPLES[0].read_bytes())
    link = studio.folder.part("uploads") / "link.jpg"
    link.symlink_to(secret)
    for path in (secret, link, studio.folder.database, Path("../secret.jpg"), Path("a\0b")):
        with pytest.raises(UserError, match="not uploaded"):
            studio.subjects.create("", "A", "toy", "sks", [(path, "a.jpg")])
    assert list(studio.folder.part("subjects").iterdir()) == []


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\me\\dog.jpg", "dog.jpg"),
        ("\u202egpj.exe", "gpj.exe"),
        ("", "photo"),
        ("a" * 300 + ".jpg", "a" * 76 + ".jpg"),
    ],
)
def test_names_lead_nowhere(studio, upload, given, shown):
    ((path, _),) = upload(SAMPLES[0])
    subject, _ = studio.subjects.create("", "A", "toy", "sks", [(path, given), (path, given)])
    assert [p.shown_name for p in subject.photos] == [shown, f"{shown} (2)"]
    assert {p.path.name for p in subject.photos} == {"photo-001.jpg", "photo-002.jpg"}


def test_the_right_to_use_photos_is_asked_once_for_each_owner(studio, upload):
    for _ in range(2):
        with pytest.raises(UserError, match="confirm once that you have the right"):
            studio.subjects.create("anna", "A", "toy", "sks", upload(*SAMPLES))
    assert studio.subjects.all("anna") == []
    assert list(studio.folder.part("subjects").iterdir()) == []
    studio.subjects.rights.confirm("anna")
    studio.subjects.rights.confirm("anna")
    assert Studio.open(studio.folder).subjects.rights.confirmed("anna")
    assert not studio.subjects.rights.confirmed("bert")
    studio.subjects.create("anna", "A", "toy", "sks", upload(*SAMPLES))


def test_owners_know_nothing_of_each_other(studio, subject, upload):
    others = studio.subjects
    others.rights.confirm("bert")
    assert others.all("bert") == [] and others.binned("bert") == []
    photo = subject.photos[0]
    for attempt in (
        lambda: others.get("bert", subject.id),
        lambda: others.save("bert", subject.id, "Mine", "dog", "sks"),
        lambda: others.note("bert", subject.id, "Mine", "dog", "sks"),
        lambda: others.photos.add("bert", subject.id, upload(SAMPLES[0])),
        lambda: others.photos.remove("bert", subject.id, photo.id),
        lambda: others.photos.set_caption("bert", subject.id, photo.id, "mine"),
        lambda: others.photos.checks("bert", subject.id),
        lambda: others.photos.cropped("bert", subject.id, photo.id, 64),
        lambda: others.delete("bert", subject.id),
        lambda: others.purge("bert", subject.id),
    ):
        with pytest.raises(UserError, match="no such subject"):
            attempt()
    assert others.get("", subject.id) == subject


def test_a_draft_keeps_what_was_uploaded_and_typed_until_it_is_saved(studio, upload):
    draft = studio.subjects.draft("")
    assert draft.draft and studio.subjects.draft("").id == draft.id
    studio.subjects.note("", draft.id, "Bello", "", "zxw")
    studio.subjects.photos.add("", draft.id, upload(*SAMPLES))
    assert studio.subjects.all("") == []
    with pytest.raises(UserError, match="class word: missing"):
        studio.subjects.save("", draft.id, "Bello", "", "zxw")
    again = Studio.open(studio.folder)
    again.subjects.tidy()
    found = again.subjects.draft("")
    assert (found.name, found.trigger, len(found.photos)) == ("Bello", "zxw", 5)
    again.subjects.save("", found.id, "Bello", "dog", "zxw")
    assert [one.id for one in again.subjects.all("")] == [draft.id]
    assert again.subjects.draft("").id != draft.id
    again.close()


def test_a_draft_without_photos_is_not_saved(studio):
    with pytest.raises(UserError, match="photos: none yet"):
        studio.subjects.save("", studio.subjects.draft("").id, "Bello", "dog", "sks")


def test_a_saved_subject_can_be_changed(studio, upload, subject, tmp_path):
    renamed = studio.subjects.save("", subject.id, "Rose", "rose", "zxw")
    assert (renamed.name, renamed.class_name, renamed.trigger) == ("Rose", "rose", "zxw")
    studio.subjects.photos.remove("", subject.id, subject.photos[4].id)
    studio.subjects.photos.add("", subject.id, upload(*write(tmp_path, more=scene(7))))
    found = studio.subjects.get("", subject.id)
    assert [photo.shown_name for photo in found.photos] == [
        "01.jpg", "02.jpg", "03.jpg", "04.jpg", "more.png",
    ]  # fmt: skip
    assert len(read_photos(studio.subjects.files.photos(subject.id))[0]) == 5
    for photo in found.photos[:-1]:
        studio.subjects.photos.remove("", subject.id, photo.id)
    with pytest.raises(UserError, match="the last photo of the subject"):
        studio.subjects.photos.remove("", subject.id, found.photos[-1].id)


def test_captions_reach_the_trainer(studio, subject):
    first, second, third = (photo.id for photo in subject.photos[:3])
    studio.subjects.photos.set_caption("", subject.id, first, " a {trigger}\n\x00 {class_name}  ")
    studio.subjects.photos.set_caption("", subject.id, second, "gone")
    studio.subjects.photos.set_caption("", subject.id, second, "")
    with pytest.raises(UserError, match=f"{CAPTION_LIMIT + 1} letters"):
        studio.subjects.photos.set_caption("", subject.id, third, "x" * (CAPTION_LIMIT + 1))
    photos, skipped = read_photos(studio.subjects.files.photos(subject.id))
    assert [photo.caption for photo in photos] == ["a {trigger} {class_name}", *[None] * 4]
    assert skipped == []


def test_the_preview_is_the_middle_square(studio, upload, tmp_path):
    wide = Image.new("RGB", (900, 300), "red")
    wide.paste("blue", (300, 0, 600, 300))
    subject, _ = studio.subjects.create("", "A", "toy", "sks", upload(*write(tmp_path, wide=wide)))
    for px in (64, 512):
        path = studio.subjects.photos.cropped("", subject.id, subject.photos[0].id, px)
        square = Image.open(path)
        assert square.size == (px, px)
        blue = np.asarray(square.convert("RGB"), dtype=int)
        assert np.abs(blue - [0, 0, 255]).mean() < 6
    with pytest.raises(UserError, match="100 px"):
        studio.subjects.photos.cropped("", subject.id, subject.photos[0].id, 100)


def test_thumbnails_hold_nothing_of_the_camera(studio, upload, tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "SECRET-CAMERA"
    exif.get_ifd(0x8825)[1] = "N"
    path = tmp_path / "gps.jpg"
    scene(1).save(path, exif=exif, comment=b"SECRET-CAMERA")
    subject, _ = studio.subjects.create("", "A", "toy", "sks", upload(path))
    photo = subject.photos[0]
    cropped = studio.subjects.photos.cropped("", subject.id, photo.id, 64)
    assert b"SECRET-CAMERA" in photo.path.read_bytes()
    for made in (photo.thumbnail, cropped):
        image = Image.open(made)
        assert not image.getexif() and b"SECRET-CAMERA" not in made.read_bytes()


def test_the_bin_gives_back_until_it_is_emptied(studio, subject):
    studio.subjects.delete("", subject.id)
    assert studio.subjects.all("") == []
    with pytest.raises(UserError, match="no such subject"):
        studio.subjects.get("", subject.id)
    studio.subjects.restore("", subject.id)
    assert studio.subjects.all("") == [subject]
    with pytest.raises(UserError, match="in the bin"):
        studio.subjects.purge("", subject.id)
    studio.subjects.delete("", subject.id)
    studio.subjects.expire(time.time() + 29 * DAY_S)
    assert [one.id for one in studio.subjects.binned("")] == [subject.id]
    studio.subjects.expire(time.time() + 31 * DAY_S)
    assert studio.subjects.binned("") == []
    assert list(studio.folder.part("subjects").iterdir()) == []


def test_photos_stay_while_they_are_trained_on(studio, subject):
    with studio.subjects.sessions.begin() as session:
        session.add(
            Job(owner="", subject_id=subject.id, name="A", base="mini", config="mini",
                state="running", position=1.0)
        )  # fmt: skip
    with pytest.raises(UserError, match="training is running"):
        studio.subjects.photos.remove("", subject.id, subject.photos[0].id)
    studio.subjects.delete("", subject.id)
    with pytest.raises(UserError, match="training is running"):
        studio.subjects.purge("", subject.id)
    studio.subjects.expire(time.time() + 31 * DAY_S)
    studio.subjects.restore("", subject.id)
    assert studio.subjects.get("", subject.id) == subject


def test_a_crash_leaves_no_photo_that_would_be_trained_on(studio, subject):
    folder = studio.subjects.files.photos(subject.id)
    (folder / "photo-009.jpg").write_bytes(SAMPLES[0].read_bytes())
    stray = studio.folder.part("subjects") / "0123456789abcdef" / "photos"
    stray.mkdir(parents=True)
    studio.subjects.photos.set_caption("", subject.id, subject.photos[0].id, "a caption")
    studio.subjects.tidy()
    assert not stray.exists()
    photos, _ = read_photos(folder)
    assert len(photos) == 5 and photos[0].caption == "a caption"


# --- deleted means gone


def holding(root: Path, wanted: dict[str, bytes]) -> list[str]:
    """Which of some bytes are anywhere in the files of a folder, SQLite's and its log's too."""
    found = []
    for path in root.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            found += [f"{what} in {path.name}" for what, part in wanted.items() if part in data]
    return found


@pytest.fixture
def traces(studio, subject, upload):
    """Everywhere that something of a subject can be; returns what must not be found later."""
    captions = [f"CAPTION-{n}-" + "lorem ipsum " * 60 for n in range(5)]
    for photo, caption in zip(subject.photos, captions, strict=True):
        studio.subjects.photos.set_caption("", subject.id, photo.id, f"first {caption[:40]}")
        studio.subjects.photos.set_caption("", subject.id, photo.id, caption)
    uploads = studio.folder.part("uploads")
    wanted = {}
    for index, photo in enumerate(subject.photos):
        cropped = studio.subjects.photos.cropped("", subject.id, photo.id, 512)
        for kind, path in (
            ("photo", photo.path),
            ("thumbnail", photo.thumbnail),
            ("crop", cropped),
        ):
            wanted[f"{kind} {index}"] = path.read_bytes()
            shown = uploads / f"{index}{kind}" / f"shown-{path.name}"  # a copy as Gradio keeps it
            shown.parent.mkdir()
            shown.write_bytes(path.read_bytes())
        wanted[f"caption {index}"] = f"CAPTION-{index}-".encode()
    latents = studio.folder.of("latents", subject.id)
    latents.mkdir()
    (latents / "a.safetensors").write_bytes(b"LATENTS")
    wanted["latents"] = b"LATENTS"
    with studio.subjects.sessions.begin() as session:
        job = Job(owner="", subject_id=subject.id, name="A", base="mini", config="mini",
                  state="done", position=1.0)  # fmt: skip
        session.add(job)
        session.flush()
        run = studio.folder.of("runs", job.id)
    run.mkdir()
    (run / "before_after.png").write_bytes(b"BEFORE-AFTER")
    (run / "README.md").write_text("card")
    wanted["before and after"] = b"BEFORE-AFTER"
    assert len(holding(studio.folder.root, wanted)) > len(wanted)
    return wanted


def test_a_subject_deleted_for_good_leaves_no_byte(studio, subject, traces):
    studio.subjects.delete("", subject.id)
    studio.subjects.purge("", subject.id)
    assert holding(studio.folder.root, traces) == []
    assert [path.name for path in studio.folder.part("runs").rglob("*.md")] == ["README.md"]
    with studio.subjects.sessions() as session:
        assert session.query(Job).one().subject_id is None


def test_emptying_the_bin_leaves_no_byte(studio, subject, traces):
    studio.subjects.delete("", subject.id)
    studio.subjects.expire(time.time() + 31 * DAY_S)
    assert holding(studio.folder.root, traces) == []


def test_a_removed_photo_leaves_no_byte_and_the_others_stay(studio, subject, traces):
    studio.subjects.photos.remove("", subject.id, subject.photos[2].id)
    gone = {what: part for what, part in traces.items() if what.endswith("2") or what == "latents"}
    assert holding(studio.folder.root, gone) == []
    kept = studio.subjects.get("", subject.id)
    assert [photo.shown_name for photo in kept.photos] == ["01.jpg", "02.jpg", "04.jpg", "05.jpg"]
    for photo in kept.photos:
        assert photo.path.is_file() and photo.thumbnail.is_file() and photo.caption


def test_a_discarded_draft_leaves_no_byte(studio, upload):
    draft = studio.subjects.draft("")
    studio.subjects.note("", draft.id, "SECRET-NAME", "dog", "sks")
    studio.subjects.photos.add("", draft.id, upload(*SAMPLES))
    photos = {path.name: path.read_bytes() for path in SAMPLES}
    studio.subjects.delete("", draft.id)
    assert holding(studio.folder.root, {"name": b"SECRET-NAME", **photos}) == []
    assert studio.subjects.draft("").photos == ()


def test_the_daily_round_goes_on_after_an_error():
    calls = []

    def fail() -> None:
        calls.append("fail")
        raise OSError("disk")

    rounds = DailyRound(fail, lambda: calls.append("next") or rounds.close())
    rounds.start()
    rounds.join()
    assert calls == ["fail", "next"]
