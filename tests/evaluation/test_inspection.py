"""`nora inspect` finds structure that was planted: which direction moved, and what two share."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from PIL import Image

from nora_diffusion.adapter import NoraConfig, iter_nora_layers
from nora_diffusion.adapter.files import load_adapter, save_adapter
from nora_diffusion.adapter.lora import export_lora
from nora_diffusion.cli import USER_ERROR, main
from nora_diffusion.evaluation.inspection import block_of, inspect, projection_of, shortened
from nora_diffusion.evaluation.inspection_command import as_json, summary
from nora_diffusion.evaluation.inspection_pictures import directions_figure, energy_figure
from nora_diffusion.evaluation.interference import measure_interference
from nora_diffusion.evaluation.overlap import compare
from nora_diffusion.families import load_pipeline
from tests.tiny import ATTENTION, tiny_pipeline

R, K = 8, 4


@dataclass(frozen=True)
class Plant:
    """Entries of one module's core to set: output index, input index -> value."""

    module: str
    entries: dict[tuple[int, int], float]


def planted(pipe, path: Path, *plants: Plant, **fields) -> Path:
    """A native file in which these entries of the cores moved, and nothing else."""
    config = NoraConfig(**{"r": R, "inner_r": K, "target_modules": ATTENTION, **fields})
    pipe.unet.add_adapter(config, "planted")
    layers = dict(iter_nora_layers(pipe.unet))
    with torch.no_grad():
        for plant in plants:
            layer = layers[plant.module]
            P, Q = layer.nora_inner_B["planted"], layer.nora_inner_A["planted"]
            P.zero_()
            Q.zero_()
            for place, ((row, column), value) in enumerate(plant.entries.items()):
                P[row, place], Q[place, column] = value, 1.0
    save_adapter(pipe, path, "planted", metadata={"base": "tiny", "class_name": "toy"})
    pipe.unet.delete_adapters("planted")
    return path


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("sd15")


@pytest.fixture(scope="module")
def modules(pipe) -> list[str]:
    """Names of self-attention's value projections: their input is the picture."""
    return [name for name, _ in pipe.unet.named_modules() if name.endswith("attn1.to_v")]


def test_one_moved_direction_is_the_top_direction(pipe, modules, tmp_path):
    file = planted(pipe, tmp_path / "a.safetensors", Plant(modules[1], {(3, 5): 0.7}))
    found = inspect(file)
    top = found.top(2)
    assert {(t["module"], t["side"], t["index"]) for t in top} == {
        (f"unet.{modules[1]}", "output", 3),
        (f"unet.{modules[1]}", "input", 5),
    }
    assert [t["share"] for t in top] == pytest.approx([1, 1])
    assert found.by("projection")["v"] == pytest.approx(0.49) == found.energy
    moved = {module.name: module for module in found.modules}[f"unet.{modules[1]}"]
    assert moved.effective_rank == pytest.approx(1)
    assert found.by("block")[moved.block] == pytest.approx(0.49)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("fields", [{}, {"init": "sigma"}, {"basis": "random", "scaling": 0.5}])
def test_energies_are_those_of_the_updates(pipe, tmp_path, fields, dtype):
    config = NoraConfig(r=R, inner_r=K, target_modules=ATTENTION, **fields)
    pipe.unet.add_adapter(config, "moved")
    draw = torch.Generator().manual_seed(0)
    try:
        layers = dict(iter_nora_layers(pipe.unet))
        deltas, weights = {}, {}
        with torch.no_grad():
            for name, layer in layers.items():
                for pair in (layer.nora_inner_A["moved"], layer.nora_inner_B["moved"]):
                    pair.add_(0.3 * torch.randn(pair.shape, generator=draw))
                deltas[f"unet.{name}"] = layer.get_delta_weight("moved").norm()
                weights[f"unet.{name}"] = layer.base_matrix().norm()
        file = save_adapter(pipe, tmp_path / "m.safetensors", "moved", dtype=dtype)
    finally:
        pipe.unet.delete_adapters("moved")
    for base in (None, pipe):
        found = inspect(file, base)
        assert len(found.modules) == len(deltas)
        for module in found.modules:
            size = float(deltas[module.name])
            assert module.energy**0.5 == pytest.approx(size, rel=2e-3), module.name
            if base is not None:
                relative = size / float(weights[module.name])
                assert module.relative_size == pytest.approx(relative, rel=2e-3)
        assert sum(found.by("block").values()) == pytest.approx(found.energy)


