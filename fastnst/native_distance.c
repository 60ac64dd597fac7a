/* The distance of two tensors alike on a CPU, and the way back to the first, each in one pass; float32 or bfloat16 (`half`), in any order that both have. */

#include "native_numbers.h"

enum { PART = 8192 }; /* numbers that are added up in float32, in sixteen sums */

struct distance {
    const void *a, *b;
    double *sums;        /* of the squares of a - b, of each part */
    const float *factor; /* of a - b, which makes the gradient of a */
    void *back;
    int64_t count;
    int32_t half, threads;
};

INLINE eight apart(int half, const struct distance *d, int64_t at, int64_t n) { return load_eight(half, d->a, at, n) - load_eight(half, d->b, at, n); }

INLINE void squares(int half, const struct distance *d, int64_t begin, int64_t end, double *sum) {
    eight one = {0}, other = {0};
    int64_t at = begin;
    for (; at + 16 <= end; at += 16) {
        eight v = apart(half, d, at, 8), w = apart(half, d, at + 8, 8);
        one += v * v, other += w * w;
    }
    for (; at < end; at += 8) {
        eight v = apart(half, d, at, end - at < 8 ? end - at : 8);
        one += v * v;
    }
    *sum = 0;
    for (int i = 0; i < 8; i++) *sum += (double)one[i] + other[i];
}

INLINE void pull(int half, const struct distance *d, int64_t begin, int64_t end) {
    float factor = *d->factor;
    int64_t at = begin;
    for (; at + 8 <= end; at += 8) store_eight(half, d->back, at, apart(half, d, at, 8) * factor, 8);
    if (at < end) store_eight(half, d->back, at, apart(half, d, at, end - at) * factor, end - at);
}

static void squares_job(void *given, int64_t index, int64_t thread) {
    const struct distance *d = given;
    int64_t begin = index * PART, end = d->count - begin < PART ? d->count : begin + PART;
    (void)thread;
    d->half ? squares(1, d, begin, end, d->sums + index) : squares(0, d, begin, end, d->sums + index);
}

static void pull_job(void *given, int64_t index, int64_t thread) {
    const struct distance *d = given;
    int64_t begin = index * PART, end = d->count - begin < PART ? d->count : begin + PART;
    (void)thread;
    d->half ? pull(1, d, begin, end) : pull(0, d, begin, end);
}

/* ---- what Python calls ---- */

int64_t fastnst_distance_part(void) { return PART; }

void fastnst_distance(struct distance *d) { fastnst_parallel(d->threads, (d->count + PART - 1) / PART, squares_job, d); }

void fastnst_distance_back(struct distance *d) { fastnst_parallel(d->threads, (d->count + PART - 1) / PART, pull_job, d); }
