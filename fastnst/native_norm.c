/* Instance norm in training on a CPU, with all that comes between two convolutions, there and back: the ReLU, the sum with a block's input, the padding.

Activations are (H, W, C), float32 or bfloat16 (`half`); arithmetic is float32, sums of parts are put together in double precision, in one order whatever the threads.
Plain C, whose loops over channels compilers turn into vectors; compiled once for each kind of CPU, as native.c. */

#include "native_numbers.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define PIXELS 512 /* of a part, about: of so many a float holds the sum */

/* What becomes of an image, and what its gradient is. Where `from_row` and `from_column` say, for each row and column of `out`, it has those of what is normed, or, at -1,
zeros; from `padding` on they are all of them. `x` and `back` are places of `shuffle` x `shuffle` pixels, one after the other. NULL: not there, or not asked for. */
struct norm {
    const void *x;
    const float *weight, *bias;
    float *mean, *inverse; /* of the deviation; found on the way there */
    const void *skip;      /* is added to what is normed; its rows lie `skip_row` numbers apart */
    void *out;             /* (rows, columns, channels) */
    const int32_t *from_row, *from_column;
    const void *gradient, *within; /* of `out`, and of what of it is no padding, (height, width, channels), rows `within_row` numbers apart */
    void *folded, *back;           /* the gradient behind padding and ReLU, (height, width, channels), and that of `x` */
    float *weight_gradient, *bias_gradient; /* added to */
    int64_t skip_row, within_row;
    int32_t rows, columns, height, width, channels, shuffle, padding, relu, half, threads;
    float epsilon;
};

/* A part is some rows; of each channel two sums, and where they are counted from; on the way back a line of numbers for each thread. */
struct parts {
    struct norm *norm;
    long rows, count;
    float *sums, *pivots, *lines, *gain; /* weight / deviation */
};

/* A pixel's first number in what is shuffled. */
INLINE long place_of(const struct norm *n, long y, long x) {
    long s = n->shuffle;
    return (s == 1 ? y * n->width + x : ((y / s * (n->width / s) + x / s) * s + y % s) * s + x % s) * n->channels;
}

/* ---- there ---- */

INLINE float median(float a, float b, float d) {
    float least = a < b ? a : b, most = a < b ? b : a, second = most < d ? most : d;
    return least > second ? least : second;
}

/* Sums of the distances from `pivot`, and of their squares. */
INLINE void moments_pixel(int half, long C, const void *restrict x, const float *restrict pivot, float *restrict sum, float *restrict squares) {
    for (long c = 0; c < C; c++) {
        float d = number(half, x, c) - pivot[c];
        sum[c] += d, squares[c] += d * d;
    }
}

/* The pivot is the median of three pixels, so that no large number is subtracted from another. */
INLINE void moments_part(int half, struct parts *parts, long part) {
    const struct norm *n = parts->norm;
    long C = n->channels, begin = part * parts->rows, end = begin + parts->rows < n->height ? begin + parts->rows : n->height, size = half ? 2 : 4;
    const char *x = n->x, *one = x + place_of(n, begin, 0) * size, *two = x + place_of(n, (begin + end) / 2, n->width / 2) * size, *three = x + place_of(n, end - 1, n->width - 1) * size;
    float *sum = parts->sums + part * 2 * C, *pivot = parts->pivots + part * C;
    for (long c = 0; c < C; c++) pivot[c] = median(number(half, one, c), number(half, two, c), number(half, three, c));
    memset(sum, 0, 2 * C * sizeof *sum);
    for (long y = begin; y < end; y++)
        for (long column = 0; column < n->width; column++) moments_pixel(half, C, x + place_of(n, y, column) * size, pivot, sum, sum + C);
}

