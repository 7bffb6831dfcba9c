"""Files around the code: workflows call what exists, the version has one source, tools one version; and samples."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import fused_lora
from helpers.thorough import pairwise

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PARSED = [*WORKFLOWS, *sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))]
PARSED += [ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def targets():
    return set(re.findall(r"^([\w./$()-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("path", PARSED, ids=lambda path: path.name)
def test_it_parses(path):
    assert isinstance(read(path), dict)


def test_the_workflows_are_there():
    assert [path.stem for path in WORKFLOWS] == ["cpu", "gpu", "lint"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_targets_of_the_makefile(path):
    commands = [step["run"] for job in read(path)["jobs"].values() for step in job["steps"] if "run" in step]
    called = [word for command in commands for word in re.findall(r"\bmake ([\w.-]+)", command)]
    assert called and all(command.startswith("make ") for command in commands)
    assert set(called) <= targets()


def test_the_matrix_has_what_setup_py_promises():
    matrix = read(ROOT / ".github/workflows/cpu.yml")["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == ["3.10", "3.11", "3.12", "3.13", "3.14"]
    setup, makefile = ((ROOT / name).read_text(encoding="utf-8") for name in ("setup.py", "Makefile"))
    assert f'python_requires=">={matrix["python"][0]}"' in setup
    assert f'"torch>={matrix["torch"][0].removesuffix(".0")}"' in setup
    assert any(f"TORCH ?= torch=={torch}\n" in makefile for torch in matrix["torch"])


def test_the_version_has_one_source():
    found = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert found.stdout.split()[-1] == fused_lora.__version__ == read(ROOT / "CITATION.cff")["version"]
    assert re.search(rf"^## {re.escape(fused_lora.__version__)} ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_hooks_have_the_versions_of_the_test_extra():
    pinned = dict(re.findall(r'"(ruff|basedpyright)==([\d.]+)"', (ROOT / "setup.py").read_text(encoding="utf-8")))
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r"ruff==([\d.]+)", text)) == {pinned["ruff"]}
    assert set(re.findall(r"basedpyright ([\d.]+)", text)) == {pinned["basedpyright"]}
    assert ".venv/.typed" in text and "$(VENV)/.typed" in targets()


def test_pairwise_keeps_all_cases_and_joins_every_two_values():
    values = {"a": [0, 1, 2], "b": [0, 1, 2, 3], "c": ["x", "y"]}
    cases = pairwise(lambda a, b, c: a or b, **values).args[1]
    possible = [case for case in itertools.product(*values.values()) if case[0] or case[1]]
    assert [case.values for case in cases] == possible
    taken = [case.values for case in cases if not case.marks]
    assert len(taken) < len(possible) / 1.5
    for i, j in itertools.combinations(range(3), 2):
        assert {(case[i], case[j]) for case in taken} == {(case[i], case[j]) for case in possible}
