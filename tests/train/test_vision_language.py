"""``nora vlm`` on image instructions: tiny random LLaVA-, Qwen2-VL- and SmolVLM-shaped models."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Mistral3Config,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.utils import is_torchvision_available

from nora_diffusion import cli
from nora_diffusion.adapter.files import load_adapter
from nora_diffusion.data.image_batches import (
    Records,
    collate,
    encode,
    learns_from_trained_positions,
    with_trained_positions,
)
from nora_diffusion.data.image_instructions import read_records
from nora_diffusion.data.instructions import UNTRAINED
from nora_diffusion.evaluation.picture_answers import answers, matches
from nora_diffusion.events import read_events
from nora_diffusion.families.base import resolve_device
from nora_diffusion.run_config import load_config
from nora_diffusion.settings import UserError, to_toml
from nora_diffusion.train import trainer
from nora_diffusion.train.common import TrainingDiverged
from nora_diffusion.train.report import Report
from nora_diffusion.train.vision_language import describe, find_targets, run, train_adapter
from nora_diffusion.train.vlm_base import load_processor
from nora_diffusion.vision_language_config import VisionLanguageConfig
from tests.tiny_language import save_base

SIDE = 28
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """Single bytes and a few special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    made.decoder = decoders.ByteLevel()  # pyright: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>", *special],
    )


def ids(tokens: PreTrainedTokenizerFast, **names: str) -> dict[str, int]:
    return {key: tokens.convert_tokens_to_ids(name) for key, name in names.items()}


def llava():
    tokens = tokenizer("<image>")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 4, "image_size": SIDE, "patch_size": 14,
              "model_type": "clip_vision_model"}  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config=TEXT | {"model_type": "llama", "vocab_size": len(tokens)},
        vision_feature_layer=-2,
        image_seq_length=4,
        **ids(tokens, image_token_index="<image>"),
    )
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size),
        tokens,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )
    return LlavaForConditionalGeneration(config), processor