/* Chan, Golub and LeVeque 1979: of all parts together. */
static void solve(struct parts *parts) {
    struct norm *n = parts->norm;
    for (long c = 0; c < n->channels; c++) {
        double count = 0, mean = 0, squares = 0;
        for (long part = 0; part < parts->count; part++) {
            long y = part * parts->rows, rows = n->height - y < parts->rows ? n->height - y : parts->rows;
            double pixels = (double)rows * n->width, sum = parts->sums[2 * part * n->channels + c], pivot = parts->pivots[part * n->channels + c];
            double apart = pivot + sum / pixels - mean, all = count + pixels;
            squares += parts->sums[(2 * part + 1) * n->channels + c] - sum * sum / pixels + apart * apart * (count * pixels / all);
            mean += apart * (pixels / all), count = all;
        }
        double variance = squares / count;
        n->mean[c] = mean, n->inverse[c] = 1 / sqrt((variance < 0 ? 0 : variance) + n->epsilon);
        parts->gain[c] = n->inverse[c] * n->weight[c];
    }
}

INLINE void out_pixel(
    int half, int relu, int skips, long C, const void *restrict x, const float *restrict mean, const float *restrict gain, const float *restrict bias,
    const void *restrict skip, void *restrict out
) {
    for (long c = 0; c < C; c++) {
        float v = (number(half, x, c) - mean[c]) * gain[c] + bias[c];
        if (relu) v = v < 0 ? 0 : v; /* what is no number stays so */
        if (skips) v += number(half, skip, c);
        put_number(half, out, c, v);
    }
}

INLINE void out_row(int half, int relu, int skips, const struct parts *parts, long row) {
    const struct norm *n = parts->norm;
    long C = n->channels, y = n->from_row[row], size = half ? 2 : 4;
    char *out = (char *)n->out + row * n->columns * C * size;
    for (long column = 0; column < n->columns; column++, out += C * size) {
        long x = n->from_column[column];
        if (y < 0 || x < 0) {
            memset(out, 0, C * size);
            continue;
        }
        const char *skip = skips ? (const char *)n->skip + (y * n->skip_row + x * C) * size : NULL;
        out_pixel(half, relu, skips, C, (const char *)n->x + place_of(n, y, x) * size, n->mean, parts->gain, n->bias, skip, out);
    }
}

/* ---- back ---- */

/* `line` += the gradient in a row of `out`, where the row itself is padding or not. */
INLINE void add_row(int half, const struct norm *n, long row, float *restrict line) {
    long C = n->channels, p = n->padding, begin = row * n->columns * C;
    for (long i = 0; i < n->width * C; i++) line[i] += number(half, n->gradient, begin + p * C + i);
    for (long i = 0; i < 2 * p; i++) {
        long column = i < p ? i : n->width + i, x = n->from_column[column];
        for (long c = 0; x >= 0 && c < C; c++) line[x * C + c] += number(half, n->gradient, begin + column * C + c);
    }
}

/* A pixel's gradient behind the ReLU, and what it adds to the sums. */
INLINE void fold_pixel(
    int half, int relu, long C, const void *restrict x, const float *restrict mean, const float *restrict gain, const float *restrict bias, const float *restrict gradient,
    void *restrict folded, float *restrict sum, float *restrict products
) {
    for (long c = 0; c < C; c++) {
        float v = number(half, x, c) - mean[c], g = gradient[c];
        if (relu) g = v * gain[c] + bias[c] <= 0 ? 0 : g;
        g = stored(half, g);
        put_number(half, folded, c, g);
        sum[c] += g, products[c] += g * v; /* of what `back_pixel` sees */
    }
}

INLINE void fold_part(int half, int relu, struct parts *parts, long part, long thread) {
    const struct norm *n = parts->norm;
    long C = n->channels, end = (part + 1) * parts->rows < n->height ? (part + 1) * parts->rows : n->height, size = half ? 2 : 4;
    float *sum = parts->sums + part * 2 * C, *line = parts->lines + thread * n->width * C;
    memset(sum, 0, 2 * C * sizeof *sum);
    for (long y = part * parts->rows; y < end; y++) {
        for (long i = 0; i < n->width * C; i++) line[i] = n->within ? number(half, n->within, y * n->within_row + i) : 0;
        for (long i = 0; n->gradient && i <= 2 * n->padding; i++) { /* the row itself, and those of the padding that are it again */
            long row = i < n->padding ? i : i == n->padding ? y + i : n->height + i - 1;
            if (n->from_row[row] == y) add_row(half, n, row, line);
        }
        for (long x = 0; x < n->width; x++)
            fold_pixel(
                half, relu, C, (const char *)n->x + place_of(n, y, x) * size, n->mean, parts->gain, n->bias, line + x * C,
                (char *)n->folded + (y * n->width + x) * C * size, sum, sum + C
            );
    }
}

