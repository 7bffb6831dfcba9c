"""A bounded run of tests/fuzz/adapter_reader.py; ``make fuzz`` has longer ones."""

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import adapter_files
from helpers.seeds import shifted
from helpers.thorough import sampled
from helpers.waiting import HANG

HERE = Path(__file__).parent
RUNS = 1000
TARGETS = ("config", "header", "weights")


def run(*arguments, findings, count=0):
    command = [sys.executable, *map(str, arguments), "--seed", str(shifted(0) % 2**31), "--findings", str(findings)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=HANG + count / 100)
    return found.returncode, found.stdout + found.stderr


@pytest.mark.experiment("B2", full=333_334, quick=RUNS)
@pytest.mark.parametrize("target", TARGETS)
def test_mutants_are_read_or_refused(tmp_path, target, count):
    """A file of a good adapter is changed at random: AdapterError, or the tensors that safetensors reads, and back."""
    code, said = run(
        HERE / "adapter_reader.py", target, "--engine=mutations", f"--runs={count}", findings=tmp_path, count=count
    )
    assert code == 0 and not list(tmp_path.iterdir()), said[-4000:]
    accepted, refused = map(int, re.search(rf"{target}: (\d+) accepted, (\d+) refused", said).groups())
    assert accepted >= 3 and accepted + refused == count


@pytest.mark.parametrize("target", sampled(reversed(TARGETS), 3))
def test_what_atheris_finds_is_read_or_refused(target, tmp_path):
    pytest.importorskip("atheris", reason="atheris has no wheel for this Python; mutants are tried all the same")
    code, said = run(HERE / "adapter_reader.py", target, "--engine=atheris", f"--runs={RUNS}", findings=tmp_path)
    assert code == 0 and not list(tmp_path.iterdir()), said[-4000:]
    # it ends the process, so its own count is the last word
    assert int(re.search(r"number_of_executed_units: (\d+)", said)[1]) >= RUNS


@pytest.mark.parametrize(
    "fault, error",
    [
        ("all(iter(lambda: 1, 0))", "TimeoutError: one input took more than 2.0 s of CPU time"),
        ("bytearray(256 << 20)", "MemoryError"),
    ],
    ids=["loop", "memory"],
)
def test_a_fault_is_found_and_kept(fault, error, tmp_path):
    """A reader that loops or takes memory for one of the seeds."""
    program, findings = tmp_path / "faulty.py", tmp_path / "findings"
    program.write_text(
        f"import sys; sys.path[:0] = [{str(HERE)!r}]\n"
        "import adapter_reader\n"
        "from fused_lora.adapters import checkpoint\n"
        "def parse_json(path, raw, real=checkpoint.parse_json):\n"
        f"    return {fault} if b'gaussian' in raw else real(path, raw)\n"
        "checkpoint.parse_json = parse_json\n"
        "adapter_reader.main()\n"
    )
    findings.mkdir()
    code, said = run(program, "config", "--engine=mutations", "--runs=10", findings=findings)
    (kept,) = findings.iterdir()
    assert code == 1 and error in said and str(kept) in said and b"gaussian" in kept.read_bytes()


def test_accepted_means_the_same_tensors_everywhere(tmp_path, monkeypatch):
    """The property fails where the reader takes other values than safetensors does, or a rewritten file differs."""
    draw, config = random.Random(shifted(0)), (HERE / "corpus/config/patterns.json").read_bytes()
    weights = adapter_files.pack(*adapter_files.header_and_data(adapter_files.good_tensors()))
    assert adapter_files.is_accepted(tmp_path, config, weights)
    assert adapter_files.mutated(weights, draw) != weights
    sort = adapter_files.config_text
    with monkeypatch.context() as patch:
        patch.setattr(adapter_files, "config_text", lambda entries: sort({**entries, "r": entries["r"] + 1}))
        with pytest.raises(AssertionError):
            adapter_files.is_accepted(tmp_path, config, weights)
    real = adapter_files.read_checked
    with monkeypatch.context() as patch:

        def read_checked(*arguments):
            adapter, plan = real(*arguments)
            adapter.layers["fc1"].lora_A[0, 0] += 1
            return adapter, plan

        patch.setattr(adapter_files, "read_checked", read_checked)
        with pytest.raises(AssertionError):
            adapter_files.is_accepted(tmp_path, config, weights)
