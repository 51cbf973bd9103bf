/* Gated attention over a prefix and over the text, both directions; see `prefix_attention.py: _Gated` for what each letter
   is. A head's rows of scores lie in `row` floats: the prefix's, filled up with -inf, then the text's, likewise. */

#include "small_rows.h"

typedef struct {
    const void *at; /* (batch, heads, rows, width), numbers of a row side by side */
    size batch, head, row;
} Place;

typedef struct {
    size batch, heads, groups, length, prefix, text, width, kind, mask_kind; /* groups: heads that share a key */
    Place query, key, value, prefix_key, prefix_value, mask; /* mask_kind 2: bytes, 3: none */
    const float *gate;
    const int16_t *drawn; /* (batch, heads, length, prefix + text), or NULL */
    size threshold;       /* weights whose number is below it are dropped */
    float *shares, *share; /* P and T, (batch, heads, length, prefix + text); l, (batch, heads, length) */
    Place output;
    Place by_output, by_query, by_key, by_value, by_prefix_key, by_prefix_value; /* the backward pass */
    float *by_gate;
} Gated;

/* e^x, to 1e-7; 0 below the least normal number. */
INLINE vec exponential(vec x) {
    const float magic = 12582912; /* 1.5 * 2^23: what is added to it is rounded to a whole number */
    vec shifted = x * 1.44269504f + magic, whole = shifted - magic;
    vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    vec y = (((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
              1.6666665459e-1f) * r + 5.0000001201e-1f) * r * r + r + 1;
    ivec power = (((ivec)shifted - 0x4b400000) + 127) << 23;
    return (vec)((ivec)(y * (vec)power) & ~(x < -87.0f));
}

INLINE vec larger(vec a, vec b) {
    ivec first = a > b;
    return (vec)(((ivec)a & first) | ((ivec)b & ~first));
}

/* Softmax of n scores, a multiple of WIDTH; returns their largest, and the sum of what was divided. */
static float softmax(float *scores, size n, float *sum) {
    vec top = *(vec *)scores, all = {0};
    for (size i = WIDTH; i < n; i += WIDTH) top = larger(top, *(vec *)(scores + i));
    float largest = top[0];
    for (int l = 1; l < WIDTH; l++) largest = top[l] > largest ? top[l] : largest;
    for (size i = 0; i < n; i += WIDTH) all += *(vec *)(scores + i) = exponential(*(vec *)(scores + i) - largest);
    *sum = total(all);
    for (size i = 0; i < n; i += WIDTH) *(vec *)(scores + i) *= 1 / *sum;
    return largest;
}

static void fetch(const Place *p, size kind, size b, size h, size rows, size n, float *to, size ld) {
    load(p->at, kind, b * p->batch + h * p->head, p->row, rows, n, to, ld);
}

static void put(const float *from, size ld, const Place *p, size kind, size b, size h, size rows, size n) {
    store(from, ld, (void *)p->at, kind, b * p->batch + h * p->head, p->row, rows, n);
}

/* Rows of prefix and text, (prefix + text, ld), and if asked for the same transposed, (width, row). */
static void fetch_both(const Gated *a, const Place *prefix, const Place *text, size b, size h, float *to, float *turned) {
    size ld = padded(a->width), left = padded(a->prefix), row = left + padded(a->text);
    fetch(prefix, a->kind, b, h, a->prefix, a->width, to, ld);
    fetch(text, a->kind, b, h, a->text, a->width, to + a->prefix * ld, ld);
    if (!turned) return;
    for (size d = 0; d < a->width; d++) {
        memset(turned + d * row, 0, (size_t)row * sizeof(float));
        for (size j = 0; j < a->prefix; j++) turned[d * row + j] = to[j * ld + d];
        for (size j = 0; j < a->text; j++) turned[d * row + left + j] = to[(a->prefix + j) * ld + d];
    }
}

static void mask_row(const Gated *a, size b, size h, size l, float *text) {
    size offset = b * a->mask.batch + h * a->mask.head + l * a->mask.row;
    const uint8_t *seen = (const uint8_t *)a->mask.at + offset;
    const float *whole = (const float *)a->mask.at + offset;
    const uint16_t *half = (const uint16_t *)a->mask.at + offset;
    if (a->mask_kind == 0)
        for (size j = 0; j < a->text; j++) text[j] += whole[j];
    if (a->mask_kind == 1)
        for (size j = 0; j < a->text; j++) text[j] += widen(half[j]);
    if (a->mask_kind == 2)
        for (size j = 0; j < a->text; j++) text[j] = seen[j] ? text[j] : -INFINITY;
}

/* What the weights of row l are multiplied by, for dropout; 0 in the padding. */
static void keep_row(const Gated *a, size at, double dropout, float *prefix, float *text) {
    const int16_t *drawn = a->drawn + at * (a->prefix + a->text);
    float kept = (float)(1 / (1 - dropout));
    for (size j = 0; j < a->prefix; j++) prefix[j] = drawn[j] < a->threshold ? 0 : kept;
    for (size j = 0; j < a->text; j++) text[j] = drawn[a->prefix + j] < a->threshold ? 0 : kept;
}

/* [a P, (1 - a) T], dropped where they are, from P and T as they were kept; zero in the padding. */
static void weigh(const Gated *a, size at, float gated, double dropout, float *weights, float *keep) {
    size left = padded(a->prefix), right = padded(a->text);
    const float *from = a->shares + at * (a->prefix + a->text);
    load(from, 0, 0, 0, 1, a->prefix, weights, left);
    load(from + a->prefix, 0, 0, 0, 1, a->text, weights + left, right);
    if (a->drawn) keep_row(a, at, dropout, keep, keep + left);
    for (size j = 0; j < left; j++) weights[j] *= gated;
    for (size j = left; j < left + right; j++) weights[j] *= 1 - gated;
    for (size j = 0; a->drawn && j < left + right; j++) weights[j] *= keep[j];
}

void gated_forward(const Gated *a, double scaling, double dropout) {
    size ld = padded(a->width), left = padded(a->prefix), right = padded(a->text), row = left + right;
    size all = a->prefix + a->text, L = a->length;
    float *query = floats(L * ld), *keys = floats(all * ld), *turned = floats(a->width * row);
    float *values = floats(all * ld), *scores = floats(L * row), *output = floats(L * ld);
    float *keep = calloc((size_t)row, sizeof(float));
    for (size b = 0; b < a->batch; b++)
        for (size h = 0; h < a->heads; h++) {
            fetch(&a->query, a->kind, b, h, L, a->width, query, ld);
            for (size i = 0; i < L * ld; i++) query[i] *= (float)scaling;
            if (h % a->groups == 0) {
                fetch_both(a, &a->prefix_key, &a->key, b, h / a->groups, keys, turned);
                fetch_both(a, &a->prefix_value, &a->value, b, h / a->groups, values, NULL);
            }
            product(L, row, a->width, query, ld, 1, turned, row, scores, row, 0);
            for (size l = 0; l < L; l++) {
                size at = (b * a->heads + h) * L + l;
                float *of_prefix = scores + l * row, *of_text = of_prefix + left, *kept = a->shares + at * all;
                float by_prefix, by_text;
                if (a->mask_kind != 3) mask_row(a, b, h, l, of_text);
                for (size j = a->prefix; j < left; j++) of_prefix[j] = -INFINITY;
                for (size j = a->text; j < right; j++) of_text[j] = -INFINITY;
                float above = softmax(of_prefix, left, &by_prefix) - softmax(of_text, right, &by_text);
                if (above > 0)
                    by_text *= expf(-above);
                else
                    by_prefix *= expf(above);
                a->share[at] = by_prefix / (by_prefix + by_text);
                memcpy(kept, of_prefix, (size_t)a->prefix * sizeof(float));
                memcpy(kept + a->prefix, of_text, (size_t)a->text * sizeof(float));
                weigh(a, at, a->gate[h] * a->share[at], dropout, of_prefix, keep);
            }
            product(L, ld, a->prefix, scores, row, 1, values, ld, output, ld, 0);
            product(L, ld, a->text, scores + left, row, 1, values + a->prefix * ld, ld, output, ld, 1);
            put(output, ld, &a->output, a->kind, b, h, L, a->width);
        }
    free(query), free(keys), free(turned), free(values), free(scores), free(output), free(keep);
}

void gated_backward(const Gated *a, double scaling, double dropout) {
    size ld = padded(a->width), left = padded(a->prefix), right = padded(a->text), row = left + right;
    size all = a->prefix + a->text, L = a->length;
    float *query = floats(L * ld), *keys = floats(all * ld), *values = floats(all * ld), *turned = floats(a->width * row);
    float *by_output = floats(L * ld), *weights = floats(L * row), *by_scores = floats(L * row);
    float *by_query = floats(L * ld), *by_keys = floats(all * ld), *by_values = floats(all * ld);
    float *keep = calloc((size_t)row, sizeof(float)), *shares = floats(row);
    memset(a->by_gate, 0, (size_t)a->heads * sizeof(float));
    for (size b = 0; b < a->batch; b++)
        for (size h = 0; h < a->heads; h++) {
            size group = h / a->groups, later = h % a->groups != 0;
            double by_gate = 0;
            fetch(&a->query, a->kind, b, h, L, a->width, query, ld);
            fetch(&a->by_output, a->kind, b, h, L, a->width, by_output, ld);
            for (size i = 0; i < L * ld; i++) query[i] *= (float)scaling;
            if (!later) {
                fetch_both(a, &a->prefix_key, &a->key, b, group, keys, NULL);
                fetch_both(a, &a->prefix_value, &a->value, b, group, values, turned);
            }
            product(L, row, a->width, by_output, ld, 1, turned, row, by_scores, row, 0);
            for (size l = 0; l < L; l++) {
                size at = (b * a->heads + h) * L + l;
                float share = a->share[at], gated = a->gate[h] * share, *by = by_scores + l * row;
                vec of_prefix = {0}, of_text = {0};
                weigh(a, at, gated, dropout, weights + l * row, keep);
                load(a->shares + at * all, 0, 0, 0, 1, a->prefix, shares, left);
                load(a->shares + at * all + a->prefix, 0, 0, 0, 1, a->text, shares + left, right);
                for (size j = 0; a->drawn && j < row; j++) by[j] *= keep[j];
                for (size j = 0; j < left; j += WIDTH) of_prefix += *(vec *)(by + j) * *(vec *)(shares + j);
                for (size j = left; j < row; j += WIDTH) of_text += *(vec *)(by + j) * *(vec *)(shares + j);
                float mean_prefix = total(of_prefix), mean_text = total(of_text), by_gated = mean_prefix - mean_text;
                float moved = by_gated * gated * (1 - share);
                for (size j = 0; j < left; j++) by[j] = shares[j] * ((by[j] - mean_prefix) * gated + moved);
                for (size j = left; j < row; j++) by[j] = shares[j] * ((by[j] - mean_text) * (1 - gated) - moved);
                by_gate += by_gated * share;
            }
            a->by_gate[h] += (float)by_gate;
            product(L, ld, a->prefix, by_scores, row, 1, keys, ld, by_query, ld, 0);
            product(L, ld, a->text, by_scores + left, row, 1, keys + a->prefix * ld, ld, by_query, ld, 1);
            for (size i = 0; i < L * ld; i++) by_query[i] *= (float)scaling;
            put(by_query, ld, &a->by_query, a->kind, b, h, L, a->width);
            float *text_keys = by_keys + a->prefix * ld, *text_values = by_values + a->prefix * ld;
            product(a->prefix, ld, L, by_scores, 1, row, query, ld, by_keys, ld, (int)later);
            product(a->text, ld, L, by_scores + left, 1, row, query, ld, text_keys, ld, (int)later);
            product(a->prefix, ld, L, weights, 1, row, by_output, ld, by_values, ld, (int)later);
            product(a->text, ld, L, weights + left, 1, row, by_output, ld, text_values, ld, (int)later);
            if ((h + 1) % a->groups) continue;
            put(by_keys, ld, &a->by_prefix_key, a->kind, b, group, a->prefix, a->width);
            put(text_keys, ld, &a->by_key, a->kind, b, group, a->text, a->width);
            put(by_values, ld, &a->by_prefix_value, a->kind, b, group, a->prefix, a->width);
            put(text_values, ld, &a->by_value, a->kind, b, group, a->text, a->width);
        }
    free(query), free(keys), free(values), free(turned), free(by_output), free(weights), free(by_scores);
    free(by_query), free(by_keys), free(by_values), free(keep), free(shares);
}
