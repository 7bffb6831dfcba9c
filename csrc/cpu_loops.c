/* CPU loops of fused_lora: exact merge and unmerge of a weight, products with a dropout mask, and LoRA terms.
 *
 * Plain C for gcc and clang; OpenMP where there is one. Python calls it through ctypes (fused_lora/ops/native.py), and
 * fused_lora/ops/merge/blocks.py merges with torch where no compiler was there: to the bit, so a record made by
 * one is undone by the other. What makes the bits the same on every machine, in any number of threads:
 *
 *   D[i,j]  = fma(l[i,R-1], r[R-1,j], ... fma(l[i,0], r[0,j], 0))    fp32, one rounding a step, in this order
 *   Wm[i,j] = round(W[i,j] + D[i,j])                                 a sum in fp32, then a rounding to W's dtype
 *   C[i,j]  = round(Wm[i,j] - D[i,j])                                W again for 97 to 99.8 % of the elements
 *
 * A weight whose rows or columns are scaled beside it (DoRA) has, with the factors u, and 1 / u, of its row and column,
 *
 *   Wm[i,j] = round(W[i,j] u[i] u'[j] + D[i,j])              each product and sum in fp32
 *   C[i,j]  = round((Wm[i,j] - D[i,j]) / u[i] / u'[j])       by products with the reciprocals, which are given
 *
 * A weight of 16 bits may be rounded at random instead: Wm is the neighbour of W + D towards 0 or the other one, each
 * with the probability that the expectation is W + D. The 16 bits of chance of element (i, j) are lane j % 8 of Philox
 * at counter (j / 8, i) under the weight's seed, as in a dropout mask. C is rounded to the nearest as ever.
 *
 * An element that is not finite stays as it is, whatever D: NaNs of arithmetic have no bits to rely on.
 *
 * A unit is a part of W, [height, width]. It keeps a checksum of W's bits, and a correction where C is not W: pairs of
 * bytes (advance, xor). Decoding starts one place before the unit's first element: go `advance` places on and xor the
 * lowest byte there; an advance of 0 stays and xors the next higher byte. (255, 0) only bridges a long gap.
 * An unmerge computes C, applies the corrections, and writes the unit only if the checksum agrees. If a unit fails, the
 * units before it are taken back, so a call changes all of its weights or nothing. Python's signals wait for its return.
 *
 * The terms of rows under many adapters are no bits to keep in a record. Here a row's are the same whatever rows are
 * beside it, in any number of threads: sums of products, each rounded on its own, in an order that K and r decide.
 *
 * Build with -ffp-contract=off: the compiler must not fuse what is not written as fmaf.
 */
#include <fenv.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { AREA = 4096, WIDTH = 128, DEPTH = 32, GROUP = 4, TILE = 32, STRIP = 8, LANES = 8, SPAN = 2048, AHEAD = 128 };
/* elements and columns of a unit; ranks, rows and columns of a step of the delta */
enum { FLOAT32, BFLOAT16, FLOAT16 };
enum { MERGE, UNMERGE, MERGE_AGAIN };                      /* MERGE_AGAIN keeps nothing */
enum { DONE, LOST, FULL, CHANGED, TORN };                  /* results: what stopped a call */

typedef uint32_t bits32 __attribute__((aligned(1), may_alias)); /* a weight may begin anywhere in memory */
typedef uint16_t bits16 __attribute__((aligned(1), may_alias));

#define INLINE static inline __attribute__((always_inline))
/* A function of which the compiler makes one for each type. */
#define BY_TYPE(function, type, ...)                                                                                \
    (type == FLOAT32    ? function(FLOAT32, __VA_ARGS__)                                                            \
     : type == BFLOAT16 ? function(BFLOAT16, __VA_ARGS__)                                                           \
                        : function(FLOAT16, __VA_ARGS__))

typedef struct {
    int64_t rows, columns, row_stride, ranks; /* of W; its columns are contiguous */
    int64_t height, width;                    /* of a unit, at most AREA elements and WIDTH columns */
    int64_t weight_type;
    char *weight;
    const float *left, *right;                /* [rows, ranks] and [ranks, columns], contiguous */
    const float *row_scale, *column_scale;    /* [2, rows] and [2, columns], scales and their reciprocals, or NULL both */
    int64_t *counts, *starts;                 /* [units] corrections of each, and where they begin */
    uint64_t *checksums;                      /* [units] */
    uint8_t *merged;                          /* [units] whether a unit is merged now: kept by every call */
    uint8_t *corrections;                     /* [room, 2] */
    int64_t room, used;
    int64_t dithered, first_row;              /* whether sums are rounded at random; the number of the first row there */
    uint64_t seed;
} Work;

INLINE float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE uint32_t get(int type, const void *array, int64_t i) {
    return type == FLOAT32 ? ((const bits32 *)array)[i] : ((const bits16 *)array)[i];
}

INLINE void put(int type, void *array, int64_t i, uint32_t bits) {
    if (type == FLOAT32)
        ((bits32 *)array)[i] = bits;
    else
        ((bits16 *)array)[i] = (uint16_t)bits;
}

INLINE uint32_t infinity_of(int type) { return type == FLOAT32 ? 0x7F800000 : type == BFLOAT16 ? 0x7F80 : 0x7C00; }

INLINE int is_finite(int type, uint32_t bits) {
    return (bits & (type == FLOAT32 ? 0x7FFFFFFF : 0x7FFF)) < infinity_of(type);
}

