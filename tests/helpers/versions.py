"""Marks of tests that need what older releases of other libraries do not have, or do otherwise."""

import importlib.metadata

import pytest
from packaging.version import Version


def since(package: str, release: str) -> pytest.MarkDecorator:
    """Skip where an older release of ``package`` is installed."""
    old = Version(importlib.metadata.version(package)) < Version(release)
    return pytest.mark.skipif(old, reason=f"{package} before {release}")
