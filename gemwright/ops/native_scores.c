/* What attention over blocks of queries computes between two matmuls, over rows of s products of a query with its keys.
   A row is a query head's token; `B` batch rows share the masks of their `t` tokens, [B, t, columns] each, 1 where a
   key is hidden: those of the first `left` keys and those from `right` on. A cap of 0 is none. */

#include "native.h"

typedef struct {
    void *raw;                     /* products q . k, [rows, s]; become weights */
    void *d;                       /* backward: products d out . v; become the gradient of `raw` */
    const uint8_t *first, *last;   /* masks */
    const float *shift;            /* [rows]; 0 for all: NULL */
    const float *delta;            /* backward: [rows] */
    float *total;                  /* forward: sums of the weights, [rows] */
    i64 rows, s, t, group;         /* group: rows of one batch row */
    i64 left, right;
    float scale, cap;
    int32_t bf16, threads;
} Scores;

INLINE float weigh(float x, float shift, float scale, float cap, float *tanh)
{
    *tanh = cap ? hyperbolic_tangent(x * (scale / cap)) : 0;
    return exponential((cap ? cap * *tanh : x * scale) - shift);
}

/* Weights of the keys [low, high); `hidden` is the mask from key `low` on, or NULL. */
INLINE float forward_span(const int bf16, const Scores *a, void *raw, i64 low, i64 high, const uint8_t *hidden,
                          float shift)
{
    float added = 0, scale = a->scale, cap = a->cap;
    if (hidden) {
#pragma omp simd reduction(+ : added)
        for (i64 i = low; i < high; i++) {
            float tanh, w = weigh(get(raw, i, bf16), shift, scale, cap, &tanh);
            w = hidden[i - low] ? 0 : w;
            added += w;
            put(raw, i, bf16, w);
        }
    } else {
#pragma omp simd reduction(+ : added)
        for (i64 i = low; i < high; i++) {
            float tanh, w = weigh(get(raw, i, bf16), shift, scale, cap, &tanh);
            added += w;
            put(raw, i, bf16, w);
        }
    }
    return added;
}
INLINE void backward_span(const int bf16, const Scores *a, void *raw, void *d, i64 low, i64 high, const uint8_t *hidden,
                          float shift, float delta)
{
    float scale = a->scale, cap = a->cap;
    if (hidden) {
#pragma omp simd
        for (i64 i = low; i < high; i++) {
            float tanh, w = weigh(get(raw, i, bf16), shift, scale, cap, &tanh);
            w = hidden[i - low] ? 0 : w;
            put(raw, i, bf16, w);
            put(d, i, bf16, (get(d, i, bf16) - delta) * w * (1 - tanh * tanh) * scale);
        }
    } else {
#pragma omp simd
        for (i64 i = low; i < high; i++) {
            float tanh, w = weigh(get(raw, i, bf16), shift, scale, cap, &tanh);
            put(raw, i, bf16, w);
            put(d, i, bf16, (get(d, i, bf16) - delta) * w * (1 - tanh * tanh) * scale);
        }
    }
}

INLINE void row(const int bf16, const Scores *a, i64 r)
{
    void *raw = at(a->raw, r * a->s, bf16), *d = a->d ? at(a->d, r * a->s, bf16) : NULL;
    i64 of_t = r / a->group * a->t + r % a->t;
    const uint8_t *first = a->first ? a->first + of_t * a->left : NULL;
    const uint8_t *last = a->last ? a->last + of_t * (a->s - a->right) : NULL;
    float shift = a->shift ? a->shift[r] : 0;
    if (d) {
        backward_span(bf16, a, raw, d, 0, a->left, first, shift, a->delta[r]);
        backward_span(bf16, a, raw, d, a->left, a->right, NULL, shift, a->delta[r]);
        backward_span(bf16, a, raw, d, a->right, a->s, last, shift, a->delta[r]);
    } else {
        float total = forward_span(bf16, a, raw, 0, a->left, first, shift);
        total += forward_span(bf16, a, raw, a->left, a->right, NULL, shift);
        a->total[r] = total + forward_span(bf16, a, raw, a->right, a->s, last, shift);
    }
}
/* Products become weights exp(score - shift), 0 where a key is hidden, with their sums; in backward also the gradient. */
void scores(const Scores *a)
{
#pragma omp parallel for num_threads(a->rows * a->s < SMALL / 16 ? 1 : a->threads)
    for (i64 r = 0; r < a->rows; r++)
        if (a->bf16)
            row(1, a, r);
        else
            row(0, a, r);
}
