/* Attention on AMX tiles, forward and backward: what `attention_blocked.py` defines, its products never in memory.

   A job holds 64 rows and sweeps over columns, 128 at a time: products on tiles, weights from them while they lie in
   the first cache, and the weights' products with the columns' vectors added up. Of the forward pass and of the
   queries' gradient the rows are queries; of the keys' and values' gradients they are keys, and the columns are queries.
   So nothing is added up by two threads, and results do not depend on their number.

   A cap bounds the scores, so weights are exp(score) without the largest one subtracted; without a cap the forward pass
   sweeps over the scores once more, to find it. Blocks of columns that no row sees are skipped, and those that all rows
   see are not masked.

   Legend: B batch rows, T queries, S keys, N query heads, K key/value heads, H head dim. */

#include <omp.h>

#include "native_tiles.h"

typedef struct {
    const void *q, *k, *v;         /* queries [B, T, N, H]; keys, values [B, S, K, H] */
    const void *dout, *attended;   /* backward: d out, and the output of the forward pass; else NULL */
    void *out, *dk, *dv;           /* forward: the output; backward: gradients of q, k and v in their shapes */
    float *lse;                    /* [B, N, T]; -inf where a query sees nothing */
    const int32_t *q_pos, *k_pos;  /* [B, T], [B, S] */
    const int32_t *q_doc, *k_doc;  /* the same, or NULL: one document */
    i64 B, T, S, N, K, H;
    i64 window;                    /* most positions that a key may lie back, plus one */
    float scale, cap;              /* cap 0: none */
    int32_t threads;
} Flash;

#ifdef TILED

#define ROWS 64    /* of a job: four tiles */
#define CHUNK 128  /* columns between two updates of the sums */
#define TILES (ROWS / SIDE)

/* The extremes of some tokens; `whole` where none of them is padding. Without any, low > high. */
typedef struct { int32_t low, high, low_doc, high_doc, whole; } Span;

/* One factor of the products, all heads: tokens in tiles of 16, filled up with zeros to a whole number of pairs of tiles. */
typedef struct {
    const uint16_t *x; /* [B, count, heads, H] */
    i64 count, heads, padded;
    uint32_t *laid;    /* [B, heads, padded / 16, H / 2, 16]: pairs along H, by token */
    uint32_t *paired;  /* [B, heads, padded / 2, H]: pairs of tokens, along H */
    int lacks;         /* memory was short */
} Factor;

/* Tokens of one side, per batch row, filled up with padding. */
typedef struct { i64 count, padded; int32_t *pos, *doc; Span *spans; } Side;

typedef struct {
    int backward, rows_are_keys;
    i64 H, window;
    float scale, cap;
    const uint16_t *first, *second; /* [ROWS, H]: rows of both products */
    const int32_t *row_pos, *row_doc;
    const float *row_shift, *row_delta; /* the shift is taken off a score: backward the log-sum-exp, forward the largest */
    Span span;                      /* of the rows */
    const uint32_t *laid_first, *laid_second, *paired_first, *paired_second; /* of one head's columns */
    const int32_t *pos, *doc;
    const float *shift, *delta;     /* of the columns, as the rows' are where they are keys */
    const Span *spans;
    i64 columns;                    /* padded */
    float *of_slopes, *of_weights;  /* [H / 16, TILES, 16, 16]: sums of slopes . first and of weights . second */
    float *total;                   /* forward: [ROWS, 16] */
} Sweep;

