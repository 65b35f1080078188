/* Attention of a few queries a row over a paged cache: scaled, soft-capped, causal, windowed, softmax in fp32.

   The key of position p is visible to a query at position q iff 0 <= p <= q and, with a window, q - p < window. The
   query heads of a kv head share each pass over its keys. Softmax runs page by page: what was added before is scaled
   down whenever a larger score comes. Only pages that hold visible positions are read, and of these only such offsets:
   the rest of a page may hold anything.

   Legend: B rows of the batch, T queries, N heads, K key/value heads, G = N / K, H head dim. */

#include "native.h"

/* A job is one kv head of `queries` queries of a row over `chunk` pages of its table. It leaves of each query and head
   an output that is not yet divided (in split order), the largest score and the sum of the weights. */
typedef struct { i64 G, width, queries, blocks, chunk, splits; float *parts; } Jobs;

static float *part(const PagedAttention *a, const Jobs *jobs, i64 b, i64 t, i64 head, i64 split)
{
    return jobs->parts + (((b * a->T + t) * a->N + head) * jobs->splits + split) * (jobs->width + 2);
}

/* Of a page from position `base` on, the offsets [*low, *high) that queries at positions [least, most] see. */
static void seen(const PagedAttention *a, i64 base, i64 least, i64 most, int *low, int *high)
{
    *low = a->window ? MIN(a->page, MAX(0, least - a->window + 1 - base)) : 0;
    *high = MAX(*low, MIN(a->page, most + 1 - base));
}

/* Scores of one query to its weights, relative to the largest score so far; returns the factor for what is older. */
static float weigh(const PagedAttention *a, float *s, int low, int high, float *top, float *sum)
{
    float most = *top, added = 0, scale = a->cap ? a->scale / a->cap : a->scale, cap = a->cap;
    if (cap)
        for (int i = low; i < high; i++) s[i] = cap * hyperbolic_tangent(s[i] * scale);
    else
        for (int i = low; i < high; i++) s[i] *= scale;
#pragma omp simd reduction(max : most)
    for (int i = low; i < high; i++) most = s[i] > most ? s[i] : most;
#pragma omp simd reduction(+ : added)
    for (int i = low; i < high; i++) added += s[i] = exponential(s[i] - most);
    float factor = exponential(*top - most);
    *top = most;
    *sum = *sum * factor + added;
    return factor;
}

/* out[r] += sum over rows s of v, in [low, high), of weights[r][s] v[s]; meanwhile the rows at `ahead` are fetched. */
INLINE void mix_as(const int R, const int bf16, const float *weights, i64 page, const void *v, i64 H, int low, int high,
                   const void *ahead, float *out, i64 width)
{
    for (i64 h = 0; h < H; h += STEP) {
        vec sum[TILE][2];
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int i = 0; i < 2; i++) sum[r][i] = load(out + r * width + h + i * LANES);
        for (int s = low; s < high; s++) {
            vec first, second;
            __builtin_prefetch(at(ahead, s * H + h, bf16), 0, 2);
            pair(at(v, s * H + h, bf16), H - h, bf16, &first, &second);
            UNROLL for (int r = 0; r < R; r++) {
                sum[r][0] += first * weights[r * page + s];
                sum[r][1] += second * weights[r * page + s];
            }
        }
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int i = 0; i < 2; i++) store(out + r * width + h + i * LANES, sum[r][i]);
    }
}
static void mix(int bf16, int R, const float *weights, i64 page, const void *v, i64 H, int low, int high,
                const void *ahead, float *out, i64 width)
{
#define MIX(r)                                                                                                         \
    case r:                                                                                                            \
        if (bf16)                                                                                                      \
            mix_as(r, 1, weights, page, v, H, low, high, ahead, out, width);                                           \
        else                                                                                                           \
            mix_as(r, 0, weights, page, v, H, low, high, ahead, out, width);                                           \
        break;
    switch (R) { MIX(1) MIX(2) MIX(3) MIX(4) }
}

/* One job; 0 where a visible page is not in the table or not in the store. A row is a query and one
   of its G heads. */
