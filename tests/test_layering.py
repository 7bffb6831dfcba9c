"""Imports point down only, third parties stay inside functions, and nothing that can run code from data is used."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fused_lora.cli import COMMANDS
from helpers.waiting import HANG

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fused_lora"

# layer -> what it may import of this project; "kernels" stands for fused_lora.kernels
ALLOWED = {
    "kernels": set(),
    "reference": set(),
    "ops": {"kernels", "reference"},
    "functional": {"ops", "reference"},
    "bases": {"ops", "reference", "rows"},
    "rows": set(),
    "modules": {"bases", "ops", "reference", "rows"},
    "adapters": {"modules", "reference"},
    "checkpoints": {"adapters", "modules", "bases", "ops"},
    "integrations": {"adapters", "modules", "bases", "ops", "kernels", "reference"},
    "serving": {"adapters", "modules", "rows", "ops", "kernels", "reference"},
    "testing": {"kernels", "ops", "reference"},
    "diagnostics": {"integrations", "modules", "bases", "ops", "kernels", "reference", "testing"},
    "cli": {"checkpoints", "diagnostics", "integrations", "serving", "modules"},
}
THIRD_PARTY = {
    "kernels": {"torch", "triton"},
    "reference": {"torch", "numpy"},
    "ops": {"torch", "numpy"},
    "functional": set(),
    "bases": {"torch"},
    "rows": {"torch", "numpy"},
    "modules": {"torch"},
    "adapters": {"torch", "safetensors", "numpy"},
    "checkpoints": {"torch"},
    "integrations": {"torch", "numpy"},
    "serving": {"torch", "numpy"},
    "testing": {"torch", "numpy", "triton"},
    "diagnostics": {"torch"},
    "cli": {"torch"},
}
# these stand above the layers: the public names, the version, and where the kernels are found
ABOVE = {"__init__.py", "_version.py", "kernels.py"}

# calls that make a tensor on torch's default device, and who draws there as PEFT does
FACTORIES = {
    f"torch.{name}"
    for name in "arange as_tensor asarray empty empty_strided eye full linspace logspace ones rand randint randn "
    "randperm scalar_tensor tensor zeros".split()
}
DRAWN_BY_DEFAULT = ("fused_lora.modules.linear", "fused_lora.modules.embedding")

# files of the extras, imported only where an engine or a server is asked for, or by vLLM itself
EXTRAS = {
    "fused_lora/integrations/vllm/": {"vllm"},
    "fused_lora/serving/engine/": {"transformers"},
    "fused_lora/serving/http/": {"fastapi", "starlette", "pydantic", "annotated_types", "prometheus_client"},
}


def files() -> Iterator[tuple[str, Path]]:
    """(layer, file) of the package."""
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        yield "kernels", path
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent != PACKAGE or path.name not in ABOVE:
            yield path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path


FILES = list(files())
each_file = pytest.mark.parametrize(
    "layer, path", FILES, ids=[path.relative_to(ROOT).with_suffix("").as_posix() for _, path in FILES]
)


def name_of(path: Path) -> str:
    """The dotted name under which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("fused_lora", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(absolute name, is at the top of the file) for every import but those for type checkers alone."""
    package = name_of(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]

    def visit(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                start = package[: len(package) - child.level + 1] if child.level else []
                base = ".".join([*start, *([child.module] if child.module else [])])
                yield from ((f"{base}.{alias.name}", top) for alias in child.names)
            else:
                yield from visit(child, False)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), True)


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other: what is left when everything without a way in or out is taken away."""
    reached = {}
    for start in edges:
        found, todo = set(), [start]
        while todo:
            for node in edges.get(todo.pop(), ()):
                if node not in found:
                    found.add(node)
                    todo.append(node)
        reached[start] = found
    groups = {frozenset(n for n in reached[m] if m in reached.get(n, ())) for m in edges if m in reached[m]}
    return [sorted(group) for group in groups]


def module_graph() -> dict[str, set[str]]:
    """{module: the modules of this project that it imports}, imports inside functions included."""
    paths = [path for _, path in FILES]
    paths += [path for path in PACKAGE.glob("*.py") if path.name in ABOVE]
    names = {name_of(path) for path in paths}
    graph = {}
    for path in paths:
        found = {name if name in names else name.rpartition(".")[0] for name, _ in imports(path)}
        graph[name_of(path)] = found & names - {name_of(path)}
    return graph


def test_every_module_has_a_layer():
    assert {layer for layer, _ in FILES} == set(ALLOWED) == set(THIRD_PARTY)


@each_file
def test_imports_point_down(layer, path):
    for name, top in imports(path):
        first, *rest = name.split(".")
        assert first != "kernels", f"{path.name}: import fused_lora.kernels, never kernels"
        if first == "fused_lora":
            target = rest[0] if rest else ""
            assert target or layer == "diagnostics", f"{path.name}: import the module that has it, not the package"
            if target not in ("", layer, "_version"):  # anybody may say which version it is
                assert target in ALLOWED[layer], f"{path.name} ({layer}) must not import {name}"
        elif first not in sys.stdlib_module_names:
            where = path.relative_to(ROOT).as_posix()
            extras = set().union(*(names for start, names in EXTRAS.items() if where.startswith(start)))
            assert first in THIRD_PARTY[layer] | extras or not top, (
                f"{path.name} ({layer}) must not import {name} at the top"
            )


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_point_down(command):
    """They are imported by name, which :func:`imports` does not see."""
    module, _, function = COMMANDS[command][0].partition(":")
    layer, _, rest = module.partition(".")
    assert layer == "cli" or layer in ALLOWED["cli"]
    tree = ast.parse((PACKAGE / layer / f"{rest}.py").read_text(encoding="utf-8"))
    assert function in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_modules_import_each_other_in_a_circle():
    assert circles(module_graph()) == []


@pytest.mark.parametrize("part", ["serving", "ops"])
def test_no_folders_import_each_other_in_a_circle(part):
    prefix = f"fused_lora.{part}."
    folders: dict[str, set[str]] = {}
    for name, targets in module_graph().items():
        if name.startswith(prefix):
            own = name.removeprefix(prefix).partition(".")[0]
            inside = {t.removeprefix(prefix).partition(".")[0] for t in targets if t.startswith(prefix)}
            folders.setdefault(own, set()).update(inside - {own})
    assert len(folders) > 2 and circles(folders) == []


def test_the_package_alone_imports_no_extra_and_not_dynamo():
    names = "{'peft', 'transformers', 'fastapi', 'accelerate', 'uvicorn', 'torch._dynamo'}"  # Dynamo takes a second
    code = f"import sys, fused_lora; print(sorted({names} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=HANG)
    assert found.stdout.strip() == "[]"


@each_file
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


@each_file
def test_new_tensors_name_their_device(layer, path):
    """torch.set_default_device would put them elsewhere, and C, numpy and files take what lies on a CPU."""
    if name_of(path) in DRAWN_BY_DEFAULT or layer == "testing":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in FACTORIES:
            given = {keyword.arg for keyword in node.keywords}
            assert given & {"device", None}, f"{path.name}:{node.lineno}: expected device="


@each_file
def test_public_functions_are_annotated_and_documented(layer, path):
    if layer in ("kernels", "testing"):
        return
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            if any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list):
                continue
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"
            assert node.returns is not None, f"{path.name}: {node.name} does not say what it returns"
            missing = [a.arg for a in node.args.args + node.args.kwonlyargs if a.annotation is None]
            assert not missing, f"{path.name}: {node.name} leaves {missing} without annotation"
