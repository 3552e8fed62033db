"""The adapted model taken apart, so that a pass computes what the losses read and nothing else.

A pass ends at the highest layer asked for, and blocks below the first adapted one run once, without gradient, for
both views. Works for any decoder whose blocks pass one hidden state from each to the next, which is tried on a few
tokens against the model's own forward; any other runs whole, with `output_hidden_states=True`.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from cbtrain.config import InputError
from cbtrain.data.batches import TeacherStates, TokenBatch
from cbtrain.model.lm_head import Head
from cbtrain.model.lora import decoder_blocks, teacher_view
from cbtrain.model.refusal import blocks_of, check_states, refused_by_name
from cbtrain.utils.environment import say_once


@dataclass(frozen=True)
class _Entry:
    """What the model makes of its inputs before the first block."""

    hidden: Tensor
    calls: list[tuple[tuple, dict[str, Any]]]
    """Each block's other arguments: masks, positions."""


class Decoder:
    """Both views of one adapted model.

    Args:
        model: whole (not yet partitioned by ZeRO), where it will run: its weights are needed to try it.
        hidden_states: `output_hidden_states` has every pass run whole.

    Raises:
        InputError: it is no causal decoder, its logits are not what a linear head makes of its last hidden state, its
            hidden states are not [B, S, H], or trying it fails.
    """

    def __init__(self, model: PeftModel, hidden_states: Literal["early_exit", "output_hidden_states"]) -> None:
        self.model = model
        self._base = model.get_base_model()
        with refused_by_name(self._base):
            path, blocks = decoder_blocks(self._base) or ("", nn.ModuleList())
            self._decoder = _decoder_of(self._base, path, blocks)
            self._blocks = list(blocks)
            adapted = [any(p.requires_grad for p in block.parameters()) for block in self._blocks]
            self._first_adapted = adapted.index(True) if any(adapted) else len(adapted)
            self.layers: int = blocks_of(self._base)
            """Number N of decoder blocks."""
            sample = _sample(self._base.device)
            with teacher_view(model):
                _check_causal(self._base, sample)
                check_states(self._base, self._run_whole(sample).values(), sample["input_ids"])
                self.head = Head.of(self._base, self._decoder, sample)
                self._norm = _final_norm(self._decoder, sample)
                self._beside = _values_beside(self._decoder, self._blocks, sample)
                self.early_exit = hidden_states == "early_exit" and self._can_run_by_blocks(sample)
            self._check_gradient(sample)

    def _check_gradient(self, sample: dict[str, Any]) -> None:
        """Refuse a model whose last hidden state gives adapted weights no gradient, as one with its own backward."""
        trained = any(parameter.requires_grad for parameter in self._base.parameters())
        with torch.enable_grad():
            if trained and not self._run_whole(sample)[self.layers].requires_grad:
                raise InputError(f"--model: {type(self._base).__name__} passes no gradient to an adapter on its blocks")

    def states(
        self, batch: TokenBatch, layers: Sequence[int], *, final: bool, final_gradient: bool = True
    ) -> tuple[TeacherStates, TeacherStates]:
        """Both views of a batch at its scored positions.

        Args:
            batch: on the model's device; the teacher's states that it brings are taken and not computed.
            layers: indices into Hugging Face `hidden_states`: 0 is the embedding, k the output of block k − 1, and
                N, the last, comes after the final norm.
            final: whether what the head is applied to is wanted.
            final_gradient: whether a gradient will come back from it.
        """
        teacher = batch.teacher
        if not self.early_exit:
            teacher = teacher or self.teacher(batch, layers, final)
            return self._select(batch, self._run_whole(_inputs(batch)), layers, final), teacher
        entry = self._enter(_inputs(batch))
        with torch.no_grad():
            shared = self._run(entry, {0: entry.hidden}, min(self._first_adapted, max(layers)), layers)
        if teacher is None:
            with teacher_view(self.model):
                teacher = self._select(batch, self._run(entry, shared, self._top(layers, final), layers), layers, final)
        hidden = self._run(entry, shared, max(layers), layers)
        with torch.set_grad_enabled(torch.is_grad_enabled() and final_gradient):
            hidden = self._run(entry, hidden, self._top(layers, final), layers)
        return self._select(batch, hidden, layers, final), teacher

    def teacher(self, batch: TokenBatch, layers: Sequence[int], final: bool) -> TeacherStates:
        """The teacher's states of a batch; the arguments are those of `states`."""
        with teacher_view(self.model):
            if not self.early_exit:
                return self._select(batch, self._run_whole(_inputs(batch)), layers, final)
            entry = self._enter(_inputs(batch))
            hidden = self._run(entry, {0: entry.hidden}, self._top(layers, final), layers)
            return self._select(batch, hidden, layers, final)

    def _top(self, layers: Sequence[int], final: bool) -> int:
        return self.layers if final else max(layers)

    def _enter(self, inputs: dict[str, Any]) -> _Entry:
        """Run the model with blocks that only note how they are called."""
        hidden: list[Tensor] = []
        calls: list[tuple[tuple, dict[str, Any]]] = []

        def note(state: Tensor, *args: Any, **kwargs: Any) -> Any:
            hidden.append(state)
            calls.append((args, kwargs))
            return state if self._beside is None else (state, *[None] * self._beside)

        with torch.no_grad(), _replaced_forward(self._blocks, note):
            self._decoder(**inputs)
        return _Entry(hidden[0], calls)

    def _run(self, entry: _Entry, states: dict[int, Tensor], top: int, keep: Collection[int]) -> dict[int, Tensor]:
        """Hidden states `keep` and `top`, going on from the highest in `states`."""
        states, start = dict(states), max(states)
        for index in range(start, top):
            args, kwargs = entry.calls[index]
            output = self._blocks[index](states[index], *args, **kwargs)
            states[index + 1] = output[0] if isinstance(output, (tuple, list)) else output
            if index not in keep:
                del states[index]
        if start < top == self.layers:
            states[top] = self._norm(states[top])
        return states

    def _run_whole(self, inputs: dict[str, Any]) -> dict[int, Tensor]:
        """Every hidden state, by the model's own forward."""
        output = self._decoder(**inputs, output_hidden_states=True)
        return dict(enumerate([*output.hidden_states[:-1], output.last_hidden_state]))

    def _select(
        self, batch: TokenBatch, hidden: dict[int, Tensor], layers: Sequence[int], final: bool
    ) -> TeacherStates:
        """What the losses read of the hidden states."""
        tokens = [_at(hidden[layer], batch.scored_tokens) for layer in layers]
        head_input = _at(hidden[self.layers], batch.scored_predictions) if final else None
        return TeacherStates(torch.stack(tokens, dim=1), head_input)

    def _can_run_by_blocks(self, sample: dict[str, Any]) -> bool:
        """Whether blocks run one by one give the hidden states of the model's own forward; said once where not."""
        whole = self._run_whole(sample)
        try:
            entry = self._enter(sample)
            by_blocks = self._run(entry, {0: entry.hidden}, self.layers, range(self.layers))
            same = all(torch.equal(by_blocks[layer], state) for layer, state in whole.items())
        except Exception:  # whatever a model of another build makes of it
            same = False
        if not same:
            say_once(f"{type(self._base).__name__} does not run block by block: every pass runs the whole model")
        return same


