"""The teacher cache: which rows it holds, reads and asks for; a wrong row is a wrong number."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lookup_teacher import (
    LAYERS,
    WIDTH,
    LookupTeacher,
    assert_holds,
    assert_same,
    build,
    files,
    token_row,
    token_rows,
    wanted,
)

from cbtrain.data.batches import collate
from cbtrain.data.dataset import CircuitBreakerData, SideCounts, SideData
from cbtrain.data.tokenization import TokenRow
from cbtrain.teacher_cache import store
from cbtrain.teacher_cache.store import TeacherCache, bytes_there
from cbtrain.teacher_cache.wanted_states import WantedStates, estimated_bytes, wanted_states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_states_come_back_bit_for_bit_in_their_dtype(tmp_path, dtype):
    run = LookupTeacher(dtype)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-40, torch.finfo(dtype).max], dtype=dtype)
    run.table[:, :6] = odd
    rows = token_rows(20)
    build(TeacherCache(tmp_path, "one"), wanted(rows), run, shard_bytes=1000)
    assert_same(TeacherCache(tmp_path, "one").states(rows, LAYERS, True), run.expected(rows))


@st.composite
def some_rows(draw: st.DrawFn) -> list[TokenRow]:
    texts = draw(st.lists(st.lists(st.integers(0, 90), min_size=1, max_size=9), min_size=1, max_size=12))
    rows = []
    for text in texts:
        scored = draw(st.lists(st.booleans(), min_size=len(text), max_size=len(text)).filter(any))
        rows.append(token_row(text, scored))
    return rows


@settings(max_examples=40, deadline=None)
@given(some_rows(), st.data())
def test_any_rows_in_any_batches_and_shards_are_read_in_any_order(rows, data):
    run, final = LookupTeacher(), data.draw(st.booleans())
    layers = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True))
    asked = data.draw(st.permutations(wanted(rows, layers, final)))
    with tempfile.TemporaryDirectory() as directory:
        cache = TeacherCache(Path(directory), "one")
        sizes = {"batch_size": data.draw(st.integers(1, 5)), "shard_bytes": data.draw(st.sampled_from([1, 700, 10**6]))}
        build(cache, list({each.key: each for each in asked}.values()), run, **sizes)
        assert cache.missing(asked) == []
        for _ in range(3):
            read = data.draw(st.lists(st.sampled_from(rows), min_size=1, max_size=6))
            assert_same(cache.states(read, layers, final), run.expected(read, layers, final))


def test_a_key_is_of_ids_mask_layers_and_final_and_of_nothing_else():
    base = WantedStates(token_row([1, 2, 3]), (1, 2), True)
    others = [
        replace(base, row=token_row([1, 2, 4])),
        replace(base, row=token_row([1, 2])),
        replace(base, row=token_row([2, 1, 3])),
        replace(base, row=token_row([1, 2, 3], [False, False, True])),
        replace(base, layers=(1,)),
        replace(base, layers=(2, 1)),
        replace(base, layers=(12,)),
        replace(base, final=False),
    ]
    assert len({each.key for each in (base, *others)}) == 1 + len(others)
    assert replace(base, row=replace(base.row, prompt="another", source="elsewhere:3")).key == base.key


def test_rows_of_equal_text_and_other_masks_have_states_of_their_own(tmp_path):
    run = LookupTeacher()
    masks = ("0111", "0001", "1010", "0100")
    rows = [token_row([5, 6, 7, 8], [digit == "1" for digit in mask]) for mask in masks]
    build(TeacherCache(tmp_path, "one"), wanted(rows), run)
    for row in rows:
        assert_holds(tmp_path, [row])


def test_a_scored_first_token_has_a_state_and_no_prediction(tmp_path):
    run = LookupTeacher()
    rows = [token_row([4, 5, 6], [True, False, True]), token_row([9, 8], [True, False]), token_row([7, 7, 7])]
    cache = TeacherCache(tmp_path, "one")
    build(cache, wanted(rows), run, shard_bytes=10**6)
    states = cache.states(rows, LAYERS, True)
    assert states.hidden.shape == (2 + 1 + 2, 2, WIDTH)
    assert states.final is not None
    assert states.final.shape == (1 + 0 + 2, WIDTH)
    assert_same(states, run.expected(rows))
    only_first = cache.states(rows[1:2], LAYERS, True)
    assert only_first.final is not None
    assert only_first.final.shape == (0, WIDTH)


def test_what_is_asked_is_what_each_side_needs_each_once_in_the_data_s_order():
    def side(train: list[TokenRow], held_out: list[TokenRow]) -> SideData:
        return SideData(train, held_out, SideCounts(*[0] * 7))

    rows = token_rows(8)
    again = replace(rows[0], source="copy.jsonl:1")
    data = CircuitBreakerData(side([*rows[:2], again], rows[2:4]), side([*rows[4:6], rows[4]], [*rows[6:], rows[0]]))
    asked = wanted_states(data, [1], [1, 2])
    assert [(each.row.input_ids, each.layers, each.final) for each in asked] == [
        *((row.input_ids, (1,), False) for row in rows[:2]),
        *((row.input_ids, (1,), True) for row in rows[2:4]),
        *((row.input_ids, (1, 2), True) for row in (*rows[4:], rows[0])),
    ]


def test_a_complete_cache_runs_nothing_and_one_changed_row_runs_alone(tmp_path):
    rows, run = token_rows(10), LookupTeacher()
    build(TeacherCache(tmp_path, "one"), wanted(rows), run)
    assert sorted(run.rows, key=rows.index) == rows
    changed = [*rows[:4], replace(rows[4], input_ids=(77, *rows[4].input_ids[1:])), *rows[5:]]
    for now, run_again in ((rows, []), (changed, [changed[4]]), (changed, [])):
        run = LookupTeacher()
        build(TeacherCache(tmp_path, "one"), wanted(now), run)
        assert run.rows == run_again
        assert_holds(tmp_path, now)


@pytest.mark.parametrize(("layers", "final"), [((2,), True), ((5, 2), True), (LAYERS, False)])
def test_other_layers_or_kinds_of_the_same_rows_are_missing(tmp_path, layers, final):
    rows, run = token_rows(4), LookupTeacher()
    cache = TeacherCache(tmp_path, "one")
    build(cache, wanted(rows), run)
    assert cache.missing(wanted(rows, layers, final)) == wanted(rows, layers, final)
    build(cache, [*wanted(rows), *wanted(rows, layers, final)], run, shard_bytes=10**6)
    assert_same(cache.states(rows, layers, final), run.expected(rows, layers, final))
    assert_same(cache.states(rows, LAYERS, True), run.expected(rows))
    assert cache.rows == 8


def test_another_identity_shares_nothing(tmp_path):
    rows = token_rows(2)
    build(TeacherCache(tmp_path, "one"), wanted(rows), LookupTeacher())
    assert TeacherCache(tmp_path, "two").missing(wanted(rows)) == wanted(rows)


def test_a_batch_gets_the_states_of_its_own_rows_and_a_row_that_is_not_held_is_named(tmp_path):
    rows, run = token_rows(6), LookupTeacher()
    cache = TeacherCache(tmp_path, "one")
    build(cache, wanted(rows[:5]), run)
    batch = collate(rows[1:4], 0)
    attached = cache.attach(batch, LAYERS, True)
    assert attached.teacher is not None
    assert_same(attached.teacher, run.states(batch, LAYERS, True))
    assert attached.input_ids is batch.input_ids
    with pytest.raises(LookupError, match=r"^rows\.jsonl:6: hidden states \[2, 5\] and the final state not in .*one$"):
        cache.states([rows[0], rows[5]], LAYERS, True)


def test_what_is_read_is_a_copy(tmp_path):
    rows = token_rows(1)
    cache = TeacherCache(tmp_path, "one")
    build(cache, wanted(rows), LookupTeacher())
    cache.states(rows, LAYERS, True).hidden.zero_()
    assert_same(cache.states(rows, LAYERS, True), LookupTeacher().expected(rows))


def test_batches_are_of_one_kind_with_short_rows_together_and_progress_counts_them(tmp_path):
    rows, run, finished = token_rows(20), LookupTeacher(), []
    asked = [*wanted(rows[:7], (1,), False), *wanted(rows[7:], (1, 2), True)]
    build(TeacherCache(tmp_path, "one"), asked, run, batch_size=4, progress=finished.append)
    assert [len(batch.rows) for batch in run.batches] == finished == [4, 3, 4, 4, 4, 1]
    assert run.kinds == [((1,), False)] * 2 + [((1, 2), True)] * 4
    for kind_rows in (run.rows[:7], run.rows[7:]):
        lengths = [len(row.input_ids) for row in kind_rows]
        assert lengths == sorted(lengths)


def test_a_shard_is_written_once_it_is_full(tmp_path):
    rows = token_rows(30)
    largest = max(each.bytes(WIDTH, "float32") for each in wanted(rows))
    build(TeacherCache(tmp_path, "one"), wanted(rows), LookupTeacher(), batch_size=30, shard_bytes=4000)
    by_key = {each.key: each.bytes(WIDTH, "float32") for each in wanted(rows)}
    sizes = sorted(sum(by_key[key] for key in store._map_shard(shard)) for shard in (tmp_path / "one").iterdir())
    assert len(sizes) > 3
    assert all(4000 <= size < 4000 + largest for size in sizes[1:]), sizes


def test_states_that_do_not_fit_the_batch_are_refused(tmp_path):
    def one_layer_too_few(batch, layers, final):
        return LookupTeacher().states(batch, layers[:1], final)

    def one_prediction_too_few(batch, layers, final):
        states = LookupTeacher().states(batch, layers, final)
        return replace(states, final=states.final[1:])

    for wrong in (one_layer_too_few, one_prediction_too_few):
        with pytest.raises(ValueError, match="teacher gave"):
            build(TeacherCache(tmp_path, "one"), wanted(token_rows(2)), wrong)
    assert files(tmp_path) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_is_the_tensors_bytes_and_nearly_the_disk_s(tmp_path, dtype):
    run, rows = LookupTeacher(getattr(torch, dtype), width=256), token_rows(60, longest=40)
    asked = [*wanted(rows[:30], (1,), False), *wanted(rows[30:])]
    cache = TeacherCache(tmp_path, "one")
    build(cache, asked, run, shard_bytes=10**5)
    estimate = estimated_bytes(asked, 256, dtype)
    harmful, benign = cache.states(rows[:30], (1,), False), cache.states(rows[30:], LAYERS, True)
    assert benign.final is not None
    assert estimate == harmful.hidden.nbytes + benign.hidden.nbytes + benign.final.nbytes
    on_disk = bytes_there(tmp_path)
    assert on_disk == sum(path.stat().st_size for path in (tmp_path / "one").iterdir())
    assert 1 < on_disk / estimate < 1.04, (on_disk, estimate)


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def test_reading_maps_the_shards_and_costs_no_memory_for_what_is_not_asked(tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc")
    rows, run = token_rows(40, longest=60), LookupTeacher(width=8192)
    build(TeacherCache(tmp_path, "one"), wanted(rows), run, batch_size=4, shard_bytes=2**24)
    before = anonymous_bytes()
    cache = TeacherCache(tmp_path, "one")
    cache.states(rows[:1], LAYERS, True)
    assert bytes_there(tmp_path) > 50 * 2**20
    assert anonymous_bytes() - before < 0.1 * bytes_there(tmp_path)