def test_several_equal_directions_have_their_number_as_effective_rank(pipe, modules, tmp_path):
    plant = Plant(modules[0], {(0, 0): 0.5, (1, 1): -0.5, (2, 2): 0.5})
    found = inspect(planted(pipe, tmp_path / "a.safetensors", plant))
    ranks = {module.name: module.effective_rank for module in found.modules}
    assert ranks.pop(f"unet.{modules[0]}") == pytest.approx(3)
    assert set(ranks.values()) == {0.0}


@pytest.mark.parametrize(
    ("entries", "cosine", "output", "input", "shared"),
    [
        ({(1, 2): 0.5}, 1.0, 0.0, 0.0, 1.0),
        ({(1, 2): -0.5}, -1.0, 0.0, 0.0, 1.0),
        ({(1, 4): 0.5}, 0.0, 0.0, 90.0, 0.0),
        ({(4, 2): 0.5}, 0.0, 90.0, 0.0, 0.0),
        ({(1, 2): 0.3, (5, 6): 0.4}, 0.6, 0.0, 0.0, 0.36),
    ],
)
@pytest.mark.parametrize("other_r", [R, R + 4])
def test_planted_overlaps_are_found(
    pipe, modules, tmp_path, entries, cosine, output, input, shared, other_r
):
    """In one basis, and in two of other ranks through the outer factors."""
    first = planted(pipe, tmp_path / "a.safetensors", Plant(modules[0], {(1, 2): 0.5}))
    plant = Plant(modules[0], entries)
    # The first singular directions are the same at a higher rank, where they are W's own.
    second = planted(pipe, tmp_path / "b.safetensors", plant, r=other_r, init="orthogonal")
    overlap = compare(inspect(first, pipe), inspect(second, pipe))
    (pair,) = (pair for pair in overlap.pairs if pair.name == f"unet.{modules[0]}")
    near = {"abs": 1e-3 if other_r == R else 0.05}
    assert pair.cosine == pytest.approx(cosine, **near)
    assert pair.shared == pytest.approx(shared, **near)
    if other_r == R:
        assert pair.output_angles[0] == pytest.approx(output, abs=0.1)
        assert pair.input_angles[0] == pytest.approx(input, abs=0.1)
    assert overlap.cosine == pytest.approx(cosine, **near)


def test_other_bases_are_compared_through_exact_factors(pipe, tmp_path):
    """Two bases with nothing in common, against the cosine of the full updates."""
    files, deltas = [], []
    for seed, fields in enumerate(({"basis": "random", "seed": 3}, {"basis": "weight"})):
        config = NoraConfig(r=R, inner_r=K, target_modules=ATTENTION, **fields)
        pipe.unet.add_adapter(config, "moved")
        draw = torch.Generator().manual_seed(seed)
        layers = dict(iter_nora_layers(pipe.unet))
        with torch.no_grad():
            for layer in layers.values():
                layer.nora_inner_B["moved"].normal_(generator=draw)
        deltas.append({n: layer.get_delta_weight("moved") for n, layer in layers.items()})
        name = tmp_path / f"{seed}.safetensors"
        files.append(save_adapter(pipe, name, "moved", portable=True))
        pipe.unet.delete_adapters("moved")
    overlap = compare(inspect(files[0]), inspect(files[1]))
    for pair in overlap.pairs:
        first, second = (d[pair.name.removeprefix("unet.")].flatten().double() for d in deltas)
        expected = float(first @ second / first.norm() / second.norm())
        assert pair.cosine == pytest.approx(expected, abs=1e-4)
        assert len(pair.output_angles) == K


