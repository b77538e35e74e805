// Kernels for AVX2 with FMA and F16C.
//
// A 16-byte half of vpshufb holds the kept values of two rows over the same 8 columns of words, or 16 of bytes: x is read once for
// both, and no lane is half empty.
//
// vpmaddubsw wants one side without sign: the values' signs move to x.

#pragma once

#include "layouts.h"

#if defined(__x86_64__)

#define SPARSEPASS_AVX2 __attribute__((target("avx2,fma,f16c")))

namespace sparsepass::avx2 {

constexpr int64_t kAhead = 2048;
constexpr int kMostTokens = 4;

inline bool has() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

SPARSEPASS_AVX2 inline __m256i load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }

SPARSEPASS_AVX2 inline float sum_of(__m256 v) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

// The sums of two rows: lanes 0, 1 and 4, 5 are the even one's, the others the odd one's. `adds`: to what earlier panels gave.
SPARSEPASS_AVX2 inline void put_pair(__m256 v, float* y, bool has_odd, bool adds) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_hadd_ps(four, four);
  const float even = _mm_cvtss_f32(two), odd = _mm_cvtss_f32(_mm_movehdup_ps(two));
  y[0] = adds ? y[0] + even : even;
  if (has_odd) y[1] = adds ? y[1] + odd : odd;
}

// The same for two tokens.
SPARSEPASS_AVX2 inline void put_pairs(__m256 a, __m256 b, float* y_a, float* y_b, bool adds) {
  const __m256 both = _mm256_hadd_ps(a, b);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
  auto *low = reinterpret_cast<__m64*>(y_a), *high = reinterpret_cast<__m64*>(y_b);
  if (adds) four = _mm_add_ps(four, _mm_loadh_pi(_mm_loadl_pi(_mm_setzero_ps(), low), high));
  _mm_storel_pi(low, four);
  _mm_storeh_pi(high, four);
}

// Fetches the cache lines of some bytes beforehand.
SPARSEPASS_AVX2 inline void fetch(const uint8_t* from, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) _mm_prefetch(reinterpret_cast<const char*>(from + kAhead + line), _MM_HINT_T0);
}

// ---- Elements of a type ----

SPARSEPASS_AVX2 inline __m256 eight_at(int type, const void* from, int64_t i) {
  if (type == kTypeFloat) return _mm256_loadu_ps(static_cast<const float*>(from) + i);
  const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(from) + i));
  return type == kTypeFp16 ? _mm256_cvtph_ps(words) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}

// Rounded to bf16 and fp16.
SPARSEPASS_AVX2 inline __m128i words_of(int type, __m256 values) {
  if (type == kTypeFp16) return _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT);
  const __m256i bits = _mm256_castps_si256(values), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
  const __m256i words = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08));
}

SPARSEPASS_AVX2 inline void put_eight(int type, __m256 values, void* out, int64_t i) {
  if (type == kTypeFloat) return _mm256_storeu_ps(static_cast<float*>(out) + i, values);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(out) + i), words_of(type, values));
}

// ---- Words ----

// sums + x times values: words 2i of a register go to one sum, words 2i + 1 to the other (bf16), or one half to each (fp16).
template <bool kIsFp16>
SPARSEPASS_AVX2 inline void multiply_add(__m256 (&sums)[2], __m256i x, __m256i values) {
  if constexpr (kIsFp16) {
    sums[0] = _mm256_fmadd_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_castsi256_si128(values)), sums[0]);
    sums[1] = _mm256_fmadd_ps(
        _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1)), _mm256_cvtph_ps(_mm256_extracti128_si256(values, 1)), sums[1]);
  } else {
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000));
    sums[0] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(values, 16)), sums[0]);
    sums[1] =
        _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(x, high)), _mm256_castsi256_ps(_mm256_and_si256(values, high)), sums[1]);
  }
}

