"""The table of what is covered is what the code does."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("bitsandbytes")
PATH = Path(__file__).resolve().parents[2] / "tools" / "coverage_table.py"


def test_the_table_is_what_the_code_does(capsys):
    spec = importlib.util.spec_from_file_location("coverage_table", PATH)
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    assert table.main(["--check"]) == 0, capsys.readouterr().out
