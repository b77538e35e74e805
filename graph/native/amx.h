// Products of many tokens by a processor's unit for matrices (AMX, BF16): some rows of the weight get their zeros back, as tiles, and meet
// all tokens. The weight lies as for AVX512.
//
// A tile is 16 rows of 64 bytes. One of the weight holds 32 columns of 16 rows, as they are. One of x holds 32 columns of 16 tokens in pairs:
// its row r has columns 2r and 2r + 1 of each token. Their product has a row for each row of the weight, and a column for each token.
//
// A branch is more columns: its sums follow x, its values the weight.

#pragma once

#include "activations.h"
#include "avx512.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__has_include)
#if __has_include(<amxbf16intrin.h>)
#define SPARSEPASS_HAS_TILES
#endif
#endif

#if defined(SPARSEPASS_HAS_TILES)

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SPARSEPASS_TILES __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,f16c,fma,amx-tile,amx-bf16")))

namespace sparsepass::amx {

constexpr int64_t kTile = 1024;          // bytes
constexpr int64_t kLine = 64;            // bytes of a tile's row
constexpr int64_t kColumns = 32;         // of a tile
constexpr int64_t kTokens = 16;          // of a tile
constexpr int64_t kRows = 32;            // of two tiles of the weight
constexpr int64_t kRowsAtOnce = 256;     // the more, the less often is x read
constexpr int64_t kBlocksAtOnce = 4;     // of columns: of these, 32 tokens stay in the first cache, and these rows in the second one
constexpr int64_t kFewTokens = 64;       // whose tiles stay in the second cache beside those of any rows
constexpr int64_t kTokensAtOnce = 512;   // whose sums of so many rows stay in the second cache

inline bool has() {
  static const bool answer = [] {
    constexpr unsigned kBf16AndTiles = 1u << 22 | 1u << 24;
    constexpr long kAskForRoom = 0x1023, kRoomForTiles = 18;  // the system gives a process room for tiles only if it asks
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16AndTiles) != kBf16AndTiles) return false;
    return syscall(SYS_arch_prctl, kAskForRoom, kRoomForTiles) == 0;
  }();
  return answer;
}

struct alignas(64) Configuration {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline uint8_t* aligned(std::vector<uint8_t>& room, int64_t bytes) {
  if (const auto size = static_cast<size_t>(bytes) + 64; room.size() < size) room.resize(size);
  return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(room.data()) + 63) & ~uintptr_t{63});
}

// 16 rows of 16 words of 32 bits as columns. Rows lie so many floats apart from each other, and from `count` on they are zeros.
SPARSEPASS_TILES inline void turn(const float* from, int64_t from_apart, int64_t count, float* out, int64_t apart) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) a[i] = i < count ? _mm512_loadu_ps(from + i * from_apart) : _mm512_setzero_ps();
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      const __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + 2 + j]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // a[4 i + j]: of rows 4 i to 4 i + 3, columns j, j + 4, j + 8 and j + 12.
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const __m512 low_even = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88), low_odd = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
    const __m512 high_even = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88), high_odd = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
    _mm512_storeu_ps(out + j * apart, _mm512_shuffle_f32x4(low_even, high_even, 0x88));
    _mm512_storeu_ps(out + (j + 4) * apart, _mm512_shuffle_f32x4(low_odd, high_odd, 0x88));
    _mm512_storeu_ps(out + (j + 8) * apart, _mm512_shuffle_f32x4(low_even, high_even, 0xdd));
    _mm512_storeu_ps(out + (j + 12) * apart, _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd));
  }
}

// 16 tokens at most, whose words lie `bytes` apart, as tiles one after the other.
SPARSEPASS_TILES inline void take_tokens(const uint8_t* words, int64_t bytes, int64_t tokens, int64_t steps, uint8_t* out) {
  const auto* pairs = reinterpret_cast<const float*>(words);
  for (int64_t step = 0; step < steps; step++) turn(pairs + step * 16, bytes / 4, tokens, reinterpret_cast<float*>(out + step * kTile), 16);
}

