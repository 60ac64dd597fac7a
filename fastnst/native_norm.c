/* Instance norm in training on a CPU, with all that comes between two convolutions, there and back: the ReLU, the sum with a block's input, the padding.

Activations are (H, W, C), float32 or bfloat16 (`half`); arithmetic is float32, sums of parts are put together in double precision, in one order whatever the threads.
What goes over pixels takes a run of them, eight channels at a time, so that their sums and factors stay in registers. */

#include "native_numbers.h"

#include <math.h>
#include <stdlib.h>

#define PIXELS 512 /* of a part, about: of so many a float holds the sum */

/* What becomes of images, and what their gradient is. Where `from_row` and `from_column` say, for each row and column of `out`, it has those of what is normed, or, at -1,
zeros; from `padding` on they are all of them. `x` and `back` are places of `shuffle` x `shuffle` pixels, one after the other. NULL: not there, or not asked for. */
struct norm {
    const void *x;
    const float *weight, *bias;
    float *moments;   /* (images, 2, channels): mean, and the deviation's inverse; found on the way there */
    const void *skip; /* is added to what is normed */
    void *out;        /* (images, rows, columns, channels) */
    const int32_t *from_row, *from_column;
    const void *gradient, *within; /* of `out`, and of what of it is no padding, (images, height, width, channels) */
    void *folded, *back;           /* the gradient behind padding and ReLU, (images, height, width, channels), and that of `x` */
    float *weight_gradient, *bias_gradient;
    int64_t skip_image, skip_row, within_image, within_row; /* numbers from one to the next */
    int32_t images, rows, columns, height, width, channels, shuffle, padding, relu, half, threads;
    float epsilon;
};

/* An image, and its parts, some rows each: for each part and channel two sums, and where they are counted from. */
struct parts {
    struct norm norm;
    const float *mean, *inverse;
    int64_t rows, count;
    float *sums, *pivots, *gain, *shares, *totals; /* weight / deviation; what `back_run` takes; the gradients of weight and bias, as far as they come from here */
    float *lines;                                  /* a row of numbers for each thread, on the way back */
};

/* Pixels of a row at equal distances, `step` numbers from one to the next, which are `between` numbers in a row of pixels side by side. */
struct run {
    int64_t step, between, pixels;
};

/* A row's pixels are `shuffle` runs in what is shuffled, which begin with the first `shuffle` of them. */
static inline struct run run_of(const struct norm *n) {
    int64_t s = n->shuffle, C = n->channels;
    return (struct run){s * s * C, s * C, n->width / s};
}

/* A pixel's first number in what is shuffled. */
static inline int64_t place_of(const struct norm *n, int64_t y, int64_t x) {
    int64_t s = n->shuffle;
    return (((y / s * (n->width / s) + x / s) * s + y % s) * s + x % s) * n->channels;
}

INLINE const char *at(int half, const void *from, int64_t number) { return (const char *)from + number * (half ? 2 : 4); }

/* ---- there ---- */

static inline float median(float a, float b, float d) {
    float least = a < b ? a : b, most = a < b ? b : a, second = most < d ? most : d;
    return least > second ? least : second;
}

/* Sums of the distances from `pivot`, and of their squares. */
INLINE void moments_run(int64_t c, int64_t n, int half, struct run run, const char *x, const float *pivot, float *sum, float *squares) {
    eight middle = load_eight(0, pivot, c, n), s = load_eight(0, sum, c, n), q = load_eight(0, squares, c, n);
    for (int64_t i = 0; i < run.pixels; i++) {
        eight d = load_eight(half, x, i * run.step + c, n) - middle;
        s += d, q += d * d;
    }
    store_eight(0, sum, c, s, n), store_eight(0, squares, c, q, n);
}

/* The pivot is the median of three pixels, so that no large number is subtracted from another. */
INLINE void moments_part(int half, struct parts *parts, int64_t part) {
    const struct norm *n = &parts->norm;
    int64_t C = n->channels, begin = part * parts->rows, end = begin + parts->rows < n->height ? begin + parts->rows : n->height;
    int64_t one = place_of(n, begin, 0), two = place_of(n, (begin + end) / 2, n->width / 2), three = place_of(n, end - 1, n->width - 1);
    float *sum = parts->sums + part * 2 * C, *pivot = parts->pivots + part * C;
    for (int64_t c = 0; c < C; c++) pivot[c] = median(number(half, n->x, one + c), number(half, n->x, two + c), number(half, n->x, three + c));
    memset(sum, 0, 2 * C * sizeof *sum);
    for (int64_t y = begin; y < end; y++)
        for (int64_t first = 0; first < n->shuffle; first++) IN_EIGHTS(C, moments_run, half, run_of(n), at(half, n->x, place_of(n, y, first)), pivot, sum, sum + C);
}

