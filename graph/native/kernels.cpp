// The functions of interface.h: they choose the kernel of a path, and share the rows among threads.

#include "activations.h"
#include "amx.h"
#include "avx2.h"
#include "avx512.h"
#include "generic.h"
#include "interface.h"
#include "masks.h"
#include "norms.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sparsepass {
namespace {

// Rows that stay in the processor's cache while further tokens meet them: as many as that allows if there are many, and if there
// are few, not too many for all threads to get some.
constexpr int64_t kRows = 32, kRowsOfMany = 128;
constexpr int64_t kTokensAtOnce = 256;  // whose sums are kept in float
constexpr int64_t kMostAsBytes = 64;    // tokens that int8 and int4 meet as bytes, where more are met as words
constexpr int64_t kLeastForTiles = 9, kLeastBytesForTiles = 13;  // tokens that a unit for matrices meets sooner than the kernels for few

struct Words {
  const uint16_t* weight;
  int64_t columns;
  const Activations* x;
  bool is_fp16;
};

#if defined(__x86_64__)

// Calls run<T>(first token) for all tokens, with up to kMost tokens at once.
template <int kMost, class Run>
void by_tokens(int64_t tokens, const Run& run) {
  int64_t from = 0;
  for (; tokens - from >= kMost; from += kMost) run(std::integral_constant<int, kMost>{}, from);
  switch (tokens - from) {
    case 7: if constexpr (kMost > 7) run(std::integral_constant<int, 7>{}, from); break;
    case 6: if constexpr (kMost > 6) run(std::integral_constant<int, 6>{}, from); break;
    case 5: if constexpr (kMost > 5) run(std::integral_constant<int, 5>{}, from); break;
    case 4: if constexpr (kMost > 4) run(std::integral_constant<int, 4>{}, from); break;
    case 3: if constexpr (kMost > 3) run(std::integral_constant<int, 3>{}, from); break;
    case 2: if constexpr (kMost > 2) run(std::integral_constant<int, 2>{}, from); break;
    case 1: run(std::integral_constant<int, 1>{}, from); break;
    default: break;
  }
}

template <int T, bool kNibbles, bool kSigned>
void avx512_bytes(const Product& p, const Layout& layout, const Panel& panel, int64_t first, int64_t last) {
  switch (p.weight->group_size) {
    case 16: return avx512::packed_bytes<T, kNibbles, 8, kSigned>(p, layout, panel, first, last);
    case 32: return avx512::packed_bytes<T, kNibbles, 4, kSigned>(p, layout, panel, first, last);
    case 64: return avx512::packed_bytes<T, kNibbles, 2, kSigned>(p, layout, panel, first, last);
    default: return avx512::packed_bytes<T, kNibbles, 1, kSigned>(p, layout, panel, first, last);
  }
}

void avx512_rows(const Product& p, const Layout& layout, const Panel& panel, int64_t tokens, int64_t first, int64_t last) {
  by_tokens<avx512::kMostTokens>(tokens, [&](auto number, int64_t from) {
    constexpr int T = decltype(number)::value;
    const Product q = p.from(from);
    switch (p.weight->kind) {
      case kBf16: return avx512::packed_words<T, false>(q, layout, panel, first, last);
      case kFp16: return avx512::packed_words<T, true>(q, layout, panel, first, last);
      case kInt8: return avx512_bytes<T, false, false>(q, layout, panel, first, last);
      default:
        if constexpr (T == 1) {
          if (p.x_is_signed) return avx512_bytes<T, true, true>(q, layout, panel, first, last);
        }
        return avx512_bytes<T, true, false>(q, layout, panel, first, last);
    }
  });
}

template <int T, bool kNibbles>
void avx2_bytes(const Product& p, const Layout& layout, const Panel& panel, int64_t first, int64_t last) {
  switch (p.weight->group_size) {
    case 16: return avx2::packed_bytes<T, kNibbles, 8>(p, layout, panel, first, last);
    case 32: return avx2::packed_bytes<T, kNibbles, 4>(p, layout, panel, first, last);
    case 64: return avx2::packed_bytes<T, kNibbles, 2>(p, layout, panel, first, last);
    default: return avx2::packed_bytes<T, kNibbles, 1>(p, layout, panel, first, last);
  }
}

void avx2_rows(const Product& p, const Layout& layout, const Panel& panel, int64_t tokens, int64_t first, int64_t last) {
  by_tokens<avx2::kMostTokens>(tokens, [&](auto number, int64_t from) {
    constexpr int T = decltype(number)::value;
    const Product q = p.from(from);
    switch (p.weight->kind) {
      case kBf16: return avx2::packed_words<T, false>(q, layout, panel, first, last);
      case kFp16: return avx2::packed_words<T, true>(q, layout, panel, first, last);
      case kInt8: return avx2_bytes<T, false>(q, layout, panel, first, last);
      default: return avx2_bytes<T, true>(q, layout, panel, first, last);
    }
  });
}

#endif

// y = x W^T for rows of dense bytes.
void dense_bytes(const Product& p, int64_t tokens, int64_t first, int64_t last) {
#if defined(__x86_64__)
  const auto& w = *p.weight;
  if (w.path != kGeneric) {
    const bool wide = is_avx512(w.path);
    return by_tokens<avx2::kMostTokens>(tokens, [&](auto number, int64_t from) {
      constexpr int T = decltype(number)::value;
      const auto& kernel = wide ? avx512::dense_bytes<T> : avx2::dense_bytes<T>;
      kernel(p.from(from), first, last);
    });
  }
#endif
  generic::dense_bytes(p, tokens, first, last);
}

#if defined(__x86_64__)

// y = x W^T for rows of int8 or int4 that meet so many tokens that it pays to make words of them first; x is bf16.
void rows_as_words(const Product& p, const Layout& layout, int64_t tokens, int64_t first, int64_t last) {
  thread_local std::vector<uint8_t> words;
  for (int64_t row = first; row < last; row += kRows) {
    SparsepassWeight part = *p.weight;
    part.kind = kBf16;
    part.rows = std::min(kRows, last - row);
    if (part.branch != nullptr && part.k > 0) part.branch += row * (part.columns / part.k);
    const Layout to(kAvx512, kBf16, part.rows, part.columns);
    words.resize(static_cast<size_t>(to.bytes()));
    const auto& convert = layout.kind == kInt4 ? avx512::to_words<true> : avx512::to_words<false>;
    convert(*p.weight, layout, row, to, words.data());
    part.data = words.data();
    Product q = p;
    q.weight = &part;
    q.y += row;
    for (int64_t number = 0; number < to.panels; number++) avx512_rows(q, to, to.panel(number), tokens, 0, part.rows);
  }
}

#endif

// y = x W^T for rows whose weight is packed.
void packed_rows(const Product& p, const Layout& layout, int64_t tokens, int64_t first, int64_t last) {
#if defined(__x86_64__)
  if (layout.path != kGeneric) {
    const auto& rows = is_avx512(layout.path) ? avx512_rows : avx2_rows;
    for (int64_t number = 0; number < layout.panels; number++) rows(p, layout, layout.panel(number), tokens, first, last);
    return;
  }
#endif
  generic::packed_rows(p, tokens, first, last);
}

// y += x W^T for rows of dense words: a branch, or a dense weight.
void add_words(int path, const Words& words, float* y, int64_t rows, int64_t tokens, int64_t first, int64_t last) {
  const Activations& x = *words.x;
#if defined(__x86_64__)
  // One token takes as long as its weight is read, which goes faster in registers of 32 bytes (AMD Zen 4).
  if (is_avx512(path) && tokens > 1 && avx512::has(kBf16)) {
    return by_tokens<avx512::kMostTokens>(tokens, [&](auto number, int64_t from) {
      constexpr int T = decltype(number)::value;
      const auto& kernel = words.is_fp16 ? avx512::add_words<T, true> : avx512::add_words<T, false>;
      kernel(words.weight, words.columns, x.data + from * x.bytes, x.bytes, y + from * rows, rows, first, last);
    });
  }
  if (path != kGeneric) {
    return by_tokens<avx2::kMostTokens>(tokens, [&](auto number, int64_t from) {
      constexpr int T = decltype(number)::value;
      const auto& kernel = words.is_fp16 ? avx2::add_words<T, true> : avx2::add_words<T, false>;
      kernel(words.weight, words.columns, x.data + from * x.bytes, x.bytes, y + from * rows, rows, first, last);
    });
  }
#endif
  generic::add_words(words.is_fp16, words.weight, words.columns, x.data, x.bytes, y, rows, tokens, first, last);
}

int64_t bytes_of_row(const SparsepassWeight& w) {
  if (w.dense) return w.columns * (is_integer(w.kind) ? 1 : 2);
  return Layout(w.path, w.kind, w.rows, w.columns).bytes() / std::max<int64_t>(1, w.rows);
}

// Tokens from `before` on; x begins with the first of them. `as_words`: of integers, see rows_as_words.
void linear_some(const SparsepassWeight& w, int type, const void* x, int64_t stride, int64_t before, int64_t tokens, const Outputs& to,
                 bool as_words, int threads) {
  thread_local Activations of_x, of_sums;
  thread_local std::vector<float> results;
  const Layout layout(w.path, w.kind, w.rows, w.columns);
  const bool integers = is_integer(w.kind) && !as_words, is_fp16 = w.kind == kFp16, dense_words = w.dense && !integers;
  const Activations::Source source{type, x, w.columns, stride, tokens, threads};
  const bool x_is_signed = !is_avx512(w.path) || (w.kind == kInt4 && tokens == 1);
  if (integers) {
    of_x.take_bytes(source, ceil_div(w.columns, kGroup) * kGroup, x_is_signed ? 0 : 128);
  } else {
    const int64_t padded = dense_words ? ceil_div(w.columns, 32) * 32 : Layout(w.path, as_words ? kBf16 : w.kind, w.rows, w.columns).padded_columns();
    of_x.take_words(source, is_fp16, padded);
  }
  const bool has_branch = w.branch != nullptr && w.k > 0;
  // The kernels add the branch; that for any processor, and dense ones, leave it to add_words.
  const bool adds_branch = !w.dense && w.path != kGeneric;
  if (has_branch) of_sums.take_sums(source, is_fp16, w.k, adds_branch);
  results.resize(static_cast<size_t>(tokens * w.rows));
  // Threads have a copy of neither: they read the caller's.
  const Activations &acts = of_x, &sums = of_sums;
  float* y = results.data();
  const uint8_t* met_by_branch = has_branch && adds_branch ? sums.data : nullptr;
  const float* x_scales = integers ? acts.scales.data() : nullptr;
  const Product p{&w, acts.data, x_scales, met_by_branch, acts.bytes, acts.groups, sums.bytes, y, w.rows, x_is_signed, fetches_ahead()};
  const int64_t at_once = tokens > 16 ? kRowsOfMany : kRows;
  const int64_t step = tokens == 1 && layout.panels == 1 ? w.rows : at_once;  // nothing is read twice
  // Waking threads costs some microseconds, as much as one thread needs for this many bytes.
  const int64_t worth = std::max<int64_t>(1, bytes_of_row(w) * w.rows * tokens / 32768);
  in_parts(w.rows, at_once, static_cast<int>(std::min<int64_t>(threads, worth)), [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += step) {
      const int64_t last = std::min(end, first + step);
      if (dense_words) {
        for (int64_t t = 0; t < tokens; t++) std::fill(y + t * w.rows + first, y + t * w.rows + last, 0.f);
        add_words(w.path, {static_cast<const uint16_t*>(w.data), w.columns, &acts, is_fp16}, y, w.rows, tokens, first, last);
      } else if (w.dense) {
        dense_bytes(p, tokens, first, last);
#if defined(__x86_64__)
      } else if (as_words) {
        rows_as_words(p, layout, tokens, first, last);
#endif
      } else {
        packed_rows(p, layout, tokens, first, last);
      }
      if (has_branch && !adds_branch) add_words(w.path, {w.branch, w.columns / w.k, &sums, is_fp16}, y, w.rows, tokens, first, last);
      for (int64_t t = 0; t < tokens; t++) put_results(type, y + t * w.rows, w.bias, before + t, first, last, to);
    }
  });
}

