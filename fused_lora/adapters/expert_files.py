"""LoRA on experts in other layouts than PEFT's of today: recognised by keys and shapes, and read as PEFT writes it.

PEFT has two tensors for a stacked parameter [experts, N, K]: lora_A [experts * r, K], whose slowest part is the expert,
and lora_B [N, r * experts], whose fastest part is the expert. Others are:

    experts.3.gate_proj.lora_A     one layer for each expert and projection, gate and up apart (w1, w3, w2 in Mixtral)
    experts.gate_up_projs.3.lora_A the same with the expert last
    experts.down_proj.lora_A       one tensor [experts, r, K] and [experts, N, r] under the parameter's own name
    gate.lora_A, without gate.weight in target_parameters   a router as the linear layer that it was
    A [experts * r, N], B [K, ...] PEFT before 0.19.1 where the parameter is [experts, N, K]: the delta is transposed
    lora_B_layout                  an entry of the config: "grouped_by_expert" where lora_B has the expert slowest

An adapter of gate and up apart has rank 2 r in gate_up_proj: A of both below each other, B of both on a diagonal.
Experts may multiply with W^T of PEFT's W, as Llama-4's do. Then A and B of others are PEFT's B^T and A^T.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_lora.adapters.errors import AdapterError
from fused_lora.adapters.patterns import PatternTable
from fused_lora.adapters.tensorfile import TensorEntry
from fused_lora.modules.config import FieldError, LoraConfig, scaling
from fused_lora.modules.experts import NAMES, file_paths
from fused_lora.modules.tree import own_path

LAYOUT, GROUPED = "lora_B_layout", "grouped_by_expert"
LAYOUTS = ("rank_major", GROUPED)  # the first is PEFT's
_SIDE = r"\.lora_(?P<side>[AB])(?:\.weight)?$"
_KEYS = tuple(
    re.compile(rf"^(?P<place>(?:.+\.)?experts)\.{middle}{_SIDE}")
    for middle in (r"(?P<expert>\d{1,4})\.(?P<leaf>\w+)", r"(?P<leaf>\w+)s\.(?P<expert>\d{1,4})", r"(?P<leaf>\w+)")
)
_LAYER = re.compile(rf"^(?P<place>.+){_SIDE}")
_HALVES = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1}  # of gate_up_proj
_WHOLE = {"gate_up_proj": "gate_up_proj", "down_proj": "down_proj", "w2": "down_proj", "up_proj": "up_proj"}
# of Mixtral before transformers 5
OLD_PLACES = {f".block_sparse_moe.{name}": f".mlp.{name}" for name in ("experts", "gate")}
_TURNED_UNTIL = (0, 19, 1)  # the first release of PEFT that reads [experts, N, K] as N outputs


class Stacked(NamedTuple):
    """A stacked parameter of experts: its path, how many experts, K and N of each.

    transposed: it is [experts, K, N]. interleaved: rows of gate and up take turns, where it has both. turned: the
    experts multiply with W^T of PEFT's W [N, K], so that other trainers' lora_A is [r, N].
    """

    path: str
    experts: int
    K: int
    N: int
    transposed: bool = False
    interleaved: bool = False
    turned: bool = False

    def as_called(self) -> Stacked:
        """The same with the K and N of what the experts multiply with."""
        return self._replace(K=self.N, N=self.K) if self.turned else self


# of a model: with a config what it targets, by the path that PEFT's files have for it; with None all, by their paths
Stacks = Callable[[LoraConfig | None], Mapping[str, Stacked]]


class Piece(NamedTuple):
    """A and B of one expert, or of all (None), for a half of the rows, or for all (None); and their scaling."""

    half: int | None
    expert: int | None
    A: str
    B: str
    scaling: float


class AsPeft(NamedTuple):
    """A file as PEFT would have written it: its entries, its config, and what makes its tensors of those read."""

    entries: dict[str, TensorEntry]
    config: LoraConfig
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]


def as_peft(
    path: str,
    entries: dict[str, TensorEntry],
    config: LoraConfig,
    layout: str | None,
    prefix: str,
    stacks: Stacks | None,
) -> AsPeft:
    """The file at ``path`` in PEFT's layout; as it is, where it has no other.

    Args:
        layout: the config's ``lora_B_layout``. prefix: of all keys. stacks: of the model; None: nothing is converted.

    Raises:
        AdapterError: tensors of experts that do not belong together, or do not fit the model's.
    """
    same = AsPeft(entries, config, lambda tensors: tensors)
    if stacks is None:
        if layout == GROUPED and config.target_parameters:
            raise AdapterError(path, LAYOUT, f"{LAYOUTS[0]}: others are read with the model that they are for", layout)
        return same
    found, used = _one_by_one(path, entries, config, prefix, stacks)
    if not found and not config.target_parameters:
        return same
    turned = _packed(entries, config, layout, prefix, stacks) if config.target_parameters else {}
    if not found and not turned:
        return same
    rows = {stack: _rows(path, entries, stack, pieces) for stack, pieces in found.items()}
    ranks = {stack: rank for stack, (_, rank) in rows.items()}
    changed = _config(path, config, entries, used, prefix, found, ranks)
    names = {stack.path: name for name, stack in stacks(changed).items()} if found else {}
    rest = {key: entry for key, entry in entries.items() if key not in used and key not in turned}
    made: dict[str, Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]] = {}
    for stack, pieces in found.items():
        if (key := f"{prefix}{names[stack.path]}.lora_A.weight") in rest or key in turned:
            raise AdapterError(path, key, f"experts of {stack.path!r} in one layout", f"{pieces[0].A} beside it")
        made[f"{prefix}{names[stack.path]}"] = lambda tensors, s=stack, p=pieces: _stacked(tensors, s, p, *rows[s])
        _add(rest, f"{prefix}{names[stack.path]}", entries[pieces[0].A].dtype, stack, ranks[stack])
    for key in turned:
        if key.endswith(".lora_A.weight"):
            base = key.removesuffix(".lora_A.weight")
            stack, make = turned[key]
            made[base] = make
            shape = entries[key].shape
            r = shape[1] if len(shape) == 3 else shape[0] // stack.experts
            _add(rest, base, entries[key].dtype, stack, r)

    def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {key: tensor for key, tensor in tensors.items() if key in rest and key not in turned}
        for base, make in made.items():
            kept[f"{base}.lora_A.weight"], kept[f"{base}.lora_B.weight"] = make(tensors)
        return kept

    return AsPeft(rest, changed, convert)


def pack(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A [experts, r, K] and B [experts, N, r] in PEFT's packing."""
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


