// Kernels for AVX512: BW and BF16 for words, BW and VNNI for bytes. They are those of avx2.h, two steps at a time.
//
// vpdpbusd wants one side without sign: x + 128 it is, and 128 times the sum of the values is taken off again.

#pragma once

#include "avx2.h"
#include "layouts.h"

#if defined(__x86_64__)

#define SPARSEPASS_WORDS __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,f16c,fma")))
#define SPARSEPASS_BYTES __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")))

namespace sparsepass::avx512 {

// Bytes that are fetched before they are needed: into the second cache, because the first one's buffers fill up (AMD Zen 4: half
// the speed).
constexpr int64_t kAhead = 2048, kAheadOfBytes = 4096;
constexpr int kMostTokens = 8;    // of one call of a kernel

inline bool has(int kind) {
  const bool base = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512dq");
  return base && (is_integer(kind) ? __builtin_cpu_supports("avx512vnni")
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

// The sum of the halves, whose lanes are those of avx2::put_pair.
SPARSEPASS_WORDS inline __m256 halves(__m512 sum) { return _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1)); }

struct Tables {
  // Bytes 2c and 2c + 1 of the group of four words that a lane's value belongs to, c its code.
  alignas(64) uint16_t starts[32];
  // How far the codes of two steps are shifted: those of the first one in the low half of a register, of the second in the high one.
  alignas(64) uint16_t shifts[4][32];

  constexpr Tables() : starts(), shifts() {
    for (int lane = 0; lane < 32; lane++) {
      starts[lane] = static_cast<uint16_t>(lane % 4 / 2 * 8 * 0x0101 + 0x0100);
      for (int number = 0; number < 4; number++) shifts[number][lane] = static_cast<uint16_t>(4 * number + lane / 16 * 2);
    }
  }
};

inline constexpr Tables kTables;

// P pairs of rows at once: each register of x is read once for all of them.
template <int T, int P, bool kIsFp16>
SPARSEPASS_WORDS void pairs_of_words(const Product& p, const Layout& layout, const uint8_t* x, float* y, int64_t row) {
  const __m512i start = _mm512_load_si512(kTables.starts), two_bits = _mm512_set1_epi16(3), twice = _mm512_set1_epi16(0x0202);
  // One accumulator a token hides no latency where there are few: some take turns then.
  constexpr int kTurns = T * P == 1 ? 4 : T * P <= 3 ? 2 : 1;
  const uint8_t* at = static_cast<const uint8_t*>(p.weight->data) + layout.at_row(row);
  __m512 sums[P][T][kTurns];
  for (int r = 0; r < P; r++)
    for (int t = 0; t < T; t++)
      for (int turn = 0; turn < kTurns; turn++) sums[r][t][turn] = _mm512_setzero_ps();
  auto two_steps = [&](int number, const __m512i (&codes)[P], const uint8_t* values_at, const uint8_t* x_at) SPARSEPASS_WORDS {
    __m512i lanes[P], values[P];
    for (int r = 0; r < P; r++) {
      const __m512i own = _mm512_and_si512(_mm512_srlv_epi16(codes[r], _mm512_load_si512(kTables.shifts[number])), two_bits);
      lanes[r] = _mm512_add_epi16(_mm512_mullo_epi16(own, twice), start);
      values[r] = _mm512_loadu_si512(values_at + r * layout.unit_bytes);
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
      const __m512i of_token = _mm512_loadu_si512(x_at + t * p.x_bytes);
#pragma GCC unroll 2
      for (int r = 0; r < P; r++)
        sums[r][t][number % kTurns] =
            multiply_add<kIsFp16>(sums[r][t][number % kTurns], _mm512_shuffle_epi8(of_token, lanes[r]), values[r]);
    }
  };
  __m512i codes[P];
  const uint8_t* x_at = x;
  for (int64_t block = 0; block < layout.full; block++, at += 288, x_at += 256) {
    for (int r = 0; r < P; r++) {
      codes[r] = _mm512_broadcast_i64x4(avx2::load(at + r * layout.unit_bytes + 256));
      for (int line = 0; line < 5; line++)
        _mm_prefetch(reinterpret_cast<const char*>(at + r * layout.unit_bytes + kAhead + line * 64), _MM_HINT_T1);
    }
#pragma GCC unroll 4
    for (int number = 0; number < 4; number++) two_steps(number, codes, at + number * 64, x_at + number * 64);
  }
  if (layout.left) {
    for (int r = 0; r < P; r++) codes[r] = _mm512_broadcast_i64x4(avx2::load(at + r * layout.unit_bytes + layout.left * 32));
#pragma GCC unroll 3
    for (int number = 0; number < 3; number++)
      if (number * 2 < layout.left) two_steps(number, codes, at + number * 64, x_at + number * 64);
  }
  for (int r = 0; r < P; r++) {
    for (int t = 0; t < T; t++) {
      __m512 all = sums[r][t][0];
      for (int turn = 1; turn < kTurns; turn++) all = _mm512_add_ps(all, sums[r][t][turn]);
      __m256 sum = halves(all);
      // fp16: lanes 0 to 3 are the even row's.
      if constexpr (kIsFp16) sum = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(sum), 0xD8));
      const int64_t even = row + 2 * r;
      avx2::put_pair(sum, 1.f, 1.f, y + t * layout.rows + even, even + 1 < layout.rows);
    }
  }
}

