// Root-mean-square norm of bfloat16 rows on CPUs with AVX512-BF16, a row at a time in the cache.
//
// With s the input, r = 1 / rms and y = s r w:
//   ds = r (w dy - s r^2 mean(s w dy)),   dw = sum over rows of s r dy.
// The sums for dw are cut by rows alone, so that results do not depend on the number of threads.

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "amx.h"

namespace {

using Optional = const std::optional<Tensor>&;

constexpr int64_t LANES = 16, MULTIPLE = 2 * LANES;  // two vectors at a time
constexpr int64_t ROWS = 64, MAX_PARTS = 64;         // of a part, at least; of a gradient of weight

const bf16* read(const Tensor& x) { return static_cast<const bf16*>(x.const_data_ptr()); }
const bf16* read(Optional x) { return x ? read(*x) : nullptr; }
bf16* write(const Tensor& x) { return static_cast<bf16*>(x.data_ptr()); }

inline __m512 round_bf16(__m512 x) {
  const __m256i bits = (__m256i)_mm512_cvtneps_pbh(x);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Returns the sum of body(i) over the vectors of a row.
template <typename Body>
inline float sum_vectors(int64_t E, const Body& body) {
  __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
  for (int64_t i = 0; i < E; i += MULTIPLE) {
    even = _mm512_add_ps(even, body(i));
    odd = _mm512_add_ps(odd, body(i + LANES));
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
}

// Writes x + residual to `summed` where there is a residual, and returns out and 1 / rms [rows].
std::tuple<Tensor, Tensor> rms_norm_fwd(
    const Tensor& x, Optional residual, Optional summed, const Tensor& weight, double eps) {
  const int64_t E = x.size(-1), rows = x.numel() / E;
  TORCH_CHECK(E % MULTIPLE == 0, "give rows of a multiple of 32 channels");
  Tensor out = allocate(x.sizes(), x.options()), rstd = allocate({rows}, weight.options());
  const bf16 *p_x = read(x), *p_residual = read(residual);
  bf16 *p_out = write(out), *p_summed = summed ? write(*summed) : nullptr;
  const float* w = weight.const_data_ptr<float>();
  float* p_rstd = rstd.data_ptr<float>();
  at::parallel_for(0, rows, std::max<int64_t>(1, 8192 / E), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const bf16* s = p_x + row * E;
      const float total = sum_vectors(E, [&](int64_t i) {
        __m512 value = load_floats(p_x + row * E + i);
        if (p_residual) {
          value = round_bf16(_mm512_add_ps(value, load_floats(p_residual + row * E + i)));
          store_bf16(p_summed + row * E + i, value);
        }
        return _mm512_mul_ps(value, value);
      });
      if (p_residual) s = p_summed + row * E;
      p_rstd[row] = 1.0f / std::sqrt(total / E + float(eps));
      const __m512 factor = _mm512_set1_ps(p_rstd[row]);
      for (int64_t i = 0; i < E; i += LANES) {
        const __m512 value = _mm512_mul_ps(load_floats(s + i), factor);
        store_bf16(p_out + row * E + i, _mm512_mul_ps(value, _mm512_loadu_ps(w + i)));
      }
    }
  });
  return {out, rstd};
}

// The gradient of a row to `dx`; adds its part of the weight's to `dweight`.
inline void add_row(
    bf16* dx, float* dweight, const bf16* dout, const bf16* dsummed, const bf16* s, const float* w,
    float rstd, int64_t E) {
  const __m512 factor = _mm512_set1_ps(rstd);
  const float total = sum_vectors(E, [&](int64_t i) {
    const __m512 product = _mm512_mul_ps(load_floats(dout + i), load_floats(s + i));
    const __m512 before = _mm512_loadu_ps(dweight + i);
    _mm512_storeu_ps(dweight + i, _mm512_fmadd_ps(product, factor, before));
    return _mm512_mul_ps(product, _mm512_loadu_ps(w + i));
  });
  const __m512 mean = _mm512_set1_ps(total / E * rstd * rstd);
  for (int64_t i = 0; i < E; i += LANES) {
    const __m512 dy = _mm512_mul_ps(load_floats(dout + i), _mm512_loadu_ps(w + i));
    __m512 value = _mm512_mul_ps(_mm512_fnmadd_ps(load_floats(s + i), mean, dy), factor);
    if (dsummed) value = _mm512_add_ps(value, load_floats(dsummed + i));
    store_bf16(dx + i, value);
  }
}

// Returns the gradient of what was normalised, to which dsummed is added, and of the weight.
std::tuple<Tensor, Tensor> rms_norm_bwd(
    const Tensor& dout, Optional dsummed, const Tensor& summed, const Tensor& weight,
    const Tensor& rstd) {
  const int64_t E = summed.size(-1), rows = rstd.numel();
  const int64_t parts = std::clamp<int64_t>(rows / ROWS, 1, MAX_PARTS);
  Tensor dx = allocate(summed.sizes(), summed.options());
  Tensor partial = at::zeros({parts, E}, weight.options());
  const bf16 *p_dout = read(dout), *p_dsummed = read(dsummed), *p_summed = read(summed);
  const float *w = weight.const_data_ptr<float>(), *p_rstd = rstd.const_data_ptr<float>();
  bf16* p_dx = write(dx);
  float* p_partial = partial.data_ptr<float>();
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; part++)
      for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; row++) {
        const int64_t at = row * E;
        add_row(
            p_dx + at, p_partial + part * E, p_dout + at, p_dsummed ? p_dsummed + at : nullptr,
            p_summed + at, w, p_rstd[row], E);
      }
  });
  return {dx, partial.sum(0)};
}

}  // namespace

TORCH_LIBRARY(longaxon_rms_norm, m) {
  m.def(
      "fwd(Tensor x, Tensor? residual, Tensor(a!)? summed, Tensor weight, float eps) "
      "-> (Tensor, Tensor)",
      &rms_norm_fwd);
  m.def(
      "bwd(Tensor dout, Tensor? dsummed, Tensor summed, Tensor weight, Tensor rstd) "
      "-> (Tensor, Tensor)",
      &rms_norm_bwd);
}
