"""Marks of tests that need what older releases of other libraries do not have, or do otherwise."""

import importlib.metadata
from collections.abc import Iterable

import pytest
from packaging.version import Version


def before(package: str, release: str) -> bool:
    """Whether an older release of ``package`` is installed."""
    return Version(importlib.metadata.version(package)) < Version(release)


def since(package: str, release: str) -> pytest.MarkDecorator:
    """Skip where an older release of ``package`` is installed."""
    return pytest.mark.skipif(before(package, release), reason=f"{package} before {release}")


def svd_weights(method: str, weights: Iterable[float], scaling: float) -> list[float]:
    """For PEFT's ``add_weighted_adapter``: before 0.21 its methods with svd scale a delta twice."""
    return [w / scaling if method.endswith("svd") and before("peft", "0.21.0") else w for w in weights]
