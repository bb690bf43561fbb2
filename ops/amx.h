// What the CPU kernels share: products in AMX tiles, exponentials and conversions in wide vectors,
// tasks over threads and their memory.
//
// The right side of a product lies in pairs of rows, element by element ("paired"), as AMX reads
// it. Every product is made of squares of 32 x 32 in four tile registers.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <immintrin.h>

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

// Memory of one thread, from one allocation.
class Arena {
 public:
  explicit Arena(int64_t bytes) : memory_(new char[bytes + 64]) {
    next_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) & ~63ull);
  }
  template <typename T>
  T* take(int64_t count) {
    char* taken = next_;
    next_ += count * sizeof(T);
    return reinterpret_cast<T*>(taken);
  }

 private:
  std::unique_ptr<char[]> memory_;
  char* next_;
};

}  // namespace
