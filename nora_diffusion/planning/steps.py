"""What a training step keeps in memory, by running it on the meta device.

Blocks that a model repeats are run two and three times and counted as often as they are there: a
model of a hundred layers takes no longer than one of three.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nora_diffusion.families.base import Family, Framing
from nora_diffusion.families.skeleton import META, tensors_of
from nora_diffusion.targets import Choice
from nora_diffusion.train.live_memory import LiveMemory, bytes_of

_FEWEST = 4
"""Equal blocks in one list that are worth leaving out; an up block of a UNet has three, and needs
them all."""


@dataclass(frozen=True)
class Inputs:
    """What a step is run with.

    Attributes:
        loss: runs forward on the model as it is and returns the loss.
        present: tensors that are there before the step.
        size: in words.
    """

    loss: Callable[[], Tensor]
    present: list[Tensor]
    size: str


@dataclass(frozen=True)
class StepBytes:
    """Bytes of one step, the weights aside.

    Attributes:
        kept: what autograd keeps for the backward pass, at the end of the forward pass.
        peak: most that is there at once, trained gradients aside.
    """

    kept: int
    peak: int

    def plus(self, times: int, more: StepBytes, less: StepBytes) -> StepBytes:
        """Add the difference of two others several times."""
        return StepBytes(
            self.kept + times * (more.kept - less.kept), self.peak + times * (more.peak - less.peak)
        )


def inputs_of(choice: Choice, batch: int, tokens: int, resolution_px: int | None) -> Inputs | str:
    """A step's inputs, or why none can be made for this model."""
    if choice.family is not None:
        return _diffusion_inputs(choice.family, batch, resolution_px)
    model: Any = choice.model
    takes = inspect.signature(model.forward).parameters
    causal = getattr(model, "main_input_name", "") == "input_ids" and "labels" in takes
    if not causal or not model.can_generate() or model.config.is_encoder_decoder:
        return _other_inputs(model, batch, tokens)
    ids = torch.zeros(batch, tokens, dtype=torch.long, device=META)

    def loss() -> Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    return Inputs(loss, [ids], f"batch {batch}, {tokens} tokens, all of them trained on")


def _other_inputs(model: Any, batch: int, tokens: int) -> Inputs | str:
    """Of a transformers model that reads ids or pixels: its whole texts and pictures."""
    made = arguments_of(model, batch, tokens, META)
    if isinstance(made, str):
        return made
    arguments, size = made
    own = "labels" in arguments or "return_loss" in arguments
    size += "" if own else "; the mean of its first output stands in for a loss"

    def loss() -> Tensor:
        found = model(**arguments)
        return found.loss if own else found[0].float().mean()

    return Inputs(loss, [a for a in arguments.values() if isinstance(a, Tensor)], f"batch {size}")


def arguments_of(
    model: Any, batch: int, tokens: int, device: torch.device
) -> tuple[dict[str, Any], str] | str:
    """What a transformers model's forward pass takes, and its size in words; or why it is unknown.

    Texts are no longer than the model's positions. An encoder-decoder writes what it reads, and a
    model that compares texts with pictures does so within the batch.
    """
    takes, config = inspect.signature(model.forward).parameters, model.config
    text = getattr(config, "text_config", config)
    vision = getattr(config, "vision_config", config)
    arguments: dict[str, Any] = {}
    size = str(batch)
    if "input_ids" in takes:
        length = min(tokens, getattr(text, "max_position_embeddings", tokens))
        arguments["input_ids"] = torch.zeros(batch, length, dtype=torch.long, device=device)
        size += f", {length} tokens"
    if "pixel_values" in takes and hasattr(vision, "image_size"):
        side = vision.image_size
        height, width = (side, side) if isinstance(side, int) else side
        shape = (batch, getattr(vision, "num_channels", 3), height, width)
        arguments["pixel_values"] = torch.zeros(shape, dtype=model.dtype, device=device)
        size += f", {height} x {width} px"
    if getattr(model, "main_input_name", "") not in arguments:
        return f"what {type(model).__name__} reads is neither ids of a text nor pixels"
    if config.is_encoder_decoder and "labels" in takes:
        arguments["labels"] = arguments["input_ids"]
        size += " to as many"
    if "return_loss" in takes:
        arguments["return_loss"] = True
    return arguments, size