/* weight / deviation x (g - mean(g) - x^ mean(g x^)), x^ being the normed values. */
INLINE void back_pixel(
    int half, long C, const void *restrict x, const float *restrict mean, const float *restrict gain, const float *restrict shares, const void *restrict folded, void *restrict back
) {
    for (long c = 0; c < C; c++) put_number(half, back, c, gain[c] * (number(half, folded, c) - shares[c] - (number(half, x, c) - mean[c]) * shares[C + c]));
}

INLINE void back_row(int half, const struct parts *parts, long y) {
    const struct norm *n = parts->norm;
    long C = n->channels, size = half ? 2 : 4;
    for (long x = 0; x < n->width; x++) {
        long at = place_of(n, y, x) * size;
        const char *folded = (const char *)n->folded + (y * n->width + x) * C * size;
        back_pixel(half, C, (const char *)n->x + at, n->mean, parts->gain, parts->sums, folded, (char *)n->back + at);
    }
}

/* ---- what Python calls; 0, or -1 where memory ran out ---- */

static void moments_job(void *given, long part, long thread) {
    struct parts *parts = given;
    (void)thread;
    parts->norm->half ? moments_part(1, parts, part) : moments_part(0, parts, part);
}

static void out_job(void *given, long row, long thread) {
    const struct parts *parts = given;
    const struct norm *n = parts->norm;
    (void)thread;
#define ONE(half) (n->relu ? out_row(half, 1, 0, parts, row) : n->skip ? out_row(half, 0, 1, parts, row) : out_row(half, 0, 0, parts, row))
    n->half ? ONE(1) : ONE(0);
#undef ONE
}

static void fold_job(void *given, long part, long thread) {
    struct parts *parts = given;
#define ONE(half) (parts->norm->relu ? fold_part(half, 1, parts, part, thread) : fold_part(half, 0, parts, part, thread))
    parts->norm->half ? ONE(1) : ONE(0);
#undef ONE
}

static void back_job(void *given, long row, long thread) {
    struct parts *parts = given;
    (void)thread;
    parts->norm->half ? back_row(1, parts, row) : back_row(0, parts, row);
}

static struct parts parts_of(struct norm *n, long lines) {
    long rows = PIXELS / n->width > 1 ? PIXELS / n->width : 1, count = (n->height + rows - 1) / rows;
    struct parts parts = {.norm = n, .rows = rows, .count = count};
    parts.sums = malloc(((3 * count + 1) * n->channels + lines * n->width * n->channels) * sizeof(float));
    parts.pivots = parts.sums + 2 * count * n->channels, parts.gain = parts.pivots + count * n->channels, parts.lines = parts.gain + n->channels;
    return parts;
}

int fastnst_norm(struct norm *n) {
    struct parts parts = parts_of(n, 0);
    if (!parts.sums) return -1;
    fastnst_parallel(n->threads, parts.count, moments_job, &parts);
    solve(&parts);
    fastnst_parallel(n->threads, n->rows, out_job, &parts);
    free(parts.sums);
    return 0;
}

int fastnst_norm_back(struct norm *n) {
    struct parts parts = parts_of(n, n->threads);
    if (!parts.sums) return -1;
    for (long c = 0; c < n->channels; c++) parts.gain[c] = n->inverse[c] * n->weight[c];
    fastnst_parallel(n->threads, parts.count, fold_job, &parts);
    for (long c = 0; c < n->channels; c++) {
        double sum = 0, products = 0, pixels = (double)n->height * n->width;
        for (long part = 0; part < parts.count; part++) sum += parts.sums[2 * part * n->channels + c], products += parts.sums[(2 * part + 1) * n->channels + c];
        products *= n->inverse[c];
        n->bias_gradient[c] += sum, n->weight_gradient[c] += products;
        parts.sums[c] = sum / pixels, parts.sums[n->channels + c] = products / pixels * n->inverse[c];
    }
    fastnst_parallel(n->threads, n->height, back_job, &parts);
    free(parts.sums);
    return 0;
}
