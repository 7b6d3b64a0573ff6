// The small steps between a decoder's matrix products, each in one pass over its numbers.

#include <cmath>

#include "numbers.h"

namespace {

// residual += x (where there is an x), y = residual / rms(residual) * weight. The residual is rounded before it is
// normed, and the normed value before it is weighted, as transformers' Llama does.
template <class T>
void add_rms_norm(T* residual, const T* x, const T* weight, float epsilon, int64_t tokens,
                  int64_t features, T* y) {
#pragma omp parallel for schedule(static) if (tokens > 8)
    for (int64_t t = 0; t < tokens; ++t) {
        T* r = residual + t * features;
        float squares = 0;
        if (x) {
            const T* added = x + t * features;
#pragma omp simd
            for (int64_t k = 0; k < features; ++k) store(r[k], load(r[k]) + load(added[k]));
        }
#pragma omp simd reduction(+ : squares)
        for (int64_t k = 0; k < features; ++k) squares += load(r[k]) * load(r[k]);
        float scale = 1.0f / std::sqrt(squares / float(features) + epsilon);
        T* to = y + t * features;
#pragma omp simd
        for (int64_t k = 0; k < features; ++k) {
            store(to[k], load(r[k]) * scale);
            store(to[k], load(to[k]) * load(weight[k]));
        }
    }
}

// y = silu(gate) * up; the two halves of x, which may be one row of a fused product or two.
template <class T>
void silu_mul(const T* gate, const T* up, int64_t stride, int64_t tokens, int64_t features, T* y) {
#pragma omp parallel for schedule(static) if (tokens > 4)
    for (int64_t t = 0; t < tokens; ++t) {
        const T* g = gate + t * stride;
        const T* u = up + t * stride;
        T* to = y + t * features;
#pragma omp simd
        for (int64_t k = 0; k < features; ++k) {
            float value = load(g[k]);
            float small = exp_of_negative(-std::fabs(value));
            float sigmoid = (value < 0 ? small : 1.0f) / (1.0f + small);
            store(to[k], value * sigmoid);
            store(to[k], load(to[k]) * load(u[k]));
        }
    }
}

// Rotates heads in place: a head's first half is its real part. Tables: [positions, size / 2].
template <class T>
void rotate(T* x, int64_t stride, int64_t heads, int64_t size, const T* cosine, const T* sine,
            const int64_t* position, int64_t tokens) {
    int64_t half = size / 2;
#pragma omp parallel for schedule(static) if (tokens > 8)
    for (int64_t t = 0; t < tokens; ++t) {
        const T* c = cosine + position[t] * half;
        const T* s = sine + position[t] * half;
        for (int64_t h = 0; h < heads; ++h) {
            T* head = x + t * stride + h * size;
#pragma omp simd
            for (int64_t k = 0; k < half; ++k) {
                float real = load(head[k]), imaginary = load(head[k + half]);
                store(head[k], real * load(c[k]) - imaginary * load(s[k]));
                store(head[k + half], imaginary * load(c[k]) + real * load(s[k]));
            }
        }
    }
}

// The greatest of each row and its first place; -1 for a row with a value that is not finite.
template <class T>
void greatest(const T* rows, int64_t num_rows, int64_t columns, int64_t* place) {
    constexpr int64_t BLOCK = 1024;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < num_rows; ++i) {
        const T* row = rows + i * columns;
        float highest = -INFINITY, doubt = 0;
        int64_t block = 0;
        for (int64_t start = 0; start < columns; start += BLOCK) {
            int64_t stop = start + BLOCK < columns ? start + BLOCK : columns;
            float best = -INFINITY;
#pragma omp simd reduction(max : best) reduction(+ : doubt)
            for (int64_t k = start; k < stop; ++k) {
                float value = load(row[k]);
                best = value > best ? value : best;
                doubt += value - value;  // NaN for what is not finite, else 0
            }
            if (best > highest) {
                highest = best;
                block = start;
            }
        }
        place[i] = -1;
        for (int64_t k = block; k < columns && doubt == 0; ++k)
            if (load(row[k]) == highest) {
                place[i] = k;
                break;
            }
    }
}

}  // namespace

#define EXPORT(T, suffix)                                                                          \
    extern "C" void add_rms_norm_##suffix(T* residual, const T* x, const T* weight, double epsilon, \
                                          int64_t tokens, int64_t features, T* y) {                \
        add_rms_norm(residual, x, weight, float(epsilon), tokens, features, y);                    \
    }                                                                                              \
    extern "C" void silu_mul_##suffix(const T* gate, const T* up, int64_t stride, int64_t tokens,  \
                                      int64_t features, T* y) {                                    \
        silu_mul(gate, up, stride, tokens, features, y);                                           \
    }                                                                                              \
    extern "C" void rotate_##suffix(T* x, int64_t stride, int64_t heads, int64_t size,             \
                                    const T* cosine, const T* sine, const int64_t* position,       \
                                    int64_t tokens) {                                              \
        rotate(x, stride, heads, size, cosine, sine, position, tokens);                            \
    }                                                                                              \
    extern "C" void greatest_##suffix(const T* rows, int64_t num_rows, int64_t columns,            \
                                      int64_t* place) {                                            \
        greatest(rows, num_rows, columns, place);                                                  \
    }

EXPORT(float, f32)
EXPORT(bf16, bf16)
