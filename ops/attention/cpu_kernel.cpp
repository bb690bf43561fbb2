// Attention of bfloat16 tensors on CPUs with AMX, forward and backward: causal, or to all keys.
//
// Scores are kept transposed, [keys, queries]: then all that belongs to a query (its maximum, lse,
// delta) is a vector across a row, and no product needs a transposed copy of a tile of scores:
//   forward   s = k q^T;  out^T = v^T p
//   backward  s = k q^T;  dp = v dout^T;  dv = p dout;  dk = ds q;  dq^T = k^T ds
// where p = exp(scale s - lse), ds = p (dp - delta) and delta = rowsum(dout out) - dlse. Results
// depend on the number of threads only through the cut of the sums over queries in dk and dv,
// never on timing.

#include <torch/library.h>

#include <cmath>
#include <vector>

#include "amx.h"

namespace {

constexpr int64_t QUERIES = 64;  // of a block
constexpr int64_t KEYS = 128;    // at once
constexpr int64_t TASKS_PER_THREAD = 6;
constexpr int64_t MAX_PARTS = 16;  // of a head's queries, each with sums for the keys it sees
constexpr float HIDDEN = -1e30f;  // finite: differences of two stay a number

// ---------------------------------------------------------------- layouts

// Rows of 16 bits, strided, times factor, of the transposed sums [D, QUERIES].
void store_transposed(
    bf16* rows, int64_t stride, const float* sums, const float* factor, int64_t count, int64_t D) {
  const __m512i step = _mm512_mullo_epi32(
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
      _mm512_set1_epi32(QUERIES));
  for (int64_t i = 0; i < count; i++)
    for (int64_t d = 0; d < D; d += 16) {
      const __m512 x = _mm512_i32gather_ps(step, sums + d * QUERIES + i, 4);
      store_bf16(rows + i * stride + d, _mm512_mul_ps(x, _mm512_set1_ps(factor[i])));
    }
}

// ---------------------------------------------------------------- what is visible

// Queries start to stop, all of the document that begins at `document`, and the keys they see.
struct Block {
  int64_t start, stop, document, first_key, last_key;
  int64_t cost() const { return last_key - first_key + KEYS; }
};

enum class View { NONE, PART, ALL };

struct Pattern {
  int64_t window, num_keys;  // a window of 0: every query sees all num_keys keys

  std::vector<Block> cut(const Tensor& bounds) const {
    std::vector<Block> blocks;
    const int32_t* bound = bounds.const_data_ptr<int32_t>();
    for (int64_t n = 0; n + 1 < bounds.numel(); n++)
      for (int64_t start = bound[n]; start < bound[n + 1]; start += QUERIES) {
        const int64_t stop = std::min<int64_t>(start + QUERIES, bound[n + 1]);
        const int64_t first = window ? std::max<int64_t>(bound[n], start - window + 1) : 0;
        const int64_t last = window ? stop : num_keys;
        blocks.push_back({start, stop, bound[n], round_down(first), round_up(last)});
      }
    return blocks;
  }

  // What a square of queries sees of a square of keys.
  View look(int64_t key, int64_t query, int64_t document) const {
    const int64_t last_key = key + SIDE - 1, last_query = query + SIDE - 1;
    if (!window) return last_key < num_keys ? View::ALL : View::PART;
    if (key > last_query || last_key < document || last_key <= query - window) return View::NONE;
    const bool all = last_key <= query && key >= document && key > last_query - window;
    return all ? View::ALL : View::PART;
  }

