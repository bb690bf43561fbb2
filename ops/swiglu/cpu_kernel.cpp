// The gated unit of bfloat16 tensors on CPUs with AVX512-BF16: one pass over memory each way.
//
// With s = sigmoid(g):   out = g s u,   dg = dy u s (1 + g (1 - s)),   du = dy g s.

#include <torch/library.h>

#include <tuple>

#include "amx.h"

namespace {

constexpr int64_t LANES = 16, TASK = 4096;  // elements, a multiple of the lanes

inline __m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 e = exp2_of(_mm512_mul_ps(x, _mm512_set1_ps(-LOG2_E)));
  return _mm512_div_ps(one, _mm512_add_ps(one, e));
}

const bf16* data_of(const Tensor& x) { return static_cast<const bf16*>(x.const_data_ptr()); }

// Calls body(i) for each vector of a tensor.
template <typename Body>
void for_vectors(const Tensor& x, const Body& body) {
  TORCH_CHECK(x.numel() % LANES == 0, "give a multiple of 16 elements");
  at::parallel_for(0, x.numel() / LANES, TASK / LANES, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * LANES; i < end * LANES; i += LANES) body(i);
  });
}

Tensor swiglu_fwd(const Tensor& gate, const Tensor& up) {
  Tensor out = allocate(gate.sizes(), gate.options());
  const bf16 *g = data_of(gate), *u = data_of(up);
  bf16* o = static_cast<bf16*>(out.data_ptr());
  for_vectors(gate, [&](int64_t i) {
    const __m512 x = load_floats(g + i);
    store_bf16(o + i, _mm512_mul_ps(_mm512_mul_ps(x, sigmoid(x)), load_floats(u + i)));
  });
  return out;
}

std::tuple<Tensor, Tensor> swiglu_bwd(const Tensor& dout, const Tensor& gate, const Tensor& up) {
  Tensor dgate = allocate(gate.sizes(), gate.options()), dup = allocate(up.sizes(), up.options());
  const bf16 *d = data_of(dout), *g = data_of(gate), *u = data_of(up);
  auto *dg = static_cast<bf16*>(dgate.data_ptr()), *du = static_cast<bf16*>(dup.data_ptr());
  for_vectors(gate, [&](int64_t i) {
    const __m512 x = load_floats(g + i), s = sigmoid(x);
    const __m512 dy_s = _mm512_mul_ps(load_floats(d + i), s), x_s = _mm512_mul_ps(x, s);
    const __m512 slope = _mm512_sub_ps(_mm512_add_ps(_mm512_set1_ps(1.0f), x), x_s);
    store_bf16(dg + i, _mm512_mul_ps(_mm512_mul_ps(dy_s, load_floats(u + i)), slope));
    store_bf16(du + i, _mm512_mul_ps(dy_s, x));
  });
  return {dgate, dup};
}

}  // namespace

TORCH_LIBRARY(longaxon_swiglu, m) {
  m.def("fwd(Tensor gate, Tensor up) -> Tensor", &swiglu_fwd);
  m.def("bwd(Tensor dout, Tensor gate, Tensor up) -> (Tensor, Tensor)", &swiglu_bwd);
}