/* The float that an element stands for; exact. */
INLINE float value_of(int type, uint32_t bits) {
    if (type == FLOAT32) return as_float(bits);
    if (type == BFLOAT16) return as_float(bits << 16);
    /* the exponent moved by a product; infinity and NaN keep the largest exponent */
    uint32_t magnitude = (bits & 0x7FFF) << 13, special = magnitude >= 0x0F800000 ? 0x7F800000 : 0;
    return as_float(as_bits(as_float(magnitude) * 0x1p112f) | special | (bits & 0x8000) << 16);
}

INLINE uint32_t sign_of(int type, float value) {
    return type == FLOAT32 ? as_bits(value) & 0x80000000 : as_bits(value) >> 16 & 0x8000;
}

/* |value| in a type, to the nearest, ties to even; infinity_of or more if it is too large, infinite or NaN. */
INLINE uint32_t rounded(int type, float value) {
    uint32_t bits = as_bits(value) & 0x7FFFFFFF;
    if (type == FLOAT32) return bits;
    if (type == BFLOAT16) return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    uint32_t normal = (bits - 0x38000000 + 0xFFF + (bits >> 13 & 1)) >> 13;
    uint32_t subnormal = as_bits(as_float(bits) + 0.5f) - 0x3F000000; /* the sum rounds at 2^-24 */
    return bits < 0x38800000 ? subnormal : normal;
}

/* The same of 16 bits towards 0, after `chance`, 16 bits, was added behind the last place. */
INLINE uint32_t dithered(int type, float value, uint32_t chance) {
    uint32_t bits = as_bits(value) & 0x7FFFFFFF;
    if (type == BFLOAT16) return (bits + chance) >> 16;
    uint32_t small = bits < 0x38800000 ? bits : 0; /* in units of 2^-24, with 14 bits behind or more */
    float units = as_float(small) * 0x1p24f + (float)(int32_t)chance * 0x1p-16f;
    uint32_t normal = (bits - 0x38000000 + (chance >> 3)) >> 13;
    return bits < 0x38800000 ? (uint32_t)(int32_t)units : normal;
}

/* A part of W: lines [h, n], `stride` bytes apart. In buffers they are `pitch` elements apart, whole tiles. */
typedef struct {
    char *lines;
    int64_t stride, row, column, h, n, pitch;
} Unit;

/* d [GROUP, TILE], whose rows are `pitch` apart, = GROUP rows of left [depth] times right [depth, TILE of width], one
 * fused step after the other; += where `more`. Eight sums stay in registers: enough to hide a step's latency. The width
 * is a constant, or gcc loads no vectors. */
INLINE void add_products(const float *const *left, const float *restrict right, int64_t width, int64_t depth, int more,
                         float *restrict d, int64_t pitch) {
#pragma omp simd
    for (int64_t j = 0; j < TILE / 2; j++) {
        float s[GROUP], t[GROUP];
        for (int m = 0; m < GROUP; m++) {
            s[m] = more ? d[m * pitch + j] : 0;
            t[m] = more ? d[m * pitch + j + TILE / 2] : 0;
        }
        for (int64_t k = 0; k < depth; k++) {
            float r = right[k * width + j], q = right[k * width + j + TILE / 2];
            for (int m = 0; m < GROUP; m++) s[m] = fmaf(left[m][k], r, s[m]), t[m] = fmaf(left[m][k], q, t[m]);
        }
        for (int m = 0; m < GROUP; m++) d[m * pitch + j] = s[m], d[m * pitch + j + TILE / 2] = t[m];
    }
}

/* Asks for a tile of a unit, which will be read and written: memory takes longer than the sums of the one before. */
INLINE void prefetch(const Unit *unit, int64_t row, int64_t column, int64_t size) {
    for (int64_t i = row; i < row + GROUP && i < unit->h; i++)
        for (int64_t at = 0; at < TILE * size && column * size + at < unit->n * size; at += 64)
            __builtin_prefetch(unit->lines + i * unit->stride + column * size + at, 0, 2);
}

/* right [depth, n] of a unit from rank `first` on, with 0 behind its last column. */
INLINE void pack_right(const Work *work, const Unit *unit, int64_t first, int64_t depth, float *right) {
    for (int64_t k = 0; k < depth; k++) {
        float *to = right + k * WIDTH;
        memcpy(to, work->right + (first + k) * work->columns + unit->column, unit->n * sizeof(float));
        for (int64_t j = unit->n; j < unit->pitch; j++) to[j] = 0;
    }
}

/* delta [h, n] of a strip of a unit; whole groups and tiles are written. `right` is the unit's where it has room. */
INLINE void compute_delta(const Work *work, const Unit *strip, const Unit *next, float *right, float *delta) {
    int64_t pitch = strip->pitch, ranks = work->ranks, size = work->weight_type == FLOAT32 ? 4 : 2;
    if (ranks == 0) memset(delta, 0, STRIP * WIDTH * sizeof(float));
    for (int64_t first = 0; first < ranks; first += DEPTH) {
        int64_t depth = ranks - first < DEPTH ? ranks - first : DEPTH;
        if (ranks > DEPTH) pack_right(work, strip, first, depth, right);
        for (int64_t i = 0; i < strip->h; i += GROUP) {
            const float *left[GROUP];
            for (int64_t m = 0; m < GROUP; m++) /* behind the last row that row again, which nobody reads */
                left[m] = work->left + (strip->row + (i + m < strip->h ? i + m : strip->h - 1)) * ranks + first;
            for (int64_t j = 0; j < pitch; j += TILE)
                if (first == 0) { /* two calls: gcc vectorises no sums that may or may not begin at 0 */
                    prefetch(next, i, j, size);
                    add_products(left, right + j, WIDTH, depth, 0, delta + i * pitch + j, pitch);
                } else
                    add_products(left, right + j, WIDTH, depth, 1, delta + i * pitch + j, pitch);
        }
    }
}

