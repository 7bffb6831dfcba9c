"""The compile report: what it compiles, what it calls a problem, what it writes."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compile_report import compiling, report
from compile_report.compiling import CHIPS, resident_blocks
from helpers.versions import since
from helpers.waiting import HANG

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
LINKER = since("triton", "3.5")  # before, a gfx942 takes ROCm's
RECORD = dict(
    op="linear", variant="split", dtype="bfloat16", key="k", needs=["HGMMA", "copy16"], registers=100, spills=0,
    shared=65536, warps=8, blocks=2, HGMMA=16, copy16=4,
)  # fmt: skip


def results(**changes):
    return {"sm_90": {"a case": {**RECORD, **changes}}}


def run_command(*arguments, cwd):
    """The command as a user runs it: kernels are compiled, not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tools" / "compile_report"), "--processes", "1", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=3600)


def run_python(code, *arguments, **variables):
    """In a process that compiles kernels instead of interpreting them."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=2 * HANG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spills": 8}, "8 bytes of spills"),
        ({"shared": 228 << 10}, "233472 bytes of shared memory, the chip has 232448"),
        ({"HGMMA": 0}, "no HGMMA"),
        ({"copy16": 0}, "no copy16"),
        ({"loose": 2}, "2 wgmmas in flight"),
        ({"registers": 111}, "111 registers, recorded were 100"),
        ({"error": "CompilationError: x"}, "does not compile: CompilationError: x"),
    ],
    ids=["spills", "shared", "tensor_cores", "copies", "wgmma", "registers", "error"],
)
def test_every_rule_has_teeth(changes, message):
    assert report.problems(results(), results()) == []
    assert report.problems(results(registers=110), results()) == []
    (line,) = report.problems(results(**changes), results())
    assert line.startswith("sm_90 a case: ") and message in line


@pytest.mark.parametrize(
    "get_ptxas_version, named",
    [
        (lambda: "ptxas\nBuild 12.8", "Build 12.8"),  # triton 3.4
        (lambda arch=80: f"ptxas\nBuild {'12.9' if arch >= 100 else '12.8'}", "Build 12.8 / Build 12.9"),
        (lambda arch=80: "ptxas\nBuild 13.4", "Build 13.4"),
    ],
    ids=["no_chip", "two_compilers", "one_compiler"],
)
def test_the_toolchain_of_every_triton(get_ptxas_version, named, monkeypatch):
    import triton
    from triton.backends.nvidia import compiler

    monkeypatch.setattr(compiler, "get_ptxas_version", get_ptxas_version)
    assert compiling.toolchain.__wrapped__() == f"triton {triton.__version__}, ptxas {named}"


def test_resident_blocks():
    chip = CHIPS["sm_90"]
    assert resident_blocks(chip, registers=128, shared=0, warps=4) == 4
    assert resident_blocks(chip, registers=32, shared=0, warps=8) == 8
    assert resident_blocks(chip, registers=32, shared=100 << 10, warps=4) == 2
    assert resident_blocks(chip, registers=255, shared=220 << 10, warps=8) == 1


def test_results_survive_a_round_trip(tmp_path):
    path = tmp_path / "deep" / "r.json"
    assert report.read_results(path) == {}
    both = results() | {"sm_80": {}}
    report.write_results(path, both)
    assert report.read_results(path) == both
    assert json.loads(path.read_text())["toolchain"].startswith("triton ")


def test_the_page_keeps_what_is_around_the_table(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# Title\nabove\n{report.BEGIN}\nold\n{report.END}\nbelow\n")
    report.write_page(page, results())
    report.write_page(page, results())
    text = page.read_text()
    assert text.startswith("# Title\nabove\n") and text.endswith("\nbelow\n") and "old" not in text
    assert text.count("| sm_90 | linear, split | 16-bit | 1 | 100 | 0 | 64 of 227 | 2 | HGMMA | 4 | 0 |") == 1


def test_the_table_shows_ranges_and_failures():
    both = results()
    both["sm_90"]["wide"] = {**RECORD, "registers": 200}
    both["sm_90"]["broken"] = {**RECORD, "error": "x"}
    assert "| 2 of 3 compile | 100-200 |" in report.table(both)


def test_an_interpreting_process_is_refused(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(ROOT / "tools" / "compile_report"), "--check"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HANG)
    assert done.returncode != 0 and "TRITON_INTERPRET is set" in done.stderr


@LINKER
def test_compiles_records_and_compares(tmp_path):
    """One kernel in two forms on two chips: compiled once, not again, and a worse result than recorded is found."""
    path, page = tmp_path / "results" / "report.json", tmp_path / "docs" / "page.md"
    what = ("--only", "unmerge fp32 32x64", "--chips", "sm_90", "gfx942", "--results", path, "--page", page)
    first = run_command(*map(str, what), cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    recorded = report.read_results(path)
    assert {chip: len(records) for chip, records in recorded.items()} == {"sm_90": 4, "gfx942": 4}
    for record in recorded["sm_90"].values():
        assert record["spills"] == 0 and 32 <= record["registers"] <= 255 and record["copy16"] >= 1
    assert "| unmerge |" in page.read_text()

    again = run_command(*map(str, what), "--check", cwd=tmp_path)
    assert again.returncode == 0 and "compiled 0 of 0" in again.stderr, again.stderr

    better = copy.deepcopy(recorded)
    label = next(iter(better["sm_90"]))
    better["sm_90"][label] |= {"key": "other", "registers": 10}
    report.write_results(path, better)
    worse = run_command(*map(str, what), "--check", cwd=tmp_path)
    assert worse.returncode == 1 and "compiled 1 of 1" in worse.stderr and "recorded were 10" in worse.stdout


@pytest.mark.slow
def test_every_configuration_keeps_the_rules():
    """Complete on every chip; what has changed since it was recorded is compiled here and now."""
    if not report.read_results(report.RESULTS):
        pytest.skip("recorded with another compiler, whose registers are others: tools/compile_report --check")
    done = run_command("--check", "--processes", "2", cwd=ROOT)
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if not line.startswith("|"))
    for chip in CHIPS:
        assert f"| {chip} | linear, split | 16-bit |" in done.stdout


def test_the_record_is_of_this_code_in_every_dtype():
    """fp16 on every chip is compiled by request alone: a change of a kernel asks for it."""
    recorded = report.read_results(report.RESULTS)
    if not recorded:
        pytest.skip("recorded with another compiler")
    code = (
        "import sys; from pathlib import Path; from compile_report import report;"
        "from compile_report.compiling import CHIPS, fingerprint, labelled;"
        "recorded = report.read_results(Path(sys.argv[1]));"
        "every = {chip: labelled(spec.capability, True) for chip, spec in CHIPS.items()};"
        "print(*(sum(case.dtype.itemsize == 2 for case in cases.values()) for cases in every.values()));"
        "print(*(f'{chip}: {label}' for chip, cases in every.items() for label, case in cases.items()"
        " if recorded[chip].get(label, {}).get('key') != fingerprint(case, chip)), sep='\\n')"
    )
    numbers, *stale = run_python(code, str(report.RESULTS)).stdout.split("\n")
    assert all(int(number) > 100 for number in numbers.split())
    stale = [line for line in stale if line]
    assert not stale, f"python tools/compile_report --every-dtype: {len(stale)} cases, {stale[:3]}"
    assert not report.problems(recorded, recorded)


@pytest.mark.slow
@LINKER
def test_a_sample_is_what_the_record_says(tmp_path):
    """Every 307th case of every chip, compiled anew: the record of unchanged code is of this code."""
    code = (
        "import sys; from compile_report import report;"
        "from compile_report.compiling import CHIPS, cases, compile_batch;"
        "results = {n: compile_batch(cases(chip.capability)[5::307], n) for n, chip in CHIPS.items()};"
        "from pathlib import Path; recorded = report.read_results(Path(sys.argv[1]));"
        "same = [r == recorded[n][label] for n, known in results.items() for label, r in known.items()"
        " if r['key'] == recorded.get(n, {}).get(label, {}).get('key')];"
        "print(sum(map(len, results.values())), same.count(False), *report.problems(results, recorded))"
    )
    done = run_python(code, str(report.RESULTS), TRITON_CACHE_DIR=str(tmp_path))
    number, other, *found = done.stdout.split(maxsplit=2)
    assert int(number) >= 5 and other == "0" and not found, found
