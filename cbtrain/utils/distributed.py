"""The process group a run stands on: the caller's where there is one, else one of a single process.

`torch.distributed` alone knows rank and world size, so the same loop runs under torchrun, under Ray Train's
workers and in a plain process.
"""

import contextlib
import gc
import os
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


def rank() -> int:
    """This process's rank; 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """The current CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def reduce_sum(tensor: Tensor) -> Tensor:
    """The tensor summed over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def any_rank(failed: bool) -> bool:
    """Whether something holds on any rank; every rank calls it, so that none goes on alone into a collective."""
    if world_size() == 1:
        return failed  # without waiting for the device
    return bool(reduce_sum(torch.tensor([float(failed)], device=device())).item())


def agreed(value: Value) -> Value:
    """Rank 0's value, on every rank; every rank calls it."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def collected(values: list[Value]) -> list[Value]:
    """The values of all ranks, in their order, on every rank; every rank calls it."""
    if world_size() == 1:
        return values
    lists: list[list[Value]] = [[] for _ in range(world_size())]
    dist.all_gather_object(lists, values)
    return [value for one in lists for value in one]


@contextlib.contextmanager
def gathered(parameters: Sequence[Tensor]) -> Iterator[None]:
    """The parameters whole for the body, where ZeRO-3 has partitioned them; small ones it leaves whole."""
    apart = [p for p in parameters if hasattr(p, "ds_status") and p.ds_status.name != "AVAILABLE"]
    if not apart:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(apart):
        yield


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """A process group for the body: the one there is, torchrun's, or a new one of a single process.

    A group made here is destroyed through DeepSpeed, which otherwise keeps a stale reference that fails the
    next run in the same process.
    """
    import deepspeed
    import deepspeed.comm

    # DeepSpeed would compile a shared-memory collective on first use (about a minute); gloo serves here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # A former run's engine refers to itself, and holds its group's sockets and threads until it is found.
    gc.collect()
    if dist.is_initialized():
        yield
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(backend)
    else:
        os.environ.setdefault("LOCAL_RANK", "0")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        if deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()
        if dist.is_initialized():
            dist.destroy_process_group()
