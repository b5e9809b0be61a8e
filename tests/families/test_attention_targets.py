"""`adapter.targets = ["attention"]` and `NoraConfig(target_modules="attention")` are one choice."""

import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists

from nora_diffusion.adapter import NoraConfig, attention_projections
from nora_diffusion.families.skeleton import SHIPPED, skeleton

BASES = {name: base for base, name in reversed(SHIPPED.items())} | {"mini": "mini"}


def named(model, endings) -> list[str]:
    """What PEFT adapts by these names."""
    config = NoraConfig(target_modules=list(endings))
    return [name for name, _ in model.named_modules() if check_target_module_exists(config, name)]


@pytest.mark.parametrize("name", BASES)
def test_attention_is_the_same_for_a_family_and_for_peft(name):
    family = skeleton(BASES[name], torch.float32)
    denoiser = family.components.denoiser
    found = attention_projections(denoiser)
    assert list(found) == named(denoiser, family.targets["attention"]) != []
    for encoder in family.components.text_encoders.values():
        by_name = named(encoder, family.text_targets)  # none in an encoder that is never adapted
        assert by_name in ([], list(attention_projections(encoder)))
