// Slabs of keys and values, [slots, kv_heads, max_tokens, size]: writing new ones, and attention of one new token per
// sequence over its slab.

#include <cmath>
#include <vector>

#include "lanes.h"

namespace {

// Lane i of the result is the sum of the lanes of rows[i]. Overwrites the rows.
inline Lanes sum_each(Lanes* rows) {
    const WideBits even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    for (int count = LANES; count > 1; count /= 2)
        for (int i = 0; i < count; i += 2)
            rows[i / 2] = __builtin_shuffle(rows[i], rows[i + 1], even) +
                          __builtin_shuffle(rows[i], rows[i + 1], even + 1);
    return rows[0];
}

// scores[g][l] = scale * q_g . k_l; a row of scores has room for whole lanes.
template <class T>
void score(const T* query, const T* keys, int64_t group, int64_t seen, int64_t size, float scale,
           float* scores, int64_t room) {
    for (int64_t l = 0; l < seen; l += LANES)
        for (int64_t g = 0; g < group; ++g) {
            Lanes part[LANES] = {};
            int64_t some = seen - l < LANES ? seen - l : LANES;
            if (some == LANES)
                for (int i = 0; i < LANES; ++i)
                    part[i] = partial_dot(query + g * size, keys + (l + i) * size, size);
            else
                for (int i = 0; i < some; ++i)
                    part[i] = partial_dot(query + g * size, keys + (l + i) * size, size);
            *(Lanes*)(scores + g * room + l) = sum_each(part) * scale;
        }
}

void softmax(float* scores, int64_t seen) {
    float highest = -INFINITY, total = 0;
#pragma omp simd reduction(max : highest)
    for (int64_t l = 0; l < seen; ++l) highest = scores[l] > highest ? scores[l] : highest;
#pragma omp simd reduction(+ : total)
    for (int64_t l = 0; l < seen; ++l) {
        scores[l] = exp_of_negative(scores[l] - highest);
        total += scores[l];
    }
#pragma omp simd
    for (int64_t l = 0; l < seen; ++l) scores[l] /= total;
}

// out_g = sum_l scores[g][l] v_l for G query heads, two vectors of lanes at a time.
template <int G, class T>
void weigh(const float* scores, int64_t room, const T* values, int64_t seen, int64_t size, T* out) {
    for (int64_t d = 0; d < size; d += 2 * LANES) {
        Lanes low[G] = {}, high[G] = {};
        for (int64_t l = 0; l < seen; ++l) {
            Lanes first, second;
            fetch(first, values + l * size + d);
            fetch(second, values + l * size + d + LANES);
            for (int g = 0; g < G; ++g) {
                low[g] += scores[g * room + l] * first;
                high[g] += scores[g * room + l] * second;
            }
        }
        for (int g = 0; g < G; ++g) {
            put(out + g * size + d, low[g]);
            put(out + g * size + d + LANES, high[g]);
        }
    }
}

// Query heads that share a key/value head are computed together, so its keys and values are read from memory once.
// Query and out: [tokens, heads, size], size a multiple of 32; cache: [slots, kv_heads, max_tokens, size].
template <class T>
void attend(const T* query, int64_t query_stride, const int64_t* token, const int64_t* slot,
            const int64_t* length, int64_t sequences, int64_t heads, int64_t kv_heads, int64_t size,
            const T* keys, const T* values, int64_t max_tokens, float scale, T* out,
            int64_t out_stride) {
    int64_t group = heads / kv_heads;
#pragma omp parallel for schedule(dynamic, 4)
    for (int64_t i = 0; i < sequences * kv_heads; ++i) {
        int64_t n = i / kv_heads, h = i % kv_heads, seen = length[n];
        int64_t room = (seen + LANES - 1) / LANES * LANES;
        const T* k = keys + (slot[n] * kv_heads + h) * max_tokens * size;
        const T* v = values + (slot[n] * kv_heads + h) * max_tokens * size;
        const T* q = query + token[n] * query_stride + h * group * size;
        T* to = out + token[n] * out_stride + h * group * size;
        thread_local std::vector<float> scores;
        scores.resize(group * room);
        score(q, k, group, seen, size, scale, scores.data(), room);
        for (int64_t g = 0; g < group; ++g) softmax(scores.data() + g * room, seen);
        for (int64_t g = 0; g < group;) {
            const float* from = scores.data() + g * room;
            int64_t left = group - g;
            if (left >= 4) weigh<4>(from, room, v, seen, size, to + g * size), g += 4;
            else if (left == 3) weigh<3>(from, room, v, seen, size, to + g * size), g += 3;
            else if (left == 2) weigh<2>(from, room, v, seen, size, to + g * size), g += 2;
            else weigh<1>(from, room, v, seen, size, to + g * size), g += 1;
        }
    }
}

template <class T>
void keep(const T* key, int64_t key_stride, const T* value, int64_t value_stride, int64_t kv_heads,
          int64_t size, const int64_t* slot, const int64_t* position, int64_t tokens, T* keys,
          T* values, int64_t max_tokens) {
#pragma omp parallel for schedule(static) if (tokens > 16)
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < kv_heads; ++h) {
            int64_t place = ((slot[t] * kv_heads + h) * max_tokens + position[t]) * size;
            std::memcpy(keys + place, key + t * key_stride + h * size, size * sizeof(T));
            std::memcpy(values + place, value + t * value_stride + h * size, size * sizeof(T));
        }
}

}  // namespace

#define EXPORT(T, suffix)                                                                          \
    extern "C" void attend_##suffix(                                                               \
        const T* query, int64_t query_stride, const int64_t* token, const int64_t* slot,           \
        const int64_t* length, int64_t sequences, int64_t heads, int64_t kv_heads, int64_t size,   \
        const T* keys, const T* values, int64_t max_tokens, double scale, T* out,                  \
        int64_t out_stride) {                                                                      \
        attend(query, query_stride, token, slot, length, sequences, heads, kv_heads, size, keys,   \
               values, max_tokens, float(scale), out, out_stride);                                 \
    }                                                                                              \
    extern "C" void keep_##suffix(                                                                 \
        const T* key, int64_t key_stride, const T* value, int64_t value_stride, int64_t kv_heads,  \
        int64_t size, const int64_t* slot, const int64_t* position, int64_t tokens, T* keys,       \
        T* values, int64_t max_tokens) {                                                           \
        keep(key, key_stride, value, value_stride, kv_heads, size, slot, position, tokens, keys,   \
             values, max_tokens);                                                                  \
    }

EXPORT(float, f32)
EXPORT(bf16, bf16)
