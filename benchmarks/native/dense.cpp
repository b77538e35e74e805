// Yardsticks: dense weights of bf16, int8 and int4, for one token. They are made like the kernels of graph/native: the same threads, the
// same activations (signed bytes, one scale for 128 columns), and the same order in memory: where a row is so long that x would not stay in
// the first cache, 32 rows lie together, cut into panels.
//
// int4 has one fp16 scale in 32 columns, as ggml's Q4_0 has. A row is cut into blocks of 16 groups of 32 columns (avx512) or 8 (avx2), a
// lane of 32 bits for each group: four registers of nibbles q + 8, whose low halves are columns 8k to 8k + 3 of all groups and whose high
// ones the four after them, and then the scales. So a lane's products are all of one group, and are scaled once for 32 columns. x is brought
// into that order beforehand. The 8 is taken off by starting each sum at -8 times the sum of the group's x. Rows are filled up to whole
// blocks.

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

constexpr int64_t kColumns = 32;  // that share a scale

struct Token {
  const int8_t* x;        // in the order of blocks
  const int32_t* starts;  // for each group
  const float* scales;    // for each group
};

// y += W x for rows that lie one after the other.
YARDSTICK_AVX512 void avx512_rows(const uint8_t* at, const Token& token, int64_t blocks, float* y, int64_t rows) {
  const __m512i four_bits = _mm512_set1_epi8(15);
  const bool fetches = fetches_ahead();
  for (int64_t row = 0; row < rows; row++) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t block = 0; block < blocks; block++, at += 288) {
      if (fetches) avx2::fetch(at, 288);
      const int8_t* x = token.x + block * 512;
      __m512i low = _mm512_loadu_si512(token.starts + block * 16), high = _mm512_setzero_si512();
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) {
        const __m512i nibbles = _mm512_loadu_si512(at + k * 64);
        low = _mm512_dpbusd_epi32(low, _mm512_and_si512(nibbles, four_bits), _mm512_loadu_si512(x + k * 128));
        high = _mm512_dpbusd_epi32(high, _mm512_and_si512(_mm512_srli_epi16(nibbles, 4), four_bits), _mm512_loadu_si512(x + k * 128 + 64));
      }
      const __m512 scales = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 256)));
      const __m512 both = _mm512_mul_ps(scales, _mm512_loadu_ps(token.scales + block * 16));
      sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(low, high)), both, sum);
    }
    y[row] += _mm512_reduce_add_ps(sum);
  }
}

SPARSEPASS_AVX2 void avx2_rows(const uint8_t* at, const Token& token, int64_t blocks, float* y, int64_t rows) {
  const __m256i four_bits = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  const bool fetches = fetches_ahead();
  for (int64_t row = 0; row < rows; row++) {
    __m256 sum = _mm256_setzero_ps();
    for (int64_t block = 0; block < blocks; block++, at += 144) {
      if (fetches) avx2::fetch(at, 144);
      const int8_t* x = token.x + block * 256;
      // Eight sums of two products of 15 times 127 at most stay within 16 bits.
      __m256i low = _mm256_setzero_si256(), high = low;
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) {
        const __m256i nibbles = avx2::load(at + k * 32);
        low = _mm256_add_epi16(low, _mm256_maddubs_epi16(_mm256_and_si256(nibbles, four_bits), avx2::load(x + k * 64)));
        const __m256i of_high = _mm256_and_si256(_mm256_srli_epi16(nibbles, 4), four_bits);
        high = _mm256_add_epi16(high, _mm256_maddubs_epi16(of_high, avx2::load(x + k * 64 + 32)));
      }
      const __m256i products = _mm256_add_epi32(_mm256_madd_epi16(_mm256_add_epi16(low, high), ones), avx2::load(token.starts + block * 8));
      const __m256 scales = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 128)));
      sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), _mm256_mul_ps(scales, _mm256_loadu_ps(token.scales + block * 8)), sum);
    }
    y[row] += avx2::sum_of(sum);
  }
}

// Brings x into the order of blocks: of each group the first four columns, then of each the next four.
void in_order(const int8_t* x, int64_t columns, int64_t groups, int8_t* out) {
  for (int64_t start = 0; start < columns; start += groups * kColumns)
    for (int64_t k = 0; k < kColumns / 4; k++)
      for (int64_t g = 0; g < groups; g++, out += 4) std::memcpy(out, x + start + g * kColumns + k * 4, 4);
}

#endif

int64_t block_columns(int path) { return path == kAvx512 ? 512 : 256; }

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
  const int64_t whole = whole_columns(path, columns), block = block_columns(path), groups = block / kColumns;
  auto nibble = [&](int64_t row, int64_t column) { return column < columns ? q[row * columns + column] + 8 : 8; };
  each_panel(0, rows, whole, panel_columns(whole, 2, block), whole / 64 * 36,
             [&](int64_t row, int64_t count, int64_t first, int64_t wide, int64_t before) {
               uint8_t* to = out + before;
               for (int64_t i = row; i < row + count; i++) {
                 for (int64_t start = first; start < first + wide; start += block) {
                   for (int64_t byte = 0; byte < block / 2; byte++, to++) {
                     const int64_t column = start + byte / 4 % groups * kColumns + byte / 4 / groups * 8 + byte % 4;
                     *to = static_cast<uint8_t>(nibble(i, column) | nibble(i, column + 4) << 4);
                   }
                   for (int64_t g = start / kColumns; g < (start + block) / kColumns; g++, to += 2) {
                     const uint16_t scale = g < columns / kColumns ? scales[i * (columns / kColumns) + g] : 0;
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
  thread_local std::vector<int8_t> ordered;
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
    const int64_t groups = whole / kColumns;
    ordered.resize(static_cast<size_t>(whole));
    starts.resize(static_cast<size_t>(groups));
    all_scales.resize(static_cast<size_t>(groups));
    in_order(bytes, whole, block_columns(path) / kColumns, ordered.data());
    for (int64_t g = 0; g < groups; g++) {
      int32_t sum = 0;
      for (int64_t i = 0; i < kColumns; i++) sum += bytes[g * kColumns + i];
      starts[g] = -8 * sum, all_scales[g] = of_x.scales[g / 4];
    }
  }
  const Activations& acts = of_x;
  const int8_t* all_x = ordered.data();
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
        const Token token{all_x + column, all_starts + column / kColumns, of_groups + column / kColumns};
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
