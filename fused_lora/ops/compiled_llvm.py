"""What numba has no words for, in LLVM's: elements of 16 bits, sums of products in registers, bits of a mask.

numba widens integers to 64 bits, which would halve the speed of what is here, and vectorises inner loops alone.
"""

from __future__ import annotations

import platform
from typing import Any

import numba
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

# 16-bit floats are handed over as their bits, and the sign of the integer type says which they are
BFLOAT16, FLOAT16 = types.int16, types.uint16
# without the instructions LLVM would call a library that is not there
_CHOSEN = f"{numba.config.CPU_NAME or ''},{numba.config.CPU_FEATURES or ''}"  # NUMBA_CPU_NAME, NUMBA_CPU_FEATURES
HALF, FUSED = (
    platform.machine() in ("aarch64", "arm64")
    or (f"+{name}" in _CHOSEN if _CHOSEN != "," else binding.get_host_cpu_features().get(name, False))
    for name in ("f16c", "fma")
)

_I16, _I32, _I64, _HALF, _FLOAT = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.HalfType(), ir.FloatType()


def _from_bfloat16(builder, word):
    return builder.bitcast(builder.shl(builder.zext(word, _I32), _I32(16)), _FLOAT)


def _to_bfloat16(builder, value):
    """Half to even; every NaN becomes 0x7FC0."""
    word = builder.bitcast(value, _I32)
    odd = builder.and_(builder.lshr(word, _I32(16)), _I32(1))
    rounded = builder.lshr(builder.add(word, builder.add(odd, _I32(0x7FFF))), _I32(16))
    number = builder.icmp_unsigned("<=", builder.and_(word, _I32(0x7FFFFFFF)), _I32(0x7F800000))
    return builder.trunc(builder.select(number, rounded, _I32(0x7FC0)), _I16)


# how an element of an array is computed with: (float type, from the element, to the element)
_ELEMENTS = {
    types.float32: (types.float32, lambda builder, word: word, lambda builder, value: value),
    types.float64: (types.float64, lambda builder, word: word, lambda builder, value: value),
    BFLOAT16: (types.float32, _from_bfloat16, _to_bfloat16),
}
if HALF:
    _ELEMENTS[FLOAT16] = (
        types.float32,
        lambda builder, word: builder.fpext(builder.bitcast(word, _HALF), _FLOAT),
        lambda builder, value: builder.bitcast(builder.fptrunc(value, _HALF), _I16),
    )


@intrinsic
def load(context: Any, element: types.Type) -> tuple:
    """The float that an element of a weight stands for."""
    number, load, _ = _ELEMENTS[element]
    return number(element), lambda context, builder, signature, arguments: load(builder, arguments[0])


@intrinsic
def store(context: Any, value: types.Type, element: types.Type) -> tuple:
    """``value`` rounded to an element of the kind of ``element``."""
    _, _, store = _ELEMENTS[element]
    return element(value, element), lambda context, builder, signature, arguments: store(builder, arguments[0])


# bits of infinity; above, without the sign, are NaNs
_INFINITY = {BFLOAT16: 0x7F80, FLOAT16: 0x7C00}


@intrinsic
def differ(context: Any, element: types.Type, other: types.Type) -> tuple:
    """1 where two elements differ in a bit, else 0; also for a 16-bit NaN, which torch rounds in several ways."""

    def generate(context, builder, signature, arguments):
        integer = ir.IntType(signature.args[0].bitwidth)
        a, b = (builder.bitcast(element, integer) for element in arguments)
        differ = builder.icmp_unsigned("!=", a, b)
        if element in _INFINITY:
            magnitude = builder.and_(a, integer(0x7FFF))
            differ = builder.or_(differ, builder.icmp_unsigned(">", magnitude, integer(_INFINITY[element])))
        return builder.zext(differ, ir.IntType(8))

    return types.uint8(element, element), generate


@intrinsic
def trailing_zeros(context: Any, word: types.Type) -> tuple:
    """64 for 0."""
    never = ir.Constant(ir.IntType(1), 0)
    return types.uint64(types.uint64), lambda _, builder, signature, arguments: builder.cttz(arguments[0], never)


