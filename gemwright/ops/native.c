/* Kernels of a decode step on a CPU: linears, norms, rotary positions, gated GELU, each one call.

   `threads` is the size of the team, taken from the OpenMP pool that torch runs already.
   Legend: M rows of x, F rows of a weight, D columns, N heads, H head dim. */

#include "native.h"

#define DEPTH 1024  /* columns at a time: TILE rows of x stay in the first-level cache */
#define PANEL 64    /* rows of the weight at a time: PANEL x DEPTH stay in the second-level cache */
#define AHEAD 16384 /* elements by which the weight is fetched ahead of its use, but four rows at least */

/* y [M, F] = x [M, D] w [F, D]^T. Few rows stream the weight once, many take it in panels that stay in the cache. */
static void product(const void *x, const void *w, void *y, i64 M, i64 F, i64 D, int bf16, int threads)
{
    i64 width = padded(D), depth = M <= TILE ? width : DEPTH;
    i64 panel = MIN(PANEL, MAX(4, F / (4 * threads) / 4 * 4)); /* four a thread or more, so that none waits long */
    float *packed = aligned_alloc(64, MIN(M, BLOCK) * width * sizeof(float));
#pragma omp parallel num_threads(M *F *D < SMALL ? 1 : threads)
    for (i64 m0 = 0; m0 < M; m0 += BLOCK) {
        int rows = MIN(BLOCK, M - m0);
#pragma omp for schedule(static)
        for (int m = 0; m < rows; m++) {
            int start = m / TILE * TILE;
            pack(at(x, (m0 + m) * D, bf16), D, bf16, MIN(TILE, rows - start), m - start, packed + start * width);
        }
#pragma omp for schedule(dynamic)
        for (i64 f0 = 0; f0 < F; f0 += panel) {
            int columns = MIN(panel, F - f0);
            float sums[BLOCK][PANEL];
            memset(sums, 0, rows * sizeof sums[0]);
            for (i64 d = 0; d < D; d += depth)
                for (int m = 0; m < rows; m += TILE) {
                    int R = MIN(TILE, rows - m);
                    const void *part = at(w, f0 * D + d, bf16);
                    multiply(bf16, R, packed + m * width + d * R, part, D, columns, MIN(depth, D - d),
                             at(part, MAX(4 * D, AHEAD), bf16), sums[m], PANEL);
                }
            for (int m = 0; m < rows; m++)
                for (int f = 0; f < columns; f++) put(y, (m0 + m) * F + f0 + f, bf16, sums[m][f]);
        }
    }
    free(packed);
}

void products(const void *x, const Product *products, int count, i64 M, i64 D, int bf16, int threads)
{
    if (bf16 && tile_products(x, products, count, M, D, threads))
        return;
    for (int i = 0; i < count; i++)
        product(x, products[i].w, products[i].y, M, products[i].F, D, bf16, threads);
}

/* y [M, F] = x [M, D] w [F, D]^T. */
void linear(const void *x, const void *w, void *y, i64 M, i64 F, i64 D, int bf16, int threads)
{
    products(x, &(Product){w, y, F}, 1, M, D, bf16, threads);
}

INLINE void norm_row(const int bf16, const void *x, const void *weight, void *y, i64 D, float eps)
{
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (i64 i = 0; i < D; i++) squares += get(x, i, bf16) * get(x, i, bf16);
    float scale = 1 / sqrtf(squares / D + eps);
#pragma omp simd
    for (i64 i = 0; i < D; i++) put(y, i, bf16, get(x, i, bf16) * scale * (1 + get(weight, i, bf16)));
}
static void norm_one(const void *x, const void *weight, void *y, i64 D, float eps, int bf16)
{
    if (bf16)
        norm_row(1, x, weight, y, D, eps);
    else
        norm_row(0, x, weight, y, D, eps);
}
/* y = x / sqrt(mean(x^2) + eps) * (1 + weight) over rows of D. */
void norm(const void *x, const void *weight, void *y, i64 M, i64 D, float eps, int bf16, int threads)
{
#pragma omp parallel for num_threads(M *D < SMALL ? 1 : threads)
    for (i64 m = 0; m < M; m++)
        norm_one(at(x, m * D, bf16), weight, at(y, m * D, bf16), D, eps, bf16);
}

/* The end of a sub-layer and the beginning of the next: x += norm(made), then y = norm(x); `made` is overwritten. */
void add_norm(void *made, const void *weight, void *x, const void *next, void *y, i64 M, i64 D, float eps, int bf16,
              int threads)
{
#pragma omp parallel for num_threads(M *D < SMALL ? 1 : threads)
    for (i64 m = 0; m < M; m++) {
        void *row = at(x, m * D, bf16), *normed = at(made, m * D, bf16);
        norm_one(normed, weight, normed, D, eps, bf16);
#pragma omp simd
        for (i64 i = 0; i < D; i++) put(row, i, bf16, get(row, i, bf16) + get(normed, i, bf16));
        norm_one(row, next, at(y, m * D, bf16), D, eps, bf16);
    }
}

