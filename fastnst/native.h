/* What convolutions and the gradients of their kernels share: vectors, how a picture is read, the transform of a tile's input. */

#ifdef __AVX2__
#include <immintrin.h>
#endif
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define ROWS 10 /* of 32 registers */
#elif defined(__AVX2__)
#define LANES 8
#define ROWS 6 /* of a block of a matrix product; two vectors wide, so 12 of 16 registers hold sums */
#else
#define LANES 4
#ifdef __aarch64__ /* 32 registers, of which 16 hold sums and 8 what they are multiplied by */
#define ROWS 8
#define TOGETHER LANES
#else
#define ROWS 6
#endif
#endif
#ifndef TOGETHER /* numbers of a row that are loaded as a vector, for the CPUs that multiply by a lane of one; others spread each as they load it */
#define TOGETHER 1
#endif
#define WIDE (2 * LANES)                /* outputs of a block */
#define PIECES (LANES > 8 ? LANES / 8 : 1) /* of a vector, each of which belongs to one pixel */
#define PIECE (LANES / PIECES)
#define OUTPUTS(half) ((half) ? 4 : 6) /* of a 3x3 convolution's tile, down and across */

#include "native_numbers.h"

#ifdef __clang__
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t mask __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline vec load(const float *from) { return *(const vec *)from; }
static inline void store(float *to, vec v) { *(vec *)to = v; }
/* Which numbers of a vector are meant. */
#if LANES == 16
typedef __mmask16 some;
#define ALL 0xffff
static inline some first(int64_t left) { return left < 16 ? (1 << left) - 1 : ALL; }
static inline vec load_some(const float *from, some which) { return (vec)_mm512_maskz_loadu_ps(which, from); } /* zeros for the others */
static inline void store_some(float *to, vec v, some which) { _mm512_mask_storeu_ps(to, which, (__m512)v); }
#else /* vectors are whole; of three channels some numbers more are read */
typedef int some;
#define ALL 1
static inline some first(int64_t left) { return (void)left, ALL; }
static inline vec load_some(const float *from, some which) { return (void)which, load(from); }
static inline void store_some(float *to, vec v, some which) { (void)which, store(to, v); }
#endif
#ifdef __AVX512BF16__
#define HALVES 1
/* sum + a * b, or with `half` the sum and both products of each pair. */
INLINE vec multiplied(int half, vec sum, vec a, vec b) {
    if (half) return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    return sum + a * b;
}
INLINE void store_numbers(int half, float *to, vec v, some which) {
    __m256i numbers = half ? (__m256i)_mm512_cvtneps_pbh((__m512)v) : _mm256_setzero_si256();
    if (which != ALL && half) _mm256_mask_storeu_epi16(to, which, numbers);
    else if (half) _mm256_storeu_si256((__m256i *)to, numbers);
    else if (which != ALL) store_some(to, v, which);
    else store(to, v);
}
/* Two of which lie in the place of a float. */
INLINE vec load_halves(const float *from, some which) { return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(which, from)), 16); }
INLINE vec pairs_of(vec low, vec high) {
    __m512i a = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)low)), b = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)high));
    return (vec)_mm512_or_si512(a, _mm512_slli_epi32(b, 16));
}
#else
#define HALVES 0
INLINE vec load_halves(const float *from, some which) { return load_some(from, which); }
INLINE vec pairs_of(vec low, vec high) { return (void)high, low; }
INLINE vec multiplied(int half, vec sum, vec a, vec b) { return (void)half, sum + a * b; }
INLINE void store_numbers(int half, float *to, vec v, some which) { (void)half, store_some(to, v, which); }
#endif
INLINE void store_piece(int half, float *to, vec v, int piece) {
    store_numbers(half, to - piece * PIECE / (half ? 2 : 1), v, PIECES > 1 ? 0xff << piece * PIECE : ALL);
}
static inline vec splat(float value) { return value - (vec){0}; }
static inline float total(vec v) {
    typedef float four __attribute__((vector_size(16)));
    four parts[LANES / 4], sum = {0};
    memcpy(parts, &v, sizeof v);
    for (int i = 0; i < LANES / 4; i++) sum += parts[i];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}
/* The larger of both; what is no number in `a` stays so. */
static inline vec larger(vec a, vec b) {
#if LANES == 16
    return (vec)_mm512_max_ps((__m512)b, (__m512)a);
#elif LANES == 8
    return (vec)_mm256_max_ps((__m256)b, (__m256)a);
#else
    mask is = a < b;
    return (vec)(((mask)b & is) | ((mask)a & ~is));
#endif
}

/* What a convolution reads. `rows` and `columns` say for each row or column, padding included, which one of `x` lies there, or -1
for `value`. gain * x + shift, then max(., floor), comes before. All but `x` are one number for each channel. */
struct input {
    const float *x, *gain, *shift, *floor, *value;
    const int32_t *rows, *columns;
    int32_t width, channels;
};

