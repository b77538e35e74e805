// Products of packed 2:4 weights with few rows of activations, on a processor. A C interface: neither torch nor Python is known here.
//
// In 2:4, the column of a kept value is the first one of its group of four plus two bits, its code. So one permutation of x brings
// exactly the x that the kept values of a step meet, and every lane of the multiplication is useful. The codes of several steps
// lie in one register, two bits a step in each lane, and a step takes its own by a shift.
//
// A weight [rows, columns] lies row by row. A step holds the kept values of `width` columns. A block holds up to `steps` steps and
// then one register of codes; the last block of a row may have fewer steps, and its codes take a whole register all the same.
//
//   kind    width  steps  values of a step                                                     codes of a block
//   bf16    64     8      32 words                                                             32 words, step k at bits 2k
//   int8    128    4      64 signed bytes                                                      64 bytes, step k at bits 2k
//   int4    128    4      64 nibbles q + 8; steps 2j, 2j + 1 are the low, high halves of a     64 bytes, step k at bits 2k
//                         register, which the last step of an odd number has alone
//
// Columns are padded to whole steps with values of zero, and x with zeros.
//
// Integers: x is a byte, round(x / scale) + 128 with one scale for each row of x, because the processor wants one side unsigned.
// The 128 adds 128 times the sum of the row's scaled weights, which is known beforehand (`sums`).

#include <atomic>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using std::int8_t;
using std::uint16_t;
using std::uint8_t;

constexpr long kAhead = 1536;  // bytes that are fetched before they are needed
constexpr long kRegister = 64;

// ---- Threads ----

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
GompParallel gomp_parallel = nullptr;

// Calls work(first, last) on parts of the rows, each a multiple of `multiple` but the last.
//
// torch's OpenMP runtime runs them where its entry point was handed over: of two pools that both wait actively, each would take the
// other's processors.
template <class Work>
void in_parts(long rows, long multiple, int threads, const Work& work) {
  const long units = (rows + multiple - 1) / multiple;
  const long parts = std::max(1L, std::min<long>(threads, units));
  std::atomic<long> next{0};
  auto take = [&] {
    for (long part; (part = next.fetch_add(1)) < parts;) {
      const long first = units * part / parts * multiple;
      work(first, std::min(rows, units * (part + 1) / parts * multiple));
    }
  };
  using Take = decltype(take);
  if (parts == 1) {
    take();
  } else if (gomp_parallel != nullptr) {
    gomp_parallel([](void* data) { (*static_cast<Take*>(data))(); }, &take, static_cast<unsigned>(parts), 0);
  } else {
    std::vector<std::thread> others;
    for (long part = 1; part < parts; part++) others.emplace_back(take);
    take();
    for (auto& other : others) other.join();
  }
}

// ---- What a call is given ----

struct Product {
  const uint8_t* weight;   // packed, as above
  const float* scales;     // [rows, groups]; integers only
  const float* sums;       // [rows]; integers only
  const uint8_t* x;        // [tokens, padded columns]: bf16, or bytes
  const float* x_scales;   // [tokens]; integers only
  float* y;                // [tokens, rows]
  long rows, columns;      // columns: padded to whole steps
  long group_steps;        // steps that share a scale; integers only
  long tokens;
};

long row_bytes(long steps, long per_block, long step_bytes) {
  const long blocks = (steps + per_block - 1) / per_block;
  return steps * step_bytes + blocks * kRegister;
}

long integer_row_bytes(long steps, bool nibbles) {
  const long rest = steps % 4, whole = steps / 4;
  return whole * ((nibbles ? 128 : 256) + kRegister) + (rest ? (nibbles ? (rest + 1) / 2 : rest) * 64 + kRegister : 0);
}

#if defined(__x86_64__)

#define TARGET_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define TARGET_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni")))

// ---- bf16, AVX512 BW + BF16 ----

