// What the CPU kernels share: products in AMX tiles, exponentials and conversions in wide vectors,
// tasks over threads and their memory.
//
// The right side of a product lies in pairs of rows, element by element ("paired"), as AMX reads
// it. Every product is made of squares of 32 x 32 in four tile registers.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <memory>

namespace {

using at::Tensor;
using bf16 = uint16_t;

constexpr int64_t SIDE = 32;  // of a square
constexpr float LOG2_E = 1.4426950408889634f;

inline int64_t round_down(int64_t x) { return x / SIDE * SIDE; }
inline int64_t round_up(int64_t x) { return round_down(x + SIDE - 1); }

// ---------------------------------------------------------------- products

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Sets up the tile registers of this thread and leaves them as they were.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(&before_);
    const TileConfig config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_loadconfig(&before_); }

 private:
  TileConfig before_;
};

// c [32, 32] (+)= a [32, depth] times the paired b [depth / 2, 32, 2];
// a_step lies between squares of a.
inline void multiply_square(
    float* c, int64_t c_stride, const bf16* a, int64_t a_stride, int64_t a_step, const bf16* b,
    int64_t b_stride, int64_t depth, bool adds) {
  const int64_t c_bytes = c_stride * 4, a_bytes = a_stride * 2, b_bytes = b_stride * 4;
  float* c_low = c + 16 * c_stride;
  if (adds) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + 16, c_bytes);
    _tile_loadd(2, c_low, c_bytes);
    _tile_loadd(3, c_low + 16, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < depth; i += SIDE) {
    const bf16 *b_rows = b + i * b_stride, *a_square = a + i / SIDE * a_step;
    _tile_loadd(4, a_square, a_bytes);
    _tile_loadd(6, b_rows, b_bytes);
    _tile_loadd(7, b_rows + 32, b_bytes);
    _tile_loadd(5, a_square + 16 * a_stride, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + 16, c_bytes);
  _tile_stored(2, c_low, c_bytes);
  _tile_stored(3, c_low + 16, c_bytes);
}

// c [rows, columns] += a [rows, depth] times the paired b [depth / 2, columns, 2].
void add_product(
    float* c, int64_t c_stride, const bf16* a, int64_t a_stride, int64_t a_step, const bf16* b,
    int64_t b_stride, int64_t rows, int64_t columns, int64_t depth) {
  for (int64_t j = 0; j < columns; j += SIDE)
    for (int64_t i = 0; i < rows; i += SIDE)
      multiply_square(
          c + i * c_stride + j, c_stride, a + i * a_stride, a_stride, a_step, b + 2 * j, b_stride,
          depth, true);
}

// ---------------------------------------------------------------- vectors and layouts

inline __m512 exp2_of(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  // 2^f on [-1/2, 1/2] within 3e-6, fitted by least squares with growing weights.
  __m512 y = _mm512_set1_ps(9.5701015e-3f);
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.5917860e-2f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.4024745e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.9312181e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.9999926e-1f));
  return _mm512_scalef_ps(y, whole);
}

// Within 2e-7, and exactly 1 for 0: a state is multiplied by it again and again.
inline __m512 exp_of(__m512 x) {
  x = _mm512_mul_ps(x, _mm512_set1_ps(LOG2_E));
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_mul_ps(_mm512_sub_ps(x, whole), _mm512_set1_ps(1 / LOG2_E));
  __m512 y = _mm512_set1_ps(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(y, whole);
}

inline __m512 load_floats(const bf16* x) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline __m512i to_bf16(__m512 first, __m512 second) {
  return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

inline void store_bf16(bf16* x, __m512 values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), (__m256i)_mm512_cvtneps_pbh(values));
}

// Pairs the elements of the lower and the upper half.
inline __m512i pair_halves(__m512i x) {
  const __m512i order = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
      3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, x);
}

