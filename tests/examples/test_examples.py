"""README's code blocks and the scripts in examples/, on a tiny random model: what a newcomer runs first."""

import importlib.metadata
import importlib.util
import math
import re
import sys
from pathlib import Path

import pytest
import torch

from helpers import serving
from helpers.seeds import shifted

pytest.importorskip("peft")
pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
MODEL = '"HuggingFaceTB/SmolLM2-135M-Instruct"'


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(serving.write_tiny_llama(tmp_path_factory.mktemp("tiny")))


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_runs_from_top_to_bottom(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5 and blocks[0].count(MODEL) == 1
    names = {}
    for i, block in enumerate(blocks):
        exec(compile(block.replace(MODEL, repr(tiny)), f"README.md, block {i + 1}", "exec"), names)
    printed = capsys.readouterr().out
    assert "layers run fused" in printed and "verdict: every difference is rounding" in printed
    assert {"poet", "sql"} <= {path.name for path in (tmp_path / "adapters").iterdir()}
    assert len(names["tokens"]) == 3 and names["y"].shape == (4, 32)


def test_the_examples(tiny, tmp_path, capsys):
    torch.manual_seed(shifted(0))
    poet, sql = str(tmp_path / "poet"), str(tmp_path / "sql")
    assert math.isfinite(load("accelerate_peft").main(tiny, poet))
    losses = load("train").main(tiny, sql)
    assert losses[-1] < 0.9 * losses[0]
    assert load("merge").main(tiny, sql)
    texts = load("serve").main(tiny, sql, poet)
    assert len(texts) == 3 and texts[0] != texts[2]
    assert "layers run fused" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["accelerate_peft", "train", "merge", "serve"])
def test_an_example_stays_short(name):
    """Without its docstring, imports and blank lines."""
    lines = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").split("import fused_lora\n")[1].splitlines()
    assert len([line for line in lines if line.strip()]) <= 30


@pytest.mark.parametrize("folder", ["examples", "benchmarks", "tools"])
def test_no_script_hides_a_package(folder):
    """Who runs a script of a folder has that folder first on the path."""
    packages = {*importlib.metadata.packages_distributions(), *sys.stdlib_module_names}
    names = {path.stem for path in (ROOT / folder).glob("*.py")} | {
        path.parent.name for path in (ROOT / folder).glob("*/*.py")
    }
    assert names and not names & packages
