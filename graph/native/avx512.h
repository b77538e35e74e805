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

constexpr int kMostTokens = 8;  // of one call of a kernel

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

// The same for half a register.
template <bool kIsFp16>
SPARSEPASS_WORDS inline __m256 multiply_add_half(__m256 sum, __m256i x, __m256i values) {
  if constexpr (kIsFp16) {
    sum = _mm256_fmadd_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_castsi256_si128(values)), sum);
    return _mm256_fmadd_ps(
        _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1)), _mm256_cvtph_ps(_mm256_extracti128_si256(values, 1)), sum);
  } else {
    return _mm256_dpbf16_ps(sum, (__m256bh)x, (__m256bh)values);
  }
}

// The sum of the halves, whose lanes are those of avx2::put_pair.
SPARSEPASS_WORDS inline __m256 halves(__m512 sum) { return _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1)); }

struct Tables {
  // The first word of the group of four that a lane's value belongs to.
  alignas(64) uint16_t starts[32];
  // How far the codes of two steps are shifted: those of the first one in the low half of a register, of the second in the high one.
  alignas(64) uint16_t shifts[4][32];

  constexpr Tables() : starts(), shifts() {
    for (int lane = 0; lane < 32; lane++) {
      starts[lane] = static_cast<uint16_t>(lane / 8 * 8 + lane % 4 / 2 * 4);
      for (int number = 0; number < 4; number++) shifts[number][lane] = static_cast<uint16_t>(4 * number + lane / 16 * 2);
    }
  }
};

inline constexpr Tables kTables;

// avx2::branch_of_pair for 16 sums.
SPARSEPASS_WORDS inline __m512i branch_of_pair(const uint16_t* even, const uint16_t* odd, int64_t count) {
  const auto mask = static_cast<__mmask16>(count >= 16 ? 0xffff : (1 << count) - 1);
  const __m512i a = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(mask, even)), b = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(mask, odd));
  return _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), b);
}

// P pairs of rows at once: each register of x is read once for all of them.
template <int T, int P, bool kIsFp16>
SPARSEPASS_WORDS void pairs_of_words(const Product& p, const Layout& layout, const Panel& panel, int64_t row) {
  const __m512i start = _mm512_load_si512(kTables.starts), two_bits = _mm512_set1_epi16(3);
  const uint8_t* at = static_cast<const uint8_t*>(p.weight->data) + layout.at(row, panel);
  __m512 sums[P][T];
  for (int r = 0; r < P; r++)
    for (int t = 0; t < T; t++) sums[r][t] = _mm512_setzero_ps();
  auto two_steps = [&](int number, const __m512i (&codes)[P], const uint8_t* values_at, const uint8_t* x_at) SPARSEPASS_WORDS {
    __m512i lanes[P], values[P];
    for (int r = 0; r < P; r++) {
      // (codes & 3) | start; bits of a neighbour come in from above, where the mask takes them off.
      lanes[r] = _mm512_ternarylogic_epi64(_mm512_srlv_epi16(codes[r], _mm512_load_si512(kTables.shifts[number])), two_bits, start, 0xEA);
      values[r] = _mm512_loadu_si512(values_at + r * panel.pair_bytes);
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
      const __m512i of_token = _mm512_loadu_si512(x_at + t * p.x_bytes);
#pragma GCC unroll 2
      for (int r = 0; r < P; r++)
        sums[r][t] = multiply_add<kIsFp16>(sums[r][t], _mm512_permutexvar_epi16(lanes[r], of_token), values[r]);
    }
  };
  __m512i codes[P];
  const uint8_t* x_at = p.x + panel.begin * 256;
  for (int64_t block = panel.begin; block < panel.end; block++, at += 288, x_at += 256) {
    for (int r = 0; r < P; r++) {
      codes[r] = _mm512_broadcast_i64x4(avx2::load(at + r * panel.pair_bytes));
      if (p.fetches_ahead) avx2::fetch(at + r * panel.pair_bytes, 288);
    }
#pragma GCC unroll 4
    for (int number = 0; number < 4; number++) two_steps(number, codes, at + Layout::kStep + number * 64, x_at + number * 64);
  }
  if (panel.left) {
    for (int r = 0; r < P; r++) codes[r] = _mm512_broadcast_i64x4(avx2::load(at + r * panel.pair_bytes));
#pragma GCC unroll 3
    for (int number = 0; number < 3; number++)
      if (number * 2 < panel.left) two_steps(number, codes, at + Layout::kStep + number * 64, x_at + number * 64);
  }
  if (p.sums != nullptr && panel.begin == 0) {
    const int64_t count = p.weight->columns / p.weight->k;
    for (int r = 0; r < P; r++) {
      const int64_t even = row + 2 * r, odd = std::min(even + 1, layout.rows - 1);
      for (int64_t i = 0; i < count; i += 16) {
        const __m512i values = branch_of_pair(p.weight->branch + even * count + i, p.weight->branch + odd * count + i, count - i);
        for (int t = 0; t < T; t++)
          sums[r][t] = multiply_add<kIsFp16>(sums[r][t], _mm512_loadu_si512(p.sums + t * p.sums_bytes + i * 4), values);
      }
    }
  }
  for (int r = 0; r < P; r++) {
    const int64_t even = row + 2 * r;
    const bool has_odd = even + 1 < layout.rows, adds = panel.begin > 0;
    float* y = p.y + even;
    __m256 half[T];
    for (int t = 0; t < T; t++) {
      half[t] = halves(sums[r][t]);
      // fp16: lanes 0 to 3 are the even row's.
      if constexpr (kIsFp16) half[t] = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(half[t]), 0xD8));
    }
    int t = 0;
    for (; has_odd && t + 2 <= T; t += 2) avx2::put_pairs(half[t], half[t + 1], y + t * p.y_rows, y + (t + 1) * p.y_rows, adds);
    for (; t < T; t++) avx2::put_pair(half[t], y + t * p.y_rows, has_odd, adds);
  }
}

