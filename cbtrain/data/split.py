"""The held-out split: by a hash of the prompt, so that a row keeps its part whatever is added beside it."""

import hashlib
import unicodedata
from collections.abc import Collection, Mapping

from cbtrain.config import InputError, flag
from cbtrain.data.formats.rows import SIDES, Side
from cbtrain.data.tokenization import TokenRow


def normalized_prompt(prompt: str) -> str:
    """The prompt as the split compares it: Unicode form, case and white space do not make it another one."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def tokenised_prompt(ids: tuple[int, ...], given: tuple[bool, ...] | None, special: Collection[int]) -> str:
    """The prompt of a row that has no text: a hash of the tokens before the first scored one.

    Where nothing but special tokens stands there, it is the whole row. It does not depend on the mask policy.
    """
    first = given.index(True) if given and any(given) else len(ids)
    prompt = [token for token in ids[:first] if token not in special] or list(ids)
    return "tokens " + hashlib.sha256(" ".join(map(str, prompt)).encode()).hexdigest()


def held_out_prompts(sides: Mapping[Side, list[TokenRow]], eval_fraction: float) -> set[str]:
    """Prompts held out on every side: those whose hash, in [0, 1), lies below `eval_fraction`.

    Where that leaves a side without training or held-out rows, its prompt nearest to the threshold changes place on
    both sides, unless the other side would thereby lose its last one.

    Raises:
        InputError: a side whose rows all have one prompt.
    """
    prompts = {side: {row.prompt for row in rows} for side, rows in sides.items()}
    for side in SIDES:
        if len(prompts[side]) < 2:
            raise InputError(
                f"{flag(side)}: all {len(sides[side]):,} scored rows have the same user prompt; training and held-out "
                "rows need a prompt each, so give at least two"
            )
    distance = {prompt: _unit_hash(prompt) - eval_fraction for side in SIDES for prompt in prompts[side]}
    held_out = {prompt for prompt in distance if distance[prompt] < 0}
    for side in SIDES:
        own = prompts[side]
        if own & held_out and own - held_out:
            continue
        parts = [part for s in SIDES for part in (prompts[s] & held_out, prompts[s] - held_out)]
        lone = {prompt for part in parts if len(part) == 1 for prompt in part}
        held_out ^= {min(own - lone, key=lambda prompt: (abs(distance[prompt]), prompt))}
    return held_out


def _unit_hash(text: str) -> float:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