  // The queries among 16 that see the key.
  __mmask16 find(int64_t key, int64_t query, int64_t document) const {
    if (!window) return key < num_keys ? 0xffff : 0;
    if (key < document) return 0;
    const auto clip = [](int64_t x) { return int32_t(std::clamp<int64_t>(x, -1, 16)); };
    const __m512i i = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __mmask16 not_before = _mm512_cmpge_epi32_mask(i, _mm512_set1_epi32(clip(key - query)));
    const __m512i end = _mm512_set1_epi32(clip(key + window - query));
    return not_before & _mm512_cmplt_epi32_mask(i, end);
  }
};

// ---------------------------------------------------------------- inputs

struct Sizes {
  int64_t B, T, T_k, H, H_kv, D, group, padded;  // padded: T_k, to whole squares
  Sizes(const Tensor& q, const Tensor& k)
      : B(q.size(0)), T(q.size(1)), T_k(k.size(1)), H(q.size(2)), H_kv(k.size(2)), D(q.size(3)),
        group(H / H_kv), padded(round_up(T_k)) {}
};

// The transpose [D, SIDE] of `count` strided rows, zero beyond them.
void transpose_square(bf16* target, const bf16* rows, int64_t stride, int64_t count, int64_t D) {
  for (int64_t i = 0; i < SIDE; i += 16) {
    const int64_t left = std::clamp<int64_t>(count - i, 0, 16);
    alignas(64) int32_t column[16] = {};
    for (int64_t d = 0; d < D; d += 2) {
      for (int64_t r = 0; r < left; r++)
        column[r] = *reinterpret_cast<const int32_t*>(rows + (i + r) * stride + d);
      const __m512i both = _mm512_load_si512(column);
      auto* first = reinterpret_cast<__m256i*>(target + d * SIDE + i);
      auto* second = reinterpret_cast<__m256i*>(target + (d + 1) * SIDE + i);
      _mm256_storeu_si256(first, _mm512_cvtepi32_epi16(both));
      _mm256_storeu_si256(second, _mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
    }
  }
}

// The squares of keys in x [B, T_k, H_kv, D], zero beyond T_k: [B x H_kv, padded / SIDE, SIDE, D], or
// each transposed [D, SIDE].
Tensor gather_heads(const Tensor& x, const Sizes& size, bool transposes) {
  Tensor gathered = allocate({size.B * size.H_kv, size.padded, size.D}, x.options());
  const Heads heads(x);
  bf16* squares = static_cast<bf16*>(gathered.data_ptr());
  const int64_t D = size.D, count = size.padded / SIDE;
  run_tasks(size.B * size.H_kv * count, [&](int64_t task) {
    const int64_t head = task / count, first = task % count * SIDE;
    const int64_t inside = std::min(SIDE, size.T_k - first);
    const bf16* rows = heads.at(head / size.H_kv, first, head % size.H_kv);
    bf16* square = squares + task * SIDE * D;
    if (transposes)
      transpose_square(square, rows, heads.token_stride, inside, D);
    else
      copy_rows(square, rows, heads.token_stride, inside, SIDE, D);
  });
  return gathered;
}

// ---------------------------------------------------------------- forward

struct Forward {
  Sizes size;
  Pattern pattern;
  float scale;  // of scores to powers of two, positive
  Heads q, out;
  float* lse;
  const bf16 *keys, *values_t;

  // Scores [KEYS, QUERIES] of a block and keys first to last; the maximum grows with them.
  void score(
      float* scores, __m512* maximum, const bf16* queries, const bf16* key_rows, const Block& block,
      int64_t first, int64_t last) const {
    const __m512 hidden = _mm512_set1_ps(HIDDEN);
    for (int64_t key = first; key < last; key += SIDE)
      for (int64_t j = 0; j < QUERIES; j += SIDE) {
        float* square = scores + (key - first) * QUERIES + j;
        const View view = pattern.look(key, block.start + j, block.document);
        if (view != View::NONE)
          multiply_square(
              square, QUERIES, key_rows + key * size.D, size.D, SIDE, queries + 2 * j, QUERIES,
              size.D, false);
        for (int64_t i = 0; i < SIDE; i++)
          for (int64_t c = 0; c < SIDE; c += 16) {
            float* at = square + i * QUERIES + c;
            __m512 x = _mm512_load_ps(at);
            if (view != View::ALL) {
              const bool some = view == View::PART;
              const int64_t query = block.start + j + c;
              const __mmask16 seen = some ? pattern.find(key + i, query, block.document) : 0;
              x = _mm512_mask_mov_ps(hidden, seen, x);
              _mm512_store_ps(at, x);
            }
            maximum[(j + c) / 16] = _mm512_max_ps(maximum[(j + c) / 16], x);
          }
      }
  }

  // The paired exponentials of the scores, added up in `sum`.
  void exponentiate(
      bf16* p, const float* scores, const __m512* maximum, __m512* sum, int64_t rows) const {
    const __m512 factor = _mm512_set1_ps(scale);
    __m512 top[QUERIES / 16];
    for (int64_t c = 0; c < QUERIES / 16; c++) top[c] = _mm512_mul_ps(maximum[c], factor);
    for (int64_t i = 0; i < rows; i += 2)
      for (int64_t c = 0; c < QUERIES / 16; c++) {
        const float* at = scores + i * QUERIES + c * 16;
        const __m512 x = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(at), factor, top[c]));
        const __m512 y = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(at + QUERIES), factor, top[c]));
        sum[c] = _mm512_add_ps(sum[c], _mm512_add_ps(x, y));
        _mm512_store_si512(p + i * QUERIES + c * 32, pair_halves(to_bf16(x, y)));
      }
  }

  void attend(int64_t row, int64_t head, const Block& block, Arena arena) const {
    const int64_t D = size.D, count = block.stop - block.start;
    const int64_t kv = (row * size.H_kv + head / size.group) * size.padded * D;
    bf16* rows = arena.take<bf16>(QUERIES * D);
    bf16* queries = arena.take<bf16>(QUERIES * D);
    float* scores = arena.take<float>(KEYS * QUERIES);
    bf16* p = arena.take<bf16>(KEYS * QUERIES);
    float* sums = arena.take<float>(D * QUERIES);  // out^T
    copy_rows(rows, q.at(row, block.start, head), q.token_stride, count, QUERIES, D);
    pair_columns(queries, rows, QUERIES, D);
    std::fill_n(sums, D * QUERIES, 0.0f);
    __m512 maximum[QUERIES / 16], total[QUERIES / 16];
    std::fill_n(maximum, QUERIES / 16, _mm512_set1_ps(HIDDEN));
    std::fill_n(total, QUERIES / 16, _mm512_setzero_ps());
    for (int64_t first = block.first_key; first < block.last_key; first += KEYS) {
      const int64_t last = std::min(first + KEYS, block.last_key);
      __m512 before[QUERIES / 16];
      std::copy_n(maximum, QUERIES / 16, before);
      score(scores, maximum, queries, keys + kv, block, first, last);
      for (int64_t c = 0; c < QUERIES / 16; c++) {
        if (_mm512_cmpneq_ps_mask(before[c], maximum[c]) == 0) continue;
        const __m512 rise = _mm512_sub_ps(maximum[c], before[c]);
        const __m512 shrink = exp2_of(_mm512_mul_ps(rise, _mm512_set1_ps(-scale)));
        total[c] = _mm512_mul_ps(total[c], shrink);
        for (float* x = sums + c * 16; x < sums + D * QUERIES; x += QUERIES)
          _mm512_store_ps(x, _mm512_mul_ps(_mm512_load_ps(x), shrink));
      }
      exponentiate(p, scores, maximum, total, last - first);
      add_product(
          sums, QUERIES, values_t + kv + first * D, SIDE, SIDE * D, p, QUERIES, D, QUERIES,
          last - first);
    }
    alignas(64) float factor[QUERIES], top[QUERIES];
    for (int64_t c = 0; c < QUERIES / 16; c++) {
      _mm512_store_ps(factor + c * 16, total[c]);
      _mm512_store_ps(top + c * 16, maximum[c]);
    }
    float* lse_row = lse + (row * size.H + head) * size.T + block.start;
    for (int64_t i = 0; i < count; i++) {
      lse_row[i] = top[i] * (scale / LOG2_E) + std::log(factor[i]);
      factor[i] = 1.0f / factor[i];
    }
    store_transposed(out.at(row, block.start, head), out.token_stride, sums, factor, count, D);
  }
};