/* All parts together. */
static void solve(struct parts *parts) {
    const struct norm *n = &parts->norm;
    for (int64_t c = 0; c < n->channels; c++) {
        double count = 0, mean = 0, squares = 0;
        for (int64_t part = 0; part < parts->count; part++) {
            int64_t y = part * parts->rows, rows = n->height - y < parts->rows ? n->height - y : parts->rows;
            double pixels = (double)rows * n->width, sum = parts->sums[2 * part * n->channels + c];
            double apart = parts->sums[(2 * part + 1) * n->channels + c] - sum * sum / pixels;
            merge(&count, &mean, &squares, pixels, parts->pivots[part * n->channels + c] + sum / pixels, apart);
        }
        double variance = squares / count;
        n->moments[c] = mean, n->moments[n->channels + c] = 1 / sqrt((variance < 0 ? 0 : variance) + n->epsilon);
        parts->gain[c] = parts->inverse[c] * n->weight[c];
    }
}

/* `skip`: NULL, or as `out`. */
INLINE void out_run(
    int64_t c, int64_t n, int half, int relu, struct run run, const char *x, const float *mean, const float *gain, const float *bias, const char *skip, const char *out
) {
    eight m = load_eight(0, mean, c, n), g = load_eight(0, gain, c, n), b = load_eight(0, bias, c, n);
    for (int64_t i = 0; i < run.pixels; i++) {
        eight v = (load_eight(half, x, i * run.step + c, n) - m) * g + b;
        if (relu) v = unless((eight_bits)(v < 0), v); /* what is no number stays so */
        if (skip) v += load_eight(half, skip, i * run.between + c, n);
        store_eight(half, (char *)out, i * run.between + c, v, n);
    }
}

INLINE void out_row(int half, int relu, int skips, const struct parts *parts, int64_t row) {
    const struct norm *n = &parts->norm;
    int64_t C = n->channels, y = n->from_row[row], size = half ? 2 : 4;
    char *out = (char *)n->out + row * n->columns * C * size, *inside = out + n->padding * C * size;
    if (y < 0) {
        memset(out, 0, n->columns * C * size);
        return;
    }
    for (int64_t first = 0; first < n->shuffle; first++) {
        const char *skip = skips ? at(half, n->skip, y * n->skip_row + first * C) : NULL;
        IN_EIGHTS(C, out_run, half, relu, run_of(n), at(half, n->x, place_of(n, y, first)), parts->mean, parts->gain, n->bias, skip, at(half, inside, first * C));
    }
    for (int64_t i = 0; i < 2 * n->padding; i++) {
        int64_t column = i < n->padding ? i : n->width + i, x = n->from_column[column];
        if (x < 0) memset(out + column * C * size, 0, C * size);
        else memcpy(out + column * C * size, inside + x * C * size, C * size);
    }
}

/* ---- back ---- */

/* `line` += the gradient in a row of `out`, where the row itself is padding or not. */
INLINE void add_row(int half, const struct norm *n, int64_t row, float *restrict line) {
    int64_t C = n->channels, p = n->padding, begin = row * n->columns * C;
    for (int64_t i = 0; i < n->width * C; i++) line[i] += number(half, n->gradient, begin + p * C + i);
    for (int64_t i = 0; i < 2 * p; i++) {
        int64_t column = i < p ? i : n->width + i, x = n->from_column[column];
        for (int64_t c = 0; x >= 0 && c < C; c++) line[x * C + c] += number(half, n->gradient, begin + column * C + c);
    }
}

/* The gradient behind the ReLU, and what it adds to the sums: of what is stored, which `back_run` sees. */
INLINE void fold_run(
    int64_t c, int64_t n, int half, int relu, struct run run, const char *x, const float *mean, const float *gain, const float *bias, const float *gradient, const char *folded,
    float *sum, float *products
) {
    eight m = load_eight(0, mean, c, n), by = load_eight(0, gain, c, n), b = load_eight(0, bias, c, n), s = load_eight(0, sum, c, n), p = load_eight(0, products, c, n);
    for (int64_t i = 0; i < run.pixels; i++) {
        eight v = load_eight(half, x, i * run.step + c, n) - m, g = load_eight(0, gradient, i * run.between + c, n);
        if (relu) g = unless((eight_bits)(v * by + b <= 0), g);
        g = as_stored(half, g);
        store_eight(half, (char *)folded, i * run.between + c, g, n);
        s += g, p += g * v;
    }
    store_eight(0, sum, c, s, n), store_eight(0, products, c, p, n);
}

