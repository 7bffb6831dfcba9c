"""PTX as Python: each basic block of a kernel becomes one function over numpy arrays, an element for each thread.

``translate(ptx)`` reads what Triton's compiler wrote. A register is an array of unsigned integers of its width, or one
number where all threads hold the same. An instruction that is not known is refused by name, so no kernel runs in part.
Source of what each instruction does: NVIDIA's PTX ISA 8.8.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from . import machine

WIDTH = {"pred": "?", "b8": "u1", "b16": "u2", "b32": "u4", "b64": "u8"}
_NUMPY = {
    **{f"{kind}{bits}": f"{letter}{bits // 8}" for bits in (8, 16, 32, 64) for kind, letter in ("bu", "uu", "si")},
    **{"f16": "f2", "f32": "f4", "f64": "f8", "bf16": "u2", "f16x2": "u4", "bf16x2": "u4", "f32x2": "u8", "tf32": "u4"},
}
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
# of instructions that do the same to each element, with {0}, {1}, ... for the operands. Without "rn", rounding to the
# nearest, and "lo", which numpy does anyway
_FORMS = {
    **{"add": "({0} + {1})", "sub": "({0} - {1})", "mul": "({0} * {1})", "fma": "fma({0}, {1}, {2})"},
    **{"and": "({0} & {1})", "or": "({0} | {1})", "xor": "({0} ^ {1})", "not": "(~{0})", "neg": "(-{0})"},
    **{"min": "np.fmin({0}, {1})", "max": "np.fmax({0}, {1})", "abs": "abs({0})", "popc": "np.bitwise_count({0})"},
    **{"div": "divide({0}, {1})", "rem": "remainder({0}, {1})", "sqrt.approx.ftz": "np.sqrt({0})"},
    **{"mul.hi": "high({0}, {1})", "mad": "({0} * {1} + {2})"},
}
_VECTOR = {"f16x2": ("f16", 2), "bf16x2": ("bf16", 2), "f32x2": ("f32", 2)}


@dataclass
class Block:
    """run(registers, threads, machine) -> of a branch the threads that take it, or None."""

    run: Callable
    written: list[int]
    target: int | None = None  # where those threads go on
    waits: bool = False  # whether it ends at a barrier
    ends: bool = False  # whether the others return, rather than go on with the next block


@dataclass
class Program:
    blocks: list[Block]
    registers: list[str]  # numpy's type of each
    threads: int
    name: str
    source: str = field(repr=False)


class _Translator:
    def __init__(self, text: str):
        self.registers: dict[str, int] = {}
        self.types: dict[str, str] = {}
        self.scopes: list[dict[str, str]] = [{}]
        self.name = re.search(r"\.entry\s+(\w+)", text)[1]
        self.threads = int(re.search(r"\.reqntid\s+(\d+)", text)[1])
        self.constants: dict[str, object] = {}
        body = text[text.index("{", text.index(".entry")) + 1 :]
        self.statements = list(self._statements(body))

    # ---- reading

    def _statements(self, body: str):
        """Labels as "name:", instructions and declarations of registers without their semicolon, braces of scopes."""
        body = re.sub(r"//[^\n]*", "", body)
        body = re.sub(r"^\s*\.(?:loc|file|pragma|section)\b[^\n]*", "", body, flags=re.MULTILINE)
        at, depth = 0, 1
        token = re.compile(r"\s*([$\w]+:(?!:)|[{}]|[^;{}]+(?:\{[^{}]*\}[^;{}]*)*;)")
        while depth:
            found = token.match(body, at)
            if found is None:
                raise NotImplementedError(f"{self.name}: PTX that is not understood: {body[at : at + 80]!r}")
            at, text = found.end(), found[1].strip().removesuffix(";").strip()
            depth += {"{": 1, "}": -1}.get(text, 0)
            yield text

    def _full(self, name: str) -> str:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), name)

    def _declare(self, text: str) -> None:
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.+)", text, re.DOTALL).groups()
        kind = {"f32": "b32", "f64": "b64", "u32": "b32", "s32": "b32", "u64": "b64", "u16": "b16"}.get(kind, kind)
        for name in map(str.strip, names.split(",")):
            prefix = re.match(r"(%\w+?)<\d+>$", name)
            if prefix:
                self.types[prefix[1]] = kind
            else:  # of an inline assembly, whose names are its own
                own = f"{name}.{len(self.registers)}"
                self.scopes[-1][name], self.types[own] = own, kind
                self.registers[own] = len(self.registers)

    def type_of(self, name: str) -> str:
        return self.types.get(name) or self.types[name.rstrip("0123456789")]

    def index(self, name: str) -> int:
        return self.registers.setdefault(name, len(self.registers))

    # ---- operands

    def is_register(self, operand: str) -> bool:
        name = self._full(operand)
        return name in self.types or (name[:1] == "%" and name.rstrip("0123456789") in self.types)

    def read(self, operand: str, kind: str) -> str:
        """The operand as Python, in numpy's type for ``kind``."""
        operand, dtype = operand.strip(), _NUMPY.get(kind)
        if kind == "pred":
            if operand.startswith("!"):
                return f"~{self.read(operand[1:], kind)}"
            return self.constant(np.bool_(int(operand))) if re.match(r"-?\d", operand) else self._raw(operand)
        if self.is_register(operand):
            raw, width = self._raw(operand), WIDTH[self.type_of(self._full(operand))]
            if width[1] != dtype[1]:
                raw = f"{raw}.astype('u{dtype[1]}')"
            return raw if dtype[0] == "u" else f"{raw}.view('{dtype}')"
        if operand in ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid"):
            return f"m.special[{operand!r}]"
        if operand in ("%tid.y", "%tid.z", "%cluster_ctarank"):
            return self.constant(np.uint32(0))
        if operand == "global_smem":
            return self.constant(np.uint32(machine.SHARED_BASE).astype(dtype))
        return self.constant(self._number(operand, dtype))

    def _number(self, operand: str, dtype: str):
        size = int(dtype[1])
        if found := re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", operand):
            value = np.array(int(found[2], 16), "u4" if found[1] in "fF" else "u8")
        elif re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
            value = np.array(int(operand.rstrip("U"), 0) & ((1 << 8 * size) - 1), f"u{size}")
        else:
            raise NotImplementedError(f"{self.name}: operand {operand!r}")
        return value.view(dtype)[()]

    def constant(self, value) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def _raw(self, operand: str) -> str:
        return f"r[{self.index(self._full(operand))}]"

    def operands(self, text: str) -> list[str]:
        """Split at commas outside of braces and brackets."""
        found, depth, word = [], 0, ""
        for letter in text:
            depth += (letter in "{[") - (letter in "}]")
            if letter == "," and not depth:
                found.append(word.strip())
                word = ""
            else:
                word += letter
        return [*found, word.strip()] if word.strip() else found

    def address(self, operand: str, kind: str) -> str:
        inner = operand.strip()[1:-1].strip()
        found = re.fullmatch(r"([%\w$]+)\s*(?:\+\s*(-?(?:0x)?[0-9a-fA-F]+))?", inner)
        if found is None:
            raise NotImplementedError(f"{self.name}: address {operand!r}")
        base, offset = self.read(found[1], kind), int(found[2] or "0", 0)
        return f"({base} + {self.constant(np.array(offset).astype(_NUMPY[kind])[()])})" if offset else base

    def vector(self, operand: str) -> list[str]:
        operand = operand.strip()
        return [o.strip() for o in operand[1:-1].split(",")] if operand.startswith("{") else [operand]

    # ---- writing

    def write(self, operand: str, code: str) -> None:
        """Assign ``code``, of any type of the register's width or narrower, where the guard holds."""
        if operand == "_":
            return
        name = self._full(operand)
        index, width = self.index(name), WIDTH[self.type_of(name)]
        self.written.add(index)
        code = f"({code})" if width == "?" else f"bits({code}, '{width}')"
        if self.guard is not None:
            code = f"choose({self.guard}, {code}, r[{index}])"
        self.lines.append(f"r[{index}] = {code}")

    def do(self, code: str) -> None:
        self.lines.append(code)

    def threads_of(self) -> str:
        """The threads that take part in an instruction with an effect of its own."""
        return "t" if self.guard is None else f"both(t, {self.guard})"

    def translate(self) -> Program:
        starts, labels, jumps, blocks = [], {}, {}, []
        current: list[str] = []

        def close():
            nonlocal current
            if current:
                starts.append(current)
                current = []

        scopes = [0]  # labels of inline assembly are its own, too
        for number, text in enumerate(self.statements):
            if text == "{":
                scopes.append(number)
            elif text == "}" and len(scopes) > 1:
                scopes.pop()
            if text.endswith(":") and " " not in text:
                close()
                labels[text[:-1], scopes[-1]] = len(starts)
                continue
            current.append(text)
            if found := re.search(r"\bbra(?:\.uni)?\s+([$\w]+)$", text):
                jumps[len(starts)] = [(found[1], scope) for scope in reversed(scopes)]
            if re.search(r"(?:^|\s)(?:bra(?:\.uni)?|ret|exit|bar(?:rier)?\.sync)\b", text):
                close()
        close()
        sources = []
        for number, statements in enumerate(starts):
            self.lines, self.written, target, waits, ends = [], set(), None, False, False
            for text in statements:
                if text == "{":
                    self.scopes.append({})
                elif text == "}":
                    if len(self.scopes) > 1:
                        self.scopes.pop()
                elif text.startswith(".reg"):
                    self._declare(text)
                elif text.startswith("."):
                    raise NotImplementedError(f"{self.name}: directive {text!r}")
                else:
                    found = re.match(r"(?:@(!?[%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.DOTALL)
                    guard, op, rest = found.groups()
                    self.guard = None if guard is None else self.read(guard, "pred")
                    if op in ("bra", "bra.uni"):
                        target = next(labels[name] for name in jumps[number] if name in labels)
                        self.do(f"return {'m.all' if self.guard is None else self.guard}")
                        ends = self.guard is None
                    elif op in ("bar.sync", "barrier.sync"):
                        if self.guard is not None or rest.strip() != "0":
                            raise NotImplementedError(f"{self.name}: {text}")
                        waits = True
                    elif op in ("ret", "exit"):
                        if self.guard is not None:
                            raise NotImplementedError(f"{self.name}: {text}")
                        ends = True
                    else:
                        self.instruction(op, self.operands(rest), text)
            body = "\n    ".join(self.lines or ["pass"])
            sources.append(f"def b{number}(r, t, m):\n    {body}\n")
            blocks.append(Block(None, sorted(self.written), target, waits, ends))
        source = "\n".join(sources)
        space = {**vars(machine), **self.constants, "np": np}
        exec(compile(source, f"<{self.name} as Python>", "exec"), space)
        for number, block in enumerate(blocks):
            block.run = space[f"b{number}"]
        widths = [WIDTH[self.type_of(name)] for name in self.registers]
        return Program(blocks, widths, self.threads, self.name, source)

    def instruction(self, op: str, args: list[str], text: str) -> None:
        name, *parts = op.split(".")
        method = getattr(self, f"_{name}", None)
        try:
            done = method(parts, args) if method else self._elementwise(parts, args, name)
        except (KeyError, ValueError, IndexError, AttributeError) as e:
            raise NotImplementedError(f"{self.name}: instruction {text!r} ({type(e).__name__}: {e})") from e
        if done is NotImplemented:
            raise NotImplementedError(f"{self.name}: instruction {text!r}")

    # ---- instructions on registers

    def _mov(self, parts, args):
        d, a = args
        kind = parts[-1]
        if d.startswith("{"):
            names = self.vector(d)
            part = 8 * int(_NUMPY[kind][1]) // len(names)
            source = self.read(a, kind)
            for i, name in enumerate(names):
                self.write(name, f"part({source}, {i * part}, 'u{part // 8}')")
        elif a.startswith("{"):
            items = self.vector(a)
            part = int(_NUMPY[kind][1]) // len(items)
            self.write(d, f"join({part}, {', '.join(self.read(i, f'u{8 * part}') for i in items)})")
        else:
            self.write(d, self.read(a, kind))

    def _float(self, operand: str, kind: str) -> str:
        """A bf16 operand as the float32 that it is."""
        return f"from_bf16({self.read(operand, kind)})" if kind == "bf16" else self.read(operand, kind)

    def _result(self, d: str, code: str, kind: str) -> None:
        self.write(d, f"to_bf16({code})" if kind == "bf16" else code)

    def _elementwise(self, parts, args, name: str):
        """By its form; of a pair of numbers in a register one by one, of fp32 and 16 bits with the latter first."""
        *how, kind = parts
        d, *operands = args
        mixed = kind in ("f16", "bf16") and how[-1:] == ["f32"]
        key = ".".join([name, *(h for h in how[: len(how) - mixed] if h not in ("rn", "lo"))])
        if key not in _FORMS:
            return NotImplemented
        if mixed:
            first, *rest = operands
            operands = [f"{self._float(first, kind)}.astype('f4')", *(self.read(o, "f32") for o in rest)]
            self.write(d, _FORMS[key].format(*operands))
        elif kind in _VECTOR:
            scalar, count = _VECTOR[kind]
            size = int(_NUMPY[scalar][1])
            done = []
            for i in range(count):
                items = [f"part({self.read(o, kind)}, {8 * i * size}, 'u{size}')" for o in operands]
                items = [f"from_bf16({x})" if scalar == "bf16" else f"{x}.view('{_NUMPY[scalar]}')" for x in items]
                code = _FORMS[key].format(*items)
                done.append(f"to_bf16({code})" if scalar == "bf16" else f"bits({code}, 'u{size}')")
            self.write(d, f"join({size}, {', '.join(done)})")
        else:
            self._result(d, _FORMS[key].format(*[self._float(o, kind) for o in operands]), kind)

    def _mul(self, parts, args):
        return self._wide(parts, args, "{0} * {1}") if parts[0] == "wide" else self._elementwise(parts, args, "mul")

    def _mad(self, parts, args):
        return (
            self._wide(parts, args, "{0} * {1} + {2}") if parts[0] == "wide" else self._elementwise(parts, args, "mad")
        )

    def _wide(self, parts, args, form: str) -> None:
        """A product of twice the width, and what is added to it, which has that."""
        kind = parts[-1]
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        d, a, b, *c = args
        factors = [f"{self.read(o, kind)}.astype('{_NUMPY[wide]}')" for o in (a, b)]
        self.write(d, f"({form.format(*factors, *(self.read(o, wide) for o in c))})")

    def _shl(self, parts, args):
        self.write(args[0], f"left({self.read(args[1], parts[-1])}, {self.read(args[2], 'u32')})")

    def _shr(self, parts, args):
        kind = parts[-1].replace("b", "u")
        self.write(args[0], f"right({self.read(args[1], kind)}, {self.read(args[2], 'u32')})")

    def _bfe(self, parts, args):
        d, a, b, c = args
        self.write(d, f"field({self.read(a, parts[-1])}, {self.read(b, 'u32')}, {self.read(c, 'u32')})")

    def _prmt(self, parts, args):
        if parts != ["b32"]:
            return NotImplemented
        self.write(args[0], "permute({}, {}, {})".format(*[self.read(o, "u32") for o in args[1:]]))

    def _selp(self, parts, args):
        d, a, b, p = args
        self.write(d, f"choose({self.read(p, 'pred')}, {self.read(a, parts[-1])}, {self.read(b, parts[-1])})")

    def _setp(self, parts, args):
        compare, *logic, kind = parts
        if logic or "|" in args[0]:
            return NotImplemented
        a, b = (self._float(o, kind) for o in args[1:])
        if kind[0] == "f" or kind == "bf16":
            if compare == "num":
                code = f"({a} == {a}) & ({b} == {b})"
            elif compare.endswith("u"):  # or unordered
                code = f"({a} {_COMPARE[compare[:-1]]} {b}) | ({a} != {a}) | ({b} != {b})"
            elif compare == "ne":  # false where one is no number
                code = f"({a} < {b}) | ({a} > {b})"
            else:
                code = f"({a} {_COMPARE[compare]} {b})"
        else:
            code = f"({a} {_COMPARE[compare]} {b})"
        self.write(args[0], code)

    def _cvt(self, parts, args):
        *how, to, of = parts
        d, *operands = args
        if to in ("bf16x2", "f16x2") and of == "f32" and how == ["rn"]:
            high, low = (self.read(o, of) for o in operands)
            one = "to_bf16({})" if to == "bf16x2" else "{}.astype('f2').view('u2')"
            self.write(d, f"join(2, {one.format(low)}, {one.format(high)})")
        elif to == "tf32" and of == "f32" and how == ["rna"]:
            self.write(d, f"to_tf32({self.read(operands[0], of)})")
        elif to[0] in "us" and of[0] in "us" and not how:
            self.write(d, f"{self.read(operands[0], of)}.astype('{_NUMPY[to]}')")
        elif to[0] in "us" and of == "f32" and how == ["rzi"]:
            self.write(d, f"to_integer({self.read(operands[0], of)}, '{_NUMPY[to]}')")
        elif to in ("f32", "f64", "f16", "bf16") and how in ([], ["rn"]):
            a = self._float(operands[0], of)
            wide = "f4" if to == "bf16" else _NUMPY[to]
            self._result(d, f"({a}).astype('{wide}')", to)
        else:
            return NotImplemented

    # ---- memory

    def _ld(self, parts, args):
        d, address = args
        if parts[0] == "param":
            kind = parts[-1]
            number = int(re.search(r"_param_(\d+)\]?$", address.strip(" []"))[1])
            width = WIDTH[self.type_of(self._full(d))]
            self.write(d, f"parameter(m, {number}, '{_NUMPY[kind]}', '{width}')")
            return None
        space, names, kind = parts[0].split("::")[0], self.vector(d), parts[-1]
        if set(parts[1:-1]) - {"v2", "v4"}:
            return NotImplemented
        at = self.address(address, "u32" if space == "shared" else "u64")
        size = int(_NUMPY[kind][1])
        self.do(f"loaded = m.load({space!r}, {at}, {size}, {len(names)}, {self.threads_of()})")
        for i, name in enumerate(names):
            code = f"loaded[{i}]"
            if kind[0] == "s" and size < int(WIDTH[self.type_of(self._full(name))][1]):
                code = f"{code}.view('{_NUMPY[kind]}').astype('i{WIDTH[self.type_of(self._full(name))][1]}')"
            self.write(name, code)

    def _st(self, parts, args):
        address, values = args
        space, kind = parts[0].split("::")[0], parts[-1]
        if set(parts[1:-1]) - {"v2", "v4"}:
            return NotImplemented
        at = self.address(address, "u32" if space == "shared" else "u64")
        values = ", ".join(self.read(v, kind.replace("f", "b").replace("s", "b")) for v in self.vector(values))
        self.do(f"m.store({space!r}, {at}, {_NUMPY[kind][1]}, [{values}], {self.threads_of()})")

    def _cp(self, parts, args):
        if parts[0] != "async":
            return NotImplemented
        if parts[1] == "bulk":
            return self._cp_bulk(parts[2:], args)
        if parts[1] in ("commit_group", "wait_group"):
            self.do(f"m.copies_{parts[1]}({args[0] + ', ' if args else ''}t)")
        elif parts[1] in ("ca", "cg"):
            to, of = self.address(args[0], "u32"), self.address(args[1], "u64")
            size = int(args[2], 0)
            count = self.read(args[3], "u32") if len(args) > 3 else self.constant(np.uint32(size))
            self.do(f"m.copy({to}, {of}, {size}, {count}, {self.threads_of()})")
        else:
            return NotImplemented

    def _cp_bulk(self, parts, args):
        if parts[0] in ("commit_group", "wait_group"):
            return None
        found = re.fullmatch(r"\[\s*([%\w]+)\s*,\s*(\{.*\})\s*\]", args[1])
        form = ["tensor", "2d", "global", "mbarrier::complete_tx::bytes"]
        # Triton 3.6 writes shared::cluster; a cluster is one program here
        known = parts[2:3] in (["shared::cta"], ["shared::cluster"]) and parts[:2] + parts[3:] == form
        if not known or found is None:
            return NotImplemented
        where = f"{self.read(found[1], 'u64')}, [{', '.join(self.read(c, 's32') for c in self.vector(found[2]))}]"
        to, barrier = self.address(args[0], "u32"), self.address(args[2], "u32")
        self.do(f"m.load_box({to}, {where}, {barrier}, {self.threads_of()})")

    def _tensormap(self, parts, args):
        if parts[0] == "cp_fenceproxy":
            to, of = self.address(args[0], "u64"), self.address(args[1], "u64")
            self.do(f"m.copy_map({to}, {of}, {self.threads_of()})")
            return None
        if parts[:2] != ["replace", "tile"]:
            return NotImplemented
        number = int(args[1], 0) if len(args) == 3 else 0
        value = self.read(args[-1], "u" + parts[-1][1:])
        self.do(f"m.replace({self.address(args[0], 'u64')}, {parts[2]!r}, {number}, {value}, {self.threads_of()})")

    def _mbarrier(self, parts, args):
        if parts[0] in ("init", "inval"):
            count = self.read(args[1], "u32") if len(args) > 1 else 0
            self.do(f"m.barrier_{parts[0]}({self.address(args[0], 'u32')}, {count}, {self.threads_of()})")
        elif parts[:2] == ["arrive", "expect_tx"] and args[0] == "_":
            at, count = self.address(args[1], "u32"), self.read(args[2], "u32")
            self.do(f"m.barrier_arrive({at}, {count}, {self.threads_of()})")
        elif parts[:2] == ["try_wait", "parity"]:
            at, parity = self.address(args[1], "u32"), self.read(args[2], "u32")
            self.write(args[0], f"m.barrier_wait({at}, {parity}, {self.threads_of()})")
        else:
            return NotImplemented

    def _atom(self, parts, args):
        space, *_, what, kind = parts
        d, address, value = args
        if space != "global" or what not in machine.COMBINE:
            return NotImplemented
        at = self.address(address, "u64")
        self.do(f"old = m.atomic({what!r}, {at}, {self.threads_of()}, '{_NUMPY[kind]}', {self.read(value, kind)})")
        self.write(d, "old")

    def _red(self, parts, args):
        return self._atom(parts, ["_", *args])

    def _cvta(self, parts, args):
        self.write(args[0], self.read(args[1], parts[-1]))  # a generic address is what it is made of

    # ---- threads together

    def _bar(self, parts, args):
        return None if parts == ["warp", "sync"] else NotImplemented

    def _fence(self, parts, args):
        pass

    def _shfl(self, parts, args):
        _, how, kind = parts
        d, a, b, c, _members = args
        expected = "0" if how == "up" else "31"
        if c != expected or kind != "b32" or "|" in d:
            return NotImplemented
        self.write(d, f"m.shuffle({how!r}, {self.read(a, 'u32')}, {self.read(b, 'u32')}, t)")

    def _redux(self, parts, args):
        _, how, kind = parts
        self.write(args[0], f"m.reduce({how!r}, {self.read(args[1], kind)}, t)")

    def _elect(self, parts, args):
        d, p = args[0].split("|")
        self.write(d.strip(), self.constant(np.uint32(0)))
        self.write(p.strip(), "(m.special['%laneid'] == 0)")

    def _ldmatrix(self, parts, args):
        names = self.vector(args[0])
        at, trans = self.address(args[1], "u32"), "trans" in parts
        self.do(f"loaded = m.load_matrices({at}, {len(names)}, {trans}, t)")
        for i, name in enumerate(names):
            self.write(name, f"loaded[{i}]")

    def _stmatrix(self, parts, args):
        values = ", ".join(self.read(v, "u32") for v in self.vector(args[1]))
        self.do(f"m.store_matrices({self.address(args[0], 'u32')}, [{values}], {'trans' in parts}, t)")

    def _mma(self, parts, args):
        _, _, shape, row, col, d, a, b, c = parts
        if (row, col, d, c) != ("row", "col", "f32", "f32") or shape not in ("m16n8k16", "m16n8k8") or a != b:
            return NotImplemented
        lists = [f"[{', '.join(self.read(v, 'u32') for v in self.vector(x))}]" for x in args[1:]]
        self.do(f"found = m.multiply({a!r}, {', '.join(lists)}, t)")
        for i, name in enumerate(self.vector(args[0])):
            self.write(name, f"found[{i}]")

    def _wgmma(self, parts, args):
        if parts[0] in ("fence", "commit_group", "wait_group"):
            return None
        _, _, _, shape, d, a, b = parts
        if d != "f32" or a != b:
            return NotImplemented
        accumulator = self.vector(args[0])
        left = self.vector(args[1])
        left = f"[{', '.join(self.read(v, 'u32') for v in left)}]" if len(left) > 1 else self.read(args[1], "b64")
        keep, rest = self.read(args[3], "pred"), [int(x) for x in args[4:]]
        negated, transposed = rest[:2], [*([0] if left[0] == "[" else []), *rest[2:], 0, 0][:2]
        if negated != [1, 1]:
            return NotImplemented
        held = f"[{', '.join(self.read(v, 'u32') for v in accumulator)}]"
        shape = tuple(map(int, re.fullmatch(r"m(\d+)n(\d+)k(\d+)", shape).groups()))
        right = self.read(args[2], "b64")
        self.do(f"found = m.multiply_group({a!r}, {shape}, {held}, {left}, {right}, {keep}, {transposed}, t)")
        for i, name in enumerate(accumulator):
            self.write(name, f"found[{i}]")

    def _tcgen05(self, parts, args):
        what, t = parts[0], self.threads_of()
        if what in ("relinquish_alloc_permit", "dealloc") or what.startswith(("fence", "wait")):
            return None
        if what == "alloc":
            self.do(f"m.store('shared', {self.address(args[0], 'u32')}, 4, [{self.constant(np.uint32(0))}], {t})")
        elif what == "commit" and parts[-1] == "b64" and "mbarrier::arrive::one" in parts:
            self.do(f"m.barrier_arrive({self.address(args[0], 'u32')}, np.uint32(0), {t})")
        elif what in ("ld", "st") and parts[3] in ("32x32b", "16x32bx2") and parts[-1] == "b32":
            half = int(args.pop(-1 if what == "ld" else 1)) if parts[3] == "16x32bx2" else 0
            names = self.vector(args[0 if what == "ld" else 1])
            at = self.address(args[1 if what == "ld" else 0], "u32")
            if what == "ld":
                self.do(f"loaded = m.load_tensor({at}, {half}, {len(names)}, {t})")
                for i, name in enumerate(names):
                    self.write(name, f"loaded[{i}]")
            else:
                values = ", ".join(self.read(name, "u32") for name in names)
                self.do(f"m.store_tensor({at}, {half}, [{values}], {t})")
        elif what == "mma" and parts[1:] in (["cta_group::1", "kind::f16"], ["cta_group::1", "kind::tf32"]):
            d, a, b, how, keep = args
            held = a.startswith("[")
            a = self.address(a, "u32") if held else self.read(a, "u64")
            b, how, keep = self.read(b, "u64"), self.read(how, "u32"), self.read(keep, "pred")
            self.do(f"m.multiply_tensor({self.address(d, 'u32')}, {a}, {held}, {b}, {how}, {keep}, {t})")
        else:
            return NotImplemented


def translate(ptx: str) -> Program:
    """The only kernel of ``ptx`` as a program.

    Raises:
        NotImplementedError: an instruction, operand or directive that is not known here, with its text.
    """
    return _Translator(ptx).translate()
