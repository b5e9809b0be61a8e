"""One-file checkpoints load offline, to the same model; what cannot be loaded says why."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from nora_diffusion import load_pipeline
from nora_diffusion.config import UserError
from nora_diffusion.families import detect_family, load_family, single_file
from tests.families.ldm import ldm_checkpoint
from tests.tiny import predict, tiny_pipeline

CONFIGS = single_file.ASSETS / "configs"


@pytest.mark.parametrize("family", ["sd15", "sd2"])
def test_single_file_is_the_same_model(family, tmp_path):
    pipe = tiny_pipeline(family)
    pipe.save_pretrained(tmp_path / "configs")
    checkpoint = {name: t.contiguous() for name, t in ldm_checkpoint(pipe).items()}
    save_file(checkpoint, tmp_path / "model.safetensors")
    for weights in (tmp_path / "configs").rglob("*.safetensors"):
        weights.unlink()

    assert detect_family(tmp_path / "model.safetensors") == "sd"
    loaded = load_pipeline(
        tmp_path / "model.safetensors", config=tmp_path / "configs", prediction_type="v_prediction"
    )
    assert loaded.scheduler.config.prediction_type == "v_prediction"
    torch.testing.assert_close(predict(loaded), predict(pipe), rtol=0, atol=0)
    image = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    with torch.no_grad():
        same = [p.vae(image).sample for p in (loaded, pipe)]
    torch.testing.assert_close(*same, rtol=0, atol=0)


@pytest.mark.parametrize("marks", [(), ("v_pred",), ("v_pred", "ztsnr")])
def test_single_file_of_sdxl_is_the_same_model(marks, tmp_path):
    pipe = tiny_pipeline("sdxl")
    pipe.scheduler = EulerDiscreteScheduler.from_config(
        EulerDiscreteScheduler.load_config(CONFIGS / "sdxl" / "scheduler")
    )
    pipe.save_pretrained(tmp_path / "configs")
    checkpoint = {name: t.contiguous() for name, t in ldm_checkpoint(pipe).items()}
    file = tmp_path / "model.safetensors"
    save_file(checkpoint | {mark: torch.zeros(0) for mark in marks}, file)
    for weights in (tmp_path / "configs").rglob("*.safetensors"):
        weights.unlink()

    assert detect_family(file) == "sdxl"
    loaded = load_pipeline(file, config=tmp_path / "configs")
    torch.testing.assert_close(predict(loaded), predict(pipe), rtol=0, atol=0)
    family = load_family(
        file, config=tmp_path / "configs", dtype=torch.float32, device=torch.device("cpu")
    )
    assert (family.name, family.resolution_px) == ("sdxl", 16)
    assert family.prediction_type == ("v_prediction" if "v_pred" in marks else "epsilon")
    assert (family.alphas_cumprod[-1] < 1e-6) == ("ztsnr" in marks)


@pytest.mark.parametrize(
    ("name", "unet", "text"),
    [("sd15", 859_520_964, 123_060_480), ("sd21", 865_910_724, 340_387_840)],
)
def test_shipped_configs_have_the_published_sizes(name, unet, text):
    def size(model: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    with init_empty_weights():
        config = UNet2DConditionModel.load_config(CONFIGS / name / "unet")
        assert size(UNet2DConditionModel.from_config(config)) == unet
        config = AutoencoderKL.load_config(CONFIGS / name / "vae")
        assert size(AutoencoderKL.from_config(config)) == 83_653_863
        config = CLIPTextConfig.from_pretrained(CONFIGS / name / "text_encoder")
        assert size(CLIPTextModel(config)) == text


@pytest.mark.parametrize(("name", "padding"), [("sd15", 49407), ("sd21", 0)])
def test_shipped_tokenizer_gives_the_published_ids(name, padding):
    tokenizer = single_file.load_tokenizer(CONFIGS / name)
    ids = tokenizer("A photo of a cat", padding="max_length").input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407, *[padding] * 70]


class _Answering(torch.nn.Module):
    """A denoiser that answers its input times a share, plus what has nothing to do with it."""

    config = {"cross_attention_dim": 8}

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = torch.nn.Parameter(torch.tensor(share))

    def forward(self, noise, timestep, encoder_hidden_states, return_dict):
        other = torch.randn(noise.shape, generator=torch.Generator().manual_seed(7))
        return (self.share * noise + 0.2 * other,)


def test_prediction_type_is_read_off_the_weights():
    assert not single_file.predicts_velocity(_Answering(1.0))
    assert single_file.predicts_velocity(_Answering(0.05))
    assert single_file.predicts_velocity(_Answering(-0.3))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pixels"), [("sd15", 512), ("sd21", 768)])
def test_a_full_size_file_loads_with_nothing_but_what_is_shipped(name, pixels, tmp_path):
    folder = CONFIGS / name
    parts = {
        "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")),
        "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")),
        "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder")),
    }
    pipe = SimpleNamespace(**{part: model.half() for part, model in parts.items()})
    save_file(ldm_checkpoint(pipe), tmp_path / "model.safetensors")
    kinds = {"prediction_type": "v_prediction"} if name == "sd21" else {}
    family = load_family(
        tmp_path / "model.safetensors", dtype=torch.float16, device=torch.device("cpu"), **kinds
    )
    assert family.resolution_px == pixels
    for part, model in parts.items():
        loaded = dict(getattr(family.components.pipeline, part).named_parameters())
        assert loaded.keys() == dict(model.named_parameters()).keys()
        for parameter, value in model.named_parameters():
            assert torch.equal(loaded[parameter].half(), value)


def _write(path: Path, shapes: dict[str, list[int]]) -> Path:
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    return path


UNET = "model.diffusion_model.input_blocks.0.0.weight"
REFINER = "conditioner.embedders.0.model.token_embedding.weight"
TEXT = "cond_stage_model.model.token_embedding.weight"


def test_other_files_are_refused_with_the_reason(tmp_path):
    path = _write(tmp_path / "a.safetensors", {UNET: [8, 9, 3, 3], TEXT: [4, 4]})
    with pytest.raises(UserError, match="takes 9 channels.*text-to-image"):
        load_pipeline(path)
    path = _write(tmp_path / "b.safetensors", {"lora_unet_a.lora_up.weight": [2, 2]})
    with pytest.raises(UserError, match="not a complete Stable Diffusion"):
        load_pipeline(path)
    (tmp_path / "c.safetensors").write_bytes(b"\x10\x00")
    path = _write(tmp_path / "refiner.safetensors", {UNET: [8, 4, 3, 3], REFINER: [4, 4]})
    with pytest.raises(UserError, match="the refiner of XL is none"):
        load_pipeline(path)
    with pytest.raises(UserError, match="not a readable .safetensors"):
        load_pipeline(tmp_path / "c.safetensors")
    (tmp_path / "d.ckpt").write_bytes(b"PK")
    with pytest.raises(UserError, match="only .safetensors files"):
        load_pipeline(tmp_path / "d.ckpt")


def test_bases_that_are_none_are_refused_with_the_reason(tmp_path):
    with pytest.raises(UserError, match="no model_index.json"):
        load_pipeline(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        load_pipeline(tmp_path / "missing" / "model.safetensors")
    index = {"_class_name": "KandinskyPipeline", "_diffusers_version": "0.40.0"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="a KandinskyPipeline; supported pipelines"):
        load_pipeline(tmp_path)
