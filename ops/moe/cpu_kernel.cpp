// Products of groups of rows with a matrix each, of bfloat16 tensors on CPUs with AMX.
//
// With m the rows of a group, f the columns of the result and e those of x,
//   out[m, f] = x[m, e] w[f, e]     dx[m, e] = dout[m, f] w[f, e]     dw[f, e] = dout[m, f] x[m, e]
// summed over the index that is missing on the left. A task is a block of one group's result, so
// that threads share out groups of any size. The forward pass makes the transpose of its block:
// the matrix, most of what is read where rows are few, is then taken by the tiles as it lies.
//
// Results do not depend on the number of threads.

#include <torch/library.h>

#include <vector>

#include "amx.h"

namespace {

// A task is a block of a result, BLOCK on one side and WIDE on the other: its sums and the pieces of
// its factors fit a cache of the second level.
constexpr int64_t BLOCK = 256, WIDE = 512;
constexpr int64_t BYTES = BLOCK * BLOCK * 2 + BLOCK * WIDE * (2 + 4);
constexpr int64_t SQUARE = SIDE * SIDE;
constexpr int64_t AHEAD = 16;  // rows by which memory is asked for before it is needed

struct Task {
  int64_t group, begin, count;  // rows of x
  int64_t f, e;                 // where the block begins in the matrix
};

// The left side of a product, in squares `step` apart along the sum and `next` apart across it.
struct Left {
  const bf16* data;
  int64_t stride, step, next;
};

const bf16* data_of(const Tensor& x) { return static_cast<const bf16*>(x.const_data_ptr()); }

// ---------------------------------------------------------------- layouts

inline __m512i load_row(const bf16* rows, int64_t stride, int64_t i, int64_t count) {
  return i < count ? _mm512_loadu_si512(rows + i * stride) : _mm512_setzero_si512();
}

// Squares beside each other, of `count` strided rows, zero beyond them.
void copy_squares(bf16* squares, const bf16* rows, int64_t stride, int64_t count, int64_t D) {
  for (int64_t i = 0; i < SIDE; i++)
    for (int64_t d = 0; d < D; d += SIDE)
      _mm512_store_si512(squares + (d + i) * SIDE, load_row(rows + d, stride, i, count));
}

// The paired transpose [D / 2, 32, 2] of `count` strided rows, zero beyond them.
void pair_transpose(bf16* paired, const bf16* rows, int64_t stride, int64_t count, int64_t D) {
  for (int64_t i = 0; i < SIDE; i += 16)
    for (int64_t d = 0; d < D; d += SIDE) {
      __m512i x[16];
      for (int64_t r = 0; r < 16; r++) x[r] = load_row(rows + d, stride, i + r, count);
      transpose_16(x);
      for (int64_t r = 0; r < 16; r++)
        _mm512_store_si512(paired + (d + 2 * r) * SIDE + 2 * i, x[r]);
    }
}

// 32 columns of two rows in pairs: in `low` those where column / 4 is even, the others in `high`.
struct Pairs {
  __m512i low, high;
  Pairs(__m512i first, __m512i second)
      : low(_mm512_unpacklo_epi16(first, second)), high(_mm512_unpackhi_epi16(first, second)) {}
};

// The column that element i of `low` is of.
constexpr int64_t find_column(int64_t i) { return i / 4 * 8 + i % 4; }

// Panels beside each other, each the paired [total / 2, 32, 2] of 32 columns of `count` strided
// rows, zero beyond them. Columns are in the order of `Pairs`, which `store_square` undoes.
void pair_panels(
    bf16* panels, const bf16* rows, int64_t stride, int64_t count, int64_t total, int64_t D) {
  for (int64_t i = 0; i < total; i += 2)
    for (int64_t d = 0; d < D; d += SIDE) {
      const bf16* first = rows + i * stride + d;
      _mm_prefetch(first + AHEAD * stride, _MM_HINT_T0);
      _mm_prefetch(first + (AHEAD + 1) * stride, _MM_HINT_T0);
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
  for (int64_t i = 0; i < std::min(SIDE, count); i++)
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

// ---------------------------------------------------------------- products

// Blocks of each group's rows, at least one, times blocks of its matrix.
std::vector<Task> split(
    const Tensor& counts, int64_t m_step, int64_t F, int64_t f_step, int64_t E, int64_t e_step) {
  std::vector<Task> tasks;
  const int64_t* count = counts.const_data_ptr<int64_t>();
  for (int64_t group = 0, begin = 0; group < counts.numel(); begin += count[group++])
    for (int64_t m = 0; m < count[group] || m == 0; m += m_step)
      for (int64_t f = 0; f < F; f += f_step)
        for (int64_t e = 0; e < E; e += e_step)
          tasks.push_back({group, begin + m, std::min(m_step, count[group] - m), f, e});
  return tasks;
}

// The block [rows, columns] of a task, summed over `depth` in pieces: load(a, b, k, n) returns the
// left side and makes panels b of the right side, from k to k + n; store(i, j, square).
template <typename Load, typename Store>
void multiply(
    Arena arena, int64_t rows, int64_t columns, int64_t depth, int64_t piece, const Load& load,
    const Store& store) {
  bf16 *a = arena.take<bf16>(BLOCK * BLOCK), *b = arena.take<bf16>(BLOCK * WIDE);
  float* c = arena.take<float>(BLOCK * WIDE);
  for (int64_t k = 0; k < depth || k == 0; k += piece) {
    const int64_t n = std::min(piece, depth - k);
    const Left left = load(a, b, k, n);
    for (int64_t i = 0; i < rows; i += SIDE)
      for (int64_t j = 0; j < columns; j += SIDE) {
        // A sum of one piece needs no place to wait in.
        float* square = depth > piece ? c + i * columns + j * SIDE : c;
        multiply_square(
            square, SIDE, left.data + i / SIDE * left.next, left.stride, left.step,
            b + j * round_up(n), SIDE, round_up(n), k > 0);
        if (k + piece >= depth) store(i, j, square);
      }
  }
}

Tensor grouped_matmul_fwd(const Tensor& x, const Tensor& weight, const Tensor& counts) {
  const int64_t F = weight.size(1), E = weight.size(2);
  const Tensor out = allocate({x.size(0), F}, x.options());
  bf16* to = static_cast<bf16*>(out.data_ptr());
  const auto tasks = split(counts, BLOCK, F, WIDE, 1, 1);
  run_tasks(tasks.size(), BYTES, [&](int64_t index, Arena arena) {
    const Task t = tasks[index];
    const bf16 *from = data_of(x) + t.begin * E, *w = data_of(weight) + (t.group * F + t.f) * E;
    const auto load = [&](bf16*, bf16* b, int64_t k, int64_t n) {
      for (int64_t m = 0; m < t.count; m += SIDE)
        pair_transpose(b + m * n, from + m * E + k, E, t.count - m, n);
      return Left{w + k, E, SIDE, SIDE * E};
    };
    const auto store = [&](int64_t f, int64_t m, const float* square) {
      store_transposed(to + (t.begin + m) * F + t.f + f, F, square, t.count - m);
    };
    multiply(arena, std::min(WIDE, F - t.f), round_up(t.count), E, WIDE, load, store);
  });
  return out;
}

Tensor grouped_matmul_dx(const Tensor& dout, const Tensor& weight, const Tensor& counts) {
  const int64_t F = weight.size(1), E = weight.size(2);
  const Tensor dx = allocate({dout.size(0), E}, dout.options());
  bf16* to = static_cast<bf16*>(dx.data_ptr());
  const auto tasks = split(counts, BLOCK, 1, 1, E, WIDE);
  run_tasks(tasks.size(), BYTES, [&](int64_t index, Arena arena) {
    const Task t = tasks[index];
    const bf16 *from = data_of(dout) + t.begin * F, *w = data_of(weight) + t.group * F * E + t.e;
    const int64_t columns = std::min(WIDE, E - t.e);
    const auto load = [&](bf16* a, bf16* b, int64_t k, int64_t n) {
      for (int64_t m = 0; m < t.count; m += SIDE)
        copy_squares(a + m * n, from + m * F + k, F, t.count - m, n);
      pair_panels(b, w + k * E, E, n, n, columns);
      return Left{a, SIDE, SQUARE, SIDE * n};
    };
    const auto store = [&](int64_t m, int64_t e, const float* square) {
      store_square(to + (t.begin + m) * E + t.e + e, E, square, t.count - m);
    };
    multiply(arena, round_up(t.count), columns, F, BLOCK, load, store);
  });
  return dx;
}

Tensor grouped_matmul_dweight(const Tensor& dout, const Tensor& x, const Tensor& counts) {
  const int64_t F = dout.size(1), E = x.size(1);
  const Tensor dweight = allocate({counts.numel(), F, E}, x.options());
  bf16* to = static_cast<bf16*>(dweight.data_ptr());
  const auto tasks = split(counts, x.size(0) + 1, F, BLOCK, E, WIDE);
  run_tasks(tasks.size(), BYTES, [&](int64_t index, Arena arena) {
    const Task t = tasks[index];
    const int64_t rows = std::min(BLOCK, F - t.f), columns = std::min(WIDE, E - t.e);
    const auto load = [&](bf16* a, bf16* b, int64_t k, int64_t n) {
      const int64_t begin = t.begin + k, total = round_up(n);
      for (int64_t f = 0; f < rows; f += SIDE)
        transpose_panel(a + f * total, data_of(dout) + begin * F + t.f + f, F, n, total);
      pair_panels(b, data_of(x) + begin * E + t.e, E, n, total, columns);
      return Left{a, SIDE, SQUARE, SIDE * total};
    };
    const auto store = [&](int64_t f, int64_t e, const float* square) {
      store_square(to + (t.group * F + t.f + f) * E + t.e + e, E, square, SIDE);
    };
    multiply(arena, rows, columns, t.count, BLOCK, load, store);
  });
  return dweight;
}

}  // namespace

TORCH_LIBRARY(longaxon_moe, m) {
  m.def("fwd(Tensor x, Tensor weight, Tensor counts) -> Tensor", &grouped_matmul_fwd);
  m.def("dx(Tensor dout, Tensor weight, Tensor counts) -> Tensor", &grouped_matmul_dx);
  m.def("dweight(Tensor dout, Tensor x, Tensor counts) -> Tensor", &grouped_matmul_dweight);
}
