"""Do the kernel tests have teeth? Each mask of each kernel is taken away in turn, and each must be missed.

A mutant is one @triton.jit function with one change:

    no mask        a load, store or atomic loses its mask
    always         one comparison that goes into a mask holds for every lane
    endless        a tile is loaded or stored as if the matrix had no last row, or no last column
    no barrier     a barrier of the protocol between programs is left out
    relaxed        an atomic of that protocol orders nothing

Every kernel that uses the function then runs on ragged shapes. The mutant is caught if an access leaves its tensor, a
guard band or a neighbour's element is touched, or a result has other bits than the sound kernel's.
"""

import ast
import copy
import functools
import importlib.util
import inspect
import sys

import pytest
import torch

from fused_lora.kernels import (
    delta,
    dequant_4bit,
    dropout,
    dropped,
    grouped_shrink,
    lora_backward,
    lora_expand,
    lora_grad,
    lora_linear,
    lora_shrink,
    merge,
    sync,
    tiles,
)
from fused_lora.kernels import grouped_expand as lora_grouped
from fused_lora.kernels.config import LaunchConfig
from fused_lora.kernels.grouped_tables import ExpandConfig
from fused_lora.ops.dequant import FourBit
from fused_lora.testing.bounds import AccessError
from fused_lora.testing.grouped import GroupedCase
from fused_lora.testing.guards import guarded_allocations
from fused_lora.testing.interpreter import checked, interpreting
from fused_lora.testing.layers import LayerCase
from helpers.quantised import dequant_case
from helpers.seeds import shifted
from helpers.thorough import sampled

pytestmark = pytest.mark.skipif(not interpreting(), reason="mutants run in the interpreter alone")
MODULES = [
    delta, dequant_4bit, dropout, dropped, grouped_shrink, lora_backward, lora_expand, lora_grad, lora_grouped,
    lora_linear, lora_shrink, merge, sync, tiles,
]  # fmt: skip
TILE_CALLS = ("load_tile", "store_tile")  # their arguments end with num_rows, num_cols, ROWS, COLS
MASK_NAMES = ("mask", "inside", "row_ok", "todo")
HARMLESS = ("tl.load(bias_ptr + offs % N,",)  # an index modulo the size is in bounds without a mask, and is not stored


def is_kernel(node):
    return isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)


def sites(tree, protocol):
    """(kernel, what, position of the node in a walk over the kernel, detail) of every mutant of a module."""
    for kernel in filter(is_kernel, tree.body):
        in_masks = set()
        for node in ast.walk(kernel):
            named = isinstance(node, ast.Assign) and any(w in ast.unparse(node.targets[0]) for w in MASK_NAMES)
            if named or (isinstance(node, ast.keyword) and node.arg == "mask"):
                in_masks |= {id(n) for n in ast.walk(node.value)}
            if isinstance(node, ast.Call) and "delta" in ast.unparse(node.func):
                in_masks |= {id(n) for n in ast.walk(node)}
        for position, node in enumerate(ast.walk(kernel)):
            if isinstance(node, ast.Call) and any(k.arg == "mask" for k in node.keywords):
                if ast.unparse(node).startswith(HARMLESS):
                    continue
                yield kernel.name, "no mask", position, node.lineno
            if isinstance(node, ast.Compare) and id(node) in in_masks:
                yield kernel.name, "always", position, node.lineno
            if isinstance(node, ast.Call) and ast.unparse(node.func) in TILE_CALLS:
                yield kernel.name, "endless rows", position, node.lineno
                yield kernel.name, "endless columns", position, node.lineno
            if isinstance(node, ast.Expr) and "debug_barrier" in ast.unparse(node) and protocol:
                yield kernel.name, "no barrier", position, node.lineno
            if isinstance(node, ast.keyword) and node.arg == "sem" and node.value.value != "relaxed" and protocol:
                yield kernel.name, "relaxed", position, node.value.lineno


def mutate(source, kernel, what, position):
    tree = ast.parse(source)
    function = next(n for n in tree.body if is_kernel(n) and n.name == kernel)
    node = list(ast.walk(function))[position]
    if what == "no mask":
        node.keywords = [k for k in node.keywords if k.arg not in ("mask", "other")]
    elif what == "no barrier":
        node.value = ast.Constant(None)
    elif what == "relaxed":
        node.value = ast.Constant("relaxed")
    elif what == "always":
        opposite = copy.deepcopy(node)
        opposite.ops = [{ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}[type(node.ops[0])]()]
        text = f"({ast.unparse(node)}) | ({ast.unparse(opposite)})"
        replacement = ast.parse(text, mode="eval").body
        for parent in ast.walk(function):
            for field, value in ast.iter_fields(parent):
                if value is node:
                    setattr(parent, field, replacement)
                elif isinstance(value, list) and any(v is node for v in value):
                    value[:] = [replacement if v is node else v for v in value]
    else:
        node.args[-4 if what == "endless rows" else -3] = ast.Constant(2**30)
    return ast.unparse(ast.fix_missing_locations(tree))