// The branch's weights of two rows for 8 sums, or the `count` that are left, in the lanes where Activations::take_sums has these.
SPARSEPASS_AVX2 inline __m256i branch_of_pair(const uint16_t* even, const uint16_t* odd, int64_t count) {
  alignas(16) uint16_t rest[2][8] = {};
  if (count < 8) {
    std::memcpy(rest[0], even, static_cast<size_t>(count) * 2);
    std::memcpy(rest[1], odd, static_cast<size_t>(count) * 2);
    even = rest[0], odd = rest[1];
  }
  const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(even)), b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(odd));
  return _mm256_permute4x64_epi64(_mm256_set_m128i(b, a), 0xD8);
}

// Calls add(sums, weights) for all sums of a branch with two rows, 8 at a time; `sums` are those of the first token.
template <class Add>
SPARSEPASS_AVX2 inline void each_of_branch(const Product& p, int64_t row, const Add& add) {
  const auto& w = *p.weight;
  const int64_t count = w.columns / w.k;
  const uint16_t* even = w.branch + row * count;
  const uint16_t* odd = row + 1 < w.rows ? even + count : even;
  for (int64_t i = 0; i < count; i += 8) add(p.sums + i * 4, branch_of_pair(even + i, odd + i, std::min<int64_t>(8, count - i)));
}

template <int T, bool kIsFp16>
SPARSEPASS_AVX2 void packed_words(const Product& p, const Layout& layout, const Panel& panel, int64_t first, int64_t last) {
  const auto& w = *p.weight;
  const bool fetches = p.fetches_ahead;
  // Bytes 2c and 2c + 1 of the group of four words that a lane's value belongs to, c its code; and the codes of the first four steps, or
  // of the others, in both bytes of each lane.
  alignas(32) uint8_t starts[32], doubles[32];
  for (int i = 0; i < 32; i++) starts[i] = static_cast<uint8_t>(i % 8 / 4 * 8 + i % 2), doubles[i] = static_cast<uint8_t>(i % 16 / 2 * 2);
  const __m256i start = load(starts), two_bits = _mm256_set1_epi8(6), early = load(doubles), late = _mm256_add_epi8(early, _mm256_set1_epi8(1));
  constexpr int kTurns = T == 1 ? 2 : 1;
  for (int64_t row = first; row < last; row += 2) {
    const uint8_t* at = static_cast<const uint8_t*>(w.data) + layout.at(row, panel);
    __m256 sums[T][kTurns][2];
    for (int t = 0; t < T; t++)
      for (int turn = 0; turn < kTurns; turn++) sums[t][turn][0] = sums[t][turn][1] = _mm256_setzero_ps();
    // Step k, whose codes were doubled.
    auto step = [&](int k, __m256i codes, const uint8_t* values_at, const uint8_t* x_at) SPARSEPASS_AVX2 {
      const int shift = k % 4 * 2 - 1;
      codes = shift < 0 ? _mm256_add_epi16(codes, codes) : _mm256_srli_epi16(codes, shift);
      const __m256i lanes = _mm256_or_si256(_mm256_and_si256(codes, two_bits), start), values = load(values_at + k * 32);
      for (int t = 0; t < T; t++)
        multiply_add<kIsFp16>(sums[t][k % kTurns], _mm256_shuffle_epi8(load(x_at + t * p.x_bytes + k * 32), lanes), values);
    };
    const uint8_t* x_at = p.x + panel.begin * 256;
    for (int64_t block = panel.begin; block < panel.end; block++, at += 288, x_at += 256) {
      const __m256i codes = load(at), first_four = _mm256_shuffle_epi8(codes, early), last_four = _mm256_shuffle_epi8(codes, late);
      if (fetches) fetch(at, 288);
#pragma GCC unroll 8
      for (int k = 0; k < 8; k++) step(k, k < 4 ? first_four : last_four, at + Layout::kStep, x_at);
    }
    if (panel.left) {
      const __m256i codes = load(at);
#pragma GCC unroll 7
      for (int k = 0; k < 7; k++)
        if (k < panel.left) step(k, _mm256_shuffle_epi8(codes, k < 4 ? early : late), at + Layout::kStep, x_at);
    }
    if (p.sums != nullptr && panel.begin == 0) {
      each_of_branch(p, row, [&](const uint8_t* at_sums, __m256i values) SPARSEPASS_AVX2 {
        for (int t = 0; t < T; t++) multiply_add<kIsFp16>(sums[t][0], load(at_sums + t * p.sums_bytes), values);
      });
    }
    for (int t = 0; t < T; t++) {
      __m256 sum = _mm256_add_ps(sums[t][0][0], sums[t][0][1]);
      if constexpr (kTurns == 2) sum = _mm256_add_ps(sum, _mm256_add_ps(sums[t][1][0], sums[t][1][1]));
      // fp16: lanes 0 to 3 are the even row's.
      if constexpr (kIsFp16) sum = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(sum), 0xD8));
      put_pair(sum, p.y + t * p.y_rows + row, row + 1 < w.rows, panel.begin > 0);
    }
  }
}

