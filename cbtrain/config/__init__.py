"""What a training run is, and how a user says it: `get_config("llama-3.1-8b-instruct", beta_kl=1.0)`. No torch."""

from cbtrain.config.presets import (
    PRESETS,
    CircuitBreakerConfigLlama3,
    CircuitBreakerConfigLlama4Scout,
    CircuitBreakerConfigLlama31,
    CircuitBreakerConfigMistral,
    CircuitBreakerConfigQwen3,
    CircuitBreakerConfigTiny,
    get_config,
)
from cbtrain.config.schema import DTYPE_NAMES, CircuitBreakerConfig, Dtype, MaskPolicy
from cbtrain.config.validation import flag, nearest
from cbtrain.utils.errors import InputError

__all__ = [
    "DTYPE_NAMES",
    "PRESETS",
    "CircuitBreakerConfig",
    "CircuitBreakerConfigLlama3",
    "CircuitBreakerConfigLlama4Scout",
    "CircuitBreakerConfigLlama31",
    "CircuitBreakerConfigMistral",
    "CircuitBreakerConfigQwen3",
    "CircuitBreakerConfigTiny",
    "Dtype",
    "InputError",
    "MaskPolicy",
    "flag",
    "get_config",
    "nearest",
]