/* Down each column of the unit sum <- rotated(sum ^ bits) * odd, and then the sum of (column's sum) * (j + 1) c, modulo
 * 2^64. Every step can be undone, so no change of one element is lost, and others all but never. */
INLINE uint32_t checksum_step(uint32_t sum, uint32_t bits) {
    sum ^= bits;
    return (sum << 13 | sum >> 19) * 0x85EBCA6Bu;
}

INLINE uint64_t checksum_of(const uint32_t *sums, int64_t n) {
    uint64_t total = 0;
    for (int64_t j = 0; j < n; j++) total += (uint64_t)sums[j] * ((uint32_t)(j + 1) * 0x9E3779B1u);
    return total;
}

INLINE uint64_t checksum(int type, const Unit *unit) {
    uint32_t sums[WIDTH] = {0};
    for (int64_t i = 0; i < unit->h; i++) {
        const char *line = unit->lines + i * unit->stride;
        for (int64_t j = 0; j < unit->n; j++) sums[j] = checksum_step(sums[j], get(type, line, j));
    }
    return checksum_of(sums, unit->n);
}

/* Philox4x32-10 (Salmon et al. 2011) at counters (first, row), (first + 1, row), ...: 4 words of 32 bits a block. */
INLINE void philox(uint64_t seed, uint32_t row, uint32_t first, int64_t blocks, uint32_t *words) {
#pragma omp simd
    for (int64_t i = 0; i < blocks; i++) {
        uint32_t c0 = first + (uint32_t)i, c1 = row, c2 = 0, c3 = 0, k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
        for (int round = 0; round < 10; round++) {
            uint64_t a = (uint64_t)c0 * 0xD2511F53u, b = (uint64_t)c2 * 0xCD9E8D57u;
            c0 = (uint32_t)(b >> 32) ^ c1 ^ k0, c1 = (uint32_t)b;
            c2 = (uint32_t)(a >> 32) ^ c3 ^ k1, c3 = (uint32_t)a;
            k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        }
        words[4 * i] = c0, words[4 * i + 1] = c1, words[4 * i + 2] = c2, words[4 * i + 3] = c3;
    }
}

/* chance [h, pitch] of a strip: the lanes of Philox, whose first is a multiple of 8 columns on. */
INLINE void draw_chance(const Work *work, const Unit *strip, uint16_t *chance) {
    uint32_t words[WIDTH / 2];
    for (int64_t i = 0; i < strip->h; i++) {
        int64_t row = work->first_row + strip->row + i;
        philox(work->seed, (uint32_t)row, (uint32_t)(strip->column / 8), strip->pitch / 8, words);
        memcpy(chance + i * strip->pitch, words, strip->pitch * sizeof *chance);
    }
}

/* C of a merged element; row and column are the reciprocals of its scales. */
INLINE uint32_t candidate(int type, int scaled, uint32_t merged, float delta, float row, float column) {
    float difference = value_of(type, merged) - delta;
    if (scaled) difference = difference * row * column;
    return sign_of(type, difference) | rounded(type, difference);
}

/* out <- Wm, xors <- bits of C ^ bits of W, sums <- the next of the checksum; whether finite elements stay finite. */
INLINE int merge_lines(int type, int scaled, int random, const Work *work, const Unit *unit, const float *delta,
                       const uint16_t *chance, void *out, void *xors, uint8_t *restrict differs,
                       uint32_t *restrict sums) {
    uint32_t largest = 0;
    const float *u = scaled ? work->column_scale + unit->column : 0, *v = scaled ? u + work->columns : 0;
    for (int64_t i = 0; i < unit->h; i++) {
        const char *line = unit->lines + i * unit->stride;
        int64_t at = i * unit->pitch, row = unit->row + i;
        float scale = scaled ? work->row_scale[row] : 1, back = scaled ? work->row_scale[work->rows + row] : 1;
        for (int64_t j = 0; j < unit->n; j++) {
            uint32_t w = get(type, line, j), finite = -(uint32_t)is_finite(type, w); /* all bits or none */
            float value = value_of(type, w), sum = (scaled ? value * scale * u[j] : value) + delta[at + j];
            uint32_t size = random ? dithered(type, sum, chance[at + j]) : rounded(type, sum);
            uint32_t merged = sign_of(type, sum) | size;
            uint32_t x = candidate(type, scaled, merged, delta[at + j], back, scaled ? v[j] : 1) ^ w;
            x &= finite, size &= finite;
            largest = size > largest ? size : largest;
            put(type, out, at + j, w ^ ((merged ^ w) & finite));
            put(type, xors, at + j, x);
            differs[at + j] = x != 0;
            sums[j] = checksum_step(sums[j], w);
        }
    }
    return largest < infinity_of(type);
}

/* out <- C. */
INLINE void unmerge_lines(int type, int scaled, const Work *work, const Unit *unit, const float *delta, void *out) {
    const float *v = scaled ? work->column_scale + work->columns + unit->column : 0;
    for (int64_t i = 0; i < unit->h; i++) {
        const char *line = unit->lines + i * unit->stride;
        int64_t at = i * unit->pitch;
        float back = scaled ? work->row_scale[work->rows + unit->row + i] : 1;
        for (int64_t j = 0; j < unit->n; j++) {
            uint32_t w = get(type, line, j), c = candidate(type, scaled, w, delta[at + j], back, scaled ? v[j] : 1);
            put(type, out, at + j, is_finite(type, w) ? c : w);
        }
    }
}

