/* What the C files here are made of: rows of float32 out of tensors of float32 or bfloat16 (`kind` 0 or 1) and back,
   products of small matrices in float32, and e^x. Vectors are as wide as the CPU's. */

#ifndef BHPEFT_SMALL_ROWS
#define BHPEFT_SMALL_ROWS

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#define BLOCK 16 /* tokens that are unpacked at once */
#define INLINE static inline __attribute__((always_inline))

typedef int64_t size;
typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

static size least(size a, size b) { return a < b ? a : b; }
static size padded(size n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }
static float *floats(size n) { return malloc((size_t)(n > 0 ? n : 1) * sizeof(float)); }

/* ---- rows of either kind from and to float32, of n numbers each, `ld` apart in float32 and zero behind n ---- */

INLINE float widen(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint16_t narrow(float value) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return value != value ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* By vectors: for rows as short as these a call of memcpy takes longer than the copy. */
INLINE void copy(const float *from, float *to, size n) {
    size i = 0;
    for (; i + WIDTH <= n; i += WIDTH) *(vec *)(to + i) = *(const vec *)(from + i);
    for (; i < n; i++) to[i] = from[i];
}

static void load(const void *from, size kind, size offset, size stride, size rows, size n, float *to, size ld) {
    for (size r = 0; r < rows; r++, to += ld) {
        const uint16_t *half = (const uint16_t *)from + offset + r * stride;
        if (kind)
            for (size i = 0; i < n; i++) to[i] = widen(half[i]);
        else
            copy((const float *)from + offset + r * stride, to, n);
        for (size i = n; i < ld; i++) to[i] = 0;
    }
}

static void store(const float *from, size ld, void *to, size kind, size offset, size stride, size rows, size n) {
    for (size r = 0; r < rows; r++, from += ld) {
        uint16_t *half = (uint16_t *)to + offset + r * stride;
        if (kind)
            for (size i = 0; i < n; i++) half[i] = narrow(from[i]);
        else
            copy(from, (float *)to + offset + r * stride, n);
    }
}

static void transpose(const float *from, size ld, size rows, size columns, float *to, size to_ld) {
    for (size c = 0; c < columns; c++, to += to_ld) {
        for (size r = 0; r < rows; r++) to[r] = from[r * ld + c];
        for (size r = rows; r < to_ld; r++) to[r] = 0;
    }
}

/* ---- products ---- */

INLINE void tile(const int rows, const int vecs, size k, const float *a, size row, size column, const float *b, size ldb,
                 float *c, size ldc, int add) {
    vec sum[4][3];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int v = 0; v < vecs; v++) sum[r][v] = add ? *(const vec *)(c + r * ldc + v * WIDTH) : (vec){0};
    for (size p = 0; p < k; p++, a += column, b += ldb)
#pragma GCC unroll 3
        for (int v = 0; v < vecs; v++) {
            vec right = *(const vec *)(b + v * WIDTH);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) sum[r][v] += a[r * row] * right;
        }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int v = 0; v < vecs; v++) *(vec *)(c + r * ldc + v * WIDTH) = sum[r][v];
}

/* C (m, n) = A (m, k) B (k, n), or C += A B: A[i][p] at a[i * row + p * column], n a multiple of WIDTH. */
static void product(size m, size n, size k, const float *a, size row, size column, const float *b, size ldb, float *c,
                    size ldc, int add) {
    for (size j = 0; j < n;) {
        size left = (n - j) / WIDTH, vecs = left == 4 ? 2 : least(3, left);
        for (size i = 0; i < m; i += 4) {
            const float *from = a + i * row;
            float *to = c + i * ldc + j;
#define TILE(rows, vecs) tile(rows, vecs, k, from, row, column, b + j, ldb, to, ldc, add)
#define ROWS(rows) (vecs == 3 ? TILE(rows, 3) : vecs == 2 ? TILE(rows, 2) : TILE(rows, 1))
            if (m - i >= 4)
                ROWS(4);
            else if (m - i == 3)
                ROWS(3);
            else if (m - i == 2)
                ROWS(2);
            else
                ROWS(1);
        }
        j += vecs * WIDTH;
    }
}

INLINE float total(vec v) {
    typedef float quad __attribute__((vector_size(16)));
    union {
        vec whole;
        quad parts[WIDTH / 4];
    } cut = {v};
    quad sum = cut.parts[0];
    for (int i = 1; i < WIDTH / 4; i++) sum += cut.parts[i];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

INLINE void dots_tile(const int rows, const int columns, size n, const float *x, size ldx, const float *w, size ldw,
                      float *y, size ldy) {
    vec sum[2][4] = {{{0}}};
    for (size i = 0; i < n; i += WIDTH)
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++) {
            vec right = *(const vec *)(w + c * ldw + i);
#pragma GCC unroll 2
            for (int r = 0; r < rows; r++) sum[r][c] += *(const vec *)(x + r * ldx + i) * right;
        }
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++) y[r * ldy + c] = total(sum[r][c]);
}

/* Y (rows, columns) = X W^T over n numbers a row, a multiple of WIDTH: for few columns. */
static void dots(size rows, size columns, size n, const float *x, size ldx, const float *w, size ldw, float *y,
                 size ldy) {
    for (size c = 0; c < columns;) {
        int taken = columns - c >= 4 ? 4 : columns - c >= 2 ? 2 : 1;
        for (size r = 0; r < rows;) {
            const float *left = x + r * ldx, *right = w + c * ldw;
            float *to = y + r * ldy + c;
            if (r + 2 <= rows) {
                if (taken == 4) dots_tile(2, 4, n, left, ldx, right, ldw, to, ldy);
                if (taken == 2) dots_tile(2, 2, n, left, ldx, right, ldw, to, ldy);
                if (taken == 1) dots_tile(2, 1, n, left, ldx, right, ldw, to, ldy);
                r += 2;
            } else {
                for (int i = 0; i < taken; i++) dots_tile(1, 1, n, left, ldx, right + i * ldw, ldw, to + i, ldy);
                r++;
            }
        }
        c += taken;
    }
}

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

#endif