// One token takes as long as the weight is read, and from memory that goes fastest in halves of registers (AMD Zen 4: as fast as anything
// reads, against 27 GB/s of 45 by whole ones).
//
// kHasRest: there are steps after the last whole block, or a branch.
template <bool kIsFp16, bool kHasRest>
SPARSEPASS_WORDS void rows_for_one_token(const Product& p, const Layout& layout, const Panel& panel, int64_t first, int64_t last) {
  constexpr int kTurns = 8;
  const __m256i start = avx2::load(kTables.starts), two_bits = _mm256_set1_epi16(3);
  const bool fetches = p.fetches_ahead, adds = panel.begin > 0;
  const auto* data = static_cast<const uint8_t*>(p.weight->data);
  const uint8_t* x = p.x + panel.begin * 256;
  const int64_t blocks = panel.end - panel.begin;
  const uint8_t* at = data + layout.at(first, panel);
  for (int64_t row = first; row < last; row += 2) {
    if (row % layout.unit_rows == 0) at = data + layout.at(row, panel);
    __m256 sums[kTurns];
#pragma GCC unroll 8
    for (int turn = 0; turn < kTurns; turn++) sums[turn] = _mm256_setzero_ps();
    const uint8_t* x_at = x;
    for (int64_t block = 0; block < blocks; block++, at += 288, x_at += 256) {
      const __m256i codes = avx2::load(at);
      if (fetches) avx2::fetch(at, 288);
#pragma GCC unroll 8
      for (int k = 0; k < 8; k++) {
        const __m256i lanes = _mm256_ternarylogic_epi64(_mm256_srli_epi16(codes, 2 * k), two_bits, start, 0xEA);
        const __m256i met = _mm256_permutexvar_epi16(lanes, avx2::load(x_at + k * 32));
        sums[k] = multiply_add_half<kIsFp16>(sums[k], met, avx2::load(at + Layout::kStep + k * 32));
      }
    }
    const __m256 low = _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
    __m256 sum = _mm256_add_ps(low, _mm256_add_ps(_mm256_add_ps(sums[4], sums[5]), _mm256_add_ps(sums[6], sums[7])));
    if constexpr (kHasRest) {
      if (panel.left) {
        __m256i codes = avx2::load(at);
        for (int64_t k = 0; k < panel.left; k++, codes = _mm256_srli_epi16(codes, 2)) {
          const __m256i lanes = _mm256_ternarylogic_epi64(codes, two_bits, start, 0xEA);
          const __m256i met = _mm256_permutexvar_epi16(lanes, avx2::load(x_at + k * 32));
          sum = multiply_add_half<kIsFp16>(sum, met, avx2::load(at + Layout::kStep + k * 32));
        }
        at += (panel.left + 1) * Layout::kStep;
      }
      if (p.sums != nullptr && !adds) {
        avx2::each_of_branch(p, row, [&](const uint8_t* at_sums, __m256i values) SPARSEPASS_WORDS {
          sum = multiply_add_half<kIsFp16>(sum, avx2::load(at_sums), values);
        });
      }
    }
    // fp16: lanes 0 to 3 are the even row's.
    if constexpr (kIsFp16) sum = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(sum), 0xD8));
    avx2::put_pair(sum, p.y + row, row + 1 < layout.rows, adds);
  }
}

