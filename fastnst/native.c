/* Convolutions of a staged network on a CPU, in float32, each with the norm of the stage before folded into its reading.

Pictures between stages are (H, W, C) with C a multiple of LANES, not normalized yet: whoever reads them applies gain, shift and
ReLU (`struct input`). Whoever writes them gathers the moments of their channels, so an activation is written once and read once.

- 3x3 of stride 1: Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray 2016): 36 multiplications for 16 outputs instead of 144.
- the last 9x9 to 3 channels: vectors along rows, not along channels.
- all others: directly.

Plain C with the vector extensions of GCC and Clang; compiled once for each kind of CPU. */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__)
#define LANES 8
#define ROWS 6 /* of a block of a matrix product; two vectors wide, so 12 of 16 registers hold sums */
#define STRIPES 3
#else
#define LANES 4
#ifdef __aarch64__ /* 32 registers */
#define ROWS 8
#else
#define ROWS 6
#endif
#define STRIPES 4
#endif
#define WIDE (2 * LANES)                /* outputs of a block */
#define WINOGRAD_BYTES (192 * 1024)     /* of transformed tiles: a core.s cache holds them beside the kernels */
#define DIRECT_ROWS 4
#define DIRECT_COLUMNS 60
#define LAST_ROWS 8
#define LAST_COLUMNS (4 * STRIPES * LANES)

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t mask __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline vec load(const float *from) { return *(const vec *)from; }
static inline void store(float *to, vec v) { *(vec *)to = v; }
static inline vec splat(float value) { return value - (vec){0}; }
static inline vec larger(vec a, vec b) {
    mask is = a > b;
    return (vec)(((mask)a & is) | ((mask)b & ~is));
}

/* What a convolution reads. `rows` and `columns` say for each row or column, padding included, which one of `x` lies there, or -1
for `value`. gain * x + shift, then max(., floor), comes before. All but `x` are one number for each channel. */
struct input {
    const float *x, *gain, *shift, *floor, *value;
    const int32_t *rows, *columns;
    int32_t width, channels;
};

static inline vec input_at(const struct input *in, const float *from, long channel) {
    return larger(load(in->gain + channel) * load(from + channel) + load(in->shift + channel), load(in->floor + channel));
}

/* What it is, and what it writes: (height, width, channels), from `outputs` (a multiple of WIDE) numbers at each of
(height, width) / shuffle positions: first those of all channels at the upper left, then at the upper right, and so on.
`count` (a channel's), `mean` and `squares` (sums of squared differences from the mean) are of what was written; NULL: not asked for. */
struct convolution {
    const float *weight, *bias;
    float *output;
    double *mean, *squares;
    int32_t kernel, stride, outputs, shuffle, height, width, channels, threads;
};

/* ---- threads ---- */

