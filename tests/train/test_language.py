"""nora llm: what a run leaves, that it can be stopped and continued, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextConfig, LlamaConfig, LlamaForCausalLM

from nora_diffusion import adapter_info, cli, language_model
from nora_diffusion.adapter import NoraConfig, iter_nora_layers
from nora_diffusion.evaluation.multiple_choice import evaluate
from nora_diffusion.events import read_events
from nora_diffusion.language_config import LanguageConfig
from nora_diffusion.language_model import load_model, load_run_model
from nora_diffusion.run_config import load_run
from nora_diffusion.settings import UserError, to_toml, validate
from nora_diffusion.train import language, trainer
from nora_diffusion.train.common import TrainingDiverged, TrainingInterrupted
from tests.tiny_language import save_base, tiny_tokenizer, write_questions

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: save_base(folder / kind, kind) for kind in ("llama", "qwen2", "gpt2")}


@pytest.fixture
def make(tmp_path, bases):
    """Settings of a small run, with changes by section."""
    data = write_questions(tmp_path / "train.json", 12)

    def made(kind: str = "llama", folder: str = "run", **sections) -> LanguageConfig:
        values = {
            "model": {"base": bases[kind], "device": "cpu"},
            "adapter": {"r": 8, "inner_r": 2},
            "data": {"files": [data], "max_tokens": 96},
            "train": {"steps": 6, "batch_size": 2, "checkpoint_every": 2, "log_every": 1},
            "eval": {},
            "output": {"dir": str(tmp_path / folder)},
        }
        for section, changes in sections.items():
            values[section] |= changes
        return validate(LanguageConfig, values, "test")

    return made


def logits_of(model) -> torch.Tensor:
    ids = torch.tensor([tiny_tokenizer()("Which letter stands twice?")["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids).logits


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter.safetensors")


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


WITHOUT_US = """
import sys
sys.modules["nora_diffusion"] = None  # any import of it fails
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
ids, out, *pairs = sys.argv[1:]
found = []
for base, lora in zip(pairs[::2], pairs[1::2]):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora).eval()
    with torch.no_grad():
        found.append(model(input_ids=torch.load(ids, weights_only=True)).logits)
