"""The DeepSpeed engine of a run: the adapted model in it, ZeRO, AdamW, and the adapter that it leaves."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import torch
from peft import PeftModel
from torch import Tensor

from cbtrain.config import CircuitBreakerConfig
from cbtrain.data.batches import check_batch
from cbtrain.model.activation_checkpointing import recomputed_blocks
from cbtrain.model.loading import forget_base, load_base
from cbtrain.model.lora import add_adapter, student_mode
from cbtrain.training.step import CircuitBreakerStep
from cbtrain.utils import distributed


@contextlib.contextmanager
def adapted_model(config: CircuitBreakerConfig) -> Iterator[PeftModel]:
    """The base model with a fresh adapter for the body; taken off again, so that the base serves the next run."""
    base = load_base(config)
    if config.zero_stage < 3:
        base.to(distributed.device())
    model = add_adapter(base, config)
    try:
        with recomputed_blocks(model, config):
            yield model
    finally:
        if config.zero_stage == 3:
            forget_base()  # its weights have been partitioned in place
        else:
            model.unload()


@contextlib.contextmanager
def deepspeed_engine(model: PeftModel, config: CircuitBreakerConfig) -> Iterator[deepspeed.DeepSpeedEngine]:
    """A DeepSpeed engine around the step, with AdamW over the adapter's parameters."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": check_batch(config, distributed.world_size()),
        "zero_optimization": _zero_settings(config, sum(parameter.numel() for parameter in parameters)),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its own is compiled on first use; torch's fused one serves
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "gradient_clipping": config.max_grad_norm,
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    where = torch.device("cpu") if config.cpu_offload else distributed.device()
    optimizer.found_inf = torch.zeros((), device=where)  # type: ignore[attr-defined]
    step = CircuitBreakerStep(model, config)
    if config.zero_stage == 3:  # or each worker would first hold a whole copy of its own
        deepspeed.zero.Init(module=step, config_dict_or_path=settings)
    engine, *_ = deepspeed.initialize(
        model=step,
        model_parameters=parameters,
        optimizer=optimizer,
        config=settings,
        dist_init_required=False,
    )
    student_mode(model)
    try:
        yield engine
    finally:
        engine.destroy()


def _zero_settings(config: CircuitBreakerConfig, trained: int) -> dict[str, object]:
    """DeepSpeed's settings of the stage; its buffers hold `trained` gradients, and by default half a billion."""
    settings: dict[str, object] = {"stage": config.zero_stage, "reduce_bucket_size": trained}
    if config.cpu_offload:
        settings["offload_optimizer"] = {"device": "cpu"}
        if config.zero_stage == 3:
            settings["offload_param"] = {"device": "cpu"}
    return settings


def hold_updates_if(bad: Tensor, engine: deepspeed.DeepSpeedEngine) -> None:
    """From now on make no update if `bad`; the fused kernel looks for a flag of 1 on the device."""
    flag = engine.basic_optimizer.found_inf
    torch.maximum(flag, bad.to(flag), out=flag)


def unclipped_grad_norm(engine: deepspeed.DeepSpeedEngine) -> Tensor | float:
    """Global norm of the gradients at a boundary, which stage 0 does not keep."""
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else 0.0


def save_adapter(model: PeftModel, directory: Path, config: CircuitBreakerConfig) -> None:
    """Write the adapter for plain PEFT, whole or not at all; all ranks call it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with deepspeed.zero.GatheredParameters(trained, enabled=config.zero_stage == 3):
        if distributed.rank() == 0:
            scratch = directory.with_name(directory.name + ".tmp")
            shutil.rmtree(scratch, ignore_errors=True)
            model.save_pretrained(scratch)
            shutil.rmtree(directory, ignore_errors=True)
            scratch.rename(directory)