// y += x W^T for words that lie row by row.
template <int T, bool kIsFp16>
SPARSEPASS_AVX2 void add_words(const uint16_t* weight, int64_t columns, const uint8_t* x, int64_t x_bytes, float* y, int64_t rows,
                               int64_t first, int64_t last) {
  constexpr int kTurns = T == 1 ? 2 : 1;
  const bool fetches = fetches_ahead();
  const int64_t whole = columns / 16;
  for (int64_t row = first; row < last; row++) {
    const auto* at = reinterpret_cast<const uint8_t*>(weight + row * columns);
    __m256 sums[T][kTurns][2];
    for (int t = 0; t < T; t++)
      for (int turn = 0; turn < kTurns; turn++) sums[t][turn][0] = sums[t][turn][1] = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + kTurns <= whole; i += kTurns) {
      if (fetches) fetch(at + i * 32, 32 * kTurns);
#pragma GCC unroll 2
      for (int turn = 0; turn < kTurns; turn++)
        for (int t = 0; t < T; t++)
          multiply_add<kIsFp16>(sums[t][turn], load(x + t * x_bytes + (i + turn) * 32), load(at + (i + turn) * 32));
    }
    alignas(32) uint16_t rest[16] = {};
    for (; i * 16 < columns; i++) {
      const void* values = at + i * 32;
      if (i == whole) {
        std::memcpy(rest, at + i * 32, static_cast<size_t>(columns % 16) * 2);
        values = rest;
      }
      for (int t = 0; t < T; t++) multiply_add<kIsFp16>(sums[t][0], load(x + t * x_bytes + i * 32), load(values));
    }
    for (int t = 0; t < T; t++) {
      __m256 sum = _mm256_add_ps(sums[t][0][0], sums[t][0][1]);
      if constexpr (kTurns == 2) sum = _mm256_add_ps(sum, _mm256_add_ps(sums[t][1][0], sums[t][1][1]));
      y[t * rows + row] += sum_of(sum);
    }
  }
}

// ---- Bytes ----

SPARSEPASS_AVX2 inline __m256i products_of(__m256i x, __m256i values, __m256i magnitudes) {
  return _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(x, values));
}

// The scales of two rows in the lanes of their columns: the even row's twice and then the odd row's twice, for each group of columns,
// times those of x if there is one token. kGroups: scales of 128 columns.
template <int kGroups>
class PairScales {
 public:
  // x_scales: of the whole token; null for 1.
  SPARSEPASS_AVX2 PairScales(const SparsepassWeight& w, const Panel& panel, const float* x_scales)
      : size_(w.group_size ? w.group_size : w.columns),
        a_row_(ceil_div(w.columns, size_)),
        first_(panel.begin * kGroups),
        count_((panel.end - panel.begin) * kGroups),
        own_(kGroups > 1 || size_ == kGroup ? std::min(count_, a_row_ - first_) : 0) {
    for (int64_t i = 0; i < count_; i++)
      _mm_store_ps(of_x_ + 4 * i, _mm_set1_ps(x_scales == nullptr ? 1.f : x_scales[(first_ + i) / kGroups]));
  }