torch.save(found, out)
"""


def test_peft_alone_loads_the_export_and_computes_the_same(make, bases, tmp_path):
    configs = {
        kind: make(kind, folder=kind, train={"learning_rate": 0.1, "steps": 3}) for kind in bases
    }
    runs = {kind: language.run(config) for kind, config in configs.items()}
    ids = torch.tensor([tiny_tokenizer()("Which letter stands twice?")["input_ids"]])
    torch.save(ids, tmp_path / "ids.pt")
    arguments = [tmp_path / "ids.pt", tmp_path / "logits.pt"]
    for kind, run in runs.items():
        arguments += [bases[kind], run / "lora"]
    subprocess.run(
        [sys.executable, "-c", WITHOUT_US, *map(str, arguments)], check=True, cwd=tmp_path
    )
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    for theirs, (kind, config) in zip(found, configs.items(), strict=True):
        ours = logits_of(load_run_model(runs[kind], config, CPU))
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
        base = logits_of(load_model(bases[kind], "fp32", CPU))
        assert (ours - base).abs().max() > 0.01


def test_a_run_leaves_config_events_adapter_and_scores(make, tmp_path):
    questions = write_questions(tmp_path / "test.json", 6)
    run = language.run(make(eval={"files": [questions]}))
    assert to_toml(load_run(LanguageConfig, run)) == to_toml(make(eval={"files": [questions]}))
    events = read_events(run / "events.jsonl")
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert all(e["loss"] > 0 and e["eta_s"] >= 0 for e in events if e["event"] == "step")
    assert [e["step"] for e in events if e["event"] == "checkpoint"] == [2, 4, 6]
    assert events[-1]["event"] == "done"
    info = adapter_info(run / "adapter.safetensors")
    assert info["steps"] == 6
    (scores,) = json.loads((run / "scores.json").read_text())
    again = evaluate(load_run_model(run, make(), CPU), tiny_tokenizer(), questions, cache=False)
    assert scores["after"] == {
        "likelihood": again.likelihood_accuracy,
        "generated": again.generated_accuracy,
    }
    assert scores["questions"] == 6


def test_training_learns(make):
    config = make(train={"steps": 30, "batch_size": 6, "learning_rate": 3e-2},
                  adapter={"r": 16, "inner_r": 8})  # fmt: skip
    losses = [e["loss"] for e in read_events(language.run(config) / "events.jsonl")
              if e["event"] == "step"]  # fmt: skip
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def stop_after(monkeypatch, step: int) -> None:
    """Let a run be sent SIGTERM while it reports a step."""
    report_step = trainer.Follow.on_log

    def on_log(self, args, state, control, logs=None, **rest):
        report_step(self, args, state, control, logs=logs, **rest)
        if state.global_step == step and "loss" in logs:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer.Follow, "on_log", on_log)


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": {"dropout": 0.3}},
        {"adapter": {"method": "lora", "dropout": 0.3}},
        {"adapter": {"basis": "activation", "init": "gradient"}, "data": {"packing": True}},
        {"adapter": {"init": "sigma"}, "train": {"gradient_accumulation_steps": 2}},
    ],
    ids=["nora", "lora", "fitted, packed", "sigma, accumulated"],
)
def test_a_run_stopped_twice_equals_one_that_was_not(make, monkeypatch, changes):
    whole = language.run(make(folder="whole", **changes))
    config = make(folder="stopped", train={"checkpoint_every": 100} | changes.pop("train", {}),
                  **changes)  # fmt: skip
    for step, resume in ((2, False), (4, True)):
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(TrainingInterrupted, match="nora llm --resume"):
                language.run(config, resume=resume)
    stopped = language.run(config, resume=True)
    events = read_events(stopped / "events.jsonl")
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    losses = [
        [e["loss"] for e in read_events(run / "events.jsonl") if e["event"] == "step"]
        for run in (whole, stopped)
    ]
    assert losses[0] == losses[1]
    file = "lora/adapter_model.safetensors"
    assert_same(load_file(whole / file), load_file(stopped / file))
    if config.adapter.method == "nora":
        assert_same(weights(whole), weights(stopped))


def test_a_run_that_is_complete_trains_no_further_step(make):
    """4 steps of 6 an epoch: Trainer itself would take a fifth."""
    config = make(train={"steps": 4, "lr_schedule": "constant"})
    run = language.run(config)
    before = weights(run)
    language.run(config, resume=True)
    assert_same(weights(run), before)
    assert not (run / "checkpoints" / "checkpoint-5").exists()
    steps = [e["step"] for e in read_events(run / "events.jsonl") if e["event"] == "step"]
    assert steps == [1, 2, 3, 4]


def test_a_run_of_another_command_is_told_so(make, capsys):
    run = language.run(make(train={"steps": 1}))
    before = (run / "config.toml").read_bytes()
    assert cli.main_dreambooth(["--resume", str(run)]) == 2
    assert "this is a run of nora llm, not of nora-dreambooth" in capsys.readouterr().err
    assert (run / "config.toml").read_bytes() == before


def test_a_fit_has_the_gradient_checkpointing_of_the_run(make, monkeypatch):
    """Each block runs twice a batch, the second time in backward; what is fitted is the same."""
    counts, starts = {}, {}
    fit_start = language.fit_start

    def counted(model, *rest):
        block = model.get_base_model().model.layers[0]
        hook = block.input_layernorm.register_forward_hook(lambda *_: calls.append(1))
        calls = []
        fit_start(model, *rest)
        hook.remove()
        counts[name] = len(calls)
        starts[name] = [q.clone() for n, q in model.named_parameters() if "inner_A" in n]

    monkeypatch.setattr(language, "fit_start", counted)
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        language.run(make(folder=name, adapter={"init": "gradient"}, train={"steps": 1}
                          | {"gradient_checkpointing": checkpointing}))  # fmt: skip
    assert counts["checkpointed"] == 2 * counts["plain"] > 0
    for plain, checkpointed in zip(starts["plain"], starts["checkpointed"], strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-4, atol=1e-5)


def test_what_is_not_quantised_keeps_its_number_format(tmp_path, monkeypatch):
    """As the base was loaded and is scored; float32 would double what a large vocabulary takes."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(language_model, "check_quantize", lambda quantize, device: None)
    sides = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 64}  # of blocks of 64
    LlamaForCausalLM(
        LlamaConfig(**sides, num_hidden_layers=2, num_attention_heads=4)
    ).save_pretrained(tmp_path)
    base = language_model.load_model(str(tmp_path), "bf16", torch.device("cpu"), "nf4")
    config = NoraConfig(r=8, inner_r=2, init="orthogonal", target_modules=["q_proj", "down_proj"])
    model, seen = language.add_adapter(base, config), set()
    for _, layer in iter_nora_layers(model):
        layer.register_forward_pre_hook(lambda _, args: seen.add(args[0].dtype))
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert seen == {torch.bfloat16}
    assert base.get_input_embeddings().weight.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("inner" in name), name
        if "inner_B" in name:
            assert parameter.dtype == torch.float32 and parameter.grad.abs().sum() > 0


