/* Convolutions of a staged network on a CPU, each with the norm of the stage before folded into its reading.

Activations and sums are float32. What is multiplied is, too, or bfloat16 (`half` 1) on CPUs whose vectors multiply two of these and add both to a sum: two
channels then lie where a float32 would, so that all but the reading, the multiplication and the order of the weights is the same. In training activations
are bfloat16 as well (`half` 2), which only 3x3 convolutions know.

Pictures between stages are (H, W, C) with C a multiple of 8, not normalized yet: whoever reads them applies gain, shift and
ReLU (`struct input`). Whoever writes them gathers the moments of their channels, so an activation is written once and read once.

- 3x3 of stride 1: Winograd's minimal filtering (Lavin and Gray 2016), in float32 F(6x6, 3x3), 64 multiplications for 36 outputs instead of 324, in bfloat16,
  where that would round too much, F(4x4, 3x3), 36 for 16 instead of 144. In training the gradient of their kernels likewise (`native_kernels.c`).
- 9x9 of stride 1: F(3x3, 3x3), nested: 225 multiplications for 9 outputs instead of 729.
- all others: directly.

Plain C with the vector extensions of GCC and Clang; compiled once for each kind of CPU. */

#include "native.h"

#ifdef __AVX2__
#include <cpuid.h>
#endif
#include <stdlib.h>
#include <unistd.h>

#define DIRECT_ROWS 4
#define DIRECT_COLUMNS 60
#define NESTED_ROWS 8 /* of tiles of 3x3 */
#define NESTED_COLUMNS (30 / ROWS * ROWS)

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

/* ---- moments ---- */

/* Those of a part, counted from `pivot`, one of its own numbers. */
struct part {
    vec pivot, sum, squares;
    int64_t count;
};

INLINE void part_add(struct part *part, vec v) {
    vec d = v - part->pivot;
    part->sum += d;
    part->squares += d * d;
}

/* A thread's, of all channels. */
struct moments {
    double *count, *mean, *squares;
};

/* ---- one convolution ---- */

struct task {
    const struct input *in;
    const struct convolution *c;
    int64_t words;              /* floats, or pairs of halves, of an input's channels */
    int64_t across, per_thread; /* parts side by side; floats of a thread's own memory */
    int64_t tiles;              /* Winograd's, in a part */
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

INLINE float *target_at(int half, const struct convolution *c, const struct target *t, int piece, int64_t y, int64_t x) {
    int64_t at = ((y * c->shuffle + t->down[piece]) * c->width + x * c->shuffle + t->across[piece]) * c->channels + t->channel[piece];
    return c->output + (half == 2 ? at / 2 : at);
}

INLINE void put(int half, const struct convolution *c, const struct target *t, int64_t y, int64_t x, vec v) {
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
        int64_t channel = target->channel[lane / PIECE] + lane % PIECE;
        if (target->channel[lane / PIECE] >= 0)
            merge(m->count + channel, m->mean + channel, m->squares + channel, n, part.pivot[lane] + sum / n, part.squares[lane] - sum * sum / n);
    }
}

/* to[r] = start + the sum over `parts` and `n` of a[part][at + r * step + i] * b[part][i], a vector WIDE; what is known where it is called: `half` and `rows`. */
struct factors {
    const float *const *a;
    int64_t parts, n, step;
    const vec *start;
};

/* Those of `count` i: one, or as many as a vector has. */
INLINE void products_of(int half, int rows, int count, const float *a, int64_t step, const float *b, vec s[ROWS][2]) {
    vec x[ROWS];
    UNROLLED for (int r = 0; count > 1 && r < rows; r++) x[r] = load(a + r * step);
    UNROLLED for (int i = 0; i < count; i++) {
        vec b0 = load(b + i * WIDE), b1 = load(b + i * WIDE + LANES);
        UNROLLED for (int r = 0; r < rows; r++) {
            vec each = splat(count > 1 ? x[r][i] : a[r * step]);
            s[r][0] = multiplied(half, s[r][0], each, b0);
            s[r][1] = multiplied(half, s[r][1], each, b1);
        }
    }
}

INLINE void product_of(int half, int rows, const struct factors *f, int64_t at, const float *b, float *to) {
    vec s[ROWS][2];
    UNROLLED for (int r = 0; r < rows; r++) s[r][0] = f->start[0], s[r][1] = f->start[1];
    for (int64_t part = 0; part < f->parts; part++) {
        const float *a = f->a[part] + at;
        int64_t i = 0;
        for (; i + TOGETHER <= f->n; i += TOGETHER, b += TOGETHER * WIDE) products_of(half, rows, TOGETHER, a + i, f->step, b, s);
        for (; TOGETHER > 1 && i < f->n; i++, b += WIDE) products_of(half, rows, 1, a + i, f->step, b, s);
    }
    UNROLLED for (int r = 0; r < rows; r++) store(to + r * WIDE, s[r][0]), store(to + r * WIDE + LANES, s[r][1]);
}

