// How a packed weight lies in memory for each path, and the way from its stored form and back.
//
// Stored, and for the path `generic`: row after row, a row's kept values in order, then its codes in order, four to a byte.
//
// Otherwise rows lie in pairs. A *step* is half a register of AVX512 or one of AVX2, 32 bytes, and holds the kept values of 16 columns
// (words) or 32 (bytes) of two rows: each 16 bytes of it have those of the even row and then those of the odd one, for the columns
// that one vpshufb reaches. A *block* is 32 bytes of codes, two bits a step in each lane, those of step k at 2k, and then up to 8 steps of
// words, an even number of them, or 4 of bytes. int4 has the nibbles of steps 0 and 2 in the low and high halves of 32 bytes, and those of
// 1 and 3 in the next. Columns are filled up with values of zero; a last row may stand alone. Codes come first because they are needed first:
// bytes that are read in ascending order come faster (AMD Zen 4: by 4% from memory that gives 33 GB/s, by 10% from 45 on).
//
// A block is 128 columns. Where a row has so many that x would not stay in the first cache while the weight streams through it, they are
// cut into *panels*: 32 rows lie together, the first panel of all of them, then the second one, and so on. A kernel reads on and on,
// and needs 8 KB of x at a time (AMD Zen 4, bf16, 14336 columns: 43 GB/s by two threads, against 25 without panels).

#pragma once

#include "common.h"

namespace sparsepass {

// Bytes of one row's kept values as they are stored.
inline int64_t kept_bytes(int kind, int64_t columns) { return columns / (kind == kInt4 ? 4 : 2) * (is_integer(kind) ? 1 : 2); }

// Some of the columns of all rows.
struct Panel {
  int64_t begin, end;   // whole blocks of 128 columns
  int64_t left;         // steps after them; the last panel only
  int64_t pair_bytes;   // of two rows

  int64_t last() const { return end + (left ? 1 : 0); }  // behind the last block, be it whole or not
};

struct Layout {
  static constexpr int64_t kStep = 32;
  static constexpr int64_t kBytesOfX = 8192;  // that a panel has at most

  int path, kind;
  int64_t rows, columns;
  int64_t lane_bytes;    // of values, 1 or 2; a nibble counts as 1
  int64_t lanes;         // kept values of one row in a step
  int64_t per_block;     // steps
  int64_t steps;         // of a row
  int64_t full, left;    // whole blocks of a row, and the steps after them
  int64_t unit_rows;     // rows that lie together, a power of two
  int64_t values_bytes;  // of the values of a block; generic: of a row
  int64_t block_bytes;   // with codes
  int64_t pair_bytes;    // of two rows; generic: of one
  int64_t panels = 1, panel_blocks = 0;

  Layout(int path_, int kind_, int64_t rows_, int64_t columns_) : path(path_), kind(kind_), rows(rows_), columns(columns_) {
    const int64_t halves = kind == kInt4 ? 2 : 1;
    lane_bytes = is_integer(kind) ? 1 : 2;
    if (path == kGeneric) {
      lanes = columns / 2;
      unit_rows = 1;
      values_bytes = kept_bytes(kind, columns);
      block_bytes = pair_bytes = values_bytes + columns / 8;
      per_block = steps = full = left = 0;
      return;
    }
    lanes = kStep / lane_bytes / 2;
    per_block = is_integer(kind) ? 4 : 8;
    const int64_t together = is_integer(kind) ? per_block : 2;
    steps = ceil_div(ceil_div(columns, 2 * lanes), together) * together;
    full = steps / per_block;
    left = steps % per_block;
    values_bytes = per_block / halves * kStep;
    block_bytes = values_bytes + kStep;
    pair_bytes = full * block_bytes + (left ? left * kStep + kStep : 0);
    const int64_t blocks = full + (left ? 1 : 0), most = kBytesOfX / (kGroup * lane_bytes);
    panels = std::max<int64_t>(1, ceil_div(blocks, most));
    panel_blocks = ceil_div(blocks, panels);
    unit_rows = panels > 1 ? 32 : 2;
  }

  int64_t padded_columns() const { return path == kGeneric ? columns : steps * lanes * 2; }
  int64_t pairs() const { return path == kGeneric ? rows : ceil_div(rows, 2); }
  int64_t bytes() const { return pairs() * pair_bytes; }
  int64_t unit_bytes() const { return ceil_div(unit_rows, 2) * pair_bytes; }

