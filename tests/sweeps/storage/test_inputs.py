"""What a sweep is made from, compared when it goes on."""

import pytest

from cbtrain.config import CircuitBreakerConfig, InputError
from cbtrain.model.checks import prepare
from sweeps.storage.inputs import read_inputs


def test_a_sweep_whose_rows_are_other_tokens_now_does_not_go_on(small_config: CircuitBreakerConfig) -> None:
    record = {"config_overrides": {}}
    _, data = read_inputs(small_config, "tiny", 1, record)
    assert data.fingerprint == prepare(small_config)[0].fingerprint
    read_inputs(small_config, "tiny", 1, record | {"tokens": data.fingerprint})
    with pytest.raises(InputError, match="the rows' tokens are not those that the sweep began with") as refused:
        read_inputs(small_config, "tiny", 1, record | {"tokens": "0" * 64})
    assert "\n" not in str(refused.value)
