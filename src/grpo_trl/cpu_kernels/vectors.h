// Vectors of 16 floats, in registers of whatever width there is.

#pragma once

#include <cstdint>

constexpr int LANES = 16;
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef double Pairs __attribute__((vector_size(4 * LANES)));

inline Vector load(const float *from) { return *(const Unaligned *)from; }
inline void store(Vector x, float *to) { *(Unaligned *)to = x; }

inline Vector exponential(Vector x) {
    const Vector least = Vector{} - 87.3f, most = Vector{} + 88.3f, rounder = Vector{} + 0x1.8p23f;
    x = x < least ? least : x > most ? most : x;
    const Vector rounded = x * 1.44269504f + rounder;  // its last bits are an integer
    const Vector n = rounded - rounder;
    const Vector r = x - n * 0.693359375f - n * -2.12194440e-4f;
    Vector y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return (Vector)((Integers)y + ((Integers)rounded << 23));
}
