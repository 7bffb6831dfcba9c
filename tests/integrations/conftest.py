"""What tests of several integrations count."""

import pytest

from fused_lora.integrations import peft as integration


@pytest.fixture
def report():
    """The calls of accelerated layers in this test, by how they ran."""
    calls = integration.install()
    integration.uninstall()
    return calls