void linear(const SparsepassWeight& w, int type, const void* x, int64_t stride, int64_t tokens, const Outputs& to, int threads) {
#if defined(SPARSEPASS_HAS_TILES)
  const int64_t least = is_integer(w.kind) ? kLeastBytesForTiles : kLeastForTiles;
  if (w.path == kAmx && !w.dense && tokens >= least) return amx::linear(w, type, x, stride, tokens, to, threads);
#endif
  const bool as_words = is_integer(w.kind) && !w.dense && is_avx512(w.path) && tokens > kMostAsBytes && sparsepass_has(kAvx512, kBf16);
  for (int64_t before = 0; before < tokens; before += kTokensAtOnce) {
    const auto* from = static_cast<const uint8_t*>(x) + before * stride * element_bytes(type);
    linear_some(w, type, from, stride, before, std::min(kTokensAtOnce, tokens - before), to, as_words, threads);
  }
}

// Room for one row on its way to its zeros.
struct Row {
  std::vector<uint8_t> kept, codes, dense;

  explicit Row(const Layout& layout)
      : kept(static_cast<size_t>(layout.columns) + 1),
        codes(static_cast<size_t>(layout.columns / 8) + 1),
        dense(static_cast<size_t>(std::max(layout.columns, layout.padded_columns()) * 2 + 64)) {}
};