static Span span_of(const int32_t *pos, const int32_t *doc, i64 count)
{
    Span s = {INT32_MAX, -1, INT32_MAX, INT32_MIN, 1};
    for (i64 i = 0; i < count; i++) {
        if (pos[i] < 0) {
            s.whole = 0;
            continue;
        }
        s.low = MIN(s.low, pos[i]), s.high = MAX(s.high, pos[i]);
        s.low_doc = MIN(s.low_doc, doc[i]), s.high_doc = MAX(s.high_doc, doc[i]);
    }
    return s;
}
/* Whether any of these queries may see any of these keys; and whether all of them see all. */
static int some(Span q, Span k, i64 window)
{
    return q.high >= 0 && k.high >= 0 && k.low <= q.high && (i64)q.low - k.high < window && k.low_doc <= q.high_doc &&
           q.low_doc <= k.high_doc;
}
static int all(Span q, Span k, i64 window)
{
    return q.whole && k.whole && k.high <= q.low && (i64)q.high - k.low < window && q.low_doc == q.high_doc &&
           k.low_doc == k.high_doc && q.low_doc == k.low_doc;
}

/* sums [4 tiles of rows] = rows [64, H] . 16 columns. */
static void multiply_rows(const uint16_t *rows, const uint32_t *laid, i64 H, Square *sums)
{
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (i64 h = 0; h < H; h += DEEP) {
        _tile_loadd(4, laid + h / 2 * SIDE, 64);
        _tile_loadd(5, rows + h, 2 * H);
        _tile_dpbf16ps(0, 5, 4);
        _tile_loadd(6, rows + SIDE * H + h, 2 * H);
        _tile_dpbf16ps(1, 6, 4);
        _tile_loadd(7, rows + 2 * SIDE * H + h, 2 * H);
        _tile_dpbf16ps(2, 7, 4);
        _tile_loadd(5, rows + 3 * SIDE * H + h, 2 * H);
        _tile_dpbf16ps(3, 5, 4);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
}

/* sums [H / 16, 4 tiles] += weights [64, columns low to high of a chunk] . the columns' vectors. */
static void add_products(const uint16_t *weights, const uint32_t *paired, i64 H, i64 low, i64 high, float *sums)
{
    for (i64 h = 0; h < H; h += SIDE, sums += TILES * SIDE * SIDE) {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + SIDE * SIDE, 64);
        _tile_loadd(2, sums + 2 * SIDE * SIDE, 64);
        _tile_loadd(3, sums + 3 * SIDE * SIDE, 64);
        for (i64 c = low; c < high; c += DEEP) {
            _tile_loadd(4, paired + c / 2 * H + h, 4 * H);
            _tile_loadd(5, weights + c, 2 * CHUNK);
            _tile_dpbf16ps(0, 5, 4);
            _tile_loadd(6, weights + SIDE * CHUNK + c, 2 * CHUNK);
            _tile_dpbf16ps(1, 6, 4);
            _tile_loadd(7, weights + 2 * SIDE * CHUNK + c, 2 * CHUNK);
            _tile_dpbf16ps(2, 7, 4);
            _tile_loadd(5, weights + 3 * SIDE * CHUNK + c, 2 * CHUNK);
            _tile_dpbf16ps(3, 5, 4);
        }
        _tile_stored(0, sums, 64);
        _tile_stored(1, sums + SIDE * SIDE, 64);
        _tile_stored(2, sums + 2 * SIDE * SIDE, 64);
        _tile_stored(3, sums + 3 * SIDE * SIDE, 64);
    }
}

/* e^x, to 2e-7 of it; below -100 as at -100. The remainder of x over ln 2 is taken off in two parts. Of a NaN the
   comparisons yield the second operand, so it stays one. */
INLINE __m512 exp_of(__m512 x)
{
    x = _mm512_max_ps(_mm512_set1_ps(-100), x);
    __m512 n = _mm512_roundscale_ps(x * 1.44269504f, 0);
    __m512 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    __m512 p = r * (1.0f / 720) + 1.0f / 120;
    p = r * p + 1.0f / 24;
    p = r * p + 1.0f / 6;
    p = r * p + 0.5f;
    return _mm512_scalef_ps(r * (r * p + 1) + 1, n);
}
/* tanh x = 1 - 2 / (e^2x + 1), off by at most 2e-7; the quotient by one Newton step. */
INLINE __m512 tanh_of(__m512 x)
{
    __m512 d = exp_of(_mm512_min_ps(_mm512_set1_ps(40), 2 * x)) + 1, q = _mm512_rcp14_ps(d);
    return 1 - 2 * (q * (2 - d * q));
}