/* Where the corrections of a unit end so far, and the place of the last one. */
typedef struct {
    uint8_t *end;
    int32_t last;
} Pairs;

/* The corrections of a strip, whose first element is the unit's number `start`. Behind the last column `differs` is 0. */
INLINE Pairs encode(int type, const Unit *strip, int64_t start, const void *xors, const uint8_t *differs, Pairs pairs) {
    for (int64_t i = 0; i < strip->h; i++)
        for (int64_t first = 0; first < strip->n; first += 64) {
            int64_t at = i * strip->pitch + first, place = start + i * strip->n + first, stop = strip->pitch - first;
            uint64_t found = 0, eight; /* a bit for each element, from a byte for each */
            for (int64_t j = 0; j < 64 && j < stop; j += 8) {
                memcpy(&eight, differs + at + j, 8);
                found |= (eight * 0x0102040810204080u >> 56) << j;
            }
            for (; found; found &= found - 1) {
                int64_t j = __builtin_ctzll(found);
                int32_t gap = (int32_t)(place + j) - pairs.last;
                uint32_t x = get(type, xors, at + j);
                pairs.last += gap;
                for (; gap > 255; gap -= 255) *pairs.end++ = 255, *pairs.end++ = 0;
                for (; x > 255; x >>= 8, gap = 0) *pairs.end++ = (uint8_t)gap, *pairs.end++ = (uint8_t)x;
                *pairs.end++ = (uint8_t)gap, *pairs.end++ = (uint8_t)x;
            }
        }
    return pairs;
}

/* Corrections applied to C; whether all of them lie in the unit. */
INLINE int decode(int type, const Unit *unit, void *out, const uint8_t *pairs, int64_t count) {
    int64_t place = -1, size = unit->h * unit->n, whole = unit->n == unit->pitch;
    int shift = -1;
    for (const uint8_t *pair = pairs; pair < pairs + 2 * count; pair += 2) {
        shift = pair[0] ? 0 : shift + 8;
        place += pair[0];
        if (place < 0 || place >= size || shift > 24) return 0;
        int64_t at = whole ? place : place / unit->n * unit->pitch + place % unit->n;
        put(type, out, at, get(type, out, at) ^ (uint32_t)pair[1] << shift);
    }
    return 1;
}

INLINE Unit unit_of(const Work *work, int64_t size, int64_t index) {
    int64_t panels = (work->columns + work->width - 1) / work->width, stride = work->row_stride * size;
    int64_t row = index / panels * work->height, column = index % panels * work->width;
    int64_t h = work->rows - row < work->height ? work->rows - row : work->height;
    int64_t n = work->columns - column < work->width ? work->columns - column : work->width;
    return (Unit){work->weight + row * stride + column * size, stride, row, column, h, n, (n + TILE - 1) / TILE * TILE};
}

/* STRIP of a unit's lines from `first` on. */
INLINE Unit strip_of(const Unit *unit, int64_t first) {
    Unit strip = *unit;
    strip.lines += first * unit->stride, strip.row += first;
    strip.h = unit->h - first < STRIP ? unit->h - first : STRIP;
    return strip;
}

INLINE int do_unit(int type, int scaled, int random, Work *work, int64_t index, int mode) {
    _Alignas(64) float delta[STRIP * WIDTH];
    _Alignas(64) float right[DEPTH * WIDTH];
    _Alignas(64) uint32_t out[3 * AREA];
    _Alignas(64) uint32_t xors[STRIP * WIDTH];
    _Alignas(64) uint32_t sums[WIDTH] = {0};
    _Alignas(64) uint8_t differs[STRIP * WIDTH];
    _Alignas(64) uint16_t chance[STRIP * WIDTH];
    uint8_t pairs[2 * 5 * AREA + 8];
    int64_t size = type == FLOAT32 ? 4 : 2;
    Unit unit = unit_of(work, size, index), next = unit_of(work, size, index + 1);
    int64_t stride = unit.stride, h = unit.h, n = unit.n, pitch = unit.pitch;
    Unit result = {(char *)out, pitch * size, unit.row, unit.column, h, n, pitch};
    Pairs found = {pairs, -1};

    if (work->ranks <= DEPTH) pack_right(work, &unit, 0, work->ranks, right);
    memset(differs, 0, sizeof differs);
    for (int64_t first = 0; first < h; first += STRIP) {
        Unit strip = strip_of(&unit, first);
        char *to = (char *)out + first * pitch * size;
        Unit then = strip_of(&next, first);
        compute_delta(work, &strip, &then, right, delta);
        if (!random && mode == UNMERGE) {
            unmerge_lines(type, scaled, work, &strip, delta, to);
            continue;
        }
        if (random) draw_chance(work, &strip, chance);
        if (!merge_lines(type, scaled, random, work, &strip, delta, chance, to, xors, differs, sums)) return LOST;
        if (mode == MERGE) found = encode(type, &strip, first * n, xors, differs, found);
    }
    if (!random && mode == UNMERGE) {
        int64_t start = work->starts[index], count = work->counts[index];
        if (start < 0 || count < 0 || start > work->room - count) return CHANGED;
        if (!decode(type, &unit, out, work->corrections + 2 * start, count)) return CHANGED;
        if (checksum(type, &result) != work->checksums[index]) return CHANGED;
    } else if (mode == MERGE) {
        int64_t start, count = (found.end - pairs) / 2;
#pragma omp atomic capture
        { start = work->used; work->used += count; }
        if (start > work->room - count) return FULL;
        memcpy(work->corrections + 2 * start, pairs, 2 * count);
        work->starts[index] = start, work->counts[index] = count;
        work->checksums[index] = checksum_of(sums, n);
    }
    for (int64_t i = 0; i < h; i++) memcpy(unit.lines + i * stride, result.lines + i * result.stride, n * size);
    work->merged[index] = mode != UNMERGE;
    return DONE;
}

