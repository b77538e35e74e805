// Yardsticks: dense weights of bf16, int8 and int4, for one token. They are made like the kernels of graph/native: the same threads, the
// same activations (signed bytes, one scale for 128 columns), and the same order in memory: where a row is so long that x would not stay in
// the first cache, 32 rows lie together, cut into panels.
//
// int4 has one fp16 scale in 32 columns, as ggml's Q4_0 has. A row is cut into blocks of 512 columns (avx512) or 64 (avx2), and these into
// steps of 128 or 64: the nibbles q + 8 of a step's first half in the low halves of the bytes and those of the second half in the high ones;
// behind the steps of a block lie its scales. The 8 is taken off by starting each sum of four products at -8 times the sum of its four x,
// which is known beforehand. Rows are filled up to whole blocks.

#include <vector>

#include "../../graph/native/activations.h"
#include "../../graph/native/avx512.h"

using namespace sparsepass;

namespace {

constexpr int64_t kRowsTogether = 32;

#if defined(__x86_64__)

#define YARDSTICK_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")))

// ---- Panels ----

// Columns of a panel: x of 8 KB, or for int4 as much with the sums that it is read with.
int64_t panel_columns(int64_t columns, int64_t bytes_a_column, int64_t multiple) {
  const int64_t panels = ceil_div(columns * bytes_a_column, 8192);
  return ceil_div(ceil_div(columns, panels), multiple) * multiple;
}

// Calls run(row, number of rows, column, number of columns, bytes before) for the panels of some rows, in the order of memory.
template <class Run>
void each_panel(int64_t first, int64_t last, int64_t columns, int64_t wide, int64_t row_bytes, const Run& run) {
  for (int64_t row = first; row < last; row += kRowsTogether) {
    const int64_t count = std::min(kRowsTogether, last - row);
    for (int64_t column = 0; column < columns; column += wide)
      run(row, count, column, std::min(wide, columns - column), row * row_bytes + count * column * row_bytes / columns);
  }
}

// ---- int4 ----

struct Token {
  const int8_t* x;
  const int32_t* starts;  // for each four columns
  const float* scales;    // for each 32 columns
};

// y += W x for rows that lie one after the other.
YARDSTICK_AVX512 void avx512_rows(const uint8_t* at, const Token& token, int64_t blocks, float* y, int64_t rows) {
  const __m512i four_bits = _mm512_set1_epi8(15), four = _mm512_set1_epi32(4);
  const __m512i orders[2] = {_mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0),
                             _mm512_set_epi32(3, 3, 3, 3, 3, 3, 3, 3, 2, 2, 2, 2, 2, 2, 2, 2)};
  const bool fetches = fetches_ahead();
  for (int64_t row = 0; row < rows; row++) {
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int64_t block = 0; block < blocks; block++, at += 288) {
      if (fetches) avx2::fetch(at, 288);
      const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 256));
      const __m512 scales = _mm512_mul_ps(_mm512_cvtph_ps(words), _mm512_loadu_ps(token.scales + block * 16));
      __m512i low_order = orders[0], high_order = orders[1];
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) {
        const int64_t step = block * 4 + k;
        const __m512i nibbles = _mm512_loadu_si512(at + k * 64);
        const __m512i low = _mm512_and_si512(nibbles, four_bits), high = _mm512_and_si512(_mm512_srli_epi16(nibbles, 4), four_bits);
        const __m512i of_low =
            _mm512_dpbusd_epi32(_mm512_loadu_si512(token.starts + step * 32), low, _mm512_loadu_si512(token.x + step * 128));
        const __m512i of_high =
            _mm512_dpbusd_epi32(_mm512_loadu_si512(token.starts + step * 32 + 16), high, _mm512_loadu_si512(token.x + step * 128 + 64));
        even = _mm512_fmadd_ps(_mm512_cvtepi32_ps(of_low), _mm512_permutexvar_ps(low_order, scales), even);
        odd = _mm512_fmadd_ps(_mm512_cvtepi32_ps(of_high), _mm512_permutexvar_ps(high_order, scales), odd);
        low_order = _mm512_add_epi32(low_order, four), high_order = _mm512_add_epi32(high_order, four);
      }
    }
    y[row] += _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
  }
}