// One row with its zeros, through its stored form.
void unpack_any(const SparsepassWeight& w, const Layout& layout, int64_t row, int type, Row& room, void* out) {
  const auto* data = static_cast<const uint8_t*>(w.data);
  store_row(layout, row, data, room.kept.data(), room.codes.data());
  std::memset(out, 0, static_cast<size_t>(w.columns * element_bytes(type)));
  const int64_t size = w.group_size ? w.group_size : w.columns, groups = ceil_div(w.columns, size);
  for (int64_t i = 0; i < w.columns / 2; i++) {
    const int64_t column = generic::column_of(room.codes.data(), i);
    float value;
    if (is_integer(w.kind)) {
      value = static_cast<float>(generic::value_of(layout, room.kept.data(), i)) * widen_bf16(w.scales[row * groups + i * 2 / size]);
    } else {
      value = widen(w.kind == kFp16, reinterpret_cast<const uint16_t*>(room.kept.data())[i]);
    }
    if (type == kTypeFloat) {
      static_cast<float*>(out)[column] = value;
    } else {
      static_cast<uint16_t*>(out)[column] = round_word(type == kTypeFp16, value);
    }
  }
}

void unpack_row(const SparsepassWeight& w, const Layout& layout, int64_t row, int type, Row& room, void* out) {
#if defined(__x86_64__)
  if (w.path != kGeneric) {
    const auto* data = static_cast<const uint8_t*>(w.data);
    if (is_integer(w.kind)) {
      auto* bytes = reinterpret_cast<int8_t*>(room.dense.data());
      is_avx512(w.path) ? avx512::unpack<false>(layout, data, row, room.dense.data()) : avx2::unpack<false>(layout, data, row, bytes);
      const int64_t size = w.group_size ? w.group_size : w.columns;
      return avx2::convert_bytes(bytes, w.scales + row * ceil_div(w.columns, size), size, w.columns, type, out);
    }
    const bool as_it_is = type == (w.kind == kFp16 ? kTypeFp16 : kTypeBf16);
    // It may write whole registers, for which `out` has no room where columns do not fill them.
    const bool at_once = as_it_is && w.columns == layout.padded_columns();
    auto* words = reinterpret_cast<uint16_t*>(at_once ? out : room.dense.data());
    is_avx512(w.path) ? avx512::unpack<true>(layout, data, row, reinterpret_cast<uint8_t*>(words)) : avx2::unpack<true>(layout, data, row, words);
    if (as_it_is) {
      if (!at_once) std::memcpy(out, words, static_cast<size_t>(w.columns) * 2);
      return;
    }
    return w.kind == kFp16 ? avx2::convert_words<true>(words, w.columns, type, out) : avx2::convert_words<false>(words, w.columns, type, out);
  }
#endif
  unpack_any(w, layout, row, type, room, out);
}

}  // namespace
}  // namespace sparsepass

