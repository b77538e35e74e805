// Kernels for any processor, on the stored form.

#pragma once

#include "layouts.h"

namespace sparsepass::generic {

inline int value_of(const Layout& layout, const uint8_t* kept, int64_t i) {
  if (layout.kind == kInt4) return (kept[i / 2] >> (i % 2 * 4) & 15) - 8;
  return static_cast<int8_t>(kept[i]);
}

inline int64_t column_of(const uint8_t* codes, int64_t i) { return i / 2 * 4 + (codes[i / 4] >> (i % 4 * 2) & 3); }

// Rows may have an odd number of bytes, so that words lie at any address.
inline uint16_t word_at(const uint8_t* row, int64_t i) {
  uint16_t word;
  std::memcpy(&word, row + 2 * i, sizeof word);
  return word;
}

inline void rows_of_floats(const Product& p, int64_t tokens, int64_t first, int64_t last) {
  const auto& w = *p.weight;
  const Layout layout(kGeneric, w.kind, w.rows, w.columns);
  const bool is_fp16 = w.kind == kFp16;
  for (int64_t row = first; row < last; row++) {
    const uint8_t* at = static_cast<const uint8_t*>(w.data) + row * layout.pair_bytes;
    const uint8_t* codes = at + layout.values_bytes;
    for (int64_t t = 0; t < tokens; t++) {
      const auto* x = reinterpret_cast<const uint16_t*>(p.x + t * p.x_bytes);
      float sums[4] = {};
      for (int64_t i = 0; i < w.columns / 2; i++) sums[i % 4] += widen(is_fp16, word_at(at, i)) * widen(is_fp16, x[column_of(codes, i)]);
      p.y[t * p.y_rows + row] = sums[0] + sums[1] + (sums[2] + sums[3]);
    }
  }
}

inline void rows_of_integers(const Product& p, int64_t tokens, int64_t first, int64_t last) {
  const auto& w = *p.weight;
  const Layout layout(kGeneric, w.kind, w.rows, w.columns);
  const int64_t size = w.group_size ? w.group_size : w.columns, groups = ceil_div(w.columns, size), run = std::min(size, kGroup);
  for (int64_t row = first; row < last; row++) {
    const uint8_t* kept = static_cast<const uint8_t*>(w.data) + row * layout.pair_bytes;
    const uint8_t* codes = kept + layout.values_bytes;
    for (int64_t t = 0; t < tokens; t++) {
      const auto* x = reinterpret_cast<const int8_t*>(p.x + t * p.x_bytes);
      float sum = 0;
      for (int64_t start = 0; start < w.columns; start += run) {
        int32_t dot = 0;
        for (int64_t i = start / 2; i < std::min(start + run, w.columns) / 2; i++) dot += value_of(layout, kept, i) * x[column_of(codes, i)];
        sum += static_cast<float>(dot) * widen_bf16(w.scales[row * groups + start / size]) * p.x_scales[t * p.x_groups + start / kGroup];
      }
      p.y[t * p.y_rows + row] = sum;
    }
  }
}

inline void packed_rows(const Product& p, int64_t tokens, int64_t first, int64_t last) {
  is_integer(p.weight->kind) ? rows_of_integers(p, tokens, first, last) : rows_of_floats(p, tokens, first, last);
}

// ---- Dense weights ----

// y += x W^T over `columns` words of a row-major weight.
inline void add_words(bool is_fp16, const uint16_t* weight, int64_t columns, const uint8_t* x, int64_t x_bytes, float* y, int64_t rows,
                      int64_t tokens, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; row++) {
    for (int64_t t = 0; t < tokens; t++) {
      const auto* words = reinterpret_cast<const uint16_t*>(x + t * x_bytes);
      float sums[4] = {};
      for (int64_t i = 0; i < columns; i++) sums[i % 4] += widen(is_fp16, weight[row * columns + i]) * widen(is_fp16, words[i]);
      y[t * rows + row] += sums[0] + sums[1] + (sums[2] + sums[3]);
    }
  }
}

inline void dense_bytes(const Product& p, int64_t tokens, int64_t first, int64_t last) {
  const auto& w = *p.weight;
  for (int64_t row = first; row < last; row++) {
    const auto* values = static_cast<const int8_t*>(w.data) + row * w.columns;
    for (int64_t t = 0; t < tokens; t++) {
      const auto* x = reinterpret_cast<const int8_t*>(p.x + t * p.x_bytes);
      float sum = 0;
      for (int64_t start = 0; start < w.columns; start += kGroup) {
        int32_t dot = 0;
        for (int64_t i = start; i < std::min(start + kGroup, w.columns); i++) dot += values[i] * x[i];
        sum += static_cast<float>(dot) * p.x_scales[t * p.x_groups + start / kGroup];
      }
      p.y[t * p.y_rows + row] = sum * widen_bf16(w.scales[row]);
    }
  }
}

}  // namespace sparsepass::generic
