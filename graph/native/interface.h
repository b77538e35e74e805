// Products of packed 2:4 weights with few rows of activations, on a processor. A C interface: neither torch nor Python is known here.
//
// A *kind* is what the values of a weight are, a *path* is what instructions a kernel uses. Both are numbers below. Each function
// that gives an int returns 0, or 1 if this processor lacks the path for the kind.

#pragma once

#include <cstdint>

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

extern "C" {

enum SparsepassKind { kBf16 = 0, kFp16 = 1, kInt8 = 2, kInt4 = 3 };
enum SparsepassPath { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };  // kAmx: as kAvx512, and many tokens by AMX
enum SparsepassType { kTypeBf16 = 0, kTypeFp16 = 1, kTypeFloat = 2 };  // of activations and results

// A weight in memory, with all that its product needs. Rows are output features, columns input features.
struct SparsepassWeight {
  int32_t kind;
  int32_t path;
  int32_t dense;            // 1: data are all values, row by row (bf16, fp16, int8); 0: laid out by sparsepass_lay_out
  int32_t k;                // input features that the branch sums into one; 0 if there is no branch
  int64_t rows, columns;
  int64_t group_size;       // columns that share a scale; 0: a row has one
  const void* data;
  const uint16_t* scales;   // bf16 [rows, ceil(columns / group_size)]; null for bf16 and fp16
  const uint16_t* branch;   // [rows, columns / k], fp16 for the kind fp16 and else bf16; null if there is none
  const float* bias;        // [rows]; null if there is none
};

// The number of this interface; a library with another one is not used.
int sparsepass_version(void);

// Hands over GOMP_parallel of the OpenMP runtime that torch uses; null for threads of our own.
void sparsepass_use_openmp(void* entry);

// Whether this processor has a path for a kind.
int sparsepass_has(int path, int kind);

// Asks for huge pages where a buffer holds whole ones.
void sparsepass_huge_pages(void* data, int64_t bytes);

// Bytes of a weight laid out for a path.
int64_t sparsepass_laid_out_bytes(int path, int kind, int64_t rows, int64_t columns);

// Rows that belong together in a layout: the parts of a weight whose rows are a multiple of it lie one after the other.
int64_t sparsepass_row_multiple(int path, int kind, int64_t columns);

// From the stored form (kept values in order, two bits a code) to that of a path, and back.
int sparsepass_lay_out(int path, int kind, const void* kept, const uint8_t* codes, int64_t rows, int64_t columns, void* data,
                       int threads);
int sparsepass_store(int path, int kind, const void* data, int64_t rows, int64_t columns, void* kept, uint8_t* codes, int threads);

// The first group of four whose two codes do not ascend, counted over all rows; -1 if there is none.
int64_t sparsepass_bad_codes(const uint8_t* codes, int64_t rows, int64_t columns, int threads);

// Rows first to last of a weight with its zeros, scaled: out is [last - first, columns] of a type. Branch and bias are left out.
int sparsepass_unpack(const SparsepassWeight* weight, int64_t first, int64_t last, int type, void* out, int threads);

// y = x times the transposed weight, plus branch and bias. x is [tokens, columns] with `x_stride` elements from row to row, y is
// [tokens, rows], both of one type. x is rounded to the weight's kind: bf16, fp16, or signed bytes,
// round(x * (127 / m)) for each 128 columns, where m is their largest magnitude and m / 127 their scale. More than 64 tokens meet int8 and
// int4 as bf16 on the paths amx and avx512, if the processor has BF16, and so do the weights, scaled.
int sparsepass_linear(const SparsepassWeight* weight, int type, const void* x, int64_t x_stride, int64_t tokens, void* y, int threads);

// The same for layers whose weights lie one after the other: rows up to ends[0] go to y[0], which is [tokens, ends[0]], rows from there
// up to ends[1] to y[1], and so on; the last end is `rows`.
int sparsepass_linear_parts(const SparsepassWeight* weight, int type, const void* x, int64_t x_stride, int64_t tokens, int parts,
                            const int64_t* ends, void* const* y, int threads);

// A byte for each score: 1 for the n largest of each four, 0 for the others; ties go to the lowest index. Scores are not NaN.
void sparsepass_largest_of_four(int type, const void* scores, int64_t groups, int n, uint8_t* mask, int threads);

// Each row of x, of `columns` elements, times a weight over the root of its mean square plus eps; all of one type, and rounded to it before
// the weight too.
void sparsepass_rms_norm(int type, const void* x, const void* weight, int64_t rows, int64_t columns, float eps, void* y, int threads);

// The sum of a buffer's whole words of 64 bits. It reads the buffer once and does little else: it measures what memory gives.
int64_t sparsepass_read(const void* data, int64_t bytes, int threads);

}  // extern "C"

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