def _add(entries: dict[str, TensorEntry], base: str, dtype: torch.dtype, stack: Stacked, r: int) -> None:
    rows = stack.experts * r
    entries[f"{base}.lora_A.weight"] = TensorEntry(dtype, (rows, stack.K), 0, 0)
    entries[f"{base}.lora_B.weight"] = TensorEntry(dtype, (stack.N, rows), 0, 0)


def _one_by_one(
    path: str, entries: Mapping[str, TensorEntry], config: LoraConfig, prefix: str, stacks: Stacks
) -> tuple[dict[Stacked, list[Piece]], set[str]]:
    """The pieces of each stacked parameter that the file has under other names than PEFT's, and all of their keys."""
    named = {key: name.removeprefix(prefix) for key in entries if (name := own_path(key)).startswith(prefix)}
    known = stacks(None)
    if not known:
        return {}, set()
    in_place = stacks(config) if config.target_parameters else {}
    alphas, there = PatternTable(config.alpha_pattern, config.lora_alpha), {path.rpartition(".")[0] for path in known}
    sides: dict[tuple[Stacked, int | None, int | None], dict[str, str]] = {}
    places: dict[tuple[Stacked, int | None, int | None], str] = {}
    for key, name in named.items():
        half = expert = None
        if (found := _match(name)) is not None:
            place, leaf = found["place"], found["leaf"]
            place = place if place in there else _renamed(place)
            half = _HALVES.get(leaf) if f"{place}.gate_up_proj" in known else None
            stack = known.get(f"{place}.{'gate_up_proj' if half is not None else _WHOLE.get(leaf, '')}")
            expert = None if found.groupdict().get("expert") is None else int(found["expert"])
        elif (found := _LAYER.match(name)) is not None and found["place"] not in in_place:
            stack = known.get(f"{_renamed(found['place'])}.weight")  # a router, which was a linear layer
        else:
            continue
        if stack is None:
            continue
        if expert is not None and expert >= stack.experts:
            raise AdapterError(path, key, f"experts below {stack.experts} of {stack.path!r}", expert)
        where = stack, half, expert
        if found["side"] in sides.setdefault(where, {}):
            raise AdapterError(path, key, f"one lora_{found['side']} of it", sides[where][found["side"]])
        sides[where][found["side"]] = key
        places[where] = name.rpartition(".lora_")[0]
    pieces: dict[Stacked, list[Piece]] = {}
    for where, keys in sides.items():
        stack, half, expert = where
        if lacking := {"A", "B"} - keys.keys():
            raise AdapterError(path, next(iter(keys.values())), f"a lora_{lacking.pop()} beside it", "none")
        possible = alphas.possible(places[where])
        if len(possible) > 1:
            raise AdapterError(path, "alpha_pattern", f"one alpha of {places[where]}", sorted(possible))
        shape = entries[keys["A"]].shape
        if len(shape) not in (2, 3):
            raise AdapterError(path, keys["A"], f"a matrix, or one for each expert of {stack.path!r}", list(shape))
        r = shape[-2] if len(shape) == 3 or expert is not None else shape[0] // stack.experts
        scale = scaling(max(r, 1), possible.pop(), config.use_rslora)
        pieces.setdefault(stack, []).append(Piece(half, expert, keys["A"], keys["B"], scale))
    return pieces, {key for keys in sides.values() for key in keys.values()}


