"""A trained student to be measured: the base model with a saved adapter, whole and on one device."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedModel

from cbtrain.config import CircuitBreakerConfig, InputError
from cbtrain.config.saved import require_adapter
from cbtrain.model.loading import forget_base, load_base, weightless_model
from cbtrain.utils import distributed
from cbtrain.utils.errors import first_line


@contextlib.contextmanager
def adapter(config: CircuitBreakerConfig, directory: Path) -> Iterator[PeftModel]:
    """The base model with a saved adapter for the body; taken off again.

    Raises:
        InputError: there is no adapter, or it is not one of this model.
    """
    require_adapter(directory)
    base = on_device(config)
    try:
        # Trainable, as the decoder tells adapted blocks by that.
        model = PeftModel.from_pretrained(base, directory, is_trainable=True)
        with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
            strange = set(file.keys()) ^ set(get_peft_model_state_dict(model))
        if strange:
            raise ValueError(f"{len(strange)} weights are not those of the model, {min(strange)} for one")
    except Exception as error:  # whatever a strange file makes the libraries raise
        forget_base()
        raise InputError(f"--adapter {directory}: does not fit {config.model} ({first_line(error)})") from error
    try:
        yield model
    finally:
        model.unload()


def on_device(config: CircuitBreakerConfig) -> PreTrainedModel:
    """The whole base model on this process's device.

    Raises:
        InputError: it does not fit.
    """
    device = distributed.device()
    if device.type == "cuda":
        weights = sum(parameter.numel() for parameter in weightless_model(config).parameters())
        needed, free = weights * getattr(torch, config.dtype).itemsize, torch.cuda.mem_get_info(device)[0]
        if needed > free:
            raise InputError(
                f"--model {config.model}: {needed / 1e9:.0f} GB of weights do not fit on one device with "
                f"{free / 1e9:.0f} GB free, where its behaviour is measured"
            )
    return load_base(config).to(device)
