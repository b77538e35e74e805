// Kernels for AVX512: BW for words, BF16 for bf16; VBMI and VNNI for bytes.
//
// In 2:4, the column of a kept value is the first one of its group of four plus two bits, its code. So one permutation of two
// registers of x brings exactly the x that the kept values of a step meet, and every lane of the multiplication is useful.
//
// vpdpbusd wants one side without sign: x + 128 it is, and 128 times the sum of the values is taken off again.

#pragma once

#include "layouts.h"

#if defined(__x86_64__)

#define SPARSEPASS_WORDS __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,f16c,fma")))
#define SPARSEPASS_BYTES __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,fma")))

namespace sparsepass::avx512 {

// Bytes that are fetched before they are needed: into the second cache, because the first one's buffers fill up (AMD Zen 4: half
// the speed).
constexpr int64_t kAhead = 2048, kAheadOfBytes = 4096;
constexpr int kMostTokens = 8;    // of one call of a kernel

inline bool has(int kind) {
  const bool base = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512dq");
  return base && (is_integer(kind) ? __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni")
                                   : __builtin_cpu_supports("avx512bf16"));
}

// ---- Words ----

template <bool kIsFp16>
SPARSEPASS_WORDS inline __m512 multiply_add(__m512 sum, __m512i x, __m512i values) {
  if constexpr (kIsFp16) {
    sum = _mm512_fmadd_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(x)), _mm512_cvtph_ps(_mm512_castsi512_si256(values)), sum);
    return _mm512_fmadd_ps(
        _mm512_cvtph_ps(_mm512_extracti64x4_epi64(x, 1)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(values, 1)), sum);
  } else {
    return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)values);
  }
}

// Two bits of each word, and the offset of its group of four: where its x lies in two registers.
SPARSEPASS_WORDS inline __m512i word_offsets() {
  alignas(64) uint16_t offsets[32];
  for (int lane = 0; lane < 32; lane++) offsets[lane] = static_cast<uint16_t>(lane / 2 * 4);
  return _mm512_load_si512(offsets);
}

template <int T, bool kIsFp16>
SPARSEPASS_WORDS void packed_words(const Product& p, const uint8_t* x, float* y, int64_t first, int64_t last) {
  const auto& w = *p.weight;
  const Layout layout(kAvx512, w.kind, w.rows, w.columns);
  const __m512i groups = word_offsets(), two_bits = _mm512_set1_epi16(3);
  // One accumulator a token hides no latency where there are few tokens: four or two take turns then.
  constexpr int kTurns = T == 1 ? 4 : T == 2 ? 2 : 1;
  const int64_t left = layout.left;
  __m512i shared = _mm512_setzero_si512();
  for (int64_t row = first; row < last; row++) {
    const uint8_t* at = static_cast<const uint8_t*>(w.data) + layout.at_row(row);
    if (left && row % layout.unit_rows == 0) shared = _mm512_loadu_si512(at - 64);
    __m512 sums[T][kTurns];
    for (int t = 0; t < T; t++)
      for (int turn = 0; turn < kTurns; turn++) sums[t][turn] = _mm512_setzero_ps();
    auto step = [&](int k, __m512i& codes, const uint8_t* values_at, const uint8_t* x_at) SPARSEPASS_WORDS {
      const __m512i lanes = _mm512_ternarylogic_epi64(codes, two_bits, groups, 0xEA);  // (codes & 3) | groups
      codes = _mm512_srli_epi16(codes, 2);
      const __m512i values = _mm512_loadu_si512(values_at);
      for (int t = 0; t < T; t++) {
        const uint8_t* of_token = x_at + t * p.x_bytes;
        const __m512i met = _mm512_permutex2var_epi16(_mm512_loadu_si512(of_token), lanes, _mm512_loadu_si512(of_token + 64));
        sums[t][k % kTurns] = multiply_add<kIsFp16>(sums[t][k % kTurns], met, values);
      }
    };
    const uint8_t* x_at = x;
    for (int64_t block = 0; block < layout.full; block++, at += 576, x_at += 1024) {
      __m512i codes = _mm512_loadu_si512(at + 512);
      for (int line = 0; line < 9; line++) _mm_prefetch(reinterpret_cast<const char*>(at + kAhead + line * 64), _MM_HINT_T1);
#pragma GCC unroll 8
      for (int k = 0; k < 8; k++) step(k, codes, at + k * 64, x_at + k * 128);
    }
    for (int64_t k = 0; k < left; k++) {
      _mm_prefetch(reinterpret_cast<const char*>(at + kAhead + k * 64), _MM_HINT_T1);
      step(static_cast<int>(k % kTurns), shared, at + k * 64, x_at + k * 128);
    }
    for (int t = 0; t < T; t++) {
      __m512 sum = sums[t][0];
      for (int turn = 1; turn < kTurns; turn++) sum = _mm512_add_ps(sum, sums[t][turn]);
      y[t * w.rows + row] = _mm512_reduce_add_ps(sum);
    }
  }
}

