"""Two processes as one: the same adapter, the same resume, one voice, and one end."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nora_diffusion.config import DreamboothConfig, UserError
from nora_diffusion.events import read_events
from nora_diffusion.settings import to_toml
from nora_diffusion.train import dreambooth
from nora_diffusion.train.checkpoint import newest_checkpoint
from nora_diffusion.train.launcher import check_launcher
from nora_diffusion.train.memory import plan_memory
from nora_diffusion.train.outcome import LORA_FILE
from nora_diffusion.train.processes import Processes
from nora_diffusion.train.steps import resolve_steps
from tests.train.conftest import MakeConfig, defaults, made_config
from tests.train.pair import END
from tests.train.test_dreambooth import assert_same, trained

ROOT = Path(__file__).parents[2]
STEPS = 4
PATIENCE_S = 900
"""For a machine with much else to do; nothing here takes a minute by itself."""

EVERYTHING = {
    "train": {
        "gradient_accumulation_steps": 2,
        "ema_decay": 0.9,
        "prior": "base_prediction",
        "lr_schedule": "cosine",
        "offset_noise": 0.1,
    },
    "adapter": {"init": "sigma", "timestep_rank": 1.0},
    "text_encoder": {"train": True},
    "data": {"masks": True, "flip": True, "caption_dropout": 0.3},
}
SAME = {
    "plain": {},
    "class images": {"train": {"prior": "class_images", "prior_images": 2}},
    "everything": EVERYTHING,
}
"""Settings under which two processes do what one does with twice the batch."""


@dataclass
class Job:
    """A command for all processes, and signals they send themselves: rank, call, signal."""

    argv: list[str]
    signals: tuple[tuple[int, int, int], ...] = ()


@dataclass
class Outcome:
    """Of one process: exit code and training calls of each job, and what it printed for each."""

    code: int
    jobs: list[list[int]]
    printed: list[str]
    errors: list[str]


def launch(
    jobs: list[Job], folder: Path, count: int = 2, environment: dict[str, str] | None = None
) -> list[Outcome]:
    """Run jobs in ``count`` processes, with the environment that a launcher would give them."""
    folder.mkdir(exist_ok=True)
    path = folder / "jobs.json"
    path.write_text(json.dumps([vars(job) for job in jobs]))
    processes = []
    for rank in range(count):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        if not rank:
            port = free_port()
        given = {
            **os.environ,
            **{name: str(value) for name, value in own.items()},
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",  # two processes on two cores
            **(environment or {}),
        }
        with open(folder / f"out{rank}", "w") as out, open(folder / f"err{rank}", "w") as err:
            command = [sys.executable, "-m", "tests.train.pair", str(path)]
            processes.append(subprocess.Popen(command, cwd=ROOT, env=given, stdout=out, stderr=err))
    outcomes = []
    for rank, process in enumerate(processes):
        try:
            code = process.wait(timeout=PATIENCE_S)
        finally:
            process.kill()
        told = Path(f"{path}.{rank}")
        lines = told.read_text().splitlines() if told.exists() else []
        outcomes.append(
            Outcome(
                code,
                [json.loads(line) for line in lines],
                (folder / f"out{rank}").read_text().split(END),
                (folder / f"err{rank}").read_text().split(END),
            )
        )
    return outcomes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write(cfg: DreamboothConfig, path: Path) -> str:
    path.write_text(to_toml(cfg))
    return str(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory, subject) -> Path:
    """The subject's photos, one of them with a mask."""
    folder = tmp_path_factory.mktemp("masked")
    for photo in subject.iterdir():
        shutil.copy(photo, folder)
    (folder / "masks").mkdir()
    mask = Image.new("L", (16, 20), 0)
    mask.paste(255, (4, 4, 12, 16))
    mask.save(folder / "masks" / "0.png")
    return folder


@dataclass
class Pair:
    """What one pair of processes has done, and where."""

    folder: Path
    make: MakeConfig
    outcomes: list[Outcome]
    numbers: dict[str, int]

    def codes(self, name: str) -> list[int]:
        return [outcome.jobs[self.numbers[name]][0] for outcome in self.outcomes]

    def said(self, name: str) -> list[str]:
        """Standard error of each process."""
        return [outcome.errors[self.numbers[name]] for outcome in self.outcomes]


