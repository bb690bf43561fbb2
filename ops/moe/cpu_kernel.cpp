// Products of groups of rows with a matrix each, of bfloat16 tensors on CPUs with AMX.
//
// With m the rows of a group, f the columns of the result and e those of x,
//   out[m, f] = x[m, e] w[f, e]     dx[m, e] = dout[m, f] w[f, e]     dw[f, e] = dout[m, f] x[m, e]
// summed over the index that is missing on the left. A task is a block of one group's result, so
// that threads share out groups of any size. The forward pass makes the transpose of its block:
// the matrix, most of what is read where rows are few, is then taken by the tiles as it lies.
//
// Results do not depend on the number of threads.

#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <vector>

#include "amx.h"

namespace {

constexpr int64_t BLOCK = 256, COLUMNS = 512;
constexpr int64_t SQUARE = SIDE * SIDE;
constexpr int64_t AHEAD = 16;

// A block of the result of one group: `count` of the group's rows from `begin`, in the matrix'
// dimensions from `row` and `column`.
struct Task {
  int64_t group, begin, count, row, column;
};

const bf16* data_of(const Tensor& x) { return static_cast<const bf16*>(x.const_data_ptr()); }

// ---------------------------------------------------------------- layouts

// Squares beside each other, of `count` strided rows, zero beyond them.
void copy_squares(bf16* squares, const bf16* rows, int64_t stride, int64_t count, int64_t D) {
  for (int64_t d = 0; d < D; d += SIDE, squares += SQUARE)
    for (int64_t i = 0; i < SIDE; i++) {
      const __m512i x =
          i < count ? _mm512_loadu_si512(rows + i * stride + d) : _mm512_setzero_si512();
      _mm512_store_si512(squares + i * SIDE, x);
    }
}

// 32 columns of two rows, in pairs: in `low` those of which (column / 4) is even, in `high` the others.
struct Pairs {
  __m512i low, high;
  Pairs(__m512i first, __m512i second)
      : low(_mm512_unpacklo_epi16(first, second)), high(_mm512_unpackhi_epi16(first, second)) {}
};

// The column that element i of `low` is of.
constexpr int64_t find_column(int64_t i) { return i / 4 * 8 + i % 4; }

inline __m512i load_row(const bf16* rows, int64_t stride, int64_t i, int64_t count) {
  return i < count ? _mm512_loadu_si512(rows + i * stride) : _mm512_setzero_si512();
}

// Panels beside each other, each the paired [total / 2, 32, 2] of 32 columns of `count` strided
// rows, zero beyond them. Columns are in the order of `Pairs`, which `store_square` undoes.
void pair_panels(
    bf16* panels, const bf16* rows, int64_t stride, int64_t count, int64_t total, int64_t D) {
  for (int64_t i = 0; i < total; i += 2)
    for (int64_t d = 0; d < D; d += SIDE) {
      _mm_prefetch(rows + (i + AHEAD) * stride + d, _MM_HINT_T0);
      _mm_prefetch(rows + (i + AHEAD + 1) * stride + d, _MM_HINT_T0);
      const Pairs pairs(
          load_row(rows + d, stride, i, count), load_row(rows + d, stride, i + 1, count));
      bf16* paired = panels + d * total + i * SIDE;
      _mm512_store_si512(paired, pairs.low);
      _mm512_store_si512(paired + SIDE, pairs.high);
    }
}

// The transpose, in squares beside each other, of 32 columns of `count` strided rows, zero beyond.
void transpose_panel(
    bf16* squares, const bf16* rows, int64_t stride, int64_t count, int64_t total) {
  for (int64_t i = 0; i < total; i += SIDE, squares += SQUARE) {
    __m512i low[16], high[16];
    for (int64_t r = 0; r < 16; r++) {
      const Pairs pairs(
          load_row(rows, stride, i + 2 * r, count), load_row(rows, stride, i + 2 * r + 1, count));
      low[r] = pairs.low;
      high[r] = pairs.high;
    }
    transpose_16(low);
    transpose_16(high);
    for (int64_t r = 0; r < 16; r++) {
      _mm512_store_si512(squares + find_column(r) * SIDE, low[r]);
      _mm512_store_si512(squares + (find_column(r) + 4) * SIDE, high[r]);
    }
  }
}

inline __m512i round_row(const float* row) {
  return to_bf16(_mm512_load_ps(row), _mm512_load_ps(row + 16));
}

void store_square(bf16* out, int64_t stride, const float* square, int64_t count) {
  const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
  for (int64_t i = 0; i < count; i++)
    _mm512_storeu_si512(
        out + i * stride, _mm512_permutexvar_epi64(order, round_row(square + i * SIDE)));
}

// Columns of a square become `count` rows.
void store_transposed(bf16* out, int64_t stride, const float* square, int64_t count) {
  __m512i low[16], high[16];
  for (int64_t r = 0; r < 16; r++) {
    const float* pair = square + 2 * r * SIDE;
    const Pairs pairs(round_row(pair), round_row(pair + SIDE));
    low[r] = pairs.low;
    high[r] = pairs.high;
  }
  transpose_16(low);
  transpose_16(high);
  for (int64_t r = 0; r < 16; r++) {
    const int64_t column = find_column(r);
    if (column < count) _mm512_storeu_si512(out + column * stride, low[r]);
    if (column + 4 < count) _mm512_storeu_si512(out + (column + 4) * stride, high[r]);
  }
}

// ---------------------------------------------------------------- tasks

std::vector<Task> split(
    const Tensor& counts, bool splits_rows, int64_t rows, int64_t columns, int64_t row_block,
    int64_t column_block) {
  std::vector<Task> tasks;
  const int64_t* count = counts.const_data_ptr<int64_t>();
  for (int64_t group = 0, begin = 0; group < counts.numel(); begin += count[group++]) {
    const int64_t step = splits_rows ? BLOCK : std::max<int64_t>(count[group], 1);
    const int64_t stop = splits_rows ? count[group] : step;
    for (int64_t i = 0; i < stop; i += step)
      for (int64_t row = 0; row < rows; row += row_block)
        for (int64_t column = 0; column < columns; column += column_block)
          tasks.push_back({group, begin + i, std::min(step, count[group] - i), row, column});
  }
  return tasks;
}

Tensor grouped_matmul_fwd(const Tensor& x, const Tensor& weight, const Tensor& counts) {
  const int64_t F = weight.size(1), E = weight.size(2);
  Tensor out = allocate({x.size(0), F}, x.options());
  bf16* o = static_cast<bf16*>(out.data_ptr());
  const auto tasks = split(counts, true, F, 1, 2 * BLOCK, 1);
  const int64_t bytes = BLOCK * E * 2 + BLOCK * SIDE * 4 + SIDE * E * 2;
  run_tasks(tasks.size(), bytes, [&](int64_t i, Arena arena) {
    const Task& t = tasks[i];
    const bf16 *rows = data_of(x) + t.begin * E, *w = data_of(weight) + t.group * F * E;
    bf16 *panels = arena.take<bf16>(BLOCK * E), *padded = arena.take<bf16>(SIDE * E);
    float* squares = arena.take<float>(BLOCK * SIDE);
    const int64_t whole = round_down(t.count), total = round_up(t.count);
    for (int64_t m = 0; m < whole; m += SIDE) pair_columns(panels + m * E, rows + m * E, SIDE, E);
    if (whole < total) {
      copy_rows(padded, rows + whole * E, E, t.count - whole, SIDE, E);
      pair_columns(panels + whole * E, padded, SIDE, E);
    }
    for (int64_t f = t.row; f < std::min(F, t.row + 2 * BLOCK); f += SIDE) {
      for (int64_t e = 0; e < E; e += BLOCK)
        for (int64_t m = 0; m < total; m += SIDE)
          multiply_square(
              squares + m * SIDE, SIDE, w + f * E + e, E, SIDE, panels + m * E + e * SIDE, SIDE,
              std::min(BLOCK, E - e), e > 0);
      for (int64_t m = 0; m < total; m += SIDE)
        store_transposed(
            o + (t.begin + m) * F + f, F, squares + m * SIDE, std::min(SIDE, t.count - m));
    }
  });
  return out;
}

// c [rows, columns] (+)= squares a times panels b.
void multiply(
    float* c, const bf16* a, const bf16* b, int64_t rows, int64_t columns, int64_t depth,
    bool adds) {
  for (int64_t i = 0; i < rows; i += SIDE)
    for (int64_t j = 0; j < columns; j += SIDE)
      multiply_square(
          c + i * columns + j * SIDE, SIDE, a + i * depth, SIDE, SQUARE, b + j * depth, SIDE,
          depth, adds);
}

Tensor grouped_matmul_dx(const Tensor& dout, const Tensor& weight, const Tensor& counts) {
  const int64_t F = weight.size(1), E = weight.size(2);
  Tensor dx = allocate({dout.size(0), E}, dout.options());
  bf16* out = static_cast<bf16*>(dx.data_ptr());
  const auto tasks = split(counts, true, 1, E, 1, COLUMNS);
  run_tasks(tasks.size(), BLOCK * BLOCK * 2 + BLOCK * COLUMNS * 6, [&](int64_t i, Arena arena) {
    const Task& t = tasks[i];
    bf16 *a = arena.take<bf16>(BLOCK * BLOCK), *b = arena.take<bf16>(BLOCK * COLUMNS);
    float* c = arena.take<float>(BLOCK * COLUMNS);
    const int64_t columns = std::min(COLUMNS, E - t.column), total = round_up(t.count);
    for (int64_t f = 0; f < F; f += BLOCK) {
      const int64_t depth = std::min(BLOCK, F - f);
      for (int64_t m = 0; m < total; m += SIDE)
        copy_squares(
            a + m * depth, data_of(dout) + (t.begin + m) * F + f, F, t.count - m, depth);
      const bf16* w = data_of(weight) + (t.group * F + f) * E + t.column;
      pair_panels(b, w, E, depth, depth, columns);
      multiply(c, a, b, total, columns, depth, f > 0);
    }
    for (int64_t m = 0; m < total; m += SIDE)
      for (int64_t e = 0; e < columns; e += SIDE)
        store_square(
            out + (t.begin + m) * E + t.column + e, E, c + m * columns + e * SIDE,
            std::min(SIDE, t.count - m));
  });
  return dx;
}

Tensor grouped_matmul_dweight(const Tensor& dout, const Tensor& x, const Tensor& counts) {
  const int64_t F = dout.size(1), E = x.size(1);
  Tensor dweight = allocate({counts.numel(), F, E}, x.options());
  bf16* out = static_cast<bf16*>(dweight.data_ptr());
  const auto tasks = split(counts, false, F, E, BLOCK, COLUMNS);
  run_tasks(tasks.size(), BLOCK * BLOCK * 2 + BLOCK * COLUMNS * 6, [&](int64_t i, Arena arena) {
    const Task& t = tasks[i];
    bf16 *a = arena.take<bf16>(BLOCK * BLOCK), *b = arena.take<bf16>(BLOCK * COLUMNS);
    float* c = arena.take<float>(BLOCK * COLUMNS);
    const int64_t rows = std::min(BLOCK, F - t.row), columns = std::min(COLUMNS, E - t.column);
    for (int64_t m = 0; m < t.count || m == 0; m += BLOCK) {
      const int64_t count = std::min(BLOCK, t.count - m), depth = std::max(SIDE, round_up(count));
      const bf16* d = data_of(dout) + (t.begin + m) * F + t.row;
      for (int64_t f = 0; f < rows; f += SIDE)
        transpose_panel(a + f * depth, d + f, F, count, depth);
      const bf16* r = data_of(x) + (t.begin + m) * E + t.column;
      pair_panels(b, r, E, count, depth, columns);
      multiply(c, a, b, rows, columns, depth, m > 0);
    }
    for (int64_t f = 0; f < rows; f += SIDE)
      for (int64_t e = 0; e < columns; e += SIDE)
        store_square(
            out + (t.group * F + t.row + f) * E + t.column + e, E, c + f * columns + e * SIDE,
            SIDE);
  });
  return dweight;
}

using at::native::TransposeType;
using at::native::cpublas::gemm;
const float* floats_of(const Tensor& x) { return x.const_data_ptr<float>(); }

Tensor float_fwd(const Tensor& x, const Tensor& weight, const Tensor& counts) {
  const int64_t F = weight.size(1), E = weight.size(2);
  Tensor out = allocate({x.size(0), F}, x.options());
  float* o = out.data_ptr<float>();
  const auto tasks = split(counts, true, F, 1, COLUMNS, 1);
  run_tasks(tasks.size(), [&](int64_t i) {
    const Task& t = tasks[i];
    gemm(TransposeType::Transpose, TransposeType::NoTranspose, std::min(COLUMNS, F - t.row), t.count, E, 1.0f,
         floats_of(weight) + (t.group * F + t.row) * E, E, floats_of(x) + t.begin * E, E, 0.0f,
         o + t.begin * F + t.row, F);
  });
  return out;
}
Tensor float_dx(const Tensor& dout, const Tensor& weight, const Tensor& counts) {
  const int64_t F = weight.size(1), E = weight.size(2);
  Tensor out = allocate({dout.size(0), E}, dout.options());
  float* o = out.data_ptr<float>();
  const auto tasks = split(counts, true, 1, E, 1, COLUMNS);
  run_tasks(tasks.size(), [&](int64_t i) {
    const Task& t = tasks[i];
    gemm(TransposeType::NoTranspose, TransposeType::NoTranspose, std::min(COLUMNS, E - t.column), t.count, F, 1.0f,
         floats_of(weight) + t.group * F * E + t.column, E, floats_of(dout) + t.begin * F, F, 0.0f,
         o + t.begin * E + t.column, E);
  });
  return out;
}
Tensor float_dweight(const Tensor& dout, const Tensor& x, const Tensor& counts) {
  const int64_t F = dout.size(1), E = x.size(1);
  Tensor dweight = allocate({counts.numel(), F, E}, x.options());
  float* o = dweight.data_ptr<float>();
  const auto tasks = split(counts, false, F, E, BLOCK, COLUMNS);
  run_tasks(tasks.size(), [&](int64_t i) {
    const Task& t = tasks[i];
    gemm(TransposeType::NoTranspose, TransposeType::Transpose, std::min(COLUMNS, E - t.column), std::min(BLOCK, F - t.row), t.count, 1.0f,
         floats_of(x) + t.begin * E + t.column, E, floats_of(dout) + t.begin * F + t.row, F, 0.0f,
         o + (t.group * F + t.row) * E + t.column, E);
  });
  return dweight;
}

}  // namespace

TORCH_LIBRARY(longaxon_moe, m) {
  m.def("ffwd(Tensor x, Tensor weight, Tensor counts) -> Tensor", &float_fwd);
  m.def("fdx(Tensor dout, Tensor weight, Tensor counts) -> Tensor", &float_dx);
  m.def("fdweight(Tensor dout, Tensor x, Tensor counts) -> Tensor", &float_dweight);
  m.def("fwd(Tensor x, Tensor weight, Tensor counts) -> Tensor", &grouped_matmul_fwd);
  m.def("dx(Tensor dout, Tensor weight, Tensor counts) -> Tensor", &grouped_matmul_dx);
  m.def("dweight(Tensor dout, Tensor x, Tensor counts) -> Tensor", &grouped_matmul_dweight);
}
