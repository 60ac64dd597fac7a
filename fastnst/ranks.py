"""The processes that torchrun started, and what they agree on; alone, all of it does nothing and needs no torch."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastnst.runtime import in_words, resolve_device

if TYPE_CHECKING:
    import torch


class RankFailed(ValueError):
    """What failed on one rank, as all of them know."""


class RankLost(RuntimeError):
    """The ranks cannot go on together; ``here`` is true on the rank whose error it was."""

    def __init__(self, message: str, here: bool = False) -> None:
        super().__init__(message)
        self.here = here


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started, each with a device of its own; alone, all of this does nothing.

    Small things (flags, Python values) go by way of the CPU, so that asking each other at every step does not wait for a GPU.
    """

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """The one rank that writes, logs and prints."""
        return self.rank == 0

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is up on any rank."""
        if self.size == 1:
            return list(flags)
        import torch
        import torch.distributed

        raised = torch.tensor(flags, dtype=torch.uint8)
        torch.distributed.all_reduce(raised, torch.distributed.ReduceOp.MAX)
        return raised.bool().tolist()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` added up over the ranks."""
        if self.size > 1:
            import torch.distributed

            torch.distributed.all_reduce(values)
        return values

    def from_main(self, value: Any) -> Any:
        """What the main rank has for ``value``."""
        return self.gather(value if self.main else None)[0]

    def gather(self, value: Any) -> list[Any]:
        """The ``value`` of every rank, on every rank."""
        if self.size == 1:
            return [value]
        import torch.distributed

        values = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def average_gradients(self, network: torch.nn.Module) -> torch.nn.Module:
        """``network`` so wrapped that a backward pass through it leaves the mean gradient of the ranks in each of them."""
        if self.size == 1:
            return network
        from torch.nn.parallel import DistributedDataParallel

        device = next(network.parameters()).device
        return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)

    def averaging(self, module: torch.nn.Module, now: bool) -> contextlib.AbstractContextManager:
        """Around a forward and backward pass: gradients are averaged over the ranks only ``now``, else added up at home."""
        return contextlib.nullcontext() if now or self.size == 1 else module.no_sync()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run the block on the main rank and then on the others; an error on one of them is an error on all, none is left waiting."""
        if self.size == 1:
            yield
            return
        error = None
        if not self.main:
            first = self.from_main(None)
            if first is not None:
                raise RankFailed(first)
        try:
            yield
        except Exception as mine:
            error = mine
        if self.main:
            self.from_main(None if error is None else in_words(error))
            if error is not None:
                raise error
        errors = self.gather(None if error is None else f"rank {self.rank} on {socket.gethostname()}: {in_words(error)}")
        if any(errors):
            raise RankFailed(next(filter(None, errors))) from error

    @contextlib.contextmanager
    def apart(self, agreed: type[Exception]) -> Iterator[None]:
        """A block in which an error of one rank leaves the others waiting: it ends the run. ``agreed`` errors are those of all ranks."""
        try:
            yield
        except agreed:
            raise
        except Exception as error:
            if self.size == 1:
                raise
            import torch.distributed

            if isinstance(error, torch.distributed.DistError) or "gloo" in str(error) or "NCCL" in str(error):
                lost = f"rank {self.rank} has lost another rank, whose error stands beside this one"
                raise RankLost(f"{lost}; the same command goes on from the last saved state") from error
            raise RankLost(f"rank {self.rank} on {socket.gethostname()}: {in_words(error)}", here=True) from error


@contextlib.contextmanager
def join_ranks(name: str) -> Iterator[tuple[Ranks, str]]:
    """The ranks that torchrun started, and the name of the device of this one; without torchrun, a single rank, no torch, the same name."""
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if size == 1:
        yield Ranks(), name
        return
    import torch
    import torch.distributed

    device = resolve_device(name)
    if device.type == "cuda":
        index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if device.index is not None or index >= count:
            started = os.environ.get("LOCAL_WORLD_SIZE")
            raise ValueError(f"--device {device}: torchrun starts {started} processes here, on {count} GPUs; use --device cuda and --nproc-per-node={count} at most")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise ValueError(f"--device {device}: several processes can share the work on CUDA or the CPU only; start one without torchrun")
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    ranks = Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
    try:
        yield ranks, str(device)
        torch.distributed.barrier()  # leave together, as torchrun ends all when the first leaves with an exit code; after an error the others may be gone
    finally:
        torch.distributed.destroy_process_group()
