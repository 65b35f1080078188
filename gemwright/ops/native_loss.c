/* What the losses compute between two products of the head, over X rows of V products, `stride` apart: each pass makes
   the logits again, inverse * cap * tanh(product / cap), since reading products takes longer than that. A cap of 0 is
   none, `inverse` is 1 / temperature. */

#include "native.h"

#define SPAN 2048 /* ids whose terms are summed in fp32 */

/* A head's side of a chunk: products, their cap and temperature, and of each row the largest logit and
   log sum exp(logit - largest). */
struct side {
    void *raw;
    const float *top, *log_sum;
    i64 stride;
    float cap, inverse;
};

INLINE float logit(float raw, float cap, float inverse)
{
    return inverse * (cap ? cap * hyperbolic_tangent(raw * (1 / cap)) : raw);
}
/* d logit / d product, from the logit. */
INLINE float slope(float z, float cap, float inverse)
{
    float t = cap ? z / (inverse * cap) : 0;
    return inverse * (1 - t * t);
}

/* Contiguous products become logits. */
void logits_of(const void *raw, float *out, i64 n, float cap, float inverse, int bf16)
{
    for (i64 i = 0; i < n; i++)
        out[i] = logit(get(raw, i, bf16), cap, inverse);
}

INLINE void read_row(const int bf16, const void *raw, i64 V, float cap, float inverse, float *top, float *sum)
{
    float most = -INFINITY;
    double total = 0;
#pragma omp simd reduction(max : most)
    for (i64 i = 0; i < V; i++) {
        float z = get(raw, i, bf16);
        most = z > most ? z : most;
    }
    *top = most = logit(most, cap, inverse); /* it grows with the product */
    for (i64 start = 0; start < V; start += SPAN) {
        float added = 0;
#pragma omp simd reduction(+ : added)
        for (i64 i = start; i < MIN(start + SPAN, V); i++)
            added += exponential(logit(get(raw, i, bf16), cap, inverse) - most);
        total += added;
    }
    *sum = total;
}
/* The largest logit of each row and the sum of exp(logit - largest). */
void logits_read(const void *raw, float *top, float *sum, i64 X, i64 V, i64 stride, float cap, float inverse, int bf16,
                 int threads)
{
#pragma omp parallel for num_threads(X *V < SMALL / 16 ? 1 : threads)
    for (i64 x = 0; x < X; x++)
        if (bf16)
            read_row(1, at(raw, x * stride, 1), V, cap, inverse, top + x, sum + x);
        else
            read_row(0, at(raw, x * stride, 0), V, cap, inverse, top + x, sum + x);
}

INLINE float entropy_row(const int bf16, const void *raw, i64 V, float cap, float inverse, float top, float log_sum)
{
    double total = 0;
    for (i64 start = 0; start < V; start += SPAN) {
        float added = 0;
#pragma omp simd reduction(+ : added)
        for (i64 i = start; i < MIN(start + SPAN, V); i++) {
            float log_p = logit(get(raw, i, bf16), cap, inverse) - top - log_sum;
            added += exponential(log_p) * log_p;
        }
        total -= added;
    }
    return total;
}
/* -sum p log p of each row. */
void logits_entropy(const struct side *s, float *out, i64 X, i64 V, int bf16, int threads)
{
#pragma omp parallel for num_threads(X *V < SMALL / 16 ? 1 : threads)
    for (i64 x = 0; x < X; x++) {
        const void *row = at(s->raw, x * s->stride, bf16);
        if (bf16)
            out[x] = entropy_row(1, row, V, s->cap, s->inverse, s->top[x], s->log_sum[x]);
        else
            out[x] = entropy_row(0, row, V, s->cap, s->inverse, s->top[x], s->log_sum[x]);
    }
}

INLINE void gradient_row(const int bf16, void *raw, i64 V, float cap, float inverse, float top, float log_sum,
                         float weight)
{
#pragma omp simd
    for (i64 i = 0; i < V; i++) {
        float z = logit(get(raw, i, bf16), cap, inverse);
        put(raw, i, bf16, weight * exponential(z - top - log_sum) * slope(z, cap, inverse));
    }
}
/* Products become the gradient by them of weight * lse + sum over K of mass * logit[id]; `held` are the logits of the
   ids. An id may stand twice. */
void logits_gradient(const struct side *s, const float *weight, const i64 *ids, const float *mass, const float *held,
                     i64 X, i64 V, i64 K, int bf16, int threads)
{
#pragma omp parallel for num_threads(X *V < SMALL / 16 ? 1 : threads)
    for (i64 x = 0; x < X; x++) {
        void *row = at(s->raw, x * s->stride, bf16);
        float top = s->top[x], rest = s->log_sum[x];
        if (bf16)
            gradient_row(1, row, V, s->cap, s->inverse, top, rest, weight[x]);
        else
            gradient_row(0, row, V, s->cap, s->inverse, top, rest, weight[x]);
        for (i64 k = x * K; k < x * K + K; k++) { /* rounded once, after the difference that makes it small */
            float d = weight[x] * exponential(held[k] - top - rest);
            for (i64 j = x * K; j < x * K + K; j++)
                d += ids[j] == ids[k] ? mass[j] : 0;
            put(row, ids[k], bf16, d * slope(held[k], s->cap, s->inverse));
        }
    }
}

/* ---- divergences ---- */