def stacks_of_layers(sizes: Mapping[str, tuple[int, int]]) -> Stacks:
    """The stacked parameters that layers {path: (K, N)} of single experts are parts of, as transformers names them.

    There are as many experts as the file names. Rows of gate come before those of up.
    """
    held: dict[str, dict[str, list[tuple[int, int, int]]]] = {}
    for path, (K, N) in sizes.items():
        if (found := single_expert(path)) is not None:
            place, leaf, expert = found
            held.setdefault(place, {}).setdefault(leaf, []).append((expert, K, N))
    known: dict[str, dict[str, Stacked]] = {}
    for place, leaves in held.items():
        experts = max(expert for parts in leaves.values() for expert, *_ in parts) + 1
        gated = any(_HALVES.get(leaf) == 0 for leaf in leaves)
        for leaf, parts in leaves.items():
            half = gated and leaf in _HALVES
            name, (_, K, N) = "gate_up_proj" if half else _WHOLE[leaf], parts[0]
            known.setdefault(place, {})[name] = Stacked(f"{place}.{name}", experts, K, 2 * N if half else N)

    def stacks(config: LoraConfig | None) -> dict[str, Stacked]:
        found = {parts[name].path: parts[name] for parts in known.values() for name in sorted(parts, key=NAMES.index)}
        return found if config is None else {path: found[name] for name, path in file_paths(found).items()}

    return stacks


def single_expert(path: str) -> tuple[str, str, int] | None:
    """Of a layer of one expert: the module that has all of them in transformers 5, the layer's own name, the number."""
    found = _match(f"{path}.lora_A")
    if found is None or found.groupdict().get("expert") is None:
        return None
    place, leaf = found["place"], found["leaf"]
    return _renamed(place) if leaf in ("w1", "w2", "w3") else place, leaf, int(found["expert"])