template <int T, bool kIsFp16>
SPARSEPASS_WORDS void packed_words(const Product& p, const Layout& layout, const Panel& panel, int64_t first, int64_t last) {
  int64_t row = first;
  if constexpr (T == 1) {
    const auto& rows = panel.left || p.sums != nullptr ? rows_for_one_token<kIsFp16, true> : rows_for_one_token<kIsFp16, false>;
    return rows(p, layout, panel, first, last);
  }
  // Few tokens are done while the next bytes come, and these come faster one after the other.
  if constexpr (T >= 4) {
    for (; row + 4 <= last; row += 4) pairs_of_words<T, 2, kIsFp16>(p, layout, panel, row);
  }
  for (; row < last; row += 2) pairs_of_words<T, 1, kIsFp16>(p, layout, panel, row);
}

// y += x W^T for words that lie row by row.
template <int T, bool kIsFp16>
SPARSEPASS_WORDS void add_words(const uint16_t* weight, int64_t columns, const uint8_t* x, int64_t x_bytes, float* y, int64_t rows,
                                int64_t first, int64_t last) {
  constexpr int kTurns = T <= 2 ? 4 : 1;
  const bool fetches = fetches_ahead();
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
        if (fetches) avx2::fetch(at + (i + turn) * 64, 64);
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

// A value that stays in its register: compilers would read it from memory at each use, and a register of 64 bytes is a read a cycle.
SPARSEPASS_BYTES inline __m512i in_register(__m512i value) {
  asm("" : "+v"(value));
  return value;
}

// Those of PairScales for 64 columns.
template <int kGroups>
SPARSEPASS_BYTES inline __m512 lane_scales(const float* from) {
  if constexpr (kGroups == 8) return _mm512_load_ps(from);
  if constexpr (kGroups == 4) {
    const __m512 twice = _mm512_broadcast_f32x8(_mm256_load_ps(from));
    return _mm512_shuffle_f32x4(twice, twice, 0x50);
  }
  return _mm512_broadcast_f32x4(_mm_load_ps(from));
}

// kGroups: scales of 128 columns. kSigned: x is signed, and the nibbles are not; 8 times the sum of x is taken off then.
template <int T, bool kNibbles, int kGroups, bool kSigned>
SPARSEPASS_BYTES void packed_bytes(const Product& p, const Layout& layout, const Panel& panel, int64_t first, int64_t last) {
  static_assert(!kSigned || (T == 1 && kNibbles));
  const auto& w = *p.weight;
  const bool fetches = p.fetches_ahead;
  alignas(64) uint8_t starts[64];
  for (int lane = 0; lane < 64; lane++) starts[lane] = static_cast<uint8_t>(lane % 8 / 2 * 4);
  const __m512i start = in_register(_mm512_load_si512(starts)), two_bits = in_register(_mm512_set1_epi8(3));
  const __m512i shifts[2] = {in_register(_mm512_load_si512(kTables.shifts[0])), in_register(_mm512_load_si512(kTables.shifts[1]))};
  const __m512i four_bits = in_register(_mm512_set1_epi8(15)), eight = in_register(_mm512_set1_epi8(8));
  const __m512i offset = in_register(_mm512_set1_epi8(static_cast<char>(128)));
  avx2::PairScales<kGroups> scales(w, panel, T == 1 ? p.x_scales : nullptr);
  for (int64_t row = first; row < last; row += 2) {
    const uint8_t* at = static_cast<const uint8_t*>(w.data) + layout.at(row, panel);
    const bool has_odd = row + 1 < w.rows;
    const uint16_t* even = w.scales + row * scales.a_row();
    scales.take(even, has_odd ? even + scales.a_row() : even);
    __m512 sums[T];
    for (int t = 0; t < T; t++) sums[t] = _mm512_setzero_ps();
    for (int64_t block = panel.begin; block < panel.end; block++, at += layout.block_bytes) {
      const __m512i codes = _mm512_broadcast_i64x4(avx2::load(at));
      if (fetches) avx2::fetch(at, layout.block_bytes);
      __m512i excess = _mm512_setzero_si512(), products[T];
      for (int t = 0; t < T; t++) products[t] = _mm512_setzero_si512();
      const __m512i pair = in_register(_mm512_loadu_si512(at + Layout::kStep));
#pragma GCC unroll 2
      for (int number = 0; number < 2; number++) {
        __m512i values;
        if constexpr (kNibbles) {
          values = _mm512_and_si512(number ? _mm512_srli_epi16(pair, 4) : pair, four_bits);
          if constexpr (!kSigned) values = _mm512_sub_epi8(values, eight);
        } else {
          values = number ? _mm512_loadu_si512(at + Layout::kStep + 64) : pair;
        }
        const __m512i lanes = _mm512_ternarylogic_epi64(_mm512_srlv_epi16(codes, shifts[number]), two_bits, start, 0xEA);
        if constexpr (!kSigned) excess = _mm512_dpbusd_epi32(excess, offset, values);
        for (int t = 0; t < T; t++) {
          const __m512i met = _mm512_shuffle_epi8(_mm512_loadu_si512(p.x + t * p.x_bytes + block * 128 + number * 64), lanes);
          if constexpr (kSigned) {
            excess = _mm512_dpbusd_epi32(excess, eight, met);
            products[t] = _mm512_dpbusd_epi32(products[t], values, met);
          } else {
            products[t] = _mm512_dpbusd_epi32(products[t], met, values);
          }
        }
        if (kGroups == 1 && number == 0) continue;
        const __m512 scale = lane_scales<kGroups>(scales.of(block, number * kGroups / 2));
        for (int t = 0; t < T; t++) {
          const __m512 both = T == 1 ? scale : _mm512_mul_ps(scale, _mm512_set1_ps(p.x_scales[t * p.x_groups + block]));
          sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(products[t], excess)), both, sums[t]);
          products[t] = _mm512_setzero_si512();
        }
        excess = _mm512_setzero_si512();
      }
    }
    __m256 half[T];
    for (int t = 0; t < T; t++) half[t] = halves(sums[t]);
    if (p.sums != nullptr && panel.begin == 0) {
      avx2::each_of_branch(p, row, [&](const uint8_t* at_sums, __m256i values) SPARSEPASS_BYTES {
        for (int t = 0; t < T; t++) {
          __m256 both[2] = {half[t], _mm256_setzero_ps()};
          avx2::multiply_add<false>(both, avx2::load(at_sums + t * p.sums_bytes), values);
          half[t] = _mm256_add_ps(both[0], both[1]);
        }
      });
    }
    for (int t = 0; t < T; t++) avx2::put_pair(half[t], p.y + t * p.y_rows + row, has_odd, panel.begin > 0);
  }
}

