/* Between the convolutions of a loss network on a CPU: the ReLU and the pooling of 2x2 behind it, there and back, each in one pass.

Activations are (images, height, width, channels), float32 or bfloat16 (`half`). Plain C, whose loops over channels compilers turn into vectors; compiled once for each kind
of CPU, as native.c. */

#include "native_numbers.h"

#include <stddef.h>

/* NULL: not there, or not asked for. */
struct features {
    const void *x;
    void *out, *pooled;            /* rectified, and of that the largest of 2x2, (images, height / 2, width / 2, channels) */
    const void *gradient, *of_pooled; /* of both */
    void *back;
    int32_t images, height, width, channels, half, threads;
};

/* A place of 2x2 pixels, of which in the last row or column some are not there (NULL), and then it is not pooled. */
struct quad {
    const char *x[4], *gradient[4], *of_pooled;
    char *out[4], *pooled, *back[4];
};

INLINE uint32_t exceeds(float a, float b) { return -(uint32_t)((a > b) | (a != a)); } /* all bits or none; what is no number is the largest, as torch has it */
/* Where `mask` has all bits set, else 0. */
INLINE float masked(float v, uint32_t mask) {
    union { float value; uint32_t bits; } of = {v};
    of.bits &= mask;
    return of.value;
}
INLINE float larger(float first, float second) {
    union { float value; uint32_t bits; } a = {first}, b = {second};
    uint32_t mask = exceeds(second, first);
    a.bits = (b.bits & mask) | (a.bits & ~mask);
    return a.value;
}
INLINE float rectified(float v) { return v < 0 ? 0 : v; }          /* what is no number stays so */

INLINE void rectify(int half, int64_t C, const void *restrict x, void *restrict out) {
    for (int64_t c = 0; c < C; c++) put_number(half, out, c, rectified(number(half, x, c)));
}

INLINE void pool(int half, int64_t C, const void *restrict a, const void *restrict b, const void *restrict d, const void *restrict e, void *restrict pooled) {
    for (int64_t c = 0; c < C; c++) {
        float above = larger(number(half, a, c), number(half, b, c)), below = larger(number(half, d, c), number(half, e, c));
        put_number(half, pooled, c, larger(above, below));
    }
}

/* The gradient of what was rectified: 0 where that is. */
INLINE float behind(float out, float gradient) { return masked(gradient, ~-(uint32_t)(out <= 0)); }

INLINE void rectify_back(int half, int given, int64_t C, const void *restrict out, const void *restrict gradient, void *restrict back) {
    for (int64_t c = 0; c < C; c++) put_number(half, back, c, given ? behind(number(half, out, c), number(half, gradient, c)) : 0);
}

/* Of four pixels, to the first largest of which what came back through the pooling goes. */
INLINE void pool_back(
    int half, int given, int64_t C, const void *restrict a, const void *restrict b, const void *restrict d, const void *restrict e, const void *restrict of_pooled,
    const void *restrict ga, const void *restrict gb, const void *restrict gd, const void *restrict ge, void *restrict ba, void *restrict bb, void *restrict bd, void *restrict be
) {
    for (int64_t c = 0; c < C; c++) {
        float v0 = number(half, a, c), v1 = number(half, b, c), v2 = number(half, d, c), v3 = number(half, e, c), g = number(half, of_pooled, c);
        uint32_t right = exceeds(v1, v0), right_below = exceeds(v3, v2), is_below = exceeds(larger(v2, v3), larger(v0, v1));
        float g0 = masked(g, ~is_below & ~right), g1 = masked(g, ~is_below & right), g2 = masked(g, is_below & ~right_below), g3 = masked(g, is_below & right_below);
        if (given) g0 += number(half, ga, c), g1 += number(half, gb, c), g2 += number(half, gd, c), g3 += number(half, ge, c);
        put_number(half, ba, c, behind(v0, g0)), put_number(half, bb, c, behind(v1, g1)), put_number(half, bd, c, behind(v2, g2)), put_number(half, be, c, behind(v3, g3));
    }
}

static struct quad quad_at(const struct features *f, int64_t image, int64_t row, int64_t column) {
    struct quad q = {0};
    int64_t size = f->half ? 2 : 4;
    for (int64_t i = 0; i < 4; i++) {
        int64_t y = 2 * row + i / 2, x = 2 * column + i % 2, at = ((image * f->height + y) * f->width + x) * f->channels * size;
        if (y >= f->height || x >= f->width) continue;
        q.x[i] = f->x ? (const char *)f->x + at : NULL;
        q.out[i] = (char *)f->out + at, q.back[i] = (char *)f->back + at;
        q.gradient[i] = f->gradient ? (const char *)f->gradient + at : NULL;
    }
    int64_t at = ((image * (f->height / 2) + row) * (f->width / 2) + column) * f->channels * size;
    if (q.out[3]) {
        q.pooled = f->pooled ? (char *)f->pooled + at : NULL;
        q.of_pooled = f->of_pooled ? (const char *)f->of_pooled + at : NULL;
    }
    return q;
}

INLINE void there(int half, const struct features *f, int64_t image, int64_t row) {
    for (int64_t column = 0; column < (f->width + 1) / 2; column++) {
        struct quad q = quad_at(f, image, row, column);
        for (int i = 0; i < 4; i++)
            if (q.x[i]) rectify(half, f->channels, q.x[i], q.out[i]);
        if (q.pooled) pool(half, f->channels, q.out[0], q.out[1], q.out[2], q.out[3], q.pooled);
    }
}

INLINE void back(int half, int given, const struct features *f, int64_t image, int64_t row) {
    for (int64_t column = 0; column < (f->width + 1) / 2; column++) {
        struct quad q = quad_at(f, image, row, column);
        if (q.of_pooled)
            pool_back(
                half, given, f->channels, q.out[0], q.out[1], q.out[2], q.out[3], q.of_pooled, q.gradient[0], q.gradient[1], q.gradient[2], q.gradient[3],
                q.back[0], q.back[1], q.back[2], q.back[3]
            );
        else
            for (int i = 0; i < 4; i++)
                if (q.out[i]) rectify_back(half, given, f->channels, q.out[i], q.gradient[i], q.back[i]);
    }
}

static void there_job(void *given, int64_t index, int64_t thread) {
    const struct features *f = given;
    int64_t rows = (f->height + 1) / 2;
    (void)thread;
    f->half ? there(1, f, index / rows, index % rows) : there(0, f, index / rows, index % rows);
}

static void back_job(void *given, int64_t index, int64_t thread) {
    const struct features *f = given;
    int64_t rows = (f->height + 1) / 2;
    (void)thread;
#define ONE(half) (f->gradient ? back(half, 1, f, index / rows, index % rows) : back(half, 0, f, index / rows, index % rows))
    f->half ? ONE(1) : ONE(0);
#undef ONE
}

/* ---- what Python calls ---- */

void fastnst_features(struct features *f) { fastnst_parallel(f->threads, (f->height + 1) / 2 * f->images, there_job, f); }

void fastnst_features_back(struct features *f) { fastnst_parallel(f->threads, (f->height + 1) / 2 * f->images, back_job, f); }