INLINE void rotate_head(const int bf16, const void *x, const float *cosines, const float *sines, void *y, i64 half)
{
#pragma omp simd
    for (i64 i = 0; i < half; i++) {
        float left = get(x, i, bf16), right = get(x, i + half, bf16);
        put(y, i, bf16, left * cosines[i] - right * sines[i]);
        put(y, i + half, bf16, right * cosines[i + half] + left * sines[i + half]);
    }
}
/* Rows of N heads turned by their positions' angles: dimension i with dimension i + H / 2; cosines and sines [M, H]. */
void rotate(const void *x, const float *cosines, const float *sines, void *y, i64 M, i64 N, i64 H, int bf16,
            int threads)
{
#pragma omp parallel for num_threads(M *N *H < SMALL ? 1 : threads)
    for (i64 head = 0; head < M * N; head++) {
        const float *c = cosines + head / N * H, *s = sines + head / N * H;
        if (bf16)
            rotate_head(1, at(x, head * H, 1), c, s, at(y, head * H, 1), H / 2);
        else
            rotate_head(0, at(x, head * H, 0), c, s, at(y, head * H, 0), H / 2);
    }
}

INLINE void gated_gelu_part(const int bf16, const void *gate, const void *up, void *y, i64 count)
{
#pragma omp simd
    for (i64 i = 0; i < count; i++) {
        float g = get(gate, i, bf16), inner = 0.7978845608f * (g + 0.044715f * g * g * g);
        put(y, i, bf16, 0.5f * g * (1 + hyperbolic_tangent(inner)) * get(up, i, bf16));
    }
}
/* y = gelu(gate) * up, with the tanh form of GELU. */
void gated_gelu(const void *gate, const void *up, void *y, i64 count, int bf16, int threads)
{
#pragma omp parallel for num_threads(count < SMALL / 16 ? 1 : threads) /* each is worth a dozen multiplications */
    for (i64 i = 0; i < count; i += DEPTH) {
        if (bf16)
            gated_gelu_part(1, at(gate, i, 1), at(up, i, 1), at(y, i, 1), MIN(DEPTH, count - i));
        else
            gated_gelu_part(0, at(gate, i, 0), at(up, i, 0), at(y, i, 0), MIN(DEPTH, count - i));
    }
}

INLINE void softcap_part(const float *x, float *y, i64 count, float cap)
{
#pragma omp simd
    for (i64 i = 0; i < count; i++)
        y[i] = cap * hyperbolic_tangent(x[i] / cap);
}
/* y = cap * tanh(x / cap). */
void softcap(const float *x, float *y, i64 count, float cap, int threads)
{
#pragma omp parallel for num_threads(count < SMALL / 16 ? 1 : threads)
    for (i64 i = 0; i < count; i += DEPTH)
        softcap_part(x + i, y + i, MIN(DEPTH, count - i), cap);
}

typedef uint16_t halves __attribute__((vector_size(2 * STEP)));

INLINE void nf4_block_bf16(const uint8_t *packed, const float *levels, float scale, uint16_t *y)
{
    halves table = {0}; /* what the 16 codes stand for in this block */
    for (int code = 0; code < 16; code++)
        put(&table, code, 1, levels[code] * scale);
    UNROLL for (int i = 0; i < 64; i += STEP) {
        words bytes;
        for (int lane = 0; lane < LANES; lane++)
            bytes[lane] = packed[i / 2 + lane];
        halves codes = (halves)(bytes >> 4 | (bytes & 15) << 16); /* the upper four bits come first */
        codes = __builtin_shuffle(table, codes);
        memcpy(y + i, &codes, sizeof codes);
    }
}
INLINE void nf4_block_fp32(const uint8_t *packed, const float *levels, float scale, float *y)
{
    for (int i = 0; i < 32; i++) {
        y[2 * i] = levels[packed[i] >> 4] * scale;
        y[2 * i + 1] = levels[packed[i] & 15] * scale;
    }
}
/* Blocks of 64 weights: level[code] * scale, two codes a byte, the first in the upper four bits. */
void nf4(const uint8_t *packed, const float *levels, const float *scales, void *y, i64 blocks, int bf16, int threads)
{
#pragma omp parallel for num_threads(blocks < SMALL / 64 ? 1 : threads)
    for (i64 b = 0; b < blocks; b++) {
        if (bf16)
            nf4_block_bf16(packed + 32 * b, levels, scales[b], at(y, 64 * b, 1));
        else
            nf4_block_fp32(packed + 32 * b, levels, scales[b], at(y, 64 * b, 0));
    }
}

/* ---- noise ---- */

#define PART 512 /* ids that are hashed at a time, without a branch */

/* 52 uniform bits of a hash (SplitMix64's finaliser), as draw.py defines them. */
INLINE i64 noise_bits(uint64_t x)
{
    x += 0x9E3779B97F4A7C15;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
    x = (x ^ x >> 27) * 0x94D049BB133111EB;
    return (x ^ x >> 31) >> 12;
}

/* The ids below V whose noise under a row's key has at least `least` as its bits: `room` of them at most, and how many
   there are. */
void noisy_ids(const i64 *keys, const i64 *least, i64 *ids, i64 *counts, i64 X, i64 V, i64 room, int threads)
{
#pragma omp parallel for num_threads(X *V < SMALL ? 1 : threads)
    for (i64 x = 0; x < X; x++) {
        i64 found = 0, bits[PART];
        for (i64 first = 0; first < V; first += PART) {
            i64 size = MIN(PART, V - first), top = 0;
#pragma omp simd reduction(max : top)
            for (i64 i = 0; i < size; i++) {
                bits[i] = noise_bits((uint64_t)keys[x] + (uint64_t)(first + i));
                top = bits[i] > top ? bits[i] : top;
            }
            for (i64 i = 0; top >= least[x] && i < size; i++)
                if (bits[i] >= least[x] && found++ < room)
                    ids[x * room + found - 1] = first + i;
        }
        counts[x] = found;
    }
}
