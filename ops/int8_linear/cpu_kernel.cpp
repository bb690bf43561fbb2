// Products of integer activations with INT8 weights on CPUs with AMX: out[r, o] =
// threshold[r] * sum over groups g of scale[o, g] * (count[r, g] . weight[o, g]), inner sums exact.
//
// Counts are split into digits of 8 bits. The digits of 16 rows make a panel per digit, which lies
// as tiles take the right side of a product; weights are taken as they lie, read once for two
// panels. A task is 32 rows of the weight: where there is one token, all it does is read them.
// Results do not depend on the number of threads.

#include <c10/util/Exception.h>
#include <torch/library.h>

#include <vector>

#include "amx.h"

namespace {

constexpr int64_t TILE = 16;          // rows of a tile
constexpr int64_t DEPTH = 64;         // inputs of a tile, a byte each
constexpr int64_t BYTES = TILE * DEPTH;
constexpr int64_t MOST_DIGITS = 3;
constexpr float LIMIT = 1 << 22;      // counts are below it in size
constexpr int64_t FACTOR_BITS = 8;

using Sums = int32_t[TILE][TILE];  // [outputs, rows]

int64_t pad(int64_t size) { return (size + DEPTH - 1) / DEPTH * DEPTH; }

// ---------------------------------------------------------------- counts

inline __m512 load_counts(const float* x, __mmask16 lanes) {
  return _mm512_maskz_loadu_ps(lanes, x);
}

inline __m512 load_counts(const bf16* x, __mmask16 lanes) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

inline __mmask16 lanes_of(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1;
}

// The digits that rows of counts need, 0 where they are too large or no numbers.
template <typename T>
int64_t count_digits(const T* counts, int64_t rows, int64_t size) {
  __m512 largest = _mm512_setzero_ps();
  __mmask16 fit = 0xffff;
  for (const T* row = counts; row < counts + rows * size; row += size)
    for (int64_t i = 0; i < size; i += 16) {
      const __m512 x = _mm512_abs_ps(load_counts(row + i, lanes_of(size - i)));
      fit &= _mm512_cmp_ps_mask(x, _mm512_set1_ps(LIMIT), _CMP_LT_OQ);  // NaN does not
      largest = _mm512_max_ps(largest, x);
    }
  if (fit != 0xffff) return 0;
  const float most = _mm512_reduce_max_ps(largest);
  // With a carry from below, 127 * 256 + 127 is the most of two digits.
  return most <= 127 ? 1 : most <= 32639 ? 2 : 3;
}

// Panels of up to 16 rows of counts, one per digit: [size / 64, 16, 16, 4], four inputs in a row.
template <typename T>
void make_panels(
    int8_t* panels, const T* counts, int64_t rows, int64_t size, int64_t digits) {
  const int64_t stride = pad(size) * TILE;
  for (int64_t i = 0; i < size; i += DEPTH, panels += BYTES) {
    __m512i lines[MOST_DIGITS][TILE];
    for (int64_t r = 0; r < TILE; r++) {
      alignas(64) int8_t bytes[MOST_DIGITS][DEPTH] = {};
      for (int64_t j = 0; r < rows && j < DEPTH; j += 16) {
        const __mmask16 lanes = lanes_of(size - i - j);
        if (!lanes) break;
        __m512i rest = _mm512_cvtps_epi32(load_counts(counts + r * size + i + j, lanes));
        for (int64_t d = 0; d < digits; d++) {
          // Its lowest byte, read as a signed digit, is taken off.
          const __m128i digit = _mm512_cvtepi32_epi8(rest);
          _mm_store_si128(reinterpret_cast<__m128i*>(bytes[d] + j), digit);
          rest = _mm512_sub_epi32(rest, _mm512_cvtepi8_epi32(digit));
          rest = _mm512_srai_epi32(rest, FACTOR_BITS);
        }
      }
      for (int64_t d = 0; d < digits; d++) lines[d][r] = _mm512_load_si512(bytes[d]);
    }
    for (int64_t d = 0; d < digits; d++) {
      transpose_16(lines[d]);
      for (int64_t r = 0; r < TILE; r++)
        _mm512_storeu_si512(panels + d * stride + r * DEPTH, lines[d][r]);
    }
  }
}

// ---------------------------------------------------------------- products

// The weights of a task: 32 rows, as they lie, but for what sticks out of the matrix.
struct Weights {
  const int8_t* data;
  int64_t rows, size;
};

// 16 x 64 weights as a tile is to load them.
struct Tile {
  const int8_t* data;
  int64_t stride;
};

// Returns those from `row` and input `i` on; what is beyond the matrix is 0, in a copy on `edge`.
inline Tile find_weights(const Weights& w, int64_t row, int64_t i, int8_t* edge) {
  if (row + TILE <= w.rows && i + DEPTH <= w.size) return {w.data + row * w.size + i, w.size};
  const int64_t bytes = std::min(DEPTH, w.size - i);
  std::fill_n(edge, BYTES, 0);
  for (int64_t r = 0; r < std::min(TILE, w.rows - row); r++)
    std::copy_n(w.data + (row + r) * w.size + i, bytes, edge + r * DEPTH);
  asm volatile("" ::: "memory");  // the compiler does not know that tiles read it
  return {edge, DEPTH};
}

// Sums over inputs from `begin` to `end` of 32 rows of weights and two panels, or one twice.
inline void multiply(
    Sums sums[2][2], const Weights& w, const int8_t* first, const int8_t* second, int64_t begin,
    int64_t end) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  alignas(64) int8_t edge[BYTES];
  const bool is_wide = w.rows > TILE, is_pair = first != second;
  for (int64_t i = begin; i < end; i += DEPTH) {
    const Tile upper = find_weights(w, 0, i, edge);
    _tile_loadd(4, upper.data, upper.stride);
    _tile_loadd(6, first + i * TILE, DEPTH);
    _tile_dpbssd(0, 4, 6);
    if (is_wide) {
      const Tile lower = find_weights(w, TILE, i, edge);
      _tile_loadd(5, lower.data, lower.stride);
      _tile_dpbssd(1, 5, 6);
    }
    if (is_pair) {
      _tile_loadd(7, second + i * TILE, DEPTH);
      _tile_dpbssd(2, 4, 7);
      if (is_wide) _tile_dpbssd(3, 5, 7);
    }
  }
  _tile_stored(0, sums[0][0], DEPTH);
  _tile_stored(1, sums[0][1], DEPTH);
  _tile_stored(2, sums[1][0], DEPTH);
  _tile_stored(3, sums[1][1], DEPTH);
}

