"""The processes of one run: what they share, and how the end of one ends all.

Under ``accelerate launch`` every process runs the whole recipe on its own part of each batch. The
first one alone reads photos and writes files; the others are handed what it read. A single process
is the usual case, and then nothing here does anything.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from nora_diffusion.config import UserError
from nora_diffusion.train.common import TrainingDiverged

Result = TypeVar("Result")
Strategy = Literal["ddp", "fsdp", "zero2"]

NAMES: dict[Strategy, str] = {"ddp": "DDP", "fsdp": "FSDP", "zero2": "ZeRO-2"}
SIGNALS = ("SIGINT", "SIGTERM")
TIMEOUT = timedelta(hours=1)
"""Longest wait for another process: the first may be drawing class images meanwhile. One that is
gone is noticed at once; only a machine that vanishes without closing its connections takes this."""
FAREWELL = timedelta(seconds=10)
"""Longest wait for the first process to say that it is the one to tell of a failure."""
_BROKEN = ("Connection closed", "Connection reset", "Broken pipe", "Timed out")
"""What gloo says in a plain RuntimeError when a process at the other end is gone."""


class ProcessLost(UserError):
    """Another process of the run has gone: killed, out of memory, or ended by an error."""


class FailedInFirst(Exception):
    """The first process has failed, and tells of it."""


@dataclass(frozen=True)
class Processes:
    """Those that train together, as one of them sees them.

    Attributes:
        rank: number of this process, from 0.
        count: how many there are, on all machines.
        local_rank: number of this process on its machine.
        strategy: what is spread over them besides the batch: nothing, the frozen base, or
            gradients and optimiser state.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    strategy: Strategy = "ddp"

    def __str__(self) -> str:
        """Such as "2 processes (FSDP)"."""
        return f"{self.count} processes ({NAMES[self.strategy]})"

    @property
    def first(self) -> bool:
        """Whether this is the process that reads, writes and speaks."""
        return self.rank == 0

    @property
    def part(self) -> tuple[int, int]:
        """Which part of every batch is this process's, as ``LossOptions.part``."""
        return self.rank, self.count

    @property
    def shards(self) -> int:
        """Into how many parts the frozen base is split."""
        return self.count if self.strategy == "fsdp" else 1

    def from_first(self, make: Callable[[], Result]) -> Result:
        """What ``make`` returns in the first process, the only one to call it.

        Raises:
            FailedInFirst: in the others, when it failed; the first raises the error itself.
        """
        if self.count == 1:
            return make()
        if not self.first:
            done, result = self._broadcast(None)
            if not done:
                raise FailedInFirst
            return result
        try:
            result = make()
        except BaseException:
            with suppress(RuntimeError):  # of a process that is gone: this error is the first
                self._broadcast((False, None))
            raise
        self._broadcast((True, result))
        return result

    def check_same(self, key: str, value: object) -> None:
        """Refuse to train together on what differs.

        Raises:
            UserError: in the process that has another value than the first.
        """
        if self.from_first(lambda: value) != value:
            raise UserError(f"{key}: not the same as in the first process; give all the same")

    def agree(self, loss: float, stopped_by: str | None) -> tuple[float, str | None]:
        """Mean loss of all processes, and the signal that any of them was sent, or None."""
        if self.count == 1:
            return loss, stopped_by
        values = [loss, *(float(name == stopped_by) for name in SIGNALS)]
        told = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(told)
        signals = [name for name, sent in zip(SIGNALS, told[1:].tolist(), strict=True) if sent]
        return float(told[0]) / self.count, signals[0] if signals else None

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by its mean over the processes, all in one message."""
        if self.count == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients[0].is_cuda:
            self.wait()  # NCCL would wait for a process that is gone; gloo notices
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.count
        means = flat.split([gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Put the first process's values into tensors of the same shapes."""
        for tensor in tensors if self.count > 1 else ():
            value = tensor.detach().contiguous()
            dist.broadcast(value, src=0)
            tensor.detach().copy_(value)

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.all_reduce(torch.zeros(1))  # on the CPU, so by gloo

    @contextmanager
    def together(self, how_to_go_on: Callable[[], str]) -> Iterator[None]:
        """End all processes when one fails, with one message for a failure that all share.

        Args:
            how_to_go_on: a sentence for the message where a process is lost.

        Raises:
            ProcessLost: when another process has gone.
            SystemExit: in a process that has nothing to say.
        """
        if self.count == 1:
            yield
            return
        try:
            with self.losses_named(how_to_go_on):
                yield
        except BaseException as error:
            _ignore_signals()  # the launcher stops the rest as soon as one has ended
            if self.first:
                self._bid_farewell()
                raise
            if isinstance(error, FailedInFirst | TrainingDiverged | KeyboardInterrupt):
                self._hears_farewell()
                raise SystemExit(1) from None
            if isinstance(error, ProcessLost):
                # Where the first is gone without a word, one on each machine speaks.
                if self._hears_farewell() or (self.rank > 1 and self.local_rank > 0):
                    raise SystemExit(1) from None
            elif isinstance(error, UserError):
                raise UserError(f"process {self.rank + 1} of {self.count}: {error}") from error
            raise

    @contextmanager
    def losses_named(self, how_to_go_on: Callable[[], str]) -> Iterator[None]:
        """Say it in words where messages to another process break off; see ``together``."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not _is_broken_connection(error):
                raise
            raise ProcessLost(
                f"another process of this run has gone ({self.count} there were): killed, out of "
                f"memory, or ended by an error of its own, which it told above; {how_to_go_on()}"
            ) from error

    def _broadcast(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def _bid_farewell(self) -> None:
        """Let the others know that this one tells of the failure."""
        for rank in range(1, self.count):
            try:
                sent = dist.isend(torch.zeros(1), dst=rank)
                if sent is not None:
                    sent.wait(timedelta(seconds=1))
            except RuntimeError:  # it is gone, or has failed by itself
                continue

    def _hears_farewell(self) -> bool:
        """Wait for the first process's word; False when that is gone without one."""
        try:
            received = dist.irecv(torch.zeros(1), src=0)
            if received is not None:
                received.wait(FAREWELL)
        except RuntimeError:
            return False
        return True


