/* What the losses compute between two products of the head, over a tile of logits: X rows of V, `stride` apart.
   A cap of 0 is none. */

#include "native.h"

INLINE float read_row(const int bf16, const void *raw, float *out, i64 V, float cap, float inverse)
{
    float top = -INFINITY, scale = cap ? 1 / cap : 0;
#pragma omp simd reduction(max : top)
    for (i64 i = 0; i < V; i++) {
        float z = get(raw, i, bf16);
        z = inverse * (cap ? cap * hyperbolic_tangent(z * scale) : z);
        out[i] = z;
        top = z > top ? z : top;
    }
    return top;
}
/* Products become logits: cap * tanh(raw / cap) * inverse. The tile joins the largest logit of each row and the sum of
   exp(logit - largest); both are those of the tiles before. */
void logits_read(const void *raw, float *out, float *top, float *sum, i64 X, i64 V, i64 stride, float cap,
                 float inverse, int bf16, int threads)
{
#pragma omp parallel for num_threads(X *V < SMALL / 16 ? 1 : threads)
    for (i64 x = 0; x < X; x++) {
        float *row = out + x * stride, most, added = 0;
        if (bf16)
            most = read_row(1, at(raw, x * V, 1), row, V, cap, inverse);
        else
            most = read_row(0, at(raw, x * V, 0), row, V, cap, inverse);
        most = MAX(most, top[x]);
#pragma omp simd reduction(+ : added)
        for (i64 i = 0; i < V; i++)
            added += exponential(row[i] - most);
        sum[x] = sum[x] * (top[x] == most ? 1 : exponential(top[x] - most)) + added;
        top[x] = most;
    }
}

/* Logits become weight * p * slope, p = exp(logit - top - log_sum) and slope = (1 - (logit * T / cap)^2) / T. */
void logits_gradient(float *logits, const float *top, const float *log_sum, const float *weight, i64 X, i64 V,
                     i64 stride, float cap, float temperature, int threads)
{
    float share = cap ? temperature / cap : 0, inverse = 1 / temperature;
#pragma omp parallel for num_threads(X *V < SMALL / 16 ? 1 : threads)
    for (i64 x = 0; x < X; x++) {
        float *z = logits + x * stride, most = top[x], rest = log_sum[x], scale = weight[x] * inverse;
#pragma omp simd
        for (i64 i = 0; i < V; i++) {
            float t = z[i] * share;
            z[i] = exponential(z[i] - most - rest) * scale * (1 - t * t);
        }
    }
}