/* Only merges of 16 bits are rounded at random: the compiler leaves out the rest. */
INLINE int do_unit_of(int scaled, int random, Work *work, int64_t index, int mode) {
    if (!random && work->weight_type == FLOAT32) return do_unit(FLOAT32, scaled, 0, work, index, mode);
    if (work->weight_type == BFLOAT16) return do_unit(BFLOAT16, scaled, random, work, index, mode);
    return do_unit(FLOAT16, scaled, random, work, index, mode);
}

/* The LoRA terms of rows under many adapters. A group of rows has a list of members at each output of a layer. */
typedef struct {
    const char *A, *B;                        /* A [ranks, K] and B^T [ranks, columns], rows contiguous and so many */
    int64_t A_pitch, B_pitch, ranks;          /* elements apart */
    double scale;
} Member;

typedef struct {
    const float *x;                           /* [rows, K], its rows x_stride apart */
    int64_t x_stride, K, y_type, type;        /* type: of A and B */
    int64_t outputs, groups;
    const int64_t *columns;                   /* [outputs + 1]: where those of each begin in y */
    const int64_t *starts;                    /* [outputs * groups + 1]: where the members of each begin */
    const Member *members;
    int64_t strips, spans;                    /* of STRIP ranks of a group's members and of SPAN columns, at most */
    int64_t blocks;
    const int64_t *block, *order;             /* [blocks, 3]: group, first place in order, rows; [places]: row of x and y */
    float *S;                                 /* [places, outputs, pitch]: of a group's members one beside the other */
    int64_t pitch, threads, variant;
    char *y;                                  /* [rows, all outputs' columns], its rows y_stride bytes apart */
    int64_t y_stride;
} Terms;

/* Vectors of a width that every variant has: gcc takes wider ones apart where a processor has them not. They go by
 * pointer, for they are not passed alike by the functions of all instruction sets. */
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

/* LANES elements from i on: value_of for vectors. */
INLINE void load(int type, const void *array, int64_t i, lanes *value) {
    if (type == FLOAT32) {
        *value = *(const lanes *)((const float *)array + i);
        return;
    }
    words bits = __builtin_convertvector(*(const halves *)((const uint16_t *)array + i), words);
    if (type == BFLOAT16) {
        *value = (lanes)(bits << 16);
        return;
    }
    words magnitude = (bits & 0x7FFF) << 13, special = (words)(magnitude >= 0x0F800000) & 0x7F800000;
    *value = (lanes)((words)((lanes)magnitude * 0x1p112f) | special | (bits & 0x8000) << 16);
}

#define ELEMENT(type, array, i) value_of(type, get(type, array, i))

INLINE int64_t bytes_of(int type, int64_t n) { return type == FLOAT32 ? 4 * n : 2 * n; }

/* The sum of `part`, and then of what did not fill the lanes, one after the other. */
INLINE float sum_of(const lanes *part, int p_type, const void *p, int q_type, const void *q, int64_t k, int64_t K) {
    float sum = 0;
    for (int l = 0; l < LANES; l++) sum += (*part)[l];
    for (; k < K; k++) sum += ELEMENT(p_type, p, k) * ELEMENT(q_type, q, k);
    return sum;
}

/* Asks for n elements from i on. Rows of A and B are too short for a processor to see, while it reads some, that it will
 * read the ones behind them. */
INLINE void ask_for(int type, const void *array, int64_t i, int64_t n) {
    const char *from = (const char *)array + bytes_of(type, i);
    for (int64_t at = 0; at < bytes_of(type, n); at += 64) __builtin_prefetch(from + at, 0, 3);
}

/* s[i] = p[i] . q, and t[i] = p[i] . o where `both`, for GROUP vectors p: LANES sums over k, and then the sum of those.
 * `ahead` elements behind q and o is what is read next; 0: not known. */
INLINE void dot_products(int both, int64_t ahead, int p_type, const void *const *p, int q_type, const void *q,
                         const void *o, int64_t K, float *s, float *t) {
    lanes u[GROUP] = {{0}}, v[GROUP] = {{0}};
    int64_t k = 0;
    while (k + LANES <= K) {
        int64_t end = ahead && K - k > AHEAD ? k + AHEAD : K;
        if (ahead && both) ask_for(q_type, q, k + ahead, end - k), ask_for(q_type, o, k + ahead, end - k);
        for (int i = 0; i < GROUP && ahead && !both; i++) ask_for(p_type, p[i], k + ahead, end - k);
        for (; k + LANES <= end; k += LANES) {
            lanes a, b, c;
            load(q_type, q, k, &a);
            if (both) load(q_type, o, k, &b);
            for (int i = 0; i < GROUP; i++) {
                load(p_type, p[i], k, &c);
                u[i] += c * a;
                if (both) v[i] += c * b;
            }
        }
    }
    for (int i = 0; i < GROUP; i++) {
        s[i] = sum_of(&u[i], p_type, p[i], q_type, q, k, K);
        if (both) t[i] = sum_of(&v[i], p_type, p[i], q_type, o, k, K);
    }
}

