"""The process that draws: it keeps the last base model and its adapters loaded.

    python -m webui.worker DATA_FOLDER

Orders come in over stdin and replies go out over stdout (``protocol``). It ends when stdin does.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import queue
import re
import sys
import threading
import time
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from PIL import Image

from nora_diffusion.adapter.blending import fold, remove_adapter, set_weights
from nora_diffusion.adapter.files import AdapterFileError, adapter_info
from nora_diffusion.config import UserError, fill_prompt
from nora_diffusion.denoiser_hooks import load_adapter
from nora_diffusion.families import load_family
from nora_diffusion.families.base import Family, resolve_device, resolve_dtype
from nora_diffusion.families.safety import attach_safety_checker
from nora_diffusion.sampling import sample_prompts, save_png, shown_base
from nora_diffusion.sheets import contact_sheet
from webui.protocol import ORDER, REPLY, SETTINGS_KEY, STOP, Order, Reply, Request, Weighted

ADAPTERS_KEPT = 8


class Stopped(Exception):
    """The request at hand is no longer wanted."""


@dataclass(frozen=True)
class Loaded:
    """An adapter on the base: its name there, and what its file says of it."""

    name: str
    checksum: str
    trigger: str
    class_name: str


class Worker:
    """The base model and adapters at hand, and drawing with them."""

    def __init__(self, root: Path, reply: Any, stop: threading.Event) -> None:
        self.root = root
        self.reply = reply
        self.stop = stop
        self.device = resolve_device("auto")
        self.family: Family | None = None
        self.base = ""
        self.adapters: OrderedDict[tuple[Path, int, int], Loaded] = OrderedDict()
        self.base_loads = self.adapter_loads = 0
        self.switching_s = 0.0

    def draw(self, order: Order) -> Reply:
        """Draw what an order asks for, and write its files.

        Raises:
            UserError: when that cannot be done.
            Stopped: when it was called off.
        """
        begun, request = time.monotonic(), order.request
        for path in (*order.files, *(adapter.path for adapter in request.adapters)):
            self._check_inside(path)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            family = self._load_base(request.base)
            loaded = [self._load(adapter) for adapter in request.adapters]
            self.switching_s = time.monotonic() - begun
            words = (loaded[0].trigger, loaded[0].class_name) if loaded else ("", "")
            prompt = fill_prompt(request.prompt, *words)
            rows: list[list[Image.Image]] = []
            for row, strength in enumerate(request.strengths):
                weights = _weights(request.adapters, loaded, strength)
                with self._at(weights), self._watched(request, row):
                    rows += sample_prompts(
                        family, [prompt], range(request.seed, request.seed + request.n),
                        negative_prompt=request.negative_prompt, steps=request.steps,
                        guidance=request.guidance, width_px=request.width_px,
                        height_px=request.height_px,
                    )  # fmt: skip
        settings = self._write(order, prompt, loaded, rows)
        notes = {
            "device": self.device.type,
            "safety_checker": self.has_checker,
            "warnings": sorted({str(one.message) for one in caught if _for_readers(one)}),
            "base_loads": self.base_loads,
            "adapter_loads": self.adapter_loads,
            "switching_s": round(self.switching_s, 3),
            "seconds": round(time.monotonic() - begun, 2),
        }
        return Reply("drawn", settings=tuple(settings), notes=notes)

    @property
    def has_checker(self) -> bool:
        """Whether the base at hand has a safety checker."""
        pipe = None if self.family is None else self.family.components.pipeline
        return getattr(pipe, "safety_checker", None) is not None

    def _check_inside(self, path: Path) -> None:
        # The app takes paths from its database alone; this is the second lock on the same door.
        real = path.resolve()
        if not any(real.is_relative_to(self.root / part) for part in ("adapters", "pictures")):
            raise UserError("a file outside the data folder is neither read nor written")

    def _load_base(self, base: str) -> Family:
        if self.family is not None and base == self.base:
            return self.family
        self.reply(Reply("progress", text="loading the base model"))
        self.drop()
        dtype = resolve_dtype("auto", self.device)
        self.family = load_family(base, dtype=dtype, device=self.device)
        attach_safety_checker(self.family)
        self.base = base
        self.base_loads += 1
        return self.family

    def drop(self) -> None:
        """Give back the memory of the base and its adapters."""
        self.family, self.base = None, ""
        self.adapters.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _load(self, adapter: Weighted) -> Loaded:
        """An adapter on the base at hand, which may have it already."""
        try:
            state = adapter.path.stat()
        except OSError:
            raise UserError(f"{adapter.name}: its file is gone; choose another adapter") from None
        key = (adapter.path, state.st_mtime_ns, state.st_size)
        if key in self.adapters:
            self.adapters.move_to_end(key)
            return self.adapters[key]
        self.reply(Reply("progress", text=f"loading {adapter.name}"))
        pipe = self._pipe()
        while len(self.adapters) >= ADAPTERS_KEPT:
            remove_adapter(pipe, self.adapters.popitem(last=False)[1].name)
        try:
            loaded = _describe(adapter.path, f"adapter{self.adapter_loads}")
            load_adapter(pipe, adapter.path, loaded.name)
        except AdapterFileError as error:
            text = str(error).replace(str(adapter.path), adapter.name)
            raise UserError(text) from error
        self.adapter_loads += 1
        self.adapters[key] = loaded
        return loaded

    def _pipe(self) -> Any:
        assert self.family is not None
        return self.family.components.pipeline

    @contextmanager
    def _at(self, weights: dict[str, float]) -> Iterator[None]:
        """The adapters at these weights.

        On a CPU inside the base weights: an adapter beside them makes a step of mini half as long
        again. A GPU hides that, and has no memory for the weights twice.
        """
        pipe, begun = self._pipe(), time.monotonic()
        undo = fold(pipe, weights) if self.device.type == "cpu" else set_weights(pipe, weights)
        self.switching_s += time.monotonic() - begun
        try:
            yield
        finally:
            if undo is not None:
                undo()

    @contextmanager
    def _watched(self, request: Request, row: int) -> Iterator[None]:
        """Report progress with every call of the denoiser, and stop there when told to."""
        assert self.family is not None
        calls = 0

        def after(*_: Any) -> None:
            nonlocal calls
            calls += 1
            if self.stop.is_set():
                raise Stopped
            # Some pipelines ask twice a step, and large pictures come in several batches.
            share = min(calls / request.steps, 1.0)
            done = (row + share) / len(request.strengths)
            self.reply(Reply("progress", done=done, text="drawing"))

        handle = self.family.components.denoiser.register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()

    def _write(
        self, order: Order, prompt: str, loaded: Sequence[Loaded], rows: list[list[Image.Image]]
    ) -> list[dict[str, Any]]:
        """Write the pictures and the grid; returns the settings of each."""
        assert self.family is not None
        request = order.request
        common = {
            "prompt": prompt,
            "negative_prompt": request.negative_prompt,
            "steps": request.steps,
            "guidance": request.guidance,
            "width": rows[0][0].width,
            "height": rows[0][0].height,
            "base": shown_base(self.family.components.base),
            "family": self.family.name,
            "safety_checker": "on" if self.has_checker else "none",
        }
        made = [
            (image, {**common, "seed": request.seed + index} | _told(request, loaded, strength))
            for strength, row in zip(request.strengths, rows, strict=True)
            for index, image in enumerate(row)
        ]
        if request.has_sheet:
            first = {**common, "seed": request.seed, "grid": list(request.strengths)}
            made.append((_sheet(request, rows), first | _told(request, loaded, 1.0)))
        for path, (image, settings) in zip(order.files, made, strict=True):
            save_png(image, path, _readable(settings) | {SETTINGS_KEY: json.dumps(settings)})
        return [settings for _, settings in made]


def _weights(
    adapters: Sequence[Weighted], loaded: Sequence[Loaded], strength: float
) -> dict[str, float]:
    weights: dict[str, float] = {}
    for adapter, one in zip(adapters, loaded, strict=True):
        weights[one.name] = weights.get(one.name, 0.0) + adapter.weight * strength
    return {name: weight for name, weight in weights.items() if weight != 0}


def _told(request: Request, loaded: Sequence[Loaded], strength: float) -> dict[str, Any]:
    """The adapters of a picture, as they stand in its settings."""
    adapters = [
        {
            "id": adapter.id,
            "name": adapter.name,
            "weight": adapter.weight * strength,
            "checksum": one.checksum,
        }
        for adapter, one in zip(request.adapters, loaded, strict=True)
    ]
    return {"adapters": adapters}


def _readable(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as text chunks that any program shows."""
    names = [f"{one['name']} ({one['weight']:g})" for one in settings["adapters"]]
    return settings | {"adapters": ", ".join(names) or "none"}