// y += x W^T for words that lie row by row.
template <int T, bool kIsFp16>
SPARSEPASS_WORDS void add_words(const uint16_t* weight, int64_t columns, const uint8_t* x, int64_t x_bytes, float* y, int64_t rows,
                                int64_t first, int64_t last) {
  constexpr int kTurns = T <= 2 ? 4 : 1;
  const __mmask32 rest = static_cast<__mmask32>((1ull << (columns % 32)) - 1);
  const int64_t whole = columns / 32;
  for (int64_t row = first; row < last; row++) {
    const auto* at = reinterpret_cast<const uint8_t*>(weight + row * columns);
    __m512 sums[T][kTurns];
    for (int t = 0; t < T; t++)
      for (int turn = 0; turn < kTurns; turn++) sums[t][turn] = _mm512_setzero_ps();
    auto step = [&](int64_t i, int turn, __m512i values) SPARSEPASS_WORDS {
      for (int t = 0; t < T; t++)
        sums[t][turn] = multiply_add<kIsFp16>(sums[t][turn], _mm512_loadu_si512(x + t * x_bytes + i * 64), values);
    };
    int64_t i = 0;
    for (; i + kTurns <= whole; i += kTurns) {
#pragma GCC unroll 4
      for (int turn = 0; turn < kTurns; turn++) {
        _mm_prefetch(reinterpret_cast<const char*>(at + kAhead + (i + turn) * 64), _MM_HINT_T1);
        step(i + turn, turn, _mm512_loadu_si512(at + (i + turn) * 64));
      }
    }
    for (; i < whole; i++) step(i, 0, _mm512_loadu_si512(at + i * 64));
    if (rest) step(whole, 0, _mm512_maskz_loadu_epi16(rest, at + whole * 64));
    for (int t = 0; t < T; t++) {
      __m512 sum = sums[t][0];
      for (int turn = 1; turn < kTurns; turn++) sum = _mm512_add_ps(sum, sums[t][turn]);
      y[t * rows + row] += _mm512_reduce_add_ps(sum);
    }
  }
}

// ---- Bytes ----

// Scales of a step of 128 columns, one for each lane of eight columns.
SPARSEPASS_BYTES inline __m512 lane_scales(const uint16_t* scales, int64_t count, __m512i order) {
  const __m128i read = _mm_maskz_loadu_epi16(static_cast<__mmask8>((1 << count) - 1), scales);
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_castsi128_si256(read));
  return _mm512_castsi512_ps(_mm512_permutexvar_epi32(order, _mm512_slli_epi32(words, 16)));
}