/* How a vector of channels is read. */
struct reading {
    vec gain, shift, floor, value;
    some which;
};

INLINE struct reading reading_of(const struct input *in, int64_t channel) {
    some which = first(in->channels - channel);
    return (struct reading){
        load_some(in->gain + channel, which), load_some(in->shift + channel, which), load_some(in->floor + channel, which),
        in->value ? load_some(in->value + channel, which) : splat(0), which,
    };
}

/* `from`: where it lies, or NULL for `value`. */
INLINE vec read_from(int from_half, const struct reading *r, const float *from) {
    if (!from) return r->value;
    return larger(r->gain * (from_half ? load_halves(from, r->which) : load_some(from, r->which)) + r->shift, r->floor);
}

/* Calls one(rows, at) for as many rows at once as there are. */
#define IN_ROWS(begin, end, one)                       \
    for (int64_t at = (begin), left; (left = (end) - at) > 0;) { \
        if (left >= ROWS) one(ROWS), at += ROWS;       \
        else if (left >= 2) one(2), at += 2;           \
        else one(1), at += 1;                          \
    }

/* ---- Winograd ---- */

/* F(6, 3) from 8 numbers, F(4, 3) from 6 and F(3, 3) from 5: `m` outputs of 3 taps from m + 2. Points of the latter two are 0, A, -A, B, -B (of F(3, 3) no -B)
and infinity: A * B = 1 spares multiplications, and of all such pairs this one rounds least, a third less than the usual 1 and 2 (Barabasz et al. 2020 on the
choice of points); of F(6, 3) 0, 1, -1, 2, -2, 1/2, -1/2 and infinity. */
#define A (2 / 3.f)
#define B (3 / 2.f)

INLINE void transform_input(int m, const vec *d, vec *t) {
    if (m == 4) {
        vec a = d[4] - B * B * d[2], b = d[3] - B * B * d[1], e = d[4] - A * A * d[2], f = d[3] - A * A * d[1];
        t[0] = d[0] - (A * A + B * B) * d[2] + d[4];
        t[1] = a + A * b;
        t[2] = a - A * b;
        t[3] = e + B * f;
        t[4] = e - B * f;
        t[5] = d[1] - (A * A + B * B) * d[3] + d[5];
    } else if (m == 6) {
        vec a = d[6] - 4.25f * d[4] + d[2], b = d[5] - 4.25f * d[3] + d[1];
        t[1] = a + b;
        t[2] = a - b;
        a = d[6] - 1.25f * d[4] + 0.25f * d[2], b = d[5] - 1.25f * d[3] + 0.25f * d[1];
        t[3] = a + 2 * b;
        t[4] = a - 2 * b;
        a = d[6] - 5 * d[4] + 4 * d[2], b = d[5] - 5 * d[3] + 4 * d[1];
        t[5] = a + 0.5f * b;
        t[6] = a - 0.5f * b;
        t[0] = d[6] - d[0] - 5.25f * (d[4] - d[2]);
        t[7] = d[7] - d[1] - 5.25f * (d[5] - d[3]);
    } else {
        vec e = d[3] - A * A * d[1];
        t[0] = e - B * (d[2] - A * A * d[0]);
        t[1] = d[3] - d[1] + (A - B) * d[2];
        t[2] = d[3] + d[1] - (A + B) * d[2];
        t[3] = e;
        t[4] = d[4] - A * A * d[2] - B * e;
    }
}

/* V[k][channel] of the tile at (m * row, m * column); `step` floats lie between two k. The last channels are written as a whole vector: what is too much
the next tile overwrites. `from_half`: the input's numbers are bfloat16; `half`: those of V are. */
INLINE void tile_in(int from_half, int half, int m, const struct input *in, int64_t row, int64_t column, float *V, int64_t step) {
    const float *from[8][8];
    int64_t words = from_half ? in->channels / 2 : in->channels;
    int n = m + 2;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) {
            int64_t y = in->rows[m * row + i], x = in->columns[m * column + j];
            from[i][j] = y < 0 || x < 0 ? NULL : in->x + (y * in->width + x) * words;
        }
    for (int64_t c = 0; c < in->channels; c += LANES) {
        struct reading reading = reading_of(in, c);
        int64_t at = from_half ? c / 2 : c;
        vec between[8][8];
        for (int j = 0; j < n; j++) {
            vec d[8], t[8];
            for (int i = 0; j >= 2 && i < n; i++) __builtin_prefetch(from[i][j] + m * words + at); /* of the next tile, most often */
            for (int i = 0; i < n; i++) d[i] = read_from(from_half, &reading, from[i][j] ? from[i][j] + at : NULL);
            transform_input(m, d, t);
            for (int i = 0; i < n; i++) between[i][j] = t[i];
        }
        for (int i = 0; i < n; i++) {
            vec t[8];
            transform_input(m, between[i], t);
            for (int j = 0; j < n; j++) store_numbers(half, V + (n * i + j) * step + (half ? c / 2 : c), t[j], ALL);
        }
    }
}