/* d [rows, n] += S B at `depth` ranks from rank j on, one after the other. B's rows are `stride` apart. */
INLINE void add_ranks(int64_t rows, int64_t depth, int64_t j, const float *const *S, int type, const void *B,
                      int64_t stride, int64_t n, float (*restrict d)[SPAN]) {
    for (int64_t first = 0, end; first < n; first = end) {
        end = n - first > AHEAD ? first + AHEAD : n;
        for (int64_t m = 0; m < depth; m++) ask_for(type, B, (j + depth + m) * stride + first, end - first);
#pragma omp simd
        for (int64_t c = first; c < end; c++) {
            float s[GROUP];
            for (int64_t i = 0; i < rows; i++) s[i] = d[i][c];
            for (int64_t m = 0; m < depth; m++) {
                float b = ELEMENT(type, B, (j + m) * stride + c);
                for (int64_t i = 0; i < rows; i++) s[i] += S[i][j + m] * b;
            }
            for (int64_t i = 0; i < rows; i++) d[i][c] = s[i];
        }
    }
}

/* d [rows, n] += S B; rows: 1 or GROUP. */
INLINE void combine(int64_t rows, const float *const *S, int type, const void *B, int64_t stride, int64_t ranks,
                    int64_t n, float (*d)[SPAN]) {
    int64_t j = 0;
    for (; j + GROUP <= ranks; j += GROUP) add_ranks(rows, GROUP, j, S, type, B, stride, n, d);
    for (; j < ranks; j++) add_ranks(rows, 1, j, S, type, B, stride, n, d);
}

/* y [n] = round(y + d) */
INLINE void add_rounded(int type, void *y, const float *d, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float value = value_of(type, get(type, y, i)) + d[i];
        uint32_t bits = rounded(type, value), most = infinity_of(type);
        if (bits > most) bits = most;
        bits |= sign_of(type, value);
        if (value != value) bits = type == FLOAT32 ? as_bits(value) : most | most >> 1;
        put(type, y, i, bits);
    }
}

/* S of one block at one output, STRIP ranks of a member. Rows and ranks that fill up a group are the last ones again. */
INLINE void shrink(int type, const Terms *terms, int64_t index) {
    int64_t strip = index % terms->strips, output = index / terms->strips % terms->outputs;
    const int64_t *block = terms->block + index / terms->strips / terms->outputs * 3;
    const int64_t *starts = terms->starts + output * terms->groups + block[0];
    const int64_t *row = terms->order + block[1], rows = block[2];
    const Member *of = terms->members + starts[0], *end = terms->members + starts[1];
    int64_t K = terms->K, pitch = terms->outputs * terms->pitch;
    float *S = terms->S + (block[1] * terms->outputs + output) * terms->pitch, s[GROUP], t[GROUP];
    for (; of < end && strip >= (of->ranks + STRIP - 1) / STRIP; of++) {
        strip -= (of->ranks + STRIP - 1) / STRIP;
        S += of->ranks;
    }
    if (of == end) return;
    int64_t first = strip * STRIP, ranks = of->ranks - first < STRIP ? of->ranks - first : STRIP, apart = of->A_pitch;
    const char *A = of->A + bytes_of(type, first * apart);
    const void *p[GROUP];
    float scale = (float)of->scale;
    S += first;
    for (int64_t m = 0; m < rows; m += GROUP) {
        if (rows - m == 1) {
            for (int64_t j = 0; j < ranks; j += GROUP) {
                for (int64_t i = 0; i < GROUP; i++) p[i] = A + bytes_of(type, (j + i < ranks ? j + i : ranks - 1) * apart);
                const float *x = terms->x + row[m] * terms->x_stride;
                dot_products(0, GROUP * apart, type, p, FLOAT32, x, x, K, s, t);
                for (int64_t i = 0; i < GROUP && j + i < ranks; i++) S[m * pitch + j + i] = s[i] * scale;
            }
            break;
        }
        for (int64_t i = 0; i < GROUP; i++) p[i] = terms->x + row[m + i < rows ? m + i : rows - 1] * terms->x_stride;
        for (int64_t j = 0; j < ranks; j += 2) {
            int64_t next = j + 1 < ranks ? j + 1 : j;
            const char *a = A + bytes_of(type, j * apart), *b = A + bytes_of(type, next * apart);
            dot_products(1, 2 * apart, FLOAT32, p, type, a, b, K, s, t);
            for (int64_t i = 0; i < GROUP && m + i < rows; i++)
                S[(m + i) * pitch + j] = s[i] * scale, S[(m + i) * pitch + next] = t[i] * scale;
        }
    }
}

/* y of one block at SPAN columns of one output. */
INLINE void expand(int type, const Terms *terms, int64_t index) {
    int64_t span = index % terms->spans, output = index / terms->spans % terms->outputs;
    const int64_t *block = terms->block + index / terms->spans / terms->outputs * 3;
    const int64_t *starts = terms->starts + output * terms->groups + block[0];
    const Member *start = terms->members + starts[0], *end = terms->members + starts[1];
    int64_t first = span * SPAN, n = terms->columns[output + 1] - terms->columns[output] - first, rows = block[2];
    if (n > SPAN) n = SPAN;
    const float *S[GROUP];
    float d[GROUP][SPAN];
    for (int64_t m = 0; m < rows && n > 0 && start < end; m += GROUP) {
        int64_t height = rows - m == 1 ? 1 : GROUP;
        for (int64_t i = 0; i < height; i++) {
            int64_t place = block[1] + (m + i < rows ? m + i : rows - 1);
            S[i] = terms->S + (place * terms->outputs + output) * terms->pitch;
            memset(d[i], 0, n * sizeof **d);
        }
        for (const Member *of = start; of < end; of++) {
            const char *B = of->B + bytes_of(type, first);
            if (height == 1) combine(1, S, type, B, of->B_pitch, of->ranks, n, d);
            else combine(GROUP, S, type, B, of->B_pitch, of->ranks, n, d);
            for (int64_t i = 0; i < height; i++) S[i] += of->ranks;
        }
        for (int64_t i = 0; i < height && m + i < rows; i++) {
            char *y = terms->y + terms->order[block[1] + m + i] * terms->y_stride;
            y += bytes_of(terms->y_type, terms->columns[output] + first);
            BY_TYPE(add_rounded, terms->y_type, y, d[i], n);
        }
    }
}

