// The universal row form around its matrix product: what goes in, and what its rows come to.
//
//     y = (1 + c') * [ base + sum_j a_j * ((b_j * x) W0^T) + delta ] + sum_e g_e (x . p_e) q_e + bias + bias'
//
// Rows of a token lie together: token t owns rows first[t] .. first[t + 1]. Every token reads its own rows only.
// Page 0 is the null page: no scale, no change of the bias.

#include <vector>

#include "lanes.h"

namespace {

// What one layer's loops need of one step that does not change while the same sequences decode. Null pointers where
// the step has nothing of the kind. Python writes the same fields (`row_loops.py`).
template <class T>
struct LayerStep {
    int64_t tokens, inputs, outputs;
    int64_t base_tokens;         // rows of the product that are tokens themselves, the first ones
    const int64_t* base_token;   // which; null: all, in order
    const int64_t* base_row;     // a token's row among them, or -1; null: its own number
    int64_t mul_rows;
    const int64_t *mul_first, *mul_token, *mul_in_page, *mul_out_page;
    const int64_t* delta_row;    // a token's row in weight mode's results, or -1
    const int64_t *scale_page, *bias_page;
    const int64_t *add_first, *add_in_page, *add_out_page;
    const float* add_gate;
    const T *bias, *in_rows, *out_rows;
};

template <class T>
void stack_rows(const LayerStep<T>& step, const T* x, int64_t x_stride, T* out) {
    int64_t rows = step.base_tokens + step.mul_rows;
#pragma omp parallel for schedule(static) if (rows > 8)
    for (int64_t i = 0; i < rows; ++i) {
        T* to = out + i * step.inputs;
        if (i < step.base_tokens) {
            int64_t token = step.base_token ? step.base_token[i] : i;
            std::memcpy(to, x + token * x_stride, step.inputs * sizeof(T));
            continue;
        }
        int64_t j = i - step.base_tokens;
        const T* from = x + step.mul_token[j] * x_stride;
        const T* b = step.in_rows + step.mul_in_page[j] * step.inputs;
#pragma omp simd
        for (int64_t k = 0; k < step.inputs; ++k) store(to[k], load(from[k]) * load(b[k]));
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
void combine_rows(const LayerStep<T>& step, const T* x, int64_t x_stride, const T* z,
                  int64_t z_stride, const T* delta, T* y, int64_t y_stride) {
    int64_t outputs = step.outputs;
#pragma omp parallel for schedule(static) if (step.tokens > 4)
    for (int64_t t = 0; t < step.tokens; ++t) {
        int64_t base = step.base_row ? step.base_row[t] : t;
        TokenParts<T> parts = {};
        parts.base = base >= 0 ? z + base * z_stride : nullptr;
        parts.z_stride = z_stride;
        parts.outputs = outputs;
        parts.out_rows = step.out_rows;
        parts.bias = step.bias;
        if (step.mul_first) {
            int64_t first = step.mul_first[t];
            parts.num_mul = step.mul_first[t + 1] - first;
            parts.z = z + (step.base_tokens + first) * z_stride;
            parts.mul_page = step.mul_out_page + first;
        }
        if (step.delta_row && step.delta_row[t] >= 0) parts.delta = delta + step.delta_row[t] * outputs;
        if (step.scale_page && step.scale_page[t])
            parts.scale = step.out_rows + step.scale_page[t] * outputs;
        if (step.bias_page && step.bias_page[t])
            parts.bias_change = step.out_rows + step.bias_page[t] * outputs;
        thread_local std::vector<float> weights;
        if (step.add_first) {
            int64_t first = step.add_first[t];
            parts.num_add = step.add_first[t + 1] - first;
            weights.resize(parts.num_add);
            for (int64_t e = 0; e < parts.num_add; ++e)
                weights[e] = step.add_gate[first + e] *
                             dot(x + t * x_stride,
                                 step.in_rows + step.add_in_page[first + e] * step.inputs, step.inputs);
            parts.add_weight = weights.data();
            parts.add_page = step.add_out_page + first;
        }
        T* to = y + t * y_stride;
        int64_t whole = outputs / LANES * LANES;
        for (int64_t o = 0; o < whole; o += LANES) parts.template write<Lanes>(o, to);
        for (int64_t o = whole; o < outputs; ++o) parts.template write<float>(o, to);
    }
}

}  // namespace

#define EXPORT(T, suffix)                                                                          \
    extern "C" void stack_rows_##suffix(const LayerStep<T>* step, const T* x, int64_t x_stride,    \
                                        T* out) {                                                  \
        stack_rows(*step, x, x_stride, out);                                                       \
    }                                                                                              \
    extern "C" void combine_rows_##suffix(const LayerStep<T>* step, const T* x, int64_t x_stride,  \
                                          const T* z, int64_t z_stride, const T* delta, T* y,      \
                                          int64_t y_stride) {                                      \
        combine_rows(*step, x, x_stride, z, z_stride, delta, y, y_stride);                         \
    }

EXPORT(float, f32)
EXPORT(bf16, bf16)