def cases():
    for module in MODULES:
        source = inspect.getsource(module)
        for kernel, what, position, line in sites(ast.parse(source), protocol=module is sync):
            name = module.__name__.rpartition(".")[2]
            yield pytest.param(module, kernel, what, position, id=f"{name}-{line}-{kernel}-{what}".replace(" ", "_"))


def run_mask():
    return [dropout.dropout_mask(torch.tensor([7]), 19, 37, 0.5, BLOCK_M=16, BLOCK_K=32)]


def run_dropped():
    return [dropped.dropped(torch.randn(19, 37), torch.tensor([7]), 0.5)]


def run_dequant():
    """A whole number of bytes and half of one more; scales in fp32 and double quantised."""
    seen = []
    for nested in (False, True):
        case = dequant_case(27, 155, 64, nested)
        seen.append(dequant_4bit.dequant_4bit(*case, torch.float32))
    return seen


def run_merge(R, K=300, dtype=torch.bfloat16):
    """There and back twice, the second time with a changed unit; with room for half of it; and without a record."""
    W, tile, seen = (torch.randn(21, K) * 0.02).to(dtype), merge.MergeTile(16, 128), []
    A, B = torch.randn(R, K), torch.randn(21, R) * 0.01
    whole = merge.new_record(W, W.numel(), tile)
    merge.merge(W.clone(), A, B, whole, tile)
    for room in (whole.totals()[0], whole.totals()[0] // 2):
        ours, record = W.clone(), merge.new_record(W, room, tile)
        merge.merge(ours, A, B, record, tile)
        for step in (merge.unmerge, merge.merge_again, merge.unmerge, merge.merge_again):
            seen += [ours.clone(), record.table.clone()]
            step(ours, A, B, record, tile)
            ours[20, -1] += 1
        seen += [ours, record.table, record.places, record.values]
    for changed in (0, 1):
        ours, old, new = W.clone(), merge.new_record(W, W.numel(), tile), merge.new_record(W, W.numel(), tile)
        merge.merge(ours, A, B, old, tile)
        ours[20, -1] += changed
        merge.switch(ours, (A, B, old), (A * 0.5, B, new), tile)
        seen += [ours, old.table, new.table, new.places, new.values]
    for step in (merge.merge_apply, merge.unmerge_apply):
        step(W, A, B, tile)
        seen.append(W.clone())
    return seen


def run_layer(variant, p, split_k=1, ranks=(3,), late=False):
    """Forward, the LoRA term of dx and onto a given y, weight gradients."""
    case = LayerCase.make(21, 35, 37, ranks, [p] * len(ranks))
    config = LaunchConfig(variant, 16, 32, 32, 16, SPLIT_K=split_k, late=late)
    y, S = lora_linear.lora_linear_forward(case.x, case.weight, case.bias, *case.adapters, config=config)
    tile, dS, ones = LaunchConfig("expand", 16, 32, 16, 16), torch.randn_like(S), [1.0] * len(ranks)
    dx = lora_expand.lora_expand(dS, case.lora_A, ones, case.dropout, case.seeds, None, torch.float32, tile)
    B_t = [B.t() for B in case.lora_B]
    onto = lora_expand.lora_expand(S, B_t, ones, case.dropout, None, case.bias, torch.float32, tile, case.g)
    gradient = LaunchConfig("weight_grad", 32, 16, 16, 16, SPLIT_K=split_k)
    dA, dB = lora_grad.lora_linear_weight_grad(
        case.g, case.x, S, dS, case.scaling, case.dropout, case.seeds, case.ranks, torch.float32, gradient
    )
    return [y, S, dx, onto, *dA, *dB]


def run_4bit(nested, variant, split_k, ranks):
    """A last tile of K in part, and of N."""
    case = LayerCase.make(5, 35, 192, ranks, [0.0] * len(ranks))
    weight = FourBit(*dequant_case(35, 192, 64, nested), torch.float32)
    config = LaunchConfig(variant, 16, 32, 128, 16, SPLIT_K=split_k)
    return lora_linear.lora_linear_forward(case.x, weight, case.bias, *case.adapters, config=config)


def run_shrink():
    """K split over programs, two adapters, ragged in rows and ranks."""
    case = LayerCase.make(21, 35, 37, [3, 18], [0.25, 0.0])
    config = LaunchConfig("shrink", 16, 16, 16, 16, SPLIT_K=2)
    return [lora_shrink.lora_shrink(case.x, case.lora_A, [1.5, 1.0], case.dropout, case.seeds, config)]


def run_passes():
    case = LayerCase.make(37, 35, 41, [3], [0.25])
    config = LaunchConfig("backward", 16, 32, 16, 16, SPLIT_K=2)
    dS, dB = lora_backward.lora_backward_g(case.g, torch.randn(37, 3), case.lora_B[0], 2.0, config)
    return [dS, dB, *lora_backward.lora_backward_x(case.x, dS, case.lora_A[0], 0.25, case.seeds, config)]


class Grouped:
    """A batch over many adapters; ``extra`` is what its kernels reach by address."""

    def __init__(self, ranks, groups, expand):
        self.ranks, self.groups, self.expand = ranks, groups, expand

    @functools.cached_property
    def case(self):
        rows = [1, 0, -1, 0, len(self.groups) - 1]
        return GroupedCase.make(rows, self.groups, self.ranks, [35, 9], 37)

    @property
    def extra(self):
        return self.case.adapters

    def __call__(self):
        outputs, guards = self.case.run(LaunchConfig("shrink", 16, 16, 32, 32), self.expand)
        guards.assert_intact()
        return outputs


TWO = [[(0, 1.0)], [(1, 2.0)]]
GROUPED = [
    Grouped([[3, 18], [20, 0]], [*TWO, [(0, 1.0), (1, -1.0)]], ExpandConfig("expand", 16, 32, 16, 16)),
    Grouped([[3, 8], [16, 0]], TWO, ExpandConfig("expand", 16, 32, 16, 16, STEPS=2, RANK_BLOCKS=4)),
]
LAYERS = [
    lambda: run_layer("split", 0.25, ranks=(3, 18)),
    run_shrink,
    lambda: run_layer("recompute", 0.0),
    lambda: run_layer("recompute", 0.0, split_k=2),
    run_passes,
    lambda: run_layer("split", 0.25, late=True),
    lambda: run_4bit(True, "recompute", 1, [3]),
    lambda: run_4bit(False, "split", 2, [3, 18]),
]
MERGES = [functools.partial(run_merge, 8), functools.partial(run_merge, 11, 299)]  # one turn of ranks, and a rest
MERGES.append(functools.partial(run_merge, 3, dtype=torch.float32))
SCENARIOS = {
    dequant_4bit: [run_dequant],
    merge: MERGES,
    delta: MERGES,
    dropout: [run_mask],
    dropped: [run_dropped],
    lora_backward: [run_passes],
}
SCENARIOS |= {grouped_shrink: GROUPED, lora_grouped: GROUPED}
SOUND = {}


def outcome(scenario):
    torch.manual_seed(shifted(1))
    with checked(extra=getattr(scenario, "extra", ())), guarded_allocations():
        return [t.clone() for t in scenario()]


def same_bits(left, right):
    return len(left) == len(right) and all(
        a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize(("module", "kernel", "what", "position"), sampled(cases(), 8))
def test_every_lost_mask_is_missed(module, kernel, what, position, tmp_path, monkeypatch):
    path = tmp_path / "mutant.py"
    path.write_text(mutate(inspect.getsource(module), kernel, what, position), encoding="utf-8")
    scenarios = SCENARIOS.get(module, LAYERS)
    for scenario in scenarios:
        if scenario not in SOUND:
            SOUND[scenario] = outcome(scenario)
    spec = importlib.util.spec_from_file_location("fused_lora.kernels.mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, mutant)
    spec.loader.exec_module(mutant)
    sound = getattr(module, kernel)
    for name, other in list(sys.modules.items()):
        if name.startswith("fused_lora.kernels"):
            for attribute, value in list(vars(other).items()):
                if value is sound:
                    monkeypatch.setattr(other, attribute, getattr(mutant, kernel))
    for scenario in scenarios:
        try:
            result = outcome(scenario)
        except (AccessError, AssertionError):
            return
        if not same_bits(result, SOUND[scenario]):
            return
    pytest.fail(f"{kernel}: '{what}' makes no difference that a test could see")


def test_there_are_enough_mutants():
    assert len(list(cases())) >= 30