def test_the_prediction_orders_blends_as_the_denoiser_does(tmp_path):
    """On mini: from a direction undone over none in common to the same one twice."""
    mini = load_pipeline("mini")
    names = [name for name, _ in mini.unet.named_modules() if name.endswith("to_out.0")]
    own = {(0, 0): 0.5, (1, 1): 0.5}
    own = [Plant(name, own) for name in names]
    first = planted(mini, tmp_path / "a.safetensors", *own)
    others = {
        "undone": {(0, 0): -0.5, (1, 1): -0.5},
        "half undone": {(0, 0): -0.5, (1, 6): 0.5},
        "other directions": {(4, 5): 0.5, (5, 4): 0.5},
        "half the same": {(0, 0): 0.5, (6, 1): 0.5},
        "the same": {(0, 0): 0.5, (1, 1): 0.5},
    }
    predicted, measured = [], []
    for name, entries in others.items():
        plants = [Plant(module, entries) for module in names]
        second = planted(mini, tmp_path / f"{name}.safetensors", *plants)
        predicted.append(compare(inspect(first), inspect(second)).interference[0])
        measured.append(measure_interference(first, second, "mini", samples=4)[0])
    assert predicted == pytest.approx([-1, -0.5, 0, 0.5, 1], abs=1e-3)
    assert measured == sorted(measured)
    assert measured[0] == pytest.approx(-1, abs=1e-3)
    assert abs(measured[2]) < 0.2 and measured[4] > 0.7


def test_a_lora_file_and_a_file_that_is_not_there_are_refused(pipe, modules, tmp_path, capsys):
    file = planted(pipe, tmp_path / "a.safetensors", Plant(modules[0], {(0, 0): 1.0}))
    lora = export_lora(file, tmp_path / "lora.safetensors", base=pipe)
    assert main(["inspect", str(lora)]) == USER_ERROR
    assert "give the native file" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "nothing")]) == USER_ERROR
    assert "no such file" in capsys.readouterr().err


def test_sigma_without_singular_values_asks_for_the_base(pipe, modules, tmp_path, monkeypatch):
    plant = Plant(modules[0], {(0, 0): 1.0})
    file = planted(pipe, tmp_path / "a.safetensors", plant, init="sigma")
    monkeypatch.setenv("NORA_CACHE_DIR", str(tmp_path / "empty"))
    from nora_diffusion.config import UserError

    with pytest.raises(UserError, match="give --base"):
        inspect(file)
    assert inspect(file, pipe).energy > 0