std::tuple<Tensor, Tensor> attention_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bounds, int64_t window,
    double scale) {
  const Sizes size(q, k);
  const Tensor out = allocate({size.B, size.T, size.H, size.D}, q.options());
  const Tensor lse = allocate({size.B, size.H, size.T}, q.options().dtype(at::kFloat));
  const Tensor keys = gather_heads(k, size, false), values_t = gather_heads(v, size, true);
  const Pattern pattern{window, size.T_k};
  const std::vector<Block> blocks = pattern.cut(bounds);
  const Forward forward{
      size, pattern, float(scale) * LOG2_E, Heads(q), Heads(out), lse.data_ptr<float>(),
      static_cast<bf16*>(keys.data_ptr()), static_cast<bf16*>(values_t.data_ptr())};
  const int64_t count = blocks.size(), memory = QUERIES * (8 * size.D + 6 * KEYS);
  run_tasks(size.B * size.H_kv * count, memory, [&](int64_t task, const Arena& arena) {
    const int64_t kv = task / count % size.H_kv;
    // The last blocks see the most: first, so that the threads finish together.
    const Block& block = blocks[count - 1 - task % count];
    for (int64_t head = kv * size.group; head < (kv + 1) * size.group; head++)
      forward.attend(task / count / size.H_kv, head, block, arena);
  });
  return {out, lse};
}

