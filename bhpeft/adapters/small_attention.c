/* Gated attention over a prefix and over the text, both directions; see `prefix_attention.py: _Gated` for what each letter
   is. A row of scores lies in `left + right` floats, the prefix's and then the text's, each filled up to whole vectors: with
   -inf before the softmax, with 0 behind it. */

#include "small_rows.h"

typedef struct {
    const void *at; /* (batch, heads, rows, width), numbers of a row side by side */
    size batch, head, row;
} Place;

typedef struct {
    size batch, heads, groups, length, prefix, text, width, kind, mask_kind; /* groups: heads that share a key */
    Place query, key, value, prefix_key, prefix_value, mask; /* mask_kind 2: bytes, 3: none */
    const float *gate;
    const int16_t *drawn;  /* (batch, heads, length, prefix + text), and WIDTH more that may be read; or NULL */
    size threshold;        /* weights whose number is below it are dropped */
    float *shares, *share; /* P and T, (batch, heads, length, left + right); l, (batch, heads, length) */
    Place output;
    Place by_output, by_query, by_key, by_value, by_prefix_key, by_prefix_value; /* the backward pass */
    float *by_gate;
} Gated;

typedef int16_t svec __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));

INLINE vec larger(vec a, vec b) {
    ivec first = a > b;
    return (vec)(((ivec)a & first) | ((ivec)b & ~first));
}

static float top(const float *row, size n) {
    typedef float quad __attribute__((vector_size(16)));
    typedef int32_t iquad __attribute__((vector_size(16)));
    union {
        vec whole;
        quad parts[WIDTH / 4];
    } cut = {*(const vec *)row};
    for (size j = WIDTH; j < n; j += WIDTH) cut.whole = larger(cut.whole, *(const vec *)(row + j));
    quad most = cut.parts[0];
    for (int i = 1; i < WIDTH / 4; i++) {
        iquad first = most > cut.parts[i];
        most = (quad)(((iquad)most & first) | ((iquad)cut.parts[i] & ~first));
    }
    float one = most[0] > most[1] ? most[0] : most[1], other = most[2] > most[3] ? most[2] : most[3];
    return one > other ? one : other;
}