class PictureProcessor(Qwen2VLProcessor):
    """Qwen2-VL's without its video half, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        if argument is None:
            return None
        return super().check_argument_for_proper_class(argument_name, argument)


def qwen2_vl():
    names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokens = tokenizer(*names)
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 7,
              "spatial_merge_size": 2, "temporal_patch_size": 2, "mlp_ratio": 2}  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        vision_config=vision,
        text_config=TEXT | {"vocab_size": len(tokens), "rope_parameters": rope},
        **ids(tokens, vision_start_token_id=names[0], vision_end_token_id=names[1],
              image_token_id=names[2], video_token_id=names[3]),
    )  # fmt: skip
    area = SIDE * SIDE
    images = Qwen2VLImageProcessorPil(
        patch_size=7, merge_size=2, size={"shortest_edge": area, "longest_edge": area}
    )
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    processor = PictureProcessor(images, tokens, chat_template=TEMPLATE.replace("IMAGE", picture))
    return Qwen2VLForConditionalGeneration(config), processor


def smolvlm():
    names = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    tokens = tokenizer(*names)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 4, "image_size": SIDE, "patch_size": 7}  # fmt: skip
    config = SmolVLMConfig(
        vision_config=vision,
        text_config=TEXT | {"model_type": "llama", "vocab_size": len(tokens)},
        scale_factor=2,
        **ids(tokens, image_token_id="<image>"),
    )
    images = SmolVLMImageProcessorPil(
        size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False
    )
    # SmolVLM's own processor needs a video half; Idefics3's is the same for pictures.
    processor = Idefics3Processor(
        images, tokens, image_seq_len=4, chat_template=TEMPLATE.replace("IMAGE", "<image>")
    )
    return SmolVLMForConditionalGeneration(config), processor


BUILDERS = {"llava": llava, "qwen2_vl": qwen2_vl, "smolvlm": smolvlm}


@pytest.fixture(scope="module", params=BUILDERS)
def shape(request):
    """A tiny random model and its processor."""
    torch.manual_seed(0)
    model, processor = BUILDERS[request.param]()
    return model.eval().requires_grad_(False), processor


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    entries = []
    for i, (name, colour) in enumerate((("red", (230, 20, 20)), ("blue", (20, 30, 230)))):
        Image.new("RGB", (40, 32), colour).save(folder / f"{name}.png")
        question = "What colour?" if i else "Which colour is it?"
        entries.append({"image": f"{name}.png", "instruction": question, "output": name})
    (folder / "colours.json").write_text(json.dumps(entries))
    return folder / "colours.json"


def settings(file, out, *more) -> VisionLanguageConfig:
    given = [f"data.train={file}", f"data.test={file}", f"output.dir={out}", "model.device=cpu"]
    given += ["adapter.r=16", "adapter.inner_r=8", "train.batch_size=2", "train.lr_warmup_steps=2"]
    return load_config(VisionLanguageConfig, "vlm", [*given, *more])


def test_the_answer_alone_is_trained(shape, file):
    _, processor = shape
    record = read_records(file)[0]
    item = encode(processor, record)
    trained = item["input_ids"][item["labels"] != UNTRAINED]
    assert processor.tokenizer.decode(trained).strip() == "red<|im_end|>"
    asked = encode(processor, record, with_answers=False)["input_ids"]
    assert torch.equal(asked, item["input_ids"][:, : asked.shape[1]])


def test_a_picture_is_processed_once_each_time_it_is_asked_for(shape, file, monkeypatch):
    _, processor = shape
    (first, second, *_) = read_records(file)
    two_turns = replace(first, turns=(*first.turns, *second.turns))
    data = Records(processor, [first, two_turns], 1000)
    wanted = [encode(processor, record) for record in data.records]
    kind, calls = type(processor.image_processor), []
    process = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda *a, **k: calls.append(1) or process(*a, **k))
    again = [[data[i] for i in range(2)] for _ in range(3)]
    assert len(calls) == 3 * 2 + 3  # the answers of the second were looked for, once
    for items in again:
        for item, whole in zip(items, wanted, strict=True):
            assert item.keys() == whole.keys()
            assert all(torch.equal(item[key], whole[key]) for key in whole)


def test_a_batch_says_what_its_records_say_alone(shape, file):
    """Padding on either side, and pictures put together, change no logits."""
    model, processor = shape
    items = [encode(processor, record) for record in read_records(file)]
    assert items[0]["input_ids"].shape[1] != items[1]["input_ids"].shape[1]
    batch = collate(items, processor.tokenizer.pad_token_id)
    with torch.no_grad():
        together = model(**batch).logits
        for row, item in enumerate(items):
            alone = model(**item).logits[0]
            assert torch.allclose(together[row, : len(alone)], alone, atol=1e-4)


def test_logits_of_the_answers_alone_give_the_same_loss_and_gradient(shape, file):
    model, processor = shape
    items = [encode(processor, record) for record in read_records(file)[:3]]
    batch = collate(items, processor.tokenizer.pad_token_id)
    assert learns_from_trained_positions(model, batch)
    model.requires_grad_(True).eval()
    found = []
    for one in (batch, with_trained_positions(batch)):
        model.zero_grad()
        out = model(**one)
        out.loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((out.loss.detach(), gradient, out.logits.shape[1]))
    model.requires_grad_(False)
    (whole, of_whole, length), (kept, of_kept, few) = found
    assert few < length / 2
    torch.testing.assert_close(kept, whole)
    torch.testing.assert_close(of_kept, of_whole, rtol=1e-3, atol=1e-6)


def test_a_model_whose_loss_shifts_labels_itself_gets_whole_batches(shape, file):
    model, processor = shape

    class OwnLoss(torch.nn.Module):
        def forward(self, labels, logits_to_keep=0, **inputs):
            inputs.pop("shift_labels", None)
            return model(labels=labels, logits_to_keep=logits_to_keep, **inputs)

    items = [encode(processor, record) for record in read_records(file)[:2]]
    assert not learns_from_trained_positions(OwnLoss(), collate(items, 0))


@pytest.mark.parametrize("towers", [("language",), ("vision",), ("vision", "language")])
def test_towers_choose_the_modules(shape, towers):
    model, _ = shape
    found = find_targets(model, towers)
    vision = sum("vis" in name for name in found)
    per_layer = 2 if any(name.endswith("qkv") for name in found) else 4
    assert vision == (2 * per_layer if "vision" in towers else 0)
    assert len(found) - vision == (2 * 4 if "language" in towers else 0)


def test_training_learns_the_answers_and_leaves_the_base_alone(shape, file, tmp_path):
    model, processor = shape
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config = settings(
        file, tmp_path, "train.steps=20", "adapter.learning_rate=3e-2",
        'adapter.towers=["vision", "language"]',
    )  # fmt: skip
    records = read_records(file)
    with Report(tmp_path, total_steps=20, log_every=10) as report:
        path = train_adapter(config, model, processor, records, records, report)
    result = json.loads(path.read_text())
    assert result["before"]["accuracy"] == 0
    losses = [e["loss"] for e in steps_of(tmp_path)]
    assert losses[-1] < losses[0] - 0.05  # random weights leave attention little to say
    after = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items()}
    assert all(torch.equal(before[k], after[k]) for k in before)
    item = encode(processor, records[0])
    with torch.no_grad():
        trained = model(**item).logits
        strip_adapter(model)
        plain = model(**item).logits
        lora = PeftModel.from_pretrained(model, tmp_path / "lora")
        exported = lora(**item).logits
    strip_adapter(model)
    assert (trained - plain).abs().max() > 1e-3
    assert torch.allclose(exported, trained, atol=1e-4)
    loaded = load_adapter(model, tmp_path / "adapter.safetensors", adapter_name="again")
    assert loaded == len(find_targets(model, ("vision", "language")))
    with torch.no_grad():
        assert torch.allclose(model(**item).logits, trained, atol=1e-5)
    strip_adapter(model)


def strip_adapter(model) -> None:
    """Takes adapter layers off a module-scoped model again."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "base_layer"):
                setattr(parent, name, child.base_layer)
    model.requires_grad_(False)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    for part in llava():
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def make(file, base):
    """Settings of a run of 6 steps in a folder, with more `section.key=value`."""
    given = [f"model.base={base}", "adapter.dropout=0.1", "train.steps=6", "train.log_every=1"]
    return lambda folder, *more: settings(file, folder, *given, *more)


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter.safetensors")