  int64_t a_row() const { return a_row_; }

  SPARSEPASS_AVX2 void take(const uint16_t* even, const uint16_t* odd) {
    int64_t i = 0;
    for (; i + 4 <= own_; i += 4) {
      const __m128 a = four(even + first_ + i), b = four(odd + first_ + i);
      const __m128 a_low = _mm_unpacklo_ps(a, a), a_high = _mm_unpackhi_ps(a, a), b_low = _mm_unpacklo_ps(b, b), b_high = _mm_unpackhi_ps(b, b);
      put(i, _mm_movelh_ps(a_low, b_low));
      put(i + 1, _mm_movehl_ps(b_low, a_low));
      put(i + 2, _mm_movelh_ps(a_high, b_high));
      put(i + 3, _mm_movehl_ps(b_high, a_high));
    }
    while (i < count_) {
      // Those that share the scale of column number `column`.
      const int64_t column = (first_ + i) * (kGroup / kGroups), at = std::min(column / size_, a_row_ - 1);
      const int64_t end = at == a_row_ - 1 ? count_ : std::min(count_, i + (size_ - column % size_) / (kGroup / kGroups));
      const float a = widen_bf16(even[at]), b = widen_bf16(odd[at]);
      for (const __m128 scale = _mm_setr_ps(a, a, b, b); i < end; i++) put(i, scale);
    }
  }

  // Those of one group of a block; the next group's follow.
  const float* of(int64_t block, int64_t group) const { return both_ + (block * kGroups - first_ + group) * 4; }

 private:
  static constexpr int64_t kMost = Layout::kBytesOfX / kGroup * kGroups * 4;

  SPARSEPASS_AVX2 static __m128 four(const uint16_t* from) {
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))), 16));
  }

  SPARSEPASS_AVX2 void put(int64_t i, __m128 scales) { _mm_store_ps(both_ + 4 * i, _mm_mul_ps(scales, _mm_load_ps(of_x_ + 4 * i))); }

  int64_t size_, a_row_, first_, count_;
  int64_t own_;  // groups that have a scale each
  alignas(64) float of_x_[kMost], both_[kMost];
};

