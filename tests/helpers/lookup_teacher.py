"""A teacher whose states are looked up by the tokens so far, so that a wrong row is a wrong number; and its cache."""

import multiprocessing
from collections.abc import Sequence
from pathlib import Path

import torch

from cbtrain.data.batches import TeacherStates, TokenBatch, collate
from cbtrain.data.tokenization import TokenRow
from cbtrain.teacher_cache.store import TeacherCache
from cbtrain.teacher_cache.wanted_states import WantedStates

WIDTH = 16
LAYERS = (2, 5)
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["cbtrain.teacher_cache.store"])


class LookupTeacher:
    """State of a layer at a token: a row of a table, chosen by the sum of the ids up to it."""

    def __init__(self, dtype: torch.dtype = torch.float32, width: int = WIDTH) -> None:
        self.table = torch.randn(997, width, generator=torch.Generator().manual_seed(0)).to(dtype)
        self.batches: list[TokenBatch] = []
        self.kinds: list[tuple[tuple[int, ...], bool]] = []

    @property
    def rows(self) -> list[TokenRow]:
        """Rows run, as often as they were run."""
        return [row for batch in self.batches for row in batch.rows]

    def __call__(self, batch: TokenBatch, layers: tuple[int, ...], final: bool) -> TeacherStates:
        self.batches.append(batch)
        self.kinds.append((layers, final))
        return self.states(batch, layers, final)

    def states(self, batch: TokenBatch, layers: Sequence[int], final: bool) -> TeacherStates:
        so_far = batch.input_ids.cumsum(1).flatten()
        hidden = [self.table[(so_far[batch.scored_tokens] + 31 * layer) % 997] for layer in layers]
        return TeacherStates(
            torch.stack(hidden, 1), self.table[(so_far[batch.scored_predictions] + 17) % 997] if final else None
        )

    def expected(self, rows: Sequence[TokenRow], layers: Sequence[int] = LAYERS, final: bool = True) -> TeacherStates:
        """States of rows, each run alone."""
        alone = [self.states(collate([row], 0), layers, final) for row in rows]
        finals = [states.final for states in alone if states.final is not None]
        return TeacherStates(torch.cat([states.hidden for states in alone]), torch.cat(finals) if final else None)


def token_row(ids: Sequence[int], scored: Sequence[bool] | None = None, source: str = "rows.jsonl:1") -> TokenRow:
    mask = tuple(scored) if scored is not None else (False, *(True for _ in ids[1:]))
    return TokenRow(tuple(ids), mask, "prompt", source)


def token_rows(count: int, first: int = 0, longest: int = 12) -> list[TokenRow]:
    """Distinct rows of different lengths, the first half of each unscored."""
    rows = []
    for i in range(first, first + count):
        length = 3 + i * 7 % (longest - 2)
        ids = [i + 1, *((i * 13 + j * 5) % 90 for j in range(length - 1))]
        rows.append(token_row(ids, [j >= length // 2 for j in range(length)], f"rows.jsonl:{i + 1}"))
    return rows


def wanted(rows: Sequence[TokenRow], layers: Sequence[int] = LAYERS, final: bool = True) -> list[WantedStates]:
    return [WantedStates(row, tuple(layers), final) for row in rows]


def build(cache: TeacherCache, asked: Sequence[WantedStates], run, **changes) -> None:
    """One row a shard and three rows a batch, but for `changes`."""
    cache.build(asked, run, **{"batch_size": 3, "pad_token_id": 0, "shard_bytes": 1} | changes)


def assert_same(ours: TeacherStates, theirs: TeacherStates) -> None:
    """Bit for bit, whatever the bits mean."""
    for a, b in ((ours.hidden, theirs.hidden), (ours.final, theirs.final)):
        if b is None:
            assert a is None
            continue
        assert a is not None
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def assert_holds(directory: Path, rows: Sequence[TokenRow], identity: str = "one") -> None:
    """A reader that comes anew finds the right states of all rows."""
    assert_same(TeacherCache(directory, identity).states(rows, LAYERS, True), LookupTeacher().expected(rows))


def files(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file() and p.name != "lock")