def assert_same(left: Path, right: Path) -> None:
    assert [e["loss"] for e in steps_of(left)] == [e["loss"] for e in steps_of(right)]
    first, second = adapter_of(left), adapter_of(right)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def steps_of(run: Path) -> list[dict]:
    return [e for e in read_events(run / "events.jsonl") if e["event"] == "step"]


def stop_after(monkeypatch, step: int, number: signal.Signals) -> None:
    """Let a run be sent a signal while it reports a step."""
    report_step = trainer.Follow.on_log

    def on_log(self, args, state, control, logs=None, **rest):
        report_step(self, args, state, control, logs=logs, **rest)
        if state.global_step == step and "loss" in logs:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(trainer.Follow, "on_log", on_log)


def test_a_run_stopped_twice_equals_one_that_was_not(make, tmp_path, monkeypatch, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(make(whole))
    (tmp_path / "vlm.toml").write_text(to_toml(make(stopped)))
    begin, resume = ["vlm", str(tmp_path / "vlm.toml")], ["vlm", "--resume", str(stopped)]
    for argv, step, number in ((begin, 2, signal.SIGINT), (resume, 4, signal.SIGTERM)):
        with monkeypatch.context() as patch:
            stop_after(patch, step, number)
            capsys.readouterr()
            assert cli.main(argv) == cli.INTERRUPTED
        err = capsys.readouterr().err
        assert "training:" in err  # the bar
        # A step is reported after its end, where signals are looked for.
        assert f"stopped by {number.name} after step {step + 1}; " in err
        assert f"with: nora vlm --resume {stopped}" in err
        assert read_events(stopped / "events.jsonl")[-1]["event"] == "stopped"
    assert cli.main(resume) == 0
    assert [e["step"] for e in steps_of(stopped)] == [1, 2, 3, 4, 5, 6]
    assert_same(whole, stopped)


def test_a_checkpoint_that_was_not_finished_is_passed_over(make, tmp_path):
    config = make(tmp_path / "run", "train.checkpoint_every=3")
    folder = run(config).parent
    whole = adapter_of(folder)
    (folder / "adapter.safetensors").unlink()
    (folder / "checkpoints/checkpoint-6/trainer_state.json").unlink()
    with pytest.warns(UserWarning, match="checkpoint-6 was not written to its end"):
        run(config, resume=True)
    again = adapter_of(folder)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert [e["step"] for e in steps_of(folder)] == [1, 2, 3, 4, 5, 6, 4, 5, 6]


def test_a_loss_that_is_not_finite_ends_the_run_and_a_new_one_may_take_its_place(make, tmp_path):
    folder = tmp_path / "run"
    wild = ["adapter.learning_rate=1e30", "train.lr_warmup_steps=0", "train.max_grad_norm=1e30"]
    with pytest.raises(TrainingDiverged, match=r"lower adapter\.learning_rate \(now 1e\+30\)"):
        run(make(folder, *wild))
    last = read_events(folder / "events.jsonl")[-1]
    assert last["event"] == "error" and "adapter.learning_rate" in last["message"]
    (folder / "results.json").write_text('{"before": {"accuracy": 2}}')  # of other settings
    assert json.loads(run(make(folder)).read_text())["before"]["accuracy"] <= 1
    with pytest.raises(UserError, match=r"already holds a run; continue it with nora vlm --resume"):
        run(make(folder))


def test_recomputed_and_accumulated_steps_learn_the_same(make, tmp_path):
    plain = run(make(tmp_path / "plain", "adapter.dropout=0")).parent
    changes = ["train.gradient_checkpointing=true", "train.gradient_accumulation_steps=2"]
    changes += ["train.batch_size=1", "adapter.dropout=0"]
    other = run(make(tmp_path / "other", *changes)).parent
    for name, tensor in adapter_of(plain).items():
        torch.testing.assert_close(tensor, adapter_of(other)[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(make, tmp_path):
    one = run(make(tmp_path / "one", "adapter.dropout=0")).parent
    two = make(tmp_path / "two", "adapter.dropout=0", "train.batch_size=1")
    (tmp_path / "vlm.toml").write_text(to_toml(two))
    script = tmp_path / "launched.py"
    script.write_text("import sys\nfrom nora_diffusion.cli import main\nsys.exit(main())\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(script), "vlm", str(tmp_path / "vlm.toml")], cwd=Path(__file__).parents[2],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name, tensor in adapter_of(tmp_path / "two").items():
        torch.testing.assert_close(tensor, adapter_of(one)[name], rtol=1e-3, atol=1e-5)
    assert [e["step"] for e in steps_of(tmp_path / "two")] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "two/results.json").is_file()


def test_long_records_are_left_out_and_counted(file):
    processor = llava()[1]
    records = read_records(file)
    lengths = sorted(encode(processor, r)["input_ids"].shape[1] for r in records)
    some = Records(processor, records, lengths[0])
    assert len(some) == 1 and some.left_out == 1
    assert some.longest <= lengths[0] < lengths[-1]  # of those that are kept
    with pytest.raises(UserError, match=r"data.max_length = 8: every record is longer"):
        Records(processor, records, 8)


def test_answers_are_compared_by_their_words():
    assert matches(" On the beach. ", "on the beach")
    assert not matches("on the beach today", "on the beach")


def test_generation_goes_on_where_the_answer_stands(file):
    torch.manual_seed(0)
    model, processor = llava()
    said = answers(model.eval(), processor, read_records(file))
    assert len(said) == 2 and all("colour" not in text for text in said)


WITH_VIDEOS = {
    "qwen2_vl": ("Qwen2VLProcessor", "Qwen2VLVideoProcessor"),
    "smolvlm": ("SmolVLMProcessor", "SmolVLMVideoProcessor"),
}
without_torchvision = pytest.mark.skipif(
    is_torchvision_available(), reason="torchvision reads videos"
)


def save_whole(folder: Path, kind: str, in_one_file: bool):
    """A base whose processor's files ask for a video half, as those of the hub; and its parts."""
    torch.manual_seed(0)
    model, processor = BUILDERS[kind]()
    for part in (model, processor.tokenizer, processor.image_processor):
        part.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(processor.chat_template)
    name, videos = WITH_VIDEOS[kind]
    described = {"processor_class": name} | ({"image_seq_len": 4} if kind == "smolvlm" else {})
    if in_one_file:
        pictures = folder / "preprocessor_config.json"
        described["image_processor"] = json.loads(pictures.read_text())
        described["video_processor"] = {"video_processor_type": videos}
        pictures.unlink()
    (folder / "processor_config.json").write_text(json.dumps(described))
    return model, processor


@without_torchvision
@pytest.mark.parametrize("in_one_file", [False, True])
@pytest.mark.parametrize("kind", WITH_VIDEOS)
def test_a_processor_is_loaded_without_its_video_half(kind, in_one_file, file, tmp_path):
    _, whole = save_whole(tmp_path, kind, in_one_file)
    loaded = load_processor(str(tmp_path))
    for record in read_records(file):
        wanted, found = encode(whole, record), encode(loaded, record)
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[key], found[key]) for key in wanted)


@without_torchvision
@pytest.mark.parametrize("kind", WITH_VIDEOS)
def test_such_a_base_trains_by_the_command(kind, file, tmp_path):
    save_whole(tmp_path / "base", kind, False)
    config = settings(file, tmp_path / "run", f"model.base={tmp_path / 'base'}", "train.steps=1")
    (tmp_path / "vlm.toml").write_text(to_toml(config))
    assert cli.main(["vlm", str(tmp_path / "vlm.toml")]) == 0
    assert any(t.abs().max() > 0 for t in adapter_of(tmp_path / "run").values())


@without_torchvision
def test_a_processor_that_cannot_do_without_torchvision_says_so(file, tmp_path):
    Mistral3Config().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"processor_class": "PixtralProcessor"}')
    with pytest.raises(UserError, match=r'^model\.base = ".*pip install torchvision$'):
        run(settings(file, tmp_path / "out", f"model.base={tmp_path}"))