SPARSEPASS_AVX2 void avx2_rows(const uint8_t* at, const Token& token, int64_t blocks, float* y, int64_t rows) {
  const __m256i four_bits = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  const bool fetches = fetches_ahead();
  for (int64_t row = 0; row < rows; row++) {
    __m256 even = _mm256_setzero_ps(), odd = even;
    for (int64_t step = 0; step < blocks; step++, at += 36) {
      if (fetches) avx2::fetch(at, 36);
      const __m256i nibbles = avx2::load(at);
      uint32_t words;
      std::memcpy(&words, at + 32, 4);
      const __m128 of_x = _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(token.scales + step * 2)));
      const __m128 scales = _mm_mul_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(static_cast<int>(words))), of_x);
      const __m256i low = _mm256_and_si256(nibbles, four_bits), high = _mm256_and_si256(_mm256_srli_epi16(nibbles, 4), four_bits);
      const __m256i of_low = _mm256_madd_epi16(_mm256_maddubs_epi16(low, avx2::load(token.x + step * 64)), ones);
      const __m256i of_high = _mm256_madd_epi16(_mm256_maddubs_epi16(high, avx2::load(token.x + step * 64 + 32)), ones);
      even = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(of_low, avx2::load(token.starts + step * 16))),
                             _mm256_broadcastss_ps(scales), even);
      odd = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(of_high, avx2::load(token.starts + step * 16 + 8))),
                            _mm256_broadcastss_ps(_mm_movehdup_ps(scales)), odd);
    }
    y[row] += avx2::sum_of(_mm256_add_ps(even, odd));
  }
}

#endif

int64_t block_columns(int path) { return path == kAvx512 ? 512 : 64; }

// With the zeros that fill up a row.
int64_t whole_columns(int path, int64_t columns) { return ceil_div(columns, block_columns(path)) * block_columns(path); }

}  // namespace

