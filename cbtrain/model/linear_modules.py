"""Which modules are linear maps that LoRA can go on, whatever class a model family gives them."""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_IN, _OUT = 5, 3
"""Sizes of the weight that a module is tried with."""
_READ_BY_KERNELS = {"out_proj"}
_OF_FAMILIES = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
"""PEFT refuses these modules of these families: their fused kernels take the weight and pass an adapter by."""


def takes_lora(model: PreTrainedModel, name: str, module: nn.Module) -> bool:
    """Whether LoRA can go on a module of the model and does what it says there."""
    refused = model.config.model_type in _OF_FAMILIES and name.rpartition(".")[2] in _READ_BY_KERNELS
    return is_linear(module) and not refused


def is_linear(module: nn.Module) -> bool:
    """Whether its output is its input times its weight, plus its bias: then LoRA's product beside it is what it says.

    `torch.nn.Linear` and GPT-2's `Conv1D` are; of another class made from `Linear` it is tried, as Falcon's gives the
    same product by a forward of its own, and a router of experts gives more.
    """
    own = type(module).forward
    if own is nn.Linear.forward or own is Conv1D.forward:
        return True
    return isinstance(module, nn.Linear) and _gives_its_product(module)


@torch.no_grad()
def _gives_its_product(module: nn.Linear) -> bool:
    """Try a module on random numbers with a small weight in place of its own, which may not be loaded.

    Small inputs and large ones, so that a cap on either is seen. What cannot be tried so is no plain linear map.
    """
    parameters = dict(module.named_parameters())
    if not {"weight"} <= set(parameters) <= {"weight", "bias"} or any(True for _ in module.buffers()):
        return False
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu")  # a caller may have made `meta` the default

    small = {"weight": random(_OUT, _IN), "bias": random(_OUT)}
    tried = copy.copy(module)
    tried.training, tried.in_features, tried.out_features = False, _IN, _OUT
    for scale in (1.0, 1e4):
        states = scale * random(2, 4, _IN)
        expected = nn.functional.linear(states, small["weight"], small["bias"] if "bias" in parameters else None)
        try:
            found = torch.func.functional_call(tried, {name: small[name] for name in parameters}, (states,))
        except Exception:  # whatever a module of another build makes of other sizes
            return False
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            return False
        if not torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * scale):
            return False
    return True
