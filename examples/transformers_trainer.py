"""transformers' Trainer: mini's text encoder learns to tell where a prompt's subject is."""

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from nora_diffusion import NoraConfig, load_pipeline

PLACES = ["on the beach", "in the snow", "on a wooden table"]
THINGS = "dog cat flower apple car house fish bird chair ball tree cup".split()


class Classifier(nn.Module):  # as the Trainer wants it: loss and logits from named inputs
    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, len(PLACES))

    def forward(self, input_ids, labels):
        logits = self.head(self.encoder(input_ids).last_hidden_state.mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


torch.manual_seed(0)
pipe = load_pipeline("mini")
pipe.text_encoder.requires_grad_(False).add_adapter(NoraConfig(target_modules="attention"))
rows = [(thing, place) for thing in THINGS for place in range(len(PLACES))]
texts = [f"a {thing} {PLACES[place]}" for thing, place in rows]
ids = pipe.tokenizer(texts, padding="max_length", max_length=16, truncation=True)["input_ids"]
data = [{"input_ids": i, "labels": label} for i, (_, label) in zip(ids, rows, strict=True)]
trainer = Trainer(
    Classifier(pipe.text_encoder),
    TrainingArguments("trainer", max_steps=40, learning_rate=3e-3, report_to="none", use_cpu=True),
    train_dataset=data[:-9],
    eval_dataset=data[-9:],  # three things that were not in the training data
    compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(1) == p.label_ids).mean()},
)
before, _, after = trainer.evaluate(), trainer.train(), trainer.evaluate()
print(f"accuracy {before['eval_accuracy']:.2f} -> {after['eval_accuracy']:.2f}")