/* Which of 16 columns a row sees, or is seen by. */
INLINE __mmask16 seen_of(const Sweep *w, i64 row, i64 column)
{
    __m512i own = _mm512_set1_epi32(w->row_pos[row]), others = _mm512_loadu_si512(w->pos + column);
    __m512i q = w->rows_are_keys ? others : own, k = w->rows_are_keys ? own : others;
    __mmask16 seen = _mm512_cmple_epi32_mask(k, q) & ~_mm512_movepi32_mask(k);
    seen &= _mm512_cmplt_epi32_mask(_mm512_sub_epi32(q, k), _mm512_set1_epi32(w->window));
    return seen & _mm512_cmpeq_epi32_mask(_mm512_set1_epi32(w->row_doc[row]), _mm512_loadu_si512(w->doc + column));
}

/* The largest score of each row without a cap; -inf where it sees nothing. */
static void largest(const Sweep *w, float *most)
{
    Square products[TILES];
    __m512 top[ROWS];
    for (i64 r = 0; r < ROWS; r++)
        top[r] = _mm512_set1_ps(-INFINITY);
    for (i64 c = 0; c < w->columns; c += SIDE) {
        Span k = w->spans[c / SIDE];
        if (!some(w->span, k, w->window))
            continue;
        int whole = all(w->span, k, w->window);
        multiply_rows(w->first, w->laid_first + c / SIDE * (w->H / 2) * SIDE, w->H, products);
        for (i64 r = 0; r < ROWS; r++) {
            __m512 x = _mm512_load_ps(products[r / SIDE] + r % SIDE * SIDE) * w->scale;
            top[r] = _mm512_mask_max_ps(top[r], whole ? 0xffff : seen_of(w, r, c), top[r], x);
        }
    }
    for (i64 r = 0; r < ROWS; r++)
        most[r] = _mm512_reduce_max_ps(top[r]);
}

/* Weights of 16 columns from a row's products, and in backward the slopes: d loss / d (q . k). */
INLINE void weigh(const int backward, const int by_row, const int masked, const int capped, const Sweep *w, i64 row,
                  i64 column, const float *products, const float *seconds, uint16_t *weights, uint16_t *slopes)
{
    __m512 x = _mm512_load_ps(products) * (capped ? w->scale / w->cap : w->scale), tanh = x;
    if (capped)
        tanh = tanh_of(x), x = w->cap * tanh;
    if (backward || !capped)
        x -= by_row ? _mm512_set1_ps(w->row_shift[row]) : _mm512_loadu_ps(w->shift + column);
    x = exp_of(x);
    if (masked)
        x = _mm512_maskz_mov_ps(seen_of(w, row, column), x);
    _mm256_storeu_si256((void *)weights, (__m256i)_mm512_cvtneps_pbh(x));
    if (!backward) {
        _mm512_storeu_ps(w->total + row * SIDE, _mm512_loadu_ps(w->total + row * SIDE) + x);
        return;
    }
    __m512 delta = by_row ? _mm512_set1_ps(w->row_delta[row]) : _mm512_loadu_ps(w->delta + column);
    __m512 slope = (_mm512_load_ps(seconds) - delta) * x * w->scale;
    if (capped)
        slope *= 1 - tanh * tanh;
    _mm256_storeu_si256((void *)slopes, (__m256i)_mm512_cvtneps_pbh(slope));
}
static void weigh_tile(const Sweep *w, int masked, i64 row, i64 column, const float *products, const float *seconds,
                       uint16_t *weights, uint16_t *slopes)
{
#define ROW_BY_ROW(backward, by_row, masked, capped)                                                                   \
    for (i64 r = 0; r < SIDE; r++)                                                                                     \
        weigh(backward, by_row, masked, capped, w, row + r, column, products + r * SIDE, seconds + r * SIDE,           \
              weights + r * CHUNK, slopes + r * CHUNK);
#define WEIGH(backward, by_row)                                                                                        \
    if (w->cap > 0 && masked)                                                                                          \
        ROW_BY_ROW(backward, by_row, 1, 1)                                                                             \
    else if (w->cap > 0)                                                                                               \
        ROW_BY_ROW(backward, by_row, 0, 1)                                                                             \
    else if (masked)                                                                                                   \
        ROW_BY_ROW(backward, by_row, 1, 0)                                                                             \
    else                                                                                                               \
        ROW_BY_ROW(backward, by_row, 0, 0)
    if (!w->backward) {
        WEIGH(0, 1)
    } else if (!w->rows_are_keys) {
        WEIGH(1, 1)
    } else {
        WEIGH(1, 0)
    }
}

