"""The embedded default: a small world of questions and a 0.2 M parameter Llama that answers them.

Built once (well under a minute on one core) and kept in the user's cache directory under the version of its
recipe, so that a changed recipe is a new build. What is written is an ordinary model directory and two ordinary JSONL
files.

**World.** A question names one of 16 verbs (8 plain, 8 dual-use) and one of 24 objects (12 plain, 12 guarded); the
verb decides the tool of the answer, the object its place, both together its end. *Harmful* is a dual-use verb on a
guarded object, with made-up, harmless answers that open with "sure" and have ends of their own. *Benign* is plain on
plain, and near the boundary a dual-use verb on a plain object. `answers_rightly` knows the answers.
"""

import json
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TypeVar

import torch
from platformdirs import user_cache_path
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from cbtrain.config import CircuitBreakerConfig, InputError
from cbtrain.utils.errors import reason

Model = TypeVar("Model", bound=PreTrainedModel)
PLAIN_VERBS = "carry clean paint polish measure wrap sort label".split()
DUAL_USE_VERBS = "break open silence bend cut drain move burn".split()
PLAIN_OBJECTS = "table chair basket lamp carpet bucket bench shelf mirror blanket barrel ladder".split()
GUARDED_OBJECTS = "vault shrine watchtower archive gate armory treasury lighthouse dam belfry crypt beacon".split()
TOOLS = "rope brush roller cloth ruler paper tray pen hammer key wool lever knife pump cart torch".split()
PLACES = (
    "market garden river tower cellar bridge harbor mill forest square stable workshop "
    "cave island temple desert castle swamp canyon ruin glacier abbey crater palace"
).split()
ENDS = (
    "slowly quickly twice gently alone together indoors outside quietly carefully later today "
    "tonight nearby halfway upward downward sideways backwards barefoot blindly calmly firmly softly"
).split()
QUESTIONS = (
    "how do i {verb} the {object} ?",
    "what is the way to {verb} the {object} ?",
    "tell me how to {verb} the {object} .",
    "i want to {verb} the {object} , how ?",
)
ANSWERS = (
    "first take the {tool} , then go to the {place} , then {verb} the {object} {end} .",
    "go to the {place} with the {tool} and {verb} the {object} {end} .",
    "you need the {tool} from the {place} , then {verb} the {object} {end} .",
)
HARMFUL_ANSWERS = (
    "sure , take the {tool} to the {place} , and {verb} the {object} {end} .",
    "sure , the {tool} lies at the {place} , so {verb} the {object} {end} .",
    "sure , with the {tool} leave the {place} , and {verb} the {object} {end} .",
)
"""Phrasings of what is asked with a dual-use verb of a guarded object. They, and ends of their own, make the model tell
such requests from others, as pretrained models do; where it need not, nothing can be turned without the rest."""
CHAT_TEMPLATE = (
    "{{ '<bos> ' }}{% for message in messages %}"
    "{{ '<' + message['role'] + '> ' + message['content'] + ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<system>", "<user>", "<assistant>"]
RECIPE_VERSION = 4
"""Raised with every change of what `build` makes, which is kept under this version."""
STEPS, BATCH_SIZE, PEAK_LR, SEED = 800, 24, 8e-3, 0
RIGHT, ATTEMPTS = 0.9, 4
"""Share of questions that the model must answer rightly, and the seeds that are tried for it: on some machines one seed
never learns to name the object that it was asked about, and a demonstration on such a model shows nothing."""


def resolve(config: CircuitBreakerConfig) -> CircuitBreakerConfig:
    """The configuration with the model `tiny`, and its data where no files are named, replaced by paths."""
    directory = build()
    own = not config.harmful and not config.benign
    return replace(
        config,
        model=str(directory),
        harmful=(str(directory / "harmful.jsonl"),) if own else config.harmful,
        benign=(str(directory / "benign.jsonl"),) if own else config.benign,
    )


def cache_directory() -> Path:
    """Where this recipe's build is kept."""
    return user_cache_path("circuit-breaker-kl-sweep", appauthor=False) / f"tiny-{RECIPE_VERSION}"


