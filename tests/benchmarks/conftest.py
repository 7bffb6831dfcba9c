"""Benchmarks are imported by name, as running one by path does: with their own folder on the path."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if not BENCHMARKS.is_dir():  # not beside tests/
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module