// Transposes the 32-bit elements of 16 vectors.
inline void transpose_16(__m512i* x) {
  __m512i t[16];
  for (int64_t i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    const __m512i b = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]);
    const __m512i d = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
    t[i] = _mm512_unpacklo_epi64(a, c);
    t[i + 1] = _mm512_unpackhi_epi64(a, c);
    t[i + 2] = _mm512_unpacklo_epi64(b, d);
    t[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  // Quarter n of t[i + j] holds column 4 n + j of rows i to i + 3.
  for (int64_t j = 0; j < 4; j++) {
    const __m512i even_low = _mm512_shuffle_i32x4(t[j], t[j + 4], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(t[j], t[j + 4], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(t[j + 8], t[j + 12], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(t[j + 8], t[j + 12], 0xdd);
    x[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    x[j + 4] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    x[j + 8] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    x[j + 12] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
}

// The paired rows [count / 2, D, 2].
void pair_rows(bf16* paired, const bf16* rows, int64_t count, int64_t D) {
  for (int64_t i = 0; i < count; i += 2)
    for (int64_t d = 0; d < D; d += 16) {
      const auto* first = reinterpret_cast<const __m256i*>(rows + i * D + d);
      const auto* second = reinterpret_cast<const __m256i*>(rows + (i + 1) * D + d);
      const __m512i both = _mm512_inserti64x4(
          _mm512_castsi256_si512(_mm256_loadu_si256(first)), _mm256_loadu_si256(second), 1);
      _mm512_storeu_si512(paired + i * D + 2 * d, pair_halves(both));
    }
}

// The paired transpose [D / 2, count, 2] of rows.
void pair_columns(bf16* paired, const bf16* rows, int64_t count, int64_t D) {
  for (int64_t i = 0; i < count; i += 16)
    for (int64_t d = 0; d < D; d += 32) {
      __m512i x[16];
      for (int64_t r = 0; r < 16; r++) x[r] = _mm512_loadu_si512(rows + (i + r) * D + d);
      transpose_16(x);
      for (int64_t r = 0; r < 16; r++)
        _mm512_storeu_si512(paired + (d + 2 * r) * count + 2 * i, x[r]);
    }
}

// The rows of the paired [count / 2, D, 2].
void split_pairs(bf16* rows, const bf16* paired, int64_t count, int64_t D) {
  for (int64_t i = 0; i < count; i += 2)
    for (int64_t d = 0; d < D; d += 16) {
      const __m512i both = _mm512_loadu_si512(paired + i * D + 2 * d);
      auto* first = reinterpret_cast<__m256i*>(rows + i * D + d);
      auto* second = reinterpret_cast<__m256i*>(rows + (i + 1) * D + d);
      _mm256_storeu_si256(first, _mm512_cvtepi32_epi16(both));
      _mm256_storeu_si256(second, _mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
    }
}

// rows [total, D] of `count` strided rows, zero beyond them.
void copy_rows(
    bf16* rows, const bf16* source, int64_t stride, int64_t count, int64_t total, int64_t D) {
  for (int64_t i = 0; i < count; i++) std::copy_n(source + i * stride, D, rows + i * D);
  std::fill_n(rows + count * D, (total - count) * D, bf16(0));
}

// ---------------------------------------------------------------- inputs, threads, memory

// Heads of a tensor [B, T, H, D].
struct Heads {
  bf16* data;
  int64_t row_stride, token_stride, head_stride;

  explicit Heads(const Tensor& x)
      : data(static_cast<bf16*>(x.data_ptr())),
        row_stride(x.stride(0)),
        token_stride(x.stride(1)),
        head_stride(x.stride(2)) {}
  bf16* at(int64_t row, int64_t token, int64_t head) const {
    return data + row * row_stride + token * token_stride + head * head_stride;
  }
};

template <typename Body>
void run_tasks(int64_t count, const Body& body) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; thread++)
      for (int64_t i = next++; i < count; i = next++) body(i);
  });
}

struct alignas(64) Line {
  char bytes[64];
};

// Hands out memory piece by piece, in whole cache lines.
class Arena {
 public:
  explicit Arena(Line* memory) : next_(memory) {}
  template <typename T>
  T* take(int64_t count) {
    Line* taken = next_;
    next_ += (count * sizeof(T) + sizeof(Line) - 1) / sizeof(Line);
    return reinterpret_cast<T*>(taken);
  }
  const Line* end() const { return next_; }

 private:
  Line* next_;
};

// Tasks in tiles: body(i, arena), with tile registers set up and `bytes` for the thread.
template <typename Body>
void run_tasks(int64_t count, int64_t bytes, const Body& body) {
  std::atomic<int64_t> next{0};
  run_tasks(std::min<int64_t>(at::get_num_threads(), count), [&](int64_t) {
    const Tiles tiles;
    const std::unique_ptr<Line[]> memory(new Line[bytes / sizeof(Line) + 1]);
    for (int64_t i = next++; i < count; i = next++) body(i, Arena(memory.get()));
  });
}

// An unwritten tensor. A large one is memory fresh from the system, and a fault for each page of
// 4 KiB can cost more than the computation: it is asked for in huge pages, and before it is
// written, by all threads. Systems that know no such advice ignore it.
inline Tensor allocate(at::IntArrayRef sizes, const at::TensorOptions& options) {
  constexpr int64_t LARGE = 4 << 20, PIECE = 2 << 20, PAGE = 1 << 12;
  const Tensor x = at::empty(sizes, options);
  const int64_t begin = (reinterpret_cast<int64_t>(x.data_ptr()) + PAGE - 1) / PAGE * PAGE;
  const int64_t end = (reinterpret_cast<int64_t>(x.data_ptr()) + x.nbytes()) / PAGE * PAGE;
  if (end - begin < LARGE) return x;
#ifdef MADV_HUGEPAGE
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
#ifdef MADV_POPULATE_WRITE
  const int64_t first_piece = begin / PIECE, last_piece = (end - 1) / PIECE;
  at::parallel_for(first_piece, last_piece + 1, 8, [&](int64_t piece, int64_t stop) {
    const int64_t from = std::max(begin, piece * PIECE), to = std::min(end, stop * PIECE);
    madvise(reinterpret_cast<void*>(from), to - from, MADV_POPULATE_WRITE);
  });
#endif
  return x;
}

}  // namespace