enum { FORWARD_KL, REVERSE_KL, JSD, SOFT_CROSS_ENTROPY };

/* log(1 + e) for e in [0, 1]: twice the series of atanh at e / (2 + e) <= 1/3. */
INLINE float log_one_plus(float e)
{
    float s = e / (2 + e), q = s * s;
    return 2 * s * (1 + q * (1.0f / 3 + q * (1.0f / 5 + q * (1.0f / 7 + q * (1.0f / 9 + q * (1.0f / 11 + q / 13))))));
}

/* A term of a divergence and its g, as divergence.py has them. */
INLINE float term(const int kind, float log_p, float log_q, float beta, float log_odds, float log_rest, float *g)
{
    if (kind == REVERSE_KL)
        return *g = exponential(log_q) * (log_q - log_p);
    float p = exponential(log_p);
    if (kind == JSD) {
        float ratio = log_p - log_q, x = log_odds - ratio;
        float q_over_m = (x < 0 ? x : 0) - log_one_plus(exponential(x < 0 ? x : -x)) - log_rest;
        *g = (1 - beta) * exponential(log_q) * q_over_m;
        return *g + beta * p * (ratio + q_over_m);
    }
    *g = -p;
    return p * (kind == FORWARD_KL ? log_p - log_q : -log_q);
}

struct pair_of_rows {
    void *ours;
    const void *theirs;
    float our_cap, our_inverse, our_top, our_log_sum, their_cap, their_inverse, their_top, their_log_sum;
    float beta, log_odds, log_rest;
};

INLINE float log_p_of(const int bf16, struct pair_of_rows r, i64 i)
{
    return logit(get(r.theirs, i, bf16), r.their_cap, r.their_inverse) - r.their_top - r.their_log_sum;
}
INLINE void compare_row(const int kind, const int bf16, struct pair_of_rows r, i64 V, float *value, float *total)
{
    double values = 0, totals = 0;
    for (i64 start = 0; start < V; start += SPAN) {
        float one = 0, other = 0;
#pragma omp simd reduction(+ : one, other)
        for (i64 i = start; i < MIN(start + SPAN, V); i++) {
            float g, log_q = logit(get(r.ours, i, bf16), r.our_cap, r.our_inverse) - r.our_top - r.our_log_sum;
            one += term(kind, log_p_of(bf16, r, i), log_q, r.beta, r.log_odds, r.log_rest, &g);
            other += g;
        }
        values += one, totals += other;
    }
    *value = values, *total = totals;
}
INLINE void divergence_row(const int kind, const int bf16, struct pair_of_rows r, i64 V, float total, float weight)
{
#pragma omp simd
    for (i64 i = 0; i < V; i++) {
        float g, z = logit(get(r.ours, i, bf16), r.our_cap, r.our_inverse), log_q = z - r.our_top - r.our_log_sum;
        term(kind, log_p_of(bf16, r, i), log_q, r.beta, r.log_odds, r.log_rest, &g);
        put(r.ours, i, bf16, (g - total * exponential(log_q)) * slope(z, r.our_cap, r.our_inverse) * weight);
    }
}

/* Every kind and type is a loop of its own. */
#define KINDS(call)                                                                                                    \
    switch (2 * kind + !!bf16) {                                                                                       \
    case 0: call(0, 0); break;                                                                                         \
    case 1: call(0, 1); break;                                                                                         \
    case 2: call(1, 0); break;                                                                                         \
    case 3: call(1, 1); break;                                                                                         \
    case 4: call(2, 0); break;                                                                                         \
    case 5: call(2, 1); break;                                                                                         \
    case 6: call(3, 0); break;                                                                                         \
    case 7: call(3, 1); break;                                                                                         \
    }

INLINE struct pair_of_rows rows(const struct side *ours, const struct side *theirs, i64 x, float beta, int bf16)
{
    return (struct pair_of_rows){
        at(ours->raw, x * ours->stride, bf16), at(theirs->raw, x * theirs->stride, bf16),
        ours->cap, ours->inverse, ours->top[x], ours->log_sum[x],
        theirs->cap, theirs->inverse, theirs->top[x], theirs->log_sum[x],
        beta, logf((1 - beta) / beta), log1pf(-beta)};
}
/* The divergence of each row, and the sum of its g. */
void divergence_compare(const struct side *ours, const struct side *theirs, float *values, float *totals, i64 X, i64 V,
                        int kind, float beta, int bf16, int threads)
{
#pragma omp parallel for num_threads(X *V < SMALL / 16 ? 1 : threads)
    for (i64 x = 0; x < X; x++) {
        struct pair_of_rows r = rows(ours, theirs, x, beta, bf16);
#define COMPARE(kind, bf16) compare_row(kind, bf16, r, V, values + x, totals + x)
        KINDS(COMPARE)
    }
}
/* Our products become the gradient of weight * divergence by them. */
void divergence_gradient(const struct side *ours, const struct side *theirs, const float *totals, const float *weights,
                         i64 X, i64 V, int kind, float beta, int bf16, int threads)
{
#pragma omp parallel for num_threads(X *V < SMALL / 16 ? 1 : threads)
    for (i64 x = 0; x < X; x++) {
        struct pair_of_rows r = rows(ours, theirs, x, beta, bf16);
#define GRADIENT(kind, bf16) divergence_row(kind, bf16, r, V, totals[x], weights[x])
        KINDS(GRADIENT)
    }
}