// kOneScale: a step of 128 columns has one scale (or shares it with others), so one number is spread and nothing permuted.
template <int T, bool kNibbles, bool kOneScale>
SPARSEPASS_BYTES void packed_bytes(const Product& p, const uint8_t* x, const float* x_scales, float* y, int64_t first, int64_t last) {
  const auto& w = *p.weight;
  const Layout layout(kAvx512, w.kind, w.rows, w.columns);
  alignas(64) uint8_t offsets[64];
  alignas(64) int32_t lane_order[16];
  const int64_t size = w.group_size ? w.group_size : w.columns, scales_a_row = ceil_div(w.columns, size);
  for (int lane = 0; lane < 64; lane++) offsets[lane] = static_cast<uint8_t>(lane / 2 * 4);
  for (int lane = 0; lane < 16; lane++) lane_order[lane] = kOneScale ? 0 : static_cast<int32_t>(lane * 8 / size);
  const __m512i groups = _mm512_load_si512(offsets), order = _mm512_load_si512(lane_order), two_bits = _mm512_set1_epi8(3);
  const __m512i four_bits = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8), offset = _mm512_set1_epi8(static_cast<char>(128));
  const int64_t left = layout.left, block_bytes = layout.values_bytes + 64;
  const int64_t scales_a_step = kOneScale ? 0 : kGroup / size, steps_a_scale = kOneScale ? std::max<int64_t>(1, size / kGroup) : 1;
  const bool row_has_one = kOneScale && scales_a_row == 1;
  __m512i shared = _mm512_setzero_si512();
  for (int64_t row = first; row < last; row++) {
    const uint8_t* at = static_cast<const uint8_t*>(w.data) + layout.at_row(row);
    if (left && row % layout.unit_rows == 0) shared = _mm512_loadu_si512(at - 64);
    const uint16_t* scales = w.scales + row * scales_a_row;
    __m512 sums[T];
    for (int t = 0; t < T; t++) sums[t] = _mm512_setzero_ps();
    __m512i held = _mm512_setzero_si512();
    auto step = [&](int k, int64_t number, __m512i& codes, const uint8_t* at_values) SPARSEPASS_BYTES {
      __m512i values;
      if constexpr (kNibbles) {
        held = k % 2 ? _mm512_srli_epi16(held, 4) : _mm512_loadu_si512(at_values + k / 2 * 64);
        values = _mm512_sub_epi8(_mm512_and_si512(held, four_bits), eight);
      } else {
        values = _mm512_loadu_si512(at_values + k * 64);
      }
      const __m512i lanes = _mm512_ternarylogic_epi64(codes, two_bits, groups, 0xEA);
      codes = _mm512_srli_epi16(codes, 2);  // bits of a neighbour come in from above, where the mask takes them off
      const __m512i excess = _mm512_dpbusd_epi32(_mm512_setzero_si512(), offset, values);
      __m512 scale;
      if constexpr (kOneScale) {
        scale = _mm512_set1_ps(row_has_one ? 1.f : widen_bf16(scales[number / steps_a_scale]));
      } else {
        scale = lane_scales(scales + number * scales_a_step, std::min(scales_a_step, scales_a_row - number * scales_a_step), order);
      }
      for (int t = 0; t < T; t++) {
        const uint8_t* of_token = x + t * p.x_bytes + number * 128;
        const __m512i met = _mm512_permutex2var_epi8(_mm512_loadu_si512(of_token), lanes, _mm512_loadu_si512(of_token + 64));
        const __m512i products = _mm512_sub_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), met, values), excess);
        const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x_scales[t * p.x_groups + number]));
        sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), both, sums[t]);
      }
    };
    for (int64_t block = 0; block < layout.full; block++, at += block_bytes) {
      __m512i codes = _mm512_loadu_si512(at + layout.values_bytes);
      for (int64_t line = 0; line < block_bytes; line += 64) _mm_prefetch(reinterpret_cast<const char*>(at + kAheadOfBytes + line), _MM_HINT_T1);
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) step(k, block * 4 + k, codes, at);
    }
#pragma GCC unroll 3
    for (int k = 0; k < 3; k++)
      if (k < left) step(k, layout.full * 4 + k, shared, at);
    const float row_scale = row_has_one ? widen_bf16(scales[0]) : 1.f;
    for (int t = 0; t < T; t++) y[t * w.rows + row] = _mm512_reduce_add_ps(sums[t]) * row_scale;
  }
}

template <int T>
SPARSEPASS_BYTES void dense_bytes(const Product& p, const uint8_t* x, const float* x_scales, float* y, int64_t first, int64_t last) {
  const auto& w = *p.weight;
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(128));
  for (int64_t row = first; row < last; row++) {
    const auto* at = static_cast<const uint8_t*>(w.data) + row * w.columns;
    __m512 sums[T];
    for (int t = 0; t < T; t++) sums[t] = _mm512_setzero_ps();
    for (int64_t start = 0; start < w.columns; start += kGroup) {
      const int64_t rest = std::min(kGroup, w.columns - start);
      __m512i low, high;
      if (rest == kGroup) {
        low = _mm512_loadu_si512(at + start);
        high = _mm512_loadu_si512(at + start + 64);
        _mm_prefetch(reinterpret_cast<const char*>(at + start + kAheadOfBytes), _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(at + start + kAheadOfBytes + 64), _MM_HINT_T1);
      } else {
        low = _mm512_maskz_loadu_epi8(rest >= 64 ? ~0ull : (1ull << rest) - 1, at + start);
        high = rest > 64 ? _mm512_maskz_loadu_epi8((1ull << (rest - 64)) - 1, at + start + 64) : _mm512_setzero_si512();
      }
      const __m512i excess = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), offset, low), offset, high);
      for (int t = 0; t < T; t++) {
        const uint8_t* of_token = x + t * p.x_bytes + start;
        __m512i products = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(of_token), low);
        products = _mm512_sub_epi32(_mm512_dpbusd_epi32(products, _mm512_loadu_si512(of_token + 64), high), excess);
        const __m512 scale = _mm512_set1_ps(x_scales[t * p.x_groups + start / kGroup]);
        sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), scale, sums[t]);
      }
    }
    const float scale = widen_bf16(w.scales[row]);
    for (int t = 0; t < T; t++) y[t * w.rows + row] = _mm512_reduce_add_ps(sums[t]) * scale;
  }
}

// ---- With their zeros ----

