/* The 3x3 kernels of a convolution in training: laid out as it reads them, and their gradient. */

#include "native.h"

#include <stdlib.h>

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
INLINE void transform_kernel(int m, const struct kernels *k, int64_t output, int64_t input, vec to[64]) {
    float G[8][3];
    rows_of_G(m, G);
    vec g[3][3], between[8][3];
    for (int n = 0; n < 9; n++)
        for (int lane = 0; lane < LANES; lane++) {
            int64_t o = output + lane;
            g[n / 3][n % 3][lane] = o >= k->outputs ? 0 : k->back ? k->weight[(input * k->outputs + o) * 9 + 8 - n] : k->weight[(o * k->inputs + input) * 9 + n];
        }
    for (int x = 0; x < m + 2; x++)
        for (int n = 0; n < 3; n++) between[x][n] = G[x][0] * g[0][n] + G[x][1] * g[1][n] + G[x][2] * g[2][n];
    for (int x = 0; x < m + 2; x++)
        for (int y = 0; y < m + 2; y++) to[(m + 2) * x + y] = G[y][0] * between[x][0] + G[y][1] * between[x][1] + G[y][2] * between[x][2];
}

static void kernels_part(void *given, int64_t block, int64_t thread) {
    struct kernels *k = given;
    int64_t step = k->half ? 2 : 1, words = k->inputs / step, points = (OUTPUTS(k->half) + 2) * (OUTPUTS(k->half) + 2);
    (void)thread;
    for (int64_t i = 0; i < words; i++)
        for (int64_t o = 0; o < WIDE; o += LANES) {
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
    int64_t height, width, outputs, half; /* `half`: x and dy are bfloat16; all else is float32 */
    float *V, *Y; /* of some tiles: [k][tile][input], [k][tile][output] */
    int64_t first, tiles, v_words, y_words, v_step, y_step;
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

INLINE void weigh_one(int half, struct weighing *w, int64_t tile) {
    int64_t across = (w->width + 5) / 6, row = (w->first + tile) / across, column = (w->first + tile) % across;
    tile_in(half, 0, 6, w->in, row, column, w->V + tile * w->v_words, w->v_step);
    for (int64_t c = 0; c < w->outputs; c += LANES) {
        some which = first(w->outputs - c);
        vec between[8][6];
        for (int j = 0; j < 6; j++) {
            vec y[6], t[8];
            for (int i = 0; i < 6; i++) {
                int64_t y0 = 6 * row + i, x0 = 6 * column + j;
                int64_t at = (y0 * w->width + x0) * w->outputs + c;
                y[i] = y0 >= w->height || x0 >= w->width ? splat(0) : half ? load_halves(w->gradient + at / 2, which) : load_some(w->gradient + at, which);
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

static void weigh_tile(void *given, int64_t tile, int64_t thread) {
    struct weighing *w = given;
    (void)thread;
    if (HALVES && w->half) weigh_one(1, w, tile);
    else weigh_one(0, w, tile);
}

/* to[r] += the sum over `tiles` of y[tile][r] * v[tile], a vector WIDE */
INLINE void weigh_rows(int rows, const struct weighing *w, const float *y, const float *v, float *to) {
    vec s[ROWS][2];
    UNROLLED for (int r = 0; r < rows; r++) s[r][0] = load(to + r * WIDE), s[r][1] = load(to + r * WIDE + LANES);
    for (int64_t tile = 0; tile < w->tiles; tile++, y += w->y_words, v += w->v_words) {
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

static void weigh_products(void *given, int64_t k, int64_t thread) {
    struct weighing *w = given;
    int64_t blocks = w->v_words / WIDE;
    (void)thread;
    for (int64_t block = 0; block < blocks; block++) {
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

static void weighed_part(void *given, int64_t output, int64_t thread) {
    struct weighed *w = given;
    int64_t blocks = (w->inputs + WIDE - 1) / WIDE;
    float G[8][3];
    (void)thread;
    rows_of_G(6, G);
    for (int64_t c = 0; c < w->inputs; c += LANES) {
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
            for (int64_t lane = 0; lane < LANES && c + lane < w->inputs; lane++) w->to[(output * 9 + n) * w->inputs + c + lane] = numbers[lane];
        }
    }
}

/* ---- what Python calls; 0, or -1 where memory ran out ---- */

void fastnst_pack(struct kernels *k) { fastnst_parallel(k->threads, (k->outputs + WIDE - 1) / WIDE, kernels_part, k); }

int fastnst_weigh(const struct input *in, const float *gradient, float *sums, int32_t height, int32_t width, int32_t outputs, int32_t half, int32_t threads) {
    struct weighing w = {.in = in, .gradient = gradient, .sums = sums, .height = height, .width = width, .outputs = outputs, .half = half};
    int64_t all = (w.height + 5) / 6 * ((w.width + 5) / 6), bytes = 8 << 20; /* of what is transformed at once: a last cache holds it */
    w.v_words = (in->channels + WIDE - 1) / WIDE * WIDE, w.y_words = (w.outputs + LANES - 1) / LANES * LANES;
    int64_t tiles = bytes / (64 * 4 * (w.v_words + w.y_words));
    tiles = tiles < 16 ? 16 : tiles > all ? all : tiles;
    w.v_step = tiles * w.v_words + 16, w.y_step = tiles * w.y_words + 16; /* 16: not all in one set of the cache */
    if (!(w.V = take_lines(64 * (w.v_step + w.y_step) * sizeof(float)))) return -1;
    w.Y = w.V + 64 * w.v_step;
    for (; w.first < all; w.first += tiles) {
        w.tiles = all - w.first < tiles ? all - w.first : tiles;
        fastnst_parallel(threads, w.tiles, weigh_tile, &w);
        fastnst_parallel(threads, 64, weigh_products, &w);
    }
    give_back_lines(w.V);
    return 0;
}

void fastnst_weighed(struct weighed *w) { fastnst_parallel(w->threads, w->outputs, weighed_part, w); }