  Panel panel(int64_t number) const {
    const int64_t begin = number * panel_blocks, end = std::min(begin + panel_blocks, full);
    const int64_t rest = number == panels - 1 ? left : 0;
    return {begin, end, rest, (end - begin) * block_bytes + (rest ? (rest + 1) * kStep : 0)};
  }

  // Where a row and its neighbour begin; not for `generic`.
  int64_t at(int64_t row, const Panel& panel) const {
    const int64_t start = row & -unit_rows;
    const int64_t together = std::min(unit_rows / 2, pairs() - start / 2);
    return start / 2 * pair_bytes + together * panel.begin * block_bytes + (row - start) / 2 * panel.pair_bytes;
  }

  // Calls put(byte of the value, its nibble, byte of the code, its shift) for each kept value of a row in order, padding included.
  template <class Put>
  void each(int64_t row, const Put& put) const {
    if (path == kGeneric) {
      const int64_t start = row * pair_bytes;
      for (int64_t i = 0; i < lanes; i++) {
        const int64_t value = kind == kInt4 ? i / 2 : i * lane_bytes;
        put(start + value, kind == kInt4 ? i % 2 : 0, start + values_bytes + i / 4, i % 4 * 2);
      }
      return;
    }
    const int64_t run = 8 / lane_bytes;  // kept values of a row that lie together
    for (int64_t number = 0; number < panels; number++) {
      const Panel part = panel(number);
      const int64_t start = at(row, part);
      for (int64_t i = 0; i < (part.end - part.begin) * per_block + part.left; i++) {
        const int64_t block = i / per_block, k = i % per_block, shift = 2 * k;
        const int64_t at_block = start + block * block_bytes;
        const int64_t at_values = at_block + ((kind == kInt4 ? k % 2 : k) + 1) * kStep;
        for (int64_t j = 0; j < lanes; j++) {
          const int64_t lane = j / run * 2 * run + row % 2 * run + j % run;
          const int64_t code = at_block + lane * lane_bytes + (shift >= 8 ? 1 : 0);
          put(at_values + lane * lane_bytes, kind == kInt4 ? k / 2 : 0, code, shift % 8);
        }
      }
    }
  }
};

inline void lay_out_row(const Layout& to, int64_t row, const uint8_t* kept, const uint8_t* codes, uint8_t* data) {
  const int64_t count = to.columns / 2;
  int64_t i = 0;
  to.each(row, [&](int64_t value, int64_t nibble, int64_t code, int64_t shift) {
    if (to.kind == kInt4) {
      const int bits = i < count ? kept[i / 2] >> (i % 2 * 4) & 15 : 8;
      data[value] = static_cast<uint8_t>((data[value] & (nibble ? 0x0f : 0xf0)) | bits << (nibble * 4));
    } else if (i < count) {
      std::memcpy(data + value, kept + i * to.lane_bytes, to.lane_bytes);
    }
    if (i < count) data[code] = static_cast<uint8_t>(data[code] | (codes[i / 4] >> (i % 4 * 2) & 3) << shift);
    i++;
  });
}

inline void store_row(const Layout& from, int64_t row, const uint8_t* data, uint8_t* kept, uint8_t* codes) {
  const int64_t count = from.columns / 2;
  std::memset(kept, 0, static_cast<size_t>(kept_bytes(from.kind, from.columns)));
  std::memset(codes, 0, static_cast<size_t>(from.columns / 8));
  int64_t i = 0;
  from.each(row, [&](int64_t value, int64_t nibble, int64_t code, int64_t shift) {
    if (i < count) {
      if (from.kind == kInt4) {
        kept[i / 2] = static_cast<uint8_t>(kept[i / 2] | (data[value] >> (nibble * 4) & 15) << (i % 2 * 4));
      } else {
        std::memcpy(kept + i * from.lane_bytes, data + value, from.lane_bytes);
      }
      codes[i / 4] = static_cast<uint8_t>(codes[i / 4] | (data[code] >> shift & 3) << (i % 4 * 2));
    }
    i++;
  });
}

// The two codes of each group ascend, where a byte holds those of two groups.
inline bool ascend(uint8_t byte) {
  const int first = byte & 0x33, second = byte >> 2 & 0x33;
  return (first & 3) < (second & 3) && (first >> 4) < (second >> 4);
}

}  // namespace sparsepass