template <int T>
SPARSEPASS_BYTES void dense_bytes(const Product& p, int64_t first, int64_t last) {
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
        if (p.fetches_ahead) avx2::fetch(at + start, kGroup);
      } else {
        low = _mm512_maskz_loadu_epi8(rest >= 64 ? ~0ull : (1ull << rest) - 1, at + start);
        high = rest > 64 ? _mm512_maskz_loadu_epi8((1ull << (rest - 64)) - 1, at + start + 64) : _mm512_setzero_si512();
      }
      const __m512i excess = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), offset, low), offset, high);
      for (int t = 0; t < T; t++) {
        const uint8_t* of_token = p.x + t * p.x_bytes + start;
        __m512i products = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(of_token), low);
        products = _mm512_sub_epi32(_mm512_dpbusd_epi32(products, _mm512_loadu_si512(of_token + 64), high), excess);
        const __m512 scale = _mm512_set1_ps(p.x_scales[t * p.x_groups + start / kGroup]);
        sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), scale, sums[t]);
      }
    }
    const float scale = widen_bf16(w.scales[row]);
    for (int t = 0; t < T; t++) p.y[t * p.y_rows + row] = _mm512_reduce_add_ps(sums[t]) * scale;
  }
}

// ---- Bytes as words ----

// int8 and int4 as bf16, scaled: some rows of `from`, which lie there together, in the layout `to` of these rows by themselves.
template <bool kNibbles>
SPARSEPASS_WORDS void to_words(const SparsepassWeight& w, const Layout& from, int64_t first, const Layout& to, uint8_t* out) {
  const __m128i order = _mm_setr_epi8(0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15), eight = _mm_set1_epi8(8), four_bits = _mm_set1_epi8(15);
  const int64_t size = w.group_size ? w.group_size : w.columns, scales_a_row = ceil_div(w.columns, size);
  auto half = [](const uint8_t* at) SPARSEPASS_WORDS { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); };
  // A byte's four codes, four bits apart.
  auto spread = [&](__m128i codes) SPARSEPASS_WORDS {
    __m256i words = _mm256_cvtepu8_epi16(_mm_shuffle_epi8(codes, order));
    words = _mm256_and_si256(_mm256_or_si256(words, _mm256_slli_epi16(words, 4)), _mm256_set1_epi16(0x0f0f));
    return _mm256_and_si256(_mm256_or_si256(words, _mm256_slli_epi16(words, 2)), _mm256_set1_epi16(0x3333));
  };
  for (int64_t row = 0; row < to.rows; row += 2) {
    const uint16_t* even = w.scales + (first + row) * scales_a_row;
    const uint16_t* odd = row + 1 < to.rows ? even + scales_a_row : even;
    int64_t until = 0, group = 0;
    __m512 scale = _mm512_setzero_ps();
    for (int64_t part = 0, wide = 0, block = 0; part < from.panels; part++) {
      const Panel panel = from.panel(part);
      const uint8_t* at = static_cast<const uint8_t*>(w.data) + from.at(first + row, panel);
      for (; block < panel.end; block++, at += from.block_bytes) {
        if (wide + 1 < to.panels && block == to.panel(wide).end) wide++;
        const Panel to_panel = to.panel(wide);
        uint8_t* to_at = out + to.at(row, to_panel) + (block - to_panel.begin) * to.block_bytes;
        const int64_t steps = block == to.full ? to.left : to.per_block;
        for (int64_t k = 0; k < steps; k++) {
          if (const int64_t column = block * kGroup + k * 16; column == until) {
            const int64_t own = std::min(group, scales_a_row - 1);  // a row's padding has no scale
            const __m512 a = _mm512_set1_ps(widen_bf16(even[own])), b = _mm512_set1_ps(widen_bf16(odd[own]));
            scale = _mm512_mask_blend_ps(0xf0f0, a, b);
            until += size, group++;
          }
          __m128i values = half(at + Layout::kStep + (kNibbles ? k / 2 % 2 : k / 2) * 32 + k % 2 * 16);
          if (kNibbles) values = _mm_sub_epi8(_mm_and_si128(k < 4 ? values : _mm_srli_epi16(values, 4), four_bits), eight);
          const __m512 numbers = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_shuffle_epi8(values, order)));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to_at + (k + 1) * 32), (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(numbers, scale)));
        }
        const __m256i codes = _mm256_or_si256(spread(half(at)), _mm256_slli_epi16(spread(half(at + 16)), 2));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to_at), codes);
      }
    }
  }
}