template <int T, bool kIsFp16>
SPARSEPASS_WORDS void packed_words(const Product& p, const uint8_t* x, float* y, int64_t first, int64_t last) {
  const Layout layout(kAvx512, p.weight->kind, p.weight->rows, p.weight->columns);
  constexpr int kPairs = T == 1 ? 1 : 2;
  int64_t row = first;
  for (; row + 2 * kPairs <= last; row += 2 * kPairs) pairs_of_words<T, kPairs, kIsFp16>(p, layout, x, y, row);
  for (; row < last; row += 2) pairs_of_words<T, 1, kIsFp16>(p, layout, x, y, row);
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

// Scales of two rows, some of each, in the lanes that `order` says; those of the odd row are numbers 4 and up.
SPARSEPASS_BYTES inline __m512 lane_scales(const uint16_t* even, const uint16_t* odd, int64_t count, __m512i order) {
  const auto mask = static_cast<__mmask8>((1 << count) - 1);
  const __m128i words = _mm_unpacklo_epi64(_mm_maskz_loadu_epi16(mask, even), _mm_maskz_loadu_epi16(mask, odd));
  const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16);
  return _mm512_castsi512_ps(_mm512_permutexvar_epi32(order, _mm512_castsi256_si512(wide)));
}

// kGroups: scales of 128 columns.
template <int T, bool kNibbles, int kGroups>
SPARSEPASS_BYTES void packed_bytes(const Product& p, const uint8_t* x, const float* x_scales, float* y, int64_t first, int64_t last) {
  const auto& w = *p.weight;
  const Layout layout(kAvx512, w.kind, w.rows, w.columns);
  constexpr int kAtOnce = kGroups == 1 ? 1 : kGroups / 2;  // scales of one row that a sum of products needs
  const int64_t size = w.group_size ? w.group_size : w.columns, scales_a_row = ceil_div(w.columns, size);
  const int64_t blocks_a_scale = std::max<int64_t>(1, size / kGroup);
  const bool row_has_one = kGroups == 1 && scales_a_row == 1;
  alignas(64) uint8_t starts[64];
  alignas(64) int32_t lane_order[16];
  for (int lane = 0; lane < 64; lane++) starts[lane] = static_cast<uint8_t>(lane % 8 / 2 * 4);
  for (int lane = 0; lane < 16; lane++) lane_order[lane] = lane * kAtOnce / 16 + (lane % 4 / 2 ? 4 : 0);
  const __m512i start = _mm512_load_si512(starts), order = _mm512_load_si512(lane_order), two_bits = _mm512_set1_epi8(3);
  const __m512i four_bits = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8), offset = _mm512_set1_epi8(static_cast<char>(128));
  for (int64_t row = first; row < last; row += 2) {
    const uint8_t* at = static_cast<const uint8_t*>(w.data) + layout.at_row(row);
    const bool has_odd = row + 1 < w.rows;
    const uint16_t* even = w.scales + row * scales_a_row;
    const uint16_t* odd = has_odd ? even + scales_a_row : even;
    __m512 sums[T];
    for (int t = 0; t < T; t++) sums[t] = _mm512_setzero_ps();
    for (int64_t block = 0; block < layout.full; block++, at += layout.block_bytes) {
      const __m512i codes = _mm512_broadcast_i64x4(avx2::load(at + layout.values_bytes));
      for (int64_t line = 0; line < layout.block_bytes; line += 64)
        _mm_prefetch(reinterpret_cast<const char*>(at + kAheadOfBytes + line), _MM_HINT_T1);
      __m512i excess = _mm512_setzero_si512(), products[T];
      for (int t = 0; t < T; t++) products[t] = _mm512_setzero_si512();
#pragma GCC unroll 2
      for (int number = 0; number < 2; number++) {
        __m512i values;
        if constexpr (kNibbles) {
          const __m512i pair = _mm512_loadu_si512(at);
          values = _mm512_sub_epi8(_mm512_and_si512(number ? _mm512_srli_epi16(pair, 4) : pair, four_bits), eight);
        } else {
          values = _mm512_loadu_si512(at + number * 64);
        }
        // (codes & 3) | start; bits of a neighbour come in from above, where the mask takes them off.
        const __m512i lanes = _mm512_ternarylogic_epi64(_mm512_srlv_epi16(codes, _mm512_load_si512(kTables.shifts[number])), two_bits, start, 0xEA);
        excess = _mm512_dpbusd_epi32(excess, offset, values);
        for (int t = 0; t < T; t++) {
          const __m512i met = _mm512_shuffle_epi8(_mm512_loadu_si512(x + t * p.x_bytes + block * 128 + number * 64), lanes);
          products[t] = _mm512_dpbusd_epi32(products[t], met, values);
        }
        if (kGroups == 1 && number == 0) continue;
        __m512 scale;
        if (row_has_one) {
          scale = _mm512_set1_ps(1.f);
        } else {
          const int64_t begin = kGroups == 1 ? block / blocks_a_scale : block * kGroups + number * kAtOnce;
          const int64_t from = std::min(begin, scales_a_row - 1);
          scale = lane_scales(even + from, odd + from, std::min<int64_t>(kAtOnce, scales_a_row - from), order);
        }
        for (int t = 0; t < T; t++) {
          const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x_scales[t * p.x_groups + block]));
          sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(products[t], excess)), both, sums[t]);
          products[t] = _mm512_setzero_si512();
        }
        excess = _mm512_setzero_si512();
      }
    }
    const float scale_even = row_has_one ? widen_bf16(even[0]) : 1.f, scale_odd = row_has_one ? widen_bf16(odd[0]) : 1.f;
    for (int t = 0; t < T; t++) avx2::put_pair(halves(sums[t]), scale_even, scale_odd, y + t * w.rows + row, has_odd);
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