@pytest.fixture(scope="module")
def pair(tmp_path_factory, base, photos) -> Pair:
    """One launch for all that can be seen in processes that stay alive: starting them is slow."""
    folder = tmp_path_factory.mktemp("pair")
    jobs: dict[str, Job] = {}

    def make(name: str, **sections) -> DreamboothConfig:
        train = {"steps": STEPS, "batch_size": 1, **sections.pop("train", {})}
        sections["data"] = {"cache": False, **sections.get("data", {})}
        values = {**sections, "train": train, "output": {"dir": str(folder / name)}}
        return made_config(defaults(base, photos, folder), values)

    for name, sections in SAME.items():
        jobs[name] = Job([write(make(name, **sections), folder / f"{name}.toml")])
    dropout = {**EVERYTHING, "adapter": {**EVERYTHING["adapter"], "dropout": 0.2}}
    for name in ("whole", "parts"):
        jobs[name] = Job([write(make(name, **dropout), folder / f"{name}.toml")])
    # A step is four calls in each process: two passes, each for the subject and the prior.
    jobs["parts"].signals = ((1, 4 + 2, signal.SIGTERM),)  # in the second step, to one of them
    resume = ["--resume", str(folder / "parts")]
    jobs["again"] = Job(resume, ((0, 2, signal.SIGINT), (1, 3, signal.SIGINT)))
    jobs["rest"] = Job(resume)
    jobs["unknown key"] = Job([str(folder / "plain.toml"), "--train.stepz", "3"])
    jobs["no photos"] = Job(
        [str(folder / "plain.toml"), "--data.subject", "nowhere", "--output.dir", f"{folder}/none"]
    )
    hot = {"learning_rate": 1e30, "steps": 40, "max_grad_norm": 1e30}
    jobs["diverged"] = Job([write(make("diverged", train=hot), folder / "diverged.toml")])
    outcomes = launch(
        list(jobs.values()), folder / "launch", environment={"NORA_CACHE_DIR": str(folder / "c")}
    )
    for outcome in outcomes:
        assert len(outcome.jobs) == len(jobs), outcome.errors[-1]
    return Pair(folder, make, outcomes, {name: number for number, name in enumerate(jobs)})


@pytest.mark.parametrize("name", SAME)
def test_two_processes_train_what_one_does_with_twice_the_batch(pair, name, monkeypatch):
    monkeypatch.setenv("NORA_CACHE_DIR", str(pair.folder / "c"))
    assert pair.codes(name) == [0, 0]
    sections = SAME[name]
    train = {**sections.get("train", {}), "batch_size": 2}
    cfg = pair.make(f"{name} alone", **{**sections, "train": train})
    alone = trained(dreambooth.run(cfg))
    both = trained(pair.folder / name)
    assert both.keys() == alone.keys()
    for tensor in alone:
        torch.testing.assert_close(both[tensor], alone[tensor], rtol=1e-3, atol=2e-5)
    losses = [
        [event["loss"] for event in read_events(run / "events.jsonl") if event["event"] == "step"]
        for run in (pair.folder / name, pair.folder / f"{name} alone")
    ]
    assert losses[0] and losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_two_resumes_of_two_processes_give_the_bits_of_one_run(pair):
    assert [pair.codes(name)[0] for name in ("whole", "parts", "again", "rest")] == [0, 130, 130, 0]
    parts = [pair.numbers[name] for name in ("parts", "again", "rest")]
    calls = [outcome.jobs[number][1] for outcome in pair.outcomes for number in parts]
    assert calls == 2 * [2 * 4, 4, 4]  # no step is done twice, and both stop after the same
    assert "after step 2" in pair.said("parts")[0] and "2 processes" in pair.said("parts")[0]
    assert_same(trained(pair.folder / "parts"), trained(pair.folder / "whole"))
    saved = [newest_checkpoint(pair.folder / name) for name in ("parts", "whole")]
    assert saved[0] and saved[1] and saved[0].tensors.keys() == saved[1].tensors.keys()
    for kind, tensors in saved[1].tensors.items():
        assert_same(saved[0].tensors[kind], tensors)