// Words of one row, 64 columns at a time: each value goes to the one of its group's four columns that its code names.
SPARSEPASS_WORDS inline void unpack_words(const Layout& layout, const uint8_t* data, int64_t row, uint16_t* out) {
  alignas(64) uint16_t first_order[2][32], places[32];
  for (int half = 0; half < 2; half++)
    for (int lane = 0; lane < 32; lane++) first_order[half][lane] = static_cast<uint16_t>(half * 16 + lane / 4 * 2);
  for (int lane = 0; lane < 32; lane++) places[lane] = static_cast<uint16_t>(lane % 4);
  const __m512i place = _mm512_load_si512(places), two_bits = _mm512_set1_epi16(3), one = _mm512_set1_epi16(1);
  const uint8_t* at = data + layout.at_row(row);
  for (int64_t step = 0; step < layout.steps; step++) {
    const int64_t k = step % 8, block = step / 8;
    const uint8_t* at_block = at + block * 576;
    __m512i codes;
    if (block < layout.full) {
      codes = _mm512_srl_epi16(_mm512_loadu_si512(at_block + 512), _mm_cvtsi64_si128(2 * k));
    } else {
      const uint8_t* unit = data + row / layout.unit_rows * layout.unit_bytes;
      codes = _mm512_srl_epi16(_mm512_loadu_si512(unit), _mm_cvtsi64_si128(2 * (row % layout.unit_rows * layout.left + k)));
    }
    codes = _mm512_and_si512(codes, two_bits);
    const __m512i values = _mm512_loadu_si512(at_block + k * 64);
    for (int half = 0; half < 2; half++) {
      const int64_t column = step * 64 + half * 32;
      if (column >= layout.columns) break;
      const __m512i first = _mm512_load_si512(first_order[half]), second = _mm512_add_epi16(first, one);
      const __mmask32 is_first = _mm512_cmpeq_epi16_mask(_mm512_permutexvar_epi16(first, codes), place);
      const __mmask32 is_second = _mm512_cmpeq_epi16_mask(_mm512_permutexvar_epi16(second, codes), place);
      const __m512i found = _mm512_mask_permutexvar_epi16(_mm512_maskz_permutexvar_epi16(is_first, first, values), is_second, second, values);
      const int64_t rest = std::min<int64_t>(32, layout.columns - column);
      _mm512_mask_storeu_epi16(out + column, static_cast<__mmask32>(rest == 32 ? ~0u : (1u << rest) - 1), found);
    }
  }
}

// Bytes of one row, 64 columns at a time; `out` has room for whole registers.
SPARSEPASS_BYTES inline void unpack_bytes(const Layout& layout, const uint8_t* data, int64_t row, int8_t* out) {
  alignas(64) uint8_t order[64], places[64];
  for (int lane = 0; lane < 64; lane++) order[lane] = static_cast<uint8_t>(lane / 4 * 2);
  for (int lane = 0; lane < 64; lane++) places[lane] = static_cast<uint8_t>(lane % 4);
  const __m512i place = _mm512_load_si512(places), two_bits = _mm512_set1_epi8(3), one = _mm512_set1_epi8(1);
  const __m512i four_bits = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8), half_way = _mm512_set1_epi8(32);
  const bool nibbles = layout.kind == kInt4;
  const uint8_t* at = data + layout.at_row(row);
  for (int64_t step = 0; step < layout.steps; step++) {
    const int64_t k = step % 4, block = step / 4;
    const uint8_t* at_block = at + block * (layout.values_bytes + 64);
    const bool is_left = block == layout.full;
    const uint8_t* at_codes = is_left ? data + row / layout.unit_rows * layout.unit_bytes : at_block + layout.values_bytes;
    const int64_t shift = 2 * (is_left ? row % layout.unit_rows * layout.left + k : k);
    const __m512i codes = _mm512_and_si512(_mm512_srl_epi16(_mm512_loadu_si512(at_codes), _mm_cvtsi64_si128(shift)), two_bits);
    __m512i values = _mm512_loadu_si512(at_block + (nibbles ? k / 2 : k) * 64);
    if (nibbles) values = _mm512_sub_epi8(_mm512_and_si512(k % 2 ? _mm512_srli_epi16(values, 4) : values, four_bits), eight);
    __m512i first = _mm512_load_si512(order);
    for (int64_t half = 0; half < 2; half++, first = _mm512_add_epi8(first, half_way)) {
      const __m512i second = _mm512_add_epi8(first, one);
      const __mmask64 is_first = _mm512_cmpeq_epi8_mask(_mm512_permutexvar_epi8(first, codes), place);
      const __mmask64 is_second = _mm512_cmpeq_epi8_mask(_mm512_permutexvar_epi8(second, codes), place);
      const __m512i found = _mm512_mask_permutexvar_epi8(_mm512_maskz_permutexvar_epi8(is_first, first, values), is_second, second, values);
      _mm512_storeu_si512(out + step * 128 + half * 64, found);
    }
  }
}

}  // namespace sparsepass::avx512

#endif
