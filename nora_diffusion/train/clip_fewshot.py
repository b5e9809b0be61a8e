"""Few-shot classification with CLIP, LoRA and NoRA side by side: ``nora vlm``, task few_shot.

The protocol is CLIP-LoRA's (arXiv 2405.18541, section 4): the same settings for every number of
shots and every seed, prompts from one template, cross-entropy over cosines, and no look at the
test pictures before the end of a training run.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from nora_diffusion.adapter import NoraConfig, joint_cores
from nora_diffusion.data.class_folders import Pool, choose_shots, find_classes, read_classes
from nora_diffusion.disk import write_atomically
from nora_diffusion.evaluation.fewshot_table import Row, summary, table
from nora_diffusion.events import EventLog
from nora_diffusion.families.base import resolve_device, resolve_dtype
from nora_diffusion.families.quiet import quiet_peft
from nora_diffusion.run_config import save_config
from nora_diffusion.run_folder import EVENTS, RESULTS
from nora_diffusion.settings import UserError
from nora_diffusion.train.clip_base import ClipBase, check_clip_base, load_clip_base
from nora_diffusion.train.common import lr_factor, nora_config
from nora_diffusion.vision_language_config import VisionLanguageConfig

ADAPTERS = "adapters"
SMALLEST_CROP = 0.7  # side of a random crop, as a share of the picture's


@dataclass(frozen=True)
class Method:
    """An adapter to try: its name in tables, PEFT's configuration of it, its learning rate."""

    name: str
    adapter: PeftConfig
    learning_rate: float


