// The row form's mul rows around their two matrix products in training: forward, and the backward written by hand.
//
//     y = base + sum_j a_j * z_j,      z_j = (b_j * x) W0^T
//     dx = G W0 + sum_j b_j * h_j,     h_j = (a_j * G) W0,     da = sum_t G * z,     db = sum_t x * h
//
// Rows of a token lie together: token t owns rows first[t] .. first[t + 1], and reads no other's.

#include <omp.h>

#include <algorithm>

#include "lanes.h"

namespace {

// One layer in one step; Python writes the same fields (`trained_rows.py`).
struct TrainedStep {
    int64_t tokens, inputs, outputs;
    int64_t base_tokens;         // rows of the product that are tokens themselves, the first ones
    const int64_t* base_token;   // which; null: all, in order
    const int64_t* base_row;     // a token's row among them, or -1; null: its own number
    int64_t mul_rows;
    const int64_t *first, *token, *in_page, *out_page;
    const float *in_rows, *out_rows;

    int64_t token_of(int64_t row) const { return base_token ? base_token[row] : row; }
    int64_t row_of(int64_t token_) const { return base_row ? base_row[token_] : token_; }
};

// A thread has some columns of all rows, so that every sum is one thread's, in the order of the rows: the same to the
// bit whatever the number of threads and whoever else is in the step.
template <class Work>
void by_columns(int64_t columns, const Work& work) {
    int64_t threads = omp_get_max_threads();
    int64_t block = ((columns + threads - 1) / threads + LANES - 1) / LANES * LANES;
#pragma omp parallel for schedule(static) if (threads > 1)
    for (int64_t from = 0; from < columns; from += block)
        work(from, std::min(from + block, columns));
}

// Whole lanes first, then number by number.
template <class Each>
void each_column(int64_t from, int64_t to, const Each& each) {
    int64_t whole = from + (to - from) / LANES * LANES;
    for (int64_t k = from; k < whole; k += LANES) each(k, Lanes{});
    for (int64_t k = whole; k < to; ++k) each(k, 0.0f);
}

template <class T>
void copy(const T* from, T* to, int64_t begin, int64_t end) {
    std::memcpy(to + begin, from + begin, (end - begin) * sizeof(T));
}

// Columns of the tokens that need the base product, then of x_t * rows[page_j] for every mul row.
template <class T>
void stack(const TrainedStep& step, const T* x, const float* rows, const int64_t* page,
           int64_t columns, int64_t from, int64_t to, T* out) {
    for (int64_t i = 0; i < step.base_tokens; ++i)
        copy(x + step.token_of(i) * columns, out + i * columns, from, to);
    for (int64_t j = 0; j < step.mul_rows; ++j) {
        const T* one = x + step.token[j] * columns;
        const float* scale = rows + page[j] * columns;
        T* row = out + (step.base_tokens + j) * columns;
        each_column(from, to, [&](int64_t k, auto left) {
            auto right = left;
            fetch(left, one + k), fetch(right, scale + k);
            put(row + k, left * right);
        });
    }
}

template <class T>
void stack_inputs(const TrainedStep& step, const T* x, T* out) {
    by_columns(step.inputs, [&](int64_t from, int64_t to) {
        stack(step, x, step.in_rows, step.in_page, step.inputs, from, to, out);
    });
}

// What every token's rows come to: first[row_of(t)] + sum_j rows[page_j] * parts[j]. `y` may be `parts` itself.
template <class T, class Y>
void sum_rows(const TrainedStep& step, const T* parts, const float* rows, const int64_t* page,
              int64_t columns, Y* y) {
    by_columns(columns, [&](int64_t from, int64_t to) {
        for (int64_t t = 0; t < step.tokens; ++t) {
            int64_t base = step.row_of(t);
            each_column(from, to, [&](int64_t k, auto sum) {
                auto left = sum, right = sum;
                if (base >= 0) fetch(sum, parts + base * columns + k);
                for (int64_t j = step.first[t]; j < step.first[t + 1]; ++j) {
                    fetch(left, parts + (step.base_tokens + j) * columns + k);
                    fetch(right, rows + page[j] * columns + k);
                    sum += left * right;
                }
                put(y + t * columns + k, sum);
            });
        }
    });
}

// sums[page_j] += left[token_j] * right[j]
template <class T>
void add_to_pages(const TrainedStep& step, const T* left, const T* right, const int64_t* page,
                  int64_t columns, int64_t from, int64_t to, float* sums) {
    for (int64_t j = 0; j < step.mul_rows; ++j) {
        const T* one = left + step.token[j] * columns;
        const T* other = right + j * columns;
        float* sum = sums + page[j] * columns;
        each_column(from, to, [&](int64_t k, auto a) {
            auto b = a, so_far = a;
            fetch(a, one + k), fetch(b, other + k), fetch(so_far, sum + k);
            put(sum + k, so_far + a * b);
        });
    }
}

// Gradients of the outputs, stacked as the inputs were, and da. `z`: of the mul rows.
template <class T>
void stack_gradients(const TrainedStep& step, const T* gradient, const T* z, T* out, float* da) {
    int64_t outputs = step.outputs;
    by_columns(outputs, [&](int64_t from, int64_t to) {
        stack(step, gradient, step.out_rows, step.out_page, outputs, from, to, out);
        add_to_pages(step, gradient, z, step.out_page, outputs, from, to, da);
    });
}

// db, and dx over `h`'s first rows or elsewhere.
template <class T>
void finish_gradients(const TrainedStep& step, const T* x, const T* h, T* dx, float* db) {
    int64_t inputs = step.inputs;
    by_columns(inputs, [&](int64_t from, int64_t to) {
        add_to_pages(step, x, h + step.base_tokens * inputs, step.in_page, inputs, from, to, db);
    });
    sum_rows(step, h, step.in_rows, step.in_page, inputs, dx);
}

}  // namespace

#define EXPORT(T, suffix)                                                                         \
    extern "C" void stack_inputs_##suffix(const TrainedStep* step, const T* x, T* out) {          \
        stack_inputs(*step, x, out);                                                              \
    }                                                                                             \
    extern "C" void sum_outputs_##suffix(const TrainedStep* step, const T* z, T* y) {             \
        sum_rows(*step, z, step->out_rows, step->out_page, step->outputs, y);                     \
    }                                                                                             \
    extern "C" void sum_outputs_wide_##suffix(const TrainedStep* step, const T* z, float* y) {    \
        sum_rows(*step, z, step->out_rows, step->out_page, step->outputs, y);                     \
    }                                                                                             \
    extern "C" void stack_gradients_##suffix(const TrainedStep* step, const T* gradient,          \
                                             const T* z, T* out, float* da) {                     \
        stack_gradients(*step, gradient, z, out, da);                                             \
    }                                                                                             \
    extern "C" void finish_gradients_##suffix(const TrainedStep* step, const T* x, const T* h,    \
                                              T* dx, float* db) {                                 \
        finish_gradients(*step, x, h, dx, db);                                                    \
    }

EXPORT(float, f32)
EXPORT(bf16, bf16)
