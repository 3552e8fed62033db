"""Completions of prompts given as tokens, greedy or drawn.

Prompts go in batches padded on the left, with the model's own cache, where a model gives so what it gives of a prompt
alone, which is tried. Some do not: a recurrent one may take padding for text, one with learned positions may count it,
and a cache may lack what its model asks of it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from cbtrain.utils import distributed
from cbtrain.utils.environment import say_once

Way = Literal["batches", "one by one", "without a cache"]
TRIED_TOKENS = 12
"""Of a prompt, at most, that a way is tried on."""
TRIED_NEW = 3
"""Tokens generated there: the second is the first that a cache has a part in."""


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    prompts: Sequence[tuple[int, ...]],
    *,
    max_new_tokens: int,
    batch_size: int,
    pad_token_id: int,
    seed: int | None = None,
    progress: Callable[[int], None] = lambda _done: None,
) -> list[tuple[int, ...]]:
    """The next tokens of each prompt, one after the other, up to the end of text, which is left out.

    Args:
        model: in eval mode; of what its own generation settings say only the end of text is heeded.
        prompts: token ids of each, at least one.
        max_new_tokens: at most so many for each.
        seed: of tokens drawn at temperature 1 in place of the likeliest; the generator's state stays as it was.
        progress: called with the number of prompts just done.
    """
    ends = _ends(model)
    way = _way(model, max(prompts, key=len), pad_token_id) if prompts else "batches"
    size = batch_size if way == "batches" else 1
    # Prompts of like length together: each costs as much as the longest beside it.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    completions: dict[int, tuple[int, ...]] = {}
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        asked = [prompts[index] for index in chosen]
        with _drawing(seed if seed is None else seed + start):
            if way == "without a cache":
                rows = [_by_whole_forwards(model, asked[0], max_new_tokens, ends, draw=seed is not None)]
            else:
                rows = _generate(model, asked, max_new_tokens, pad_token_id, ends, draw=seed is not None)
        for index, row in zip(chosen, rows, strict=True):
            completions[index] = _before_end(row, ends)
        progress(len(chosen))
    return [completions[index] for index in range(len(prompts))]


def _way(model: PreTrainedModel, prompt: tuple[int, ...], pad: int) -> Way:
    """The fastest way in which what follows a prompt comes from the model's own logits."""
    long, name = prompt[:TRIED_TOKENS], type(model).__name__
    if _gives_its_logits(model, [long, long[: -(-len(long) // 2)]], pad):
        return "batches"
    if _gives_its_logits(model, [long], pad):
        say_once(f"{name} does not generate in padded batches: prompts are completed one by one")
        return "one by one"
    say_once(f"{name} does not generate with a cache: each token of a completion runs the whole prompt again")
    return "without a cache"


def _gives_its_logits(model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], pad: int) -> bool:
    """Whether generating gives the logits that a plain forward of each whole row gives."""
    logits: list[Tensor] = []
    try:
        rows = _generate(model, prompts, TRIED_NEW, pad, set(), logits)
    except Exception:  # whatever a cache of another build makes of it
        return False
    # Room for what rounding makes of another order of sums, on average over the vocabulary: 0.09 of the logits' spread
    # was seen of a pretrained model in bfloat16. Padding that is read moves logits by their own size.
    tolerance = 1e-3 if model.dtype.itemsize >= 4 else 0.3
    for prompt, row, found in zip(prompts, rows, torch.stack(logits, dim=1).float(), strict=True):
        expected = _logits(model, (*prompt, *row[:-1]))[-TRIED_NEW:]
        error = (found - expected).square().mean(-1).sqrt()
        if not (error <= tolerance * expected.std(-1)).all():
            return False
    return True


def _generate(
    model: PreTrainedModel,
    prompts: Sequence[tuple[int, ...]],
    new: int,
    pad: int,
    ends: set[int],
    logits: list[Tensor] | None = None,
    draw: bool = False,
) -> list[list[int]]:
    """What follows each prompt, padded where one ends before others; `logits` gets [B, V] of each step."""
    length = max(len(prompt) for prompt in prompts)
    padding = [length - len(prompt) for prompt in prompts]
    ids = [[pad] * left + list(prompt) for left, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * left + [1] * (length - left) for left in padding]
    with _without_own_settings(model):
        output = model.generate(
            input_ids=torch.tensor(ids, device=distributed.device()),
            attention_mask=torch.tensor(mask, device=distributed.device()),
            generation_config=GenerationConfig(
                **({"do_sample": True, "top_k": 0} if draw else {"do_sample": False}),
                max_new_tokens=new,
                pad_token_id=pad,
                eos_token_id=sorted(ends) or None,
                output_logits=logits is not None,
                return_dict_in_generate=True,
            ),
        )
    if logits is not None:
        logits.extend(output.logits)
    return output.sequences[:, length:].tolist()


@contextmanager
def _drawing(seed: int | None) -> Iterator[None]:
    """Draw from a generator of its own; with None nothing is drawn."""
    if seed is None:
        yield
        return
    device = distributed.device()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """Take the model's own generation settings away, which would stand in for all that `generate` is not told."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _by_whole_forwards(
    model: PreTrainedModel, prompt: tuple[int, ...], new: int, ends: set[int], *, draw: bool
) -> list[int]:
    """What follows a prompt, each token from a forward of all before it."""
    said: list[int] = []
    while len(said) < new and not ends.intersection(said):
        logits = _logits(model, (*prompt, *said))[-1]
        said.append(int(torch.multinomial(logits.softmax(-1), 1) if draw else logits.argmax()))
    return said


def _logits(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """[S, V] of one row."""
    ids = torch.tensor([tokens], device=distributed.device())
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].float()


def _ends(model: PreTrainedModel) -> set[int]:
    """Tokens that end a text: chat models have several."""
    named = model.generation_config.eos_token_id
    named = model.config.get_text_config().eos_token_id if named is None else named
    return set(named if isinstance(named, list) else [named]) - {None}


def _before_end(ids: Sequence[int], ends: set[int]) -> tuple[int, ...]:
    stop = next((position for position, token in enumerate(ids) if token in ends), len(ids))
    return tuple(ids[:stop])