def test_a_checkpoint_that_was_not_finished_is_passed_over(make):
    config = make()
    whole = weights(language.run(config))
    folder = Path(config.output.dir)
    (folder / "checkpoints/checkpoint-6/trainer_state.json").unlink()
    shutil.rmtree(folder / "lora")
    with pytest.warns(UserWarning, match="checkpoint-6 was not written to its end"):
        language.run(config, resume=True)
    assert_same(whole, weights(folder))


def test_a_run_is_not_continued_on_other_examples(make, tmp_path):
    config = make()
    language.run(config)
    write_questions(tmp_path / "train.json", 9)
    with pytest.raises(UserError, match=r"data\.files = .*not the examples"):
        language.run(config, resume=True)


def test_a_loss_that_is_not_finite_ends_the_run_without_a_checkpoint_of_it(make):
    config = make(train={"learning_rate": 1e30, "lr_warmup_steps": 0, "checkpoint_every": 1,
                         "max_grad_norm": 1e30})  # fmt: skip
    with pytest.raises(TrainingDiverged, match=r"train\.learning_rate \(now 1e\+30\)"):
        language.run(config)
    events = read_events(Path(config.output.dir) / "events.jsonl")
    assert events[-1]["event"] == "error"


def test_packed_and_plain_rows_see_every_example(make):
    counts = {}
    for packing in (False, True):
        config = make(data={"packing": packing, "max_tokens": 200})
        encoded = language.encode_files(tiny_tokenizer(), config.data.files, 200)
        rows = language.make_rows(config, encoded.examples)
        counts[packing] = len(rows)
        assert sum(map(len, rows)) == 12
    assert counts[True] < counts[False] == 12


