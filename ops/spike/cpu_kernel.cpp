// Spike counts of bfloat16 and float32 tensors and their histogram on CPUs with AVX-512. A row is
// read from memory once, for its threshold, and a second time from the cache, for its counts.

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <mutex>
#include <vector>

#include "amx.h"

namespace {

constexpr int64_t WIDTH = 16;     // floats of a vector
constexpr int64_t GRAIN = 32768;  // elements that are worth a thread
constexpr int64_t TABLES = 4;     // of a thread, since equal counts come in a row

// ---------------------------------------------------------------- vectors

template <typename T>
struct Vector;

template <>
struct Vector<float> {
  static __m512 load(const float* x) { return _mm512_loadu_ps(x); }
  static __m512 load(const float* x, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, x); }
  static void store(float* x, __m512 y) { _mm512_storeu_ps(x, y); }
  static void store(float* x, __m512 y, __mmask16 lanes) { _mm512_mask_storeu_ps(x, lanes, y); }
};

template <>
struct Vector<bf16> {
  static __m512 load(const bf16* x) { return load_floats(x); }
  static __m512 load(const bf16* x, __mmask16 lanes) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  }
  static void store(bf16* x, __m512 y) { store_bf16(x, y); }
  static void store(bf16* x, __m512 y, __mmask16 lanes) {
    _mm256_mask_storeu_epi16(x, lanes, (__m256i)_mm512_cvtneps_pbh(y));
  }
};

// Lets `use` see the elements of a row: (start, vector, lanes that are part of the row).
template <typename T, typename Use>
inline void visit(const T* x, int64_t size, const Use& use) {
  int64_t i = 0;
  for (; i + WIDTH <= size; i += WIDTH) use(i, Vector<T>::load(x + i), __mmask16(0xffff));
  const __mmask16 rest = (1u << (size - i)) - 1;
  if (rest) use(i, Vector<T>::load(x + i, rest), rest);
}

template <typename T>
inline float sum_sizes(const T* x, int64_t size) {
  constexpr int64_t CHAINS = 4;  // additions in flight
  __m512 sums[CHAINS] = {};
  int64_t i = 0;
  for (; i + CHAINS * WIDTH <= size; i += CHAINS * WIDTH)
    for (int64_t c = 0; c < CHAINS; c++)
      sums[c] = _mm512_add_ps(sums[c], _mm512_abs_ps(Vector<T>::load(x + i + c * WIDTH)));
  visit(x + i, size - i, [&](int64_t, __m512 y, __mmask16) {
    sums[0] = _mm512_add_ps(sums[0], _mm512_abs_ps(y));
  });
  const __m512 half = _mm512_add_ps(sums[0], sums[1]);
  return _mm512_reduce_add_ps(_mm512_add_ps(half, _mm512_add_ps(sums[2], sums[3])));
}

// The rounded quotient, which a division gives in six times as long: two corrections by the exact
// remainder leave nothing but the last rounding (Markstein, 1990). Infinite quotients stay.
inline __m512 divide(__m512 x, __m512 divisor, __m512 inverse) {
  const __m512 guess = _mm512_mul_ps(x, inverse);
  __m512 y = _mm512_fmadd_ps(_mm512_fnmadd_ps(guess, divisor, x), inverse, guess);
  y = _mm512_fmadd_ps(_mm512_fnmadd_ps(y, divisor, x), inverse, y);
  const __mmask16 infinite = _mm512_fpclass_ps_mask(guess, 0x18);
  return _mm512_mask_mov_ps(y, infinite, guess);
}

// y = map(x)
template <typename T, typename Map>
inline void transform(T* y, const T* x, int64_t size, const Map& map) {
  visit(x, size, [&](int64_t i, __m512 value, __mmask16 lanes) {
    if (lanes == 0xffff)
      Vector<T>::store(y + i, map(value));
    else
      Vector<T>::store(y + i, map(value), lanes);
  });
}

// ---------------------------------------------------------------- rows over threads

