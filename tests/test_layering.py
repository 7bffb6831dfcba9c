"""Imports point down only, third parties stay inside functions, and nothing that can run code from data is used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fused_lora"

# layer -> what it may import of this project; "kernels" stands for fused_lora.kernels
ALLOWED = {
    "kernels": set(),
    "reference": set(),
    "testing": {"kernels", "ops", "reference"},
    "ops": {"kernels", "reference"},
    "functional": {"ops", "reference"},
    "bases": {"ops", "reference"},
    "modules": {"bases", "ops", "reference"},
    "adapters": {"modules", "reference"},
    "serving": {"adapters", "modules", "ops", "kernels", "reference"},
    "integrations": {"adapters", "modules", "bases", "ops", "reference"},
    "diagnostics": {"", "integrations", "modules", "ops", "kernels", "reference", "testing"},
    "cli": {"diagnostics", "integrations", "serving", "modules"},
}
THIRD_PARTY = {
    "kernels": {"torch", "triton"},
    "reference": {"torch", "numpy"},
    "ops": {"torch", "numpy"},
    "functional": set(),
    "bases": {"torch"},
    "modules": {"torch"},
    "adapters": {"torch", "safetensors", "numpy"},
    "serving": {"torch", "numpy"},
    "integrations": {"torch"},
}

# what the extras bring, by path: imported only where compiled loops, an engine or a server are asked for
EXTRAS = {
    "ops/compiled_": {"numba", "llvmlite"},
    "serving/engine/": {"transformers"},
    "serving/http/": {"fastapi", "starlette", "pydantic"},
}


def files():
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        yield "kernels", path
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path


def imports(tree):
    """(module, is at the top of the file) for every import."""
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) in top


@pytest.mark.parametrize("layer, path", list(files()), ids=lambda v: v if isinstance(v, str) else v.stem)
def test_imports_point_down(layer, path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for name, top in imports(tree):
        first, *rest = name.split(".")
        assert first != "kernels", f"{path.name}: import fused_lora.kernels, never kernels"
        if first == "fused_lora":
            target = rest[0] if rest else ""
            if layer in ALLOWED and target != layer:
                assert target in ALLOWED[layer], f"{path.name} ({layer}) must not import {name}"
        elif layer in THIRD_PARTY and first not in sys.stdlib_module_names:
            extras = set().union(*(names for part, names in EXTRAS.items() if f"fused_lora/{part}" in path.as_posix()))
            assert first in THIRD_PARTY[layer] | extras or not top, (
                f"{path.name} ({layer}) must not import {name} at the top"
            )


def test_the_package_alone_imports_no_extra():
    names = "{'peft', 'transformers', 'fastapi', 'accelerate', 'uvicorn', 'numba', 'llvmlite'}"
    code = f"import sys, fused_lora; print(sorted({names} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("layer, path", list(files()), ids=lambda v: v if isinstance(v, str) else v.stem)
def test_nothing_acts_on_data(layer, path):
    if layer == "testing":
        return
    forbidden = {"eval", "exec", "compile", "__import__"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in forbidden, f"{path.name}:{node.lineno} calls {node.func.id}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            assert (owner, node.func.attr) != ("torch", "load"), f"{path.name}:{node.lineno} calls torch.load"
            # the command line imports its own subcommands by name, nothing else imports by name at all
            by_name = owner == "importlib" and layer != "cli"
            assert owner != "pickle" and not by_name, f"{path.name}:{node.lineno} uses {owner}"
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            raise AssertionError(f"{path.name}:{node.value.lineno} passes trust_remote_code")


@pytest.mark.parametrize("layer, path", list(files()), ids=lambda v: v if isinstance(v, str) else v.stem)
def test_public_functions_are_annotated_and_documented(layer, path):
    if layer in ("kernels", "testing"):
        return
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"
            assert node.returns is not None, f"{path.name}: {node.name} does not say what it returns"
            missing = [a.arg for a in node.args.args + node.args.kwonlyargs if a.annotation is None]
            assert not missing, f"{path.name}: {node.name} leaves {missing} without annotation"