// kGroups: scales of 128 columns.
template <int T, bool kNibbles, int kGroups>
SPARSEPASS_AVX2 void packed_bytes(const Product& p, const Layout& layout, const Panel& panel, int64_t first, int64_t last) {
  const auto& w = *p.weight;
  const bool fetches = p.fetches_ahead;
  alignas(32) uint8_t starts[32];
  for (int lane = 0; lane < 32; lane++) starts[lane] = static_cast<uint8_t>(lane % 8 / 2 * 4);
  const __m256i start = load(starts), two_bits = _mm256_set1_epi8(3), four_bits = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8);
  const __m256i ones = _mm256_set1_epi16(1);
  PairScales<kGroups> scales(w, panel, T == 1 ? p.x_scales : nullptr);
  // Steps whose products are summed as words: 4 steps x 2 products x 8 x 127 fit, 2 x 127 x 127 are a word's limit.
  constexpr int kSteps = kGroups >= 4 ? 1 : 4 / kGroups;  // that share a scale
  for (int64_t row = first; row < last; row += 2) {
    const uint8_t* at = static_cast<const uint8_t*>(w.data) + layout.at(row, panel);
    const bool has_odd = row + 1 < w.rows;
    const uint16_t* even = w.scales + row * scales.a_row();
    scales.take(even, has_odd ? even + scales.a_row() : even);
    __m256 sums[T];
    for (int t = 0; t < T; t++) sums[t] = _mm256_setzero_ps();
    for (int64_t block = panel.begin; block < panel.end; block++, at += layout.block_bytes) {
      const uint8_t* values_at = at + Layout::kStep;
      __m256i codes = load(at), words[T];
      if (fetches) fetch(at, layout.block_bytes);
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) {
        __m256i values, magnitudes;
        if constexpr (kNibbles) {
          const __m256i pair = load(values_at + k % 2 * 32);
          values = _mm256_and_si256(k < 2 ? pair : _mm256_srli_epi16(pair, 4), four_bits);
          if constexpr (T > 1) values = _mm256_sub_epi8(values, eight);
        } else {
          values = load(values_at + k * 32);
        }
        if constexpr (!kNibbles || T > 1) magnitudes = _mm256_abs_epi8(values);
        const __m256i lanes = _mm256_or_si256(_mm256_and_si256(codes, two_bits), start);
        codes = _mm256_srli_epi16(codes, 2);
        for (int t = 0; t < T; t++) {
          const __m256i met = _mm256_shuffle_epi8(load(p.x + t * p.x_bytes + block * 128 + k * 32), lanes);
          if constexpr (kNibbles) {
            // One token: the nibbles' 8 is taken off by a product of its own, which takes less than to move signs.
            const __m256i now = T > 1 ? products_of(met, values, magnitudes)
                                      : _mm256_sub_epi16(_mm256_maddubs_epi16(values, met), _mm256_maddubs_epi16(eight, met));
            words[t] = k % kSteps ? _mm256_add_epi16(words[t], now) : now;
          } else {
            const __m256i wide = _mm256_madd_epi16(products_of(met, values, magnitudes), ones);
            words[t] = k % kSteps ? _mm256_add_epi32(words[t], wide) : wide;
          }
        }
        if (k % kSteps != kSteps - 1) continue;
        const float* from = scales.of(block, kGroups == 8 ? k * 2 : k / kSteps);
        const __m256 scale = kGroups == 8 ? _mm256_load_ps(from) : _mm256_broadcast_ps(reinterpret_cast<const __m128*>(from));
        for (int t = 0; t < T; t++) {
          const __m256i wide = kNibbles ? _mm256_madd_epi16(words[t], ones) : words[t];
          const __m256 both = T == 1 ? scale : _mm256_mul_ps(scale, _mm256_set1_ps(p.x_scales[t * p.x_groups + block]));
          sums[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(wide), both, sums[t]);
        }
      }
    }
    if (p.sums != nullptr && panel.begin == 0) {
      each_of_branch(p, row, [&](const uint8_t* at_sums, __m256i values) SPARSEPASS_AVX2 {
        for (int t = 0; t < T; t++) {
          __m256 both[2] = {sums[t], _mm256_setzero_ps()};
          multiply_add<false>(both, load(at_sums + t * p.sums_bytes), values);
          sums[t] = _mm256_add_ps(both[0], both[1]);
        }
      });
    }
    for (int t = 0; t < T; t++) put_pair(sums[t], p.y + t * p.y_rows + row, has_odd, panel.begin > 0);
  }
}

