"""The runs of a campaign: Ray finds each a machine, and this keeps the books.

Nothing is kept in memory that a later campaign would miss: run folders, ``summary.csv`` and the
table itself say what is left to do.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import signal
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nora_diffusion.campaign import worker
from nora_diffusion.campaign.subjects import LOG, SubjectRun
from nora_diffusion.campaign.summary import Progress, show_table, start_summary, write_summary
from nora_diffusion.config import UserError

TICK_S = 1.0
TELL_S = 30.0
USER_ERROR = 2  # what nora-dreambooth ends with when another attempt would end the same
INTERRUPTED = 130


@dataclass(frozen=True)
class Options:
    """How a campaign is run.

    Attributes:
        config: CONFIG of ``nora-dreambooth``.
        preset: its ``--preset``, or None.
        out: the folder of all run folders, absolute.
        address: of a Ray cluster; None: Ray on this machine, for the campaign alone.
        cpus: cores a run; Ray limits its threads to that.
        gpus: GPUs a run, also a part of one; None: 1 where there are GPUs, else 0.
        parallel: the most runs at a time; None: what the machines hold.
        retries: further attempts at a run whose process or machine failed.
    """

    config: str
    preset: str | None
    out: Path
    address: str | None
    cpus: float
    gpus: float | None
    parallel: int | None
    retries: int


def run_campaign(runs: Sequence[SubjectRun], options: Options) -> bool:
    """Finish all runs; returns whether every one of them is done.

    Raises:
        UserError: when Ray or its cluster cannot be had, or another campaign works in the folder.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once every run has saved and stopped.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError('nora campaign needs Ray: pip install "nora-diffusion[ray]"')
    options.out.mkdir(parents=True, exist_ok=True)
    with _only_campaign(options.out):
        table = start_summary(runs, options.out)
        left = [one for one in table if one.status == "waiting"]
        subjects = "1 subject" if len(table) == 1 else f"{len(table)} subjects"
        told = f"{subjects}, {len(table) - len(left)} done before"
        _say(f"{told}; logs and {write_summary(table, options.out).name} are in {options.out}")
        if left:
            with _session(options.out) as session, _cluster(options.address) as ray:
                _work(ray, table, left, session, options)
        else:
            _say(show_table(table, options.out))
    return all(one.status == "done" for one in table)


def _work(
    ray: Any, table: list[Progress], left: list[Progress], session: Path, options: Options
) -> None:
    """Hand out the runs, and take in how they end."""
    cpus, gpus = _share(ray, options)
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(worker.attempt)
    waiting = deque(left)
    flying: dict[Any, Progress] = {}
    told = time.monotonic()
    try:
        while waiting or flying:
            while waiting and len(flying) < (options.parallel or len(left)):
                one = waiting.popleft()
                flying[task.remote(_job(one.run, session, options))] = one
            for ref in ray.wait(list(flying), num_returns=1, timeout=TICK_S)[0]:
                one = flying.pop(ref)
                _take_in(one, _outcome(ray, ref), options.retries)
                if one.status == "waiting":
                    waiting.append(one)
                _say(_sentence(one, table))
                write_summary(table, options.out)
            if time.monotonic() - told > TELL_S:
                told = time.monotonic()
                _say(_state(flying.values(), len(waiting)))
    except KeyboardInterrupt:
        session.unlink(missing_ok=True)
        runs = "1 run" if len(flying) == 1 else f"{len(flying)} runs"
        _say(f"\nstopping; waiting for {runs} to save, if begun (Ctrl-C again: do not wait)")
        while flying:
            for ref in ray.wait(list(flying), num_returns=1)[0]:
                _stop(flying.pop(ref), _outcome(ray, ref))
        raise
    finally:
        write_summary(table, options.out)
        _say(show_table(table, options.out))


def _job(run: SubjectRun, session: Path, options: Options) -> worker.Job:
    """The command for a run: the same whether it is to start or to go on."""
    preset = () if options.preset is None else ("--preset", options.preset)
    return worker.Job(
        argv=(options.config, *preset, "--resume", str(run.folder), *run.overrides),
        cwd=Path.cwd(),
        folder=run.folder,
        log=options.out / f"{run.name}{LOG}",
        lock=options.out / f".{run.name}.lock",
        session=session,
    )


