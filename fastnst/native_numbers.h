/* Activations in C without any CPU's own instructions: float32, or bfloat16 (`half`) with arithmetic in float32. Compilers turn loops over numbers into vectors where all
pointers are `restrict`; eights of channels are vectors already, or halves or pairs of them. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

INLINE float number(int half, const void *from, int64_t at) {
    union { uint32_t bits; float value; } of;
    if (!half) return ((const float *)from)[at];
    of.bits = (uint32_t)((const uint16_t *)from)[at] << 16;
    return of.value;
}

INLINE uint16_t bits_of_half(float v) {
    union { float value; uint32_t bits; } of = {v};
    return v != v ? 0x7fc0 : (of.bits + 0x7fff + (of.bits >> 16 & 1)) >> 16; /* to the nearest, ties to even */
}

INLINE void put_number(int half, void *to, int64_t at, float v) {
    if (half) ((uint16_t *)to)[at] = bits_of_half(v);
    else ((float *)to)[at] = v;
}

/* ---- channels by eights, of which `n` are meant ---- */

typedef float eight __attribute__((vector_size(32)));
typedef uint32_t eight_bits __attribute__((vector_size(32)));
typedef uint16_t eight_halves __attribute__((vector_size(16)));

/* Zeros for those that are not meant. */
INLINE eight load_eight(int half, const void *from, int64_t at, int64_t n) {
    eight v = {0};
    eight_halves h = {0};
    if (!half) {
        memcpy(&v, (const float *)from + at, n * sizeof(float));
        return v;
    }
    memcpy(&h, (const uint16_t *)from + at, n * sizeof(uint16_t));
    return (eight)(__builtin_convertvector(h, eight_bits) << 16);
}

INLINE eight_bits bits_of_halves(eight v) {
    eight_bits bits = (eight_bits)v, is_none = (eight_bits)(v != v);
    return ((bits + 0x7fff + (bits >> 16 & 1)) >> 16 & ~is_none) | (is_none & 0x7fc0);
}

INLINE void store_eight(int half, void *to, int64_t at, eight v, int64_t n) {
    if (!half) {
        memcpy((float *)to + at, &v, n * sizeof(float));
        return;
    }
    eight_halves h = __builtin_convertvector(bits_of_halves(v), eight_halves);
    memcpy((uint16_t *)to + at, &h, n * sizeof(uint16_t));
}

/* What `load_eight` gives of it once it is stored. */
INLINE eight as_stored(int half, eight v) { return half ? (eight)(bits_of_halves(v) << 16) : v; }

/* Where `mask` has no bits set, else 0. */
INLINE eight unless(eight_bits mask, eight v) { return (eight)((eight_bits)v & ~mask); }

/* act(c, n, ...) for all eights of `channels`. */
#define IN_EIGHTS(channels, act, ...) \
    for (int64_t c = 0; c < (channels); c += 8) (channels) - c >= 8 ? act(c, 8, __VA_ARGS__) : act(c, (channels) - c, __VA_ARGS__)

/* ---- moments ---- */

/* Chan, Golub and LeVeque 1979: of two samples together. */
static inline void merge(double *count, double *mean, double *squares, double other_count, double other_mean, double other_squares) {
    double total = *count + other_count, difference = other_mean - *mean;
    *squares += other_squares + difference * difference * (*count * other_count / total);
    *mean += difference * (other_count / total);
    *count = total;
}

/* ---- memory that begins where a line of the cache does ---- */

static inline void *take_lines(size_t bytes) {
    char *whole = malloc(bytes + 64 + sizeof(void *));
    if (!whole) return NULL;
    void **lines = (void **)(((uintptr_t)whole + sizeof(void *) + 63) / 64 * 64);
    lines[-1] = whole;
    return lines;
}

static inline void give_back_lines(void *lines) { free(((void **)lines)[-1]); }

/* ---- threads ---- */

void fastnst_parallel(int64_t threads, int64_t count, void (*job)(void *, int64_t, int64_t), void *args); /* native_threads.c: job(args, index, thread) for each index below `count` */