INLINE void fold_part(int half, int relu, struct parts *parts, int64_t part, int64_t thread) {
    const struct norm *n = &parts->norm;
    int64_t C = n->channels, end = (part + 1) * parts->rows < n->height ? (part + 1) * parts->rows : n->height;
    float *sum = parts->sums + part * 2 * C, *line = parts->lines + thread * n->width * C;
    memset(sum, 0, 2 * C * sizeof *sum);
    for (int64_t y = part * parts->rows; y < end; y++) {
        for (int64_t i = 0; i < n->width * C; i++) line[i] = n->within ? number(half, n->within, y * n->within_row + i) : 0;
        for (int64_t i = 0; n->gradient && i <= 2 * n->padding; i++) { /* the row itself, and those of the padding that are it again */
            int64_t row = i < n->padding ? i : i == n->padding ? y + i : n->height + i - 1;
            if (n->from_row[row] == y) add_row(half, n, row, line);
        }
        for (int64_t first = 0; first < n->shuffle; first++) {
            const char *folded = at(half, n->folded, (y * n->width + first) * C);
            IN_EIGHTS(C, fold_run, half, relu, run_of(n), at(half, n->x, place_of(n, y, first)), parts->mean, parts->gain, n->bias, line + first * C, folded, sum, sum + C);
        }
    }
}

/* weight / deviation x (g - mean(g) - x^ mean(g x^)), x^ being the normed values; `shares`: mean(g), then mean(g x^) / deviation. */
INLINE void back_run(int64_t c, int64_t n, int half, struct run run, const char *x, const float *mean, const float *gain, const float *shares, const float *of_x, const char *folded, const char *back) {
    eight m = load_eight(0, mean, c, n), by = load_eight(0, gain, c, n), share = load_eight(0, shares, c, n), slope = load_eight(0, of_x, c, n);
    for (int64_t i = 0; i < run.pixels; i++) {
        eight g = load_eight(half, folded, i * run.between + c, n) - share - (load_eight(half, x, i * run.step + c, n) - m) * slope;
        store_eight(half, (char *)back, i * run.step + c, by * g, n);
    }
}

INLINE void back_row(int half, const struct parts *parts, int64_t y) {
    const struct norm *n = &parts->norm;
    int64_t C = n->channels;
    for (int64_t first = 0; first < n->shuffle; first++) {
        int64_t place = place_of(n, y, first);
        const char *folded = at(half, n->folded, (y * n->width + first) * C);
        IN_EIGHTS(C, back_run, half, run_of(n), at(half, n->x, place), parts->mean, parts->gain, parts->shares, parts->shares + C, folded, at(half, n->back, place));
    }
}

/* All parts together. */
static void add_up(struct parts *parts) {
    const struct norm *n = &parts->norm;
    double pixels = (double)n->height * n->width;
    for (int64_t c = 0; c < n->channels; c++) {
        double sum = 0, products = 0;
        for (int64_t part = 0; part < parts->count; part++) sum += parts->sums[2 * part * n->channels + c], products += parts->sums[(2 * part + 1) * n->channels + c];
        products *= parts->inverse[c];
        parts->shares[c] = sum / pixels, parts->shares[n->channels + c] = products / pixels * parts->inverse[c];
        parts->totals[c] = products, parts->totals[n->channels + c] = sum;
    }
}

/* ---- threads ---- */

/* All images, each in `jobs`. */
struct batch {
    struct parts *parts;
    int64_t jobs;
};

static void moments_job(void *given, int64_t index, int64_t thread) {
    struct batch *batch = given;
    struct parts *parts = batch->parts + index / batch->jobs;
    (void)thread;
    parts->norm.half ? moments_part(1, parts, index % batch->jobs) : moments_part(0, parts, index % batch->jobs);
}

static void solve_job(void *given, int64_t image, int64_t thread) {
    (void)thread;
    solve(((struct batch *)given)->parts + image);
}

static void out_job(void *given, int64_t index, int64_t thread) {
    struct batch *batch = given;
    const struct parts *parts = batch->parts + index / batch->jobs;
    const struct norm *n = &parts->norm;
    (void)thread;
    for (int64_t row = index % batch->jobs * parts->rows, i = 0; i < parts->rows && row < n->rows; i++, row++) {
#define ONE(half) (n->relu ? out_row(half, 1, 0, parts, row) : n->skip ? out_row(half, 0, 1, parts, row) : out_row(half, 0, 0, parts, row))
        n->half ? ONE(1) : ONE(0);
#undef ONE
    }
}