template <int T>
SPARSEPASS_AVX2 void dense_bytes(const Product& p, int64_t first, int64_t last) {
  const auto& w = *p.weight;
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t row = first; row < last; row++) {
    const auto* at = static_cast<const uint8_t*>(w.data) + row * w.columns;
    __m256 sums[T];
    for (int t = 0; t < T; t++) sums[t] = _mm256_setzero_ps();
    for (int64_t begin = 0; begin < w.columns; begin += kGroup) {
      const int64_t end = std::min(begin + kGroup, w.columns);
      __m256i wide[T];
      for (int t = 0; t < T; t++) wide[t] = _mm256_setzero_si256();
      if (p.fetches_ahead) fetch(at + begin, kGroup);
      for (int64_t i = begin; i < end; i += 32) {
        alignas(32) uint8_t rest[32] = {};
        const void* from = at + i;
        if (end - i < 32) {
          std::memcpy(rest, at + i, static_cast<size_t>(end - i));
          from = rest;
        }
        const __m256i values = load(from), magnitudes = _mm256_abs_epi8(values);
        for (int t = 0; t < T; t++)
          wide[t] = _mm256_add_epi32(wide[t], _mm256_madd_epi16(products_of(load(p.x + t * p.x_bytes + i), values, magnitudes), ones));
      }
      for (int t = 0; t < T; t++) {
        const __m256 scale = _mm256_set1_ps(p.x_scales[t * p.x_groups + begin / kGroup]);
        sums[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(wide[t]), scale, sums[t]);
      }
    }
    const float scale = widen_bf16(w.scales[row]);
    for (int t = 0; t < T; t++) p.y[t * p.y_rows + row] = sum_of(sums[t]) * scale;
  }
}

// ---- With their zeros ----

// The lanes of a half that hold the first and the second kept value of each column's group, and each column's place in it.
struct Places {
  __m256i first, second, place;

  SPARSEPASS_AVX2 Places(int64_t lane_bytes, int64_t row) {
    alignas(32) uint8_t firsts[32], seconds[32], places[32];
    const int size = static_cast<int>(lane_bytes), of_odd = row % 2 ? 8 : 0;
    for (int byte = 0; byte < 32; byte++) {
      const int column = byte % 16 / size, part = byte % size;
      firsts[byte] = static_cast<uint8_t>(of_odd + column / 4 * 2 * size + part);
      seconds[byte] = static_cast<uint8_t>(firsts[byte] + size);
      places[byte] = static_cast<uint8_t>(part ? 0 : column % 4);
    }
    first = load(firsts), second = load(seconds), place = load(places);
  }

  // One register of values and one of codes, of which each lane has two bits: the columns of one row.
  template <bool kWords>
  SPARSEPASS_AVX2 __m256i spread(__m256i values, __m256i codes) const {
    const __m256i of_first = _mm256_shuffle_epi8(codes, first), of_second = _mm256_shuffle_epi8(codes, second);
    const __m256i is_first = kWords ? _mm256_cmpeq_epi16(of_first, place) : _mm256_cmpeq_epi8(of_first, place);
    const __m256i is_second = kWords ? _mm256_cmpeq_epi16(of_second, place) : _mm256_cmpeq_epi8(of_second, place);
    return _mm256_or_si256(_mm256_and_si256(is_first, _mm256_shuffle_epi8(values, first)),
                           _mm256_and_si256(is_second, _mm256_shuffle_epi8(values, second)));
  }
};

// Those of words or bytes, for an even or an odd row.
template <bool kWords>
SPARSEPASS_AVX2 const Places& places_of(int64_t row) {
  static const Places even(kWords ? 2 : 1, 0), odd(kWords ? 2 : 1, 1);
  return row % 2 ? odd : even;
}

// One row, 16 columns of words or 32 of bytes at a time; `out` has room for whole registers.
template <bool kWords>
SPARSEPASS_AVX2 void unpack(const Layout& layout, const uint8_t* data, int64_t row, void* out) {
  const Places places = places_of<kWords>(row);
  const __m256i two_bits = kWords ? _mm256_set1_epi16(3) : _mm256_set1_epi8(3);
  const __m256i four_bits = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8);
  const bool nibbles = layout.kind == kInt4;
  auto* to = static_cast<__m256i*>(out);
  for (int64_t number = 0; number < layout.panels; number++) {
    const Panel panel = layout.panel(number);
    const uint8_t* at = data + layout.at(row, panel);
    for (int64_t block = panel.begin; block < panel.end + (panel.left ? 1 : 0); block++, at += layout.block_bytes) {
      const bool is_left = block == layout.full;
      const __m256i all = load(at);
      const int64_t count = is_left ? layout.left : layout.per_block;
      for (int64_t k = 0; k < count; k++, to++) {
        const __m256i codes = _mm256_and_si256(_mm256_srl_epi16(all, _mm_cvtsi64_si128(2 * k)), two_bits);
        __m256i values = load(at + Layout::kStep + (nibbles ? k % 2 : k) * 32);
        if (nibbles) values = _mm256_sub_epi8(_mm256_and_si256(k < 2 ? values : _mm256_srli_epi16(values, 4), four_bits), eight);
        _mm256_storeu_si256(to, places.spread<kWords>(values, codes));
      }
    }
  }
}