def _outcome(ray: Any, ref: Any) -> worker.Attempt:
    """How an attempt ended, also where its Ray worker did not live to tell."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        return worker.Attempt("", 1, 0.0, str(error.cause))
    except ray.exceptions.RayError as error:
        return worker.Attempt("", 1, 0.0, f"its Ray worker died ({type(error).__name__})")


def _take_in(one: Progress, ended: worker.Attempt, retries: int) -> None:
    """Book an attempt while the campaign goes on; the run stays waiting where it gets another."""
    one.attempts += 1
    one.seconds += ended.seconds
    one.message = ended.message or ""
    if ended.code == 0:
        one.status = "done"
        return
    if ended.code is None:
        one.message = (
            f"machine {ended.host} does not see this campaign's folder; it must be on a file "
            "system that all machines share"
        )
    one.failures += 1
    if ended.code in (None, USER_ERROR) or one.failures > retries:
        one.status = "failed"


def _stop(one: Progress, ended: worker.Attempt) -> None:
    """Book an attempt that ended after Ctrl-C."""
    if ended.code is None:  # had not begun
        return
    _take_in(one, ended, retries=0)
    if ended.code == INTERRUPTED:
        one.status = "stopped"


def _sentence(one: Progress, table: Sequence[Progress]) -> str:
    """A line on how an attempt ended."""
    over = sum(other.status != "waiting" for other in table)
    row = one.row()
    ended = f"[{over}/{len(table)}] {one.run.name}:"
    if one.status == "done":
        return f"{ended} done, {row['steps']} steps, loss {row['last_loss']}, {row['seconds']} s"
    what = "failed" if one.status == "failed" else f"attempt {one.attempts} failed, gets another"
    return f"{ended} {what}: {row['message']}"


def _state(flying: Any, waiting: int) -> str:
    """A line on what is going on."""
    steps = [(one.run.name, *one.steps_and_loss()) for one in flying]
    shown = [f"{name} at step {step}" for name, step, _ in steps if step is not None]
    more = f", and {len(shown) - 8} more" if len(shown) > 8 else ""
    idle = waiting + len(steps) - len(shown)
    return f"{', '.join(shown[:8]) or 'no step yet'}{more}; {idle} have not begun to train"


def _share(ray: Any, options: Options) -> tuple[float, float]:
    """Cores and GPUs a run.

    Raises:
        UserError: when no machine can have as many.
    """
    there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = options.gpus
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU", 0) >= 1 for node in there) else 0.0
    if not any(n.get("CPU", 0) >= options.cpus and n.get("GPU", 0) >= gpus for n in there):
        most = "; ".join(f"{n.get('CPU', 0):g} CPUs, {n.get('GPU', 0):g} GPUs" for n in there)
        raise UserError(
            f"--cpus {options.cpus:g} --gpus {gpus:g}: no machine has that for a run; "
            f"there are: {most}"
        )
    return options.cpus, gpus


@contextmanager
def _only_campaign(out: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(out / ".campaign.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"--out {out}: another nora campaign works there; wait for it, or give another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _session(out: Path) -> Iterator[Path]:
    """The file that is there while the campaign goes on; runs save and stop when it is gone."""
    for stale in out.glob(".session-*"):
        stale.unlink(missing_ok=True)
    path = out / f".session-{uuid.uuid4().hex}"
    path.touch()
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Ray, connected.

    Raises:
        UserError: when there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere unasked
    ray: Any = importlib.import_module("ray")
    if address is not None:
        _check_address(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        # Only exit codes and sentences pass through Ray: the smallest store that it takes.
        options |= {"include_dashboard": False, "object_store_memory": 100 * 2**20}
    # Ray makes SIGTERM an exit without a word; here it is to end the campaign as Ctrl-C does.
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address or "local", **options)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
        yield ray
    except (ConnectionError, ray.exceptions.RaySystemError) as error:
        where = "Ray on this machine" if address is None else f"--ray {address}"
        cure = "" if address is None else "; does it ask for a token? Then set RAY_AUTH_MODE=token"
        raise UserError(f"{where}: {error}{cure}") from error
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Refuse HOST:PORT where nobody answers; Ray itself would take minutes to say so.

    Raises:
        UserError: when nobody does.
    """
    parts = re.fullmatch(r"([^/]+):(\d+)", address)
    if parts is None:  # auto, ray://...
        return
    try:
        socket.create_connection((parts[1], int(parts[2])), timeout=5).close()
    except OSError as error:
        raise UserError(
            f"--ray {address}: nobody answers there ({error.strerror or error}); give the address "
            "that ray start has printed on the head machine, or leave --ray out"
        ) from None


def _say(text: str) -> None:
    print(text, flush=True)
