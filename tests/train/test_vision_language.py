"""``nora vlm`` on image instructions: tiny random LLaVA-, Qwen2-VL- and SmolVLM-shaped models."""

import json
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

from nora_diffusion.adapter.files import load_adapter
from nora_diffusion.data.image_batches import Records, collate, encode
from nora_diffusion.data.image_instructions import read_records
from nora_diffusion.data.instructions import UNTRAINED
from nora_diffusion.evaluation.picture_answers import answers, matches
from nora_diffusion.families.base import resolve_device
from nora_diffusion.run_config import load_config
from nora_diffusion.settings import UserError
from nora_diffusion.train.vision_language import find_targets, run, train_adapter
from nora_diffusion.vision_language_config import VisionLanguageConfig

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
    result = json.loads(
        train_adapter(config, model, processor, records, records, tmp_path).read_text()
    )
    assert result["before"]["accuracy"] == 0
    losses = [
        json.loads(line)["loss"]
        for line in (tmp_path / "events.jsonl").read_text().splitlines()
        if '"step"' in line and json.loads(line)["event"] == "step"
    ]
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


def test_a_resumed_run_equals_an_uninterrupted_one(file, tmp_path):
    torch.manual_seed(0)
    base = tmp_path / "base"
    model, processor = llava()
    model.save_pretrained(base)
    processor.save_pretrained(base)
    given = [f"model.base={base}", "train.checkpoint_every=3", "adapter.dropout=0.1"]

    def adapter(folder):
        return load_file(folder / "adapter.safetensors")

    run(settings(file, tmp_path / "whole", *given, "train.steps=6"))
    config = settings(file, tmp_path / "cut", *given, "train.steps=6")
    run(config)
    for late in (tmp_path / "cut" / "checkpoints").glob("checkpoint-6"):
        for path in sorted(late.rglob("*"), reverse=True):
            path.unlink()
        late.rmdir()
    run(config, resume=True)
    whole, cut = adapter(tmp_path / "whole"), adapter(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[k], cut[k]) for k in whole)


def test_long_records_are_left_out_and_counted(file):
    processor = llava()[1]
    records = read_records(file)
    lengths = sorted(encode(processor, r)["input_ids"].shape[1] for r in records)
    some = Records(processor, records, lengths[0])
    assert len(some) == 1 and some.left_out == 1
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


def test_a_base_that_is_no_such_model_is_named(file, tmp_path):
    with pytest.raises(UserError, match="model.base"):
        run(settings(file, tmp_path / "out", f"model.base={tmp_path}"))


def test_the_device_is_the_one_asked_for_or_cuda_or_the_cpu(file, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto", mps=False).type == "cpu"
    assert resolve_device("auto").type == "mps"
    with pytest.raises(UserError, match='model.device = "cuda": this machine'):
        run(settings(file, tmp_path / "out", "model.device=cuda"))
