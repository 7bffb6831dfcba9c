"""Where a checkpoint has the parameters that PEFT's ``target_parameters`` adapts: a stack of experts, or each expert's.

transformers stacks the experts of a layer as it loads them, [experts, out, in], gate above up. On disk they may be
single matrices under other names. PEFT nests one wrapper for each parameter around a module, and the file does not say
which is whose: their shapes must.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from fused_lora.adapters.checkpoint import CONFIG_NAME, Plan, RankTable
from fused_lora.adapters.errors import AdapterError
from fused_lora.adapters.expert_files import OLD_PLACES, of_older_peft, single_expert
from fused_lora.checkpoints.adapter_file import AdapterFile
from fused_lora.checkpoints.names import Names
from fused_lora.modules.experts import NAMES
from fused_lora.modules.names import some
from fused_lora.modules.tree import bare_module

# a stacked parameter -> what its rows may be called where each expert has matrices of its own, from top to bottom
_OF_ONE_EXPERT = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3"), ("fc1", "fc3")),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",), ("fc2",)),
}

# where checkpoints have routers, beside the names that transformers gives them as it loads them
_ROUTERS = (
    (".mlp.gate", ".block_sparse_moe.gate"),
    (".mlp.gate", ".mlp.router.gate"),
    (".mlp.gate", ".moe.gate"),
    (".mlp.router", ".block_sparse_moe.gate"),
    (".router", ".router.layer"),
)

_MOST = 5  # parameters of a module, which are tried in any order


class Matrix(NamedTuple):
    """One tensor of a stack: rows ``first`` on of an expert, or, without one, all experts below each other."""

    stored: str
    expert: int | None = None
    first: int = 0
    rows: int = 0


class Stack(NamedTuple):
    """A parameter as the checkpoint has it: [experts, rows, columns] in these tensors. ``whole``: in one."""

    name: str
    shape: tuple[int, int, int]
    matrices: list[Matrix]
    whole: bool


class Adapted(NamedTuple):
    """A wrapper of PEFT's and its parameter. transposed: lora_B lora_A of an expert is [columns, rows]."""

    path: str
    stack: Stack
    transposed: bool


def find_stack(names: Names, name: str) -> Stack | None:
    """Where the parameter ``name`` is; None for nowhere. Raises ValueError where it may be in several places."""
    module, _, last = name.rpartition(".")
    others = [module.removesuffix(new) + old for new, old in _ROUTERS if last == "weight" and module.endswith(new)]
    places = [found for path in (module, *others) if (found := names.known(f"{path}.{last}", "")) is not None]
    if len(places) > 1:
        raise ValueError(f"{name!r} may be {some(places)}")
    if places:
        return _whole(names, name, places[0])
    found = [
        stack
        for parent in dict.fromkeys((module, *(module.replace(a, b) for b, a in OLD_PLACES.items())))
        for parts in _OF_ONE_EXPERT.get(last, ())
        if (stack := _of_single_experts(names, name, parent, parts)) is not None
    ]
    if len(found) > 1:
        raise ValueError(f"{name!r} may be {some([stack.matrices[0].stored for stack in found])}")
    return found[0] if found else _whole(names, name, names.alias(name, ""))


def _whole(names: Names, name: str, place: str | None) -> Stack | None:
    stored = None if place is None else names.stored(place)
    if stored is None or len(shape := names.shape_of(stored)) not in (2, 3):
        return None
    experts, rows, columns = shape if len(shape) == 3 else (1, *shape)
    return Stack(name, (experts, rows, columns), [Matrix(stored)], True)


def _of_single_experts(names: Names, name: str, parent: str, parts: tuple[str, ...]) -> Stack | None:
    matrices, heights, columns = [], [], 0
    for expert in itertools.count():
        paths = [names.known(f"{parent}.{expert}.{part}") for part in parts]
        if None in paths:
            break
        shapes = [names.shape(path) for path in paths if path is not None]
        if any(len(shape) != 2 for shape in shapes):
            return None
        if not expert:
            heights, columns = [shape[0] for shape in shapes], shapes[0][1]
        if shapes != [(height, columns) for height in heights]:
            return None
        first = 0
        for path, height in zip(paths, heights, strict=True):
            stored = names.stored(f"{path}.weight")
            assert stored is not None
            matrices.append(Matrix(stored, expert, first, height))
            first += height
    return Stack(name, (expert, sum(heights), columns), matrices, False) if matrices else None


