/* What the native kernels share: numbers, their vectors, and products of a few rows with many.

   Numbers are bf16 or fp32, one type in a call (`bf16`), computed in fp32 and rounded once. The compiler makes AVX2,
   AVX-512 or NEON of the vectors.

   Split order. One load of 2 LANES bf16 numbers is a vector of 32-bit words, each with an even element in its low half
   and an odd one in its high half. A shift and a mask make two fp32 vectors of it, the even elements and the odd ones;
   the other factor is kept in that order too, so nothing is shuffled. fp32 numbers keep their own order. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define STEP (2 * LANES)  /* elements that a pair of vectors holds */
#define TILE 4            /* rows of a tile of x, which share each load of the other factor */
#define BLOCK 64          /* rows of x at a time */
#define SMALL (1 << 16)   /* multiplications below which waking a team costs more than it saves */

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

typedef int64_t i64;
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float quad __attribute__((vector_size(16)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));

/* ---- numbers ---- */

INLINE void *at(const void *p, i64 i, int bf16) { return (char *)p + i * (bf16 ? 2 : 4); }
INLINE i64 padded(i64 n) { return (n + STEP - 1) / STEP * STEP; }
INLINE float as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
INLINE uint32_t as_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
INLINE float get(const void *p, i64 i, int bf16)
{
    return bf16 ? as_float((uint32_t)((const uint16_t *)p)[i] << 16) : ((const float *)p)[i];
}
INLINE void put(void *p, i64 i, int bf16, float x)
{
    uint32_t bits = as_bits(x); /* to nearest, ties to even; a NaN made of bf16 numbers has no low bits that carry */
    if (bf16)
        ((uint16_t *)p)[i] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    else
        ((float *)p)[i] = x;
}
INLINE vec load(const float *p) { vec v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(float *p, vec v) { memcpy(p, &v, sizeof v); }
INLINE float total(vec v)
{
    quad q[LANES / 4];
    memcpy(q, &v, sizeof v);
    UNROLL for (int i = 1; i < LANES / 4; i++) q[0] += q[i];
    return (q[0][0] + q[0][2]) + (q[0][1] + q[0][3]);
}

/* STEP elements, zeros past the n that are there, in split order. */
INLINE void pair(const void *p, i64 n, int bf16, vec *first, vec *second)
{
    char tail[4 * STEP] = {0};
    if (n < STEP)
        p = memcpy(tail, p, n * (bf16 ? 2 : 4));
    if (bf16) {
        words w;
        memcpy(&w, p, sizeof w);
        *first = (vec)(w << 16);
        *second = (vec)(w & 0xffff0000u);
    } else {
        *first = load(p);
        *second = load((const float *)p + LANES);
    }
}

/* Where element i of a row lies in split order. */
INLINE i64 place(i64 i, int bf16) { return bf16 ? i / STEP * STEP + i % 2 * LANES + i % STEP / 2 : i; }

/* 2^n and e^r - 1, where x = n ln 2 + r and |r| <= ln 2 / 2; the Taylor series to r^7 is exact to 2e-8. Below -88 the
   power is 0. Adding and subtracting 1.5 * 2^23 rounds to an integer; ln 2 is taken off in two parts. */
INLINE float power_and_rest(float x, float *power)
{
    x = x < -88.0f ? -88.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.0f / 720 + r * (1.0f / 5040);
    p = 1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * p));
    *power = as_float((as_bits(shifted) - as_bits(12582912.0f) + 127) << 23);
    return r + r * r * (0.5f + r * p);
}
INLINE float exponential(float x) { float p, e = power_and_rest(x, &p); return p + p * e; }
INLINE float hyperbolic_tangent(float x) /* (e^2x - 1) / (e^2x + 1), without cancellation near 0 */
{
    x = x < -10 ? -10 : x > 10 ? 10 : x;
    float p, e = power_and_rest(2 * x, &p);
    e = p * e + (p - 1);
    return e / (e + 2);
}

/* ---- products of rows ---- */

typedef struct { const void *w; void *y; i64 F; } Product; /* a weight [F, D] and its result [M, F] */

/* y = x w^T for several weights of one x [M, D]. */
void products(const void *x, const Product *products, int count, i64 M, i64 D, int bf16, int threads);
/* The same on the matrix units; 0, and nothing done, where they do not serve. */
int tile_products(const void *x, const Product *products, int count, i64 M, i64 D, int threads);

