"""What a circuit-breaker training run is: one dataclass, each field with its meaning and unit.

Attributes may be assigned. Nothing is checked until the configuration is used: `validate()` raises an `InputError`
that names the field by its flag. Imports no torch, so that the command line answers at once.
"""

import dataclasses
import datetime
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

from cbtrain.config.validation import check_fields, flag, nearest
from cbtrain.utils.errors import InputError

MaskPolicy = Literal["auto", "completion_only", "assistant_only", "tool_calls_only", "full_sequence", "given"]
Dtype = Literal["float32", "bfloat16", "fp32", "bf16"]
DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16"}
"""The short names of a dtype, and what is kept in their place."""

GROUPS = {
    "Data": (
        *("harmful", "benign", "preference", "refusals_as_benign", "mask_policy", "thoughts"),
        *("max_length", "template_date", "eval_fraction"),
    ),
    "Model": (
        *("model", "tokenizer", "trust_remote_code", "dtype"),
        *("lora_rank", "lora_alpha", "lora_dropout", "lora_layers", "lora_targets", "lora_init_std"),
    ),
    "Training": (
        *("beta_kl", "kl_temperature", "alpha", "schedule_horizon", "coefficient_schedule", "beta_kl_schedule"),
        *("target_layers", "retain_layers", "retain_norm", "retain_scale", "retain_norms"),
        *("steps", "batch_size", "lr", "lr_schedule", "warmup_steps", "weight_decay", "max_grad_norm", "seed"),
    ),
    "Where it runs": (
        *("micro_batch_size", "gradient_accumulation", "eval_batch_size", "zero_stage"),
        *("gradient_checkpointing", "cpu_offload", "hidden_states"),
    ),
    "Output": ("log_every", "eval_every", "checkpoint_every"),
}
"""The groups of the fields below, as the command line's help shows them; a test sees that none is missing."""
METAVARS = {
    "model": "NAME|DIR",
    "tokenizer": "NAME|DIR",
    "harmful": "FILE ...",
    "benign": "FILE ...",
    "template_date": "DATE",
    "lora_targets": "NAME ...|all-linear",
}
"""What stands behind their flags there, where the type says too little."""


