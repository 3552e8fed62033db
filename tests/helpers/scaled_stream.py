"""The same pretrained model with hidden states of another size."""

import torch
from torch import nn
from transformers import PreTrainedModel

WRITERS = ("o_proj", "down_proj", "attention.dense", "dense_4h_to_h")
"""Ends of the names of the projections whose output is added to the hidden state."""


@torch.no_grad()
def scale_hidden_states(model: PreTrainedModel, scale: float) -> None:
    """Multiply the hidden states of a pre-norm decoder by `scale` and leave its logits as they are.

    The embedding and all that a block adds are multiplied; norms of their inputs take the factor out again, and the
    head, which may share the embedding's weight, keeps its own.
    """
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.clone())
    model.config.tie_word_embeddings = False
    model.get_input_embeddings().weight.mul_(scale)
    for name, module in model.named_modules():
        if name.endswith(WRITERS):
            module.weight.mul_(scale)
            if module.bias is not None:
                module.bias.mul_(scale)
    for name in ("rms_norm_eps", "layer_norm_eps"):
        if hasattr(model.config, name):
            setattr(model.config, name, getattr(model.config, name) * scale**2)