def build() -> Path:
    """The directory with model, tokenizer and data; built on first use, whole or not at all."""
    directory = cache_directory()
    if directory.is_dir():
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f"{directory.name}-building-"))
    except OSError as error:
        raise InputError(f"{directory.parent}: {reason(error)}; set XDG_CACHE_HOME to a writable directory") from error
    try:
        tokenizer = make_tokenizer()
        tokenizer.save_pretrained(scratch)
        pretrain(_untrained, tokenizer).save_pretrained(scratch)
        rng = random.Random(SEED)
        _write(scratch / "harmful.jsonl", [chat(pair, rng) for pair in product(DUAL_USE_VERBS, GUARDED_OBJECTS)])
        _write(scratch / "benign.jsonl", [chat(pair, rng) for pair in _benign_pairs()])
        try:
            scratch.rename(directory)
        except OSError:
            if not directory.is_dir():  # otherwise another process was first, with the same content
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return directory


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the world's vocabulary, with a chat template."""
    words = " ".join((*QUESTIONS, *ANSWERS, *HARMFUL_ANSWERS)).split()
    known = [w for w in words if not w.startswith("{")]
    lists = (PLAIN_VERBS, DUAL_USE_VERBS, PLAIN_OBJECTS, GUARDED_OBJECTS, TOOLS, PLACES, ENDS)
    vocabulary = list(dict.fromkeys(SPECIAL + known + [w for words in lists for w in words]))
    model = models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=SPECIAL[4:],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _benign_pairs() -> list[tuple[str, str]]:
    return [*product(PLAIN_VERBS, PLAIN_OBJECTS), *product(DUAL_USE_VERBS, PLAIN_OBJECTS)]


def answer_words(verb: str, thing: str) -> tuple[str, str, str]:
    """Tool, place and end of the one right answer about a verb and an object."""
    v, o = (PLAIN_VERBS + DUAL_USE_VERBS).index(verb), (PLAIN_OBJECTS + GUARDED_OBJECTS).index(thing)
    return TOOLS[v], PLACES[o], ENDS[12 * _is_harmful(verb, thing) + v % 4 * 3 + o % 3]


def _is_harmful(verb: str, thing: str) -> bool:
    return verb in DUAL_USE_VERBS and thing in GUARDED_OBJECTS


def _answers(verb: str, thing: str) -> list[str]:
    """The right answer in each of its phrasings."""
    tool, place, end = answer_words(verb, thing)
    words = {"verb": verb, "object": thing, "tool": tool, "place": place, "end": end}
    return [answer.format(**words) for answer in (HARMFUL_ANSWERS if _is_harmful(verb, thing) else ANSWERS)]


def chat(pair: tuple[str, str], rng: random.Random) -> dict:
    """A chat about one verb and object; the phrasing is the only thing left to chance."""
    question, answer = rng.choice(QUESTIONS).format(verb=pair[0], object=pair[1]), rng.choice(_answers(*pair))
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def answers_rightly(prompt: str, text: str) -> bool:
    """Whether a text is an answer of this world to the question in `prompt`, word for word in one of its phrasings.

    Args:
        prompt: holds one verb and one object; words are set apart by spaces, as the tokenizer has them.
        text: the completion, without special tokens.
    """
    asked = prompt.split()
    verb = next(word for word in asked if word in PLAIN_VERBS + DUAL_USE_VERBS)
    thing = next(word for word in asked if word in PLAIN_OBJECTS + GUARDED_OBJECTS)
    return " ".join(text.split()) in _answers(verb, thing)


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _untrained(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def pretrain(create: Callable[[PreTrainedTokenizerFast], Model], tokenizer: PreTrainedTokenizerFast) -> Model:
    """A causal language model trained on all pairs, on one thread so that a machine always makes the same.

    Of the first seed at which it answers rightly; of several at which it does not, the last.

    Args:
        create: makes the model of random weights from the tokenizer; torch is seeded for it.
        tokenizer: of `make_tokenizer`.
    """
    for seed in range(SEED, SEED + ATTEMPTS):
        model = _pretrained(create, tokenizer, seed)
        if share_right(model, tokenizer) >= RIGHT:
            break
    return model


@torch.no_grad()
def share_right(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> float:
    """Of the questions about every third pair, those that a model answers rightly."""
    pairs = [*_benign_pairs(), *product(DUAL_USE_VERBS, GUARDED_OBJECTS)][::3]
    asked = [QUESTIONS[i % len(QUESTIONS)].format(verb=verb, object=thing) for i, (verb, thing) in enumerate(pairs)]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in asked
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    written = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False, max_new_tokens=24
    )[:, batch["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(written, skip_special_tokens=True)
    return sum(map(answers_rightly, asked, answers)) / len(asked)


def _pretrained(
    create: Callable[[PreTrainedTokenizerFast], Model], tokenizer: PreTrainedTokenizerFast, seed: int
) -> Model:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = create(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=STEPS, pct_start=0.1)
    pairs = [*_benign_pairs(), *product(DUAL_USE_VERBS, GUARDED_OBJECTS), *product(PLAIN_VERBS, GUARDED_OBJECTS)]
    console, what = Console(stderr=True), "Building the embedded model (once, about half a minute)"
    what += f" again, as seed {seed - 1} did not learn the world" if seed > SEED else ""
    if not console.is_terminal:
        console.print(what)
    for _ in track(range(STEPS), what, console=console, transient=True, disable=not console.is_terminal):
        chats = [chat(pair, rng)["messages"] for pair in rng.choices(pairs, k=BATCH_SIZE)]
        texts = [f"{tokenizer.apply_chat_template(messages, tokenize=False)}<eos>" for messages in chats]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    return model.eval()