def _inputs(batch: TokenBatch) -> dict[str, Any]:
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}


def _sample(device: torch.device) -> dict[str, Any]:
    """A few tokens and some padding to try a model on."""
    attention_mask = torch.ones(2, 6, dtype=torch.int64, device=device)
    attention_mask[1, 4:] = 0
    return {
        "input_ids": torch.arange(12, device=device).reshape(2, 6),
        "attention_mask": attention_mask,
        "use_cache": False,
    }


def _decoder_of(base: PreTrainedModel, path: str, blocks: nn.ModuleList) -> Any:
    """The part that takes tokens and gives the last hidden state; of some families `get_decoder` is something else."""
    if not path:
        return base.get_decoder()
    parts = (base.get_decoder(), base.base_model)
    holding = [part for part in parts if part is not base and any(module is blocks for module in part.modules())]
    return holding[0] if holding else base.get_submodule(path.rpartition(".")[0])


def _check_causal(base: PreTrainedModel, sample: dict[str, Any]) -> None:
    """Refuse a model that reads ahead: its logits predict no next token."""
    other_end = sample["input_ids"].clone()
    other_end[0, -1] += 1
    before, after = base(**sample).logits[0], base(**sample | {"input_ids": other_end}).logits[0]
    moved = (after - before).abs().amax(dim=-1)
    if moved[:-1].max() > 0.01 * moved[-1]:
        raise InputError(f"--model: {type(base).__name__} is no causal decoder: later tokens change what it predicts")


def _at(hidden: Tensor, positions: Tensor) -> Tensor:
    return hidden.flatten(0, 1).index_select(0, positions)


def _final_norm(decoder: nn.Module, sample: dict[str, Any]) -> nn.Module:
    """The child of the decoder whose output is the last hidden state; the identity where there is none.

    By its numbers, as some families reshape what their norm gives.
    """
    outputs: list[tuple[nn.Module, Any]] = []

    def keep(module: nn.Module, _args: Any, output: Any) -> None:
        outputs.append((module, output))

    handles = [child.register_forward_hook(keep) for child in decoder.children()]
    last = decoder(**sample).last_hidden_state
    for handle in handles:
        handle.remove()
    return next(
        (module for module, output in outputs if isinstance(output, Tensor) and torch.equal(output, last)),
        nn.Identity(),
    )


def _values_beside(decoder: nn.Module, blocks: Sequence[nn.Module], sample: dict[str, Any]) -> int | None:
    """How many values a block gives beside its hidden state; None where it gives the bare state."""
    found: list[int | None] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append(len(output) - 1 if isinstance(output, (tuple, list)) else None)

    handles = [block.register_forward_hook(keep) for block in blocks[:1]]
    decoder(**sample)
    for handle in handles:
        handle.remove()
    return found[0] if found else None


@contextmanager
def _replaced_forward(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Another `forward` for each module within the body."""
    own = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, before in zip(modules, own, strict=True):
            del module.__dict__["forward"]
            if before is not None:
                module.__dict__["forward"] = before
