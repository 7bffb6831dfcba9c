"""first_contact.py: one stage that crashes, hangs or fails costs that stage, and the page says so."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def contact(load):
    return load("first_contact")


def python(code):
    return shlex.join(["python", "-c", code])


def run(contact, out, *stages, budget=10.0, options=()):
    """(exit code, results by stage, the page)."""
    made = [contact.Stage(**dict(share=1.0, dry="", show="^shown") | stage) for stage in stages]
    code = contact.main(["--out", str(out), "--budget", str(budget), *options], made)
    assert not list(out.glob("*.tmp"))
    results = {stage.name: json.loads((out / f"{stage.name}.json").read_text()) for stage in made}
    return code, results, (out / "first_contact.txt").read_text()


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"  # nobody may have waited for it yet


def test_crash_and_failure_cost_one_stage(contact, tmp_path, capfd):
    code, results, page = run(
        contact,
        tmp_path,
        dict(name="crash", command=python("import os; os.kill(os.getpid(), 11)")),
        dict(name="failure", command=python("raise SystemExit('no such kernel')")),
        dict(name="fine", command=python("print('shown: 5 of 5'); print('hidden')")),
    )
    assert code == 1
    found = {name: (r["status"], r["why"]) for name, r in results.items()}
    assert found == {"crash": ("failed", "SIGSEGV"), "failure": ("failed", "exit code 1"), "fine": ("passed", "")}
    assert any("Segmentation fault" in line for line in results["crash"]["lines"])
    assert results["failure"]["lines"] == ["the log ends:", "no such kernel"]
    assert results["fine"]["lines"] == ["shown: 5 of 5"]
    assert "2 failed, 1 passed" in page and "failed: SIGSEGV" in page and "no such kernel" in page
    assert capfd.readouterr().out.endswith(page + "\n")


def test_hanging_stage_is_killed_with_its_children(contact, tmp_path, monkeypatch):
    child = (
        "import signal, time; signal.signal(signal.SIGABRT, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print("shown", child.pid, flush=True)
time.sleep(600)
"""

    def monotonic():  # the stage's minute is over once it has said what it started
        log = tmp_path / "hang.log"
        return time.monotonic() + 70 * (log.exists() and b"shown" in log.read_bytes())

    monkeypatch.setattr(contact, "time", SimpleNamespace(monotonic=monotonic, sleep=time.sleep))
    stages = dict(name="hang", command=python(code), share=0.1), dict(name="after", command=python(""))
    code, results, page = run(contact, tmp_path, *stages)
    assert code == 1 and results["hang"]["status"] == "timed out" and results["after"]["status"] == "passed"
    shown, *rest = results["hang"]["lines"]
    pid = int(shown.split()[1])
    wait_for(lambda: not alive(pid))
    assert any('File "<string>", line 6' in line for line in rest)  # where it hung
    assert "timed out" in page


def test_all_tests_belong_to_one_stage(contact):
    """The dry run collects a file of each."""
    given = {part for stage in contact.STAGES for part in stage.command.split() if part.startswith("tests")}
    left_out = {part.removeprefix("--ignore=") for part in contact.REST.split()[1:]}
    assert left_out == given - {"tests"} == {*contact.GPU_TESTS.split(), contact.KERNEL_TESTS}
    assert all((ROOT / path).exists() for path in left_out)


def test_nothing_starts_without_budget(contact, tmp_path):
    code, results, page = run(contact, tmp_path, dict(name="late", command=python("print('shown')")), budget=0)
    assert code == 0 and results["late"]["status"] == "not reached" and "1 not reached" in page
    assert not (tmp_path / "late.log").exists()


def test_limit_is_a_share_and_at_most_what_is_left(contact, tmp_path):
    tell = python("print('shown', {minutes})")
    stages = dict(name="half", command=tell, share=0.5), dict(name="more", command=tell, share=3.0)
    _, results, _ = run(contact, tmp_path, *stages, budget=10)
    assert results["half"]["limit"] == 300 and 0 < results["more"]["limit"] < 600
    assert results["half"]["lines"] == ["shown 3.5"]


def test_results_are_there_after_each_stage(contact, tmp_path):
    look = python("import os; print('shown', *sorted(os.listdir(r'{out}')))")
    stages = (dict(name=name, command=look) for name in ("a", "b"))
    _, results, _ = run(contact, tmp_path, *stages)
    assert results["a"]["lines"] == ["shown a.log"]
    assert results["b"]["lines"] == ["shown a.json a.log b.log first_contact.txt"]


def test_stages_beside_each_other(contact, tmp_path):
    meet = """
import pathlib, time
pathlib.Path(r"{{out}}", "{0}.here").touch()
while not pathlib.Path(r"{{out}}", "{1}.here").exists():
    time.sleep(0.01)
"""
    stages = [dict(name=a, command=python(meet.format(a, b)), beside=a == "y") for a, b in ("xy", "yx")]
    code, results, _ = run(contact, tmp_path, *stages)
    assert code == 0 and {r["status"] for r in results.values()} == {"passed"}


def test_stage_without_its_tool_is_skipped(contact, tmp_path):
    code, results, page = run(contact, tmp_path, dict(name="tool", command="no-such-tool", needs="no-such-tool"))
    assert code == 0 and results["tool"]["status"] == "skipped"
    assert "skipped: no-such-tool is not on PATH" in page


def test_page_of_tests_that_were_cut_off(contact, tmp_path):
    log = tmp_path / "log"
    log.write_text("[gw0] [ 1%] PASSED a.py::one \n[gw1] [ 2%] FAILED a.py::two \nTimeout\n")
    stage = contact.Stage("tests", 1.0, "", "", contact.OF_TESTS)
    lines = contact._for_the_page(stage, log, passed=False)
    assert lines[:3] == ["2 tests ran, 1 of them failed", "[gw1] [ 2%] FAILED a.py::two ", "the log ends:"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")
def test_tests_that_were_promised_a_gpu_do_not_interpret(tmp_path):
    command = [sys.executable, "-m", "pytest", "--collect-only", "tests/kernels/test_sync.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
    assert done.returncode == pytest.ExitCode.USAGE_ERROR and "there is none" in done.stderr


@pytest.mark.slow
def test_dry_run(contact, tmp_path):
    pytest.importorskip("peft")
    command = [sys.executable, "benchmarks/first_contact.py", "--dry", "--budget", "60", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    results = {stage.name: json.loads((tmp_path / f"{stage.name}.json").read_text()) for stage in contact.STAGES}
    assert {r["status"] for name, r in results.items() if name != "memcheck"} == {"passed"}
    kinds = {json.loads(path.read_text())["benchmark"] for path in tmp_path.glob("*-*.json")}
    assert kinds == {"linear", "merge", "decode", "train", "variants", "memory"}


def test_cache_that_cannot_be_unpacked_fails_the_environment(tmp_path):
    command = [sys.executable, "benchmarks/environment.py", "--without-gpu", f"--cache={tmp_path / 'none'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "torch" in done.stdout and done.returncode == 1 and "precompile.py" in done.stderr