using namespace sparsepass;

extern "C" {

int sparsepass_version(void) { return 3; }

void sparsepass_use_openmp(void* entry) { gomp_parallel = reinterpret_cast<GompParallel>(entry); }

int sparsepass_has(int path, int kind) {
  if (path == kGeneric) return 1;
#if defined(__x86_64__)
  if (path == kAvx2) return avx2::has();
  if (path == kAvx512) return avx512::has(kind);
#if defined(SPARSEPASS_HAS_TILES)
  if (path == kAmx) return kind != kFp16 && avx512::has(kind) && avx512::has(kBf16) && amx::has();
#endif
#endif
  (void)kind;
  return 0;
}

void sparsepass_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2u << 20;
  const uintptr_t from = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t to = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (to > from) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

int64_t sparsepass_laid_out_bytes(int path, int kind, int64_t rows, int64_t columns) { return Layout(path, kind, rows, columns).bytes(); }

int64_t sparsepass_row_multiple(int path, int kind, int64_t columns) { return Layout(path, kind, 1, columns).unit_rows; }

int sparsepass_lay_out(int path, int kind, const void* kept, const uint8_t* codes, int64_t rows, int64_t columns, void* data,
                       int threads) {
  if (!sparsepass_has(path, kind)) return 1;
  const Layout layout(path, kind, rows, columns);
  const int64_t row_bytes = kept_bytes(kind, columns);
  in_parts(ceil_div(rows, layout.unit_rows), 8, threads, [&](int64_t first, int64_t last) {
    auto* to = static_cast<uint8_t*>(data);
    const int64_t begin = first * layout.unit_bytes(), end = std::min(layout.bytes(), last * layout.unit_bytes());
    std::memset(to + begin, 0, static_cast<size_t>(end - begin));
    for (int64_t row = first * layout.unit_rows; row < std::min(rows, last * layout.unit_rows); row++)
      lay_out_row(layout, row, static_cast<const uint8_t*>(kept) + row * row_bytes, codes + row * (columns / 8), to);
  });
  return 0;
}

int sparsepass_store(int path, int kind, const void* data, int64_t rows, int64_t columns, void* kept, uint8_t* codes, int threads) {
  if (!sparsepass_has(path, kind)) return 1;
  const Layout layout(path, kind, rows, columns);
  const int64_t row_bytes = kept_bytes(kind, columns);
  in_parts(rows, 8, threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++)
      store_row(layout, row, static_cast<const uint8_t*>(data), static_cast<uint8_t*>(kept) + row * row_bytes, codes + row * (columns / 8));
  });
  return 0;
}