@dataclass(kw_only=True)
class CircuitBreakerConfig:
    """One training run. Defaults are the method's; presets replace what a model needs."""

    model: str = ""
    """Hugging Face model id or directory; `tiny` is the embedded model, built on first use."""
    tokenizer: str | None = None
    """Tokenizer id or directory, where it does not lie beside the model."""
    trust_remote_code: bool = False
    """Run Python code that lies beside the model or tokenizer, where transformers has none of its own for it. Never
    taken from a file of an earlier run."""
    dtype: Dtype = "bfloat16"
    """Weights and activations of the model; losses are always computed in float32."""

    harmful: tuple[str, ...] = ()
    """Files of harmful rows: .jsonl, .json, .csv or .parquet, also gzipped, directories or patterns of them, or a
    dataset of the hub. A labelled file may be given to both sides."""
    benign: tuple[str, ...] = ()
    """Files of benign rows."""
    preference: Literal["chosen", "rejected"] | None = None
    """Which answer of rows with chosen and rejected ones is taken."""
    refusals_as_benign: bool = False
    """Give the refusals that circuit-breakers rows hold (llama3_output) to the benign side, as published."""
    mask_policy: MaskPolicy = "auto"
    """Which tokens are scored: the last assistant turn, all assistant turns, the tool calls within them, every token,
    or what the `loss_mask` of pre-tokenised rows says. auto scores all assistant turns of rows with several that call
    tools, the mask of pre-tokenised rows, and the last turn of the others."""
    thoughts: Literal["keep", "drop"] = "keep"
    """What becomes of <think> … </think> in assistant turns: kept where the chat template writes it (and scored there),
    or dropped from every turn."""
    max_length: Annotated[int, Ge(2), "must be 2 or more: one token predicts the next"] = 1024
    """Tokens a row at most. A longer row keeps the end of its prompt and the beginning of its completion; the prompt
    keeps half of the room, or all of itself where that is less, and tool results go before the last user turn."""
    template_date: str = "2024-07-26"
    """What chat templates that write today's date write (YYYY-MM-DD): a row's tokens must not change overnight."""
    eval_fraction: Annotated[float, Gt(0), Lt(1), "must lie between 0 and 1"] = 0.1
    """Share of the user prompts held out for evaluation, by a hash of the prompt."""

    beta_kl: Annotated[float, Ge(0)] = 0.3
    """Weight of the KL term within the retain side; 0 is the method without it."""
    kl_temperature: Annotated[float, Gt(0)] = 1.0
    """Temperature of the KL term; the loss carries T², so gradients keep their size."""
    alpha: Annotated[float, Gt(0)] = 10.0
    """Scale of both coefficients: cs starts at alpha and falls, cr rises towards it."""
    schedule_horizon: Annotated[float, Ge(1), "must be 1 or more: training ends at p = 1 / horizon"] = 2.0
    """m in p = step / (m · steps): 2 ends training at equal coefficients, as published."""
    coefficient_schedule: Literal["linear", "cosine"] = "linear"
    """How cs falls and cr rises with p."""
    beta_kl_schedule: Literal["constant", "ramp"] = "constant"
    """`ramp` multiplies beta_kl by cr / alpha."""
    target_layers: tuple[int, ...] = (10, 20)
    """Indices into Hugging Face `hidden_states` (k is the output of block k − 1) that are rerouted."""
    retain_layers: Literal["target", "through_target", "all"] = "target"
    """Layers of the retain loss: the target layers, every hidden state up to the highest of them, or every one."""
    retain_norm: Literal["absolute", "relative"] = "absolute"
    """Unit of the retain loss: that of the hidden state, as published, or the teacher's mean norm of each layer divided
    by retain_scale, which weighs the term alike in every model."""
    retain_scale: Annotated[float, Gt(0)] = 10.0
    """With retain_norm relative: the loss at a distance of a whole norm. 10 is about the norm in the models that the
    method was published for."""
    retain_norms: tuple[float, ...] | None = None
    """With retain_norm relative: the teacher's mean norm of each retained layer; None measures them on scored benign
    training tokens, in a sweep once for all trials."""
    hidden_states: Literal["early_exit", "output_hidden_states"] = "early_exit"
    """Whether passes end at the highest layer that a loss reads, or run the whole model. Without dropout, same losses;
    with it, other draws."""

    lora_rank: Annotated[int, Gt(0)] = 16
    """Rank of the adapter."""
    lora_alpha: Annotated[float, Gt(0)] = 16.0
    """Scale of the adapter: its product is multiplied by lora_alpha / lora_rank."""
    lora_dropout: Annotated[float, Ge(0), Lt(1), "must lie in [0, 1)"] = 0.05
    """Dropout on the adapter's input while training."""
    lora_layers: tuple[int, ...] | None = None
    """Decoder blocks that are adapted; None is every block."""
    lora_targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the adapted linear modules in a block, or all of them (the head never)."""
    lora_init_std: Annotated[float, Ge(0)] = 0.0
    """Standard deviation of lora_B at the start. 0 is LoRA's own start, where all three losses have no gradient."""

    steps: Annotated[int, Gt(0)] = 150
    """Optimizer updates."""
    batch_size: Annotated[int, Gt(0)] = 16
    """Rows a side in an optimizer update, over all workers and micro-steps."""
    micro_batch_size: int | None = None
    """Rows a side in one backward on one worker; None is batch_size / (workers × gradient_accumulation)."""
    gradient_accumulation: Annotated[int, Ge(1)] | None = None
    """Micro-steps in an optimizer update; None is batch_size / (workers × micro_batch_size), 1 without either."""
    lr: Annotated[float, Gt(0)] = 1e-4
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["constant", "linear"] = "constant"
    """After the warm-up: constant, or linear decay to 0 at the last step."""
    warmup_steps: Annotated[int, Ge(0)] = 0
    """Steps over which the learning rate rises linearly from 0."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    """Gradients are clipped to this global norm; 0 does not clip."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage."""
    gradient_checkpointing: bool = False
    """Keep no activations within decoder blocks and compute them again in the backward: less memory, more time."""
    cpu_offload: bool = False
    """Keep the optimizer's state (and under ZeRO-3 the weights) in the host's memory; needs --zero-stage 1 or more."""
    seed: Annotated[int, Ge(0), Lt(2**63), "must be 0 or more, and below 2^63"] = 0
    """Seeds the adapter's start, dropout and the order of the data."""

    log_every: Annotated[int, Gt(0)] = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: Annotated[int, Ge(0)] = 50
    """Steps between held-out evaluations; 0 is only at the end."""
    eval_batch_size: Annotated[int, Gt(0)] = 16
    """Rows in one evaluation forward."""
    checkpoint_every: Annotated[int, Ge(0)] = 0
    """Steps between checkpoints that a run resumes from; 0 writes none."""

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse a name that is no field: a typing error would otherwise leave the default in force."""
        names = [field.name for field in dataclasses.fields(self)]
        if name not in names:
            raise InputError(f"{name}: no such configuration field{nearest(name, names)}")
        if name == "dtype":
            value = DTYPE_NAMES.get(str(value), value)
        object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)

    def validate(self) -> None:
        """Check every field by itself and against the others; raise `InputError` naming the flag."""

        def require(ok: bool, name: str, mend: str) -> None:
            if not ok:
                raise InputError(f"{flag(name)} {getattr(self, name)}: {mend}")

        check_fields(self, CircuitBreakerConfig)  # not by its own class: a preset declares its defaults without bounds
        require(is_date(self.template_date), "template_date", "must be a date, YYYY-MM-DD")
        require(self.warmup_steps <= self.steps, "warmup_steps", f"is more than --steps {self.steps}")
        require(len(self.target_layers) > 0, "target_layers", "name at least one layer")
        require(len(set(self.target_layers)) == len(self.target_layers), "target_layers", "a layer is named twice")
        require(
            min(self.target_layers) >= 1, "target_layers", "layers start at 1 (0 is the embedding, which cannot move)"
        )
        require(len(self.lora_targets) > 0, "lora_targets", "name at least one module")
        require(self.lora_layers is None or len(self.lora_layers) > 0, "lora_layers", "name at least one block")
        require(
            self.retain_norms is None or min(self.retain_norms, default=0) > 0,
            "retain_norms",
            "must be a number above 0 for each retained layer; leave it out to have them measured",
        )
        require(bool(self.model), "model", "name a model directory or Hugging Face id")
        require(not self.cpu_offload or self.zero_stage > 0, "cpu_offload", "needs --zero-stage 1, 2 or 3")
        if self.micro_batch_size is not None:
            require(
                0 < self.micro_batch_size <= self.batch_size and self.batch_size % self.micro_batch_size == 0,
                "micro_batch_size",
                f"must divide --batch-size {self.batch_size}",
            )


def is_date(text: str) -> bool:
    """Whether a text is a date, YYYY-MM-DD."""
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