@intrinsic
def ones(context: Any, word: types.Type) -> tuple:
    """How many bits of the word are 1."""
    return types.uint64(types.uint64), lambda _, builder, signature, arguments: builder.ctpop(arguments[0])


@intrinsic
def gathered(context: Any, flags: types.Type, group: types.Type) -> tuple:
    """64 bits: which bytes of the group of 64 in the array of bytes are not 0."""

    def generate(context, builder, signature, arguments):
        lanes = ir.VectorType(ir.IntType(8), 64)
        data = make_array(flags)(context, builder, arguments[0]).data
        first = builder.gep(data, [builder.mul(arguments[1], _I64(64))])
        found = builder.load(builder.bitcast(first, lanes.as_pointer()), align=1)
        return builder.bitcast(builder.icmp_unsigned("!=", found, ir.Constant(lanes, None)), _I64)

    return types.uint64(flags, types.int64), generate


TILE_BYTES = 128  # of the columns of a tile: four vectors, which two rows of the sum and one of a factor fill


def _multiply_add(builder, a, b, c):
    """Fused in fp32 only: in fp64 nothing but the instruction could repeat it."""
    if a.type.element != _FLOAT:
        return builder.fadd(builder.fmul(a, b), c)
    name, kind = f"llvm.fma.v{a.type.count}f32", ir.FunctionType(a.type, 3 * [a.type])
    return builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), [a, b, c])


def _tile(rows):
    """An intrinsic: out[i:i + rows, j:j + tile] = sum_k left[i:i + rows, k] * right[j // tile, k].

    In the order of k, by fused multiply-adds in fp32, in fp64 with each product and each sum rounded. left [., R] and
    out [., ld] are flat, right is [tiles, R, tile]. Behind the last column of out less than a tile is written, too.
    """

    def generate(context, builder, signature, arguments):
        left, right, out = (
            make_array(kind)(context, builder, array).data
            for kind, array in zip(signature.args[:3], arguments[:3], strict=True)
        )
        i, j, R, ld = arguments[3:]
        number = context.get_value_type(signature.args[0].dtype)
        size = signature.args[0].dtype.bitwidth // 8
        lanes, tile = 32 // size, TILE_BYTES // size
        vector = ir.VectorType(number, lanes)
        lines = [builder.gep(left, [builder.mul(builder.add(i, _I64(m)), R)]) for m in range(rows)]
        right = builder.gep(right, [builder.mul(j, R)])
        before, loop, after = (builder.basic_block, *(builder.append_basic_block() for _ in range(2)))
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(_I64)
        sums = [[builder.phi(vector) for _ in range(tile // lanes)] for _ in range(rows)]
        row = builder.gep(right, [builder.mul(k, _I64(tile))])
        factors = [
            builder.load(builder.bitcast(builder.gep(row, [_I64(v)]), vector.as_pointer()), align=size)
            for v in range(0, tile, lanes)
        ]
        for m in range(rows):
            one = builder.insert_element(vector(ir.Undefined), builder.load(builder.gep(lines[m], [k])), _I32(0))
            one = builder.shuffle_vector(one, vector(ir.Undefined), ir.VectorType(_I32, lanes)(None))
            for total, factor in zip(sums[m], factors, strict=True):
                total.add_incoming(vector(None), before)
                total.add_incoming(_multiply_add(builder, one, factor, total), loop)
        following = builder.add(k, _I64(1))
        k.add_incoming(_I64(0), before)
        k.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, R), loop, after)
        builder.position_at_end(after)
        for m in range(rows):  # in this order: what is written behind a row is overwritten by the next
            line = builder.gep(out, [builder.add(builder.mul(builder.add(i, _I64(m)), ld), j)])
            for v, total in enumerate(sums[m]):
                place = builder.bitcast(builder.gep(line, [_I64(v * lanes)]), vector.as_pointer())
                builder.store(total.incomings[1][0], place, align=size)
        return context.get_dummy_value()

    @intrinsic
    def tile(context, left, right, out, i, j, R, ld):
        return types.void(left, right, out, *4 * [types.int64]), generate

    return tile


two_rows, one_row = _tile(2), _tile(1)
