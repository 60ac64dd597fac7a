/* Convolutions of a staged network on a CPU, each with the norm of the stage before folded into its reading.

Activations and sums are float32. What is multiplied is, too, or bfloat16 (`half` 1) on CPUs whose vectors multiply two of these and add both to a sum: two
channels then lie where a float32 would, so that all but the reading, the multiplication and the order of the weights is the same. In training activations
are bfloat16 as well (`half` 2), which only 3x3 convolutions know.

Pictures between stages are (H, W, C) with C a multiple of 8, not normalized yet: whoever reads them applies gain, shift and
ReLU (`struct input`). Whoever writes them gathers the moments of their channels, so an activation is written once and read once.

- 3x3 of stride 1: Winograd's minimal filtering (Lavin and Gray 2016), in float32 F(6x6, 3x3), 64 multiplications for 36 outputs instead of 324, in bfloat16,
  where that would round too much, F(4x4, 3x3), 36 for 16 instead of 144. In training, in float32, the gradient of their kernels likewise.
- 9x9 of stride 1: F(3x3, 3x3), nested: 225 multiplications for 9 outputs instead of 729.
- all others: directly.

Plain C with the vector extensions of GCC and Clang; compiled once for each kind of CPU. */

#ifdef __AVX2__
#include <immintrin.h>
#endif
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__AVX512F__)
#define LANES 16
#define ROWS 10 /* of 32 registers */
#elif defined(__AVX2__)
#define LANES 8
#define ROWS 6 /* of a block of a matrix product; two vectors wide, so 12 of 16 registers hold sums */
#else
#define LANES 4
#ifdef __aarch64__ /* 32 registers */
#define ROWS 8
#else
#define ROWS 6
#endif
#endif
#define WIDE (2 * LANES)                /* outputs of a block */
#define PIECES (LANES > 8 ? LANES / 8 : 1) /* of a vector, each of which belongs to one pixel */
#define PIECE (LANES / PIECES)
#define OUTPUTS(half) ((half) ? 4 : 6) /* of a 3x3 convolution's tile, down and across */
#define DIRECT_ROWS 4
#define DIRECT_COLUMNS 60
#define NESTED_ROWS 8 /* of tiles of 3x3 */
#define NESTED_COLUMNS (30 / ROWS * ROWS)

#define INLINE static inline __attribute__((always_inline))
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
static inline some first(long left) { return left < 16 ? (1 << left) - 1 : ALL; }
static inline vec load_some(const float *from, some which) { return (vec)_mm512_maskz_loadu_ps(which, from); } /* zeros for the others */
static inline void store_some(float *to, vec v, some which) { _mm512_mask_storeu_ps(to, which, (__m512)v); }
#else /* vectors are whole; of three channels some numbers more are read */
typedef int some;
#define ALL 1
static inline some first(long left) { return (void)left, ALL; }
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

INLINE struct reading reading_of(const struct input *in, long channel) {
    some which = first(in->channels - channel);
    return (struct reading){
        load_some(in->gain + channel, which), load_some(in->shift + channel, which), load_some(in->floor + channel, which),
        in->value ? load_some(in->value + channel, which) : splat(0), which,
    };
}

/* `from`: where it lies, or NULL for `value`. */
INLINE vec read_from(int half, const struct reading *r, const float *from) {
    if (!from) return r->value;
    return larger(r->gain * (half == 2 ? load_halves(from, r->which) : load_some(from, r->which)) + r->shift, r->floor);
}

/* What it is, and what it writes: (height, width, channels), from `outputs` (a multiple of WIDE) numbers at each of
(height, width) / shuffle positions: first those of all channels at the upper left, then at the upper right, and so on.
`half`: 1: the weights are bfloat16, two channels of the input side by side; 2: so is what is read and written.
`mean` and `squares` (the sum of squared differences from the mean) of each channel are of what was written; NULL: not asked for. */
struct convolution {
    const float *weight, *bias;
    float *output;
    double *mean, *squares;
    int32_t kernel, stride, outputs, shuffle, height, width, channels, threads, half;
};

/* ---- threads ---- */

struct work {
    void (*job)(void *args, long index, long thread);
    void *args;
    long count, next, thread, joined;
    struct work *shared;
};

static void *work_on(void *given) {
    struct work *mine = given, *all = mine->shared;
    for (;;) {
        long index = __atomic_fetch_add(&all->next, 1, __ATOMIC_RELAXED);
        if (index >= all->count) return NULL;
        all->job(all->args, index, mine->thread);
    }
}

/* GOMP_parallel of the OpenMP that torch uses, in the process that told of it: threads that wait for torch's next work, busily for a while, would take a core from
ours. Processes that are forked later have none of them. */
static void (*team)(void (*)(void *), void *, unsigned, unsigned);
static pid_t team_of;

static void work_in_team(void *given) {
    struct work *all = given;
    long thread = __atomic_fetch_add(&all->joined, 1, __ATOMIC_RELAXED);
    all[thread].thread = thread, all[thread].shared = all;
    work_on(&all[thread]);
}

void fastnst_parallel(long threads, long count, void (*job)(void *, long, long), void *args) {
    struct work works[256] = {{job, args, count, 0, 0, 0, works}};
    pthread_t others[256];
    char runs[256] = {0};
    threads = threads > 256 ? 256 : threads;
    if (threads > 1 && team && getpid() == team_of) {
        team(work_in_team, works, threads, 0);
        return;
    }
    for (long thread = 1; thread < threads; thread++) {
        works[thread] = (struct work){NULL, NULL, 0, 0, thread, 0, works};
        runs[thread] = pthread_create(&others[thread], NULL, work_on, &works[thread]) == 0;
    }
    work_on(&works[0]); /* does all of it where no other thread could be started */
    for (long thread = 1; thread < threads; thread++)
        if (runs[thread]) pthread_join(others[thread], NULL);
}