/* Products of LoRA in one pass over x [rows, columns], with D(x) = x * mask, without the factor 1 / (1 - p). */
typedef struct {
    int64_t rows, columns, ranks, cut, threads, variant;
    int64_t height, panels;   /* rows of a part; how many PANELs of columns there are */
    uint64_t seed;
    const float *x, *A;       /* A [ranks, columns] */
    const float *dS, *turned; /* dS [rows, ranks] and its transpose */
    float *S;                 /* [panels, rows, ranks], whose sum is D(x) A^T, or NULL */
    float *dx;                /* [rows, columns], mask * (dS A), D(x) where dS is NULL, or NULL */
    float *dA;                /* [parts, ranks, columns], whose sum is dS^T D(x), or NULL */
} Products;

enum { PANEL = 1024, BLOCK = 16 }; /* columns and rows of a mask at a time; Python knows PANEL */

/* keep [n] = 1 or 0: the lanes of Philox of a row from a column on, a multiple of 8, that are not below the cut. */
INLINE void draw_mask(const Products *of, int64_t row, int64_t column, int64_t n, float *keep) {
    uint32_t words[PANEL / 2];
    const bits16 *lanes = (const bits16 *)words;
    int16_t cut = (int16_t)of->cut;
    philox(of->seed, (uint32_t)row, (uint32_t)(column / 8), (n + 7) / 8, words);
    for (int64_t j = 0; j < n; j++) keep[j] = (int16_t)lanes[j] >= cut;
}

/* d [GROUP, n] = GROUP rows of left [depth] times right [depth, PANEL], += where `more`; whole tiles are written. */
INLINE void multiply(const float *const *left, const float *right, int64_t depth, int more, int64_t n, float (*d)[PANEL]) {
    for (int64_t j = 0; j < n; j += TILE)
        if (more) add_products(left, right + j, PANEL, depth, 1, d[0] + j, PANEL);
        else add_products(left, right + j, PANEL, depth, 0, d[0] + j, PANEL);
}

/* S, dx and dA of one part at PANEL columns. */
INLINE void products(const Products *of, int64_t index) {
    int64_t part = index / of->panels, panel = index % of->panels;
    float kept[BLOCK][PANEL], right[DEPTH][PANEL], d[GROUP][PANEL], s[GROUP], t[GROUP];
    int64_t K = of->columns, first = panel * PANEL, n = K - first < PANEL ? K - first : PANEL, ranks = of->ranks;
    int64_t top = part * of->height, end = of->rows - top < of->height ? of->rows : top + of->height, packed = 0;
    const float *A = of->A + first, *v[GROUP];
    const void *p[GROUP];
    memset(kept, 0, sizeof kept), memset(right, 0, sizeof right); /* nobody reads what is behind the last column */
    for (int64_t m = top; m < end; m += BLOCK) {
        int64_t h = end - m < BLOCK ? end - m : BLOCK;
        for (int64_t i = 0; i < h; i++) draw_mask(of, m + i, first, n, kept[i]);
        for (int64_t k = 0; k < h && of->dx; k += GROUP) {
            for (int64_t i = 0; i < GROUP && of->dS; i++) v[i] = of->dS + (m + (k + i < h ? k + i : h - 1)) * ranks;
            for (int64_t j = 0; j < ranks && of->dS; j += DEPTH) {
                int64_t depth = ranks - j < DEPTH ? ranks - j : DEPTH;
                for (int64_t i = 0; i < depth && packed < ranks; i++, packed += ranks <= DEPTH)
                    memcpy(right[i], A + (j + i) * K, n * sizeof **right);
                multiply(v, right[0], depth, j > 0, n, d);
                for (int64_t i = 0; i < GROUP; i++) v[i] += depth;
            }
            for (int64_t i = 0; i < GROUP && k + i < h; i++) {
                float *restrict dx = of->dx + (m + k + i) * K + first;
                const float *from = of->dS ? d[i] : of->x + (m + k + i) * K + first;
                for (int64_t c = 0; c < n; c++) dx[c] = kept[k + i][c] * from[c];
            }
        }
        if (!of->S && !of->dA) continue;
        for (int64_t i = 0; i < h; i++)
            for (int64_t c = 0; c < n; c++) kept[i][c] *= of->x[(m + i) * K + first + c];
        for (int64_t k = 0; k < h && of->S; k += GROUP) {
            for (int64_t i = 0; i < GROUP; i++) p[i] = kept[k + i < h ? k + i : h - 1];
            for (int64_t j = 0; j < ranks; j += 2) {
                int64_t next = j + 1 < ranks ? j + 1 : j;
                dot_products(1, 0, FLOAT32, p, FLOAT32, A + j * K, A + next * K, n, s, t);
                for (int64_t i = 0; i < GROUP && k + i < h; i++) {
                    float *S = of->S + (panel * of->rows + m + k + i) * ranks;
                    S[j] = s[i], S[next] = t[i];
                }
            }
        }
        for (int64_t k = 0; k < ranks && of->dA; k += GROUP) {
            for (int64_t i = 0; i < GROUP; i++) v[i] = of->turned + (k + i < ranks ? k + i : ranks - 1) * of->rows + m;
            multiply(v, kept[0], h, 0, n, d);
            for (int64_t i = 0; i < GROUP && k + i < ranks; i++) {
                float *restrict dA = of->dA + (part * ranks + k + i) * K + first;
                if (m > top) for (int64_t c = 0; c < n; c++) dA[c] += d[i][c];
                else memcpy(dA, d[i], n * sizeof *dA);
            }
        }
    }
}