def _sheet(request: Request, rows: list[list[Image.Image]]) -> Image.Image:
    """A row for each seed, a column for each strength."""
    names = " + ".join(adapter.name for adapter in request.adapters)
    pair = request.strengths == (0.0, 1.0)
    labels = ["base", names] if pair else [f"{strength:g}" for strength in request.strengths]
    seeds = [f"seed {request.seed + index}" for index in range(request.n)]
    title = "" if pair else f"strength of {names}"
    if len(seeds) == 1:  # then a column of labels would be wider than the pictures
        title, seeds = ", ".join(filter(None, (title, *seeds))), []
    return contact_sheet([list(row) for row in zip(*rows, strict=True)], seeds, labels, title)


def _describe(path: Path, name: str) -> Loaded:
    try:
        info = adapter_info(path)
    except AdapterFileError:  # of another program: loading it tells whether it is of any use
        return Loaded(name, hashlib.sha256(path.read_bytes()).hexdigest(), "", "")
    words = (str(info.get(key) or "") for key in ("checksum", "trigger", "class_name"))
    return Loaded(name, *words)


def _for_readers(warning: warnings.WarningMessage) -> bool:
    """Whether a warning is this project's: what the libraries warn of is for programmers."""
    return "nora_diffusion" in Path(warning.filename).parts