// The sums of 16 rows with one output, digits put together and rounded once.
inline __m512 join(const Sums* digits, int64_t stride, int64_t count, int64_t out) {
  const auto load = [&](int64_t d) { return _mm512_load_si512(digits[d * stride][out]); };
  if (count == 1) return _mm512_cvtepi32_ps(load(0));
  __m512i low = _mm512_setzero_si512(), high = low;
  for (int64_t d = 0; d < count; d++) {
    const __m512i x = load(d);
    const __m512i first = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(x));
    const __m512i second = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(x, 1));
    low = _mm512_add_epi64(low, _mm512_slli_epi64(first, d * FACTOR_BITS));
    high = _mm512_add_epi64(high, _mm512_slli_epi64(second, d * FACTOR_BITS));
  }
  return _mm512_insertf32x8(
      _mm512_castps256_ps512(_mm512_cvtepi64_ps(low)), _mm512_cvtepi64_ps(high), 1);
}

// ---------------------------------------------------------------- operator

// 16 rows of counts.
struct Block {
  int64_t row, count, digits;
  int8_t* panels;
};

struct Output {
  float* data;
  const float *threshold, *scale;
  int64_t columns, groups, group_size;
};

// Writes 32 columns of a block, or of two blocks with a digit each, that share `sums`.
void store(
    const Output& out, const Block& block, const float total[2][TILE][TILE], int64_t column,
    int64_t columns) {
  for (int64_t half = 0; half * TILE < columns; half++) {
    __m512i lines[TILE];
    for (int64_t o = 0; o < TILE; o++)
      lines[o] = _mm512_castps_si512(_mm512_load_ps(total[half][o]));
    transpose_16(lines);
    const __mmask16 lanes = lanes_of(columns - half * TILE);
    for (int64_t r = 0; r < block.count; r++) {
      const int64_t row = block.row + r;
      const __m512 threshold = _mm512_set1_ps(out.threshold[row]);
      float* to = out.data + row * out.columns + column + half * TILE;
      _mm512_mask_storeu_ps(
          to, lanes, _mm512_mul_ps(_mm512_castsi512_ps(lines[r]), threshold));
    }
  }
}