// ---------------------------------------------------------------- backward

// Blocks begin to end of a head of keys; its sums over their queries, of keys first to last.
struct Part {
  int64_t begin, end, first_key, last_key, offset;
};

// Cuts blocks into at most `count` parts of about equal cost.
std::vector<Part> cut_into_parts(const std::vector<Block>& blocks, int64_t count) {
  std::vector<Part> parts;
  int64_t total = 0, done = 0, begin = 0, offset = 0;
  for (const Block& block : blocks) total += block.cost();
  for (int64_t i = 0; i < int64_t(blocks.size()); i++) {
    done += blocks[i].cost();
    if (done * count < total * int64_t(parts.size() + 1)) continue;
    const int64_t first = blocks[begin].first_key, last = blocks[i].last_key;
    parts.push_back({begin, i + 1, first, last, offset});
    offset += last - first;
    begin = i + 1;
  }
  return parts;
}

// What a thread holds while it works on a block.
struct Scratch {
  bf16 *rows, *queries, *queries_t, *douts, *douts_t, *p, *ds, *ds_paired;
  float *dq, *s, *dp, *lse, *delta;

  static int64_t bytes(int64_t D) { return QUERIES * (14 * D + 6 * KEYS + 8) + 8 * SIDE * SIDE; }
  Scratch(Arena& arena, int64_t D) {
    for (bf16** x : {&rows, &queries, &queries_t, &douts, &douts_t})
      *x = arena.take<bf16>(QUERIES * D);
    for (bf16** x : {&p, &ds, &ds_paired}) *x = arena.take<bf16>(KEYS * QUERIES);
    dq = arena.take<float>(D * QUERIES);
    for (float** x : {&s, &dp}) *x = arena.take<float>(SIDE * SIDE);
    for (float** x : {&lse, &delta}) *x = arena.take<float>(QUERIES);
  }
};

struct Backward {
  Sizes size;
  Pattern pattern;
  float scale;
  Heads q, out, dout, dq;
  const float *lse, *dlse;  // dlse may be null
  const bf16 *keys, *keys_t, *values;

  void load(const Scratch& scratch, int64_t row, int64_t head, const Block& block) const {
    const int64_t D = size.D, count = block.stop - block.start;
    const int64_t at = (row * size.H + head) * size.T + block.start;
    copy_rows(scratch.rows, q.at(row, block.start, head), q.token_stride, count, QUERIES, D);
    pair_rows(scratch.queries, scratch.rows, QUERIES, D);
    pair_columns(scratch.queries_t, scratch.rows, QUERIES, D);
    copy_rows(scratch.rows, dout.at(row, block.start, head), dout.token_stride, count, QUERIES, D);
    pair_rows(scratch.douts, scratch.rows, QUERIES, D);
    pair_columns(scratch.douts_t, scratch.rows, QUERIES, D);
    std::fill_n(scratch.lse, 2 * QUERIES, 0.0f);  // and delta, which follows it
    for (int64_t i = 0; i < count; i++) {
      const bf16* out_row = out.at(row, block.start + i, head);
      __m512 sum = _mm512_setzero_ps();
      for (int64_t d = 0; d < D; d += 16)
        sum = _mm512_fmadd_ps(
            load_floats(scratch.rows + i * D + d), load_floats(out_row + d), sum);
      scratch.delta[i] = _mm512_reduce_add_ps(sum) - (dlse ? dlse[at + i] : 0.0f);
      scratch.lse[i] = lse[at + i] * LOG2_E;
    }
    std::fill_n(scratch.dq, D * QUERIES, 0.0f);
  }

