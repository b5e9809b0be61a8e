"""Files with a transformer alone load to the same model, and say why where they cannot."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file

from nora_diffusion.config import UserError
from nora_diffusion.families import detect_family, load_family
from nora_diffusion.families.single_file import config_name
from nora_diffusion.families.skeleton import config_folder
from tests.families.original import original_state
from tests.families.rows import CPU, ROWS, predict
from tests.tiny import distance

NAMES = ["sd3", "sd35_medium", "flux2_klein_base_4b", "z_image"]
ROW = {row.config: row for row in ROWS}
PREFIX = "model.diffusion_model."


@pytest.mark.parametrize("beside", [True, False], ids=["in-the-folder", "parts-named"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_transformer_file_is_the_same_model(name, beside, tmp_path):
    row = ROW[name]
    pipe = row.build()
    pipe.save_pretrained(tmp_path / "base")
    for weights in (tmp_path / "base" / "transformer").glob("*.safetensors"):
        weights.unlink()
    file = (tmp_path / "base" if beside else tmp_path) / "model.safetensors"
    prefix = "" if name.startswith("flux2") else PREFIX
    save_file({prefix + k: v for k, v in original_state(pipe.transformer).items()}, file)

    assert (detect_family(file), config_name(file)) == (row.family, name)
    parts = {} if beside else {"parts": tmp_path / "base"}
    family = load_family(file, dtype=torch.float32, device=CPU, **parts)
    assert family.components.base == str(file)
    assert distance(predict(row, family), predict(row, row.load(pipe))) <= 1e-6
    half = load_family(file, dtype=torch.bfloat16, device=CPU, **parts)
    assert half.components.denoiser.dtype == torch.bfloat16


def header(path, shapes):
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    return path


FLUX = {"double_blocks.0.img_attn.qkv.weight": [6, 2], "vector_in.in_layer.weight": [2, 2]}
SD3 = {f"joint_blocks.{n}.x_block.attn.qkv.weight": [6, 2] for n in range(24)}
SD3 |= {"x_embedder.proj.weight": [2, 16, 2, 2]}


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("flux_schnell", FLUX | {"img_in.weight": [2, 64]}),
        ("flux_dev", FLUX | {"img_in.weight": [2, 64], "guidance_in.in_layer.weight": [2, 2]}),
        ("sd3", SD3),
        ("sd35_medium", SD3 | {"joint_blocks.0.x_block.attn2.qkv.weight": [6, 2]}),
        ("sd35_large", SD3 | {"joint_blocks.37.x_block.attn.qkv.weight": [6, 2]}),
    ],
)
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_the_file_tells_which_model_it_is_of(name, shapes, prefix, tmp_path):
    path = header(tmp_path / "a.safetensors", {prefix + k: v for k, v in shapes.items()})
    assert config_name(path) == name == config_folder(path).name
    assert detect_family(path) == name.split("_")[0].replace("sd35", "sd3")


def test_what_is_not_read_is_refused_with_the_reason(tmp_path):
    fill = header(tmp_path / "fill.safetensors", FLUX | {"img_in.weight": [2, 384]})
    with pytest.raises(UserError, match="takes 384 channels instead of 64.*text-to-image"):
        config_name(fill)
    scaled = {"img_in.weight": [2, 64], "double_blocks.0.img_attn.qkv.scale_weight": []}
    with pytest.raises(UserError, match="scales of their own.*16-bit"):
        config_name(header(tmp_path / "scaled.safetensors", FLUX | scaled))
    alone = header(tmp_path / "alone.safetensors", FLUX | {"img_in.weight": [2, 64]})
    with pytest.raises(UserError, match="does not fit the sizes in"):
        load_family(alone, dtype=torch.float32, device=CPU)


def test_parts_that_are_not_to_be_had_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pipe = ROW["sd3"].build()
    pipe.transformer.save_pretrained(tmp_path / "own" / "transformer")
    save_file(original_state(pipe.transformer), tmp_path / "sd3.safetensors")
    with pytest.raises(
        UserError, match="read for its transformer alone.*into the diffusers folder"
    ):
        load_family(
            tmp_path / "sd3.safetensors", dtype=torch.float32, device=CPU, parts=tmp_path / "own"
        )


@pytest.mark.slow
def test_a_flux_file_of_real_width_is_the_same_transformer(tmp_path):
    """diffusers' converter has the width of Flux.1 written into it; here are two of its blocks."""
    pipe = ROW["flux_dev"].build()
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            num_layers=1, num_single_layers=1, guidance_embeds=True, joint_attention_dim=32,
            pooled_projection_dim=32,
        )  # fmt: skip
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            count = parameter.numel()
            parameter.copy_((torch.arange(count) % 251 / 2510 - 0.05).view(parameter.shape))
    pipe.transformer = model
    pipe.save_pretrained(tmp_path)
    for weights in (tmp_path / "transformer").glob("*.safetensors"):
        weights.unlink()
    file = tmp_path / "flux.safetensors"
    save_file({PREFIX + k: v for k, v in original_state(model).items()}, file)
    family = load_family(file, dtype=torch.bfloat16, device=CPU)
    assert (family.name, family.guided) == ("flux", True)
    loaded = family.components.denoiser.state_dict()
    assert loaded.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name
