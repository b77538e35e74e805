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
  std::vector<float> scales, wide;
  const uint8_t* data = nullptr;
  int64_t bytes = 0, groups = 0;  // of a row

  // words: x rounded to bf16 or fp16. It is used where it lies if it fits as it is.
  void take_words(bool is_fp16, int64_t columns, int64_t padded, int type, const void* x, int64_t stride, int64_t tokens) {
    const bool same = type == (is_fp16 ? kTypeFp16 : kTypeBf16);
    if (same && columns == padded) {
      data = static_cast<const uint8_t*>(x);
      bytes = stride * 2;
      return;
    }
    bytes = padded * 2;
    uint8_t* own = make_room(tokens * bytes);
    std::memset(own, 0, static_cast<size_t>(tokens * bytes));
    for (int64_t t = 0; t < tokens; t++) {
      const auto* from = static_cast<const uint8_t*>(x) + t * stride * element_bytes(type);
      auto* to = reinterpret_cast<uint16_t*>(own + t * bytes);
      if (same) {
        std::memcpy(to, from, static_cast<size_t>(columns) * 2);
      } else {
        for (int64_t i = 0; i < columns; i++) to[i] = round_word(is_fp16, element(type, from, i));
      }
    }
    data = own;
  }

  // bytes: see interface.h; `offset` makes them unsigned.
  void take_bytes(int64_t columns, int64_t padded, int type, const void* x, int64_t stride, int64_t tokens, uint8_t offset) {
    bytes = padded;
    groups = padded / kGroup;
    uint8_t* own = make_room(tokens * bytes);
    scales.resize(static_cast<size_t>(tokens * groups));
    wide.assign(static_cast<size_t>(padded), 0.f);
    for (int64_t t = 0; t < tokens; t++) {
      const auto* from = static_cast<const uint8_t*>(x) + t * stride * element_bytes(type);
      widen_row(columns, type, from);
      for (int64_t g = 0; g < groups; g++) scales[t * groups + g] = round_group(wide.data() + g * kGroup, offset, own + t * bytes + g * kGroup);
    }
    data = own;
  }

  // Sums of k elements that lie side by side, as words.
  void take_sums(bool is_fp16, int64_t columns, int64_t k, int type, const void* x, int64_t stride, int64_t tokens) {
    const int64_t sums = columns / k, padded = ceil_div(sums, 32) * 32;
    bytes = padded * 2;
    uint8_t* own = make_room(tokens * bytes);
    std::memset(own, 0, static_cast<size_t>(tokens * bytes));
    for (int64_t t = 0; t < tokens; t++) {
      const auto* from = static_cast<const uint8_t*>(x) + t * stride * element_bytes(type);
      auto* to = reinterpret_cast<uint16_t*>(own + t * bytes);
      for (int64_t r = 0; r < sums; r++) {
        float sum = 0;
        for (int64_t i = r * k; i < (r + 1) * k; i++) sum += element(type, from, i);
        to[r] = round_word(is_fp16, sum);
      }
    }
    data = own;
  }

 private:
  // It begins where a cache line does, for registers as long as one.
  uint8_t* make_room(int64_t size) {
    constexpr uintptr_t kLine = 64;
    room.resize(static_cast<size_t>(size) + kLine);
    return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(room.data()) + kLine - 1) / kLine * kLine);
  }

  void widen_row(int64_t columns, int type, const uint8_t* from) {
#if defined(__x86_64__)
    if (type != kTypeFloat && columns % 8 == 0 && avx2::has()) {
      const auto& widen_words = type == kTypeFp16 ? avx2::convert_words<true> : avx2::convert_words<false>;
      return widen_words(reinterpret_cast<const uint16_t*>(from), columns, kTypeFloat, wide.data());
    }
#endif
    for (int64_t i = 0; i < columns; i++) wide[i] = element(type, from, i);
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

inline void put_results(int type, const float* y, const float* bias, int64_t token, int64_t first, int64_t last, const Outputs& to) {
  for (int64_t part = 0, begin = 0; part < to.parts; begin = to.ends[part++]) {
    // Where the part's row 0 of this token would be, if the part began with the weight's row 0.
    const int64_t end = to.ends[part], shift = token * (end - begin) - begin;
    int64_t row = std::max(first, begin);
#if defined(__x86_64__)
    const int64_t count = std::min(last, end) - row;
    if (count >= 8 && avx2::has()) {
      auto* out = static_cast<uint8_t*>(to.buffers[part]) + (shift + row) * element_bytes(type);
      avx2::put_row(type, y + row, bias == nullptr ? nullptr : bias + row, count, out);
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

}  // namespace sparsepass