int64_t sparsepass_bad_codes(const uint8_t* codes, int64_t rows, int64_t columns, int threads) {
  const int64_t bytes = rows * (columns / 8);
  std::atomic<int64_t> worst{bytes};
  in_parts(bytes, 65536, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      if (ascend(codes[i])) continue;
      int64_t before = worst.load();
      while (i < before && !worst.compare_exchange_weak(before, i)) {}
      return;
    }
  });
  if (worst == bytes) return -1;
  const uint8_t byte = codes[worst];
  return worst * 2 + ((byte & 3) < (byte >> 2 & 3) ? 1 : 0);
}

int sparsepass_unpack(const SparsepassWeight* weight, int64_t first, int64_t last, int type, void* out, int threads) {
  const auto& w = *weight;
  if (!sparsepass_has(w.path, w.kind)) return 1;
  const Layout layout(w.path, w.kind, w.rows, w.columns);
  in_parts(last - first, 8, threads, [&](int64_t begin, int64_t end) {
    Row room(layout);
    for (int64_t i = begin; i < end; i++) {
      unpack_row(w, layout, first + i, type, room, static_cast<uint8_t*>(out) + i * w.columns * element_bytes(type));
    }
  });
  return 0;
}

int sparsepass_linear(const SparsepassWeight* weight, int type, const void* x, int64_t x_stride, int64_t tokens, void* y, int threads) {
  if (!sparsepass_has(weight->path, weight->kind)) return 1;
  linear(*weight, type, x, x_stride, tokens, {1, &weight->rows, &y}, threads);
  return 0;
}

int sparsepass_linear_parts(const SparsepassWeight* weight, int type, const void* x, int64_t x_stride, int64_t tokens, int parts,
                            const int64_t* ends, void* const* y, int threads) {
  if (!sparsepass_has(weight->path, weight->kind)) return 1;
  linear(*weight, type, x, x_stride, tokens, {parts, ends, y}, threads);
  return 0;
}

int64_t sparsepass_read(const void* data, int64_t bytes, int threads) {
  std::atomic<uint64_t> all{0};
  in_parts(bytes / 8, 4096, threads, [&](int64_t first, int64_t last) {
    const auto* words = static_cast<const uint64_t*>(data);
    uint64_t sum = 0;
    for (int64_t i = first; i < last; i++) sum += words[i];
    all += sum;
  });
  return static_cast<int64_t>(all.load());
}

void sparsepass_largest_of_four(int type, const void* scores, int64_t groups, int n, uint8_t* mask, int threads) {
  in_parts(groups, 8192, threads, [&](int64_t first, int64_t last) { largest_of_groups(type, scores, first, last, n, mask); });
}

void sparsepass_rms_norm(int type, const void* x, const void* weight, int64_t rows, int64_t columns, float eps, void* y, int threads) {
  const int64_t row_bytes = columns * element_bytes(type);
  in_parts(rows, 8, threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first * row_bytes; row < last * row_bytes; row += row_bytes)
      rms_norm(type, static_cast<const uint8_t*>(x) + row, weight, columns, eps, static_cast<uint8_t*>(y) + row);
  });
}

}  // extern "C"
