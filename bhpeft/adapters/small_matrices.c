/* A Gaussian matrix and an up matrix on a CPU, one call in place of some twenty tensor operations; `small.py` calls it.

     flipout   y = x W_b^T, one weight W_b = mu + r_b s_b^T * V an example, V = sigma * eps
     up        y = onto + scale * (a(h) W^T + b), a(h) = h or ReLU(h)

   `gaussian.py: _Flipout` has the gradients' equations; with W_b whole there are three products in place of six. x, y and
   `onto` are float32 or bfloat16, row-major; parameters and all sums are float32. Each structure is an array of 64-bit
   integers on the other side, in this order. */

#include "small_rows.h"

#define FLOOR 1e-12f

/* ---- a Gaussian matrix ---- */

typedef struct {
    size examples, tokens, in, out, x_stride, x_kind, y_kind; /* x_stride: from example to example */
    const void *x;
    const float *mu, *g, *prior_mu, *prior_sigma, *eps;
    const int8_t *signs; /* (examples, in + out): s, then r; below 0 and not */
    float *kept, *kl, *sigma, *square; /* kept (5, out, in): mu, V, 2 g eps, d KL / d mu, d KL / d g */
    void *y;
    const void *by_y; /* or NULL; what follows is of the backward pass */
    const float *by_kl;
    void *by_x; /* or NULL */
    float *by_mu, *by_g;
} Flipout;

INLINE void moments(const int lanes, const Flipout *f, size i, float (*sums)[WIDTH], double *factors) {
    size n = f->in * f->out;
    const float *restrict mus = f->mu + i, *restrict gs = f->g + i, *restrict eps = f->eps + i;
    const float *restrict means = f->prior_mu + i, *restrict sigmas = f->prior_sigma + i;
    float *restrict kept = f->kept + i;
    for (int l = 0; l < lanes; l++) {
        float g = gs[l], raw = g * g, sigma = raw < FLOOR ? FLOOR : raw;
        float precision = 1 / (sigmas[l] * sigmas[l]), distance = mus[l] - means[l], ratio = sigma * sigma * precision;
        float by_mu = distance * precision, by_g = 2 * g * (ratio - 1) / sigma;
        kept[l] = mus[l], kept[n + l] = raw * eps[l], kept[2 * n + l] = 2 * g * eps[l];
        kept[3 * n + l] = by_mu, kept[4 * n + l] = by_g;
        sums[0][l] += distance * by_mu + ratio, sums[1][l] += raw, sums[2][l] += by_mu * by_mu + by_g * by_g;
        factors[l] *= ratio;
    }
}

static double sum_of_logs(double *factors) {
    double sum = 0;
    for (int l = 0; l < WIDTH; l++) sum += log(factors[l]), factors[l] = 1;
    return sum;
}

static void keep(const Flipout *f) {
    size n = f->in * f->out, i = 0;
    float sums[3][WIDTH] = {{0}};
    double factors[WIDTH], logs = 0, sum[3] = {0};
    for (int l = 0; l < WIDTH; l++) factors[l] = 1;
    for (int taken = 0; i + WIDTH <= n; i += WIDTH) {
        moments(WIDTH, f, i, sums, factors);
        if (++taken % 8 == 0) logs += sum_of_logs(factors); /* a logarithm for eight ratios, of at most 1e-24 each */
    }
    logs += sum_of_logs(factors);
    for (; i < n; i++) moments(1, f, i, sums, factors), logs += log(factors[0]), factors[0] = 1;
    for (int s = 0; s < 3; s++)
        for (int l = 0; l < WIDTH; l++) sum[s] += sums[s][l];
    *f->kl = (float)(0.5 * (sum[0] - logs - (double)n));
    *f->sigma = (float)(sum[1] / (double)n), *f->square = (float)sum[2];
}

/* W_b, rows `ld` apart. */
static void blend(const Flipout *f, size example, float *weight, size ld) {
    const int8_t *s = f->signs + example * (f->in + f->out), *r = s + f->in;
    for (size o = 0; o < f->out; o++) {
        const float *mu = f->kept + o * f->in, *spread = mu + f->in * f->out;
        float *restrict row = weight + o * ld;
        for (size i = 0; i < f->in; i++) row[i] = mu[i] + ((s[i] ^ r[o]) < 0 ? -spread[i] : spread[i]);
        for (size i = f->in; i < ld; i++) row[i] = 0;
    }
}