// One row, 32 columns of words or 64 of bytes at a time; `out` has room for whole registers.
template <bool kWords>
SPARSEPASS_WORDS void unpack(const Layout& layout, const uint8_t* data, int64_t row, uint8_t* out) {
  const avx2::Places half = avx2::places_of<kWords>(row);
  const __m512i first = _mm512_broadcast_i64x4(half.first), second = _mm512_broadcast_i64x4(half.second);
  const __m512i place = _mm512_broadcast_i64x4(half.place), two_bits = kWords ? _mm512_set1_epi16(3) : _mm512_set1_epi8(3);
  const __m512i four_bits = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
  const bool nibbles = layout.kind == kInt4;
  const uint8_t* at = data + layout.at_row(row);
  for (int64_t block = 0; block * layout.per_block < layout.steps; block++, at += layout.block_bytes) {
    const bool is_left = block == layout.full;
    const __m512i all = _mm512_broadcast_i64x4(avx2::load(at + (is_left ? layout.left * 32 : layout.values_bytes)));
    const int64_t count = (is_left ? layout.left : layout.per_block) / 2;
    for (int64_t k = 0; k < count; k++, out += 64) {
      const __m512i codes = _mm512_and_si512(_mm512_srlv_epi16(all, _mm512_load_si512(kTables.shifts[k])), two_bits);
      __m512i values = _mm512_loadu_si512(at + (nibbles ? 0 : k) * 64);
      if (nibbles) values = _mm512_sub_epi8(_mm512_and_si512(k ? _mm512_srli_epi16(values, 4) : values, four_bits), eight);
      const __m512i of_first = _mm512_shuffle_epi8(codes, first), of_second = _mm512_shuffle_epi8(codes, second);
      const __m512i firsts = _mm512_shuffle_epi8(values, first), seconds = _mm512_shuffle_epi8(values, second);
      __m512i found;
      if constexpr (kWords) {
        found = _mm512_maskz_mov_epi16(_mm512_cmpeq_epi16_mask(of_first, place), firsts);
        found = _mm512_mask_mov_epi16(found, _mm512_cmpeq_epi16_mask(of_second, place), seconds);
      } else {
        found = _mm512_maskz_mov_epi8(_mm512_cmpeq_epi8_mask(of_first, place), firsts);
        found = _mm512_mask_mov_epi8(found, _mm512_cmpeq_epi8_mask(of_second, place), seconds);
      }
      _mm512_storeu_si512(out, found);
    }
  }
}

}  // namespace sparsepass::avx512

#endif