// Adds a group's sums of a block, times their scales, to `total`.
void add_group(
    const Output& out, float total[2][TILE][TILE], const Sums* digits, int64_t count,
    int64_t column, int64_t columns, int64_t group) {
  for (int64_t o = 0; o < columns; o++) {
    const __m512 sum = join(digits + o / TILE, 2, count, o % TILE);
    const __m512 scale = _mm512_set1_ps(out.scale[(column + o) * out.groups + group]);
    float* to = total[o / TILE][o % TILE];
    // The product is rounded before it is added, as in the definition: compilers may not make one
    // operation of them, which they would only do in places.
    const __m512 part = _mm512_mul_round_ps(sum, scale, _MM_FROUND_CUR_DIRECTION);
    _mm512_store_ps(to, group ? _mm512_add_ps(_mm512_load_ps(to), part) : part);
  }
}

// The columns of a task for one block, or for two whose counts have one digit.
void compute(
    const Output& out, const Weights& w, const Block* blocks, int64_t num_blocks, int64_t column) {
  alignas(64) Sums sums[4][2];
  alignas(64) float total[2][2][TILE][TILE];
  const int64_t stride = pad(w.size) * TILE, digits = blocks[0].digits;
  for (int64_t group = 0; group < out.groups; group++) {
    const int64_t begin = group * out.group_size;
    const int64_t end = std::min(w.size, begin + out.group_size);
    if (num_blocks == 2) {
      multiply(sums, w, blocks[0].panels, blocks[1].panels, begin, end);
      for (int64_t b = 0; b < 2; b++) add_group(out, total[b], sums[b], 1, column, w.rows, group);
      continue;
    }
    for (int64_t d = 0; d < digits; d += 2) {
      const int8_t* first = blocks[0].panels + d * stride;
      multiply(sums + d, w, first, d + 1 < digits ? first + stride : first, begin, end);
    }
    add_group(out, total[0], sums[0], digits, column, w.rows, group);
  }
  for (int64_t b = 0; b < num_blocks; b++) store(out, blocks[b], total[b], column, w.rows);
}

template <typename T>
void run(const Output& out, const Tensor& count, const Tensor& weight) {
  const int64_t rows = count.size(0), size = count.size(1);
  const T* counts = static_cast<const T*>(count.const_data_ptr());
  std::vector<Block> blocks((rows + TILE - 1) / TILE);
  std::vector<std::unique_ptr<Line[]>> memory(blocks.size());
  run_tasks(blocks.size(), [&](int64_t i) {
    Block& block = blocks[i];
    block.row = i * TILE;
    block.count = std::min(TILE, rows - block.row);
    block.digits = count_digits(counts + block.row * size, block.count, size);
    memory[i].reset(new Line[std::max<int64_t>(1, block.digits) * pad(size) * TILE / DEPTH]);
    block.panels = reinterpret_cast<int8_t*>(memory[i].get());
    make_panels(block.panels, counts + block.row * size, block.count, size, block.digits);
  });
  for (const Block& block : blocks)
    TORCH_CHECK_VALUE(
        block.digits, "count holds a number that is not finite or not below ", int64_t(LIMIT),
        " in size; use a larger threshold");
  const int8_t* weights = weight.const_data_ptr<int8_t>();
  run_tasks((out.columns + SIDE - 1) / SIDE, 0, [&](int64_t i, Arena) {
    const int64_t column = i * SIDE;
    const Weights w{weights + column * size, std::min(SIDE, out.columns - column), size};
    for (size_t b = 0; b < blocks.size();) {
      const bool is_pair =
          b + 1 < blocks.size() && blocks[b].digits == 1 && blocks[b + 1].digits == 1;
      compute(out, w, &blocks[b], 1 + is_pair, column);
      b += 1 + is_pair;
    }
  });
}

Tensor int8_linear(
    const Tensor& count, const Tensor& threshold, const Tensor& weight, const Tensor& scale,
    int64_t group_size) {
  const Tensor out = allocate({count.size(0), weight.size(0)}, threshold.options());
  const Output output{
      out.data_ptr<float>(),    threshold.const_data_ptr<float>(), scale.const_data_ptr<float>(),
      weight.size(0), scale.size(1), group_size};
  if (count.scalar_type() == at::kFloat)
    run<float>(output, count, weight);
  else
    run<bf16>(output, count, weight);
  return out;
}

}  // namespace

TORCH_LIBRARY(longaxon_int8_linear, m) {
  m.def(
      "int8_linear(Tensor count, Tensor threshold, Tensor weight, Tensor scale, int group_size) -> "
      "Tensor",
      &int8_linear);
}
