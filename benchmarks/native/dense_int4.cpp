// A yardstick for int4: a dense weight with one fp16 scale in 32 columns, as ggml's Q4_0 has. It is made like the kernels of graph/native:
// the same threads, the same activations (signed bytes, one scale for 128 columns), the same prefetch.
//
// A row is cut into steps of 128 columns (avx512) or 64 (avx2): the nibbles q + 8 of the first half in the low halves of the bytes and
// those of the second half in the high ones, then a scale for each 32 columns. The 8 is taken off by starting each sum of four
// products at -8 times the sum of its four x, which is known beforehand.

#include <vector>

#include "../../graph/native/activations.h"

using namespace sparsepass;

namespace {

constexpr int64_t kAhead = 2048;

struct Token {
  const int8_t* x;
  const int32_t* starts;  // for each four columns
  const float* scales;    // for each 128 columns
};

#if defined(__x86_64__)

__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma"))) void avx512_rows(
    const uint8_t* weight, const Token& token, int64_t columns, float* y, int64_t first, int64_t last) {
  const int64_t steps = columns / 128;
  const __m512i four_bits = _mm512_set1_epi8(15);
  const __m512i low_order = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m512i high_order = _mm512_add_epi32(low_order, _mm512_set1_epi32(2));
  for (int64_t row = first; row < last; row++) {
    const uint8_t* at = weight + row * steps * 72;
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int64_t step = 0; step < steps; step++, at += 72) {
      _mm_prefetch(reinterpret_cast<const char*>(at + kAhead), _MM_HINT_T1);
      const __m512i nibbles = _mm512_loadu_si512(at);
      const __m128i words = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at + 64));
      const __m512 scales = _mm512_castps128_ps512(_mm_mul_ps(_mm_cvtph_ps(words), _mm_set1_ps(token.scales[step])));
      const __m512i low = _mm512_and_si512(nibbles, four_bits), high = _mm512_and_si512(_mm512_srli_epi16(nibbles, 4), four_bits);
      const __m512i of_low = _mm512_dpbusd_epi32(_mm512_loadu_si512(token.starts + step * 32), low, _mm512_loadu_si512(token.x + step * 128));
      const __m512i of_high =
          _mm512_dpbusd_epi32(_mm512_loadu_si512(token.starts + step * 32 + 16), high, _mm512_loadu_si512(token.x + step * 128 + 64));
      even = _mm512_fmadd_ps(_mm512_cvtepi32_ps(of_low), _mm512_permutexvar_ps(low_order, scales), even);
      odd = _mm512_fmadd_ps(_mm512_cvtepi32_ps(of_high), _mm512_permutexvar_ps(high_order, scales), odd);
    }
    y[row] = _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
  }
}

__attribute__((target("avx2"))) inline __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

__attribute__((target("avx2,f16c,fma"))) void avx2_rows(
    const uint8_t* weight, const Token& token, int64_t columns, float* y, int64_t first, int64_t last) {
  const int64_t steps = columns / 64;
  const __m256i four_bits = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  for (int64_t row = first; row < last; row++) {
    const uint8_t* at = weight + row * steps * 36;
    __m256 even = _mm256_setzero_ps(), odd = even;
    for (int64_t step = 0; step < steps; step++, at += 36) {
      _mm_prefetch(reinterpret_cast<const char*>(at + kAhead), _MM_HINT_T0);
      const __m256i nibbles = load(at);
      uint32_t words;
      std::memcpy(&words, at + 32, 4);
      const __m128 scales = _mm_mul_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(static_cast<int>(words))), _mm_set1_ps(token.scales[step / 2]));
      const __m256i low = _mm256_and_si256(nibbles, four_bits), high = _mm256_and_si256(_mm256_srli_epi16(nibbles, 4), four_bits);
      const __m256i of_low = _mm256_madd_epi16(_mm256_maddubs_epi16(low, load(token.x + step * 64)), ones);
      const __m256i of_high = _mm256_madd_epi16(_mm256_maddubs_epi16(high, load(token.x + step * 64 + 32)), ones);
      even = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(of_low, load(token.starts + step * 16))),
                             _mm256_broadcastss_ps(scales), even);
      odd = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(of_high, load(token.starts + step * 16 + 8))),
                            _mm256_broadcastss_ps(_mm_movehdup_ps(scales)), odd);
    }
    const __m256 sum = _mm256_add_ps(even, odd);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    four = _mm_hadd_ps(four, four);
    y[row] = _mm_cvtss_f32(_mm_hadd_ps(four, four));
  }
}

#endif

}  // namespace

extern "C" {

void yardstick_use_openmp(void* entry) { gomp_parallel = reinterpret_cast<GompParallel>(entry); }

// Bytes of a weight.
int64_t yardstick_int4_bytes(int64_t rows, int64_t columns) { return rows * columns / 128 * 72; }

// Lays out q [rows, columns] (-8 to 7) with scales fp16 [rows, columns / 32]; columns a multiple of 128.
void yardstick_int4_lay_out(int path, const int8_t* q, const uint16_t* scales, int64_t rows, int64_t columns, uint8_t* out) {
  const int64_t size = path == kAvx512 ? 128 : 64, half = size / 2;
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t start = 0; start < columns; start += size) {
      const int8_t* from = q + row * columns + start;
      for (int64_t i = 0; i < half; i++) *out++ = static_cast<uint8_t>((from[i] + 8) | (from[half + i] + 8) << 4);
      for (int64_t g = 0; g < size / 32; g++, out += 2) std::memcpy(out, scales + row * (columns / 32) + start / 32 + g, 2);
    }
  }
}

// y [rows] = W x for one token; x and y are bf16.
int yardstick_int4_linear(int path, const uint8_t* weight, int64_t rows, int64_t columns, const void* x, void* y, int threads) {
#if defined(__x86_64__)
  thread_local Activations of_x;
  thread_local std::vector<int32_t> starts;
  thread_local std::vector<float> results;
  of_x.take_bytes(columns, columns, kTypeBf16, x, columns, 1, 0);
  starts.resize(static_cast<size_t>(columns / 4));
  results.resize(static_cast<size_t>(rows));
  const auto* bytes = reinterpret_cast<const int8_t*>(of_x.data);
  for (int64_t i = 0; i < columns / 4; i++) starts[i] = -8 * (bytes[4 * i] + bytes[4 * i + 1] + bytes[4 * i + 2] + bytes[4 * i + 3]);
  const Token token{bytes, starts.data(), of_x.scales.data()};
  float* sums = results.data();
  const Outputs outputs{1, &rows, &y};
  in_parts(rows, 32, threads, [&](int64_t first, int64_t last) {
    path == kAvx512 ? avx512_rows(weight, token, columns, sums, first, last) : avx2_rows(weight, token, columns, sums, first, last);
    put_results(kTypeBf16, sums, nullptr, 0, first, last, outputs);
  });
  return 0;
#else
  (void)path, (void)weight, (void)rows, (void)columns, (void)x, (void)y, (void)threads;
  return 1;
#endif
}

}  // extern "C"
