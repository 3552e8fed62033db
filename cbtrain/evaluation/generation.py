"""Greedy completions of prompts given as tokens, in batches padded on the left."""

from collections.abc import Callable, Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel

from cbtrain.utils import distributed


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    prompts: Sequence[tuple[int, ...]],
    *,
    max_new_tokens: int,
    batch_size: int,
    pad_token_id: int,
    progress: Callable[[int], None] = lambda _done: None,
) -> list[tuple[int, ...]]:
    """The likeliest next tokens of each prompt, one after the other, up to the end of text, which is left out.

    Args:
        model: in eval mode; of what its own generation settings say only the end of text is heeded.
        prompts: token ids of each, at least one.
        max_new_tokens: at most so many for each.
        progress: called with the number of prompts just done.
    """
    ends = _ends(model)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=pad_token_id, eos_token_id=sorted(ends) or None
    )
    # Prompts of like length together: each costs as much as the longest beside it.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    completions: dict[int, tuple[int, ...]] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        length = max(len(prompts[index]) for index in chosen)
        padding = [length - len(prompts[index]) for index in chosen]
        ids = [[pad_token_id] * pad + list(prompts[i]) for i, pad in zip(chosen, padding, strict=True)]
        mask = [[0] * pad + [1] * (length - pad) for pad in padding]
        output = model.generate(
            input_ids=torch.tensor(ids, device=distributed.device()),
            attention_mask=torch.tensor(mask, device=distributed.device()),
            generation_config=settings,
        )
        for index, row in zip(chosen, output[:, length:].tolist(), strict=True):
            completions[index] = _before_end(row, ends)
        progress(len(chosen))
    return [completions[index] for index in range(len(prompts))]


def _ends(model: PreTrainedModel) -> set[int]:
    """Tokens that end a text: chat models have several."""
    named = model.generation_config.eos_token_id
    named = model.config.get_text_config().eos_token_id if named is None else named
    return set(named if isinstance(named, list) else [named]) - {None}


def _before_end(ids: Sequence[int], ends: set[int]) -> tuple[int, ...]:
    stop = next((position for position, token in enumerate(ids) if token in ends), len(ids))
    return tuple(ids[:stop])