def test_the_command_writes_readable_files(pipe, modules, tmp_path, capsys):
    file = planted(pipe, tmp_path / "a.safetensors", Plant(modules[1], {(3, 5): 0.7}))
    out = tmp_path / "out"
    assert main(["inspect", str(file), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert f"{shortened('unet.' + modules[1])}" in told and "100.0 %" in told
    numbers = json.loads((out / "inspection.json").read_text())
    (most,) = (m for m in numbers["modules"] if m["energy"])
    assert np.argmax(most["energy_by_output_direction"]) == 3
    assert np.argmax(most["energy_by_input_direction"]) == 5
    for name in ("energy.png", "directions.png"):
        with Image.open(out / name) as picture:
            assert picture.width > 1000

    assert main(["inspect", str(file), str(file), "--out", str(out)]) == 0
    assert "cosine of the updates: +1.000" in capsys.readouterr().out
    assert json.loads((out / "overlap.json").read_text())["shared"] == pytest.approx(1)
    assert (out / "overlap.png").is_file()


@pytest.fixture(scope="module")
def of_two_kinds(tmp_path_factory) -> Path:
    """Singular directions in the UNet, random ones in the text encoder; all entries moved."""
    pipe = tiny_pipeline("sd15")
    pipe.unet.add_adapter(NoraConfig(r=R, inner_r=K, target_modules=ATTENTION), "kinds")
    text = NoraConfig(r=2 * R, inner_r=K, target_modules=["q_proj", "v_proj"], basis="random")
    pipe.text_encoder.add_adapter(text, "kinds")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for model in (pipe.unet, pipe.text_encoder):
            for _, layer in iter_nora_layers(model):
                layer.nora_inner_B["kinds"].normal_(generator=draw)
        layer.nora_inner_B["kinds"][3] += 2  # one of the text encoder's is among the top
    return save_adapter(pipe, tmp_path_factory.mktemp("kinds") / "adapter.safetensors", "kinds")


def test_directions_of_two_kinds_are_never_summed_and_say_what_they_are(of_two_kinds):
    found = inspect(of_two_kinds)
    kinds = found.kinds()
    assert set(kinds) == {"weight", "random"}
    assert all(m.name.startswith("text_encoder.") for m in kinds["random"])
    assert all(m.name.startswith("unet.") for m in kinds["weight"])
    labels = {"weight": "singular index, 0 the weight's", "random": "random direction number"}

    figure = energy_figure(pyplot, found)
    panels = dict(zip(kinds, figure.axes[2:], strict=True))
    for kind, modules in kinds.items():
        assert panels[kind].get_xlabel().startswith(labels[kind])
        whole = 100 * sum(module.energy for module in modules) / found.energy
        for line in panels[kind].lines:
            assert line.get_ydata().sum() == pytest.approx(whole)
    assert panels["random"].lines[0].get_linestyle() == "None", "a line tells of an order"
    pyplot.close(figure)

    figure = directions_figure(pyplot, found, 1.0)
    maps = [axis for axis in figure.axes if axis.images and axis.get_title()]
    for axis, (kind, modules) in zip(maps[::2], kinds.items(), strict=True):
        assert axis.get_xlabel().startswith(labels[kind])
        assert [text.get_text() for text in axis.get_yticklabels()] == [
            shortened(module.name) for module in modules
        ]
        assert axis.images[0].get_array().shape[1] == max(len(m.core) for m in modules)
    pyplot.close(figure)


def test_the_text_of_an_inspection_names_the_kind_of_each_direction(of_two_kinds):
    found = inspect(of_two_kinds)
    told = list(summary(found))
    begin = next(place for place, line in enumerate(told) if line.startswith("top directions"))
    rows = told[begin + 1 : begin + 11]
    for row, entry in zip(rows, found.top(10), strict=True):
        assert ("random" in row, "singular" in row) == (
            entry["module"].startswith("text_encoder."), entry["module"].startswith("unet.")
        )  # fmt: skip
    assert {"random", "weight"} == {entry["basis"] for entry in found.top(10)}
    assert "random direction number" in told[begin] and "singular index" in told[begin]
    numbers = as_json(found)
    assert {(m["name"].partition(".")[0], m["basis"]) for m in numbers["modules"]} == {
        ("unet", "weight"),
        ("text_encoder", "random"),
    }


@pytest.mark.parametrize(
    ("name", "block", "projection", "short"),
    [
        (
            "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
            "down0", "q", "down0.a1.t0.attn1.q",
        ),
        (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
            "mid", "out", "mid.a0.t0.attn2.out",
        ),
        ("unet.up_blocks.1.resnets.0.conv1", "up1", "conv", "up1.r0.conv1"),
        ("unet.up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2", "up1", "ff",
         "up1.a0.t0.ff.net.2"),
        ("model.model.layers.12.self_attn.o_proj", "l12", "out", "l12.attn.o"),
        ("model.model.layers.12.mlp.down_proj", "l12", "ff", "l12.mlp.down"),
        ("model.transformer.h.3.attn.c_attn", "h.3", "qkv", "h.3.attn.c_attn"),
        ("transformer.transformer_blocks.7.attn.add_k_proj", "t7", "k", "t7.attn.add_k"),
        ("transformer.single_transformer_blocks.9.attn.to_v", "single9", "v", "single9.attn.v"),
        ("text_encoder.text_model.encoder.layers.3.self_attn.q_proj", "te.l3", "q",
         "te.l3.attn.q"),
        ("text_encoder.encoder.layers.3.mlp.fc1", "te.l3", "ff", "te.l3.mlp.fc1"),
    ],
)  # fmt: skip
def test_names_of_blocks_and_projections(name, block, projection, short):
    assert (block_of(name), projection_of(name), shortened(name)) == (block, projection, short)


def test_an_inspected_file_still_loads(pipe, modules, tmp_path):
    """Looking changes neither file nor base."""
    file = planted(pipe, tmp_path / "a.safetensors", Plant(modules[0], {(0, 0): 1.0}))
    before = file.read_bytes()
    inspect(file, pipe)
    assert file.read_bytes() == before
    assert not any(layer.nora_outer for _, layer in iter_nora_layers(pipe.unet))
    assert load_adapter(pipe, file, "again") > 0
    pipe.unet.delete_adapters("again")
