/* A pass of the whole model over tokens that are rows of their own: what `model.py` computes, with the same roundings,
   in one call. For a small model that decodes, calling it part by part takes longer than the parts.

   Legend: M rows, D model, N query heads, K key/value heads, H head dim, F feed-forward. */

#include "native.h"

typedef struct { /* of one block: weights as they lie, its store of pages, and who keeps its pages */
    const void *input, *q, *k, *v, *o, *post_attention, *pre_feedforward, *gate, *up, *down, *post_feedforward;
    void *keys, *values; /* [pages + 1, K, page, H] */
    i64 kind, window;    /* window 0: none */
} Block;

typedef struct { /* of one kind of block, as PagedAttention has them */
    const int32_t *table, *first;
    i64 width, pages;
} Places;

typedef struct {
    const Block *blocks;
    const Places *places;           /* by kind */
    const void *last;               /* the final norm's gain */
    const float *cosines, *sines;   /* [M, H] */
    const int32_t *pos;             /* [M] */
    void *x, *out;                  /* [M, D]: embedded tokens, which are overwritten, and the final hidden states */
    i64 L, M, D, N, K, H, F, page;
    float eps, scale, cap;
    int32_t bf16, threads;
} Pass;

/* Put keys or values [M, K, H] where their positions lie; 1 where a page is not in its table or not in the store. */
static int keep(const Pass *a, const Places *places, const void *new, void *store)
{
    i64 size = a->H * (a->bf16 ? 2 : 4);
    for (i64 m = 0; m < a->M; m++) {
        i64 page = a->pos[m] / a->page - places->first[m];
        i64 id = a->pos[m] < 0 || page < 0 || page >= places->width ? -1 : places->table[m * places->width + page];
        if (id < 0 || id >= places->pages)
            return 1;
        for (i64 k = 0; k < a->K; k++)
            memcpy((char *)store + ((id * a->K + k) * a->page + a->pos[m] % a->page) * size,
                   (const char *)new + (m * a->K + k) * size, size);
    }
    return 0;
}

/* Returns 0, or 1 where a row's pages are not there; then the states are not made. */
int model_pass(const Pass *a)
{
    i64 M = a->M, D = a->D, F = a->F, bytes = a->bf16 ? 2 : 4, missing = 0;
    i64 sizes[] = {D, a->N * a->H, a->K * a->H, a->K * a->H, a->N * a->H, D, F, F};
    void *rows[8]; /* normed, q, k, v, attended, made, gate, up */
    for (int i = 0; i < 8; i++)
        rows[i] = aligned_alloc(64, (M * sizes[i] * bytes + 63) / 64 * 64);
    void *normed = rows[0], *q = rows[1], *k = rows[2], *v = rows[3], *attended = rows[4], *made = rows[5];
    void *gate = rows[6], *up = rows[7];
    norm(a->x, a->blocks[0].input, normed, M, D, a->eps, a->bf16, a->threads);
    for (i64 l = 0; l < a->L && !missing; l++) {
        const Block *b = a->blocks + l;
        const Places *p = a->places + b->kind;
        Product heads[] = {{b->q, q, a->N * a->H}, {b->k, k, a->K * a->H}, {b->v, v, a->K * a->H}};
        products(normed, heads, 3, M, D, a->bf16, a->threads);
        rotate(q, a->cosines, a->sines, q, M, a->N, a->H, a->bf16, a->threads);
        rotate(k, a->cosines, a->sines, k, M, a->K, a->H, a->bf16, a->threads);
        missing = keep(a, p, k, b->keys) || keep(a, p, v, b->values);
        if (missing)
            break;
        PagedAttention attention = {
            .q = q, .k = b->keys, .v = b->values, .out = attended, .table = p->table, .first = p->first,
            .q_pos = a->pos, .B = M, .T = 1, .N = a->N, .K = a->K, .H = a->H, .pages = p->pages, .page = a->page,
            .width = p->width, .window = b->window, .scale = a->scale, .cap = a->cap, .bf16 = a->bf16,
            .threads = a->threads,
        };
        missing = paged_attention(&attention);
        products(attended, &(Product){b->o, made, D}, 1, M, a->N * a->H, a->bf16, a->threads);
        add_norm(made, b->post_attention, a->x, b->pre_feedforward, normed, M, D, a->eps, a->bf16, a->threads);
        Product wide[] = {{b->gate, gate, F}, {b->up, up, F}};
        products(normed, wide, 2, M, D, a->bf16, a->threads);
        gated_gelu(gate, up, gate, M * F, a->bf16, a->threads);
        products(gate, &(Product){b->down, made, D}, 1, M, F, a->bf16, a->threads);
        int end = l + 1 == a->L;
        add_norm(made, b->post_feedforward, a->x, end ? a->last : b[1].input, end ? a->out : normed, M, D, a->eps,
                 a->bf16, a->threads);
    }
    for (int i = 0; i < 8; i++)
        free(rows[i]);
    return missing;
}