/* e^(s - largest) in place of n scores; returns their sum. */
static float powers(float *row, size n, float largest) {
    vec sum = {0};
    for (size j = 0; j < n; j += WIDTH) sum += *(vec *)(row + j) = exponential(*(vec *)(row + j) - largest);
    return total(sum);
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

/* What is added to a head's scores, (length, left + right). */
static void fetch_mask(const Gated *a, size b, size h, float *to) {
    size left = padded(a->prefix), right = padded(a->text);
    for (size l = 0; l < a->length; l++, to += left + right) {
        size offset = b * a->mask.batch + h * a->mask.head + l * a->mask.row;
        const uint8_t *seen = (const uint8_t *)a->mask.at + offset;
        for (size j = 0; j < left + right; j++) to[j] = j < a->prefix ? 0 : -INFINITY;
        if (a->mask_kind < 2) load(a->mask.at, a->mask_kind, offset, 0, 1, a->text, to + left, a->text);
        for (size j = 0; a->mask_kind == 2 && j < a->text; j++) to[left + j] = seen[j] ? 0 : -INFINITY;
        for (size j = 0; a->mask_kind == 3 && j < a->text; j++) to[left + j] = 0;
    }
}

/* Row `at` of [a P, (1 - a) T], what dropout leaves of it; `by`, where given, becomes what flows back to [P, T] of what
   flows back to the weights. */
static void weigh(const Gated *a, size at, float gated, float kept, float *weights, float *by) {
    size left = padded(a->prefix), row = left + padded(a->text);
    const float *shares = a->shares + at * row;
    const int16_t *drawn = a->drawn + at * (a->prefix + a->text);
    for (size j = 0; j < row; j += WIDTH) {
        vec keep = (vec){0} + 1;
        if (a->drawn) {
            svec numbers = *(const svec *)(drawn + (j < left ? j : a->prefix + j - left));
            ivec stays = __builtin_convertvector(numbers, ivec) >= (int32_t)a->threshold;
            keep = (vec)(stays & (ivec)((vec){0} + kept));
        }
        *(vec *)(weights + j) = *(const vec *)(shares + j) * (j < left ? gated : 1 - gated) * keep;
        if (by) *(vec *)(by + j) *= keep;
    }
}

int small_lanes(void) { return WIDTH; }

void gated_forward(const Gated *a, double scaling, double dropout) {
    size ld = padded(a->width), left = padded(a->prefix), right = padded(a->text), row = left + right;
    size all = a->prefix + a->text, L = a->length;
    float *query = floats(L * ld), *keys = floats(all * ld), *turned = floats(a->width * row);
    float *values = floats(all * ld), *scores = floats(L * row), *output = floats(L * ld);
    float *mask = floats(L * row), kept = (float)(1 / (1 - dropout));
    for (size b = 0; b < a->batch; b++)
        for (size h = 0; h < a->heads; h++) {
            if (h == 0 || a->mask.head) fetch_mask(a, b, h, mask);
            fetch(&a->query, a->kind, b, h, L, a->width, query, ld);
            for (size i = 0; i < L * ld; i++) query[i] *= (float)scaling;
            if (h % a->groups == 0) {
                fetch_both(a, &a->prefix_key, &a->key, b, h / a->groups, keys, turned);
                fetch_both(a, &a->prefix_value, &a->value, b, h / a->groups, values, NULL);
            }
            product(L, row, a->width, query, ld, 1, turned, row, scores, row, 0);
            for (size l = 0; l < L; l++) {
                size at = (b * a->heads + h) * L + l;
                float *here = scores + l * row, *shares = a->shares + at * row;
                for (size j = 0; j < row; j += WIDTH) *(vec *)(here + j) += *(vec *)(mask + l * row + j);
                float of_prefix = top(here, left), of_text = top(here + left, right), above = of_prefix - of_text;
                float prefix = powers(here, left, of_prefix), text = powers(here + left, right, of_text);
                for (size j = 0; j < left; j += WIDTH) *(vec *)(shares + j) = *(vec *)(here + j) * (1 / prefix);
                for (size j = left; j < row; j += WIDTH) *(vec *)(shares + j) = *(vec *)(here + j) * (1 / text);
                if (above > 0)
                    text *= expf(-above);
                else
                    prefix *= expf(above);
                a->share[at] = prefix / (prefix + text);
                weigh(a, at, a->gate[h] * a->share[at], kept, here, NULL);
            }
            product(L, ld, a->prefix, scores, row, 1, values, ld, output, ld, 0);
            product(L, ld, a->text, scores + left, row, 1, values + a->prefix * ld, ld, output, ld, 1);
            put(output, ld, &a->output, a->kind, b, h, L, a->width);
        }
    free(query), free(keys), free(turned), free(values), free(scores), free(output), free(mask);
}

void gated_backward(const Gated *a, double scaling, double dropout) {
    size ld = padded(a->width), left = padded(a->prefix), right = padded(a->text), row = left + right;
    size all = a->prefix + a->text, L = a->length;
    float *query = floats(L * ld), *keys = floats(all * ld), *values = floats(all * ld), *turned = floats(a->width * row);
    float *by_output = floats(L * ld), *weights = floats(L * row), *by_scores = floats(L * row);
    float *by_query = floats(L * ld), *by_keys = floats(all * ld), *by_values = floats(all * ld);
    float kept = (float)(1 / (1 - dropout));
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
                const float *shares = a->shares + at * row;
                vec of_prefix = {0}, of_text = {0};
                weigh(a, at, gated, kept, weights + l * row, by);
                for (size j = 0; j < left; j += WIDTH) of_prefix += *(vec *)(by + j) * *(const vec *)(shares + j);
                for (size j = left; j < row; j += WIDTH) of_text += *(vec *)(by + j) * *(const vec *)(shares + j);
                float mean_prefix = total(of_prefix), mean_text = total(of_text), by_gated = mean_prefix - mean_text;
                float moved = by_gated * gated * (1 - share);
                for (size j = 0; j < row; j += WIDTH) {
                    vec own = j < left ? (*(vec *)(by + j) - mean_prefix) * gated + moved
                                       : (*(vec *)(by + j) - mean_text) * (1 - gated) - moved;
                    *(vec *)(by + j) = own * *(const vec *)(shares + j);
                }
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
    free(by_query), free(by_keys), free(by_values);
}