  // p, ds and the paired ds of a square from its s and dp; `to` is its place in them.
  void weigh(
      const Scratch& scratch, int64_t to, int64_t column, View view, int64_t key, int64_t query,
      int64_t document) const {
    const __m512 factor = _mm512_set1_ps(scale * LOG2_E);
    for (int64_t i = 0; i < SIDE; i += 2) {
      __m512 p[2][2], ds[2][2];
      for (int64_t r = 0; r < 2; r++)
        for (int64_t c = 0; c < 2; c++) {
          const int64_t at = (i + r) * SIDE + c * 16;
          const __m512 lse_c = _mm512_load_ps(scratch.lse + column + c * 16);
          const __m512 delta_c = _mm512_load_ps(scratch.delta + column + c * 16);
          p[r][c] = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(scratch.s + at), factor, lse_c));
          if (view == View::PART) {
            const __mmask16 seen = pattern.find(key + i + r, query + c * 16, document);
            p[r][c] = _mm512_maskz_mov_ps(seen, p[r][c]);
          }
          ds[r][c] =
              _mm512_mul_ps(p[r][c], _mm512_sub_ps(_mm512_load_ps(scratch.dp + at), delta_c));
        }
      for (int64_t r = 0; r < 2; r++) {
        const int64_t at = to + (i + r) * QUERIES;
        _mm512_store_si512(scratch.p + at, to_bf16(p[r][0], p[r][1]));
        _mm512_store_si512(scratch.ds + at, to_bf16(ds[r][0], ds[r][1]));
      }
      // A row of pairs is two rows long: the columns before count twice.
      bf16* paired = scratch.ds_paired + to + column + i * QUERIES;
      _mm512_store_si512(paired, pair_halves(to_bf16(ds[0][0], ds[1][0])));
      _mm512_store_si512(paired + 32, pair_halves(to_bf16(ds[0][1], ds[1][1])));
    }
  }

  void weigh_nothing(const Scratch& scratch, int64_t to, int64_t column) const {
    for (int64_t i = 0; i < SIDE; i++) {
      std::fill_n(scratch.p + to + i * QUERIES, SIDE, bf16(0));
      std::fill_n(scratch.ds + to + i * QUERIES, SIDE, bf16(0));
    }
    for (int64_t i = 0; i < SIDE; i += 2)
      std::fill_n(scratch.ds_paired + to + column + i * QUERIES, 2 * SIDE, bf16(0));
  }

  // Adds what a block of queries of one head contributes; dk and dv begin with the part's keys.
  void add_block(
      const Scratch& scratch, float* dk, float* dv, const Part& part, int64_t row, int64_t head,
      const Block& block) const {
    const int64_t D = size.D;
    const int64_t kv = (row * size.H_kv + head / size.group) * size.padded * D;
    load(scratch, row, head, block);
    for (int64_t first = block.first_key; first < block.last_key; first += KEYS) {
      const int64_t last = std::min(first + KEYS, block.last_key);
      for (int64_t key = first; key < last; key += SIDE)
        for (int64_t j = 0; j < QUERIES; j += SIDE) {
          const int64_t to = (key - first) * QUERIES + j, query = block.start + j;
          const View view = pattern.look(key, query, block.document);
          if (view == View::NONE) {
            weigh_nothing(scratch, to, j);
            continue;
          }
          multiply_square(
              scratch.s, SIDE, keys + kv + key * D, D, SIDE, scratch.queries_t + 2 * j, QUERIES, D,
              false);
          multiply_square(
              scratch.dp, SIDE, values + kv + key * D, D, SIDE, scratch.douts_t + 2 * j, QUERIES,
              D, false);
          weigh(scratch, to, j, view, key, query, block.document);
        }
      const int64_t at = (first - part.first_key) * D, rows = last - first;
      add_product(dv + at, D, scratch.p, QUERIES, SIDE, scratch.douts, D, rows, D, QUERIES);
      add_product(dk + at, D, scratch.ds, QUERIES, SIDE, scratch.queries, D, rows, D, QUERIES);
      add_product(
          scratch.dq, QUERIES, keys_t + kv + first * D, SIDE, SIDE * D, scratch.ds_paired, QUERIES,
          D, QUERIES, rows);
    }
    float factor[QUERIES];
    std::fill_n(factor, QUERIES, scale);
    store_transposed(
        dq.at(row, block.start, head), dq.token_stride, scratch.dq, factor,
        block.stop - block.start, D);
  }
};

