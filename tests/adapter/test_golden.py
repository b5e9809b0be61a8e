"""Files written by the first version of the format still load, to the same numbers.

The files in `golden/` were written once with `python -m tests.adapter.test_golden`; they are never
written again for the same format version.
"""

from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn

from nora_diffusion.adapter import NoraConfig, iter_nora_layers
from nora_diffusion.adapter.files import adapter_info, load_adapter, save_adapter
from nora_diffusion.adapter.lora import export_lora

GOLDEN = Path(__file__).parent / "golden"
COMPACT = GOLDEN / "v1-compact.safetensors"
LORA = GOLDEN / "v1-peft" / "adapter_model.safetensors"


def exact(*shape: int) -> torch.Tensor:
    """Numbers that every platform makes alike: multiples of 1/64."""
    count = torch.arange(torch.Size(shape).numel())
    return ((count * count * 37 + count * 11) % 101 - 50).reshape(shape) / 64


def model() -> nn.Module:
    layers = nn.Sequential(nn.Linear(12, 10), nn.Conv2d(3, 8, 3))
    for parameter in layers.parameters():
        parameter.data.copy_(exact(*parameter.shape))
    return layers


def write() -> None:
    trained = get_peft_model(
        model(), NoraConfig(r=6, inner_r=2, init="sigma", target_modules=["0", "1"])
    )
    for _, layer in iter_nora_layers(trained):
        for inner in (layer.nora_inner_A["default"], layer.nora_inner_B["default"]):
            inner.data.add_(exact(*inner.shape))
    save_adapter(trained, COMPACT, metadata={"base": "golden", "steps": 7})
    export_lora(COMPACT, LORA, "peft", base=model())


def test_a_compact_file_of_format_1_means_what_it_meant():
    info = adapter_info(COMPACT, base=model())
    assert (info["format_version"], info["base"], info["steps"]) == (1, "golden", 7)
    # The same weights have the same fingerprints, on every platform and in every version.
    assert info["fingerprints_ok"] is True
    from_compact, from_lora = model(), model()
    assert load_adapter(from_compact, COMPACT) == load_adapter(from_lora, LORA) == 2
    layers = dict(from_lora.named_modules())
    for name, layer in iter_nora_layers(from_compact):
        # The LoRA carries the outer factors of the day it was written.
        written = layers[name].get_delta_weight("default")
        assert written.norm() > 0.5
        assert (layer.get_delta_weight("default") - written).abs().max() <= 1e-5


if __name__ == "__main__":
    write()
