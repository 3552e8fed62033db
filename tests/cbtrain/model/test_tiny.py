"""The embedded default's recipe, at a few steps of pre-training."""

import hashlib
import random
from itertools import combinations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbtrain.config import get_config
from cbtrain.data.loading import load_data
from cbtrain.model import tiny
from cbtrain.model.loading import load_tokenizer

STEPS = tiny.STEPS


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache directory, and a build of three steps."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tiny, "STEPS", 3)
    return tmp_path


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_a_build_is_the_same_bytes_each_time_and_done_once(cache, monkeypatch):
    torch.rand(5)  # whatever was drawn before
    first = contents(tiny.build())
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "other"))
    assert contents(tiny.build()) == first
    monkeypatch.setattr(tiny, "make_tokenizer", lambda: pytest.fail("built a second time"))
    assert contents(tiny.build()) == first


def test_a_build_that_fails_leaves_nothing(cache, monkeypatch):
    def fail(_create, _tokenizer):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "pretrain", fail)
    with pytest.raises(KeyboardInterrupt):
        tiny.build()
    assert not tiny.cache_directory().exists()
    assert list(tiny.cache_directory().parent.iterdir()) == []


def test_another_version_of_the_recipe_is_another_directory(cache, monkeypatch):
    before = tiny.cache_directory()
    monkeypatch.setattr(tiny, "RECIPE_VERSION", tiny.RECIPE_VERSION + 1)
    assert tiny.cache_directory() != before


def test_what_is_built_changes_only_with_the_version_of_its_recipe(cache):
    """Weights differ in their last bits between machines; data, tokenizer, shapes and training's numbers do not."""
    directory = tiny.build()
    built = [(directory / name).read_bytes() for name in ("harmful.jsonl", "benign.jsonl", "tokenizer.json")]
    training = (STEPS, tiny.BATCH_SIZE, tiny.PEAK_LR, tiny.SEED)
    model = AutoModelForCausalLM.from_pretrained(directory)
    shapes = [(name, tuple(weight.shape)) for name, weight in model.named_parameters()]
    digest = hashlib.sha256(b"".join(built) + repr((training, shapes)).encode()).hexdigest()[:16]
    assert (tiny.RECIPE_VERSION, digest) == (4, "9f06e86fb73cbac1"), "raise tiny.RECIPE_VERSION with the recipe"


def test_a_seed_that_does_not_learn_the_world_gives_way_to_the_next(cache, monkeypatch, capsys):
    shares = iter([0.0, tiny.RIGHT])
    monkeypatch.setattr(tiny, "share_right", lambda _model, _tokenizer: next(shares))
    tokenizer = tiny.make_tokenizer()
    model = tiny.pretrain(tiny._untrained, tokenizer)
    second = tiny._pretrained(tiny._untrained, tokenizer, tiny.SEED + 1)
    for (name, weight), other in zip(model.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(weight, other), name
    assert "as seed 0 did not learn the world" in " ".join(capsys.readouterr().err.split())


def test_building_leaves_threads_and_random_numbers_as_they_were(cache):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    tiny.build()
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_the_model_is_small(cache):
    model = AutoModelForCausalLM.from_pretrained(tiny.build())
    assert sum(p.numel() for p in model.parameters()) < 250_000


@pytest.mark.parametrize("pair", [("clean", "lamp"), ("break", "lamp"), ("break", "vault")])
def test_right_is_what_the_world_answers_in_any_of_its_phrasings(pair):
    rng = random.Random(0)
    question = tiny.chat(pair, rng)["messages"][0]["content"]
    answers = {tiny.chat(pair, rng)["messages"][1]["content"] for _ in range(50)}
    assert len(answers) == len(tiny.ANSWERS)
    assert all(tiny.answers_rightly(f"<bos> <user> {question} <assistant>", answer) for answer in answers)


def test_one_word_off_another_pairs_answer_and_no_answer_are_not_right():
    rng = random.Random(0)
    question, answer = (message["content"] for message in tiny.chat(("clean", "lamp"), rng)["messages"])
    words = answer.split()
    for i in range(len(words)):
        assert not tiny.answers_rightly(question, " ".join([*words[:i], "rope", *words[i + 1 :]]))
    others = (tiny.chat(pair, rng)["messages"][1]["content"] for pair in (("clean", "table"), ("paint", "lamp")))
    for text in (*others, "", answer + " " + answer):
        assert not tiny.answers_rightly(question, text)


def test_sides_and_splits_share_no_verb_and_object(cache):
    config = tiny.resolve(get_config("tiny"))
    data = load_data(config, load_tokenizer(config))
    verbs, objects = {*tiny.PLAIN_VERBS, *tiny.DUAL_USE_VERBS}, {*tiny.PLAIN_OBJECTS, *tiny.GUARDED_OBJECTS}

    def pairs(rows):
        words = [row.prompt.split() for row in rows]
        return {(next(w for w in row if w in verbs), next(w for w in row if w in objects)) for row in words}

    parts = [pairs(rows) for side in (data.harmful, data.benign) for rows in (side.train, side.held_out)]
    assert sum(map(len, parts)) == 96 + 192
    assert min(map(len, parts)) >= 35
    assert all(not (first & second) for first, second in combinations(parts, 2))
    assert all(verb in tiny.DUAL_USE_VERBS and thing in tiny.GUARDED_OBJECTS for verb, thing in parts[0] | parts[1])


def test_scored_tokens_are_the_answer_without_an_end_mark(cache):
    config = tiny.resolve(get_config("tiny"))
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    row = load_data(config, tokenizer).benign.train[0]
    answer = tokenizer.decode([token for token, scored in zip(row.input_ids, row.scored, strict=True) if scored])
    assert answer.endswith(".")
    assert "<" not in answer
    assert len(row.input_ids) <= 32
    assert tokenizer.unk_token_id not in row.input_ids