extern "C" {

void yardstick_use_openmp(void* entry) { gomp_parallel = reinterpret_cast<GompParallel>(entry); }

// Bytes of an int4 weight.
int64_t yardstick_int4_bytes(int path, int64_t rows, int64_t columns) { return rows * whole_columns(path, columns) / 64 * 36; }

#if defined(__x86_64__)

// Lays out dense values of `size` bytes.
void yardstick_lay_out(int64_t size, const uint8_t* values, int64_t rows, int64_t columns, uint8_t* out) {
  each_panel(0, rows, columns, panel_columns(columns, size, kGroup), columns * size,
             [&](int64_t row, int64_t count, int64_t column, int64_t wide, int64_t before) {
               for (int64_t i = 0; i < count; i++)
                 std::memcpy(out + before + i * wide * size, values + ((row + i) * columns + column) * size, static_cast<size_t>(wide * size));
             });
}

// Lays out q [rows, columns] (-8 to 7) with scales fp16 [rows, columns / 32]; columns a multiple of 128.
void yardstick_int4_lay_out(int path, const int8_t* q, const uint16_t* scales, int64_t rows, int64_t columns, uint8_t* out) {
  const int64_t whole = whole_columns(path, columns), block = block_columns(path), size = std::min<int64_t>(block, 128), half = size / 2;
  auto nibble = [&](int64_t row, int64_t column) { return column < columns ? q[row * columns + column] + 8 : 8; };
  each_panel(0, rows, whole, panel_columns(whole, 2, block), whole / 64 * 36,
             [&](int64_t row, int64_t count, int64_t first, int64_t wide, int64_t before) {
               uint8_t* to = out + before;
               for (int64_t i = row; i < row + count; i++) {
                 for (int64_t start = first; start < first + wide; start += block) {
                   for (int64_t step = start; step < start + block; step += size)
                     for (int64_t j = step; j < step + half; j++) *to++ = static_cast<uint8_t>(nibble(i, j) | nibble(i, j + half) << 4);
                   for (int64_t g = start / 32; g < (start + block) / 32; g++, to += 2) {
                     const uint16_t scale = g < columns / 32 ? scales[i * (columns / 32) + g] : 0;
                     std::memcpy(to, &scale, 2);
                   }
                 }
               }
             });
}

// y [rows] = W x for one token; x and y are bf16. int8: one scale a row.
void yardstick_linear(int path, int kind, const uint8_t* weight, const uint16_t* scales, int64_t rows, int64_t columns, const void* x,
                      void* y, int threads) {
  thread_local Activations of_x;
  thread_local std::vector<float> results;
  thread_local std::vector<int32_t> starts;
  thread_local std::vector<float> all_scales;
  results.assign(static_cast<size_t>(rows), 0.f);
  const bool nibbles = kind == kInt4, wide_registers = path == kAvx512;
  const int64_t whole = nibbles ? whole_columns(path, columns) : columns;
  const Activations::Source source{kTypeBf16, x, columns, columns, 1, 1};
  if (kind == kBf16) {
    of_x.take_words(source, false, columns);
  } else {
    of_x.take_bytes(source, whole, !nibbles && wide_registers ? 128 : 0);
  }
  if (nibbles) {
    const auto* bytes = reinterpret_cast<const int8_t*>(of_x.data);
    starts.resize(static_cast<size_t>(whole / 4));
    all_scales.resize(static_cast<size_t>(whole / 32));
    for (int64_t i = 0; i < whole / 4; i++) starts[i] = -8 * (bytes[4 * i] + bytes[4 * i + 1] + bytes[4 * i + 2] + bytes[4 * i + 3]);
    for (int64_t i = 0; i < whole / 32; i++) all_scales[i] = of_x.scales[i / 4];
  }
  const Activations& acts = of_x;
  const int32_t* all_starts = starts.data();
  const float* of_groups = all_scales.data();
  float* sums = results.data();
  const Outputs outputs{1, &rows, &y};
  const int64_t size = kind == kBf16 ? 2 : 1, row_bytes = nibbles ? whole / 64 * 36 : columns * size;
  const int64_t wide = nibbles ? panel_columns(whole, 2, block_columns(path)) : panel_columns(columns, size, kGroup);
  in_parts(rows, kRowsTogether, threads, [&](int64_t first, int64_t last) {
    each_panel(first, last, whole, wide, row_bytes, [&](int64_t row, int64_t count, int64_t column, int64_t number, int64_t before) {
      const uint8_t *at = weight + before, *x_at = acts.data + column * size;
      if (nibbles) {
        const Token token{reinterpret_cast<const int8_t*>(x_at), all_starts + column / 4, of_groups + column / 32};
        const auto& run = wide_registers ? avx512_rows : avx2_rows;
        return run(at, token, number / block_columns(path), sums + row, count);
      }
      if (kind == kBf16) {
        const auto* words = reinterpret_cast<const uint16_t*>(at);
        return avx2::add_words<1, false>(words, number, x_at, acts.bytes, sums + row, rows, 0, count);
      }
      SparsepassWeight part{};
      part.rows = count, part.columns = number, part.data = at, part.scales = scales + row;
      float some[kRowsTogether];
      const float* x_scales = acts.scales.data() + column / kGroup;
      const Product p{&part, x_at, x_scales, nullptr, acts.bytes, acts.groups, 0, some, kRowsTogether, !wide_registers, fetches_ahead()};
      const auto& run = wide_registers ? avx512::dense_bytes<1> : avx2::dense_bytes<1>;
      run(p, 0, count);
      for (int64_t i = 0; i < count; i++) sums[row + i] += some[i];
    });
    put_results(kTypeBf16, sums, nullptr, 0, first, last, outputs);
  });
}

#endif

}  // extern "C"