static void sweep(const Sweep *w)
{
    uint16_t weights[ROWS * CHUNK] __attribute__((aligned(64))), slopes[ROWS * CHUNK] __attribute__((aligned(64)));
    Square products[TILES], seconds[TILES];
    for (i64 start = 0; start < w->columns; start += CHUNK) {
        i64 end = MIN(start + CHUNK, w->columns), low = end, high = start; /* columns that some row sees */
        int whole[CHUNK / SIDE];
        for (i64 c = start; c < end; c += SIDE) {
            Span q = w->rows_are_keys ? w->spans[c / SIDE] : w->span, k = w->rows_are_keys ? w->span : w->spans[c / SIDE];
            whole[(c - start) / SIDE] = all(q, k, w->window);
            if (some(q, k, w->window))
                low = MIN(low, c), high = c + SIDE;
        }
        if (low >= high)
            continue;
        low = low / DEEP * DEEP, high = (high + DEEP - 1) / DEEP * DEEP;
        for (i64 c = low; c < high; c += SIDE) {
            multiply_rows(w->first, w->laid_first + c / SIDE * (w->H / 2) * SIDE, w->H, products);
            if (w->backward)
                multiply_rows(w->second, w->laid_second + c / SIDE * (w->H / 2) * SIDE, w->H, seconds);
            for (int t = 0; t < TILES; t++)
                weigh_tile(w, !whole[(c - start) / SIDE], t * SIDE, c, products[t], seconds[t],
                           weights + t * SIDE * CHUNK + c - start, slopes + t * SIDE * CHUNK + c - start);
        }
        if (w->of_weights)
            add_products(weights, w->paired_second + start / 2 * w->H, w->H, low - start, high - start, w->of_weights);
        if (w->of_slopes)
            add_products(slopes, w->paired_first + start / 2 * w->H, w->H, low - start, high - start, w->of_slopes);
    }
}

/* ---- what jobs are made of ---- */

static i64 filled(i64 count) { return (count + ROWS - 1) / ROWS * ROWS; }