def run(config: VisionLanguageConfig, resume: bool = False) -> Path:
    """Trains every method at every number of shots with every seed, and tests each once.

    Args:
        config: of task few_shot.
        resume: go on with a run that was stopped: finished rows are kept.

    Returns:
        The path of the results.

    Raises:
        UserError: the pictures or the base model cannot be used.
    """
    _check(config)
    base = _base(config)
    train, test = read_pools(config, base.prepare)
    folder = Path(config.output.dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    if not resume:
        save_config(config, folder)
    events = EventLog(folder / EVENTS)
    about = f"{len(train.classes)} classes, {len(train.labels)} pictures to choose from, "
    events.write("start", 0, message=f"{about}{len(test.labels)} to test on")
    try:
        return _run_all(config, base, train, test, folder, events)
    except (KeyboardInterrupt, Exception) as stop:
        stopped = isinstance(stop, KeyboardInterrupt)
        with suppress(OSError):  # the disk may be what has failed
            events.write("stopped" if stopped else "error", message=str(stop) or "stopped")
        raise


def describe(config: VisionLanguageConfig) -> list[str]:
    """What a run would find, for a dry run; nothing is loaded or asked of the hub.

    Raises:
        UserError: on settings or pictures that cannot be used.
    """
    device, classes, choices, tests = _check(config)
    return [
        f"{classes} classes, {choices} pictures to choose from, {tests} to test on, on {device}"
    ]


def _run_all(
    config: VisionLanguageConfig, base: ClipBase, train: Pool, test: Pool, folder: Path,
    events: EventLog,
) -> Path:  # fmt: skip
    """Every row that is not there yet; each is kept as it comes."""
    path = folder / RESULTS
    prompts = base.tokenise([config.few_shot.template.format(name) for name in train.classes])
    zero_shot = accuracy(base, prompts, test)
    done = [Row(**row) for row in json.loads(path.read_text())["rows"]] if path.exists() else []
    wanted = [
        (method, shots, seed)
        for method in methods(config, base)
        for shots in config.few_shot.shots
        for seed in config.few_shot.seeds
    ]
    finished = {(row.method, row.shots, row.seed) for row in done}
    for number, (method, shots, seed) in enumerate(wanted, start=1):
        if (method.name, shots, seed) in finished:
            continue
        few = choose_shots(train, shots, seed)
        keep = folder / ADAPTERS / f"{method.name.replace(' ', '_')}-{shots}-shot-seed-{seed}"
        row, loss = train_one(config, base, method, few, test, prompts, shots, seed, keep)
        done.append(row)
        _write(path, zero_shot, done)
        told = f"{method.name}, {shots} shots, seed {seed}: {row.accuracy:.1%}"
        print(f"[{number}/{len(wanted)}] {told}", flush=True)
        events.write("step", number, loss=loss, lr=method.learning_rate, message=told)
    _write(path, zero_shot, done)
    print(table(zero_shot, done))
    events.write("done", len(wanted), message=f"results in {RESULTS}")
    return path


def _base(config: VisionLanguageConfig) -> ClipBase:
    device = resolve_device(config.model.device, mps=False)
    return load_clip_base(config.model.base, resolve_dtype(config.model.dtype, device), device)


def _check(config: VisionLanguageConfig) -> tuple[torch.device, int, int, int]:
    """Device, classes, pictures to choose from and to test on: what needs no weights and no hub.

    Raises:
        UserError: there is no such device or base, there are no classes, not enough pictures of
            one, or test classes differ.
    """
    device = resolve_device(config.model.device, mps=False)
    check_clip_base(config.model.base)
    few = config.few_shot
    files = find_classes(Path(str(few.images)).expanduser(), "few_shot.images")
    labels = [name for name, paths in files.items() for _ in paths]
    if few.test is not None:
        of_test = find_classes(Path(few.test).expanduser(), "few_shot.test")
        if of_test.keys() != files.keys():
            other = sorted(set(of_test) ^ set(files))
            raise UserError(
                f"few_shot.test = {few.test!r}: its subfolders must be those of few_shot.images; "
                f"only one of the two has: {', '.join(other)}"
            )
        tests = sum(map(len, of_test.values()))
    else:
        labels, tests = labels[::2], len(labels[1::2])
    counts = {name: labels.count(name) for name in files}
    short = min(counts, key=lambda name: counts[name])
    if max(few.shots) > counts[short]:
        raise UserError(
            f"few_shot.shots = {max(few.shots)}: {short!r} has {counts[short]} pictures to choose "
            f"from; give more, or --few_shot.shots up to {counts[short]}"
        )
    return device, len(files), len(labels), tests


def methods(config: VisionLanguageConfig, base: ClipBase) -> list[Method]:
    """NoRA and the LoRA ranks of the config, on the same modules.

    Raises:
        UserError: the base has no attention projections in those towers.
    """
    adapter = config.adapter
    targets = base.targets(adapter.towers)
    if not targets:
        raise UserError(f"adapter.towers = {list(adapter.towers)}: no attention projections there")
    nora = nora_config(adapter, targets)
    few = config.few_shot
    loras = [
        Method(
            f"LoRA r {r}",
            LoraConfig(r=r, lora_alpha=r, lora_dropout=adapter.dropout, target_modules=targets),
            few.lora_learning_rate,
        )
        for r in few.lora_ranks
    ]
    return [Method("NoRA", nora, adapter.learning_rate), *loras]


def read_pools(
    config: VisionLanguageConfig, prepare: Callable[[Sequence[Image.Image]], Tensor]
) -> tuple[Pool, Pool]:
    """The pictures to choose shots from, and those to test on.

    Raises:
        UserError: there are no classes, or a picture is broken.
    """
    few = config.few_shot
    pool = read_classes(Path(str(few.images)).expanduser(), "few_shot.images", prepare)
    if few.test is not None:
        return pool, read_classes(Path(few.test).expanduser(), "few_shot.test", prepare)
    every = range(len(pool.labels))
    return pool.take(every[::2]), pool.take(every[1::2])


def train_one(
    config: VisionLanguageConfig,
    base: ClipBase,
    method: Method,
    few: Pool,
    test: Pool,
    prompts: Tensor,
    shots: int,
    seed: int,
    keep: Path | None = None,
) -> tuple[Row, float]:
    """Trains one adapter on `few`, tests it, takes it off again.

    Args:
        config: gives steps, batch size and optimiser settings.
        base: the model, which is as before afterwards.
        method: the adapter.
        few: the chosen pictures.
        test: looked at once, after the last step.
        prompts: token ids of one prompt a class.
        shots: pictures a class.
        seed: of initial weights, order and crops.
        keep: folder to save the adapter to.

    Returns:
        The outcome, and the mean loss of the last tenth of the steps.
    """
    torch.manual_seed(seed)  # LoRA draws its start from torch's own generator
    adapter = copy(method.adapter)
    if isinstance(adapter, NoraConfig):
        adapter.seed = seed
    with quiet_peft():
        model = get_peft_model(base.model, adapter)  # pyright: ignore[reportArgumentType]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=method.learning_rate, weight_decay=config.train.weight_decay
    )
    steps = min(config.train.steps, config.train.steps_per_shot * shots)
    warmup = min(config.train.lr_warmup_steps, steps // 10)
    generator, losses, begin = torch.Generator().manual_seed(seed), [], time.perf_counter()
    with torch.no_grad():  # the prompts stay where they are unless their tower is adapted
        frozen = None if "language" in config.adapter.towers else base.embed_texts(prompts)
    model.train()
    for step in range(steps):
        index = _next_batch(len(few.labels), config.train.batch_size, step, seed)
        pixels, labels = few.pixels[index], few.labels[index]
        with joint_cores(model):
            images = base.embed_images(augment(pixels, generator))
            texts = base.embed_texts(prompts) if frozen is None else frozen
            logits = base.scale * images @ texts.T
            loss = F.cross_entropy(logits.float(), labels)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.train.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = method.learning_rate * lr_factor(step, "cosine", warmup, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    seconds = time.perf_counter() - begin
    model.eval()
    count = sum(p.numel() for p in trained)
    row = Row(method.name, shots, seed, accuracy(base, prompts, test), count, steps, seconds)
    if keep is not None:
        model.save_pretrained(str(keep))
    model.unload()
    return row, statistics.fmean(losses[-max(1, steps // 10) :])


def _next_batch(n: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Indices of step `step`, from one permutation after another of all `n` pictures."""
    size = min(batch_size, n)
    passed, first = divmod(step * size, n)
    order = []
    while len(order) < first + size:
        generator = torch.Generator().manual_seed(seed * 100_003 + passed)
        order += torch.randperm(n, generator=generator).tolist()
        passed += 1
    return torch.tensor(order[first : first + size])


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops, every second mirrored, of pictures (N, 3, S, S), at their own size."""
    n = len(pixels)
    side = 1 - (1 - SMALLEST_CROP) * torch.rand(n, generator=generator)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = side * torch.where(torch.rand(n, generator=generator) < 0.5, -1, 1)
    theta[:, 1, 1] = side
    theta[:, :, 2] = (2 * torch.rand(n, 2, generator=generator) - 1) * (1 - side)[:, None]
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid.to(pixels), padding_mode="border", align_corners=False)


@torch.no_grad()
def accuracy(base: ClipBase, prompts: Tensor, test: Pool) -> float:
    """Share of `test` whose nearest prompt is that of its class."""
    nearest = (base.features(test.pixels) @ base.embed_texts(prompts).T).argmax(1)
    return float((nearest == test.labels).float().mean())


def _write(path: Path, zero_shot: float, rows: Sequence[Row]) -> None:
    record = {
        "zero_shot": zero_shot,
        "summary": summary(rows),
        "rows": [asdict(row) for row in rows],
    }
    write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())
