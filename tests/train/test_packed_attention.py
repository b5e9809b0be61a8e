"""`nn.MultiheadAttention` taken apart: same function, all projections adapted, packed again."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from nora_diffusion.adapter import NoraConfig
from nora_diffusion.train.clip_base import wrap_open_clip
from nora_diffusion.train.packed_attention import SplitAttention, join_attention, split_attention

WIDTH, HEADS, LENGTH = 32, 4, 5


class Block(nn.Module):
    """OpenCLIP's residual attention block."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, 8, 8)
        self.resblocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        for block in self.resblocks:
            x = block(x)
        return x.mean(1)


class OpenClipShaped(nn.Module):
    """`visual`, `transformer` and `logit_scale`, as OpenCLIP names them."""

    def __init__(self):
        super().__init__()
        self.visual = Tower()
        self.token_embedding = nn.Embedding(50, WIDTH)
        self.transformer = nn.ModuleList([Block(), Block()])
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)
        self.register_buffer("attn_mask", mask, persistent=False)

    def encode_image(self, pixels):
        return self.visual(pixels)

    def encode_text(self, ids):
        x = self.token_embedding(ids)
        for block in self.transformer:
            x = block(x, self.attn_mask)
        return x[:, -1]


@pytest.fixture
def model() -> OpenClipShaped:
    torch.manual_seed(0)
    made = OpenClipShaped().eval().requires_grad_(False)
    for block in (*made.visual.resblocks, *made.transformer):
        nn.init.normal_(block.attn.in_proj_bias)
        nn.init.normal_(block.attn.out_proj.bias)
    return made


PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
IDS = torch.arange(2 * LENGTH).view(2, LENGTH)


@torch.no_grad()
def outputs(model):
    return torch.cat([model.encode_image(PIXELS), model.encode_text(IDS)])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masks", ["none", "causal", "boolean", "padding", "per_head"])
def test_it_computes_what_torch_computes(batch_first, masks):
    torch.manual_seed(0)
    packed = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first).eval()
    nn.init.normal_(packed.in_proj_bias)
    x = torch.randn(2, LENGTH, WIDTH) if batch_first else torch.randn(LENGTH, 2, WIDTH)
    causal = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)
    padding = torch.zeros(2, LENGTH, dtype=torch.bool)
    padding[1, 3:] = True
    given = {
        "none": {},
        "causal": {"attn_mask": causal},
        "boolean": {"attn_mask": causal.isinf()},
        "padding": {"key_padding_mask": padding},
        "per_head": {"attn_mask": torch.randn(2 * HEADS, LENGTH, LENGTH)},
    }[masks]
    expected = packed(x, x, x, need_weights=False, **given)[0]
    got = SplitAttention(packed)(x, x, x, need_weights=False, **given)[0]
    assert torch.allclose(got, expected, atol=1e-5)


def test_taking_apart_and_packing_again_gives_every_bit_back(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = outputs(model)
    assert split_attention(model) == 4
    assert torch.allclose(outputs(model), expected, atol=1e-5)
    assert not any("in_proj" in name for name in model.state_dict())
    assert join_attention(model) == 4
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("kind", ["nora", "lora"])
def test_all_four_projections_are_adapted_and_the_merged_model_is_packed_again(model, kind):
    wrapped = wrap_open_clip(model, None, None)
    targets = wrapped.targets(("vision", "language"))
    assert len(targets) == 4 * 4
    assert len(wrapped.targets(("vision",))) == 2 * 4
    expected = outputs(model)
    config = (
        NoraConfig(r=8, inner_r=4, target_modules=targets)
        if kind == "nora"
        else LoraConfig(r=4, target_modules=targets)
    )
    adapted = get_peft_model(model, config)
    assert torch.allclose(outputs(model), expected, atol=1e-5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
                assert ".attn." in name
    with_adapter = outputs(model)
    assert (with_adapter - expected).abs().max() > 1e-3
    with pytest.raises(ValueError, match="merge or unload"):
        join_attention(model)
    merged = adapted.merge_and_unload()
    assert join_attention(merged) == 4
    assert torch.allclose(outputs(merged), with_adapter, atol=1e-4)
    changed = merged.visual.resblocks[0].attn.in_proj_weight
    assert changed.shape == (3 * WIDTH, WIDTH)
    fresh = OpenClipShaped().eval()
    fresh.load_state_dict(merged.state_dict())
    assert torch.allclose(outputs(fresh), with_adapter, atol=1e-4)


def test_gradients_reach_query_key_and_value(model):
    wrapped = wrap_open_clip(model, None, None)
    adapted = get_peft_model(
        model, NoraConfig(r=8, inner_r=4, target_modules=wrapped.targets(("vision",)))
    )
    wrapped.embed_images(PIXELS).sum().backward()
    reached = {n.split(".attn.")[1].split(".")[0] for n, p in adapted.named_parameters()
               if p.grad is not None and p.grad.abs().sum() > 0}  # fmt: skip
    assert reached == {"q_proj", "k_proj", "v_proj", "out_proj"}


def test_what_cannot_be_taken_apart_is_refused():
    with pytest.raises(ValueError, match="other widths"):
        SplitAttention(nn.MultiheadAttention(WIDTH, HEADS, kdim=16, vdim=16))
    with pytest.raises(ValueError, match="need_weights"):
        SplitAttention(nn.MultiheadAttention(WIDTH, HEADS))(*[torch.zeros(1, 2, WIDTH)] * 3)