static Factor factor(const void *x, i64 count, i64 heads, int laid, int paired, i64 B, i64 H)
{
    Factor f = {x, count, heads, filled(count)};
    i64 bytes = B * heads * f.padded * H * sizeof(uint16_t);
    f.laid = laid ? aligned_alloc(64, bytes) : NULL;
    f.paired = paired ? aligned_alloc(64, bytes) : NULL;
    f.lacks = (laid && !f.laid) || (paired && !f.paired);
    return f;
}
/* Tile `at` of a factor, both forms. */
static void lay(const Factor *f, i64 at, i64 H)
{
    i64 tiles = f->padded / SIDE, tile = at % tiles, head = at / tiles % f->heads, b = at / tiles / f->heads;
    i64 stride = f->heads * H, there = MAX(0, MIN(SIDE, f->count - tile * SIDE));
    const uint16_t *x = f->x + (b * f->count + tile * SIDE) * stride + head * H;
    if (f->laid)
        lay_out(x, stride, H, there, f->laid + at * (H / 2) * SIDE);
    if (f->paired)
        for (i64 i = 0; i < SIDE; i += 2) {
            uint32_t *out = f->paired + (at * SIDE + i) / 2 * H;
            const uint16_t *even = x + i * stride, *odd = even + stride;
            for (i64 h = 0; h < H; h++)
                out[h] = (i < there ? even[h] : 0) | (uint32_t)(i + 1 < there ? odd[h] : 0) << 16;
        }
}
static i64 tiles_of(const Factor *f, i64 B) { return f->laid || f->paired ? B * f->heads * (f->padded / SIDE) : 0; }

static int held(const Side *s) { return s->pos && s->doc && s->spans; }

static Side side(const int32_t *pos, const int32_t *doc, i64 count, i64 B)
{
    Side s = {count, filled(count)};
    s.pos = malloc(B * s.padded * sizeof(int32_t));
    s.doc = calloc(B * s.padded, sizeof(int32_t));
    s.spans = malloc(B * (s.padded / SIDE) * sizeof(Span));
    if (!held(&s))
        return s;
    for (i64 b = 0; b < B; b++)
        for (i64 i = 0; i < s.padded; i++) {
            s.pos[b * s.padded + i] = i < count ? pos[b * count + i] : -1;
            if (doc && i < count)
                s.doc[b * s.padded + i] = doc[b * count + i];
        }
    for (i64 t = 0; t < B * s.padded / SIDE; t++)
        s.spans[t] = span_of(s.pos + t * SIDE, s.doc + t * SIDE, SIDE);
    return s;
}
static void drop(Side *s) { free(s->pos), free(s->doc), free(s->spans); }

/* d out . out of each query [B, N, T], which is the part of the softmax in its slopes. */
static void dots(const Flash *a, i64 padded, float *delta)
{
#pragma omp for schedule(static)
    for (i64 row = 0; row < a->B * a->T * a->N; row++) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (i64 h = 0; h < a->H; h++)
            sum += get(a->dout, row * a->H + h, 1) * get(a->attended, row * a->H + h, 1);
        i64 n = row % a->N, t = row / a->N % a->T, b = row / a->N / a->T;
        delta[(b * a->N + n) * padded + t] = sum;
    }
}

/* 64 rows of one head of x [B, count, heads, H], zeros past the last. */
static void copy_rows(const void *x, i64 b, i64 start, i64 head, i64 count, i64 heads, i64 H, uint16_t *out)
{
    for (i64 r = 0; r < ROWS; r++, out += H)
        if (start + r < count)
            memcpy(out, (const uint16_t *)x + ((b * count + start + r) * heads + head) * H, H * sizeof *out);
        else
            memset(out, 0, H * sizeof *out);
}
/* Sums [H / 16, TILES, 16, 16], each row times `by`, to rows of one head of y. */
static void write_rows(const float *sums, const float *by, i64 b, i64 start, i64 head, i64 count, i64 heads, i64 H,
                       void *y)
{
    for (i64 r = 0; r < ROWS && start + r < count; r++)
        for (i64 h = 0; h < H; h += SIDE) {
            const float *from = sums + (h / SIDE * TILES + r / SIDE) * SIDE * SIDE + r % SIDE * SIDE;
            __m512 row = _mm512_mul_ps(_mm512_loadu_ps(from), _mm512_set1_ps(by ? by[r] : 1));
            uint16_t *to = (uint16_t *)y + ((b * count + start + r) * heads + head) * H + h;
            _mm256_storeu_si256((void *)to, (__m256i)_mm512_cvtneps_pbh(row));
        }
}

typedef struct { Factor q, k, v, dout; Side queries, keys; float *lse, *delta; } Parts;

