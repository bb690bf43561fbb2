// Rotary embedding of bfloat16 heads on CPUs with AVX512-BF16: one pass over memory.

#include <torch/library.h>

#include "amx.h"

namespace {

constexpr int64_t LANES = 16, TASK = 4096;  // elements

// Turns x [B, T, H, D] by the angles of its tokens, backwards where direction is -1.
Tensor turn(const Tensor& x, const Tensor& cos, const Tensor& sin, double direction) {
  const int64_t T = x.size(1), H = x.size(2), D = x.size(3), half = D / 2;
  TORCH_CHECK(half % LANES == 0, "give heads of a multiple of 32 channels");
  Tensor out = allocate(x.sizes(), x.options());
  const auto* p_x = static_cast<const bf16*>(x.const_data_ptr());
  auto* p_out = static_cast<bf16*>(out.data_ptr());
  const float *p_cos = cos.const_data_ptr<float>(), *p_sin = sin.const_data_ptr<float>();
  const __m512 sign = _mm512_set1_ps(float(direction));
  const int64_t grain = std::max<int64_t>(1, TASK / (H * D));
  at::parallel_for(0, x.size(0) * T, grain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; token++)
      for (int64_t head = 0; head < H; head++)
        for (int64_t i = 0; i < half; i += LANES) {
          const int64_t angle = token % T * half + i, at = (token * H + head) * D + i;
          const __m512 c = _mm512_loadu_ps(p_cos + angle);
          const __m512 s = _mm512_mul_ps(_mm512_loadu_ps(p_sin + angle), sign);
          const __m512 a = load_floats(p_x + at), b = load_floats(p_x + at + half);
          store_bf16(p_out + at, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
          store_bf16(p_out + at + half, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
        }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY(longaxon_rotary, m) {
  m.def("turn(Tensor x, Tensor cos, Tensor sin, float direction) -> Tensor", &turn);
}