def run_step(model: nn.Module, inputs: Inputs) -> StepBytes | str:
    """Bytes of a training step of an adapted model, or why they cannot be known."""
    model.train()
    try:
        groups = list(_repeated(model))
        runs = [2 * len(groups), *(2 * len(groups) + 1 for _ in groups)]
        if sum(runs) >= sum(len(group.places) for group in groups):
            return _run(model, inputs)
        with _shortened(groups, None):
            total = few = _run(model, inputs)
        for group in groups:
            with _shortened(groups, group):
                total = total.plus(len(group.places) - 2, _run(model, inputs), few)
    except (RuntimeError, NotImplementedError, IndexError, ValueError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"its step cannot be run without contents ({reason})"
    return total


def _diffusion_inputs(family: Family, batch: int, resolution_px: int | None) -> Inputs:
    side = resolution_px or family.resolution_px
    framing = Framing(original_px=(side, side), crop_px=(0, 0), target_px=(side, side))
    with torch.no_grad(), LiveMemory():  # it answers for values that are not there
        encoded = family.frame(family.encode_prompts(["a photo"] * batch), [framing] * batch)
        latents = family.encode_images(torch.empty(1, 3, side, side, device=META))
        latents = latents.expand(batch, *latents.shape[1:]).contiguous()
    denoiser = family.components.denoiser

    def loss() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return family.loss(denoiser, latents, encoded, generator).mean()

    present = [latents, *tensors_of(encoded)]
    return Inputs(loss, present, f"batch {batch}, {side} x {side} px")


def _run(model: nn.Module, inputs: Inputs) -> StepBytes:
    with LiveMemory() as memory:
        memory.ignore([*model.parameters(), *model.buffers(), *inputs.present])
        loss = inputs.loss()
        kept = memory.live
        loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = bytes_of(p.grad for p in trained if p.grad is not None)
    for parameter in trained:
        parameter.grad = None
    return StepBytes(kept, memory.peak - gradients)


@dataclass(frozen=True)
class _Group:
    """Equal blocks of one list, by their places in it."""

    blocks: nn.ModuleList
    places: list[int]


def _repeated(model: nn.Module) -> Iterator[_Group]:
    """Runs of equal blocks in lists that lie in no other such run."""
    inside: set[nn.Module] = set()
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or module in inside:
            continue
        kinds: dict[Any, list[int]] = {}
        for place, block in enumerate(module):
            shapes = tuple((name, p.shape, p.requires_grad) for name, p in block.named_parameters())
            kinds.setdefault((type(block), shapes), []).append(place)
        for places in kinds.values():
            if len(places) >= _FEWEST:
                inside.update(m for place in places for m in module[place].modules())
                yield _Group(module, places)


@contextmanager
def _shortened(groups: list[_Group], longer: _Group | None) -> Generator[None]:
    """Only the first and last block of each group, and one more of one group."""
    tables = {id(group.blocks): group.blocks.__dict__["_modules"] for group in groups}
    before = {key: dict(table) for key, table in tables.items()}
    left_out: dict[int, set[int]] = {key: set() for key in tables}
    for group in groups:
        left_out[id(group.blocks)].update(group.places[2 if group is longer else 1 : -1])
    try:
        for key, table in tables.items():
            stay = [m for place, m in enumerate(before[key].values()) if place not in left_out[key]]
            table.clear()
            table.update({str(place): module for place, module in enumerate(stay)})
        yield
    finally:
        for key, table in tables.items():
            table.clear()
            table.update(before[key])
