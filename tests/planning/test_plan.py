"""`nora plan`: what it says is what the real layers, files and steps take."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.mapping import inject_adapter_in_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    CLIPConfig,
    DeepseekV3Config,
    GPT2Config,
    LlamaConfig,
    T5Config,
    ViTConfig,
    Wav2Vec2Config,
)

from nora_diffusion.adapter import factorise
from nora_diffusion.adapter.factors import factorise_flops
from nora_diffusion.adapter.header import CHECKSUM_KEY, size_of, write
from nora_diffusion.cli import USER_ERROR, main
from nora_diffusion.planning import steps
from nora_diffusion.planning.methods import Method, adapted, count
from nora_diffusion.planning.plan import Request, make_plan
from nora_diffusion.planning.steps import Inputs, StepBytes, arguments_of, inputs_of, run_step
from nora_diffusion.targets import SHAPES, Choice, choices_of, find_targets

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "plan.md"
TINY = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
}
PICTURES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5,
            "num_attention_heads": 4, "image_size": 16, "patch_size": 4}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**TINY, num_key_value_heads=2, architectures=["LlamaForCausalLM"]),
    "gpt2": GPT2Config(
        vocab_size=60, n_embd=32, n_layer=6, n_head=4, attn_pdrop=0.0, embd_pdrop=0.0,
        resid_pdrop=0.0, architectures=["GPT2LMHeadModel"],
    ),
    "moe": DeepseekV3Config(
        **TINY, num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=8,
        num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1,
        first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8, architectures=["DeepseekV3ForCausalLM"],
    ),
    "bert": BertConfig(
        **TINY, attention_probs_dropout_prob=0.0, architectures=["BertForTokenClassification"]
    ),
    "t5": T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=5, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, architectures=["T5ForConditionalGeneration"],
    ),
    "vit": ViTConfig(**PICTURES, architectures=["ViTForImageClassification"]),
    "clip": CLIPConfig(
        text_config={**TINY, "max_position_embeddings": 10}, vision_config=PICTURES,
        architectures=["CLIPModel"],
    ),
    "wav2vec2": Wav2Vec2Config(
        **TINY, conv_dim=(8,), conv_stride=(5,), conv_kernel=(10,), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, architectures=["Wav2Vec2Model"],
    ),
}  # fmt: skip
ASKED = Request(r=8, inner_r=2, lora_r=4, dtype="fp32", tokens=12)


@pytest.fixture
def folder(tmp_path):
    """Saves a config of `CONFIGS` and returns its folder's name."""

    def save(name: str) -> str:
        CONFIGS[name].save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("plan_benchmark", ROOT / "benchmarks" / "plan.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("source", ["mini", "llama", "gpt2"])
def test_the_plan_is_what_real_layers_files_and_steps_take(benchmark, folder, source):
    source = source if source == "mini" else folder(source)
    found = benchmark.compare(source, ASKED)["methods"]
    exact = ("trained", "outer_bytes", "optimizer_bytes")
    for name, rows in found.items():
        for key, row in rows.items():
            if key in exact or (name == "LoRA" and key.startswith(("file", "lora"))):
                assert row["plan"] == row["measured"], (name, key)
            elif key.startswith(("file", "lora")):  # the metadata of what was really written
                assert 0 <= row["measured"] - row["plan"] < 3000, (name, key)
            elif name != "LoRA-XS":  # which PEFT computes by other products
                assert row["plan"] == pytest.approx(row["measured"], rel=0.05), (name, key)


@pytest.mark.parametrize("method", [Method("LoRA", 4), Method("LoRA-XS", 4), Method("NoRA", 8, 2)])
@pytest.mark.parametrize("name", ["llama", "moe"])
def test_a_few_blocks_tell_what_all_of_them_keep(folder, name, method):
    (choice,) = choices_of(folder(name), "attention", torch.bfloat16)
    choice.model.requires_grad_(False)
    inputs = inputs_of(choice, 2, 16, None)
    assert isinstance(inputs, Inputs)
    layers = [*choice.model.model.layers]
    with adapted(choice, find_targets(choice, 8, 2), method):
        few = run_step(choice.model, inputs)
        assert few == steps._run(choice.model, inputs)
    assert [*choice.model.model.layers] == layers


class Toy(nn.Module):
    """An input that only an adapter can want, through one frozen layer."""

    def __init__(self):
        super().__init__()
        self.only = nn.Linear(48, 32)

    def forward(self, x):
        return self.only(x * 2).sum()


@pytest.mark.parametrize(
    ("method", "numbers"),
    # Of 10 rows: LoRA the input and its own features; the others the features.
    [
        (Method("LoRA", 4), 10 * (48 + 4)),
        (Method("LoRA-XS", 6), 10 * 6),
        (Method("NoRA", 8, 2), 10 * 8),
    ],
)
def test_what_an_adapter_keeps_of_a_layer(method, numbers):
    with torch.device("meta"):
        model, x = Toy().requires_grad_(False), torch.empty(10, 48)
    choice = Choice("toy", model, ["only"])
    with adapted(choice, find_targets(choice, 8, 2), method):
        step = run_step(model, Inputs(lambda: model(x), [x], ""))
    assert isinstance(step, StepBytes)
    assert step.kept == 4 * (numbers + 1)  # and the loss


def test_the_size_of_a_file_is_told_before_it_is_written(tmp_path):
    tensors = {
        "b.wide": torch.zeros(3, 5), "a.half": torch.zeros(7, dtype=torch.float16),
        "c": torch.zeros(2, 2), "ä": torch.zeros(()),
    }  # fmt: skip
    path = write(tmp_path / "x.safetensors", tensors, {"nora.header": "{}"})
    metadata = {"nora.header": "{}", CHECKSUM_KEY: "0" * 64}
    assert path.stat().st_size == size_of({k: t.to("meta") for k, t in tensors.items()}, metadata)


@pytest.mark.parametrize("shape", [(1536, 512), (512, 2048), (1400, 1300)])
def test_the_operations_of_a_factorisation_are_those_it_does(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        factorise(weight, 16, use_cache=False)
    assert factorise_flops(*shape, 16) == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_fused_experts_are_named_as_not_adapted(folder, capsys):
    source = folder("moe")
    assert main(["plan", source, "--targets", "all-linear", "--r", "8"]) == 0
    out = capsys.readouterr().out
    numbers = 6 * 8 * 2 * 16 * 32
    total = make_plan(source, ASKED).parameters
    assert f"mlp.experts.gate_up_proj (6 fused parameters, {100 * numbers / total:.1f} %" in out
    adapted = {target.name for target in make_plan(source, ASKED).targets}
    assert not any(".experts." in name for name in adapted)


def test_experts_that_are_linear_layers_are_adapted():
    experts = nn.ModuleList([nn.Linear(16, 24) for _ in range(6)]).to("meta")
    model = nn.ModuleDict({"experts": experts}).requires_grad_(False)
    choice = Choice("toy", model, ["experts.0", "experts.5"])
    targets = find_targets(choice, 8, 2)
    assert [target.shape for target in targets] == [(24, 16)] * 2
    with adapted(choice, targets, Method("NoRA", 8, 2)):
        assert count(choice, Method("NoRA", 8, 2)).trained == 2 * 2 * 8 * 2


@pytest.mark.parametrize("method", [Method("LoRA", 4), Method("NoRA", 8, 2)])
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("bert", "batch 2, 12 tokens; the mean of its first output stands in for a loss"),
        ("t5", "batch 2, 12 tokens to as many"),
        ("vit", "batch 2, 16 x 16 px; the mean of its first output stands in for a loss"),
        ("clip", "batch 2, 10 tokens, 16 x 16 px"),
    ],
)
def test_steps_of_other_models_keep_what_real_ones_keep(folder, benchmark, name, size, method):
    (choice,) = choices_of(folder(name), "attention", torch.float32)
    choice.model.requires_grad_(False)
    inputs = inputs_of(choice, 2, 12, None)
    assert isinstance(inputs, Inputs) and inputs.size == size
    real: Any = type(choice.model)(choice.model.config).requires_grad_(False).train()
    made = arguments_of(real, 2, 12, torch.device("cpu"))
    assert isinstance(made, tuple)

    def loss():
        found = real(**made[0])
        return found.loss if "loss" in found else found[0].float().mean()

    targets = find_targets(choice, 8, 2)
    with adapted(choice, targets, method):
        planned = run_step(choice.model, inputs)
    config = benchmark.config_of(method, real, [target.name for target in targets])
    inject_adapter_in_model(config, real, "real")
    assert isinstance(planned, StepBytes)
    assert planned.kept == pytest.approx(benchmark.bytes_saved(real, loss), rel=0.05)


