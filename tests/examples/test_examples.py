"""README's code blocks and the scripts in examples/, on a tiny random model: what a newcomer runs first."""

import importlib.metadata
import importlib.util
import math
import re
import sys
from pathlib import Path

import pytest
import torch

import fused_lora
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


def test_qlora(tmp_path, capsys):
    """Trained over 4 bits and reloaded from the files, it predicts what the exported model predicts."""
    pytest.importorskip("bitsandbytes")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(shifted(0))
    # rows of whole blocks of 64 values
    tiny = str(serving.write_tiny_llama(tmp_path / "tiny", intermediate_size=128))
    adapter, merged = str(tmp_path / "sql"), str(tmp_path / "merged")
    losses = load("qlora").main(tiny, adapter, merged)
    assert losses[-1] < 0.9 * losses[0]
    said = capsys.readouterr().out
    assert "14 of 14 layers run fused" in said and "against the reference: max 0.0e+00" in said
    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    options = {"quantization_config": four_bits, "device_map": "cpu", "dtype": torch.float32}
    trained = transformers.AutoModelForCausalLM.from_pretrained(tiny, **options)
    fused_lora.load_adapter(trained, adapter, "sql", is_trainable=True)
    dense = transformers.AutoModelForCausalLM.from_pretrained(merged)
    assert dense.dtype is torch.bfloat16 and not hasattr(dense.config, "quantization_config")
    ids = torch.arange(8)[None]
    with torch.no_grad(), fused_lora.disable_adapters(trained):
        base = trained.train()(ids).logits
    fused_lora.unload(trained, merge_adapters=True, dtype=torch.float32)
    with torch.no_grad():
        logits = trained(ids).logits
        rounded = dense.float()(ids).logits
    assert (rounded - logits).norm() < 0.1 * (logits - base).norm()


def test_qlora_without_bitsandbytes(monkeypatch):
    example = load("qlora")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="needs bitsandbytes: pip install"):
        example.main("no model")


@pytest.mark.parametrize("name", ["accelerate_peft", "train", "merge", "serve", "qlora"])
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