// Some columns of a row of integers as bf16, scaled: 32 of them every 2 kTile bytes. Scales change at multiples of 16 columns.
SPARSEPASS_TILES inline void take_bytes(const uint8_t* bytes, const uint16_t* scales, int64_t size, int64_t groups, int64_t column, int64_t steps,
                                        uint8_t* out) {
  int64_t group = column / size, until = column;
  __m512 scale = _mm512_setzero_ps();
  auto sixteen = [&](const uint8_t* from) SPARSEPASS_TILES {
    if (column >= until) {
      scale = _mm512_set1_ps(widen_bf16(scales[std::min(group, groups - 1)]));  // a row's padding has no scale
      until = ++group * size;
    }
    column += 16;
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))), scale);
  };
  for (int64_t step = 0; step < steps; step++, bytes += kColumns, out += 2 * kTile) {
    const __m512 low = sixteen(bytes), high = sixteen(bytes + 16);
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

// Some rows of a weight, from an even one on.
struct Rows {
  const SparsepassWeight& weight;
  const Layout& layout;
  int64_t first, count;

  // Room for 32 rows each: `steps` pairs of tiles, in which a row's columns lie 2 kTile bytes apart, and rows one after the other. They are
  // taken two at a time, or one; rows that are not there are zeros.
  template <class Take>
  void each(int64_t steps, uint8_t* out, const Take& take) const {
    for (int64_t i = 0; i < ceil_div(count, kRows) * kRows; i += 2) {
      uint8_t* to = out + i / kRows * steps * 2 * kTile + i % kRows * kLine;
      const int64_t there = std::clamp<int64_t>(count - i, 0, 2);
      if (there > 0) take(i, there, to);
      for (int64_t row = there; row < 2; row++)
        for (int64_t step = 0; step < steps; step++) std::memset(to + row * kLine + step * 2 * kTile, 0, kLine);
    }
  }

  // Blocks of one row or two with their zeros; those of later rows are fetched.
  template <bool kWords>
  void unpack(const Panel& panel, int64_t begin, int64_t end, int64_t i, int64_t there, uint8_t* out, int64_t apart, int64_t rows_apart) const {
    constexpr int64_t kAhead = 4;
    const auto* data = static_cast<const uint8_t*>(weight.data);
    if (i + kAhead < count) {
      const uint8_t* later = data + layout.at(first + i + kAhead, panel) + (begin - panel.begin) * layout.block_bytes;
      for (int64_t byte = 0; byte < (end - begin) * layout.block_bytes; byte += kLine) __builtin_prefetch(later + byte);
    }
    const auto& rows = there == 2 ? avx512::unpack<kWords, 2> : avx512::unpack<kWords, 1>;
    rows(layout, panel, begin, end, data, first + i, out, apart, rows_apart, false);
  }

  // Their columns in the blocks from `begin` to `end` of a panel.
  void take(const Panel& panel, int64_t begin, int64_t end, int64_t steps, uint8_t* out) const {
    if (!is_integer(weight.kind)) {
      return each(steps, out, [&](int64_t i, int64_t there, uint8_t* to) { unpack<true>(panel, begin, end, i, there, to, 2 * kTile, kLine); });
    }
    constexpr int64_t kBytes = kBlocksAtOnce * kGroup;
    alignas(64) uint8_t bytes[2 * kBytes];
    const int64_t size = weight.group_size ? weight.group_size : weight.columns, groups = ceil_div(weight.columns, size);
    each(steps, out, [&](int64_t i, int64_t there, uint8_t* to) {
      unpack<false>(panel, begin, end, i, there, bytes, kLine, kBytes);
      for (int64_t row = 0; row < there; row++)
        take_bytes(bytes + row * kBytes, weight.scales + (first + i + row) * groups, size, groups, begin * kGroup, steps, to + row * kLine);
    });
  }

  void take_branch(int64_t steps, uint8_t* out) const {
    const int64_t sums = weight.columns / weight.k;
    each(steps, out, [&](int64_t i, int64_t there, uint8_t* to) {
      for (int64_t row = 0; row < there; row++) {
        for (int64_t step = 0; step < steps; step++) {
          uint8_t* line = to + row * kLine + step * 2 * kTile;
          const int64_t from = step * kColumns;
          std::memset(line, 0, kLine);
          std::memcpy(line, weight.branch + (first + i + row) * sums + from, static_cast<size_t>(std::min(kColumns, sums - from)) * 2);
        }
      }
    });
  }
};

// Fetches a tile beforehand.
inline void fetch(const uint8_t* tile) {
  for (int64_t line = 0; line < kTile; line += 64) __builtin_prefetch(tile + line);
}

// 32 rows meet 32 tokens, or 16: `sums` are the tiles of the first 16 tokens, then those of the next. They are added to unless `is_first`.
// The rows come from the second cache and leave the first one to x, whose tiles are fetched where they are met for the first time
// (Intel Xeon, AMX: rows that are fetched beforehand, or loaded to stay, cost 15% of what it gives).
template <bool kTwice>
SPARSEPASS_TILES inline void multiply(const uint8_t* rows, const uint8_t* x, int64_t x_row, int64_t steps, bool is_first, bool fetches,
                                      float* sums) {
  constexpr int64_t kNumbers = kTile / 4, kAhead = 2;  // steps
  if (is_first) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTwice) {
      _tile_zero(2);
      _tile_zero(3);
    }
  } else {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + kNumbers, 64);
    if constexpr (kTwice) {
      _tile_loadd(2, sums + 2 * kNumbers, 64);
      _tile_loadd(3, sums + 3 * kNumbers, 64);
    }
  }
  for (int64_t step = 0; step < steps; step++, rows += 2 * kTile, x += kTile) {
    if (fetches) {
      fetch(x + kAhead * kTile);
      if constexpr (kTwice) fetch(x + x_row + kAhead * kTile);
    }
    _tile_stream_loadd(4, rows, 64);
    _tile_loadd(6, x, 64);
    _tile_stream_loadd(5, rows + kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTwice) _tile_loadd(7, x + x_row, 64);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (kTwice) {
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kNumbers, 64);
  if constexpr (kTwice) {
    _tile_stored(2, sums + 2 * kNumbers, 64);
    _tile_stored(3, sums + 3 * kNumbers, 64);
  }
}