template <int T>
TARGET_BF16 void bf16_rows(const Product& p, const uint16_t* x, float* y, long first, long last) {
  alignas(64) uint16_t offsets[32];
  for (int lane = 0; lane < 32; lane++) offsets[lane] = static_cast<uint16_t>(lane / 2 * 4);
  const __m512i groups = _mm512_load_si512(offsets), two_bits = _mm512_set1_epi16(3);
  const long steps = p.columns / 64, stride = row_bytes(steps, 8, 64);
  // One accumulator a token hides no latency where there is one token: four take turns then.
  constexpr int kTurns = T == 1 ? 4 : T == 2 ? 2 : 1;
  for (long row = first; row < last; row++) {
    const uint8_t* at = p.weight + row * stride;
    __m512 sums[T][kTurns];
    for (int t = 0; t < T; t++)
      for (int turn = 0; turn < kTurns; turn++) sums[t][turn] = _mm512_setzero_ps();
    for (long start = 0; start < steps; start += 8) {
      const long count = std::min(8L, steps - start);
      __m512i codes = _mm512_loadu_si512(at + count * 64);
      for (long line = 0; line <= count; line++) _mm_prefetch(reinterpret_cast<const char*>(at + kAhead + line * 64), _MM_HINT_T0);
      const uint16_t* here = x + start * 64;
#pragma GCC unroll 8
      for (int k = 0; k < 8; k++) {
        if (k >= count) break;
        const __m512i lanes = _mm512_ternarylogic_epi64(codes, two_bits, groups, 0xEA);  // (codes & 3) | groups
        codes = _mm512_srli_epi16(codes, 2);
        const __m512bh values = (__m512bh)_mm512_loadu_si512(at + k * 64);
        for (int t = 0; t < T; t++) {
          const uint16_t* row_of_x = here + t * p.columns + k * 64;
          const __m512i met = _mm512_permutex2var_epi16(_mm512_loadu_si512(row_of_x), lanes, _mm512_loadu_si512(row_of_x + 32));
          sums[t][k % kTurns] = _mm512_dpbf16_ps(sums[t][k % kTurns], (__m512bh)met, values);
        }
      }
      at += count * 64 + kRegister;
    }
    for (int t = 0; t < T; t++) {
      __m512 sum = sums[t][0];
      for (int turn = 1; turn < kTurns; turn++) sum = _mm512_add_ps(sum, sums[t][turn]);
      y[t * p.rows + row] = _mm512_reduce_add_ps(sum);
    }
  }
}

// ---- int8 and int4, AVX512 VBMI + VNNI ----

template <int T, bool kNibbles>
TARGET_VNNI void integer_rows(const Product& p, const uint8_t* x, const float* x_scales, float* y, long first, long last) {
  alignas(64) uint8_t offsets[64];
  for (int lane = 0; lane < 64; lane++) offsets[lane] = static_cast<uint8_t>(lane / 2 * 4);
  const __m512i groups = _mm512_load_si512(offsets), two_bits = _mm512_set1_epi8(3);
  const __m512i four_bits = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
  const long steps = p.columns / 128, scales_a_row = (steps + p.group_steps - 1) / p.group_steps;
  const long stride = integer_row_bytes(steps, kNibbles);
  for (long row = first; row < last; row++) {
    const uint8_t* at = p.weight + row * stride;
    const float* scales = p.scales + row * scales_a_row;
    __m512 sums[T];
    for (int t = 0; t < T; t++) sums[t] = _mm512_setzero_ps();
    for (long start = 0; start < steps; start += 4) {
      const long count = std::min(4L, steps - start), bytes = (kNibbles ? (count + 1) / 2 : count) * 64;
      __m512i codes = _mm512_loadu_si512(at + bytes);
      for (long line = 0; line <= bytes; line += 64) _mm_prefetch(reinterpret_cast<const char*>(at + kAhead + line), _MM_HINT_T0);
      __m512i held = _mm512_setzero_si512();
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) {
        if (k >= count) break;
        __m512i values;
        if (kNibbles) {
          held = k % 2 ? _mm512_srli_epi16(held, 4) : _mm512_loadu_si512(at + k / 2 * 64);
          values = _mm512_sub_epi8(_mm512_and_si512(held, four_bits), eight);
        } else {
          values = _mm512_loadu_si512(at + k * 64);
        }
        const __m512i lanes = _mm512_ternarylogic_epi64(codes, two_bits, groups, 0xEA);
        codes = _mm512_srli_epi16(codes, 2);  // bits of a neighbour come in from above, where the mask takes them off
        const __m512 scale = _mm512_set1_ps(scales[(start + k) / p.group_steps]);
        for (int t = 0; t < T; t++) {
          const uint8_t* row_of_x = x + t * p.columns + (start + k) * 128;
          const __m512i met = _mm512_permutex2var_epi8(_mm512_loadu_si512(row_of_x), lanes, _mm512_loadu_si512(row_of_x + 64));
          const __m512i products = _mm512_dpbusd_epi32(_mm512_setzero_si512(), met, values);
          sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), scale, sums[t]);
        }
      }
      at += bytes + kRegister;
    }
    for (int t = 0; t < T; t++) y[t * p.rows + row] = x_scales[t] * (_mm512_reduce_add_ps(sums[t]) - 128.f * p.sums[row]);
  }
}

#endif

// ---- Any processor ----

float widen(uint16_t value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
  float found;
  std::memcpy(&found, &bits, sizeof found);
  return found;
}

void bf16_rows_generic(const Product& p, const uint16_t* x, float* y, long tokens, long first, long last) {
  const long steps = p.columns / 64, stride = row_bytes(steps, 8, 64);
  for (long row = first; row < last; row++) {
    const uint8_t* at = p.weight + row * stride;
    std::vector<float> sums(tokens, 0.f);
    for (long start = 0; start < steps; start += 8) {
      const long count = std::min(8L, steps - start);
      const auto* values = reinterpret_cast<const uint16_t*>(at);
      const auto* codes = values + count * 32;
      for (long k = 0; k < count; k++)
        for (long lane = 0; lane < 32; lane++) {
          const long column = (start + k) * 64 + lane / 2 * 4 + (codes[lane] >> (2 * k) & 3);
          const float value = widen(values[k * 32 + lane]);
          for (long t = 0; t < tokens; t++) sums[t] += value * widen(x[t * p.columns + column]);
        }
      at += count * 64 + kRegister;
    }
    for (long t = 0; t < tokens; t++) y[t * p.rows + row] = sums[t];
  }
}