def test_a_step_that_cannot_be_run_is_unknown_and_the_rest_is_told(folder, capsys):
    assert main(["plan", folder("wav2vec2"), "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    for row in plan["rows"]:
        assert row["training_bytes"] is None and "neither ids of a text nor" in row["step"]
        assert row["counted"]["trained"] > 0
    assert main(["plan", folder("wav2vec2")]) == 0
    out = capsys.readouterr().out
    assert "a step is unknown: what Wav2Vec2Model reads is neither" in out
    assert out.count("unknown") == 7


def test_unfitting_shapes_make_a_step_unknown():
    with torch.device("meta"):
        model, x = Toy(), torch.empty(10, 47)
    told = run_step(model, Inputs(lambda: model(x), [x], ""))
    assert isinstance(told, str) and "cannot be run without contents" in told


def test_models_that_are_not_there_and_targets_that_fit_nothing(folder, capsys):
    assert main(["plan", "no_such_model"]) == USER_ERROR
    assert "llama3_8b" in capsys.readouterr().err
    assert main(["plan", folder("llama"), "--targets", "nothing"]) == USER_ERROR
    assert "--targets: " in capsys.readouterr().err


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_has_the_parameters_that_its_page_says(name):
    page = (ROOT / "nora_diffusion" / "assets" / "shapes" / "README.md").read_text("utf-8")
    (choice,) = choices_of(name, "attention")
    total = sum(p.numel() for p in choice.model.parameters())
    (line,) = (line for line in page.splitlines() if line.startswith(f"| `{name}`"))
    assert line.endswith(f"| {total:,} |")


def table_rows() -> dict[str, str]:
    """Rows of the page's table by model."""
    block = PAGE.read_text("utf-8").partition("<!-- nora plan")[2].split("\n\n")[0]
    rows = [line for line in block.splitlines() if line.startswith("|")][2:]
    return {row.split("|")[1].strip(): row for row in rows}


def check_rows(capsys, names: list[str]) -> None:
    rows = table_rows()
    assert main(["plan", *names]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [rows[name] for name in names]


def test_the_page_shows_what_the_command_prints_for_two_models(capsys):
    check_rows(capsys, ["sd15", "llama3_8b"])


@pytest.mark.slow
def test_the_page_shows_what_the_command_prints(capsys):
    check_rows(capsys, list(table_rows()))


def measured_row(source: str, method: str, rows: dict[str, dict[str, float]]) -> str:
    """A row of the page's table of measurements, from the benchmark's record."""

    def cell(key: str) -> str:
        if key not in rows:
            return "-"
        return "{plan:,} / {measured:,}".format(**rows[key])

    kept = f"{cell('kept_bytes')} ({rows['kept_bytes']['off_percent']:+.1f} %)"
    return f"| {source} | {method} | {cell('file_fp16')} | {cell('lora_fp16')} | {kept} |"


def test_the_page_shows_what_was_measured():
    record = json.loads((ROOT / "benchmarks" / "results" / "plan.json").read_text("utf-8"))
    page = PAGE.read_text("utf-8")
    for source, found in record["results"].items():
        for method, rows in found["methods"].items():
            assert measured_row(source, method, rows) in page
            for key in ("trained", "outer_bytes", "optimizer_bytes"):
                assert rows[key]["off_percent"] == 0
        seconds = found["factorise_cpu_seconds"]
        assert f"{source} {seconds['estimate']} / {seconds['measured']}" in page


@pytest.mark.slow
def test_a_model_of_a_trillion_parameters_takes_less_than_2_gb():
    code = (
        "import resource; from nora_diffusion.cli import main; main(['plan', 'moe_1t']);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "1,026,408,209,408 parameters" in run.stdout
    assert int(run.stdout.split()[-1]) < 2e6  # kB
