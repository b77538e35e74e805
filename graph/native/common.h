// What every path shares: numbers of 16 bits, threads, and what a kernel is given.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "interface.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sparsepass {

constexpr int64_t kGroup = 128;  // columns of x that share a scale where x is rounded to bytes

inline int64_t ceil_div(int64_t number, int64_t by) { return (number + by - 1) / by; }
inline bool is_avx512(int path) { return path == kAvx512 || path == kAmx; }  // in layout, and with few tokens in all
inline bool is_integer(int kind) { return kind == kInt8 || kind == kInt4; }

// ---- Numbers ----

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen_bf16(uint16_t word) { return from_bits(static_cast<uint32_t>(word) << 16); }

inline uint16_t round_bf16(float value) {
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);  // not a number, and stays one
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float widen_fp16(uint16_t word) {
  const uint32_t sign = static_cast<uint32_t>(word & 0x8000) << 16, rest = word & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x400) return from_bits(sign | ((rest << 13) + (112u << 23)));
  const float small = static_cast<float>(rest) * 5.9604644775390625e-8f;  // subnormal: steps of 2^-24
  return from_bits(sign | to_bits(small));
}

inline uint16_t round_fp16(float value) {
  const uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (rest >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (rest < 0x38800000) return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(from_bits(rest) * 16777216.f)));
  return static_cast<uint16_t>(sign | (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13);
}

inline float widen(bool is_fp16, uint16_t word) { return is_fp16 ? widen_fp16(word) : widen_bf16(word); }
inline uint16_t round_word(bool is_fp16, float value) { return is_fp16 ? round_fp16(value) : round_bf16(value); }

// ---- Threads ----

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
inline GompParallel gomp_parallel = nullptr;

// Calls work(first, last) on parts of the rows, each a multiple of `multiple` but the last.
//
// torch's OpenMP runtime runs them where its entry point was handed over: of two pools that both wait actively, each would take the
// other's processors.
template <class Work>
void in_parts(int64_t rows, int64_t multiple, int threads, const Work& work) {
  const int64_t units = ceil_div(rows, multiple);
  const int64_t team = std::max<int64_t>(1, std::min<int64_t>(threads, units));
  std::atomic<int64_t> next{0};
  // Each takes a part of what is left: long runs first, which memory gives faster, and short ones at the end, so that nobody waits for
  // one whom the system interrupts.
  auto take = [&] {
    for (int64_t first = next.load(); first < units;) {
      const int64_t count = team == 1 ? units : std::max<int64_t>(1, (units - first) / (2 * team));
      if (!next.compare_exchange_weak(first, first + count)) continue;
      work(first * multiple, std::min(rows, (first + count) * multiple));
      first = next.load();
    }
  };
  using Take = decltype(take);
  if (team == 1) {
    take();
  } else if (gomp_parallel != nullptr) {
    gomp_parallel([](void* data) { (*static_cast<Take*>(data))(); }, &take, static_cast<unsigned>(team), 0);
  } else {
    std::vector<std::thread> others;
    for (int64_t i = 1; i < team; i++) others.emplace_back(take);
    take();
    for (auto& other : others) other.join();
  }
}

// ---- What a kernel is given ----

struct Product {
  const SparsepassWeight* weight;
  const uint8_t* x;       // [tokens, x_bytes]: words of the weight's kind, or bytes; zeros beyond the columns
  const float* x_scales;  // [tokens, x_groups]; integers only
  const uint8_t* sums;    // [tokens, sums_bytes]: those of the branch, as words; null if there is none
  int64_t x_bytes, x_groups, sums_bytes;
  float* y;               // [tokens, y_rows]
  int64_t y_rows;
  bool x_is_signed;       // bytes; else they are x + 128
  bool fetches_ahead;     // see fetches_ahead()

  // From a token on.
  Product from(int64_t token) const {
    Product p = *this;
    p.x += token * x_bytes;
    if (x_scales != nullptr) p.x_scales += token * x_groups;
    if (sums != nullptr) p.sums += token * sums_bytes;
    p.y += token * y_rows;
    return p;
  }
};

// Whether kernels ask for bytes that they will need soon. Intel's processors are slow without it. AMD's find out by themselves what will be
// needed, and lose by it a fifth to a half of what they read (Zen 4).
inline bool fetches_ahead() {
#if defined(__x86_64__)
  static const bool answer = !__builtin_cpu_is("amd");
  return answer;
#else
  return false;
#endif
}

}  // namespace sparsepass