def _renamed(place: str) -> str:
    return next((place.replace(old, new) for old, new in OLD_PLACES.items() if old in place), place)


def _match(name: str) -> re.Match[str] | None:
    """What is said by a key of experts that PEFT's stacked parameters do not have."""
    found = next((m for pattern in _KEYS if (m := pattern.match(name))), None)
    return found if found is not None and (found["leaf"] in _HALVES or found["leaf"] in _WHOLE) else None


def _rows(
    path: str, entries: Mapping[str, TensorEntry], stack: Stacked, pieces: list[Piece]
) -> tuple[dict[int | None, int], int]:
    """Of the stacked parameter's lora_A: where the rows of each half begin in an expert, and how many there are in all.

    A half has those of its expert of the largest rank.
    """
    stack = stack.as_called()
    ranks: dict[int | None, int] = {}
    for piece in pieces:
        A, B = entries[piece.A].shape, entries[piece.B].shape
        N, all_of = stack.N if piece.half is None else stack.N // 2, piece.expert is None
        if all_of and len(A) == 2:  # PEFT's packing under another name
            r = A[0] // stack.experts
            wanted = (stack.experts * r, stack.K), (N, stack.experts * r)
        else:
            r = A[-2]
            lead = (stack.experts,) if all_of else ()
            wanted = (*lead, r, stack.K), (*lead, N, r)
        for key, got, shape in ((piece.A, A, wanted[0]), (piece.B, B, wanted[1])):
            if got != shape or not r:
                raise AdapterError(path, key, f"a shape {list(shape)} for {stack.path!r}", list(got))
        ranks[piece.half] = max(ranks.get(piece.half, 0), r)
    firsts, rank = {}, 0
    for half, r in sorted(ranks.items(), key=lambda item: item[0] or 0):
        firsts[half], rank = rank, rank + r
    return firsts, rank


def _stacked(
    tensors: Mapping[str, Tensor], stack: Stacked, pieces: list[Piece], firsts: Mapping[int | None, int], rank: int
) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B of the parameter in PEFT's packing: experts and halves without a piece are zero."""
    stack, turned = stack.as_called(), stack.turned
    dtype, middle, scale = tensors[pieces[0].A].dtype, stack.N // 2, _scaling(pieces)
    A = torch.zeros(stack.experts, rank, stack.K, dtype=dtype, device="cpu")
    B = torch.zeros(stack.experts, stack.N, rank, dtype=dtype, device="cpu")
    for piece in pieces:
        first, rows = firsts[piece.half], slice(None)
        if piece.half is not None:
            own = slice(piece.half * middle, (piece.half + 1) * middle)
            rows = slice(piece.half, None, 2) if stack.interleaved else own
        for expert, a, b in _experts(tensors, stack, piece):
            ratio = piece.scaling / scale if scale else 1.0
            A[expert, first : first + len(a)] = a.to(dtype)
            B[expert, rows, first : first + len(a)] = (b if ratio == 1.0 else b.float() * ratio).to(dtype)
    return pack(B.transpose(1, 2), A.transpose(1, 2)) if turned else pack(A, B)


def _scaling(pieces: list[Piece]) -> float:
    """Of the stacked parameter's adapter: the first that is not 0, for the others go into B as multiples of it."""
    return next((piece.scaling for piece in pieces if piece.scaling), 0.0)