def test_only_the_first_process_writes_and_speaks(pair):
    first, other = pair.outcomes
    assert "".join(other.printed).strip() == ""
    # What the imports of the test itself are told does not count: by transformers, bitsandbytes.
    told = ("[transformers]", "kernels-community")
    said = "".join(other.errors).splitlines()
    lines = [line for line in said if not any(own in line for own in told)]
    assert "".join(lines).strip() == ""
    for name in ("plain", "everything"):
        assert first.printed[pair.numbers[name]].count("predicted memory") == 1
        events = read_events(pair.folder / name / "events.jsonl")
        assert [e["step"] for e in events if e["event"] == "step"] == [STEPS]
        assert [e["event"] for e in events].count("done") == 1


def test_the_batch_of_all_processes_is_recorded(pair):
    checkpoint = newest_checkpoint(pair.folder / "everything")
    assert checkpoint and checkpoint.state["processes"] == 2
    card = (pair.folder / "everything" / "README.md").read_text()
    assert "1 × 2 × 2 processes" in card


@pytest.mark.parametrize("name", ["unknown key", "no photos", "diverged"])
def test_an_error_of_all_is_told_once_and_ends_all(pair, name):
    code, other = pair.codes(name)
    assert code == 2 and other != 0
    messages = pair.said(name)
    assert messages[0].count("nora-dreambooth: error: ") == 1 and not messages[1].strip()
    expected = {"unknown key": "train.steps", "no photos": "nowhere", "diverged": "the loss"}
    assert expected[name] in messages[0]
    assert not (pair.folder / "none").exists()


def test_a_run_goes_on_with_as_many_processes_as_it_began(pair):
    with pytest.raises(UserError, match="2 processes.*these are 1.*with 2 processes"):
        dreambooth.run(pair.make("plain"), resume=True)


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_other_and_leaves_a_checkpoint(make_config, tmp_path, victim):
    cfg = make_config(train={"steps": 50, "batch_size": 1, "checkpoint_every": 2})
    job = Job([write(cfg, tmp_path / "c.toml")], ((victim, 4, signal.SIGKILL),))
    outcomes = launch([job], tmp_path / "launch")
    assert outcomes[victim].code == -signal.SIGKILL
    ((code, _),) = outcomes[1 - victim].jobs
    assert code == 2
    message = "".join(outcomes[1 - victim].errors)
    assert re.search(
        r"another process.*has gone.*checkpoints/step-2; continue with: "
        r"nora-dreambooth --resume \S+/run under accelerate launch, with 2",
        message,
    )
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint and checkpoint.step == 2
    if victim:
        *_, saved, last = read_events(tmp_path / "run" / "events.jsonl")
        assert last["event"] == "error" and "has gone" in str(last["message"])
        assert last["time"] - saved["time"] < 60


# ---- what is split, and what the launcher asks for ------------------------------------------


def sharded(strategy: str) -> dict[str, str]:
    """The environment that ``accelerate launch`` makes of configs/accelerate."""
    if strategy == "zero2":
        pytest.importorskip("deepspeed")
        return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
    return {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


SPLIT = {
    "everything": EVERYTHING,
    "checkpointed": {
        "train": {"gradient_checkpointing": True},
        "adapter": {"targets": ["attention", "feed_forward", "convolution"]},
        "sample": {"every": 2},
    },
}
FITTED = {
    "train": {"batch_size": 1, "steps": 1, "learning_rate": 1e-12},
    "adapter": {"init": "gradient"},
    "text_encoder": {"train": True},
}
"""A start that is fitted to the photos, and hardly moved."""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "zero2"])
def test_what_is_split_trains_the_same_and_resumes_to_the_bit(
    tmp_path, base, photos, strategy, monkeypatch
):
    values = defaults(base, photos, tmp_path)

    def config(name: str, **sections) -> str:
        train = {"steps": STEPS, "batch_size": 1, **sections.get("train", {})}
        given = {**sections, "train": train, "output": {"dir": str(tmp_path / name)}}
        return write(made_config(values, given), tmp_path / f"{name}.toml")

    environment = {**sharded(strategy), "NORA_CACHE_DIR": str(tmp_path / "cache")}
    jobs = [Job([config(name, **sections)]) for name, sections in SPLIT.items()]
    jobs.append(Job([config("parts", **EVERYTHING)], ((0, 4 + 1, signal.SIGTERM),)))
    resume = ["--resume", str(tmp_path / "parts")]
    jobs += [Job(resume, ((1, 1, signal.SIGTERM),)), Job(resume), Job([config("fit", **FITTED)])]
    outcomes = launch(jobs, tmp_path / strategy, environment=environment)
    assert [job[0] for job in outcomes[0].jobs] == [0, 0, 130, 130, 0, 0], outcomes[0].errors
    assert {"fsdp": "FSDP", "zero2": "ZeRO-2"}[strategy] in outcomes[0].printed[0]
    assert_same(trained(tmp_path / "parts"), trained(tmp_path / "everything"))

    monkeypatch.setenv("NORA_CACHE_DIR", str(tmp_path / "cache"))
    for name, sections in SPLIT.items():
        train = {"steps": STEPS, **sections["train"], "batch_size": 2}
        given = {**sections, "train": train, "output": {"dir": str(tmp_path / f"{name} alone")}}
        alone = dreambooth.run(made_config(values, given))
        for tensor, value in trained(alone).items():
            torch.testing.assert_close(
                trained(tmp_path / name)[tensor], value, rtol=1e-3, atol=2e-5
            )
        written = [
            {path.relative_to(run) for path in run.rglob("*") if path.is_file()}
            for run in (tmp_path / name, alone)
        ]
        assert written[0] == written[1]
        assert all(
            load_file(tmp_path / name / LORA_FILE)[key].shape == value.shape
            for key, value in load_file(alone / LORA_FILE).items()
        )

    alone = dreambooth.run(made_config(values, {**FITTED, "output": {"dir": f"{tmp_path}/fit1"}}))
    both, starts = trained(tmp_path / "fit"), trained(alone)
    assert any(tensor.endswith("inner_A") for tensor in starts)
    for tensor, value in starts.items():
        if tensor.endswith("inner_A"):  # as directions: signs are free
            found = both[tensor]
            torch.testing.assert_close(found.T @ found, value.T @ value, rtol=0, atol=1e-3)