// avx2::put_row with the processor's own rounding to bf16.
SPARSEPASS_TILES inline void put_row(int type, const float* y, const float* bias, int64_t count, void* out) {
  if (type != kTypeBf16) return avx2::put_row(type, y, bias, count, out);
  for (int64_t i = 0; i + 8 <= count; i += 16) {
    const auto floats = static_cast<__mmask16>(count - i >= 16 ? 0xffff : 0xff);
    __m512 values = _mm512_maskz_loadu_ps(floats, y + i);
    if (bias != nullptr) values = _mm512_add_ps(values, _mm512_maskz_loadu_ps(floats, bias + i));
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out) + i, floats, (__m256i)_mm512_cvtneps_pbh(values));
  }
}

// Tokens as tiles.
struct Tokens {
  const uint8_t* tiles;   // 16 tokens after 16 tokens, `steps` of them each
  int64_t steps, count;

  int64_t blocks() const { return ceil_div(count, kTokens); }
};

// `count` pairs of tiles for each 32 rows, the first of them `done` steps behind the rows' first columns, meet all tokens.
SPARSEPASS_TILES inline void meet(const uint8_t* rows, int64_t pairs, int64_t count, int64_t done, const Tokens& tokens, float* sums) {
  const int64_t blocks = tokens.blocks(), x_row = tokens.steps * kTile;
  for (int64_t block = 0; block < blocks; block += 2) {
    const auto& step = block + 1 < blocks ? multiply<true> : multiply<false>;
    const uint8_t* x = tokens.tiles + block * x_row + done * kTile;
    for (int64_t pair = 0; pair < pairs; pair++)
      step(rows + pair * count * 2 * kTile, x, x_row, count, done == 0, pair == 0, sums + (pair * blocks + block) * 2 * (kTile / 4));
  }
}

// Sums of the rows from `first` to `last`, as results of the tokens, of which so many others come before.
SPARSEPASS_TILES inline void put_sums(const float* sums, int64_t first, int64_t last, const Tokens& tokens, int type, const float* bias, int64_t before,
                                      const Outputs& to) {
  alignas(64) float turned[kTokens * kRowsAtOnce];
  const int64_t blocks = tokens.blocks();
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t begin = block * kTokens, end = std::min(tokens.count, begin + kTokens);
    for (int64_t token = begin; token < end; token++) fetch_results(type, before + token, first, last, to);
    for (int64_t pair = 0; pair < ceil_div(last - first, kRows); pair++) {
      const float* tiles = sums + (pair * blocks + block) * 2 * (kTile / 4);
      turn(tiles, 16, 16, turned + pair * kRows, kRowsAtOnce);
      turn(tiles + kTile / 4, 16, 16, turned + pair * kRows + kRows / 2, kRowsAtOnce);
    }
    for (int64_t token = begin; token < end; token++)
      put_results(type, turned + (token - begin) * kRowsAtOnce - first, bias, before + token, first, last, to, put_row);
  }
}