def _experts(tensors: Mapping[str, Tensor], stack: Stacked, piece: Piece) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, A [r, K], B [N, r]) of a piece."""
    A, B = tensors[piece.A], tensors[piece.B]
    if piece.expert is not None:
        yield piece.expert, A, B
        return
    if A.dim() == 2:
        A, B = A.unflatten(0, (stack.experts, -1)), B.unflatten(1, (-1, stack.experts)).permute(2, 0, 1)
    yield from ((e, A[e], B[e]) for e in range(stack.experts))


def _config(
    path: str,
    config: LoraConfig,
    entries: Mapping[str, TensorEntry],
    used: set[str],
    prefix: str,
    found: Mapping[Stacked, list[Piece]],
    ranks: Mapping[Stacked, int],
) -> LoraConfig:
    """The config that PEFT would have written beside the stacked tensors."""
    changed = dataclasses.replace(config, extra={k: v for k, v in config.extra.items() if k != "peft_version"})
    if not found:
        return changed
    keys = {stack: "^" + stack.path.replace(".", "\\.") for stack in found}
    scales = {stack: _scaling(pieces) for stack, pieces in found.items()}
    alphas = {s: scales[s] * (math.sqrt(ranks[s]) if config.use_rslora else ranks[s]) for s in found}
    targets = config.target_modules
    if isinstance(targets, set):  # names of experts alone are those of no module any more
        rest = [own_path(key).removeprefix(prefix).rpartition(".lora_")[0] for key in entries if key not in used]
        targets = {name for name in targets if any(p == name or p.endswith(f".{name}") for p in rest)}
    try:
        return dataclasses.replace(
            changed,
            target_modules=targets,
            target_parameters=sorted({*(config.target_parameters or ()), *(stack.path for stack in found)}),
            rank_pattern={**{keys[s]: ranks[s] for s in found}, **config.rank_pattern},
            alpha_pattern={**{keys[s]: alphas[s] for s in found}, **config.alpha_pattern},
        )
    except FieldError as error:
        raise AdapterError(path, error.field, f"{error.expected}, for LoRA on experts", error.found) from None


def _packed(
    entries: Mapping[str, TensorEntry], config: LoraConfig, layout: str | None, prefix: str, stacks: Stacks
) -> dict[str, Any]:
    """Keys under PEFT's names whose tensors are packed in another way: (stacked parameter, what gives both)."""
    found: dict[str, Any] = {}
    old = of_older_peft(config)
    for name, stack in stacks(config).items():
        keys = [f"{prefix}{name}.lora_{side}.weight" for side in "AB"]
        if not all(key in entries for key in keys):
            continue
        A, B = (entries[key].shape for key in keys)
        if len(A) != len(B) or len(A) not in (2, 3) or 0 in (*A, *B):
            continue  # refused by whoever checks shapes
        sizes = A[-1], B[-2]
        turned = (
            stack.experts > 1 and not stack.transposed and sizes == (stack.N, stack.K) and (stack.N != stack.K or old)
        )
        if turned or layout == GROUPED or len(A) == 3:
            make = _unpack(keys, stack, turned, layout == GROUPED)
            if sizes not in ((stack.K, stack.N), (stack.N, stack.K)) or (len(A) == 2 and A[0] % stack.experts):
                continue
            found |= dict.fromkeys(keys, (stack, make))
    return found


def of_older_peft(config: LoraConfig) -> bool:
    """Whether a release of PEFT has written the file that took [experts, N, K] for N inputs."""
    version = re.match(r"(\d+)\.(\d+)\.(\d+)", str(config.extra.get("peft_version", "")))
    return version is not None and tuple(map(int, version.groups())) < _TURNED_UNTIL


def _unpack(keys: list[str], stack: Stacked, turned: bool, grouped: bool) -> Callable[[dict[str, Tensor]], Any]:
    def make(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        A, B = (tensors[key] for key in keys)
        if A.dim() == 2:
            A = A.unflatten(0, (stack.experts, -1))
            parts = (stack.experts, -1) if grouped else (-1, stack.experts)
            B = B.unflatten(1, parts).permute(*((1, 0, 2) if grouped else (2, 0, 1)))
        return pack(*((B.transpose(1, 2), A.transpose(1, 2)) if turned else (A, B)))

    return make
