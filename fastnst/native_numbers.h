/* Activations in plain C, number by number: float32, or bfloat16 (`half`) with arithmetic in float32. Compilers turn loops over them into vectors, where all pointers are
`restrict`. */

#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

INLINE float number(int half, const void *from, long at) {
    union { uint32_t bits; float value; } of;
    if (!half) return ((const float *)from)[at];
    of.bits = (uint32_t)((const uint16_t *)from)[at] << 16;
    return of.value;
}

INLINE uint16_t bits_of_half(float v) {
    union { float value; uint32_t bits; } of = {v};
    return v != v ? 0x7fc0 : (of.bits + 0x7fff + (of.bits >> 16 & 1)) >> 16; /* to the nearest, ties to even */
}

INLINE void put_number(int half, void *to, long at, float v) {
    if (half) ((uint16_t *)to)[at] = bits_of_half(v);
    else ((float *)to)[at] = v;
}

/* What `number` gives of it, once it is put. */
INLINE float stored(int half, float v) {
    uint16_t bits = half ? bits_of_half(v) : 0;
    return half ? number(1, &bits, 0) : v;
}

void fastnst_parallel(long threads, long count, void (*job)(void *, long, long), void *args); /* native.c: job(args, index, thread) for each index below `count` */