// Some rows, kRowsAtOnce at most, meet all tokens; steps of the branch come last.
SPARSEPASS_TILES inline void rows_meet(const SparsepassWeight& w, const Layout& layout, int64_t first, int64_t last, const Tokens& tokens, int type,
                                       int64_t before, const Outputs& to) {
  thread_local std::vector<uint8_t> room_of_rows, room_of_sums;
  const Rows rows{w, layout, first, last - first};
  const int64_t pairs = ceil_div(rows.count, kRows);
  auto* sums = reinterpret_cast<float*>(aligned(room_of_sums, pairs * tokens.blocks() * 2 * kTile));
  auto room_for = [&](int64_t count) { return aligned(room_of_rows, pairs * count * 2 * kTile); };
  const Configuration configuration;
  _tile_loadconfig(&configuration);
  int64_t done = 0;
  for (int64_t number = 0; number < layout.panels; number++) {
    const Panel panel = layout.panel(number);
    for (int64_t begin = panel.begin; begin < panel.last(); begin += kBlocksAtOnce) {
      const int64_t end = std::min(begin + kBlocksAtOnce, panel.last());
      const int64_t count = std::min(end * (kGroup / kColumns), layout.padded_columns() / kColumns) - done;
      uint8_t* tiles = room_for(count);
      rows.take(panel, begin, end, count, tiles);
      meet(tiles, pairs, count, done, tokens, sums);
      done += count;
    }
  }
  if (const int64_t count = tokens.steps - done; count > 0) {
    uint8_t* tiles = room_for(count);
    rows.take_branch(count, tiles);
    meet(tiles, pairs, count, done, tokens, sums);
  }
  _tile_release();
  put_sums(sums, first, last, tokens, type, w.bias, before, to);
}

// y = x times the transposed weight, plus branch and bias, for a packed weight of bf16 or integers, which meets x as bf16.
inline void linear(const SparsepassWeight& w, int type, const void* x, int64_t stride, int64_t tokens, const Outputs& to, int threads) {
  thread_local Activations of_x, of_sums;
  thread_local std::vector<uint8_t> room;
  const Layout layout(w.path, w.kind, w.rows, w.columns);
  const bool has_branch = w.branch != nullptr && w.k > 0;
  const int64_t padded = layout.padded_columns();
  const int64_t steps_of_x = padded / kColumns, steps_of_sums = has_branch ? ceil_div(w.columns / w.k, kColumns) : 0;
  const int64_t steps = steps_of_x + steps_of_sums;
  const int64_t at_once = ceil_div(ceil_div(tokens, ceil_div(tokens, kTokensAtOnce)), 2 * kTokens) * 2 * kTokens;  // parts alike
  for (int64_t before = 0; before < tokens; before += at_once) {
    const int64_t count = std::min(at_once, tokens - before);
    const Activations::Source source{type, static_cast<const uint8_t*>(x) + before * stride * element_bytes(type), w.columns, stride, count, threads};
    of_x.take_words(source, false, padded);
    if (has_branch) of_sums.take_sums(source, false, w.k, false);
    const Activations &acts = of_x, &sums = of_sums;
    uint8_t* tiles = aligned(room, ceil_div(count, kTokens) * steps * kTile);
    in_parts(ceil_div(count, kTokens), 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; block++) {
        const int64_t from = block * kTokens, some = std::min(kTokens, count - from);
        uint8_t* own = tiles + block * steps * kTile;
        take_tokens(acts.data + from * acts.bytes, acts.bytes, some, steps_of_x, own);
        if (has_branch) take_tokens(sums.data + from * sums.bytes, sums.bytes, some, steps_of_sums, own + steps_of_x * kTile);
      }
    });
    const int64_t step = count > kFewTokens ? kRowsAtOnce : kRows;
    in_parts(w.rows, kRows, threads, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin; first < end; first += step)
        rows_meet(w, layout, first, std::min(end, first + step), {tiles, steps, count}, type, before, to);
    });
  }
}

}  // namespace sparsepass::amx

#endif
