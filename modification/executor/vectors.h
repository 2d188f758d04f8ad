// Vectors of floats, and numbers of 16 bits: what all kernels are written in.

#pragma once

#include <cstdint>
#include <cstring>

#define UNROLL _Pragma("GCC unroll 8")  // sums must stay in registers

namespace {

// A vector is what the processor has registers for: compilers take wider ones apart, and through memory.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

using vec = float __attribute__((vector_size(4 * LANES)));
using ints = int32_t __attribute__((vector_size(4 * LANES)));
using words = uint32_t __attribute__((vector_size(4 * LANES)));
using halves = uint16_t __attribute__((vector_size(2 * LANES)));
struct bf16 { uint16_t bits; };

inline vec load(const float* p) { vec v; std::memcpy(&v, p, sizeof v); return v; }
inline vec load(const bf16* p) {
    halves h; std::memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, words) << 16);
}
inline float read(const float* p) { return *p; }
inline float read(const bf16* p) { uint32_t w = (uint32_t)p->bits << 16; float f; std::memcpy(&f, &w, 4); return f; }
inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
inline void write(float* p, float f) { *p = f; }
inline void write(bf16* p, float f) {  // round to nearest even, as torch does
    uint32_t w; std::memcpy(&w, &f, 4);
    p->bits = f == f ? (uint16_t)((w + 0x7FFF + ((w >> 16) & 1)) >> 16) : (uint16_t)0x7FC0;
}

inline float sum(vec v) {
    using quarter = float __attribute__((vector_size(16)));
    quarter q[LANES / 4]; std::memcpy(q, &v, sizeof v);
    UNROLL for (int half = LANES / 8; half > 0; half /= 2)
        UNROLL for (int i = 0; i < half; ++i) q[i] += q[i + half];
    return (q[0][0] + q[0][2]) + (q[0][1] + q[0][3]);
}

inline vec all(float f) { return f - vec{}; }

// e^x for x <= 88: 2^n times a polynomial on [-0.5, 0.5] ln 2; relative error below 2e-7.
inline vec exponential(vec x) {
    x = x < -87.0f ? all(-87.0f) : x;
    const ints whole = __builtin_convertvector(x * 1.44269504f + (x < 0.0f ? all(-0.5f) : all(0.5f)), ints);
    const vec n = __builtin_convertvector(whole, vec);
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec y = all(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return (vec)((ints)y + (whole << 23));
}

struct Span { int64_t from, to; };
inline Span share(int64_t total, int thread, int threads) {
    return {total * thread / threads, total * (thread + 1) / threads};
}

}  // namespace