/* ---- moments ---- */

/* Those of a part, counted from `pivot`, one of its own numbers. */
struct part {
    vec pivot, sum, squares;
    long count;
};

INLINE void part_add(struct part *part, vec v) {
    vec d = v - part->pivot;
    part->sum += d;
    part->squares += d * d;
}

/* Chan, Golub and LeVeque 1979: of two samples together. */
static void merge(double *count, double *mean, double *squares, double other_count, double other_mean, double other_squares) {
    double total = *count + other_count, difference = other_mean - *mean;
    *squares += other_squares + difference * difference * (*count * other_count / total);
    *mean += difference * (other_count / total);
    *count = total;
}

/* A thread's, of all channels. */
struct moments {
    double *count, *mean, *squares;
};

/* ---- one convolution ---- */

struct task {
    const struct input *in;
    const struct convolution *c;
    long words;              /* floats, or pairs of halves, of an input's channels */
    long across, per_thread; /* parts side by side; floats of a thread's own memory */
    long tiles;              /* Winograd's, in a part */
    float *memory;
    struct moments *moments;
};

/* Where a vector of a block of outputs goes, piece by piece: its first channel, and its place among the shuffled; no place (-1) beyond the last. */
struct target {
    int channel[PIECES], down[PIECES], across[PIECES], together;
};

static inline struct target target_of(const struct convolution *c, int output) {
    struct target t = {.together = 1};
    for (int piece = 0; piece < PIECES; piece++) {
        int at = output + piece * PIECE, place = at / c->channels;
        t.channel[piece] = place < c->shuffle * c->shuffle ? at % c->channels : -1;
        t.down[piece] = place / c->shuffle, t.across[piece] = place % c->shuffle;
        t.together &= place == output / c->channels && t.channel[piece] >= 0;
    }
    return t;
}

INLINE float *target_at(int half, const struct convolution *c, const struct target *t, int piece, long y, long x) {
    long at = ((y * c->shuffle + t->down[piece]) * c->width + x * c->shuffle + t->across[piece]) * c->channels + t->channel[piece];
    return c->output + (half == 2 ? at / 2 : at);
}

INLINE void put(int half, const struct convolution *c, const struct target *t, long y, long x, vec v) {
    if (t->together) {
        store_numbers(half == 2, target_at(half, c, t, 0, y, x), v, ALL);
        return;
    }
    for (int piece = 0; piece < PIECES; piece++)
        if (t->channel[piece] >= 0) store_piece(half == 2, target_at(half, c, t, piece, y, x), v, piece);
}

/* `part` is a copy: where it were pointed to, it could not stay in registers while numbers are written elsewhere, which took a third of the time. */
static void moments_add(struct moments *m, const struct target *target, struct part part) {
    for (int lane = 0; lane < LANES; lane++) {
        double n = part.count, sum = part.sum[lane];
        long channel = target->channel[lane / PIECE] + lane % PIECE;
        if (target->channel[lane / PIECE] >= 0)
            merge(m->count + channel, m->mean + channel, m->squares + channel, n, part.pivot[lane] + sum / n, part.squares[lane] - sum * sum / n);
    }
}

/* to[r] = start + the sum over `parts` and `n` of a[part][at + r * step + i] * b[part][i], a vector WIDE; what is known where it is called: `half` and `rows`. */
struct factors {
    const float *const *a;
    long parts, n, step;
    const vec *start;
};

INLINE void product_of(int half, int rows, const struct factors *f, long at, const float *b, float *to) {
    vec s[ROWS][2];
    UNROLLED for (int r = 0; r < rows; r++) s[r][0] = f->start[0], s[r][1] = f->start[1];
    for (long part = 0; part < f->parts; part++) {
        const float *a = f->a[part] + at;
        for (long i = 0; i < f->n; i++, b += WIDE) {
            vec b0 = load(b), b1 = load(b + LANES);
            UNROLLED for (int r = 0; r < rows; r++) {
                vec x = splat(a[r * f->step + i]);
                s[r][0] = multiplied(half, s[r][0], x, b0);
                s[r][1] = multiplied(half, s[r][1], x, b1);
            }
        }
    }
    UNROLLED for (int r = 0; r < rows; r++) store(to + r * WIDE, s[r][0]), store(to + r * WIDE + LANES, s[r][1]);
}

/* Functions of their own, where GCC 12 else keeps the sums of so many rows in memory. */
static __attribute__((noinline)) void product_of_all(const struct factors *f, long at, const float *b, float *to) { product_of(0, ROWS, f, at, b, to); }
static __attribute__((noinline)) void product_of_halves(const struct factors *f, long at, const float *b, float *to) { product_of(HALVES, ROWS, f, at, b, to); }

INLINE void product(int half, int rows, const struct factors *f, long at, const float *b, float *to) {
    if (rows == ROWS) (half ? product_of_halves : product_of_all)(f, at, b, to);
    else product_of(half, rows, f, at, b, to);
}

