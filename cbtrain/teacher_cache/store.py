"""The teacher cache: the frozen teacher's states of every row, computed once and read by every trial.

`<directory>/<fingerprint>/<sha256 of the file's bytes>.safetensors`. A shard's name is its checksum and its metadata
lists its rows, so no manifest can be wrong. What is finished is kept when a builder is killed, two builders can at
worst write the same rows twice, a damaged shard has a name that its bytes do not have, and another row, mask or set of
layers is simply not there. Readers map shards into memory and copy the rows they ask for.
"""

import functools
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cbtrain.data.batches import TeacherStates, TokenBatch, collate
from cbtrain.data.tokenization import TokenRow
from cbtrain.teacher_cache.wanted_states import WantedStates
from cbtrain.utils import distributed
from cbtrain.utils.environment import say_once
from cbtrain.utils.files import checksum, stamp, write_whole

SHARD_BYTES = 64 * 2**20
Run = Callable[[TokenBatch, tuple[int, ...], bool], TeacherStates]
"""The teacher on a batch: (batch, layers, final) to the states at its scored positions, on any device."""

_SHARD = re.compile(r"[0-9a-f]{64}\.safetensors")


def bytes_there(directory: Path) -> int:
    """Bytes of all shards in a cache directory, whatever teacher they are of, while others may add or delete some."""
    total = 0
    for path in directory.glob("*/*.safetensors"):
        with suppress(OSError):
            total += path.stat().st_size
    return total


