// Activations as the kernels read them, and results as the caller wants them.

#pragma once

#include "avx2.h"
#include "layouts.h"

namespace sparsepass {

inline float element(int type, const void* data, int64_t i) {
  if (type == kTypeFloat) return static_cast<const float*>(data)[i];
  return widen(type == kTypeFp16, static_cast<const uint16_t*>(data)[i]);
}

inline int64_t element_bytes(int type) { return type == kTypeFloat ? 4 : 2; }

// Rows of x in the form that a weight's kernels take, filled up with zeros to whole registers.
struct Activations {
  std::vector<uint8_t> room;
  std::vector<float> scales;
  const uint8_t* data = nullptr;
  int64_t bytes = 0, groups = 0;  // of a row

  // Elements of a type, rows `stride` elements apart.
  struct Source {
    int type;
    const void* data;
    int64_t columns, stride, tokens;
    int threads;

    const uint8_t* row(int64_t token) const { return static_cast<const uint8_t*>(data) + token * stride * element_bytes(type); }
  };

  // words: x rounded to bf16 or fp16. It is used where it lies if it fits as it is.
  void take_words(const Source& x, bool is_fp16, int64_t padded) {
    const bool same = x.type == (is_fp16 ? kTypeFp16 : kTypeBf16);
    if (same && x.columns == padded) {
      data = static_cast<const uint8_t*>(x.data);
      bytes = x.stride * 2;
      return;
    }
    uint8_t* own = make_room(x.tokens, padded * 2);
    each_token(x, [&](int64_t t) {
      auto* to = reinterpret_cast<uint16_t*>(own + t * bytes);
      if (same) {
        std::memcpy(to, x.row(t), static_cast<size_t>(x.columns) * 2);
      } else {
        for (int64_t i = 0; i < x.columns; i++) to[i] = round_word(is_fp16, element(x.type, x.row(t), i));
      }
    });
  }

  // bytes: see interface.h; `offset` makes them unsigned.
  void take_bytes(const Source& x, int64_t padded, uint8_t offset) {
    groups = padded / kGroup;
    uint8_t* own = make_room(x.tokens, padded);
    scales.resize(static_cast<size_t>(x.tokens * groups));
    each_token(x, [&](int64_t t) {
      alignas(32) float some[kGroup];
      for (int64_t g = 0; g < groups; g++) {
        const int64_t first = g * kGroup, count = std::max<int64_t>(0, std::min(kGroup, x.columns - first));
        widen_some(x, t, first, count, some);
        std::fill(some + count, some + kGroup, 0.f);
        scales[t * groups + g] = round_group(some, offset, own + t * bytes + first);
      }
    });
  }

  // Sums of k elements that lie side by side, as words. `for_pairs`: each four of them twice, as two rows of a branch meet them.
  void take_sums(const Source& x, bool is_fp16, int64_t k, bool for_pairs) {
    const int64_t sums = x.columns / k;
    uint8_t* own = make_room(x.tokens, ceil_div(sums, 32) * 32 * (for_pairs ? 4 : 2));
    each_token(x, [&](int64_t t) {
      thread_local std::vector<float> room_of_row;
      room_of_row.resize(static_cast<size_t>(x.columns));
      float* wide = room_of_row.data();
      widen_some(x, t, 0, x.columns, wide);
      auto* to = reinterpret_cast<uint16_t*>(own + t * bytes);
      for (int64_t r = 0; r < sums; r++) {
        const uint16_t word = round_word(is_fp16, sum_of(wide + r * k, k));
        if (!for_pairs) to[r] = word;
        if (for_pairs) to[r / 4 * 8 + r % 4] = to[r / 4 * 8 + r % 4 + 4] = word;
      }
    });
  }

 private:
  static constexpr int64_t kTokensOfPart = 8;