/* A block of an example's rows in float32, where they lie if they can be read so, else in `beside`. */
static const float *block(const Flipout *f, size example, size token, size rows, float *beside) {
    size offset = example * f->x_stride + token * f->in;
    if (!f->x_kind && f->in % WIDTH == 0) return (const float *)f->x + offset;
    load(f->x, f->x_kind, offset, f->in, rows, f->in, beside, padded(f->in));
    return beside;
}

void flipout_forward(const Flipout *f) {
    size ld = padded(f->in);
    float *weight = floats(f->out * ld), *beside = floats(BLOCK * ld), *y = floats(BLOCK * f->out);
    keep(f);
    for (size e = 0; e < f->examples; e++) {
        blend(f, e, weight, ld);
        for (size t = 0; t < f->tokens; t += BLOCK) {
            size rows = least(BLOCK, f->tokens - t);
            dots(rows, f->out, ld, block(f, e, t, rows, beside), ld, weight, ld, y, f->out);
            store(y, f->out, f->y, f->y_kind, (e * f->tokens + t) * f->out, f->out, rows, f->out);
        }
    }
    free(weight), free(beside), free(y);
}

/* The gradient by V to that by g, and the KL's part to both. */
INLINE void join(const int lanes, const Flipout *f, size i, float by_kl, float *squares) {
    size n = f->in * f->out;
    float *restrict by_mu = f->by_mu + i, *restrict by_g = f->by_g + i;
    const float *restrict kept = f->kept + i;
    for (int l = 0; l < lanes; l++) {
        float mu = by_mu[l], g = by_g[l] * kept[2 * n + l];
        squares[l] += mu * mu + g * g;
        by_mu[l] = mu + by_kl * kept[3 * n + l], by_g[l] = g + by_kl * kept[4 * n + l];
    }
}

void flipout_backward(const Flipout *f) {
    size ld = padded(f->in), n = f->in * f->out, direct = !f->x_kind && ld == f->in;
    float *weight = floats(f->out * ld), *gradient = floats(f->out * ld), *y = floats(BLOCK * f->out);
    float *beside = floats(BLOCK * ld), *x = floats(BLOCK * ld), by_kl = f->by_kl ? *f->by_kl : 0;
    memset(f->by_mu, 0, (size_t)n * sizeof(float)), memset(f->by_g, 0, (size_t)n * sizeof(float));
    for (size e = 0; f->by_y && e < f->examples; e++) {
        if (f->by_x) blend(f, e, weight, ld);
        for (size t = 0; t < f->tokens; t += BLOCK) {
            size rows = least(BLOCK, f->tokens - t), offset = (e * f->tokens + t) * f->in;
            load(f->by_y, f->y_kind, (e * f->tokens + t) * f->out, f->out, rows, f->out, y, f->out);
            product(f->out, ld, rows, y, 1, f->out, block(f, e, t, rows, beside), ld, gradient, ld, t > 0);
            if (!f->by_x) continue;
            float *to = direct ? (float *)f->by_x + offset : x;
            product(rows, ld, f->out, y, f->out, 1, weight, ld, to, ld, 0);
            if (!direct) store(x, ld, f->by_x, f->x_kind, offset, f->in, rows, f->in);
        }
        const int8_t *s = f->signs + e * (f->in + f->out), *r = s + f->in;
        for (size o = 0; o < f->out; o++) {
            float *restrict by_mu = f->by_mu + o * f->in, *restrict by_spread = f->by_g + o * f->in;
            const float *restrict row = gradient + o * ld;
            for (size i = 0; i < f->in; i++) {
                by_mu[i] += row[i];
                by_spread[i] += (s[i] ^ r[o]) < 0 ? -row[i] : row[i];
            }
        }
    }
    float squares[WIDTH] = {0};
    size i = 0;
    for (; i + WIDTH <= n; i += WIDTH) join(WIDTH, f, i, by_kl, squares);
    for (; i < n; i++) join(1, f, i, by_kl, squares);
    *f->square = 0;
    for (int l = 0; l < WIDTH; l++) *f->square += squares[l];
    free(weight), free(gradient), free(y), free(beside), free(x);
}

/* ---- a small matrix of point weights, from few numbers to many ---- */