struct work {
    void (*job)(void *args, long index, long thread);
    void *args;
    long count, next, thread;
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

static void parallel(long threads, long count, void (*job)(void *, long, long), void *args) {
    struct work works[256] = {{job, args, count, 0, 0, works}};
    pthread_t others[256];
    char runs[256] = {0};
    threads = threads > 256 ? 256 : threads;
    for (long thread = 1; thread < threads; thread++) {
        works[thread] = (struct work){NULL, NULL, 0, 0, thread, works};
        runs[thread] = pthread_create(&others[thread], NULL, work_on, &works[thread]) == 0;
    }
    work_on(&works[0]); /* does all of it where no other thread could be started */
    for (long thread = 1; thread < threads; thread++)
        if (runs[thread]) pthread_join(others[thread], NULL);
}

/* ---- moments ---- */

/* Those of a part, counted from `pivot`, one of its own numbers. */
struct part {
    vec pivot[2], sum[2], squares[2];
    long count;
};

static inline void part_add(struct part *part, int j, vec v) {
    vec d = v - part->pivot[j];
    part->sum[j] += d;
    part->squares[j] += d * d;
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

static void moments_add(struct moments *m, int channel, const struct part *part, int j) {
    for (int lane = 0; lane < LANES; lane++) {
        double n = part->count, sum = part->sum[j][lane];
        merge(m->count + channel + lane, m->mean + channel + lane, m->squares + channel + lane, n, part->pivot[j][lane] + sum / n, part->squares[j][lane] - sum * sum / n);
    }
}

/* ---- one convolution ---- */

struct task {
    const struct input *in;
    const struct convolution *c;
    long across, per_thread; /* parts side by side; floats of a thread's own memory */
    long tiles;              /* Winograd's, in a part */
    float *memory;
    struct moments *moments;
};

/* Where vector j of a block of outputs goes: its first channel, and its place among the shuffled; no place (-1) beyond the last. */
struct target {
    int channel, down, across;
};

static inline struct target target_of(const struct convolution *c, int output) {
    int place = output / c->channels;
    if (place >= c->shuffle * c->shuffle) return (struct target){-1, 0, 0};
    return (struct target){output % c->channels, place / c->shuffle, place % c->shuffle};
}

static inline float *target_at(const struct convolution *c, struct target t, long y, long x) {
    return c->output + ((y * c->shuffle + t.down) * c->width + x * c->shuffle + t.across) * c->channels + t.channel;
}

/* sums[r][j] += a[r * a_step + i] * b[i], over i; `rows` is known where it is called. */
INLINE void product(int rows, long n, const float *a, long a_step, const float *b, vec sums[][2]) {
    vec s[ROWS][2];
    for (int r = 0; r < rows; r++) s[r][0] = sums[r][0], s[r][1] = sums[r][1];
    for (long i = 0; i < n; i++) {
        vec b0 = load(b + i * WIDE), b1 = load(b + i * WIDE + LANES);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            vec x = splat(a[r * a_step + i]);
            s[r][0] += x * b0;
            s[r][1] += x * b1;
        }
    }
    for (int r = 0; r < rows; r++) sums[r][0] = s[r][0], sums[r][1] = s[r][1];
}

/* Calls one(rows, at) for as many rows at once as there are. */
#define IN_ROWS(begin, end, one)                       \
    for (long at = (begin), left; (left = (end) - at) > 0;) { \
        if (left >= ROWS) one(ROWS), at += ROWS;       \
        else if (left >= 2) one(2), at += 2;           \
        else one(1), at += 1;                          \
    }

/* ---- Winograd ---- */

INLINE void transform_input(const vec d[6], vec t[6]) {
    vec a = d[4] - 4 * d[2], b = d[3] - 4 * d[1], e = d[4] - d[2], f = 2 * (d[3] - d[1]);
    t[0] = 4 * d[0] - 5 * d[2] + d[4];
    t[1] = a + b;
    t[2] = a - b;
    t[3] = e + f;
    t[4] = e - f;
    t[5] = 4 * d[1] - 5 * d[3] + d[5];
}

INLINE void transform_output(const vec m[6], vec y[4]) {
    vec s = m[1] + m[2], d = m[1] - m[2], p = m[3] + m[4], q = m[3] - m[4];
    y[0] = m[0] + s + p;
    y[1] = d + 2 * q;
    y[2] = s + 4 * p;
    y[3] = d + 8 * q + m[5];
}

/* V[k][tile][channel] of `tiles` tiles, counted row by row of `across`, from `first` on; `step` floats lie between two k. */
static void tiles_in(const struct input *in, long first, long across, long tiles, float *V, long step) {
    static const float nothing[1] = {0};
    long channels = in->channels;
    for (long tile = 0; tile < tiles; tile++) {
        const float *from[6][6];
        long row = (first + tile) / across, column = (first + tile) % across;
        for (int i = 0; i < 6; i++)
            for (int j = 0; j < 6; j++) {
                long y = in->rows[4 * row + i], x = in->columns[4 * column + j];
                from[i][j] = y < 0 || x < 0 ? nothing : in->x + (y * in->width + x) * channels;
            }
        for (long c = 0; c < channels; c += LANES) {
            vec gain = load(in->gain + c), shift = load(in->shift + c), floor = load(in->floor + c), half[6][6];
            for (int j = 0; j < 6; j++) {
                vec d[6], t[6];
                for (int i = 0; i < 6; i++) d[i] = from[i][j] == nothing ? load(in->value + c) : larger(gain * load(from[i][j] + c) + shift, floor);
                transform_input(d, t);
                for (int i = 0; i < 6; i++) half[i][j] = t[i];
            }
            for (int i = 0; i < 6; i++) {
                vec t[6];
                transform_input(half[i], t);
                for (int j = 0; j < 6; j++) store(V + (6 * i + j) * step + tile * channels + c, t[j]);
            }
        }
    }
}

INLINE void winograd_product(int rows, long channels, const float *v, const float *u, float *m) {
    vec sums[ROWS][2];
    for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = splat(0);
    product(rows, channels, v, channels, u, sums);
    for (int r = 0; r < rows; r++) store(m + r * WIDE, sums[r][0]), store(m + r * WIDE + LANES, sums[r][1]);
}

static void winograd(void *given, long index, long thread) {
    struct task *task = given;
    const struct convolution *c = task->c;
    long height = c->height / c->shuffle, width = c->width / c->shuffle, channels = task->in->channels;
    long across = (width + 3) / 4, first = index * task->tiles, left = (height + 3) / 4 * across - first;
    long tiles = left < task->tiles ? left : task->tiles;
    long v_step = task->tiles * channels + 16, m_step = task->tiles * WIDE + 16; /* 16: not all in one set of the cache */
    float *V = task->memory + thread * task->per_thread, *M = V + 36 * v_step;
    tiles_in(task->in, first, across, tiles, V, v_step);
    for (long block = 0; block < c->outputs / WIDE; block++) {
        for (int k = 0; k < 36; k++) {
            const float *U = c->weight + (block * 36 + k) * channels * WIDE;
#define ONE(rows) winograd_product(rows, channels, V + k * v_step + at * channels, U, M + k * m_step + at * WIDE)
            IN_ROWS(0, tiles, ONE)
#undef ONE
        }
        for (int j = 0; j < 2; j++) {
            struct target target = target_of(c, block * WIDE + j * LANES);
            if (target.channel < 0) continue;
            vec bias = c->bias ? load(c->bias + block * WIDE + j * LANES) : splat(0);
            struct part part = {.count = 0};
            for (long tile = 0; tile < tiles; tile++) {
                const float *m = M + tile * WIDE + j * LANES;
                vec half[4][6], y[4][4];
                for (int k = 0; k < 6; k++) {
                    vec column_of[6], t[4];
                    for (int i = 0; i < 6; i++) column_of[i] = load(m + (6 * i + k) * m_step);
                    transform_output(column_of, t);
                    for (int i = 0; i < 4; i++) half[i][k] = t[i];
                }
                for (int i = 0; i < 4; i++) transform_output(half[i], y[i]);
                if (!part.count) part.pivot[j] = y[0][0] + bias;
                long y0 = (first + tile) / across * 4, x0 = (first + tile) % across * 4;
                long rows = height - y0 < 4 ? height - y0 : 4, columns = width - x0 < 4 ? width - x0 : 4;
                for (long i = 0; i < rows; i++)
                    for (long l = 0; l < columns; l++) {
                        vec v = y[i][l] + bias;
                        store(target_at(c, target, y0 + i, x0 + l), v);
                        part_add(&part, j, v);
                    }
                part.count += rows * columns;
            }
            if (c->mean) moments_add(task->moments + thread, target.channel, &part, j);
        }
    }
}

/* ---- directly ---- */

/* Rows and columns of the input, padded and normalized: (rows, columns, channels). */
static void rows_in(const struct input *in, long row, long rows, long column, long columns, float *to) {
    long channels = in->channels, whole = channels % LANES ? 0 : channels;
    for (long i = 0; i < rows; i++)
        for (long j = 0; j < columns; j++, to += channels) {
            long y = in->rows[row + i], x = in->columns[column + j];
            if (y < 0 || x < 0) {
                for (long c = 0; c < channels; c++) to[c] = in->value[c];
                continue;
            }
            const float *from = in->x + (y * in->width + x) * channels;
            for (long c = 0; c < whole; c += LANES) store(to + c, input_at(in, from, c));
            for (long c = whole; c < channels; c++) to[c] = fmaxf(in->gain[c] * from[c] + in->shift[c], in->floor[c]);
        }
}

INLINE void direct_product(int rows, const struct convolution *c, const float *x, long columns, long channels, const float *weight, const vec bias[2],
                           const struct target targets[2], long y, long at, struct part *part) {
    vec sums[ROWS][2];
    for (int r = 0; r < rows; r++) sums[r][0] = bias[0], sums[r][1] = bias[1];
    for (long k = 0; k < c->kernel; k++)
        product(rows, c->kernel * channels, x + k * columns * channels, c->stride * channels, weight + k * c->kernel * channels * WIDE, sums);
    if (!part->count) part->pivot[0] = sums[0][0], part->pivot[1] = sums[0][1];
    for (int j = 0; j < 2; j++)
        if (targets[j].channel >= 0)
            for (int r = 0; r < rows; r++) store(target_at(c, targets[j], y, at + r), sums[r][j]), part_add(part, j, sums[r][j]);
    part->count += rows;
}

static void direct(void *given, long index, long thread) {
    struct task *task = given;
    const struct convolution *c = task->c;
    long height = c->height / c->shuffle, width = c->width / c->shuffle, channels = task->in->channels, kernel = c->kernel, stride = c->stride;
    long y0 = index / task->across * DIRECT_ROWS, x0 = index % task->across * DIRECT_COLUMNS;
    long y1 = y0 + DIRECT_ROWS < height ? y0 + DIRECT_ROWS : height, x1 = x0 + DIRECT_COLUMNS < width ? x0 + DIRECT_COLUMNS : width;
    long columns = (x1 - x0 - 1) * stride + kernel;
    float *x = task->memory + thread * task->per_thread;
    rows_in(task->in, y0 * stride, (y1 - y0 - 1) * stride + kernel, x0 * stride, columns, x);
    for (long block = 0; block < c->outputs / WIDE; block++) {
        struct target targets[2];
        vec bias[2];
        struct part part = {.count = 0};
        for (int j = 0; j < 2; j++) {
            targets[j] = target_of(c, block * WIDE + j * LANES);
            bias[j] = c->bias ? load(c->bias + block * WIDE + j * LANES) : splat(0);
        }
        const float *weight = c->weight + block * kernel * kernel * channels * WIDE;
        for (long y = y0; y < y1; y++) {
#define ONE(rows) direct_product(rows, c, x + ((y - y0) * stride * columns + (at - x0) * stride) * channels, columns, channels, weight, bias, targets, y, at, &part)
            IN_ROWS(x0, x1, ONE)
#undef ONE
        }
        for (int j = 0; j < 2; j++)
            if (c->mean && targets[j].channel >= 0) moments_add(task->moments + thread, targets[j].channel, &part, j);
    }
}

/* ---- to 3 channels ---- */

/* `weight` is (kernel, channels, kernel, 3); writes (height, width, 3). */
static void last(void *given, long index, long thread) {
    struct task *task = given;
    const struct convolution *c = task->c;
    const struct input *in = task->in;
    long channels = in->channels, kernel = c->kernel, step = LAST_COLUMNS + kernel - 1 + LANES;
    long y0 = index / task->across * LAST_ROWS, x0 = index % task->across * LAST_COLUMNS;
    long y1 = y0 + LAST_ROWS < c->height ? y0 + LAST_ROWS : c->height, x1 = x0 + LAST_COLUMNS < c->width ? x0 + LAST_COLUMNS : c->width;
    float *planes = task->memory + thread * task->per_thread; /* (rows, channels, step) */
    for (long i = 0; i < y1 - y0 + kernel - 1; i++)
        for (long j = 0; j < x1 - x0 + kernel - 1; j++) {
            long y = in->rows[y0 + i], x = in->columns[x0 + j];
            float *to = planes + i * channels * step + j;
            const float *from = in->x + (y * in->width + x) * channels;
            for (long k = 0; k < channels; k += LANES) {
                vec v = y < 0 || x < 0 ? load(in->value + k) : input_at(in, from, k);
                for (int lane = 0; lane < LANES; lane++) to[(k + lane) * step] = v[lane];
            }
        }
    for (long y = y0; y < y1; y++)
        for (long x = x0; x < x1; x += STRIPES * LANES) {
            vec sums[3][STRIPES];
            for (int o = 0; o < 3; o++)
                for (int s = 0; s < STRIPES; s++) sums[o][s] = splat(c->bias[o]);
            for (long i = 0; i < kernel; i++)
                for (long k = 0; k < channels; k++) {
                    const float *from = planes + ((y - y0 + i) * channels + k) * step + x - x0, *weight = c->weight + (i * channels + k) * kernel * 3;
                    for (long j = 0; j < kernel; j++) {
                        vec at[STRIPES];
                        for (int s = 0; s < STRIPES; s++) at[s] = load(from + j + s * LANES);
                        for (int o = 0; o < 3; o++)
                            for (int s = 0; s < STRIPES; s++) sums[o][s] += splat(weight[j * 3 + o]) * at[s];
                    }
                }
            for (int o = 0; o < 3; o++)
                for (long i = 0; i < STRIPES * LANES && x + i < x1; i++) c->output[(y * c->width + x + i) * 3 + o] = sums[o][i / LANES][i % LANES];
        }
}

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
        for (long c = 0; c < in->channels; c += LANES)
            store(y + c, load(sum->gain + c) * load(y + c) + load(sum->shift + c) + input_at(in, x, c));
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
static inline float exponential(float x) {
    x = x < -87 ? -87 : x > 87 ? 87 : x;
    float n = floorf(x * 1.44269504f + 0.5f);
    x = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = (((((1.9875691500e-4f * x + 1.3981999507e-3f) * x + 8.3334519073e-3f) * x + 4.1665795894e-2f) * x + 1.6666665459e-1f) * x + 5.0000001201e-1f) * x * x + x + 1;
    union { int32_t bits; float power; } of = {((int32_t)n + 127) << 23};
    return p * of.power;
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
            for (long i = 0; i < 3 * count; i++) p->bytes[(row * p->width + x0) * 3 + i] = (uint8_t)rintf(values[i]);
        else
            for (long i = 0; i < 3 * count; i++) p->floats[(i % 3 * p->height + row) * p->width + x0 + i / 3] = values[i] / 255;
    }
}

