// Which n scores of each group of four are the largest; ties go to the lowest index.

#pragma once

#include "activations.h"
#include "avx2.h"

namespace sparsepass {

inline void largest_of_four(int type, const void* scores, int64_t group, int n, uint8_t* mask) {
  float of_group[4];
  for (int i = 0; i < 4; i++) of_group[i] = element(type, scores, group * 4 + i);
  for (int i = 0; i < 4; i++) {
    int beaten = 0;
    for (int j = 0; j < 4; j++) beaten += j < i ? of_group[j] >= of_group[i] : of_group[j] > of_group[i];
    mask[group * 4 + i] = beaten < n;
  }
}

#if defined(__x86_64__)

namespace avx2 {

// All bits set in each lane whose score is among the n largest of its group.
SPARSEPASS_AVX2 inline __m256i largest(__m256 scores, __m256i n) {
  // At a distance, a lane meets the score of (lane + distance) % 4: where that comes earlier, it wins if both are equal.
  const __m256 one = _mm256_permute_ps(scores, 0x39), two = _mm256_permute_ps(scores, 0x4E), three = _mm256_permute_ps(scores, 0x93);
  const auto beats = [&](__m256 other, auto earlier) SPARSEPASS_AVX2 {
    const __m256 later = _mm256_cmp_ps(other, scores, _CMP_GT_OQ), tie = _mm256_cmp_ps(other, scores, _CMP_GE_OQ);
    return _mm256_castps_si256(_mm256_blend_ps(later, tie, decltype(earlier)::value));
  };
  const __m256i first = beats(one, std::integral_constant<int, 0x88>{}), second = beats(two, std::integral_constant<int, 0xCC>{});
  const __m256i all = _mm256_add_epi32(_mm256_add_epi32(first, second), beats(three, std::integral_constant<int, 0xEE>{}));
  return _mm256_cmpgt_epi32(_mm256_add_epi32(all, n), _mm256_setzero_si256());  // n - times beaten
}

template <int kType>
SPARSEPASS_AVX2 void largest_of_groups(const void* scores, int64_t first, int64_t last, int n, uint8_t* mask) {
  const __m256i number = _mm256_set1_epi32(n), one = _mm256_set1_epi8(1), order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  int64_t i = first * 4;
  for (; i + 32 <= last * 4; i += 32) {
    const __m256i low = _mm256_packs_epi32(largest(eight_at(kType, scores, i), number), largest(eight_at(kType, scores, i + 8), number));
    const __m256i high =
        _mm256_packs_epi32(largest(eight_at(kType, scores, i + 16), number), largest(eight_at(kType, scores, i + 24), number));
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(mask + i), _mm256_and_si256(bytes, one));
  }
  for (; i < last * 4; i += 4) largest_of_four(kType, scores, i / 4, n, mask);
}

}  // namespace avx2

#endif

inline void largest_of_groups(int type, const void* scores, int64_t first, int64_t last, int n, uint8_t* mask) {
#if defined(__x86_64__)
  if (avx2::has()) {
    if (type == kTypeFloat) return avx2::largest_of_groups<kTypeFloat>(scores, first, last, n, mask);
    if (type == kTypeFp16) return avx2::largest_of_groups<kTypeFp16>(scores, first, last, n, mask);
    return avx2::largest_of_groups<kTypeBf16>(scores, first, last, n, mask);
  }
#endif
  for (int64_t group = first; group < last; group++) largest_of_four(type, scores, group, n, mask);
}

}  // namespace sparsepass