static void fold_job(void *given, int64_t index, int64_t thread) {
    struct batch *batch = given;
    struct parts *parts = batch->parts + index / batch->jobs;
#define ONE(half) (parts->norm.relu ? fold_part(half, 1, parts, index % batch->jobs, thread) : fold_part(half, 0, parts, index % batch->jobs, thread))
    parts->norm.half ? ONE(1) : ONE(0);
#undef ONE
}

static void add_up_job(void *given, int64_t image, int64_t thread) {
    (void)thread;
    add_up(((struct batch *)given)->parts + image);
}

static void back_job(void *given, int64_t index, int64_t thread) {
    struct batch *batch = given;
    const struct parts *parts = batch->parts + index / batch->jobs;
    (void)thread;
    for (int64_t y = index % batch->jobs * parts->rows, i = 0; i < parts->rows && y < parts->norm.height; i++, y++) parts->norm.half ? back_row(1, parts, y) : back_row(0, parts, y);
}

/* `lines`: of `width` pixels, for threads. NULL where memory ran out; else to be freed. */
static struct parts *parts_of(const struct norm *n, int64_t lines) {
    int64_t C = n->channels, rows = PIXELS / n->width > 1 ? PIXELS / n->width : 1, count = (n->height + rows - 1) / rows;
    int64_t floats = (3 * count + 5) * C, pixels = (int64_t)n->height * n->width, size = n->half ? 2 : 4;
    struct parts *all = malloc(n->images * (sizeof *all + floats * sizeof(float)) + lines * n->width * C * sizeof(float) + 1);
    float *memory = (float *)(all + n->images);
    for (int64_t image = 0; all && image < n->images; image++) {
        struct parts *p = all + image;
        float *own = memory + image * floats;
        *p = (struct parts){.norm = *n, .rows = rows, .count = count, .sums = own, .pivots = own + 2 * count * C, .lines = memory + n->images * floats};
        p->gain = p->pivots + count * C, p->shares = p->gain + C, p->totals = p->shares + 2 * C;
#define MOVE(name, numbers) p->norm.name = n->name ? (char *)n->name + image * (numbers) * size : NULL
        MOVE(x, pixels * C), MOVE(back, pixels * C), MOVE(folded, pixels * C), MOVE(skip, n->skip_image), MOVE(within, n->within_image);
        MOVE(out, (int64_t)n->rows * n->columns * C), MOVE(gradient, (int64_t)n->rows * n->columns * C);
#undef MOVE
        p->norm.moments += image * 2 * C, p->mean = p->norm.moments, p->inverse = p->mean + C;
    }
    return all;
}

/* ---- what Python calls; 0, or -1 where memory ran out ---- */

int fastnst_norm(const struct norm *n) {
    struct batch batch = {.parts = parts_of(n, 0)};
    if (!batch.parts) return -1;
    batch.jobs = n->images ? batch.parts->count : 0;
    fastnst_parallel(n->threads, n->images * batch.jobs, moments_job, &batch);
    fastnst_parallel(n->threads, n->images, solve_job, &batch);
    batch.jobs = n->images ? (n->rows + batch.parts->rows - 1) / batch.parts->rows : 0;
    fastnst_parallel(n->threads, n->images * batch.jobs, out_job, &batch);
    free(batch.parts);
    return 0;
}

int fastnst_norm_back(const struct norm *n) {
    struct batch batch = {.parts = parts_of(n, n->threads)};
    if (!batch.parts) return -1;
    batch.jobs = n->images ? batch.parts->count : 0;
    for (struct parts *p = batch.parts; p < batch.parts + n->images; p++)
        for (int64_t c = 0; c < n->channels; c++) p->gain[c] = p->inverse[c] * n->weight[c];
    fastnst_parallel(n->threads, n->images * batch.jobs, fold_job, &batch);
    fastnst_parallel(n->threads, n->images, add_up_job, &batch);
    for (int64_t c = 0; c < n->channels; c++) {
        double of_weight = 0, of_bias = 0;
        for (struct parts *p = batch.parts; p < batch.parts + n->images; p++) of_weight += p->totals[c], of_bias += p->totals[n->channels + c];
        n->weight_gradient[c] = of_weight, n->bias_gradient[c] = of_bias;
    }
    fastnst_parallel(n->threads, n->images * batch.jobs, back_job, &batch);
    free(batch.parts);
    return 0;
}
