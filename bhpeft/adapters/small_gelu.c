/* GELU(x) = x Phi(x) and its slope Phi(x) + x phi(x) in one pass, so that the backward pass is one product. Phi by
   Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: to 8e-8. */

#include "small_rows.h"

#define CHUNK 512 /* a multiple of WIDTH */

typedef struct {
    size count, kind; /* of x, y and slope alike */
    const void *x;    /* backward: what flows back to y */
    void *y, *slope;  /* backward: y takes what flows back to x */
} Gelu;

INLINE void bend(const float *x, float *y, float *slope) {
    vec v = *(const vec *)x, one = (vec){0} + 1;
    ivec sign = (ivec)v & INT32_MIN;
    vec t = one / (one + 0.3275911f * 0.70710678f * (vec)((ivec)v & INT32_MAX));
    vec power = exponential(v * v * -0.5f);
    vec tail = 0.5f * power * t *
               (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    ivec below = sign >> 31;
    vec phi = (vec)(((ivec)tail & below) | ((ivec)(one - tail) & ~below));
    *(vec *)y = v * phi;
    *(vec *)slope = phi + v * power * 0.39894228f;
}

/* Numbers in float32 are read and written where they lie, but for those of a last vector that is not whole. */
void gelu_forward(const Gelu *g) {
    float x[CHUNK] = {0}, y[CHUNK], slope[CHUNK];
    for (size i = 0; i < g->count; i += CHUNK) {
        size n = least(CHUNK, g->count - i), direct = !g->kind && n == CHUNK;
        const float *from = direct ? (const float *)g->x + i : x;
        float *to = direct ? (float *)g->y + i : y, *beside = direct ? (float *)g->slope + i : slope;
        if (!direct) load(g->x, g->kind, i, 0, 1, n, x, n);
        for (size j = 0; j < n; j += WIDTH) bend(from + j, to + j, beside + j);
        if (direct) continue;
        store(y, n, g->y, g->kind, i, 0, 1, n);
        store(slope, n, g->slope, g->kind, i, 0, 1, n);
    }
}

void gelu_backward(const Gelu *g) {
    float by[CHUNK] = {0}, slope[CHUNK] = {0};
    for (size i = 0; i < g->count; i += CHUNK) {
        size n = least(CHUNK, g->count - i);
        load(g->x, g->kind, i, 0, 1, n, by, n);
        load(g->slope, g->kind, i, 0, 1, n, slope, n);
        for (size j = 0; j < n; j += WIDTH) *(vec *)(by + j) *= *(vec *)(slope + j);
        store(by, n, g->y, g->kind, i, 0, 1, n);
    }
}