REFUSED = [
    ({"MIXED_PRECISION": "fp16"}, {}, "ddp", "mixed_precision = fp16.*model.dtype"),
    ({"DYNAMO_BACKEND": "INDUCTOR"}, {}, "ddp", "dynamo_backend.*model.compile"),
    ({"GRADIENT_ACCUMULATION_STEPS": "4"}, {}, "ddp", "gradient_accumulation_steps = 4"),
    ({"USE_MEGATRON_LM": "true"}, {}, "ddp", "use_megatron_lm: not supported"),
    ({"FSDP_VERSION": "1"}, {}, "fsdp", "fsdp_version = 1: set it to 2"),
    ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "fsdp", "train.gradient_checkpointing"),
    ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, {}, "fsdp", "SIZE_BASED_WRAP.*blocks"),
    ({}, {"model": {"quantize": "int8"}}, "fsdp", 'model.quantize = "int8"'),
    ({}, {"model": {"offload": "group"}}, "fsdp", 'model.offload = "group"'),
    ({}, {"model": {"compile": True}}, "fsdp", "model.compile = true"),
    ({}, {"adapter": {"basis": "gradient"}}, "fsdp", 'adapter.basis = "gradient"'),
    ({"DEEPSPEED_ZERO_STAGE": "3"}, {}, "zero2", "zero_stage = 3.*fsdp.yaml"),
    ({"DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, {}, "zero2", "offload_optimizer_device"),
    ({"GRADIENT_CLIPPING": "0.5"}, {}, "zero2", "gradient_clipping = 0.5.*own is 1.0"),
    ({}, {"train": {"optimizer": "adafactor"}}, "zero2", 'optimizer = "adafactor".*adamw'),
    ({}, {"model": {"dtype": "fp16"}}, "zero2", 'model.dtype = "fp16"'),
]


@pytest.mark.parametrize(("told", "sections", "strategy", "message"), REFUSED)
def test_what_the_launcher_asks_for_in_vain_is_refused(
    make_config, monkeypatch, told, sections, strategy, message
):
    cfg, processes = make_config(**sections), Processes(0, 2, 0, strategy)
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setattr("accelerate.utils.is_deepspeed_available", lambda: True)
    check_launcher(make_config(), processes)
    for name, value in told.items():
        monkeypatch.setenv(name if name.startswith("FSDP") else f"ACCELERATE_{name}", value)
    with pytest.raises(UserError, match=message):
        check_launcher(cfg, processes)


def test_deepspeed_is_asked_for_by_name_where_it_is_missing(make_config, monkeypatch):
    monkeypatch.setattr("accelerate.utils.is_deepspeed_available", lambda: False)
    with pytest.raises(UserError, match=r"nora-diffusion\[deepspeed\]"):
        check_launcher(make_config(), Processes(0, 2, 0, "zero2"))


def test_a_split_denoiser_counts_with_its_part(make_config):
    whole, part = plan_memory(make_config()), plan_memory(make_config(), shards=2)
    assert part.weights < whole.weights and part.activations > whole.activations


def test_automatic_steps_count_the_pictures_of_all_processes(make_config):
    cfg = make_config(train={"steps": "auto", "batch_size": 1})
    told = resolve_steps(cfg, 4)[1]
    assert told and "4 pictures a step" in told


# ---- the launcher itself --------------------------------------------------------------------


@pytest.fixture
def accelerate() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """``accelerate launch`` with these arguments in a folder, ended with the test."""
    with ExitStack() as stack:
        yield lambda *arguments, cwd: stack.enter_context(started(*arguments, cwd=cwd))


@contextmanager
def started(*arguments: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        ["accelerate", "launch", *arguments], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()  # which it hands on
        process.wait()


COMMAND = ("--no_python", "nora-dreambooth")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_launcher_that_is_stopped_leaves_a_checkpoint_to_go_on_from(
    make_config, tmp_path, accelerate, number
):
    train = {"steps": 30, "batch_size": 1, "log_every": 1}
    source = write(make_config(train=train), tmp_path / "c.toml")
    config = ("--config_file", str(ROOT / "configs" / "accelerate" / "ddp.yaml"))
    process = accelerate(*config, *COMMAND, source, cwd=tmp_path)
    events = tmp_path / "run" / "events.jsonl"
    wait_for(lambda: any((e["step"] or 0) >= 2 for e in read_events(events)), process)
    process.send_signal(number)
    output = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode != 0
    assert output.count("continue with: nora-dreambooth --resume") == 1, output
    saved = newest_checkpoint(tmp_path / "run")
    assert saved and f"after step {saved.step};" in output
    again = accelerate(*config, *COMMAND, "--resume", str(tmp_path / "run"), cwd=tmp_path)
    output = again.communicate(timeout=PATIENCE_S)[0]
    assert again.returncode == 0, output
    whole = make_config(train=train, output={"dir": str(tmp_path / "whole")})
    launch([Job([write(whole, tmp_path / "whole.toml")])], tmp_path / "launch")
    assert_same(trained(tmp_path / "run"), trained(tmp_path / "whole"))


@pytest.mark.slow
def test_a_process_that_is_killed_under_the_launcher_is_missed(make_config, tmp_path, accelerate):
    train = {"steps": 200, "batch_size": 1, "log_every": 1, "checkpoint_every": 1}
    source = write(make_config(train=train), tmp_path / "c.toml")
    process = accelerate(
        "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", *COMMAND, source,
        cwd=tmp_path,
    )  # fmt: skip
    events = tmp_path / "run" / "events.jsonl"
    wait_for(lambda: any((e["step"] or 0) >= 2 for e in read_events(events)), process)
    of_launcher = psutil.Process(process.pid).children()
    (victim,) = (one for one in of_launcher if one.environ().get("LOCAL_RANK") == "1")
    victim.kill()
    output = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode != 0
    assert re.search(r"another process.*has gone.*continue with: nora-dreambooth --resume", output)
    assert newest_checkpoint(tmp_path / "run")


@pytest.mark.slow
def test_two_launchers_are_two_machines(make_config, tmp_path, accelerate):
    cfg = make_config(train={"batch_size": 1})
    source, port = write(cfg, tmp_path / "c.toml"), str(free_port())
    config = ("--config_file", str(ROOT / "configs" / "accelerate" / "multi_node.yaml"))
    address = ("--main_process_ip", "127.0.0.1", "--main_process_port", port)
    machines = [
        accelerate(
            *config, *address, "--num_processes", "2", "--machine_rank", str(rank), *COMMAND,
            source, cwd=tmp_path,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [machine.communicate(timeout=PATIENCE_S)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert "predicted memory" in outputs[0] and "predicted memory" not in outputs[1]
    alone = make_config(train={"batch_size": 2}, output={"dir": str(tmp_path / "alone")})
    for tensor, value in trained(dreambooth.run(alone)).items():
        torch.testing.assert_close(trained(tmp_path / "run")[tensor], value, rtol=1e-3, atol=2e-5)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