def adapted_stacks(plan: Plan, names: Names) -> list[Adapted]:
    """The parameter of each wrapper in the file, by shapes. The ranks that follow from them go to ``plan.ranks``.

    Raises AdapterError where none, or more than one, fits.
    """
    table = RankTable(os.path.join(os.path.dirname(plan.weights), CONFIG_NAME), plan.weights, plan.config)
    modules = _by_module(plan.stacks)
    if modules and plan.config.fan_in_fan_out:
        config = os.path.join(os.path.dirname(plan.weights), CONFIG_NAME)
        raise AdapterError(config, "fan_in_fan_out", "False with target_parameters, as in PEFT", True)
    found = []
    for module, paths in modules.items():
        for adapted in _assigned(plan, names, table, module, paths):
            key = plan.slots[adapted.path]["lora_A"]
            if adapted.transposed and not adapted.stack.whole:
                expected = f"lora_A [experts * r, in] for the matrices [out, in] of {adapted.stack.name!r}"
                raise AdapterError(plan.weights, key, expected, "in and out exchanged, as an older PEFT had them")
            rank = plan.entries[key].shape[0] // adapted.stack.shape[0]
            plan.ranks[adapted.path] = table.of(adapted.stack.name, rank, key)
            found.append(adapted)
    return found


def parameters_by_config(plan: Plan) -> dict[str, str]:
    """What :func:`adapted_stacks` finds, without a checkpoint: {wrapper: its parameter}, in the order in which a module
    holds them, and ``plan.ranks``.

    All stacks of a module have as many experts, which tells ranks apart. What gate_up_proj gives, down_proj takes.
    Where ranks and alphas are the same in any order, the order is transformers' own, and of other names unknown: such
    wrappers are left out.

    Raises AdapterError where the config gives a wrapper several ranks or alphas.
    """
    table = RankTable(os.path.join(os.path.dirname(plan.weights), CONFIG_NAME), plan.weights, plan.config)
    parameters: dict[str, str] = {}
    for module, paths in _by_module([path for path in plan.stacks if path not in plan.ranks]).items():
        names = [f"{module}.{name}" for name in plan.stacks[paths[0]]]
        keys = [plan.slots[path]["lora_A"] for path in paths]
        if len(names) > _MOST or len(paths) > len(names):
            expected = f"at most {_MOST} parameters of {module!r}, and no more wrappers"
            raise AdapterError(plan.weights, keys[0], expected, f"{len(names)} and {len(paths)}")
        rows = [plan.entries[key].shape[0] for key in keys]
        possible, alphas = {name: table.possible(name) for name in names}, {name: table.alpha(name) for name in names}
        ways = [
            (order, tuple((r, alphas[name]) for name, r in zip(order, ranks, strict=True)))
            for order in itertools.permutations(names, len(paths))
            for ranks in itertools.product(*(possible[name] for name in order))
            if len({divmod(n, r) for n, r in zip(rows, ranks, strict=True)}) == 1 and rows[0] and not rows[0] % ranks[0]
        ]
        ways = [way for way in ways if _belong(plan, paths, way[0])] or ways
        if len(found := {held for _, held in ways}) != 1:
            expected = f"one rank and alpha for each of {some(names)}; a base's shapes tell more (--base)"
            raise AdapterError(plan.weights, keys[0], expected, sorted(found) or f"{rows} rows")
        plan.ranks.update(zip(paths, found.pop(), strict=True))
        orders = {order for order, _ in ways}
        if len(orders) > 1:
            orders = {order for order in orders if list(order) == _registered(order)[::-1]}
        if len(orders) == 1:
            parameters |= reversed([*zip(paths, orders.pop(), strict=True)])
    return parameters