/* The functions above for several instruction sets, which a processor is asked for; all give the same bits. */
#define KIND(name, kind, scaled, random, options)                                                                   \
    options static int kind##_##name(Work *work, int64_t index, int mode) {                                         \
        return do_unit_of(scaled, random, work, index, mode);                                                       \
    }
#define VARIANT(name, options)                                                                                      \
    KIND(name, plain, 0, 0, options)                                                                                \
    KIND(name, scaled, 1, 0, options)                                                                               \
    KIND(name, random, 0, 1, options)                                                                               \
    KIND(name, scaled_random, 1, 1, options)                                                                        \
    static int unit_##name(Work *work, int64_t index, int mode) {                                                   \
        int random = work->dithered && work->weight_type != FLOAT32 && mode != UNMERGE;                             \
        if (work->row_scale) return (random ? scaled_random_##name : scaled_##name)(work, index, mode);             \
        return (random ? random_##name : plain_##name)(work, index, mode);                                          \
    }                                                                                                               \
    options static void products_##name(const void *of, int64_t index) { products(of, index); }                     \
    options static void shrink_##name(const void *of, int64_t index) {                                              \
        BY_TYPE(shrink, ((const Terms *)of)->type, of, index);                                                      \
    }                                                                                                               \
    options static void expand_##name(const void *of, int64_t index) {                                              \
        BY_TYPE(expand, ((const Terms *)of)->type, of, index);                                                      \
    }                                                                                                               \
    static const Variant name = {unit_##name, products_##name, shrink_##name, expand_##name};

typedef void Task(const void *of, int64_t index);
typedef struct {
    int (*unit)(Work *, int64_t, int);
    Task *products, *shrink, *expand;
} Variant;

/* fused_lora_variant: the best variant here, or -1 where fmaf would be a slow call. fused_lora_amd: whether the maker of
 * the processor is AMD. */
#ifdef __x86_64__
VARIANT(avx2, __attribute__((target("avx2,fma,bmi2"))))
VARIANT(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2,prefer-vector-width=512"))))
static const Variant *const variants[] = {0, &avx2, &avx512};

int fused_lora_variant(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2")) return -1;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") ? 2 : 1;
}

int fused_lora_amd(void) {
    __builtin_cpu_init();
    return __builtin_cpu_is("amd") != 0;
}
#else
VARIANT(plain, )
static const Variant *const variants[] = {&plain};

int fused_lora_variant(void) {
#ifdef __FP_FAST_FMAF
    return 0;
#else
    return -1;
#endif
}

int fused_lora_amd(void) { return 0; }
#endif

/* Of the layouts that Python must have, too: an older library beside newer code would read wrong addresses. */
int fused_lora_layout(void) { return (int)(sizeof(Work) << 20 | sizeof(Products) << 10 | sizeof(Terms)); }

static int sweep(Work *const *works, int64_t n, int threads, int variant, int mode) {
    int result = DONE;
#pragma omp parallel num_threads(threads)
    {
        fenv_t environment; /* rounds to nearest and keeps subnormal numbers, whatever the caller's thread does */
        fegetenv(&environment);
        fesetenv(FE_DFL_ENV);
        for (int64_t i = 0; i < n; i++) { /* whoever has no more units of one weight goes on to the next */
            Work *work = works[i];
            int64_t panels = (work->columns + work->width - 1) / work->width;
            int64_t count = (work->rows + work->height - 1) / work->height * panels;
#pragma omp for schedule(dynamic, 8) nowait
            for (int64_t index = 0; index < count; index++) {
                int found;
#pragma omp atomic read
                found = result;
                if (found != DONE || work->merged[index] != (mode == UNMERGE)) continue;
                found = variants[variant]->unit(work, index, mode);
                if (found == DONE) continue;
#pragma omp atomic write
                result = found;
            }
        }
        fesetenv(&environment);
    }
    return result;
}

/* All of n weights or nothing; see the enumerations at the top. TORN: one was changed meanwhile and is partly merged. */
int fused_lora_run(Work *const *works, int64_t n, int threads, int variant, int mode) {
    int result = sweep(works, n, threads, variant, mode);
    if (result == DONE || mode == MERGE_AGAIN) return result;
    return sweep(works, n, threads, variant, mode == MERGE ? UNMERGE : MERGE_AGAIN) == DONE ? result : TORN;
}

static void run_tasks(Task *task, const void *of, int64_t n, int64_t threads) {
#pragma omp parallel num_threads((int)threads)
    {
        fenv_t environment;
        fegetenv(&environment);
        fesetenv(FE_DFL_ENV);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < n; i++) task(of, i);
        fesetenv(&environment);
    }
}

void fused_lora_products(const Products *of) {
    int64_t parts = (of->rows + of->height - 1) / of->height;
    run_tasks(variants[of->variant]->products, of, parts * of->panels, of->threads);
}

/* y += scale * B A x of all rows that `order` names, at all outputs: first S of all blocks, then y. */
void fused_lora_terms(const Terms *of) {
    run_tasks(variants[of->variant]->shrink, of, of->blocks * of->outputs * of->strips, of->threads);
    run_tasks(variants[of->variant]->expand, of, of->blocks * of->outputs * of->spans, of->threads);
}