struct Rows {
  int64_t count, channels;
  explicit Rows(const Tensor& x) : count(x.numel() / x.size(-1)), channels(x.size(-1)) {}
  template <typename Body>
  void run(const Body& body) const {
    at::parallel_for(0, count, std::max<int64_t>(1, GRAIN / channels), [&](int64_t i, int64_t end) {
      for (; i < end; i++) body(i);
    });
  }
};

template <typename Body>
auto with_element_type(const Tensor& x, const Body& body) {
  return x.scalar_type() == at::kFloat ? body(float()) : body(bf16());
}

std::tuple<Tensor, Tensor> count_fwd(const Tensor& x, double k, double least, double most) {
  const Rows rows(x);
  const Tensor count = allocate(x.sizes(), x.options());
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = 1;
  const Tensor threshold = allocate(shape, x.options().dtype(at::kFloat));
  float* thresholds = threshold.data_ptr<float>();
  with_element_type(x, [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(count.data_ptr());
    rows.run([&](int64_t row) {
      const int64_t at = row * rows.channels;
      const float mean = sum_sizes(from + at, rows.channels) / float(rows.channels) / float(k);
      // In this order NaN stays NaN.
      const float raised = mean < float(least) ? float(least) : mean;
      const float limit = raised > float(most) ? float(most) : raised;
      thresholds[row] = limit;
      const __m512 divisor = _mm512_set1_ps(limit), inverse = _mm512_set1_ps(1.0f / limit);
      transform(to + at, from + at, rows.channels, [&](__m512 value) {
        const __m512 ratio = divide(value, divisor, inverse);
        return _mm512_roundscale_ps(ratio, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      });
    });
  });
  return {count, threshold};
}

Tensor count_bwd(const Tensor& dcount, const Tensor& threshold) {
  const Rows rows(dcount);
  const Tensor dx = allocate(dcount.sizes(), dcount.options());
  const float* thresholds = threshold.const_data_ptr<float>();
  with_element_type(dcount, [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(dcount.const_data_ptr());
    T* to = static_cast<T*>(dx.data_ptr());
    rows.run([&](int64_t row) {
      const int64_t at = row * rows.channels;
      const __m512 inverse = _mm512_set1_ps(1.0f / thresholds[row]);
      transform(to + at, from + at, rows.channels, [&](__m512 value) {
        return _mm512_mul_ps(value, inverse);
      });
    });
  });
  return dx;
}

Tensor histogram(const Tensor& count, int64_t max_count) {
  const int64_t bins = max_count + 1;
  const Tensor out = at::zeros({bins}, count.options().dtype(at::kLong));
  int64_t* sums = out.data_ptr<int64_t>();
  const __m512 last = _mm512_set1_ps(float(max_count));
  std::mutex mutex;
  with_element_type(count, [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(count.const_data_ptr());
    at::parallel_for(0, count.numel(), GRAIN, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> tables(TABLES * bins);
      visit(from + begin, end - begin, [&](int64_t, __m512 y, __mmask16 lanes) {
        // The second operand of a maximum is taken where the first is NaN.
        const __m512 size = _mm512_max_ps(_mm512_abs_ps(y), _mm512_setzero_ps());
        alignas(64) int32_t bin[WIDTH];
        _mm512_store_si512(bin, _mm512_cvttps_epi32(_mm512_min_ps(size, last)));
        const int64_t number = __builtin_popcount(lanes);
        for (int64_t i = 0; i < number; i++) tables[i % TABLES * bins + bin[i]]++;
      });
      const std::lock_guard<std::mutex> lock(mutex);
      for (int64_t i = 0; i < TABLES * bins; i++) sums[i % bins] += tables[i];
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY(longaxon_spike, m) {
  m.def("count_fwd(Tensor x, float k, float least, float most) -> (Tensor, Tensor)", &count_fwd);
  m.def("count_bwd(Tensor dcount, Tensor threshold) -> Tensor", &count_bwd);
  m.def("histogram(Tensor count, int max_count) -> Tensor", &histogram);
}