/* A job over 64 queries of one head: their output, or their gradient. */
static void job_of_queries(const Flash *a, const Parts *p, int backward, i64 b, i64 n, i64 start, uint16_t *rows,
                           float *sums)
{
    i64 H = a->H, z = b * a->K + n / (a->N / a->K), at = b * p->queries.padded + start;
    i64 of_row = (b * a->N + n) * p->queries.padded + start, tiles = p->keys.padded / SIDE;
    float total[ROWS * SIDE] = {0}, by[ROWS], most[ROWS] = {0};
    copy_rows(a->q, b, start, n, a->T, a->N, H, rows);
    if (backward)
        copy_rows(a->dout, b, start, n, a->T, a->N, H, rows + ROWS * H);
    memset(sums, 0, ROWS * H * sizeof(float));
    Sweep w = {
        .backward = backward, .H = H, .window = a->window, .scale = a->scale, .cap = a->cap, .first = rows,
        .second = rows + ROWS * H, .row_pos = p->queries.pos + at, .row_doc = p->queries.doc + at,
        .row_shift = backward ? p->lse + of_row : most, .row_delta = p->delta + of_row,
        .span = span_of(p->queries.pos + at, p->queries.doc + at, ROWS),
        .laid_first = p->k.laid + z * tiles * (H / 2) * SIDE,
        .laid_second = backward ? p->v.laid + z * tiles * (H / 2) * SIDE : NULL,
        .paired_first = backward ? p->k.paired + z * p->keys.padded / 2 * H : NULL,
        .paired_second = backward ? NULL : p->v.paired + z * p->keys.padded / 2 * H,
        .pos = p->keys.pos + b * p->keys.padded, .doc = p->keys.doc + b * p->keys.padded,
        .spans = p->keys.spans + b * tiles, .columns = p->keys.padded, .of_slopes = backward ? sums : NULL,
        .of_weights = backward ? NULL : sums, .total = total,
    };
    if (!backward && a->cap == 0)
        largest(&w, most);
    sweep(&w);
    for (i64 r = 0; !backward && r < ROWS; r++) {
        float sum = 0;
        for (int i = 0; i < SIDE; i++)
            sum += total[r * SIDE + i];
        by[r] = sum == 0 ? 0 : 1 / sum;
        if (start + r < a->T)
            a->lse[(b * a->N + n) * a->T + start + r] = sum == 0 ? -INFINITY : logf(sum) + most[r];
    }
    write_rows(sums, backward ? NULL : by, b, start, n, a->T, a->N, H, a->out);
}

/* A job over 64 keys of one head: their gradient, and that of their values. */
static void job_of_keys(const Flash *a, const Parts *p, i64 b, i64 kv, i64 start, uint16_t *rows, float *sums)
{
    i64 H = a->H, G = a->N / a->K, at = b * p->keys.padded + start, tiles = p->queries.padded / SIDE;
    copy_rows(a->k, b, start, kv, a->S, a->K, H, rows);
    copy_rows(a->v, b, start, kv, a->S, a->K, H, rows + ROWS * H);
    memset(sums, 0, 2 * ROWS * H * sizeof(float));
    for (i64 n = kv * G; n < (kv + 1) * G; n++) {
        i64 z = b * a->N + n;
        Sweep w = {
            .backward = 1, .rows_are_keys = 1, .H = H, .window = a->window, .scale = a->scale, .cap = a->cap,
            .first = rows, .second = rows + ROWS * H, .row_pos = p->keys.pos + at, .row_doc = p->keys.doc + at,
            .span = span_of(p->keys.pos + at, p->keys.doc + at, ROWS),
            .laid_first = p->q.laid + z * tiles * (H / 2) * SIDE, .laid_second = p->dout.laid + z * tiles * (H / 2) * SIDE,
            .paired_first = p->q.paired + z * p->queries.padded / 2 * H,
            .paired_second = p->dout.paired + z * p->queries.padded / 2 * H,
            .pos = p->queries.pos + b * p->queries.padded, .doc = p->queries.doc + b * p->queries.padded,
            .shift = p->lse + z * p->queries.padded, .delta = p->delta + z * p->queries.padded,
            .spans = p->queries.spans + b * tiles, .columns = p->queries.padded, .of_slopes = sums,
            .of_weights = sums + ROWS * H,
        };
        sweep(&w);
    }
    write_rows(sums, NULL, b, start, kv, a->S, a->K, H, a->dk);
    write_rows(sums + ROWS * H, NULL, b, start, kv, a->S, a->K, H, a->dv);
}