class TeacherCache:
    """The shards of one teacher: which rows they hold, and their states.

    `missing`, `build` and `states` go by the shards that were there when `open` was last called; on a local disk,
    shards that vanish afterwards can still be read.
    """

    def __init__(self, directory: Path, fingerprint: str) -> None:
        self.directory = directory / fingerprint
        self.rows_computed = 0
        """By `build`, all ranks together, in `teacher_s` seconds of the teacher."""
        self.teacher_s = 0.0
        self._places: dict[str, _Place] = {}
        self.open()

    @property
    def rows(self) -> int:
        """Rows held."""
        return len(self._places)

    def open(self) -> None:
        """List and map the shards anew, and delete damaged ones; each is read in full once a process.

        Raises:
            OSError: a shard cannot be read.
        """
        self._places = {}
        for path in sorted(path for path in self.directory.glob("*") if _SHARD.fullmatch(path.name)):
            try:
                size, *times = stamp(path)
                if not _is_whole(path, size, *times):
                    raise ValueError("its bytes are not those it was named after")
                self._places |= _map_shard(path)
            except FileNotFoundError:
                continue  # another process found it damaged too
            except (ValueError, LookupError, TypeError, SafetensorError):
                say_once(f"teacher cache: {path} is damaged; its rows are computed again")
                with suppress(OSError):
                    path.unlink()

    def missing(self, wanted: Sequence[WantedStates]) -> list[WantedStates]:
        """Those not held."""
        return [each for each in wanted if each.key not in self._places]

    def build(
        self,
        wanted: Sequence[WantedStates],
        run: Run,
        *,
        batch_size: int,
        pad_token_id: int,
        progress: Callable[[int], None] | None = None,
        rank: int = 0,
        world_size: int = 1,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Run the teacher on the missing rows, write their states and open the cache anew.

        With several ranks each writes a share, which the others see when they `open` next. Every rank calls `run`
        equally often and on the same kind of batch, as under ZeRO-3 it is a collective; for that the ranks must have
        opened the same shards, so none may begin to build before all have opened. A rank that cannot write goes
        on to call `run`, and raises at the end.

        Args:
            progress: called after each turn with the rows that all ranks finished in it.
            shard_bytes: a shard is written once it has as many.

        Raises:
            OSError: the disk is full, a quota or limit is reached; what this rank wrote is removed.
        """
        writer = _ShardWriter(self.directory, shard_bytes)
        for turn in _turns(self.missing(wanted), batch_size, world_size):
            # A rank without a batch of its own repeats another's and drops what it gives.
            batch = turn[rank] if rank < len(turn) else turn[0]
            started = time.perf_counter()
            states = run(collate([each.row for each in batch], pad_token_id), batch[0].layers, batch[0].final)
            states = states.to("cpu")
            self.teacher_s += time.perf_counter() - started
            self.rows_computed += sum(len(each) for each in turn)
            if rank < len(turn):
                writer.add(batch, states)
            if writer.failure and world_size == 1:
                break  # no other rank waits in `run`
            if progress:
                progress(sum(len(each) for each in turn))
        writer.flush()
        if writer.failure:
            raise writer.failure
        self.open()

    def states(self, rows: Sequence[TokenRow], layers: Sequence[int], final: bool) -> TeacherStates:
        """Copies of rows' states on the CPU, in their order: hidden [N, K, H] and, with `final`, final [M, H].

        Raises:
            LookupError: a row is not held.
        """
        places = [self._place(WantedStates(row, tuple(layers), final)) for row in rows]
        hidden = torch.cat([place.hidden() for place in places])
        return TeacherStates(hidden, torch.cat([place.final() for place in places]) if final else None)

    def attach(self, batch: TokenBatch, layers: Sequence[int], final: bool) -> TokenBatch:
        """The batch with its rows' states."""
        return replace(batch, teacher=self.states(batch.rows, layers, final))

    def _place(self, wanted: WantedStates) -> "_Place":
        try:
            return self._places[wanted.key]
        except KeyError:
            kind = f"hidden states {list(wanted.layers)}{' and the final state' * wanted.final}"
            raise LookupError(f"{wanted.row.source}: {kind} not in the teacher cache {self.directory}") from None


@dataclass(frozen=True)
class _Place:
    """Where one row lies in its mapped shard."""

    shard: dict[str, Tensor]
    tokens: slice
    predictions: slice

    def hidden(self) -> Tensor:
        return self.shard["hidden"][self.tokens]

    def final(self) -> Tensor:
        return self.shard["final"][self.predictions]


def _map_shard(path: Path) -> dict[str, _Place]:
    """The rows of a shard by key. Its tensors are pages of the file, read when they are touched."""
    with safe_open(path, framework="pt") as file:
        rows = json.loads(file.metadata()["rows"])
        shard = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    places, token, prediction = {}, 0, 0
    for key, tokens, predictions in rows:
        places[key] = _Place(shard, slice(token, token + tokens), slice(prediction, prediction + predictions))
        token, prediction = token + tokens, prediction + predictions
    return places


class _ShardWriter:
    """Gathers rows of one kind into shards. After its first failure it writes nothing, and nothing of it is left."""

    def __init__(self, directory: Path, shard_bytes: int) -> None:
        self.failure: OSError | None = None
        self._directory = directory
        self._shard_bytes = shard_bytes
        self._rows: list[tuple[WantedStates, Tensor, Tensor]] = []
        self._bytes = 0
        self._written: list[Path] = []

    def add(self, batch: Sequence[WantedStates], states: TeacherStates) -> None:
        """Take the states of a batch of one kind, and write what fills a shard."""
        tokens, predictions = zip(*(each.counts for each in batch), strict=True)
        hidden = states.hidden
        final = hidden.new_empty(0, hidden.shape[-1]) if states.final is None else states.final
        expected = (sum(tokens), len(batch[0].layers)), sum(predictions)
        if (hidden.shape[:2], len(final)) != expected:
            raise ValueError(f"teacher gave {tuple(hidden.shape)} and {len(final)} final states for {expected}")
        if self._rows and self._rows[0][0].kind != batch[0].kind:
            self.flush()
        for row in zip(batch, hidden.split(tokens), final.split(predictions), strict=True):
            self._rows.append(row)
            self._bytes += row[1].nbytes + row[2].nbytes
            if self._bytes >= self._shard_bytes:
                self.flush()

    def flush(self) -> None:
        """Write what is gathered as a shard."""
        rows, self._rows, self._bytes = self._rows, [], 0
        if not rows or self.failure:
            return
        tensors = {"hidden": torch.cat([hidden for _, hidden, _ in rows]), "final": torch.cat([f for *_, f in rows])}
        listed = json.dumps([(each.key, *each.counts) for each, *_ in rows])
        data = save(tensors, metadata={"rows": listed})
        path = self._directory / f"{hashlib.sha256(data).hexdigest()}.safetensors"
        try:
            write_whole(path, data)
            self._written.append(path)
        except OSError as error:
            self.failure = error
            for path in self._written:
                path.unlink(missing_ok=True)
            with suppress(OSError):
                self._directory.rmdir()  # where nothing else is in it


def _turns(wanted: Sequence[WantedStates], batch_size: int, world_size: int) -> Iterator[list[list[WantedStates]]]:
    """For each turn a batch for each of the first ranks, all of one kind; short rows together."""
    kinds: dict[tuple, list[WantedStates]] = {}
    for each in wanted:
        kinds.setdefault(each.kind, []).append(each)
    for rows in kinds.values():
        rows.sort(key=lambda each: len(each.row.input_ids))
        batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        yield from (batches[i : i + world_size] for i in range(0, len(batches), world_size))


@functools.cache
def _is_whole(path: Path, *_stamp: int) -> bool:
    """Whether a shard's bytes are those it was named after, read once a process for an unchanged file."""
    return checksum(path) == path.stem


def with_teacher_states(
    batch: TokenBatch, layers: Sequence[int], final: bool, cache: TeacherCache | None
) -> TokenBatch:
    """The batch on the device, with the teacher's states where there is a cache."""
    return (cache.attach(batch, layers, final) if cache else batch).to(distributed.device())
