// The universal row form around its matrix product: what goes in, and what its rows come to.
//
//     y = (1 + c') * [ base + sum_j a_j * ((b_j * x) W0^T) + delta ] + sum_e g_e (x . p_e) q_e + bias + bias'
//
// Rows of a token lie together: token t owns rows first[t] .. first[t + 1]. Every token reads its own rows only.
// Page 0 is the null page: no scale, no change of the bias.

#include <vector>

#include "lanes.h"

namespace {

template <class T>
void stack_rows(const T* x, int64_t x_stride, int64_t inputs, const int64_t* base_token,
                int64_t base_tokens, const T* in_rows, const int64_t* row_token,
                const int64_t* row_page, int64_t rows, T* out) {
#pragma omp parallel for schedule(static) if (base_tokens + rows > 8)
    for (int64_t i = 0; i < base_tokens + rows; ++i) {
        T* to = out + i * inputs;
        if (i < base_tokens) {
            std::memcpy(to, x + (base_token ? base_token[i] : i) * x_stride, inputs * sizeof(T));
            continue;
        }
        const T* from = x + row_token[i - base_tokens] * x_stride;
        const T* b = in_rows + row_page[i - base_tokens] * inputs;
#pragma omp simd
        for (int64_t k = 0; k < inputs; ++k) store(to[k], load(from[k]) * load(b[k]));
    }
}

// Everything that makes one token's outputs; null pointers where the token has nothing of the kind.
template <class T>
struct TokenParts {
    const T* base;
    const T* z;  // of its first mul row
    int64_t z_stride, outputs, num_mul, num_add;
    const int64_t* mul_page;
    const T* delta;
    const T* scale;
    const int64_t* add_page;
    const float* add_weight;
    const T* bias;
    const T* bias_change;
    const T* out_rows;

    // One vector of lanes, or one number, of the outputs.
    template <class V>
    void write(int64_t o, T* y) const {
        V sum = {}, left, right;
        if (base) fetch(sum, base + o);
        for (int64_t j = 0; j < num_mul; ++j) {
            fetch(left, z + j * z_stride + o);
            fetch(right, out_rows + mul_page[j] * outputs + o);
            sum += left * right;
        }
        if (delta) fetch(left, delta + o), sum += left;
        if (scale) fetch(left, scale + o), sum += sum * left;
        for (int64_t e = 0; e < num_add; ++e) {
            fetch(left, out_rows + add_page[e] * outputs + o);
            sum += add_weight[e] * left;
        }
        if (bias) fetch(left, bias + o), sum += left;
        if (bias_change) fetch(left, bias_change + o), sum += left;
        put(y + o, sum);
    }
};

template <class T>
void combine_rows(int64_t tokens, int64_t inputs, int64_t outputs, const T* z, int64_t z_stride,
                  const int64_t* base_row, const int64_t* mul_first, int64_t mul_row0,
                  const int64_t* mul_page, const T* delta, const int64_t* delta_row,
                  const int64_t* scale_page, const T* x, int64_t x_stride, const int64_t* add_first,
                  const int64_t* add_in_page, const int64_t* add_out_page, const float* add_gate,
                  const T* bias, const int64_t* bias_page, const T* in_rows, const T* out_rows, T* y,
                  int64_t y_stride) {
#pragma omp parallel for schedule(static) if (tokens > 4)
    for (int64_t t = 0; t < tokens; ++t) {
        int64_t base = base_row ? base_row[t] : t;
        int64_t add_begin = add_first ? add_first[t] : 0;
        TokenParts<T> parts = {};
        parts.base = base >= 0 ? z + base * z_stride : nullptr;
        parts.z_stride = z_stride;
        parts.outputs = outputs;
        parts.out_rows = out_rows;
        if (mul_first) {
            parts.num_mul = mul_first[t + 1] - mul_first[t];
            parts.z = z + (mul_row0 + mul_first[t]) * z_stride;
            parts.mul_page = mul_page + mul_first[t];
        }
        if (delta_row && delta_row[t] >= 0) parts.delta = delta + delta_row[t] * outputs;
        if (scale_page && scale_page[t]) parts.scale = out_rows + scale_page[t] * outputs;
        parts.bias = bias;
        if (bias_page && bias_page[t]) parts.bias_change = out_rows + bias_page[t] * outputs;
        thread_local std::vector<float> weights;
        if (add_first) {
            parts.num_add = add_first[t + 1] - add_begin;
            weights.resize(parts.num_add);
            for (int64_t e = 0; e < parts.num_add; ++e)
                weights[e] = add_gate[add_begin + e] *
                             dot(x + t * x_stride, in_rows + add_in_page[add_begin + e] * inputs, inputs);
            parts.add_weight = weights.data();
            parts.add_page = add_out_page + add_begin;
        }
        T* to = y + t * y_stride;
        int64_t whole = outputs / LANES * LANES;
        for (int64_t o = 0; o < whole; o += LANES) parts.template write<Lanes>(o, to);
        for (int64_t o = whole; o < outputs; ++o) parts.template write<float>(o, to);
    }
}

}  // namespace

#define EXPORT(T, suffix)                                                                          \
    extern "C" void stack_rows_##suffix(                                                           \
        const T* x, int64_t x_stride, int64_t inputs, const int64_t* base_token,                   \
        int64_t base_tokens, const T* in_rows, const int64_t* row_token, const int64_t* row_page,  \
        int64_t rows, T* out) {                                                                    \
        stack_rows(x, x_stride, inputs, base_token, base_tokens, in_rows, row_token, row_page,     \
                   rows, out);                                                                     \
    }                                                                                              \
    extern "C" void combine_rows_##suffix(                                                         \
        int64_t tokens, int64_t inputs, int64_t outputs, const T* z, int64_t z_stride,             \
        const int64_t* base_row, const int64_t* mul_first, int64_t mul_row0,                       \
        const int64_t* mul_page, const T* delta, const int64_t* delta_row,                         \
        const int64_t* scale_page, const T* x, int64_t x_stride, const int64_t* add_first,         \
        const int64_t* add_in_page, const int64_t* add_out_page, const float* add_gate,            \
        const T* bias, const int64_t* bias_page, const T* in_rows, const T* out_rows, T* y,        \
        int64_t y_stride) {                                                                        \
        combine_rows(tokens, inputs, outputs, z, z_stride, base_row, mul_first, mul_row0,          \
                     mul_page, delta, delta_row, scale_page, x, x_stride, add_first, add_in_page,  \
                     add_out_page, add_gate, bias, bias_page, in_rows, out_rows, y, y_stride);     \
    }

EXPORT(float, f32)
EXPORT(bf16, bf16)