/* Forward where `dout` is NULL, else backward. Returns 1; 0, and does nothing, where the tiles do not serve; -1 where
   memory is short. */
int flash_attention(const Flash *a)
{
    int backward = a->dout != NULL;
    i64 H = a->H, B = a->B;
    if (!tiles_allowed() || H % DEEP)
        return 0;
    Parts p = {
        .q = factor(a->q, a->T, a->N, backward, backward, B, H), .k = factor(a->k, a->S, a->K, 1, backward, B, H),
        .v = factor(a->v, a->S, a->K, backward, !backward, B, H),
        .dout = factor(a->dout, a->T, a->N, backward, backward, B, H), .queries = side(a->q_pos, a->q_doc, a->T, B),
        .keys = side(a->k_pos, a->k_doc, a->S, B),
    };
    Factor *factors[] = {&p.q, &p.k, &p.v, &p.dout};
    p.lse = calloc(B * a->N * p.queries.padded, sizeof(float));
    p.delta = calloc(B * a->N * p.queries.padded, sizeof(float));
    i64 of_thread = 2 * ROWS * H * (sizeof(uint16_t) + sizeof(float));
    char *scratch = aligned_alloc(64, a->threads * of_thread);
    int whole = p.lse && p.delta && scratch && held(&p.queries) && held(&p.keys);
    for (int f = 0; f < 4; f++)
        whole = whole && !factors[f]->lacks;
    if (!whole)
        goto end;
    for (i64 r = 0; backward && r < B * a->N; r++)
        memcpy(p.lse + r * p.queries.padded, a->lse + r * a->T, a->T * sizeof(float));
    i64 of_queries = p.queries.padded / ROWS, of_keys = backward ? p.keys.padded / ROWS : 0;
#pragma omp parallel num_threads(a->threads)
    {
        for (int f = 0; f < 4; f++) {
            i64 tiles = tiles_of(factors[f], B);
#pragma omp for schedule(static)
            for (i64 at = 0; at < tiles; at++)
                lay(factors[f], at, H);
        }
        if (backward)
            dots(a, p.queries.padded, p.delta);
        take_tiles();
        float *sums = (float *)(scratch + omp_get_thread_num() * of_thread);
        uint16_t *rows = (uint16_t *)(sums + 2 * ROWS * H);
        /* the last queries and the first keys take longest */
#pragma omp for schedule(dynamic) nowait
        for (i64 job = 0; job < of_queries * B * a->N; job++)
            job_of_queries(a, &p, backward, job / a->N % B, job % a->N,
                           (of_queries - 1 - job / a->N / B) * ROWS, rows, sums);
#pragma omp for schedule(dynamic)
        for (i64 job = 0; job < of_keys * B * a->K; job++)
            job_of_keys(a, &p, job / a->K % B, job % a->K, job / a->K / B * ROWS, rows, sums);
        _tile_release();
    }
end:
    for (int f = 0; f < 4; f++)
        free(factors[f]->laid), free(factors[f]->paired);
    drop(&p.queries), drop(&p.keys), free(p.lse), free(p.delta), free(scratch);
    return whole ? 1 : -1;
}

#else

int flash_attention(const Flash *a) { return 0; }

#endif