@pytest.mark.parametrize("targets", ["attention", "all-linear", ["q_proj"], r".*\.0\.mlp\..*_proj"])
def test_modules_are_chosen_alike_for_both_methods(make, bases, targets):
    adapted = []
    for method in ("nora", "lora"):
        config = make(adapter={"method": method, "target_modules": targets})
        base = load_model(bases["llama"], "fp32", CPU)
        model = language.add_adapter(base, language.adapter_config(config.adapter, base))
        adapted.append(sorted(model.targeted_module_names))
    assert adapted[0] == adapted[1]
    assert adapted[0]
    assert "lm_head" not in adapted[0]


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"adapter": {"target_modules": ["nothing"]}}, "adapter.target_modules: "),
        ({"adapter": {"target_modules": "model.*"}}, "adapter.target_modules: "),
        ({"model": {"quantize": "nf4"}}, 'model.quantize = "nf4": needs a CUDA GPU'),
        ({"model": {"base": "/no/such/folder"}}, 'model.base = "/no/such/folder": is no folder'),
        ({"model": {"base": "absent.gguf"}}, 'model.base = "absent.gguf": no such file'),
        ({"data": {"files": ["none.json"]}}, "data.files: none.json: cannot be read"),
        ({"eval": {"files": ["none.json"]}}, "eval.files: none.json: cannot be read"),
        ({"adapter": {"target_modules": "("}}, 'adapter.target_modules = "(": is no regular ex'),
        ({"data": {"max_tokens": 8}}, "data.max_tokens = 8: all 12 examples are longer"),
    ],
)
def test_what_cannot_be_done_is_told_by_its_key(make, sections, told):
    with pytest.raises(UserError) as caught:
        language.run(make(**sections))
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"quantize": "nf4"}},
        {"model": {"base": "/no/such/folder"}},
        {"data": {"files": ["none.json"]}},
        {"data": {"max_tokens": 8}},
        {"eval": {"files": ["none.json"]}},
    ],
    ids=str,
)
def test_what_needs_no_weights_is_refused_before_anything_is_written(
    make, tmp_path, capsys, sections
):
    (tmp_path / "mine.toml").write_text(to_toml(make(**sections)))
    told = []
    for more in (["--dry-run"], []):
        assert command(str(tmp_path / "mine.toml"), *more) == 2
        told.append(capsys.readouterr().err)
        assert not (tmp_path / "run").exists()
    assert told[0] == told[1]


@pytest.mark.parametrize(
    "text", ["[", '[{"instruction": "a"}]', "[1]"], ids=["no JSON", "no answer", "no object"]
)
def test_broken_examples_are_told_by_their_key(make, tmp_path, text):
    file = tmp_path / "broken.json"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        language.run(make(data={"files": [str(file)]}))
    assert str(caught.value).startswith(f"data.files: {file}")


def test_a_base_of_another_type_is_named_with_it(make, tmp_path, capsys):
    CLIPTextConfig().save_pretrained(tmp_path / "clip")
    tiny_tokenizer().save_pretrained(tmp_path / "clip")
    told = f'= "{tmp_path / "clip"}": is a model of type "clip_text_model", which does not write'
    for check in (language.run, language.describe):
        with pytest.raises(UserError) as caught:
            check(make(model={"base": str(tmp_path / "clip")}))
        assert str(caught.value).startswith(f"model.base {told}")
        assert len(str(caught.value)) < 400
    questions = write_questions(tmp_path / "q.json", 3)
    assert cli.main(["llm-eval", str(tmp_path / "clip"), questions]) == 2
    assert f"RUN_OR_BASE {told}" in capsys.readouterr().err


@pytest.mark.parametrize("base", ["/no/such/folder", "none.gguf", "nobody/no-such-model"])
def test_a_base_to_score_is_named_by_its_argument(tmp_path, capsys, monkeypatch, base):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main(["llm-eval", base, write_questions(tmp_path / "q.json", 3)]) == 2
    err = capsys.readouterr().err
    assert f'RUN_OR_BASE = "{base}": ' in err and "model.base" not in err


def test_settings_that_lora_has_not_are_said_not_to_be_used(make, capsys):
    config = make(adapter={"method": "lora", "basis": "gradient"}, train={"steps": 1})
    told = 'adapter.basis = "gradient": not used; '
    assert any(line.startswith(told) for line in language.describe(config))
    language.run(config)
    assert told in capsys.readouterr().out
    of_nora = make(adapter={"basis": "gradient"})
    assert not any("not used" in line for line in language.describe(of_nora))


def test_a_run_of_one_step_learns(make):
    """The warm-up, of 5 steps by default, does not hold it at a rate of 0."""
    config = make(train={"steps": 1})
    (rate,) = [
        e["lr"] for e in read_events(language.run(config) / "events.jsonl") if e["event"] == "step"
    ]
    assert rate == pytest.approx(config.train.learning_rate)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", ["nora", "lora"])