def test_a_run_of_one_step_learns(make, tmp_path):
    """The warm-up, of 20 steps by default, does not hold it at a rate of 0."""
    folder = run(make(tmp_path / "run", "train.steps=1", "train.lr_warmup_steps=20")).parent
    (step,) = steps_of(folder)
    assert step["lr"] == pytest.approx(2e-3)


def test_a_warm_up_takes_a_third_of_the_steps_at_most(make, tmp_path):
    arguments = trainer.shared_arguments(
        make(tmp_path, "train.steps=60", "train.lr_warmup_steps=30").train, tmp_path,
        torch.device("cpu"),
    )  # fmt: skip
    assert arguments["warmup_steps"] == 20


def test_a_base_that_is_no_such_model_is_named(file, tmp_path):
    def told(base) -> str:
        with pytest.raises(UserError) as caught:
            run(settings(file, tmp_path / "out", f"model.base={base}"))
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    assert told(tmp_path / "empty").startswith('model.base = "')
    assert 'model.base = "/no/such": no such folder' in told("/no/such")
    assert 'for model.task = "few_shot" (nora vlm clip_fewshot)' in told("mini_clip")
    save_base(tmp_path / "llama")
    other = told(tmp_path / "llama")
    assert 'is a model of type "llama", which does not read pictures' in other
    assert len(other) < 400


