/* AMX tiles: 16 rows of 64 bytes, bf16 numbers multiplied in pairs, fp32 sums (Intel's manual, volume 1, chapter 18).

   sums [16, 16] += a [16, 32] b [32, 16], where b lies as pairs: row i holds the numbers 2i and 2i + 1 of each column. */

#include "native.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512DQ__)
#define TILED
#include <immintrin.h>

#define SIDE 16         /* rows of a tile, and 32-bit numbers in a row of one */
#define DEEP (2 * SIDE) /* bf16 numbers in a row of a tile */

typedef float Square[SIDE * SIDE] __attribute__((aligned(64)));
typedef struct { uint8_t palette, start, rest[14]; uint16_t bytes[16]; uint8_t rows[16]; } Shapes;

int tiles_allowed(void); /* whether `ask_for_tiles` was granted */

/* All eight tiles of a thread become whole ones; `_tile_release` gives them back. */
INLINE void take_tiles(void)
{
    Shapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++)
        shapes.bytes[i] = 64, shapes.rows[i] = SIDE;
    __asm__ volatile("" ::: "memory"); /* gcc 12 does not see all that the next line reads */
    _tile_loadconfig(&shapes);
}

/* 16 rows of x [rows, D] as the second factor of x . y for their transpose: pairs of columns by row, zeros past `rows`. */
INLINE void lay_out(const uint16_t *x, i64 stride, i64 D, i64 rows, uint32_t *out)
{
    for (i64 pair = 0; pair < D / 2; pair += SIDE)
        for (int m = 0; m < SIDE; m++) {
            uint32_t part[SIDE] = {0};
            if (m < rows)
                memcpy(part, x + m * stride + 2 * pair, sizeof part);
            UNROLL for (int i = 0; i < SIDE; i++) out[(pair + i) * SIDE + m] = part[i];
        }
}
#endif