static int attend(const PagedAttention *a, const Jobs *jobs, i64 job)
{
    i64 split = job % jobs->splits, block = job / jobs->splits % jobs->blocks;
    i64 kv = job / jobs->splits / jobs->blocks % a->K, b = job / jobs->splits / jobs->blocks / a->K;
    i64 G = jobs->G, width = jobs->width, t0 = block * jobs->queries, rows = MIN(jobs->queries, a->T - t0) * G;
    float x[rows * width], out[rows * width], scores[rows * a->page], top[rows], sum[rows];
    const int32_t *pos = a->q_pos + b * a->T + t0;
    i64 least = INT32_MAX, most = -1;
    for (i64 j = 0; j < rows; j++) {
        i64 start = j / TILE * TILE, query = (b * a->T + t0 + j / G) * a->N + kv * G + j % G;
        pack(at(a->q, query * a->H, a->bf16), a->H, a->bf16, MIN(TILE, rows - start), j - start, x + start * width);
        top[j] = -INFINITY;
        sum[j] = 0;
        if (pos[j / G] >= 0) least = MIN(least, pos[j / G]), most = MAX(most, pos[j / G]);
    }
    memset(out, 0, sizeof out);
    i64 oldest = (a->window ? MAX(0, least - a->window + 1) : 0) / a->page - a->first[b];
    i64 newest = most < 0 ? -1 : most / a->page - a->first[b]; /* -1: padding alone reads no page */
    if (most >= 0 && (oldest < 0 || newest >= a->width)) return 0;
    i64 page = MAX(split * jobs->chunk, oldest), end = MIN((split + 1) * jobs->chunk, newest + 1);
    for (; page < end; page++) {
        i64 base = (a->first[b] + page) * a->page, id = a->table[b * a->width + page];
        i64 next = page + 1 < end ? a->table[b * a->width + page + 1] : id;
        if (id < 0 || id >= a->pages) return 0;
        const void *k = at(a->k, (id * a->K + kv) * a->page * a->H, a->bf16);
        const void *v = at(a->v, (id * a->K + kv) * a->page * a->H, a->bf16);
        const void *next_k = at(a->k, (next * a->K + kv) * a->page * a->H, a->bf16);
        int low, high;
        seen(a, base, least, most, &low, &high);
        memset(scores, 0, sizeof scores);
        for (i64 j = 0; j < rows; j += TILE) {
            int R = MIN(TILE, rows - j);
            float *s = scores + j * a->page;
            multiply(a->bf16, R, x + j * width, at(k, low * a->H, a->bf16), a->H, high - low, a->H,
                     at(v, low * a->H, a->bf16), s + low, a->page);
            for (int r = 0; r < R; r++, s += a->page) {
                int from, to, own = pos[(j + r) / G];
                seen(a, base, own, own, &from, &to);
                float factor = to > from ? weigh(a, s, from, to, &top[j + r], &sum[j + r]) : 1;
                for (int i = low; i < high; i++) s[i] = i < from || i >= to ? 0 : s[i];
                for (i64 h = 0; h < width && factor != 1; h++) out[(j + r) * width + h] *= factor;
            }
            mix(a->bf16, R, s - R * a->page, a->page, v, a->H, low, high, next_k, out + j * width, width);
        }
    }
    for (i64 j = 0; j < rows; j++) {
        float *to = part(a, jobs, b, t0 + j / G, kv * G + j % G, split);
        memcpy(to, out + j * width, width * sizeof(float));
        to[width] = top[j], to[width + 1] = sum[j];
    }
    return 1;
}

/* The parts of one query and head, brought to one largest score, added and divided by the sum of the weights. */
static void merge(const PagedAttention *a, const Jobs *jobs, i64 row)
{
    i64 size = jobs->width + 2;
    float *parts = jobs->parts + row * jobs->splits * size, top = -INFINITY, sum = 0;
    for (i64 i = 0; i < jobs->splits; i++) top = MAX(top, parts[i * size + jobs->width]);
    for (i64 i = 0; i < jobs->splits; i++) {
        float factor = top == -INFINITY ? 0 : exponential(parts[i * size + jobs->width] - top);
        sum += parts[i * size + jobs->width + 1] * factor;
        for (i64 h = 0; h < jobs->width; h++) parts[h] = parts[i * size + h] * factor + (i ? parts[h] : 0);
    }
    for (i64 h = 0; h < a->H; h++)
        put(a->out, row * a->H + h, a->bf16, sum == 0 ? 0 : parts[place(h, a->bf16)] / sum);
}

/* Causal, windowed, capped attention. Returns 0, or 1 where a visible page is not in its table or not in the store. */
int paged_attention(const PagedAttention *a)
{
    Jobs jobs = {.G = a->N / a->K, .width = padded(a->H)};
    jobs.queries = MAX(1, MIN(a->T, BLOCK / jobs.G));
    jobs.blocks = (a->T + jobs.queries - 1) / jobs.queries;
    i64 tasks = a->B * a->K * jobs.blocks; /* their pages are divided until every thread has about four jobs */
    jobs.chunk = MAX(8, (a->width * tasks + 4 * a->threads - 1) / (4 * a->threads));
    jobs.splits = (a->width + jobs.chunk - 1) / jobs.chunk;
    i64 rows = a->B * a->T * a->N;
    jobs.parts = malloc(rows * jobs.splits * (jobs.width + 2) * sizeof(float));
    int missing = 0;
#pragma omp parallel num_threads(rows *a->width *a->page *a->H < SMALL ? 1 : a->threads)
    {
#pragma omp for schedule(dynamic) reduction(| : missing)
        for (i64 job = 0; job < tasks * jobs.splits; job++) missing |= !attend(a, &jobs, job);
#pragma omp for schedule(static)
        for (i64 row = 0; row < rows; row++)
            if (!missing) merge(a, &jobs, row);
    }
    free(jobs.parts);
    return missing;
}
