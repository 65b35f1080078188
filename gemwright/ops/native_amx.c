/* Products of bf16 rows on AMX tiles: y = x w^T with the weight as it lies in memory.

   A tile of the weight is 16 of its rows by 32 columns, read in place; what is laid out anew is x, pairs of columns by
   16 of its rows. So nothing is packed, and a weight that is trained can be read at once. */

#include "native_tiles.h"

#ifdef TILED
#include <sys/syscall.h>
#include <unistd.h>

#define WIDE (2 * SIDE)   /* rows of a weight at a time */
#define FETCHED 4         /* tiles down the weight from the one in use, which is fetched meanwhile */
#define REQUEST_STATE 0x1023 /* arch_prctl: ARCH_REQ_XCOMP_PERM */
#define TILE_DATA 18

static int allowed;

/* Ask the kernel for the tiles, once a process; whether they may be used, which `tiles_allowed` says from then on. */
int ask_for_tiles(void) { return allowed = syscall(SYS_arch_prctl, REQUEST_STATE, TILE_DATA) == 0; }
int tiles_allowed(void) { return allowed; }

/* A square of sums, 16 rows of the weight by 16 of x, to `rows` rows of y. */
static void round_out(const float *sums, uint16_t *y, i64 F, i64 rows)
{
    __m512i down = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                      _mm512_set1_epi32(SIDE));
    for (i64 m = 0; m < rows; m++)
        _mm256_storeu_si256((void *)(y + m * F), (__m256i)_mm512_cvtneps_pbh(_mm512_i32gather_ps(down, sums + m, 4)));
}

#define FETCH(from) UNROLL for (int r = 0; r < SIDE; r++) __builtin_prefetch((from) + r * D, 0, 2)

/* 32 rows of a weight with all blocks of x. */
static void strip(const uint32_t *x, const uint16_t *w, uint16_t *y, i64 M, i64 F, i64 D)
{
    const uint16_t *ahead = w + FETCHED * SIDE * D;
    for (i64 m = 0; m < M; m += 2 * SIDE) {
        const uint32_t *low = x + m * (D / 2), *high = low + SIDE * (D / 2);
        int two = m + SIDE < M;
        Square sums[4];
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (i64 d = 0; d < D; d += DEEP) {
            _tile_loadd(4, low + d * (SIDE / 2), 64);
            _tile_loadd(6, w + d, 2 * D);
            if (m == 0)
                FETCH(ahead + d);
            _tile_dpbf16ps(0, 6, 4);
            _tile_loadd(7, w + SIDE * D + d, 2 * D);
            if (m == 0)
                FETCH(ahead + SIDE * D + d);
            _tile_dpbf16ps(1, 7, 4);
            if (two) {
                _tile_loadd(5, high + d * (SIDE / 2), 64);
                _tile_dpbf16ps(2, 6, 5);
                _tile_dpbf16ps(3, 7, 5);
            }
        }
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
        for (int i = 0; i < 2 + 2 * two; i++)
            round_out(sums[i], y + (m + i / 2 * SIDE) * F + i % 2 * SIDE, F, MIN(SIDE, M - m - i / 2 * SIDE));
    }
}

int tile_products(const void *x, const Product *products, int count, i64 M, i64 D, int threads)
{
    i64 strips = 0, blocks = (M + SIDE - 1) / SIDE;
    int whole = D % DEEP == 0;
    for (int i = 0; i < count; i++) {
        strips += products[i].F / WIDE;
        whole &= products[i].F % WIDE == 0;
    }
    if (!allowed || !whole)
        return 0;
    uint32_t *laid = aligned_alloc(64, blocks * SIDE * D * sizeof(uint16_t));
#pragma omp parallel num_threads(M *strips *WIDE *D < SMALL ? 1 : threads)
    {
#pragma omp for schedule(static)
        for (i64 b = 0; b < blocks; b++)
            lay_out((const uint16_t *)x + b * SIDE * D, D, D, MIN(SIDE, M - b * SIDE), laid + b * SIDE * (D / 2));
        take_tiles();
#pragma omp for schedule(dynamic)
        for (i64 s = 0; s < strips; s++) {
            const Product *p = products;
            i64 f = s * WIDE;
            for (; f >= p->F; p++)
                f -= p->F;
            strip(laid, (const uint16_t *)p->w + f * D, (uint16_t *)p->y + f, M, p->F, D);
        }
        _tile_release();
    }
    free(laid);
    return 1;
}

#else

int ask_for_tiles(void) { return 0; }
int tiles_allowed(void) { return 0; }
int tile_products(const void *x, const Product *products, int count, i64 M, i64 D, int threads) { return 0; }

#endif