/* Functions of their own, where GCC 12 else keeps the sums of so many rows in memory. */
static __attribute__((noinline)) void product_of_all(const struct factors *f, int64_t at, const float *b, float *to) { product_of(0, ROWS, f, at, b, to); }
static __attribute__((noinline)) void product_of_halves(const struct factors *f, int64_t at, const float *b, float *to) { product_of(HALVES, ROWS, f, at, b, to); }

INLINE void product(int half, int rows, const struct factors *f, int64_t at, const float *b, float *to) {
    if (rows == ROWS) (half ? product_of_halves : product_of_all)(f, at, b, to);
    else product_of(half, rows, f, at, b, to);
}

/* ---- Winograd ---- */

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

/* y[i][j] of M[k]; `step` floats lie between two k. */
INLINE void tile_out(int m, const float *M, int64_t step, vec y[6][6]) {
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
INLINE void tiles_out(int half, int m, const struct convolution *c, int64_t block, const float *M, int64_t step, int64_t first, int64_t across, int64_t tiles, struct moments *moments) {
    int64_t height = c->height / c->shuffle, width = c->width / c->shuffle;
    const int counted = c->mean != NULL;
    for (int j = 0; j < 2; j++) {
        struct target target = target_of(c, block * WIDE + j * LANES);
        if (target.channel[0] < 0) continue;
        vec bias = c->bias ? load(c->bias + block * WIDE + j * LANES) : splat(0);
        struct part part = {.count = 0};
        for (int64_t tile = 0; tile < tiles; tile++) {
            vec y[6][6];
            tile_out(m, M + tile * WIDE + j * LANES, step, y);
            int64_t y0 = (first + tile) / across * m, x0 = (first + tile) % across * m;
            int64_t rows = height - y0 < m ? height - y0 : m, columns = width - x0 < m ? width - x0 : m;
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
INLINE void winograd_part(int half, struct task *task, int64_t index, int64_t thread) {
    const int m = OUTPUTS(half);
    const struct convolution *c = task->c;
    int64_t height = c->height / c->shuffle, width = c->width / c->shuffle, words = task->words;
    int64_t across = (width + m - 1) / m, first = index * task->tiles, left = (height + m - 1) / m * across - first, points = (m + 2) * (m + 2);
    int64_t tiles = left < task->tiles ? left : task->tiles;
    int64_t v_step = task->tiles * words + 16, m_step = task->tiles * WIDE + 16; /* 16: not all in one set of the cache */
    float *V = task->memory + thread * task->per_thread, *M = V + points * v_step;
    vec nothing[2] = {splat(0), splat(0)};
    for (int64_t tile = 0; tile < tiles; tile++) tile_in(half == 2, half, m, task->in, (first + tile) / across, (first + tile) % across, V + tile * words, v_step);
    for (int64_t block = 0; block < c->outputs / WIDE; block++) {
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
    static void name(void *given, int64_t index, int64_t thread) {                       \
        struct task *task = given;                                                 \
        if (HALVES && task->c->half) name##_part(1, task, index, thread);          \
        else name##_part(0, task, index, thread);                                  \
    }

static void winograd(void *given, int64_t index, int64_t thread) {
    struct task *task = given;
    if (HALVES && task->c->half == 2) winograd_part(2, task, index, thread);
    else if (HALVES && task->c->half) winograd_part(1, task, index, thread);
    else winograd_part(0, task, index, thread);
}

/* 9x9, as 3x3 kernels of 3x3: each of them sees a tile three further on, so all share the tiles' transforms, and their products add up. */
struct nest {
    const float *V[3]; /* rows of tiles: [k][tile][channel] */
    int64_t v_step, m_step, words;
    float *M;
};

/* To 3 channels: vectors along the input's channels. M[k][3 * tile + output] */
INLINE void nested_dots(int half, int rows, const struct nest *nest, int64_t k, int64_t at, const float *u) {
    int64_t n = 3 * nest->words;
    vec sums[ROWS][3];
    for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = sums[r][2] = splat(0);
    for (int a = 0; a < 3; a++) {
        const float *v = nest->V[a] + k * nest->v_step + at * nest->words, *w = u + a * 3 * n;
        for (int64_t i = 0; i < n; i += LANES) {
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

static void dots_out(const struct convolution *c, const struct nest *nest, int64_t row, int64_t column, int64_t tiles) {
    for (int64_t at = 0; at < 3 * tiles; at += LANES) {
        vec y[6][6];
        tile_out(3, nest->M + at, nest->m_step, y);
        for (int lane = 0; lane < LANES && at + lane < 3 * tiles; lane++) {
            int64_t o = (at + lane) % 3, y0 = 3 * row, x0 = 3 * (column + (at + lane) / 3);
            for (int i = 0; i < 3 && y0 + i < c->height; i++)
                for (int j = 0; j < 3 && x0 + j < c->width; j++) c->output[((y0 + i) * c->width + x0 + j) * 3 + o] = y[i][j][lane] + c->bias[o];
        }
    }
}

INLINE void nested_part(int half, struct task *task, int64_t index, int64_t thread) {
    const struct convolution *c = task->c;
    int64_t down = (c->height + 2) / 3, across = (c->width + 2) / 3, words = task->words;
    int64_t begin = index / task->across * NESTED_ROWS, column = index % task->across * NESTED_COLUMNS;
    int64_t end = begin + NESTED_ROWS < down ? begin + NESTED_ROWS : down, tiles = across - column < NESTED_COLUMNS ? across - column : NESTED_COLUMNS;
    struct nest nest = {.v_step = (NESTED_COLUMNS + 2) * words + 16, .m_step = NESTED_COLUMNS * WIDE + 16, .words = words};
    float *V = task->memory + thread * task->per_thread;
    nest.M = V + 3 * 25 * nest.v_step;
    vec nothing[2] = {splat(0), splat(0)};
    for (int64_t row = begin; row < end + 2; row++) {
        for (int64_t tile = 0; tile < tiles + 2; tile++) tile_in(0, half, 3, task->in, row, column + tile, V + row % 3 * 25 * nest.v_step + tile * words, nest.v_step);
        if (row < begin + 2) continue;
        for (int a = 0; a < 3; a++) nest.V[a] = V + (row - 2 + a) % 3 * 25 * nest.v_step;
        if (c->outputs == 3) {
            for (int64_t k = 0; k < 25; k++) {
                int64_t at = 0;
                for (; at + 4 <= tiles; at += 4) nested_dots(half, 4, &nest, k, at, c->weight + k * 27 * words);
                for (; at < tiles; at++) nested_dots(half, 1, &nest, k, at, c->weight + k * 27 * words);
            }
            dots_out(c, &nest, row - 2, column, tiles);
            continue;
        }
        for (int64_t block = 0; block < c->outputs / WIDE; block++) {
            for (int64_t k = 0; k < 25; k++) {
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
INLINE void rows_in(int half, const struct input *in, int64_t row, int64_t rows, int64_t column, int64_t columns, float *to) {
    int64_t channels = in->channels, whole = channels % 8 ? 0 : channels, words = half ? channels / 2 : channels;
    for (int64_t i = 0; i < rows; i++) {
        const int32_t *across = in->columns + column;
        const float *x = in->rows[row + i] < 0 ? NULL : in->x + (int64_t)in->rows[row + i] * in->width * channels;
        for (int64_t c = 0; c < whole; c += LANES) {
            struct reading reading = reading_of(in, c);
            float *at = to + (half ? c / 2 : c);
            for (int64_t j = 0; j < columns; j++, at += words) store_numbers(half, at, read_from(0, &reading, x && across[j] >= 0 ? x + across[j] * channels + c : NULL), reading.which);
        }
        for (int64_t j = 0; j < columns; j++, to += words)
            for (int64_t c = whole; c < channels; c++) { /* never halves */
                const float *from = x && across[j] >= 0 ? x + across[j] * channels : NULL;
                float v = from ? in->gain[c] * from[c] + in->shift[c] : in->value[c];
                to[c] = from && v < in->floor[c] ? in->floor[c] : v;
            }
    }
}

INLINE void direct_product(int half, int rows, const struct convolution *c, const struct factors *f, const float *weight, const struct target targets[2], int64_t y, int64_t x0,
                           int64_t at, struct part part[2]) {
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

INLINE void direct_part(int half, struct task *task, int64_t index, int64_t thread) {
    const struct convolution *c = task->c;
    int64_t height = c->height / c->shuffle, width = c->width / c->shuffle, words = task->words, kernel = c->kernel, stride = c->stride;
    int64_t y0 = index / task->across * DIRECT_ROWS, x0 = index % task->across * DIRECT_COLUMNS;
    int64_t y1 = y0 + DIRECT_ROWS < height ? y0 + DIRECT_ROWS : height, x1 = x0 + DIRECT_COLUMNS < width ? x0 + DIRECT_COLUMNS : width;
    int64_t columns = (x1 - x0 - 1) * stride + kernel;
    float *x = task->memory + thread * task->per_thread;
    rows_in(half, task->in, y0 * stride, (y1 - y0 - 1) * stride + kernel, x0 * stride, columns, x);
    for (int64_t block = 0; block < c->outputs / WIDE; block++) {
        struct target targets[2];
        vec bias[2];
        struct part part[2] = {{.count = 0}, {.count = 0}};
        for (int j = 0; j < 2; j++) {
            targets[j] = target_of(c, block * WIDE + j * LANES);
            bias[j] = c->bias ? load(c->bias + block * WIDE + j * LANES) : splat(0);
        }
        const float *weight = c->weight + block * kernel * kernel * words * WIDE;
        for (int64_t y = y0; y < y1; y++) {
            const float *a[16]; /* the largest kernel, which Python knows */
            for (int64_t k = 0; k < kernel; k++) a[k] = x + ((y - y0) * stride + k) * columns * words;
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

/* ---- what Python calls; 0, or -1 where memory ran out ---- */

int fastnst_lanes(void) { return LANES; }

int fastnst_halves(void) { return HALVES; }

#ifdef __AVX2__
/* __builtin_cpu_supports says so, too, but not in Zig's libraries. */
static int has(unsigned leaf, unsigned part, int which, int bit) {
    unsigned words[4] = {0};
    return __get_cpuid_count(leaf, part, &words[0], &words[1], &words[2], &words[3]) && words[which] >> bit & 1;
}

/* Whether the system keeps registers of these kinds for each thread. */
static int keeps(unsigned kinds) {
    unsigned low = 0, high;
    if (has(1, 0, 2, 27)) __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & kinds) == kinds;
}
#endif

int fastnst_runs_here(void) {
    int runs = 1;
#ifdef __AVX2__
    runs = runs && keeps(6) && has(1, 0, 2, 12) && has(7, 0, 1, 5); /* FMA, AVX2 */
#endif
#ifdef __AVX512F__
    runs = runs && keeps(0xe6) && has(7, 0, 1, 16);
#endif
#if HALVES
    runs = runs && has(7, 0, 1, 30) && has(7, 0, 1, 31) && has(7, 1, 0, 5); /* BW, VL, BF16 */
#endif
    return runs;
}

/* Of transformed tiles: a core's cache holds them beside the kernels. */
static int64_t tiles_bytes(void) {
    int64_t cache = 0, fewest = 192 * 1024;
#ifdef _SC_LEVEL2_CACHE_SIZE
    cache = sysconf(_SC_LEVEL2_CACHE_SIZE); /* 0 where it is not known */
#endif
    return cache / 4 > fewest ? cache / 4 : fewest;
}

/* `weight`, by kind: WINOGRAD 3x3 kernels of stride 1, (block, k, channel, WIDE); NESTED 9x9 ones, (block, k, row, column, channel, WIDE), or to 3 outputs
(k, row, output, column, channel); DIRECT any, (block, row, column, channel, WIDE). */
enum { WINOGRAD, DIRECT, NESTED };

int fastnst_convolve(const struct input *in, const struct convolution *c, int32_t kind) {
    int64_t height = c->height / c->shuffle, width = c->width / c->shuffle, threads = c->threads < 1 ? 1 : c->threads > 256 ? 256 : c->threads, parts;
    struct task task = {.in = in, .c = c, .words = c->half ? in->channels / 2 : in->channels};
    if (kind == WINOGRAD) {
        int64_t m = OUTPUTS(c->half), points = (m + 2) * (m + 2);
        task.tiles = tiles_bytes() / (points * 4 * task.words) / ROWS * ROWS;
        int64_t fewest = in->channels < 256 ? ROWS : 2 * ROWS; /* kernels too large for a cache are read less often so */
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
    for (int64_t thread = 0; thread < threads && sums; thread++) {
        double *at = sums + thread * 3 * c->channels;
        moments[thread] = (struct moments){at, at + c->channels, at + 2 * c->channels};
    }
    task.moments = moments;
    if (!(task.memory = take_lines(threads * task.per_thread * sizeof(float)))) {
        free(sums);
        return -1;
    }
    fastnst_parallel(threads, parts, kind == WINOGRAD ? winograd : kind == DIRECT ? direct : nested, &task);
    for (int channel = 0; channel < c->channels && sums; channel++) {
        double count = 0, mean = 0, squares = 0;
        for (int64_t thread = 0; thread < threads; thread++)
            if (moments[thread].count[channel] > 0)
                merge(&count, &mean, &squares, moments[thread].count[channel], moments[thread].mean[channel], moments[thread].squares[channel]);
        c->mean[channel] = mean, c->squares[channel] = squares;
    }
    free(sums);
    give_back_lines(task.memory);
    return 0;
}
