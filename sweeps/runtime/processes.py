"""Processes that are started once a sweep and kept: trials of one CPU worker run in them, and all else.

Ray Tune's own processes come and go: of several that are free it keeps one, and each new one would import torch,
transformers and DeepSpeed for seconds and load the model again. So Tune's are small, and hand the work to these.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from sweeps.runtime.output import output_to, print_trace
from sweeps.runtime.placement import Workers

Answer = tuple[bool, Any]
"""Whether it is what the work returned, which comes last, and what it reported or returned."""


def nothing(*_told: object) -> None:
    """The hook of a caller that has none."""


class Processes:
    """The kept processes, of which each has what one worker of a trial has. One that is lost is started again."""

    def __init__(self, workers: Workers, count: int) -> None:
        actor = ray.remote(num_cpus=workers.cpus, num_gpus=workers.gpus, max_restarts=-1)(_Process)
        self.handles: list[ActorHandle] = [actor.remote(workers.cpus) for _ in range(count)]
        self._free = list(range(count))
        self._starting: dict[int, ray.ObjectRef] = {}

    def take(self) -> int | None:
        """The index of a free one, which is taken until it is given back; None where none is free and there."""
        for index, started in [*self._starting.items()]:
            if ray.wait([started], timeout=0)[0]:
                del self._starting[index]
                try:
                    ray.get(started)
                except RayError:  # lost again
                    self.give_back(index, lost=True)
                else:
                    self._free.append(index)
        return self._free.pop(0) if self._free else None

    def give_back(self, index: int, *, lost: bool = False) -> None:
        """Its work has ended; where the process is lost it is taken again when another has been started for it."""
        if lost:
            self._starting[index] = self.handles[index].started.remote()
        else:
            self._free.append(index)

    def restart(self, index: int) -> None:
        """End the process of work that nobody waits for any more, and give it back."""
        ray.kill(self.handles[index], no_restart=False)
        self.give_back(index, lost=True)

    def started(self, others_s: float) -> list[ActorHandle]:
        """Those that are there, as soon as one is, and `others_s` seconds later at most: a node may have been lost."""
        starting = [handle.started.remote() for handle in self.handles]
        ray.wait(starting)
        there, _ = ray.wait(starting, num_returns=len(starting), timeout=others_s)
        return [handle for handle, start in zip(self.handles, starting, strict=True) if start in there]

    def end(self) -> None:
        """End them all."""
        for handle in self.handles:
            ray.kill(handle)


def call(
    process: ActorHandle,
    run_dir: Path,
    log: str,
    work: Callable,
    *arguments: Any,
    on_report: Callable[[Any], None] = nothing,
) -> Any:
    """What `work(*arguments, report)` returns in a process, whose output goes to `logs/<log>.log` meanwhile.

    Args:
        on_report: takes what the work gives to its `report`, as it comes.

    Raises:
        RayError: the process was lost.
        Exception: what the work raised.
    """
    answers: Iterator[Any] = process.call.options(num_returns="streaming").remote(run_dir, log, work, arguments)
    try:
        for answer in answers:
            returned, value = ray.get(answer)
            if returned:
                return value
            on_report(value)
    except RayTaskError as error:
        raise error.cause from None  # its trace is in the log
    raise RuntimeError("a kept process ended its work without an answer")


class _Process:
    """One of them. What it runs has so many threads."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        from cbtrain.utils.environment import quiet_libraries

        quiet_libraries()
        from cbtrain.training import loop  # noqa: F401  all that a trial needs, before the first of them is there

    def started(self) -> None:
        """Returns once the process is there."""

    def call(self, run_dir: Path, log: str, work: Callable, arguments: Sequence[Any]) -> Iterator[Answer]:
        said: queue.SimpleQueue[tuple[bool, Any, BaseException | None]] = queue.SimpleQueue()

        def worked() -> None:
            import torch

            torch.set_num_threads(self._threads)  # a thread has a number of its own
            try:
                said.put((True, work(*arguments, lambda value: said.put((False, value, None))), None))
            except BaseException as error:
                print_trace()  # Ray tells the caller, and the log's reader nothing
                said.put((True, None, error))

        with output_to(run_dir, log):
            threading.Thread(target=worked, daemon=True).start()
            returned = False
            while not returned:
                returned, value, error = said.get()
                if error is not None:
                    raise error
                yield returned, value
