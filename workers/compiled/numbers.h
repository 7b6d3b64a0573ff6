// Numbers as the loops of this folder see them: stored as float or bfloat16, computed in float.
#pragma once

#include <cstdint>
#include <cstring>

struct bf16 {
    uint16_t bits;
};

inline float load(float value) { return value; }

inline float load(bf16 value) {
    uint32_t wide = uint32_t(value.bits) << 16;
    float result;
    std::memcpy(&result, &wide, sizeof result);
    return result;
}

inline void store(float& place, float value) { place = value; }

// To nearest, ties to even, as torch rounds; a NaN stays one.
inline void store(bf16& place, float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    uint32_t rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
    place.bits = value != value ? uint16_t(0x7fc0) : uint16_t(rounded);
}

// e^x for x <= 0 to within 2 ulp, in a form compilers vectorise; Cephes' polynomial. NaN and -inf give NaN.
inline float exp_of_negative(float x) {
    float clamped = x > -87.0f ? x : -87.0f;
    int32_t whole = int32_t(clamped * 1.44269504088896341f - 0.5f);
    float rest = clamped - float(whole) * 0.693359375f + float(whole) * 2.12194440e-4f;
    float series = 1.9875691500e-4f;
    series = series * rest + 1.3981999507e-3f;
    series = series * rest + 8.3334519073e-3f;
    series = series * rest + 4.1665795894e-2f;
    series = series * rest + 1.6666665459e-1f;
    series = series * rest + 5.0000001201e-1f;
    float mantissa = series * rest * rest + rest + 1.0f;
    int32_t exponent = (whole + 127) * (1 << 23);
    float power;
    std::memcpy(&power, &exponent, sizeof power);
    return mantissa * power + (x - x);
}
