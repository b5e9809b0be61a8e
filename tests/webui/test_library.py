"""Adapters: from finished runs, from files, to files, and to the bin."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import shutil
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from nora_diffusion.config import UserError
from nora_diffusion.events import EventLog
from webui.bin import DAY_S
from webui.library_files import LORA, NATIVE
from webui.models import Job
from webui.paths import new_id
from webui.studio import Studio

GOLDEN = Path(__file__).parent.parent / "adapter" / "golden"


@pytest.fixture
def finished_job(studio, finished_run) -> str:
    """A job that is done, with its run folder."""
    return add_job(studio, finished_run)


def add_job(studio, run: Path, owner: str = "", name: str = "Hibiscus") -> str:
    id = new_id()
    shutil.copytree(run, studio.folder.of("runs", id))
    with studio.library.sessions.begin() as session:
        session.add(
            Job(
                id=id, owner=owner, name=name, base="mini", config="mini", state="done",
                position=1.0, steps=2,
            )
        )  # fmt: skip
    return id


def test_what_a_run_left_is_taken_over_once(studio, finished_job, finished_run):
    adapter = studio.library.adopt(finished_job)
    assert adapter == studio.library.adopt(finished_job)
    assert studio.library.all("") == [adapter]
    assert (adapter.name, adapter.kind, adapter.base, adapter.family) == (
        "Hibiscus", "nora", "mini", "sd",
    )  # fmt: skip
    assert (adapter.trigger, adapter.class_name) == ("sks", "flower")
    assert (adapter.r, adapter.inner_r, adapter.steps) == (160, 8, 2)
    assert adapter.loss is not None and adapter.loss > 0
    assert adapter.path.read_bytes() == (finished_run / "adapter.safetensors").read_bytes()
    assert adapter.size_bytes == adapter.path.stat().st_size
    assert adapter.thumbnail is not None and adapter.card is not None


def test_a_run_without_adapter_leaves_none(studio):
    assert studio.library.adopt(new_id()) is None
    assert studio.library.all("") == []


def test_a_run_that_went_on_replaces_what_was_taken(studio, finished_job):
    first = studio.library.adopt(finished_job)
    studio.library.rename("", first.id, "Rose")
    old = studio.library.download("", first.id, "native").read_bytes()
    run = studio.folder.of("runs", finished_job)
    lora = (run / "pytorch_lora_weights.safetensors").read_bytes()
    (run / "adapter.safetensors").write_bytes(lora)  # stands for a later state
    EventLog(run / "events.jsonl").write("step", step=9, loss=0.5)
    again = studio.library.adopt(finished_job)
    assert (again.id, again.name, again.steps, again.loss) == (first.id, "Rose", 9, 0.5)
    assert studio.library.download("", first.id, "native").read_bytes() == lora != old


def test_names_are_told_apart(studio, finished_run):
    found = [studio.library.adopt(add_job(studio, finished_run)) for _ in range(3)]
    assert [one.name for one in found] == ["Hibiscus", "Hibiscus 2", "Hibiscus 3"]
    assert [one.name for one in studio.library.all("")] == ["Hibiscus 3", "Hibiscus 2", "Hibiscus"]
    assert studio.library.get("", "Hibiscus 2") == studio.library.get("", found[1].id) == found[1]
    with pytest.raises(UserError, match="no adapter called Rose; there are: Hibiscus 3"):
        studio.library.get("", "Rose")
    with pytest.raises(UserError, match="another adapter is called Hibiscus 2"):
        studio.library.rename("", found[0].id, " Hibiscus  2")
    assert studio.library.rename("", found[0].id, "Rose").name == "Rose"
    with pytest.raises(UserError, match="name: missing"):
        studio.library.rename("", found[0].id, "\u200b")


def test_adapters_survive_a_restart(studio, finished_job):
    adapter = studio.library.adopt(finished_job)
    again = Studio.open(studio.folder)
    again.library.tidy()
    assert again.library.all("") == [adapter] and adapter.path.is_file()
    again.close()


def test_owners_know_nothing_of_each_other(studio, finished_run):
    adapter = studio.library.adopt(add_job(studio, finished_run, owner="anna"))
    assert studio.library.all("bert") == [] and studio.library.all("") == []
    for attempt in (
        lambda: studio.library.get("bert", adapter.id),
        lambda: studio.library.get("bert", adapter.name),
        lambda: studio.library.download("bert", adapter.id, "native"),
        lambda: studio.library.rename("bert", adapter.id, "Mine"),
        lambda: studio.library.delete("bert", adapter.id),
        lambda: studio.library.restore("bert", adapter.id),
        lambda: studio.library.purge("bert", adapter.id),
    ):
        with pytest.raises(UserError, match="no (such )?adapter"):
            attempt()
    assert studio.library.all("anna") == [adapter]


def test_downloads_are_named_after_the_adapter(studio, finished_job, finished_run):
    adapter = studio.library.adopt(finished_job)
    for name, stem in (("Größe ../x", "groe-x"), ("CON", "con-file"), ("犬", "adapter")):
        studio.library.rename("", adapter.id, name)
        native = studio.library.download("", adapter.id, "native")
        lora = studio.library.download("", adapter.id, "diffusers")
        assert native.name == f"{stem}-nora.safetensors"
        assert lora.name == f"{stem}-lora-diffusers.safetensors"
        assert native.is_relative_to(studio.folder.part("exports"))
    assert native.read_bytes() == (finished_run / NATIVE).read_bytes()
    assert lora.read_bytes() == (finished_run / LORA).read_bytes()
    assert len(list(studio.folder.part("exports").rglob("*.safetensors"))) == 2


def test_the_bin_gives_back_until_it_is_emptied(studio, finished_job, finished_run):
    adapter = studio.library.adopt(finished_job)
    copy = studio.folder.part("uploads") / "0" / "shown.safetensors"
    copy.parent.mkdir()
    copy.write_bytes(studio.library.download("", adapter.id, "native").read_bytes())
    studio.library.delete("", adapter.id)
    assert studio.library.all("") == []
    taken = studio.library.adopt(add_job(studio, finished_run))
    assert taken.name == "Hibiscus"
    studio.library.restore("", adapter.id)
    assert studio.library.get("", adapter.id).name == "Hibiscus 2"
    studio.library.delete("", adapter.id)
    studio.library.expire(time.time() + 29 * DAY_S)
    assert len(studio.library.binned("")) == 1
    studio.library.expire(time.time() + 31 * DAY_S)
    assert studio.library.binned("") == []
    assert not copy.exists()
    assert [path.name for path in studio.folder.part("adapters").iterdir()] == [taken.id]
    assert not studio.folder.of("exports", adapter.id).exists()


@pytest.mark.slow
def test_the_kohya_layout_loads_in_diffusers(studio, finished_job):
    """And it draws what the native file draws: the LoRA is exact."""
    import torch

    from nora_diffusion import load_adapter, load_pipeline

    adapter = studio.library.adopt(finished_job)
    path = studio.library.download("", adapter.id, "kohya")
    made = path.stat().st_mtime_ns
    assert path.name == "hibiscus-lora-kohya.safetensors"
    studio.library.rename("", adapter.id, "Rose")
    path = studio.library.download("", adapter.id, "kohya")
    assert (path.name, path.stat().st_mtime_ns) == ("rose-lora-kohya.safetensors", made)

    def draw(load) -> np.ndarray:
        pipe = load_pipeline("mini")
        load(pipe)
        generator = torch.Generator().manual_seed(0)
        return pipe(
            "a sks flower", num_inference_steps=2, generator=generator, output_type="np"
        ).images[0]

    exported = draw(lambda pipe: pipe.load_lora_weights(str(path.parent), weight_name=path.name))
    native = draw(lambda pipe: load_adapter(pipe, adapter.path))
    plain = draw(lambda pipe: None)
    assert np.abs(exported - native).max() < 1e-3
    assert np.abs(exported - plain).max() > 10 * np.abs(exported - native).max()


@pytest.mark.slow
def test_what_cannot_be_exported_is_told_in_the_command_s_words(studio, finished_job):
    adapter = studio.library.adopt(finished_job)
    adapter.path.write_bytes((GOLDEN / "v1-compact.safetensors").read_bytes())
    with pytest.raises(UserError, match="the adapter cannot be exported: .+"):
        studio.library.download("", adapter.id, "kohya")
    assert list(studio.folder.part("exports").rglob("*.safetensors")) == []


# --- files from elsewhere


def lora_tensors(rank: int = 2) -> dict[str, np.ndarray]:
    return {
        "unet.a.lora_A.weight": np.ones((rank, 6), np.float32),
        "unet.a.lora_B.weight": np.ones((5, rank), np.float32),
    }


def test_good_files_are_imported(studio, upload, finished_run, tmp_path):
    kohya = tmp_path / "<b>x dog.safetensors"
    names = ("lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight", "lora_unet_a.alpha")
    values = (*lora_tensors().values(), np.array(2.0, np.float32))
    save_file(dict(zip(names, values, strict=True)), kohya)
    for file, kind, r, inner_r, base in (
        (finished_run / NATIVE, "nora", 160, 8, ""),
        (finished_run / LORA, "lora", 8, None, ""),
        (kohya, "lora", 2, None, "mini"),
        (GOLDEN / "v1-compact.safetensors", "nora", 6, 2, "mini"),
        (GOLDEN / "v1-peft" / "adapter_model.safetensors", "lora", 4, None, "owner/name"),
    ):
        ((path, shown),) = upload(file)
        adapter = studio.library.import_file("", path, "", base, shown)
        assert (adapter.kind, adapter.r, adapter.inner_r) == (kind, r, inner_r)
        assert adapter.base == (base or "mini")
        assert adapter.path.read_bytes() == file.read_bytes()
        assert adapter.name == file.stem
        assert studio.library.download("", adapter.id, "native").read_bytes() == file.read_bytes()
    assert [one.trigger for one in studio.library.all("")] == [None, None, None, "sks", "sks"]
    lora = studio.library.get("", "pytorch_lora_weights")
    with pytest.raises(UserError, match="a LoRA already"):
        studio.library.download("", lora.id, "kohya")


def header(table: object, data: bytes = b"") -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list, begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def pair(rank_up: int = 2, **more: object) -> dict:
    down, up = entry("F32", [2, 6], 0, 48), entry("F32", [5, rank_up], 48, 48 + 20 * rank_up)
    return {"unet.a.lora_A.weight": down, "unet.a.lora_B.weight": up, **more}


def zipped() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("adapter.safetensors", b"\0" * 5_000_000)
    return packed.getvalue()


def with_metadata(data: bytes, **metadata: object) -> bytes:
    return header({"__metadata__": metadata, **pair()}, data)


DATA = bytes(88)
HOSTILE = {
    "empty": (b"", "no safetensors file"),
    "four bytes": (b"\x08\0\0\0", "no safetensors file"),
    "header of 2^63 bytes": (struct.pack("<Q", 2**63) + b"{}", "cut off"),
    "header longer than the file": (struct.pack("<Q", 100) + b"{}", "cut off"),
    "header of 9 MB": (header(b" " * 9_000_000), "its header has 9 MB"),
    "not JSON": (header(b"not JSON"), "not JSON"),
    "not UTF-8": (header(b"\xff\xfe{}"), "not JSON"),
    "deep JSON": (header(b"[" * 100_000), "not JSON"),
    "a list": (header([]), "no table"),
    "a name twice": (header(b'{"a": {}, "a": {}}'), "not JSON"),
    "entry is no table": (header(pair(x=1), DATA), "cannot be used"),
    "entry with more": (header(pair(x={**entry("F32", [], 88, 92), "y": 1}), DATA), "cannot be"),
    "unknown format": (header(pair(x=entry("F4", [2], 88, 89)), DATA), "cannot be used"),
    "negative offsets": (header(pair(x=entry("F32", [1], -4, 0)), DATA), "cannot be used"),
    "negative shape": (header(pair(x=entry("F32", [-1, -1], 88, 92)), DATA), "cannot be used"),
    "true as a number": (header(pair(x=entry("U8", [True], 88, 89)), DATA + b"x"), "cannot be"),
    "fractions": (header(pair(x=entry("F32", [0.5], 88, 90)), DATA), "cannot be used"),
    "shape of 2^80": (header(pair(x=entry("U8", [2**39] * 3, 88, 89)), DATA), "another size"),
    "wrong size": (header(pair(x=entry("F32", [3], 88, 92)), DATA + bytes(4)), "another size"),
    "overlap": (header(pair(x=entry("F32", [1], 40, 44)), DATA), "not where it must be"),
    "gap": (header(pair(x=entry("F32", [1], 96, 100)), bytes(100)), "not where it must be"),
    "offsets beyond the file": (header(pair(), bytes(20)), "do not fill the file"),
    "bytes behind the tensors": (header(pair(), DATA + b"MZ"), "do not fill the file"),
    "metadata of numbers": (with_metadata(DATA, x=1), "metadata are not text"),
    "a whole model": (header({"unet.conv.weight": entry("F32", [22], 0, 88)}, DATA), "no LoRA"),
    "no tensors": (header({}), "holds no LoRA"),
    "half a pair": (
        header({"unet.a.lora_A.weight": entry("F32", [2, 11], 0, 88)}, DATA), "no partner",
    ),
    "ranks that differ": (header(pair(rank_up=3), bytes(108)), "different ranks"),
    "pickle": (pickle.dumps({"a": 1}), "pickle or ZIP"),
    "zip bomb": (zipped(), "pickle or ZIP"),
    "gzip": (gzip.compress(b"\0" * 5_000_000), "no safetensors file"),
    "newer NoRA": (
        with_metadata(DATA, **{"nora.format_version": "2"}), "newer version of nora-diffusion",
    ),
    "half a NoRA header": (
        with_metadata(DATA, **{"nora.format_version": "1", "nora.header": "{}"}), "not complete",
    ),
    "wrong checksum": (
        with_metadata(
            DATA,
            **{
                "nora.format_version": "1", "nora.checksum": "0" * 64,
                "nora.header": '{"kind": "lora", "components": {}, "base": "mini"}',
            },
        ),
        "does not match its checksum",
    ),
    "LoRA called NoRA": (
        with_metadata(
            DATA,
            **{
                "nora.format_version": "1", "nora.checksum": "0" * 64,
                "nora.header": '{"kind": "native", "components": {}, "base": "mini"}',
            },
        ),
        "belongs to no NoRA adapter",
    ),
    "no base": (header(pair(), DATA), "does not say which base model"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_and_nothing_is_left(studio, upload, tmp_path, kind):
    data, said = HOSTILE[kind]
    file = tmp_path / "a.safetensors"
    file.write_bytes(data)
    ((path, shown),) = upload(file)
    before = sorted(studio.folder.root.rglob("*"))
    with pytest.raises(UserError, match=said) as refused:
        studio.library.import_file("", path, "A", "", shown)
    assert "Traceback" not in str(refused.value) and len(str(refused.value)) < 400
    assert studio.library.all("") == []
    assert sorted(studio.folder.root.rglob("*")) == before


def test_a_million_tensors_are_not_read(studio, upload, tmp_path):
    one = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    names = b",".join(one % number for number in range(10**6))
    file = tmp_path / "a.safetensors"
    file.write_bytes(header(b"{" + names + b"}"))
    ((path, _),) = upload(file)
    with pytest.raises(UserError, match=r"its header has \d+ MB"):
        studio.library.import_file("", path, "A", "mini")
    few = {str(n): entry("U8", [0], 0, 0) for n in range(30_000)}
    file.write_bytes(header(few))
    ((path, _),) = upload(file)
    with pytest.raises(UserError, match="30,000 tensors; an adapter has at most 20,000"):
        studio.library.import_file("", path, "A", "mini")


def test_a_file_that_is_too_large_is_not_read(studio, upload, tmp_path):
    file = tmp_path / "a.safetensors"
    with file.open("wb") as sparse:
        sparse.truncate(2**30 + 1)
    path = studio.folder.part("uploads") / "a.safetensors"
    file.rename(path)
    with pytest.raises(UserError, match=r"1\.0 GB; at most 1 GB"):
        studio.library.import_file("", path, "A", "mini")


@pytest.mark.parametrize(
    "base", ["/etc/passwd", "../../secret", "subjects/0123456789abcdef", "C:\\model", "<script>"]
)
def test_a_file_cannot_send_the_app_to_other_files(studio, upload, tmp_path, base):
    """The base model that a file names is loaded later: only what is no path is taken."""
    (tmp_path / "secret").mkdir()
    fields = {"kind": "lora", "components": {}, "base": base, "family": "<b>", "trigger": "<i>"}
    entries = {"nora.format_version": "1", "nora.header": json.dumps(fields)}
    # As docs/formats.md has it, over the two tensors of ``pair``.
    shapes = {name: [one["dtype"], *one["shape"]] for name, one in pair().items()}
    text = json.dumps([entries, shapes], sort_keys=True).encode()
    entries["nora.checksum"] = hashlib.sha256(text + DATA).hexdigest()
    file = tmp_path / "a.safetensors"
    file.write_bytes(with_metadata(DATA, **entries))
    ((path, _),) = upload(file)
    with pytest.raises(UserError, match="not a base model that is known here; choose"):
        studio.library.import_file("", path, "A")
    adapter = studio.library.import_file("", path, "A", "mini")
    assert (adapter.base, adapter.family, adapter.trigger) == ("mini", None, "<i>")


def test_a_path_as_base_is_for_the_owner_of_the_machine_alone(studio, upload, tmp_path):
    save_file(lora_tensors(), tmp_path / "a.safetensors")
    ((path, _),) = upload(tmp_path / "a.safetensors")
    model = tmp_path / "model.safetensors"
    model.write_bytes(b"")
    assert studio.library.import_file("", path, "A", str(model)).base == str(model)
    with pytest.raises(UserError, match="not a base model that is known here"):
        studio.library.import_file("anna", path, "A", str(model))


def test_only_uploads_are_imported(studio, finished_run, finished_job):
    for path in (finished_run / NATIVE, studio.folder.of("runs", finished_job) / NATIVE):
        with pytest.raises(UserError, match="not uploaded"):
            studio.library.import_file("", path, "A")