void integer_rows_generic(
    const Product& p, bool nibbles, const uint8_t* x, const float* x_scales, float* y, long tokens, long first, long last) {
  const long steps = p.columns / 128, scales_a_row = (steps + p.group_steps - 1) / p.group_steps;
  for (long row = first; row < last; row++) {
    const uint8_t* at = p.weight + row * integer_row_bytes(steps, nibbles);
    std::vector<float> sums(tokens, 0.f);
    for (long start = 0; start < steps; start += 4) {
      const long count = std::min(4L, steps - start), bytes = (nibbles ? (count + 1) / 2 : count) * 64;
      const uint8_t* codes = at + bytes;
      for (long k = 0; k < count; k++) {
        const float scale = p.scales[row * scales_a_row + (start + k) / p.group_steps];
        for (long t = 0; t < tokens; t++) {
          std::int32_t dot = 0;
          for (long lane = 0; lane < 64; lane++) {
            const int value = nibbles ? (at[k / 2 * 64 + lane] >> (k % 2 * 4) & 15) - 8 : static_cast<int8_t>(at[k * 64 + lane]);
            dot += value * x[t * p.columns + (start + k) * 128 + lane / 2 * 4 + (codes[lane] >> (2 * k) & 3)];
          }
          sums[t] += static_cast<float>(dot) * scale;
        }
      }
      at += bytes + kRegister;
    }
    for (long t = 0; t < tokens; t++) y[t * p.rows + row] = x_scales[t] * (sums[t] - 128.f * p.sums[row]);
  }
}

// ---- The table of kernels ----

enum Kind { kBf16 = 0, kInt8 = 1, kInt4 = 2 };
enum Path { kGeneric = 0, kAvx512 = 1 };

template <int T>
void rows_of(const Product& p, Kind kind, long from, long first, long last) {
#if defined(__x86_64__)
  float* y = p.y + from * p.rows;
  if (kind == kBf16) {
    bf16_rows<T>(p, reinterpret_cast<const uint16_t*>(p.x) + from * p.columns, y, first, last);
  } else if (kind == kInt8) {
    integer_rows<T, false>(p, p.x + from * p.columns, p.x_scales + from, y, first, last);
  } else {
    integer_rows<T, true>(p, p.x + from * p.columns, p.x_scales + from, y, first, last);
  }
#endif
}

void avx512(const Product& p, Kind kind, long first, long last) {
  long from = 0;
  for (; p.tokens - from >= 8; from += 8) rows_of<8>(p, kind, from, first, last);
  switch (p.tokens - from) {
    case 7: rows_of<7>(p, kind, from, first, last); break;
    case 6: rows_of<6>(p, kind, from, first, last); break;
    case 5: rows_of<5>(p, kind, from, first, last); break;
    case 4: rows_of<4>(p, kind, from, first, last); break;
    case 3: rows_of<3>(p, kind, from, first, last); break;
    case 2: rows_of<2>(p, kind, from, first, last); break;
    case 1: rows_of<1>(p, kind, from, first, last); break;
    default: break;
  }
}

bool has_avx512(Kind kind) {
#if defined(__x86_64__)
  const bool base = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return base && (kind == kBf16 ? __builtin_cpu_supports("avx512bf16")
                                : __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni"));
#else
  return false;
#endif
}

}  // namespace

extern "C" {

// Hands over the entry point of the OpenMP runtime that torch uses; null for threads of our own.
void sparsepass_use_openmp(void* entry) { gomp_parallel = reinterpret_cast<GompParallel>(entry); }

// Whether this processor has a path for a kind.
int sparsepass_has(int path, int kind) { return path == kGeneric || (path == kAvx512 && has_avx512(static_cast<Kind>(kind))); }

// y = x times the transposed weight. Returns 0, or 1 if this processor lacks the path.
int sparsepass_product(int path, int kind, const uint8_t* weight, const float* scales, const float* sums, const uint8_t* x,
                       const float* x_scales, float* y, long rows, long columns, long group_steps, long tokens, int threads) {
  const Product p{weight, scales, sums, x, x_scales, y, rows, columns, group_steps, tokens};
  const Kind which = static_cast<Kind>(kind);
  if (!sparsepass_has(path, kind)) return 1;
  in_parts(rows, 8, threads, [&](long first, long last) {
    if (path == kAvx512) {
      avx512(p, which, first, last);
    } else if (which == kBf16) {
      bf16_rows_generic(p, reinterpret_cast<const uint16_t*>(x), y, tokens, first, last);
    } else {
      integer_rows_generic(p, which == kInt4, x, x_scales, y, tokens, first, last);
    }
  });
  return 0;
}

}  // extern "C"