// ---- With their zeros ----

// Lanes and places of avx2::Places for whole registers.
struct WidePlaces {
  __m512i first, second, place;

  SPARSEPASS_WORDS explicit WidePlaces(const avx2::Places& half)
      : first(_mm512_broadcast_i64x4(half.first)), second(_mm512_broadcast_i64x4(half.second)), place(_mm512_broadcast_i64x4(half.place)) {}

  // One register of values and one of codes: the columns of one row.
  template <bool kWords>
  SPARSEPASS_WORDS __m512i spread(__m512i values, __m512i codes) const {
    const __m512i of_first = _mm512_shuffle_epi8(codes, first), of_second = _mm512_shuffle_epi8(codes, second);
    const __m512i firsts = _mm512_shuffle_epi8(values, first), seconds = _mm512_shuffle_epi8(values, second);
    if constexpr (kWords) {
      const __m512i found = _mm512_maskz_mov_epi16(_mm512_cmpeq_epi16_mask(of_first, place), firsts);
      return _mm512_mask_mov_epi16(found, _mm512_cmpeq_epi16_mask(of_second, place), seconds);
    } else {
      const __m512i found = _mm512_maskz_mov_epi8(_mm512_cmpeq_epi8_mask(of_first, place), firsts);
      return _mm512_mask_mov_epi8(found, _mm512_cmpeq_epi8_mask(of_second, place), seconds);
    }
  }
};

