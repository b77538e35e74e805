// Root mean square normalisation, y = w * (x / sqrt(mean(x^2) + eps)), rounded where the models of transformers round: x over its root to
// the type of x, and its product with w once more.

#pragma once

#include "activations.h"
#include "avx2.h"

namespace sparsepass {

#if defined(__x86_64__)

namespace avx2 {

// `columns` is a multiple of 8. The square sum has 4 registers, so that none waits for the one before.
template <int kType>
SPARSEPASS_AVX2 void rms_norm(const void* x, const void* weight, int64_t columns, float eps, void* y) {
  __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  for (int64_t i = 0; i < columns; i += 8) {
    const __m256 values = eight_at(kType, x, i);
    sums[i / 8 % 4] = _mm256_fmadd_ps(values, values, sums[i / 8 % 4]);
  }
  const float sum = sum_of(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
  const __m256 scale = _mm256_set1_ps(1.f / std::sqrt(sum / static_cast<float>(columns) + eps));
  for (int64_t i = 0; i < columns; i += 8) {
    put_eight(kType, _mm256_mul_ps(eight_at(kType, x, i), scale), y, i);
    put_eight(kType, _mm256_mul_ps(eight_at(kType, y, i), eight_at(kType, weight, i)), y, i);
  }
}

}  // namespace avx2

#endif

inline void rms_norm(int type, const void* x, const void* weight, int64_t columns, float eps, void* y) {
#if defined(__x86_64__)
  if (columns % 8 == 0 && avx2::has()) {
    if (type == kTypeFloat) return avx2::rms_norm<kTypeFloat>(x, weight, columns, eps, y);
    if (type == kTypeFp16) return avx2::rms_norm<kTypeFp16>(x, weight, columns, eps, y);
    return avx2::rms_norm<kTypeBf16>(x, weight, columns, eps, y);
  }
#endif
  float sum = 0;
  for (int64_t i = 0; i < columns; i++) sum += element(type, x, i) * element(type, x, i);
  const float scale = 1.f / std::sqrt(sum / static_cast<float>(columns) + eps);
  const bool is_fp16 = type == kTypeFp16;
  for (int64_t i = 0; i < columns; i++) {
    const float found = element(type, x, i) * scale, by = element(type, weight, i);
    if (type == kTypeFloat) {
      static_cast<float*>(y)[i] = found * by;
    } else {
      static_cast<uint16_t*>(y)[i] = round_word(is_fp16, widen(is_fp16, round_word(is_fp16, found)) * by);
    }
  }
}

}  // namespace sparsepass