@pytest.mark.parametrize("key", ["train", "test"])
@pytest.mark.parametrize(
    ("records", "said"),
    [
        (None, "cannot be read"),
        ("{", "is not valid JSON"),
        ('[{"image": "red.png", "instruction": "q"}]', "record 1: output: missing"),
        ('[{"image": "no.png", "instruction": "q", "output": "a"}]', "no such file"),
        ('[{"image": "bad.png", "instruction": "q", "output": "a"}]', "cannot be read as a pic"),
    ],
    ids=["absent", "no JSON", "no answer", "no picture", "broken picture"],
)
def test_broken_records_are_told_by_their_key_before_anything_is_written(
    make, file, tmp_path, capsys, key, records, said
):
    (tmp_path / "red.png").write_bytes((file.parent / "red.png").read_bytes())
    (tmp_path / "bad.png").write_text("no picture")
    if records is not None:
        (tmp_path / "d.json").write_text(records)
    config = make(tmp_path / "run", f"data.{key}={tmp_path / 'd.json'}")
    (tmp_path / "vlm.toml").write_text(to_toml(config))
    for more in (["--dry-run"], []):
        assert cli.main(["vlm", str(tmp_path / "vlm.toml"), *more]) == 2
        err = capsys.readouterr().err
        assert f"data.{key}: " in err and said in err
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["train", "test"])
def test_a_picture_that_ends_early_is_told_by_the_key_of_its_file(make, file, tmp_path, key):
    Image.effect_noise((64, 64), 90).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    record = {"image": "cut.png", "instruction": "q", "output": "a"}
    (tmp_path / "d.json").write_text(json.dumps([record]))
    with pytest.raises(UserError, match=rf"^data\.{key}: .*cut\.png: cannot be read as a picture"):
        run(make(tmp_path / "run", f"data.{key}={tmp_path / 'd.json'}"))


def test_where_pictures_were_looked_for_is_told(make, tmp_path):
    with pytest.raises(UserError, match=r'^data\.images = "/no/such": no such folder'):
        describe(make(tmp_path / "run", "data.images=/no/such"))
    with pytest.raises(UserError, match=r"(?s)^data\.train: .*start from data\.images = "):
        describe(make(tmp_path / "run", f"data.images={tmp_path}"))


def test_a_dry_run_counts_the_records(make, tmp_path, capsys):
    (tmp_path / "vlm.toml").write_text(to_toml(make(tmp_path / "run")))
    assert cli.main(["vlm", str(tmp_path / "vlm.toml"), "--dry-run"]) == 0
    assert "# 2 records to learn, 2 to ask, on cpu" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_the_device_is_the_one_asked_for_or_cuda_or_the_cpu(file, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto", mps=False).type == "cpu"
    assert resolve_device("auto").type == "mps"
    with pytest.raises(UserError, match='model.device = "cuda": this machine'):
        run(settings(file, tmp_path / "out", "model.device=cuda"))
