"""A base's safety checker: kept where there is one, and what it objects to comes out black."""

import warnings

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

from nora_diffusion import save_adapter
from nora_diffusion.config import UserError
from nora_diffusion.families import load_family
from nora_diffusion.families.safety import attach_safety_checker, screened
from nora_diffusion.sampling import sample_to_folder
from tests.tiny import adapt, tiny_pipeline

NEVER, ALWAYS = 2.0, -2.0
"""Cosines above which the checker objects."""


def checked_pipeline(threshold):
    """A tiny base with a checker of random weights."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = {**shape, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8))
    checker.concept_embeds_weights.data.fill_(threshold)
    pipe = tiny_pipeline("sd15")
    side = {"height": 32, "width": 32}
    pipe.register_modules(
        safety_checker=checker,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=side),
    )
    return pipe


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of two bases, of which one objects to everything and one to nothing."""
    folder = tmp_path_factory.mktemp("safety")
    for threshold in (NEVER, ALWAYS):
        checked_pipeline(threshold).save_pretrained(folder / str(threshold))
    return {threshold: folder / str(threshold) for threshold in (NEVER, ALWAYS)}


def load(folder):
    family = load_family(folder, dtype=torch.float32, device=torch.device("cpu"))
    assert attach_safety_checker(family)
    return family


def pictures():
    generator = np.random.default_rng(0)
    arrays = generator.integers(0, 256, (3, 40, 48, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in arrays]


def test_what_is_objected_to_is_black_and_said(bases):
    with pytest.warns(UserWarning, match="replaced 3 of 3 pictures by black"):
        drawn = screened(load(bases[ALWAYS]), pictures())
    assert [image.size for image in drawn] == [(48, 40)] * 3
    assert not any(np.asarray(image).any() for image in drawn)


def test_what_is_not_objected_to_stays_as_it_is(bases):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = screened(load(bases[NEVER]), pictures())
    for image, given in zip(drawn, pictures(), strict=True):
        assert (np.asarray(image) == np.asarray(given)).all()


def test_it_objects_to_what_the_checker_knows(bases):
    family, given = load(bases[NEVER]), pictures()
    pipe = family.components.pipeline
    checker = pipe.safety_checker
    pixels = pipe.feature_extractor(given, return_tensors="pt").pixel_values
    with torch.no_grad():
        seen = checker.visual_projection(checker.vision_model(pixels)[1])
        checker.concept_embeds[:] = seen[1]
        cosines = torch.cosine_similarity(seen, seen[1:2])
        checker.concept_embeds_weights.fill_((1 + float(cosines[[0, 2]].max())) / 2)
    with pytest.warns(UserWarning, match="1 of 3"):
        drawn = screened(family, given)
    assert [bool(np.asarray(image).any()) for image in drawn] == [True, False, True]


def test_sampling_asks_it_and_draws_as_before(bases, tmp_path):
    adapter = tiny_pipeline("sd15")
    adapt(adapter)
    file = save_adapter(adapter, tmp_path / "adapter.safetensors")
    drawn = {}
    for threshold, base in bases.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (path,) = sample_to_folder(
                file, ["a"], tmp_path / str(threshold), base=str(base), n=1, steps=2,
                device="cpu",
            )  # fmt: skip
        drawn[threshold] = np.asarray(Image.open(path).convert("RGB"))
        objected = any("1 of 1" in str(one.message) for one in caught)
        assert objected == (threshold == ALWAYS)
    assert drawn[NEVER].any() and not drawn[ALWAYS].any()


def test_training_and_bases_without_one_do_without(bases):
    cpu = torch.device("cpu")
    family = load_family(bases[ALWAYS], dtype=torch.float32, device=cpu)
    assert family.components.pipeline.safety_checker is None
    mini = load_family("mini", dtype=torch.float32, device=cpu)
    assert not attach_safety_checker(mini)
    assert all(np.asarray(image).any() for image in screened(mini, pictures()))


def test_one_that_cannot_be_loaded_is_not_left_out_in_silence(tmp_path):
    checked_pipeline(NEVER).save_pretrained(tmp_path)
    (tmp_path / "safety_checker" / "model.safetensors").unlink()
    family = load_family(tmp_path, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(UserError, match="safety checker cannot be loaded"):
        attach_safety_checker(family)