typedef struct {
    size tokens, in, out, x_kind, y_kind, onto_kind, relu;
    const void *x;
    const float *weight, *bias; /* bias (out) or NULL */
    const void *onto;           /* (tokens, out) or NULL */
    float *kept;                /* (in, out): W^T, for the backward pass */
    void *y;
    const void *by_y;
    void *by_x; /* or NULL */
    float *by_weight, *by_bias;
} Up;

/* a(h) of a block of tokens; NaN stays. */
static void activated(const Up *u, size token, size rows, float *to) {
    load(u->x, u->x_kind, token * u->in, u->in, rows, u->in, to, u->in);
    for (size i = 0; u->relu && i < rows * u->in; i++) to[i] = to[i] < 0 ? 0 : to[i];
}

void up_forward(const Up *u, double scale) {
    size ld = padded(u->out), direct = !u->y_kind && ld == u->out;
    float *weight = floats(u->in * ld), *bias = floats(ld), *x = floats(BLOCK * u->in), *y = floats(BLOCK * ld);
    transpose(u->weight, u->in, u->out, u->in, u->kept, u->out);
    load(u->kept, 0, 0, u->out, u->in, u->out, weight, ld);
    memset(bias, 0, (size_t)ld * sizeof(float));
    if (u->bias) memcpy(bias, u->bias, (size_t)u->out * sizeof(float));
    for (size i = 0; i < u->in * ld; i++) weight[i] *= (float)scale;
    for (size i = 0; i < ld; i++) bias[i] *= (float)scale;
    for (size t = 0; t < u->tokens; t += BLOCK) {
        size rows = least(BLOCK, u->tokens - t);
        activated(u, t, rows, x);
        float *to = direct ? (float *)u->y + t * u->out : y;
        const float *onto = (const float *)u->onto + t * u->out;
        if (u->onto && (!direct || u->onto_kind)) load(u->onto, u->onto_kind, t * u->out, u->out, rows, u->out, y, ld), onto = y;
        for (size r = 0; r < rows; r++)
            for (size i = 0; i < ld; i += WIDTH)
                *(vec *)(to + r * ld + i) = *(vec *)(bias + i) + (u->onto ? *(vec *)(onto + r * ld + i) : (vec){0});
        product(rows, ld, u->in, x, u->in, 1, weight, ld, to, ld, 1);
        if (!direct) store(y, ld, u->y, u->y_kind, t * u->out, u->out, rows, u->out);
    }
    free(weight), free(bias), free(x), free(y);
}

void up_backward(const Up *u, double scale) {
    size ld = padded(u->out), direct = !u->y_kind && ld == u->out;
    float *weight = floats(u->in * ld), *gradient = floats(u->in * ld), *x = floats(BLOCK * u->in);
    float *beside = floats(BLOCK * ld), *by_x = floats(BLOCK * u->in);
    load(u->kept, 0, 0, u->out, u->in, u->out, weight, ld);
    if (u->by_bias) memset(u->by_bias, 0, (size_t)u->out * sizeof(float));
    for (size t = 0; t < u->tokens; t += BLOCK) {
        size rows = least(BLOCK, u->tokens - t);
        const float *by_y = (const float *)u->by_y + t * u->out;
        if (!direct) load(u->by_y, u->y_kind, t * u->out, u->out, rows, u->out, beside, ld), by_y = beside;
        activated(u, t, rows, x);
        product(u->in, ld, rows, x, 1, u->in, by_y, ld, gradient, ld, t > 0);
        for (size r = 0; u->by_bias && r < rows; r++)
            for (size i = 0; i < u->out; i++) u->by_bias[i] += by_y[r * ld + i];
        if (!u->by_x) continue;
        dots(rows, u->in, ld, by_y, ld, weight, ld, by_x, u->in);
        for (size i = 0; i < rows * u->in; i++) by_x[i] = u->relu && !(x[i] > 0) ? 0 : (float)scale * by_x[i];
        store(by_x, u->in, u->by_x, u->x_kind, t * u->in, u->in, rows, u->in);
    }
    for (size i = 0; i < u->in * ld; i++) gradient[i] *= (float)scale;
    for (size i = 0; u->by_bias && i < u->out; i++) u->by_bias[i] *= (float)scale;
    transpose(gradient, ld, u->in, u->out, u->by_weight, u->in);
    free(weight), free(gradient), free(x), free(beside), free(by_x);
}