// The blocks from `begin` to `end` of a row, or of two, of one panel: 32 columns of words or 64 of bytes at a time, which lie `apart` bytes
// from each other; whole registers are written. `reads_on`: what lies behind them is needed next. Returns where the next columns go.
template <bool kWords, int kRows = 1>
SPARSEPASS_WORDS uint8_t* unpack(const Layout& layout, const Panel& panel, int64_t begin, int64_t end, const uint8_t* data, int64_t row,
                                 uint8_t* out, int64_t apart = 64, int64_t rows_apart = 0, bool reads_on = true) {
  constexpr int kSteps = kWords ? 4 : 2;  // registers of a block
  const WidePlaces places[2] = {WidePlaces(avx2::places_of<kWords>(row)), WidePlaces(avx2::places_of<kWords>(row + kRows - 1))};
  const __m512i two_bits = kWords ? _mm512_set1_epi16(3) : _mm512_set1_epi8(3);
  const __m512i four_bits = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
  const bool nibbles = layout.kind == kInt4, fetches = reads_on && fetches_ahead() && row % 2 == 0;
  const int64_t block_bytes = layout.block_bytes;
  const uint8_t* at = data + layout.at(row, panel) + (begin - panel.begin) * block_bytes;
  for (int64_t block = begin; block < end; block++, at += block_bytes) {
    if (fetches) avx2::fetch(at, block_bytes);
    const int64_t count = block == layout.full ? panel.left / 2 : kSteps;
    const __m512i all = _mm512_broadcast_i64x4(avx2::load(at));
#pragma GCC unroll 4
    for (int k = 0; k < kSteps; k++) {
      if (k >= count) break;
      const __m512i codes = _mm512_and_si512(_mm512_srlv_epi16(all, _mm512_load_si512(kTables.shifts[k])), two_bits);
      __m512i values = _mm512_loadu_si512(at + Layout::kStep + (nibbles ? 0 : k) * 64);
      if (nibbles) values = _mm512_sub_epi8(_mm512_and_si512(k ? _mm512_srli_epi16(values, 4) : values, four_bits), eight);
#pragma GCC unroll 2
      for (int r = 0; r < kRows; r++) _mm512_storeu_si512(out + r * rows_apart, places[r].template spread<kWords>(values, codes));
      out += apart;
    }
  }
  return out;
}

// A whole row.
template <bool kWords>
SPARSEPASS_WORDS void unpack(const Layout& layout, const uint8_t* data, int64_t row, uint8_t* out) {
  for (int64_t number = 0; number < layout.panels; number++) {
    const Panel panel = layout.panel(number);
    out = unpack<kWords>(layout, panel, panel.begin, panel.last(), data, row, out);
  }
}

}  // namespace sparsepass::avx512

#endif
