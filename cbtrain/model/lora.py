"""LoRA on the decoder blocks: one copy of the weights, two views. The student has its adapter on, the teacher off.

Works for any causal decoder whose blocks sit in one `ModuleList`, found by its length.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cbtrain.config import CircuitBreakerConfig, InputError
from cbtrain.model.dropout import use_fast_dropout
from cbtrain.model.linear_modules import is_linear, takes_lora
from cbtrain.model.refusal import blocks_of
from cbtrain.utils.errors import first_line


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList] | None:
    """The name of the list of decoder blocks within the model, and the list; None where there is no such list."""
    count = blocks_of(model)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    # Those of the decoder first, and not those deep in a part of it: an encoder of images may have as many blocks.
    inside = set(model.get_decoder().modules())
    return min(lists, key=lambda found: (found[1] not in inside, found[0].count(".")), default=None)


def lora_targets(model: PreTrainedModel, config: CircuitBreakerConfig) -> list[str]:
    """Names of the linear modules of a block that the adapter goes on.

    Raises:
        InputError: a name in `lora_targets` is no linear module of the blocks, or chosen blocks cannot be found.
    """
    found = decoder_blocks(model)
    if found is None and config.lora_layers is not None:
        raise InputError(f"--lora-layers: found no list of decoder blocks in {type(model).__name__}; give None")
    blocks = found[1] if found else model.get_decoder()
    linear = {_last(name) for name, module in blocks.named_modules() if is_linear(module)}
    reached = {_last(name) for name, module in blocks.named_modules() if takes_lora(model, name, module)}
    if not reached:
        kinds = sorted({type(module).__name__ for module in blocks.modules() if _has_matrix(module)})
        raise InputError(
            f"--model {config.model}: the blocks' weights sit in {', '.join(kinds)}, and LoRA goes on Linear and Conv1D"
        )
    if isinstance(config.lora_targets, str):
        return sorted(reached)
    for name in config.lora_targets:
        if name not in linear:
            known = ", ".join(sorted(linear))
            raise InputError(f"--lora-targets {name}: not a linear module of the blocks; they have {known}")
    return list(config.lora_targets)


def _has_matrix(module: nn.Module) -> bool:
    """Whether it holds weights of two dimensions or more itself."""
    return any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def beyond_lora(model: PreTrainedModel) -> str | None:
    """A line that names the weights of the blocks on which no adapter can go; None where there are none.

    Fused experts and their routers, for the most part.
    """
    _, blocks = decoder_blocks(model) or ("", [])
    beyond: set[str] = set()
    reached = total = 0
    for block in blocks:
        for path, module in block.named_modules():
            takes = takes_lora(model, path, module)
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 1:
                    total += parameter.numel()
                    if takes:
                        reached += parameter.numel()
                    else:
                        beyond.add(f"{path}.{name}".removesuffix(".weight"))
    if not beyond:
        return None
    return f"LoRA can reach {reached / total:.0%} of the decoder blocks' weights: not {', '.join(sorted(beyond))}"


def add_adapter(base: PreTrainedModel, config: CircuitBreakerConfig) -> PeftModel:
    """Put a LoRA adapter on the linear modules of the chosen decoder blocks, seeded by `config.seed`.

    Raises:
        InputError: a name in `lora_targets` is no linear module of the blocks, or PEFT refuses the model.
    """
    targets, found = lora_targets(base, config), decoder_blocks(base)
    torch.manual_seed(config.seed)
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        exclude_modules=_namesakes(base, targets, found[0] + "." if found else "") or None,
        layers_to_transform=None if config.lora_layers is None else list(config.lora_layers),
        layers_pattern=found[0].rsplit(".", 1)[-1] if found and config.lora_layers is not None else None,
        fan_in_fan_out=_transposed(base, targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        model = get_peft_model(base, lora)
    except ValueError as error:
        kind, reason = type(base).__name__, first_line(error)
        raise InputError(f"--model {config.model}: {kind} takes no such adapter ({reason})") from error
    if config.lora_init_std > 0:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=config.lora_init_std)
    use_fast_dropout(model)
    return student_mode(model)


def _transposed(base: PreTrainedModel, targets: list[str]) -> bool:
    """Whether the targets hold their weights as [in, out]; PEFT finds that out itself, with a warning."""
    return any(isinstance(module, Conv1D) for name, module in base.named_modules() if _last(name) in targets)


def _namesakes(base: PreTrainedModel, targets: list[str], prefix: str) -> list[str]:
    """Modules called like a target that are none: in an encoder of images, or no linear map."""
    return [
        name
        for name, module in base.named_modules()
        if _last(name) in targets and not (is_linear(module) and name.startswith(prefix))
    ]


def student_mode(model: PeftModel) -> PeftModel:
    """Dropout on in the adapter only: a base model's own dropout would set student and teacher apart by chance."""
    model.eval()
    for name, module in model.named_modules():
        if name.endswith("lora_dropout"):
            module.train()
    return model


@contextmanager
def teacher_view(model: PeftModel) -> Iterator[None]:
    """The same weights with the adapter off and without gradient."""
    with model.disable_adapter(), torch.no_grad():
        yield