/* R rows of a factor as fp32 for `multiply`: step by step, in a step row by row, in split order. */
INLINE void pack(const void *x, i64 D, int bf16, int R, int r, float *out)
{
    for (i64 i = 0; i < D; i += STEP) {
        vec first, second;
        pair(at(x, i, bf16), D - i, bf16, &first, &second);
        store(out + i * R + r * STEP, first);
        store(out + i * R + r * STEP + LANES, second);
    }
}

INLINE void tile_step(const int R, const int C, const int bf16, const float *x, const void *w, i64 stride, i64 n,
                      vec sum[TILE][TILE])
{
    vec first[TILE], second[TILE];
    UNROLL for (int c = 0; c < C; c++) pair(at(w, c * stride, bf16), n, bf16, &first[c], &second[c]);
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) sum[r][c] += first[c] * load(x + r * STEP);
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) sum[r][c] += second[c] * load(x + r * STEP + LANES);
}

/* y[r][c] += x[r] . w[c]; the same place of the rows at `ahead` is fetched meanwhile (a prefetch past the end of
   memory does nothing). */
INLINE void tile(const int R, const int C, const int bf16, const float *x, const void *w, i64 stride, i64 D,
                 const void *ahead, float *y, i64 y_stride)
{
    vec sum[TILE][TILE];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) sum[r][c] = (vec){0};
    i64 i = 0;
    for (; i + STEP <= D; i += STEP) {
        UNROLL for (int c = 0; c < C; c++) __builtin_prefetch(at(ahead, c * stride + i, bf16), 0, 2);
        tile_step(R, C, bf16, x + i * R, at(w, i, bf16), stride, STEP, sum);
    }
    if (i < D)
        tile_step(R, C, bf16, x + i * R, at(w, i, bf16), stride, D - i, sum);
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) y[r * y_stride + c] += total(sum[r][c]);
}

/* y[r][f] += x[r] . w[f] for R <= TILE packed rows; eight sums at a time hide the latency of two FMA units. */
INLINE void multiply_as(const int bf16, int R, const float *x, const void *w, i64 stride, i64 F, i64 D,
                        const void *ahead, float *y, i64 y_stride)
{
    i64 f = 0;
#define COLUMNS(r, c)                                                                                                  \
    for (; f + c <= F; f += c)                                                                                         \
        tile(r, c, bf16, x, at(w, f * stride, bf16), stride, D, at(ahead, f * stride, bf16), y + f, y_stride);
    switch (R) {
    case 1: COLUMNS(1, 4) COLUMNS(1, 1) break;
    case 2: COLUMNS(2, 4) COLUMNS(2, 1) break;
    case 3: COLUMNS(3, 2) COLUMNS(3, 1) break;
    case 4: COLUMNS(4, 2) COLUMNS(4, 1) break;
    }
}
static void multiply(int bf16, int R, const float *x, const void *w, i64 stride, i64 F, i64 D, const void *ahead,
                     float *y, i64 y_stride)
{
    if (bf16)
        multiply_as(1, R, x, w, stride, F, D, ahead, y, y_stride);
    else
        multiply_as(0, R, x, w, stride, F, D, ahead, y, y_stride);
}

/* ---- whole kernels that the pass calls, too; what each does is said where it stands ---- */

typedef struct {
    const void *q, *k, *v;   /* q and out [B, T, N, H]; k and v [pages, K, page, H] */
    void *out;
    const int32_t *table;    /* [B, width]: ids of the pages of a row, from page number first[b] on */
    const int32_t *first;    /* [B] */
    const int32_t *q_pos;    /* [B, T]; -1: padding, whose output is 0 */
    i64 B, T, N, K, H, pages, page, width;
    i64 window;              /* 0: none */
    float scale, cap;        /* cap 0: none */
    int32_t bf16, threads;
} PagedAttention;

int paged_attention(const PagedAttention *a);
void norm(const void *x, const void *weight, void *y, i64 M, i64 D, float eps, int bf16, int threads);
void add_norm(void *made, const void *weight, void *x, const void *next, void *y, i64 M, i64 D, float eps, int bf16,
              int threads);
void rotate(const void *x, const float *cosines, const float *sines, void *y, i64 M, i64 N, i64 H, int bf16,
            int threads);
void gated_gelu(const void *gate, const void *up, void *y, i64 count, int bf16, int threads);
