"""What the tests of plans share."""

import pytest
from simulated import use_quick_models


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cheap stand-ins for the plan's two models."""
    use_quick_models(monkeypatch)