ALONE = Processes()


def join() -> Processes:
    """Join the processes that a launcher has started; a process on its own is just that.

    Raises:
        UserError: when there are more processes than GPUs.
    """
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys():
        return ALONE
    local_rank = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.is_available()
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"accelerate launch: this machine has {torch.cuda.device_count()} GPUs for "
            f"{os.environ.get('LOCAL_WORLD_SIZE', 'more')} processes; lower --num_processes, or "
            "set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    if not dist.is_initialized():
        from accelerate import PartialState

        # Else transformers would give all processes but the first a text encoder without weights.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        if on_gpu:
            torch.cuda.set_device(local_rank)
        # Both: tensors on the GPU go by NCCL, all that is said besides by gloo.
        backend = "cuda:nccl,cpu:gloo" if on_gpu else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
        PartialState(cpu=not on_gpu)  # of accelerate, for what its launcher asked for
        atexit.register(dist.destroy_process_group)
        if dist.get_rank() > 0:
            warnings.simplefilter("ignore")  # the first process gives the same
    return Processes(dist.get_rank(), dist.get_world_size(), local_rank, _strategy())


def _strategy() -> Strategy:
    def chosen(name: str) -> bool:
        return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"

    if chosen("FSDP"):
        return "fsdp"
    return "zero2" if chosen("DEEPSPEED") else "ddp"


def _is_broken_connection(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _BROKEN)


def _ignore_signals() -> None:
    if threading.current_thread() is threading.main_thread():
        for name in SIGNALS:
            signal.signal(getattr(signal, name), signal.SIG_IGN)