  // Few tokens are done before other threads are awake.
  template <class Work>
  static void each_token(const Source& x, const Work& work) {
    in_parts(x.tokens, kTokensOfPart, x.tokens > 2 * kTokensOfPart ? x.threads : 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; t++) work(t);
    });
  }

  // Zeros for some rows. It begins where a cache line does, for registers as long as one.
  uint8_t* make_room(int64_t tokens, int64_t row_bytes) {
    constexpr uintptr_t kLine = 64;
    bytes = row_bytes;
    room.assign(static_cast<size_t>(tokens * bytes) + kLine, 0);
    auto* own = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(room.data()) + kLine - 1) / kLine * kLine);
    data = own;
    return own;
  }

  // Some elements of a row as floats.
  static void widen_some(const Source& x, int64_t token, int64_t first, int64_t count, float* out) {
    const uint8_t* from = x.row(token) + first * element_bytes(x.type);
#if defined(__x86_64__)
    if (x.type != kTypeFloat && count % 8 == 0 && avx2::has()) {
      const auto& widen_words = x.type == kTypeFp16 ? avx2::convert_words<true> : avx2::convert_words<false>;
      return widen_words(reinterpret_cast<const uint16_t*>(from), count, kTypeFloat, out);
    }
#endif
    for (int64_t i = 0; i < count; i++) out[i] = element(x.type, from, i);
  }

  static float sum_of(const float* from, int64_t count) {
#if defined(__x86_64__)
    if (count % 8 == 0 && avx2::has()) return avx2::sum_of(from, count);
#endif
    float sum = 0;
    for (int64_t i = 0; i < count; i++) sum += from[i];
    return sum;
  }

  static float round_group(const float* from, uint8_t offset, uint8_t* to) {
#if defined(__x86_64__)
    if (avx2::has()) return avx2::round_group(from, offset, to);
#endif
    uint32_t largest = 0;  // compared as integers: what is not a number is not lost
    for (int64_t i = 0; i < kGroup; i++) largest = std::max(largest, to_bits(from[i]) & 0x7fffffff);
    const float most = from_bits(largest);
    const float inverse = most > 0 ? 127.f / most : 0.f;
    constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: added, it leaves no bit for what is behind the point
    for (int64_t i = 0; i < kGroup; i++) to[i] = static_cast<uint8_t>(to_bits(from[i] * inverse + kMagic) + offset);
    return most / 127.f;
  }
};

// Results of one token go to the buffer of each part: rows up to ends[0], rows from there up to ends[1], and so on.
struct Outputs {
  int64_t parts;
  const int64_t* ends;
  void* const* buffers;
};

// Writes eights of results of one token, plus their biases, as elements of a type.
using PutRow = void (*)(int type, const float* y, const float* bias, int64_t count, void* out);

inline void put_results(int type, const float* y, const float* bias, int64_t token, int64_t first, int64_t last, const Outputs& to,
                        PutRow put_row = nullptr) {
  for (int64_t part = 0, begin = 0; part < to.parts; begin = to.ends[part++]) {
    // Where the part's row 0 of this token would be, if the part began with the weight's row 0.
    const int64_t end = to.ends[part], shift = token * (end - begin) - begin;
    int64_t row = std::max(first, begin);
#if defined(__x86_64__)
    const int64_t count = std::min(last, end) - row;
    if (count >= 8 && avx2::has()) {
      auto* out = static_cast<uint8_t*>(to.buffers[part]) + (shift + row) * element_bytes(type);
      (put_row == nullptr ? avx2::put_row : put_row)(type, y + row, bias == nullptr ? nullptr : bias + row, count, out);
      row += count / 8 * 8;
    }
#endif
    for (; row < std::min(last, end); row++) {
      const float value = bias == nullptr ? y[row] : y[row] + bias[row];
      if (type == kTypeFloat) {
        static_cast<float*>(to.buffers[part])[shift + row] = value;
      } else {
        static_cast<uint16_t*>(to.buffers[part])[shift + row] = round_word(type == kTypeFp16, value);
      }
    }
  }
}

// Fetches where put_results will write.
inline void fetch_results(int type, int64_t token, int64_t first, int64_t last, const Outputs& to) {
  for (int64_t part = 0, begin = 0; part < to.parts; begin = to.ends[part++]) {
    const int64_t size = to.ends[part] - begin, from = std::max(first, begin), bytes = element_bytes(type);
    const uint8_t* at = static_cast<const uint8_t*>(to.buffers[part]) + (token * size + from - begin) * bytes;
    for (int64_t byte = 0; byte < (std::min(last, to.ends[part]) - from) * bytes; byte += 64) __builtin_prefetch(at + byte, 1);
  }
}

}  // namespace sparsepass