/* Calls one(rows, at) for as many rows at once as there are. */
#define IN_ROWS(begin, end, one)                       \
    for (long at = (begin), left; (left = (end) - at) > 0;) { \
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

INLINE void transform_output(int m, const vec *p, vec *y) {
    if (m == 6) {
        vec s = p[1] + p[2], d = p[1] - p[2], s2 = p[3] + p[4], d2 = p[3] - p[4], s3 = p[5] + p[6], d3 = p[5] - p[6];
        y[0] = p[0] + s + s2 + s3;
        y[1] = d + 2 * d2 + 0.5f * d3;
        y[2] = s + 4 * s2 + 0.25f * s3;
        y[3] = d + 8 * d2 + 0.125f * d3;
        y[4] = s + 16 * s2 + 0.0625f * s3;
        y[5] = d + 32 * d2 + 0.03125f * d3 + p[7];
        return;
    }
    vec s = p[1] + p[2], d = p[1] - p[2], q = p[3], r = p[3];
    if (m == 4) q += p[4], r -= p[4];
    y[0] = p[0] + s + q;
    y[1] = A * d + B * r;
    y[2] = A * A * s + B * B * q;
    if (m == 4) y[3] = A * A * A * d + (B * B * B * r + p[5]);
    else y[2] += p[4];
}

/* V[k][channel] of the tile at (m * row, m * column); `step` floats lie between two k. The last channels are written as a whole vector: what is too much
the next tile overwrites. */
INLINE void tile_in(int half, int m, const struct input *in, long row, long column, float *V, long step) {
    const float *from[8][8];
    long words = half == 2 ? in->channels / 2 : in->channels;
    int n = m + 2;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) {
            long y = in->rows[m * row + i], x = in->columns[m * column + j];
            from[i][j] = y < 0 || x < 0 ? NULL : in->x + (y * in->width + x) * words;
        }
    for (long c = 0; c < in->channels; c += LANES) {
        struct reading reading = reading_of(in, c);
        long at = half == 2 ? c / 2 : c;
        vec between[8][8];
        for (int j = 0; j < n; j++) {
            vec d[8], t[8];
            for (int i = 0; j >= 2 && i < n; i++) __builtin_prefetch(from[i][j] + m * words + at); /* of the next tile, most often */
            for (int i = 0; i < n; i++) d[i] = read_from(half, &reading, from[i][j] ? from[i][j] + at : NULL);
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

/* y[i][j] of M[k]; `step` floats lie between two k. */
INLINE void tile_out(int m, const float *M, long step, vec y[6][6]) {
    vec between[6][8];
    int n = m + 2;
    for (int k = 0; k < n; k++) {
        vec p[8], t[6];
        for (int i = 0; i < n; i++) p[i] = load(M + (n * i + k) * step);
        transform_output(m, p, t);
        for (int i = 0; i < m; i++) between[i][k] = t[i];
    }
    for (int i = 0; i < m; i++) transform_output(m, between[i], y[i]);
}

/* A block of outputs of `tiles` tiles, counted row by row of `across`, from `first` on: M[k][tile][output] */
INLINE void tiles_out(int half, int m, const struct convolution *c, long block, const float *M, long step, long first, long across, long tiles, struct moments *moments) {
    long height = c->height / c->shuffle, width = c->width / c->shuffle;
    const int counted = c->mean != NULL;
    for (int j = 0; j < 2; j++) {
        struct target target = target_of(c, block * WIDE + j * LANES);
        if (target.channel[0] < 0) continue;
        vec bias = c->bias ? load(c->bias + block * WIDE + j * LANES) : splat(0);
        struct part part = {.count = 0};
        for (long tile = 0; tile < tiles; tile++) {
            vec y[6][6];
            tile_out(m, M + tile * WIDE + j * LANES, step, y);
            long y0 = (first + tile) / across * m, x0 = (first + tile) % across * m;
            long rows = height - y0 < m ? height - y0 : m, columns = width - x0 < m ? width - x0 : m;
            if (!part.count) part.pivot = y[0][0] + bias;
            UNROLLED for (int i = 0; i < m; i++)
                UNROLLED for (int l = 0; l < m; l++)
                    if (i < rows && l < columns) {
                        vec v = y[i][l] + bias;
                        put(half, c, &target, y0 + i, x0 + l, v);
                        if (counted) part_add(&part, v);
                    }
            part.count += rows * columns;
        }
        if (counted) moments_add(moments, &target, part);
    }
}

/* 3x3: a product of matrices for each k. */
INLINE void winograd_part(int half, struct task *task, long index, long thread) {
    const int m = OUTPUTS(half);
    const struct convolution *c = task->c;
    long height = c->height / c->shuffle, width = c->width / c->shuffle, words = task->words;
    long across = (width + m - 1) / m, first = index * task->tiles, left = (height + m - 1) / m * across - first, points = (m + 2) * (m + 2);
    long tiles = left < task->tiles ? left : task->tiles;
    long v_step = task->tiles * words + 16, m_step = task->tiles * WIDE + 16; /* 16: not all in one set of the cache */
    float *V = task->memory + thread * task->per_thread, *M = V + points * v_step;
    vec nothing[2] = {splat(0), splat(0)};
    for (long tile = 0; tile < tiles; tile++) tile_in(half, m, task->in, (first + tile) / across, (first + tile) % across, V + tile * words, v_step);
    for (long block = 0; block < c->outputs / WIDE; block++) {
        for (int k = 0; k < points; k++) {
            const float *a = V + k * v_step, *U = c->weight + (block * points + k) * words * WIDE;
            struct factors f = {&a, 1, words, words, nothing};
#define ONE(rows) product(half, rows, &f, at * words, U, M + k * m_step + at * WIDE)
            IN_ROWS(0, tiles, ONE)
#undef ONE
        }
        tiles_out(half, m, c, block, M, m_step, first, across, tiles, task->moments + thread);
    }
}

/* name(task, index, thread) by name_part(half, task, index, thread), which knows `half` in advance. */
#define IN_EITHER(name)                                                            \
    static void name(void *given, long index, long thread) {                       \
        struct task *task = given;                                                 \
        if (HALVES && task->c->half) name##_part(1, task, index, thread);          \
        else name##_part(0, task, index, thread);                                  \
    }

static void winograd(void *given, long index, long thread) {
    struct task *task = given;
    if (HALVES && task->c->half == 2) winograd_part(2, task, index, thread);
    else if (HALVES && task->c->half) winograd_part(1, task, index, thread);
    else winograd_part(0, task, index, thread);
}

/* 9x9, as 3x3 kernels of 3x3: each of them sees a tile three further on, so all share the tiles' transforms, and their products add up. */
struct nest {
    const float *V[3]; /* rows of tiles: [k][tile][channel] */
    long v_step, m_step, words;
    float *M;
};

/* To 3 channels: vectors along the input's channels. M[k][3 * tile + output] */
INLINE void nested_dots(int half, int rows, const struct nest *nest, long k, long at, const float *u) {
    long n = 3 * nest->words;
    vec sums[ROWS][3];
    for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = sums[r][2] = splat(0);
    for (int a = 0; a < 3; a++) {
        const float *v = nest->V[a] + k * nest->v_step + at * nest->words, *w = u + a * 3 * n;
        for (long i = 0; i < n; i += LANES) {
            some which = first(n - i);
            vec w0 = load_some(w + i, which), w1 = load_some(w + n + i, which), w2 = load_some(w + 2 * n + i, which);
            UNROLLED for (int r = 0; r < rows; r++) {
                vec x = load_some(v + r * nest->words + i, which);
                sums[r][0] = multiplied(half, sums[r][0], x, w0);
                sums[r][1] = multiplied(half, sums[r][1], x, w1);
                sums[r][2] = multiplied(half, sums[r][2], x, w2);
            }
        }
    }
    float *m = nest->M + k * nest->m_step + at * 3;
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < 3; o++) m[3 * r + o] = total(sums[r][o]);
}

static void dots_out(const struct convolution *c, const struct nest *nest, long row, long column, long tiles) {
    for (long at = 0; at < 3 * tiles; at += LANES) {
        vec y[6][6];
        tile_out(3, nest->M + at, nest->m_step, y);
        for (int lane = 0; lane < LANES && at + lane < 3 * tiles; lane++) {
            long o = (at + lane) % 3, y0 = 3 * row, x0 = 3 * (column + (at + lane) / 3);
            for (int i = 0; i < 3 && y0 + i < c->height; i++)
                for (int j = 0; j < 3 && x0 + j < c->width; j++) c->output[((y0 + i) * c->width + x0 + j) * 3 + o] = y[i][j][lane] + c->bias[o];
        }
    }
}

INLINE void nested_part(int half, struct task *task, long index, long thread) {
    const struct convolution *c = task->c;
    long down = (c->height + 2) / 3, across = (c->width + 2) / 3, words = task->words;
    long begin = index / task->across * NESTED_ROWS, column = index % task->across * NESTED_COLUMNS;
    long end = begin + NESTED_ROWS < down ? begin + NESTED_ROWS : down, tiles = across - column < NESTED_COLUMNS ? across - column : NESTED_COLUMNS;
    struct nest nest = {.v_step = (NESTED_COLUMNS + 2) * words + 16, .m_step = NESTED_COLUMNS * WIDE + 16, .words = words};
    float *V = task->memory + thread * task->per_thread;
    nest.M = V + 3 * 25 * nest.v_step;
    vec nothing[2] = {splat(0), splat(0)};
    for (long row = begin; row < end + 2; row++) {
        for (long tile = 0; tile < tiles + 2; tile++) tile_in(half, 3, task->in, row, column + tile, V + row % 3 * 25 * nest.v_step + tile * words, nest.v_step);
        if (row < begin + 2) continue;
        for (int a = 0; a < 3; a++) nest.V[a] = V + (row - 2 + a) % 3 * 25 * nest.v_step;
        if (c->outputs == 3) {
            for (long k = 0; k < 25; k++) {
                long at = 0;
                for (; at + 4 <= tiles; at += 4) nested_dots(half, 4, &nest, k, at, c->weight + k * 27 * words);
                for (; at < tiles; at++) nested_dots(half, 1, &nest, k, at, c->weight + k * 27 * words);
            }
            dots_out(c, &nest, row - 2, column, tiles);
            continue;
        }
        for (long block = 0; block < c->outputs / WIDE; block++) {
            for (long k = 0; k < 25; k++) {
                const float *a[3], *U = c->weight + (block * 25 + k) * 9 * words * WIDE;
                for (int i = 0; i < 3; i++) a[i] = nest.V[i] + k * nest.v_step;
                struct factors f = {a, 3, 3 * words, words, nothing};
#define ONE(rows) product(half, rows, &f, at * words, U, nest.M + k * nest.m_step + at * WIDE)
                IN_ROWS(0, tiles, ONE)
#undef ONE
            }
            tiles_out(half, 3, c, block, nest.M, nest.m_step, (row - 2) * across + column, across, tiles, task->moments + thread);
        }
    }
}

IN_EITHER(nested)

/* ---- directly ---- */

/* Rows and columns of the input, padded and normalized: (rows, columns, channels). */
INLINE void rows_in(int half, const struct input *in, long row, long rows, long column, long columns, float *to) {
    long channels = in->channels, whole = channels % 8 ? 0 : channels, words = half ? channels / 2 : channels;
    for (long i = 0; i < rows; i++) {
        const int32_t *across = in->columns + column;
        const float *x = in->rows[row + i] < 0 ? NULL : in->x + (long)in->rows[row + i] * in->width * channels;
        for (long c = 0; c < whole; c += LANES) {
            struct reading reading = reading_of(in, c);
            float *at = to + (half ? c / 2 : c);
            for (long j = 0; j < columns; j++, at += words) store_numbers(half, at, read_from(0, &reading, x && across[j] >= 0 ? x + across[j] * channels + c : NULL), reading.which);
        }
        for (long j = 0; j < columns; j++, to += words)
            for (long c = whole; c < channels; c++) { /* never halves */
                const float *from = x && across[j] >= 0 ? x + across[j] * channels : NULL;
                float v = from ? in->gain[c] * from[c] + in->shift[c] : in->value[c];
                to[c] = from && v < in->floor[c] ? in->floor[c] : v;
            }
    }
}

INLINE void direct_product(int half, int rows, const struct convolution *c, const struct factors *f, const float *weight, const struct target targets[2], long y, long x0,
                           long at, struct part part[2]) {
    float sums[ROWS * WIDE];
    product(half, rows, f, (at - x0) * f->step, weight, sums);
    for (int j = 0; j < 2; j++) {
        const float *from = sums + j * LANES;
        if (!part[j].count) part[j].pivot = load(from);
        UNROLLED for (int r = 0; r < rows; r++) part_add(&part[j], load(from + r * WIDE));
        part[j].count += rows;
        if (targets[j].channel[0] >= 0)
            UNROLLED for (int r = 0; r < rows; r++) put(0, c, &targets[j], y, at + r, load(from + r * WIDE));
    }
}

INLINE void direct_part(int half, struct task *task, long index, long thread) {
    const struct convolution *c = task->c;
    long height = c->height / c->shuffle, width = c->width / c->shuffle, words = task->words, kernel = c->kernel, stride = c->stride;
    long y0 = index / task->across * DIRECT_ROWS, x0 = index % task->across * DIRECT_COLUMNS;
    long y1 = y0 + DIRECT_ROWS < height ? y0 + DIRECT_ROWS : height, x1 = x0 + DIRECT_COLUMNS < width ? x0 + DIRECT_COLUMNS : width;
    long columns = (x1 - x0 - 1) * stride + kernel;
    float *x = task->memory + thread * task->per_thread;
    rows_in(half, task->in, y0 * stride, (y1 - y0 - 1) * stride + kernel, x0 * stride, columns, x);
    for (long block = 0; block < c->outputs / WIDE; block++) {
        struct target targets[2];
        vec bias[2];
        struct part part[2] = {{.count = 0}, {.count = 0}};
        for (int j = 0; j < 2; j++) {
            targets[j] = target_of(c, block * WIDE + j * LANES);
            bias[j] = c->bias ? load(c->bias + block * WIDE + j * LANES) : splat(0);
        }
        const float *weight = c->weight + block * kernel * kernel * words * WIDE;
        for (long y = y0; y < y1; y++) {
            const float *a[16]; /* the largest kernel, which Python knows */
            for (long k = 0; k < kernel; k++) a[k] = x + ((y - y0) * stride + k) * columns * words;
            struct factors f = {a, kernel, kernel * words, stride * words, bias};
#define ONE(rows) direct_product(half, rows, c, &f, weight, targets, y, x0, at, part)
            IN_ROWS(x0, x1, ONE)
#undef ONE
        }
        for (int j = 0; j < 2; j++)
            if (c->mean && targets[j].channel[0] >= 0) moments_add(task->moments + thread, &targets[j], part[j]);
    }
}

IN_EITHER(direct)

/* ---- between convolutions ---- */

/* y, (height, width, channels), becomes gain * y + shift + the block's input, which lies in `x` and begins at (inset, inset). */
struct sum {
    const struct input *x;
    const float *gain, *shift;
    float *y;
    int32_t height, width, inset, threads;
};

static void add_row(void *given, long row, long thread) {
    struct sum *sum = given;
    const struct input *in = sum->x;
    float *y = sum->y + row * sum->width * in->channels;
    const float *x = in->x + ((row + sum->inset) * in->width + sum->inset) * in->channels;
    (void)thread;
    for (long i = 0; i < sum->width; i++, y += in->channels, x += in->channels)
        for (long c = 0; c < in->channels; c += LANES) {
            struct reading reading = reading_of(in, c);
            some which = reading.which;
            store_some(y + c, load_some(sum->gain + c, which) * load_some(y + c, which) + load_some(sum->shift + c, which) + read_from(0, &reading, x + c), which);
        }
}

/* Pixels of 0..255 from what the last convolution gave: (height / shuffle, width / shuffle, channels), to be shuffled and cropped. */
struct picture {
    const float *x;
    uint8_t *bytes; /* (height, width, 3), or NULL */
    float *floats;  /* (3, height, width), divided by 255, or NULL */
    int32_t x_width, channels, shuffle, height, width, kind, threads;
};

enum { LINEAR, TANH, SIGMOID };

/* e^x between -87 and 87, to 2 units in the last place: 2^n times a polynomial (Cephes' expf). */
static inline float exponential(float given) {
    float x = given > 87 ? 87 : given > -87 ? given : -87;
    float n = floorf(x * 1.44269504f + 0.5f);
    x = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = (((((1.9875691500e-4f * x + 1.3981999507e-3f) * x + 8.3334519073e-3f) * x + 4.1665795894e-2f) * x + 1.6666665459e-1f) * x + 5.0000001201e-1f) * x * x + x + 1;
    union { int32_t bits; float power; } of = {((int32_t)n + 127) << 23};
    return given != given ? given : p * of.power;
}

static void finish_row(void *given, long row, long thread) {
    struct picture *p = given;
    long r = p->shuffle;
    float values[3 * 256];
    (void)thread;
    for (long x0 = 0; x0 < p->width; x0 += 256) {
        long count = p->width - x0 < 256 ? p->width - x0 : 256;
        for (long i = 0; i < count; i++)
            for (int o = 0; o < 3; o++)
                values[3 * i + o] = p->x[(row / r * p->x_width + (x0 + i) / r) * p->channels + (o * r + row % r) * r + (x0 + i) % r];
        if (p->kind == TANH)
            for (long i = 0; i < 3 * count; i++) values[i] = 277.5f - 300 / (exponential(2 * values[i]) + 1);
        if (p->kind == SIGMOID)
            for (long i = 0; i < 3 * count; i++) values[i] = 255 / (exponential(-values[i]) + 1);
        for (long i = 0; i < 3 * count; i++) values[i] = values[i] < 0 ? 0 : values[i] > 255 ? 255 : values[i];
        if (p->bytes)
            for (long i = 0; i < 3 * count; i++) p->bytes[(row * p->width + x0) * 3 + i] = (uint8_t)rintf(values[i] > 0 ? values[i] : 0);
        else
            for (long i = 0; i < 3 * count; i++) p->floats[(i % 3 * p->height + row) * p->width + x0 + i / 3] = values[i] / 255;
    }
}

/* G g G^T of 3x3 kernels, as WINOGRAD reads them; `back`: of the convolution from the output's gradient to the input's, (inputs, outputs, turned by 180 degrees). */
struct kernels {
    const float *weight; /* (outputs, inputs, 3, 3), or with `back` (inputs, outputs, 3, 3) */
    float *to;
    int32_t outputs, inputs, back, half, threads;
};

/* A row of G is 1, p, p^2 over the product of the differences to the other points. */
INLINE void rows_of_G(int m, float G[8][3]) {
    static const float points[2][7] = {{0, A, -A, B, -B}, {0, 1, -1, 2, -2, 0.5f, -0.5f}};
    const float *at = points[m == 6];
    for (int x = 0; x <= m; x++) {
        float scale = 1;
        for (int other = 0; other <= m; other++) scale *= other == x ? 1 : at[x] - at[other];
        G[x][0] = 1 / scale, G[x][1] = at[x] / scale, G[x][2] = at[x] * at[x] / scale;
    }
    G[m + 1][0] = G[m + 1][1] = 0, G[m + 1][2] = 1;
}

/* Of a vector of outputs, from `output` on. */
INLINE void transform_kernel(int m, const struct kernels *k, long output, long input, vec to[64]) {
    float G[8][3];
    rows_of_G(m, G);
    vec g[3][3], between[8][3];
    for (int n = 0; n < 9; n++)
        for (int lane = 0; lane < LANES; lane++) {
            long o = output + lane;
            g[n / 3][n % 3][lane] = o >= k->outputs ? 0 : k->back ? k->weight[(input * k->outputs + o) * 9 + 8 - n] : k->weight[(o * k->inputs + input) * 9 + n];
        }
    for (int x = 0; x < m + 2; x++)
        for (int n = 0; n < 3; n++) between[x][n] = G[x][0] * g[0][n] + G[x][1] * g[1][n] + G[x][2] * g[2][n];
    for (int x = 0; x < m + 2; x++)
        for (int y = 0; y < m + 2; y++) to[(m + 2) * x + y] = G[y][0] * between[x][0] + G[y][1] * between[x][1] + G[y][2] * between[x][2];
}

static void kernels_part(void *given, long block, long thread) {
    struct kernels *k = given;
    long step = k->half ? 2 : 1, words = k->inputs / step, points = (OUTPUTS(k->half) + 2) * (OUTPUTS(k->half) + 2);
    (void)thread;
    for (long i = 0; i < words; i++)
        for (long o = 0; o < WIDE; o += LANES) {
            vec one[64], other[64];
            if (k->half) transform_kernel(OUTPUTS(1), k, block * WIDE + o, step * i, one), transform_kernel(OUTPUTS(1), k, block * WIDE + o, step * i + 1, other);
            else transform_kernel(OUTPUTS(0), k, block * WIDE + o, i, one);
            for (int n = 0; n < points; n++) {
                if (k->half) one[n] = pairs_of(one[n], other[n]);
                store(k->to + ((block * points + n) * words + i) * WIDE + o, one[n]);
            }
        }
}

/* Of 3x3 kernels: the gradient G^T (sum over tiles of (A dy A^T) . (B^T x B)) G, from what was convolved, x, and the gradient dy of what came out. */
struct weighing {
    const struct input *in;
    const float *gradient; /* (height, width, outputs) */
    float *sums;           /* [k][block of inputs][output][WIDE]: added to */
    long height, width, outputs;
    float *V, *Y; /* of some tiles: [k][tile][input], [k][tile][output] */
    long first, tiles, v_words, y_words, v_step, y_step;
};

INLINE void transform_gradient(const vec *y, vec *t) {
    vec e = y[0] + y[2] + y[4], o = y[1] + y[3] + y[5];
    t[0] = y[0];
    t[1] = e + o;
    t[2] = e - o;
    e = y[0] + 4 * y[2] + 16 * y[4], o = 2 * y[1] + 8 * y[3] + 32 * y[5];
    t[3] = e + o;
    t[4] = e - o;
    e = y[0] + 0.25f * y[2] + 0.0625f * y[4], o = 0.5f * y[1] + 0.125f * y[3] + 0.03125f * y[5];
    t[5] = e + o;
    t[6] = e - o;
    t[7] = y[5];
}

static void weigh_tile(void *given, long tile, long thread) {
    struct weighing *w = given;
    long across = (w->width + 5) / 6, row = (w->first + tile) / across, column = (w->first + tile) % across;
    (void)thread;
    tile_in(0, 6, w->in, row, column, w->V + tile * w->v_words, w->v_step);
    for (long c = 0; c < w->outputs; c += LANES) {
        some which = first(w->outputs - c);
        vec between[8][6];
        for (int j = 0; j < 6; j++) {
            vec y[6], t[8];
            for (int i = 0; i < 6; i++) {
                long y0 = 6 * row + i, x0 = 6 * column + j;
                y[i] = y0 < w->height && x0 < w->width ? load_some(w->gradient + (y0 * w->width + x0) * w->outputs + c, which) : splat(0);
            }
            transform_gradient(y, t);
            for (int i = 0; i < 8; i++) between[i][j] = t[i];
        }
        for (int i = 0; i < 8; i++) {
            vec t[8];
            transform_gradient(between[i], t);
            for (int j = 0; j < 8; j++) store(w->Y + tile * w->y_words + (8 * i + j) * w->y_step + c, t[j]);
        }
    }
}

/* to[r] += the sum over `tiles` of y[tile][r] * v[tile], a vector WIDE */
INLINE void weigh_rows(int rows, const struct weighing *w, const float *y, const float *v, float *to) {
    vec s[ROWS][2];
    UNROLLED for (int r = 0; r < rows; r++) s[r][0] = load(to + r * WIDE), s[r][1] = load(to + r * WIDE + LANES);
    for (long tile = 0; tile < w->tiles; tile++, y += w->y_words, v += w->v_words) {
        vec v0 = load(v), v1 = load(v + LANES);
        UNROLLED for (int r = 0; r < rows; r++) {
            vec x = splat(y[r]);
            s[r][0] += x * v0;
            s[r][1] += x * v1;
        }
    }
    UNROLLED for (int r = 0; r < rows; r++) store(to + r * WIDE, s[r][0]), store(to + r * WIDE + LANES, s[r][1]);
}

static __attribute__((noinline)) void weigh_all_rows(const struct weighing *w, const float *y, const float *v, float *to) { weigh_rows(ROWS, w, y, v, to); }

static void weigh_products(void *given, long k, long thread) {
    struct weighing *w = given;
    long blocks = w->v_words / WIDE;
    (void)thread;
    for (long block = 0; block < blocks; block++) {
        const float *v = w->V + k * w->v_step + block * WIDE, *y = w->Y + k * w->y_step;
        float *to = w->sums + (k * blocks + block) * w->outputs * WIDE;
#define ONE(rows) (rows == ROWS ? weigh_all_rows(w, y + at, v, to + at * WIDE) : weigh_rows(rows, w, y + at, v, to + at * WIDE))
        IN_ROWS(0, w->outputs, ONE)
#undef ONE
    }
}

/* What `sums` make: (outputs, 3, 3, inputs). */
struct weighed {
    const float *sums;
    float *to;
    int32_t outputs, inputs, threads;
};

static void weighed_part(void *given, long output, long thread) {
    struct weighed *w = given;
    long blocks = (w->inputs + WIDE - 1) / WIDE;
    float G[8][3];
    (void)thread;
    rows_of_G(6, G);
    for (long c = 0; c < w->inputs; c += LANES) {
        vec between[8][3];
        for (int x = 0; x < 8; x++) {
            vec sum[3] = {splat(0), splat(0), splat(0)};
            for (int y = 0; y < 8; y++) {
                vec m = load(w->sums + (((8 * x + y) * blocks + c / WIDE) * w->outputs + output) * WIDE + c % WIDE);
                for (int b = 0; b < 3; b++) sum[b] += G[y][b] * m;
            }
            for (int b = 0; b < 3; b++) between[x][b] = sum[b];
        }
        for (int n = 0; n < 9; n++) {
            vec sum = splat(0);
            for (int x = 0; x < 8; x++) sum += G[x][n / 3] * between[x][n % 3];
            float numbers[LANES];
            memcpy(numbers, &sum, sizeof numbers);
            for (long lane = 0; lane < LANES && c + lane < w->inputs; lane++) w->to[(output * 9 + n) * w->inputs + c + lane] = numbers[lane];
        }
    }
}

/* to[j][i] = from[i][j], for `rows` i and `columns` j. */
struct transposition {
    const float *from;
    float *to;
    int64_t rows, columns, from_step, to_step;
};

static void transpose_part(void *given, long index, long thread) {
    struct transposition *t = given;
    long across = (t->columns + 63) / 64, i1 = (index / across + 1) * 1024, j0 = index % across * 64, j1 = j0 + 64;
    i1 = i1 < t->rows ? i1 : t->rows, j1 = j1 < t->columns ? j1 : t->columns;
    (void)thread;
    for (long i0 = index / across * 1024; i0 < i1; i0 += 16)
        for (long j = j0; j < j1; j++)
            for (long i = i0; i < i0 + 16 && i < i1; i++) t->to[j * t->to_step + i] = t->from[i * t->from_step + j];
}

/* ---- what Python calls; 0, or -1 where memory ran out ---- */

void fastnst_pack(struct kernels *k) { fastnst_parallel(k->threads, (k->outputs + WIDE - 1) / WIDE, kernels_part, k); }

int fastnst_weigh(const struct input *in, const float *gradient, float *sums, int32_t height, int32_t width, int32_t outputs, int32_t threads) {
    struct weighing w = {.in = in, .gradient = gradient, .sums = sums, .height = height, .width = width, .outputs = outputs};
    long all = (w.height + 5) / 6 * ((w.width + 5) / 6), bytes = 8 << 20; /* of what is transformed at once: a last cache holds it */
    w.v_words = (in->channels + WIDE - 1) / WIDE * WIDE, w.y_words = (w.outputs + LANES - 1) / LANES * LANES;
    long tiles = bytes / (64 * 4 * (w.v_words + w.y_words));
    tiles = tiles < 16 ? 16 : tiles > all ? all : tiles;
    w.v_step = tiles * w.v_words + 16, w.y_step = tiles * w.y_words + 16; /* 16: not all in one set of the cache */
    void *memory;
    if (posix_memalign(&memory, 64, 64 * (w.v_step + w.y_step) * sizeof(float))) return -1;
    w.V = memory, w.Y = w.V + 64 * w.v_step;
    for (; w.first < all; w.first += tiles) {
        w.tiles = all - w.first < tiles ? all - w.first : tiles;
        fastnst_parallel(threads, w.tiles, weigh_tile, &w);
        fastnst_parallel(threads, 64, weigh_products, &w);
    }
    free(memory);
    return 0;
}

void fastnst_weighed(struct weighed *w) { fastnst_parallel(w->threads, w->outputs, weighed_part, w); }

void fastnst_transpose(struct transposition *t, int32_t threads) { fastnst_parallel(threads, (t->columns + 63) / 64 * ((t->rows + 1023) / 1024), transpose_part, t); }

void fastnst_add(struct sum *sum) { fastnst_parallel(sum->threads, sum->height, add_row, sum); }

void fastnst_finish(struct picture *picture) { fastnst_parallel(picture->threads, picture->height, finish_row, picture); }

void fastnst_join(void *gomp_parallel) {
    team_of = getpid();
    team = (void (*)(void (*)(void *), void *, unsigned, unsigned))gomp_parallel;
}

int fastnst_lanes(void) { return LANES; }

int fastnst_halves(void) { return HALVES; }

int fastnst_runs_here(void) {
#if HALVES
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
#elif defined(__AVX512F__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#elif defined(__AVX2__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 1;
#endif
}

/* Of transformed tiles: a core's cache holds them beside the kernels. */
static long tiles_bytes(void) {
    long cache = 0, fewest = 192 * 1024;
#ifdef _SC_LEVEL2_CACHE_SIZE
    cache = sysconf(_SC_LEVEL2_CACHE_SIZE); /* 0 where it is not known */
#endif
    return cache / 4 > fewest ? cache / 4 : fewest;
}

/* `weight`, by kind: WINOGRAD 3x3 kernels of stride 1, (block, k, channel, WIDE); NESTED 9x9 ones, (block, k, row, column, channel, WIDE), or to 3 outputs
(k, row, output, column, channel); DIRECT any, (block, row, column, channel, WIDE). */
enum { WINOGRAD, DIRECT, NESTED };

int fastnst_convolve(const struct input *in, const struct convolution *c, int32_t kind) {
    long height = c->height / c->shuffle, width = c->width / c->shuffle, threads = c->threads < 1 ? 1 : c->threads > 256 ? 256 : c->threads, parts;
    struct task task = {.in = in, .c = c, .words = c->half ? in->channels / 2 : in->channels};
    if (kind == WINOGRAD) {
        long m = OUTPUTS(c->half), points = (m + 2) * (m + 2);
        task.tiles = tiles_bytes() / (points * 4 * task.words) / ROWS * ROWS;
        long fewest = in->channels < 256 ? ROWS : 2 * ROWS; /* kernels too large for a cache are read less often so */
        task.tiles = task.tiles < fewest ? fewest : task.tiles;
        parts = ((width + m - 1) / m * ((height + m - 1) / m) + task.tiles - 1) / task.tiles;
        task.per_thread = points * (task.tiles * (task.words + WIDE) + 32);
    } else if (kind == DIRECT) {
        task.across = (width + DIRECT_COLUMNS - 1) / DIRECT_COLUMNS, parts = task.across * ((height + DIRECT_ROWS - 1) / DIRECT_ROWS);
        task.per_thread = ((DIRECT_ROWS - 1) * c->stride + c->kernel) * ((DIRECT_COLUMNS - 1) * c->stride + c->kernel) * task.words;
    } else {
        task.across = ((width + 2) / 3 + NESTED_COLUMNS - 1) / NESTED_COLUMNS, parts = task.across * (((height + 2) / 3 + NESTED_ROWS - 1) / NESTED_ROWS);
        task.per_thread = 25 * (3 * (NESTED_COLUMNS + 2) * task.words + NESTED_COLUMNS * WIDE + 64);
    }
    task.per_thread = (task.per_thread + 1039) / 1024 * 1024 + 16;
    struct moments moments[256];
    double *sums = NULL;
    if (c->mean && !(sums = calloc(threads * 3 * c->channels, sizeof *sums))) return -1;
    for (long thread = 0; thread < threads && sums; thread++) {
        double *at = sums + thread * 3 * c->channels;
        moments[thread] = (struct moments){at, at + c->channels, at + 2 * c->channels};
    }
    task.moments = moments;
    void *memory;
    if (posix_memalign(&memory, 64, threads * task.per_thread * sizeof(float))) {
        free(sums);
        return -1;
    }
    task.memory = memory;
    fastnst_parallel(threads, parts, kind == WINOGRAD ? winograd : kind == DIRECT ? direct : nested, &task);
    for (int channel = 0; channel < c->channels && sums; channel++) {
        double count = 0, mean = 0, squares = 0;
        for (long thread = 0; thread < threads; thread++)
            if (moments[thread].count[channel] > 0)
                merge(&count, &mean, &squares, moments[thread].count[channel], moments[thread].mean[channel], moments[thread].squares[channel]);
        c->mean[channel] = mean, c->squares[channel] = squares;
    }
    free(sums);
    free(memory);
    return 0;
}