// grad [B, T_k, H_kv, D] = scale x the parts' sums [B x H_kv, rows of all parts, D].
void sum_parts(
    const Tensor& grad, const float* sums, const std::vector<Part>& parts, int64_t sums_rows,
    float scale, const Sizes& size) {
  const Heads target(grad);
  const int64_t D = size.D, squares = size.padded / SIDE;
  run_tasks(size.B * size.H_kv * squares, [&](int64_t task) {
    const int64_t head = task / squares, first = task % squares * SIDE;
    for (int64_t key = first; key < std::min(first + SIDE, size.T_k); key++)
      for (int64_t d = 0; d < D; d += 16) {
        __m512 sum = _mm512_setzero_ps();
        for (const Part& part : parts) {
          if (key < part.first_key || key >= part.last_key) continue;
          const int64_t row = head * sums_rows + part.offset + key - part.first_key;
          sum = _mm512_add_ps(sum, _mm512_loadu_ps(sums + row * D + d));
        }
        bf16* to = target.at(head / size.H_kv, key, head % size.H_kv) + d;
        store_bf16(to, _mm512_mul_ps(sum, _mm512_set1_ps(scale)));
      }
  });
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& bounds, int64_t window,
    double scale) {
  const Sizes size(q, k);
  const Tensor dq = allocate({size.B, size.T, size.H, size.D}, q.options());
  const Tensor dk = allocate({size.B, size.T_k, size.H_kv, size.D}, q.options());
  const Tensor dv = allocate({size.B, size.T_k, size.H_kv, size.D}, q.options());
  const Tensor keys = gather_heads(k, size, false), keys_t = gather_heads(k, size, true);
  const Tensor values = gather_heads(v, size, false);
  const Pattern pattern{window, size.T_k};
  const std::vector<Block> blocks = pattern.cut(bounds);
  const int64_t heads = size.B * size.H_kv;
  const int64_t wanted = (TASKS_PER_THREAD * at::get_num_threads() + heads - 1) / heads;
  const std::vector<Part> parts = cut_into_parts(blocks, std::min(wanted, MAX_PARTS));
  const int64_t count = parts.size();
  int64_t rows = 0;
  for (const Part& part : parts) rows += part.last_key - part.first_key;
  const Tensor sums = allocate({2, heads, rows, size.D}, q.options().dtype(at::kFloat));
  float* dk_sums = sums.data_ptr<float>();
  float* dv_sums = dk_sums + heads * rows * size.D;
  const Backward backward{
      size, pattern, float(scale), Heads(q), Heads(out), Heads(dout), Heads(dq),
      lse.const_data_ptr<float>(), dlse ? dlse->const_data_ptr<float>() : nullptr,
      static_cast<bf16*>(keys.data_ptr()), static_cast<bf16*>(keys_t.data_ptr()),
      static_cast<bf16*>(values.data_ptr())};
  run_tasks(heads * count, Scratch::bytes(size.D), [&](int64_t task, Arena arena) {
    const Scratch scratch(arena, size.D);
    const Part& part = parts[task / heads];
    const int64_t kv = task % heads, at = (kv * rows + part.offset) * size.D;
    const int64_t length = (part.last_key - part.first_key) * size.D;
    std::fill_n(dk_sums + at, length, 0.0f);
    std::fill_n(dv_sums + at, length, 0.0f);
    for (int64_t i = part.begin; i < part.end; i++)
      for (int64_t g = 0; g < size.group; g++) {
        const int64_t head = kv % size.H_kv * size.group + g;
        backward.add_block(
            scratch, dk_sums + at, dv_sums + at, part, kv / size.H_kv, head, blocks[i]);
      }
  });
  sum_parts(dk, dk_sums, parts, rows, float(scale), size);
  sum_parts(dv, dv_sums, parts, rows, 1.0f, size);
  return {dq, dk, dv};
}

}  // namespace

TORCH_LIBRARY(longaxon_attention, m) {
  m.def(
      "fwd(Tensor q, Tensor k, Tensor v, Tensor bounds, int window, float scale) "
      "-> (Tensor, Tensor)",
      &attention_fwd);
  m.def(
      "bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor bounds, int window, float scale) -> (Tensor, Tensor, Tensor)",
      &attention_bwd);
}
