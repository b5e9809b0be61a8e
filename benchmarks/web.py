"""The web app's speed on mini, through the real worker process.

    python benchmarks/web.py [--rounds 5] [--note TEXT]

Measured: the first picture with no worker yet, and with one that has started while somebody wrote a
prompt; four pictures of 64 and of 128 px with the worker warm, of the base and with an adapter, at
the 25 steps that mini's config has; switching between adapters that were used before, and to one
that was not. CPU seconds of the worker stand beside wall seconds: half of them is the least that
two cores need, whatever else the machine is doing. Medians; all rounds are kept.
Writes `benchmarks/results/webui.json`.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from _common import write_result

from nora_diffusion import load_pipeline, save_adapter
from nora_diffusion.adapter import NoraConfig, iter_nora_layers
from webui.paths import DataFolder, new_id
from webui.protocol import Request, Weighted
from webui.sampler import Drawn, Sampler

BASE = Request("mini", "a flower on the beach", n=4, steps=25, guidance=3.0)
AIMS_S = {
    "first_picture_cold": 8.0,
    "four_of_64_px": 2.5,
    "four_of_64_px_adapted": 2.5,
    "four_of_128_px": 5.0,
    "four_of_128_px_adapted": 5.0,
    "switch_to_a_used_adapter": 0.3,
}


def make_adapters(folder: DataFolder, count: int) -> list[Weighted]:
    """Adapters of the layers and ranks that mini's config trains, moved away from their start."""
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]
    targets += ["conv_shortcut", "conv", "conv_in", "conv_out"]
    made = []
    for index in range(count):
        pipe: Any = load_pipeline("mini")
        pipe.unet.add_adapter(NoraConfig(r=32, inner_r=8, target_modules=targets))
        words = ["q_proj", "k_proj", "v_proj", "out_proj"]
        pipe.text_encoder.add_adapter(NoraConfig(r=32, inner_r=8, target_modules=words))
        for model in (pipe.unet, pipe.text_encoder):
            for _, layer in iter_nora_layers(model):
                layer.nora_inner_B["default"].data += 0.01 * (index + 1)
        home = folder.of("adapters", new_id())
        home.mkdir()
        path = save_adapter(pipe, home / "adapter.safetensors", metadata={"base": "mini"})
        made.append(Weighted(path, 1.0, home.name, f"adapter {index}"))
    return made


def timed(sampler: Sampler, request: Request) -> tuple[float, float, Drawn]:
    """Wall seconds of a request, CPU seconds of the worker, and the answer."""
    before = cpu_seconds(sampler)
    begun = time.monotonic()
    drawn = sampler.draw(request)
    return time.monotonic() - begun, cpu_seconds(sampler) - before, drawn


def cpu_seconds(sampler: Sampler) -> float:
    process = sampler._process
    if process is None:
        return 0.0
    times = psutil.Process(process.pid).cpu_times()
    return times.user + times.system


def summarise(rounds: list[tuple[float, float]]) -> dict[str, Any]:
    wall, cpu = zip(*rounds, strict=True)
    return {
        "wall_s": round(statistics.median(wall), 3),
        "cpu_s": round(statistics.median(cpu), 3),
        "rounds_wall_s": [round(value, 3) for value in wall],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--note", default="")
    given = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = DataFolder.open(Path(place) / "data")
        adapters = make_adapters(folder, 3)
        sampler = Sampler(folder)

        def measure(name: str, request: Callable[[int], Request], before: Any = None) -> None:
            rounds = []
            for index in range(given.rounds):
                if before is not None:
                    before()
                rounds.append(timed(sampler, request(index))[:2])
            results[name] = summarise(rounds)
            print(name, results[name], flush=True)

        def prepared() -> None:
            sampler.release()
            sampler.prepare()
            sampler._turns.submit(int).result()  # it has started when its turn is over

        one = replace(BASE, n=1)
        adapted = replace(BASE, adapters=(adapters[0],))
        measure("first_picture_cold", lambda _: one, sampler.release)
        measure("first_picture_after_prompt_was_entered", lambda _: one, prepared)
        measure("four_of_64_px", lambda _: BASE)
        measure("four_of_64_px_adapted", lambda _: adapted)
        measure("four_of_128_px", lambda _: replace(BASE, width_px=128, height_px=128))
        measure("four_of_128_px_adapted", lambda _: replace(adapted, width_px=128, height_px=128))
        quick = replace(BASE, n=1, steps=1)
        first = [
            sampler.draw(replace(quick, adapters=(adapter,))).notes["switching_s"]
            for adapter in adapters[1:]
        ]
        again = [
            sampler.draw(replace(quick, adapters=(adapters[index % 3],))).notes["switching_s"]
            for index in range(3 * given.rounds)
        ]
        results["switch_to_a_new_adapter"] = {"wall_s": statistics.median(first)}
        results["switch_to_a_used_adapter"] = {"wall_s": statistics.median(again)}
        process = sampler._process
        assert process is not None
        results["worker_rss_mb"] = round(psutil.Process(process.pid).memory_info().rss / 1e6)
        sampler.close()
    results["aims_s"] = AIMS_S
    results["missed"] = [name for name, aim in AIMS_S.items() if results[name]["wall_s"] > aim]
    print(write_result("webui", results, given.note))


if __name__ == "__main__":
    main()
