"""The head of a causal model as the linear map that it is, and what the model does to its logits behind it."""

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from cbtrain.config import InputError

_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class Head:
    """logits = cap(scale · (final @ weightᵀ + bias)), where cap(z) = softcap · tanh(z / softcap)."""

    module: Any
    softcap: float | None
    """Gemma 2's cap, which other families call otherwise; None caps nothing."""
    scale: float
    """What Cohere's and Granite's models multiply their logits by. Scaling hidden states instead would round them."""

    @classmethod
    def of(cls, base: PreTrainedModel, decoder: Any, sample: dict[str, Any]) -> "Head":
        """The head of a model, whose adapter is off, tried on a few tokens.

        Raises:
            InputError: head, scale and cap do not give the model's own logits.
        """
        module = base.get_output_embeddings()
        structure = base.config.get_text_config()
        softcap = next((cap for name in _SOFTCAPS if (cap := getattr(structure, name, None))), None)
        logits, final = base(**sample).logits.float(), decoder(**sample).last_hidden_state
        refusal = InputError(f"--model: {type(base).__name__} makes its logits by more than a head, a scale and a cap")
        if final.shape[-1] != getattr(module, "in_features", None):
            raise refusal
        found, scale = module(final).float(), 1.0
        if softcap:
            found = softcap * torch.tanh(found / softcap)
        elif not torch.equal(found, logits):
            scale = float((found * logits).sum() / (found * found).sum())
        deviation = (scale * found - logits).abs().max()
        if deviation > 0.01 * logits.abs().max():
            raise refusal
        return cls(module, softcap, scale)

    def parameters(self) -> list[nn.Parameter]:
        """What ZeRO-3 may have partitioned."""
        return list(self.module.parameters())

    def arguments(self) -> dict[str, Any]:
        """The head, without its scale, as `fused_linear_kl` takes it; ZeRO-3's parts of it must be gathered."""
        adapted = isinstance(self.module, BaseTunerLayer)
        linear = self.module.get_base_layer() if adapted else self.module
        head = {"lm_head_weight": linear.weight, "bias": getattr(linear, "bias", None), "softcap": self.softcap}
        if adapted:
            deltas = [self.module.get_delta_weight(name) for name in self.module.active_adapters]
            head |= {"lm_head_weight": linear.weight + sum(deltas), "teacher_lm_head_weight": linear.weight}
        return head
