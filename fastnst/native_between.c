/* What an activation goes through between convolutions in inference, and what becomes a picture of the last one's. */

#include "native.h"

#include <math.h>

/* y, (height, width, channels), becomes gain * y + shift + the block's input, which lies in `x` and begins at (inset, inset). */
struct sum {
    const struct input *x;
    const float *gain, *shift;
    float *y;
    int32_t height, width, inset, threads;
};

static void add_row(void *given, int64_t row, int64_t thread) {
    struct sum *sum = given;
    const struct input *in = sum->x;
    float *y = sum->y + row * sum->width * in->channels;
    const float *x = in->x + ((row + sum->inset) * in->width + sum->inset) * in->channels;
    (void)thread;
    for (int64_t i = 0; i < sum->width; i++, y += in->channels, x += in->channels)
        for (int64_t c = 0; c < in->channels; c += LANES) {
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

static void finish_row(void *given, int64_t row, int64_t thread) {
    struct picture *p = given;
    int64_t r = p->shuffle;
    float values[3 * 256];
    (void)thread;
    for (int64_t x0 = 0; x0 < p->width; x0 += 256) {
        int64_t count = p->width - x0 < 256 ? p->width - x0 : 256;
        for (int64_t i = 0; i < count; i++)
            for (int o = 0; o < 3; o++)
                values[3 * i + o] = p->x[(row / r * p->x_width + (x0 + i) / r) * p->channels + (o * r + row % r) * r + (x0 + i) % r];
        if (p->kind == TANH)
            for (int64_t i = 0; i < 3 * count; i++) values[i] = 277.5f - 300 / (exponential(2 * values[i]) + 1);
        if (p->kind == SIGMOID)
            for (int64_t i = 0; i < 3 * count; i++) values[i] = 255 / (exponential(-values[i]) + 1);
        for (int64_t i = 0; i < 3 * count; i++) values[i] = values[i] < 0 ? 0 : values[i] > 255 ? 255 : values[i];
        if (p->bytes)
            for (int64_t i = 0; i < 3 * count; i++) p->bytes[(row * p->width + x0) * 3 + i] = (uint8_t)rintf(values[i] > 0 ? values[i] : 0);
        else
            for (int64_t i = 0; i < 3 * count; i++) p->floats[(i % 3 * p->height + row) * p->width + x0 + i / 3] = values[i] / 255;
    }
}

/* to[j][i] = from[i][j], for `rows` i and `columns` j. */
struct transposition {
    const float *from;
    float *to;
    int64_t rows, columns, from_step, to_step;
};

static void transpose_part(void *given, int64_t index, int64_t thread) {
    struct transposition *t = given;
    int64_t across = (t->columns + 63) / 64, i1 = (index / across + 1) * 1024, j0 = index % across * 64, j1 = j0 + 64;
    i1 = i1 < t->rows ? i1 : t->rows, j1 = j1 < t->columns ? j1 : t->columns;
    (void)thread;
    for (int64_t i0 = index / across * 1024; i0 < i1; i0 += 16)
        for (int64_t j = j0; j < j1; j++)
            for (int64_t i = i0; i < i0 + 16 && i < i1; i++) t->to[j * t->to_step + i] = t->from[i * t->from_step + j];
}

/* ---- what Python calls ---- */

void fastnst_add(struct sum *sum) { fastnst_parallel(sum->threads, sum->height, add_row, sum); }

void fastnst_finish(struct picture *picture) { fastnst_parallel(picture->threads, picture->height, finish_row, picture); }

void fastnst_transpose(struct transposition *t, int32_t threads) { fastnst_parallel(threads, (t->columns + 63) / 64 * ((t->rows + 1023) / 1024), transpose_part, t); }