// Dense words of one kind, or bytes with their scales, as elements of a type.
template <bool kIsFp16>
SPARSEPASS_AVX2 inline void convert_words(const uint16_t* from, int64_t columns, int type, void* out) {
  for (int64_t i = 0; i < columns; i += 8) put_eight(type, eight_at(kIsFp16 ? kTypeFp16 : kTypeBf16, from, i), out, i);
}

SPARSEPASS_AVX2 inline void convert_bytes(
    const int8_t* from, const uint16_t* scales, int64_t size, int64_t columns, int type, void* out) {
  __m256 scale = _mm256_setzero_ps();
  for (int64_t i = 0, until = 0; i < columns; i += 8) {
    if (i == until) {  // a group of scales is a multiple of 8 columns
      scale = _mm256_set1_ps(widen_bf16(*scales++));
      until += size;
    }
    const __m256i numbers = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + i)));
    put_eight(type, _mm256_mul_ps(_mm256_cvtepi32_ps(numbers), scale), out, i);
  }
}

// `count` is a multiple of 8.
SPARSEPASS_AVX2 inline float sum_of(const float* from, int64_t count) {
  __m256 sum = _mm256_loadu_ps(from);
  for (int64_t i = 8; i < count; i += 8) sum = _mm256_add_ps(sum, _mm256_loadu_ps(from + i));
  return sum_of(sum);
}

// kGroup numbers as signed bytes plus `offset`, with the scale that is returned.
SPARSEPASS_AVX2 inline float round_group(const float* from, uint8_t offset, uint8_t* to) {
  // Magnitudes are compared as integers, where what is not a number is the largest, and is not lost.
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i largest = _mm256_setzero_si256();
  for (int64_t i = 0; i < kGroup; i += 8) largest = _mm256_max_epi32(largest, _mm256_and_si256(load(from + i), magnitude));
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
  four = _mm_max_epi32(four, _mm_unpackhi_epi64(four, four));
  const float most = from_bits(static_cast<uint32_t>(std::max(_mm_cvtsi128_si32(four), _mm_extract_epi32(four, 1))));
  const __m256 inverse = _mm256_set1_ps(most > 0 ? 127.f / most : 0.f);
  const __m256i added = _mm256_set1_epi8(static_cast<char>(offset)), order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t i = 0; i < kGroup; i += 32) {
    __m256i numbers[4];
    for (int j = 0; j < 4; j++) numbers[j] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + i + 8 * j), inverse));
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(numbers[0], numbers[1]), _mm256_packs_epi32(numbers[2], numbers[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_add_epi8(_mm256_permutevar8x32_epi32(bytes, order), added));
  }
  return most / 127.f;
}

// Some results of one token, plus their biases, as elements of a type.
SPARSEPASS_AVX2 inline void put_row(int type, const float* y, const float* bias, int64_t count, void* out) {
  for (int64_t i = 0; i + 8 <= count; i += 8) {
    const __m256 values = _mm256_loadu_ps(y + i);
    put_eight(type, bias == nullptr ? values : _mm256_add_ps(values, _mm256_loadu_ps(bias + i)), out, i);
  }
}

}  // namespace sparsepass::avx2

#endif