/* ---- what Python calls; 0, or -1 where memory ran out ---- */

void fastnst_add(struct sum *sum) { parallel(sum->threads, sum->height, add_row, sum); }

void fastnst_finish(struct picture *picture) { parallel(picture->threads, picture->height, finish_row, picture); }

int fastnst_lanes(void) { return LANES; }

int fastnst_runs_here(void) {
#ifdef __AVX2__
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 1;
#endif
}

int fastnst_convolve(const struct input *in, const struct convolution *c, int32_t kind) {
    long height = c->height / c->shuffle, width = c->width / c->shuffle, threads = c->threads < 1 ? 1 : c->threads > 256 ? 256 : c->threads, parts;
    struct task task = {.in = in, .c = c};
    if (kind == 0) { /* Winograd */
        task.tiles = WINOGRAD_BYTES / (36 * 4 * in->channels) / ROWS * ROWS;
        task.tiles = task.tiles < ROWS ? ROWS : task.tiles;
        parts = ((width + 3) / 4 * ((height + 3) / 4) + task.tiles - 1) / task.tiles;
        task.per_thread = 36 * (task.tiles * (in->channels + WIDE) + 32);
    } else if (kind == 1) { /* directly */
        task.across = (width + DIRECT_COLUMNS - 1) / DIRECT_COLUMNS, parts = task.across * ((height + DIRECT_ROWS - 1) / DIRECT_ROWS);
        task.per_thread = ((DIRECT_ROWS - 1) * c->stride + c->kernel) * ((DIRECT_COLUMNS - 1) * c->stride + c->kernel) * (long)in->channels;
    } else { /* to 3 channels */
        task.across = (width + LAST_COLUMNS - 1) / LAST_COLUMNS, parts = task.across * ((height + LAST_ROWS - 1) / LAST_ROWS);
        task.per_thread = (LAST_ROWS + c->kernel - 1) * (LAST_COLUMNS + c->kernel - 1 + LANES) * (long)in->channels;
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
    parallel(threads, parts, kind == 0 ? winograd : kind == 1 ? direct : last, &task);
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