def test_a_base_in_4_bits_trains_on_a_gpu_and_is_loaded_again(make, tmp_path, method):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    device, questions = torch.device("cuda"), write_questions(tmp_path / "q.json", 6)
    sides = {"hidden_size": 128, "intermediate_size": 256}  # of blocks of 64
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            **sides,
            vocab_size=len(tiny_tokenizer()),
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            initializer_range=0.15,  # so large that attention has something to say
        )
    ).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    config = make(
        model={
            "base": str(tmp_path / "base"),
            "device": "cuda",
            "dtype": "bf16",
            "quantize": "nf4",
        },
        adapter={"method": method, "r": 16, "inner_r": 8},
        train={"steps": 30, "batch_size": 6, "learning_rate": 1e-2},
        eval={"files": [questions]},
    )
    run = language.run(config)
    losses = [e["loss"] for e in read_events(run / "events.jsonl") if e["event"] == "step"]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    model = load_run_model(run, config, device)
    bases = [getattr(m, "base_layer", None) for m in model.modules()]
    bases = [base for base in bases if base is not None]
    assert bases and all(isinstance(base, bitsandbytes.nn.Linear4bit) for base in bases)
    (scores,) = json.loads((run / "scores.json").read_text())
    again = evaluate(model, tiny_tokenizer(), questions, cache=False)
    assert again.likelihood_accuracy == scores["after"]["likelihood"]
    base = load_model(config.model.base, "bf16", device, "nf4")
    ids = torch.tensor([tiny_tokenizer()("Which letter stands twice?")["input_ids"]], device=device)
    with torch.no_grad():
        moved = (model(input_ids=ids).logits - base(input_ids=ids).logits).abs().max()
    assert moved > 0.01


def command(*argv: str) -> int:
    return cli.main(["llm", *argv])


@pytest.fixture
def config_file(make, tmp_path) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(to_toml(make()))
    return str(path)


def test_a_dry_run_shows_settings_examples_and_size_and_writes_nothing(
    config_file, tmp_path, capsys
):
    assert command(config_file, "--dry-run", "--adapter.target_modules", "attention") == 0
    out = capsys.readouterr().out
    assert 'target_modules = "attention"' in out
    assert "# 12 examples of " in out
    assert f"{2 * 4 * 2 * 8 * 2:,} trained parameters on cpu" in out  # layers, projections, 2 r k
    assert not (tmp_path / "run").exists()


def test_the_command_trains_and_its_run_is_scored(config_file, tmp_path, capsys):
    questions = write_questions(tmp_path / "q.json", 6)
    assert command(config_file, "--eval.files", questions) == 0
    shown = capsys.readouterr()
    assert "before" in shown.err + shown.out
    assert cli.main(["llm-eval", str(tmp_path / "run"), questions, "--json"]) == 0
    (of_run,) = json.loads(capsys.readouterr().out)
    (scores,) = json.loads((tmp_path / "run/scores.json").read_text())
    right = sum(a == b for a, b in zip(of_run["likelihood"], of_run["correct"], strict=True))
    assert right / 6 == scores["after"]["likelihood"]


def test_a_base_is_scored_by_its_name(bases, tmp_path, capsys):
    questions = write_questions(tmp_path / "q.json", 6)
    assert cli.main(["llm-eval", bases["llama"], questions, "--limit", "3"]) == 0
    assert "33.3%   3" in capsys.readouterr().out


def test_a_bad_key_is_named_with_the_nearest_good_one(config_file, capsys):
    assert command(config_file, "--train.learning_rat", "1") == 2
    assert "did you mean train.learning_rate?" in capsys.readouterr().err


LAUNCHED = textwrap.dedent(
    """
    import sys
    from nora_diffusion.cli import main
    sys.exit(main(sys.argv[1:]))
    """
)


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(make, config_file, tmp_path):
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    # As `accelerate launch` does for GPUs; of a CPU that makes but one process.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    two = tmp_path / "two"
    argv = ["llm", config_file, "--output.dir", str(two), "--train.batch_size", "6"]
    done = subprocess.run(
        [*launch, str(script), *argv], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one = weights(language.run(make(train={"batch_size": 12})))  # every example in every step
    for name, tensor in weights(two).items():
        torch.testing.assert_close(tensor, one[name], rtol=1e-3, atol=1e-5)
    steps = [e["step"] for e in read_events(two / "events.jsonl") if e["event"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6]  # the first process alone reports