def _belong(plan: Plan, paths: Sequence[str], order: Sequence[str]) -> bool:
    """Whether these wrappers have the sizes of gate and up, or of up alone, and of the down_proj behind them."""
    shapes = ([plan.entries[plan.slots[path][part]].shape for part in ("lora_A", "lora_B")] for path in paths)
    sizes = {name.rpartition(".")[2]: (A[1], B[0]) for name, (A, B) in zip(order, shapes, strict=True)}
    K, N = sizes.get("down_proj", (0, 0))
    before = [(sizes[name], halves) for name, halves in (("gate_up_proj", 2), ("up_proj", 1)) if name in sizes]
    # the second where PEFT has in and out of all experts exchanged
    return bool(before) and all(held in ((N, halves * K), (halves * N, K)) for held, halves in before)


def _registered(names: Iterable[str]) -> list[str]:
    """Parameters of one module in the order in which transformers registers them; none where it has no such names."""
    last = {name.rpartition(".")[2]: name for name in names}
    return [last[name] for name in NAMES if name in last] if last.keys() <= {*NAMES} else []


def by_parameter(plan: Plan, whole: bool = True, base: Names | None = None) -> Plan:
    """The plan with the path of each parameter in place of its wrapper's, and ``experts`` in the order of the modules.

    Where the files do not tell, the sizes of a ``base`` do. Without one it raises AdapterError where
    :func:`parameters_by_config` does, and if ``whole`` where that leaves out a wrapper, whose path stays else.
    """
    try:
        named = parameters_by_config(plan)
    except AdapterError:
        if base is None:
            raise
        named = {}
    if base is not None and plan.stacks.keys() - named.keys():
        named = {found.path: found.stack.name for found in reversed(adapted_stacks(plan, base))}
    for path, names in plan.stacks.items():
        if whole and path not in named:
            expected = f"a rank of its own for each of {some(names)}, or a base (--base), to know which is whose"
            raise AdapterError(plan.weights, plan.slots[path]["lora_A"], expected, f"{plan.ranks[path][0]} for several")
    rows = {name: plan.entries[plan.slots[path]["lora_A"]].shape[0] for path, name in named.items()}
    experts = {name: rows[name] // plan.ranks[path][0] for path, name in named.items()}
    return _moved(plan, named)._replace(experts=experts, stacks={})


def name_parameters(adapters: Sequence[AdapterFile], whole: bool = True, base: Names | None = None) -> dict[str, int]:
    """:func:`by_parameter` of all plans, and how many experts each parameter has.

    A layer that is ``gate`` in one adapter and the parameter ``gate.weight`` in another is the second in both.
    """
    for adapter in adapters:
        adapter.plan = by_parameter(adapter.plan, whole, base)
    every = {name: count for adapter in adapters for name, count in adapter.plan.experts.items()}
    for adapter in adapters:
        slots = adapter.plan.slots
        adapter.plan = _moved(adapter.plan, {path: name for path in slots if (name := f"{path}.weight") in every})
    return every


def common_parameters(adapters: Sequence[AdapterFile], base: Names | None = None) -> dict[str, int]:
    """:func:`name_parameters` in the order in which modules hold them, for an adapter out of all of these.

    Raises AdapterError where :func:`by_parameter` does, for single experts of one file that are stacked in another, and
    where the files do not tell the order in which a module holds its parameters, or whether lora_A and lora_B are
    exchanged: of square experts the release of PEFT does.
    """
    every = name_parameters(adapters, base=base)
    held: dict[str, list[list[str]]] = {}  # the parameters of each module, by adapter
    for adapter in adapters:
        plan, own = adapter.plan, {}
        for name in plan.experts:
            own.setdefault(name.rpartition(".")[0], []).append(name)
        for module, names in own.items():
            held.setdefault(module, []).append(names)
            square = all(count > 1 and K == N for count, _, K, N in map(adapter.sizes, names))
            if square and len({of_older_peft(other.plan.config) for other in adapters}) > 1:
                expected = "adapters from before PEFT 0.19.1 or from later alone: it exchanged in and out of experts"
                raise AdapterError(plan.weights, plan.slots[names[0]]["lora_A"], expected, "both, and square experts")
    for adapter in adapters:
        for path in adapter.plan.slots:
            if (single := single_expert(path)) is not None and single[0] in held:
                expected = f"experts of {single[0]!r} stacked in all adapters (convert --stack-experts)"
                raise AdapterError(adapter.plan.weights, path, expected, "a single one")
    ordered = []
    for module, orders in held.items():
        names = {name for order in orders for name in order}
        longest = max(orders, key=len)
        ordered += (order := longest if len(longest) == len(names) else _registered(names))
        if any([name for name in order if name in own] != own for own in orders):
            expected = f"parameters of {module!r} in one order, transformers' or that of an adapter that has all"
            raise AdapterError(adapters[0].plan.weights, module, expected, orders)
    return {name: every[name] for name in ordered}


def _moved(plan: Plan, named: Mapping[str, str]) -> Plan:
    """The plan with other paths in place of some."""
    slots, ranks = ({named.get(path, path): held for path, held in table.items()} for table in (plan.slots, plan.ranks))
    return plan._replace(slots=slots, ranks=ranks, embeddings={named.get(path, path) for path in plan.embeddings})


def _by_module(paths: Iterable[str]) -> dict[str, list[str]]:
    """PEFT's wrappers by the module that they are around, the outermost, which has the shortest path, first."""
    modules: dict[str, list[str]] = {}
    for path in sorted(paths, key=len):
        modules.setdefault(bare_module(path), []).append(path)
    return modules


def _assigned(plan: Plan, names: Names, table: RankTable, module: str, paths: list[str]) -> list[Adapted]:
    """Which wrapper around ``module`` is of which of its parameters, and how it is turned."""
    key, parameters = plan.slots[paths[0]]["lora_A"], plan.stacks[paths[0]]
    try:
        stacks = [s for name in parameters if (s := find_stack(names, f"{module}.{name}")) is not None]
    except ValueError as error:
        raise AdapterError(plan.weights, key, "one parameter of the checkpoint", str(error)) from None
    if len(stacks) < len(paths):
        found = f"{some([s.name for s in stacks])}; {names.near(module)}" if stacks else names.near(module)
        expected = f"{len(paths)} of the parameters {some(parameters)} of {module!r}, stacked or of single experts"
        raise AdapterError(plan.weights, key, expected, found)
    ways = []
    for order in itertools.permutations(stacks, len(paths)):
        turns = [_orientations(plan, table, path, stack) for path, stack in zip(paths, order, strict=True)]
        ways += [
            [Adapted(*each, turned) for each in zip(paths, order, strict=True)]
            for turned in (False, True)
            if all(turned in possible for possible in turns)
        ]
    if len(ways) == 1:
        return ways[0]
    has = {stack.name: list(stack.shape) for stack in stacks}
    held = [[list(plan.entries[plan.slots[path][part]].shape) for part in ("lora_A", "lora_B")] for path in paths]
    if not ways:
        raise AdapterError(plan.weights, key, f"[experts * r, in] and [out, r * experts] for {has}", held)
    expected = f"shapes that tell which of {has} an adapter is of, and whether it is transposed"
    raise AdapterError(plan.weights, key, expected, f"{held}, which fit in {len(ways)} ways")


def _orientations(plan: Plan, table: RankTable, path: str, stack: Stack) -> set[bool]:
    """Whether the adapter's delta may be as the stack is stored (False), or transposed (True)."""
    keys, (experts, rows, columns) = plan.slots[path], stack.shape
    A, B = (plan.entries[keys[part]].shape for part in ("lora_A", "lora_B"))
    if not experts or A[0] % experts or A[0] // experts not in table.possible(stack.name):
        return set()
    turns = (False, True) if experts > 1 else (False,)  # of a matrix PEFT turns nothing
    return {t for t in turns if (B[0], A[1]) == ((columns, rows) if t else (rows, columns))}