def answer(worker: Worker, order: Order) -> Reply:
    """Draw, and say in any case how it ended."""
    try:
        return worker.draw(order)
    except Stopped:
        return Reply("stopped")
    except UserError as error:
        # The commands name their flags, which this reader does not have.
        return Reply("refused", text=re.sub(r" \(--[\w-]+\)", "", str(error)))
    except torch.OutOfMemoryError:
        worker.drop()
        text = "the GPU has too little memory for this; draw fewer or smaller pictures"
        return Reply("refused", text=text)
    except Exception as error:
        traceback.print_exc()
        worker.drop()  # it may be half changed
        return Reply("failed", text=f"{type(error).__name__}: {error}")


def read_lines(source: TextIO, orders: queue.SimpleQueue[str], stop: threading.Event) -> None:
    """Take in lines until the app ends, which ends this process in the middle of its work."""
    for line in source:
        if line.strip() == STOP:
            stop.set()
        else:
            stop.clear()
            orders.put(line)
    os._exit(0)


def main() -> None:
    """Answer orders until stdin ends."""
    # What libraries print must not come between the replies.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    orders: queue.SimpleQueue[str] = queue.SimpleQueue()
    stop = threading.Event()
    reader = threading.Thread(target=read_lines, args=(sys.stdin, orders, stop), daemon=True)
    reader.start()

    def reply(message: Reply) -> None:
        replies.write(REPLY.dump_json(message).decode() + "\n")

    worker = Worker(Path(sys.argv[1]).resolve(), reply, stop)
    reply(Reply("ready", notes={"device": worker.device.type}))
    while True:
        reply(answer(worker, ORDER.validate_json(orders.get())))


if __name__ == "__main__":
    main()
