// Linear attention with decay, of bfloat16 tensors on CPUs with AMX, forward and backward.
//
// A head's tokens are taken in chunks. With g the decay of a chunk's first token, b the decay
// summed over the tokens after it, m half of b at the end and S the state that enters,
//   q' = scale q exp(b - m)     k' = k exp(m - b)     S' = exp(g + m) S
//   p = tril(q' k'^T)           out = p v + q' S'     S_next = exp(m) (S' + k'^T v)
// and backward, with D' = exp(m) dS_next and dp = tril(dout v^T),
//   dq' = dp k' + dout S'^T     dk' = dp^T q' + v D'^T
//   dv = p^T dout + k' D'       dS = exp(g + m) (D' + q'^T dout)
// The gradient of the decay is the sum, from a token to the chunk's end, of q' dq' - k' dk', and
// what the state carries past the end: S' D' + sum(k' v D'^T). The diagonal of the scores cancels
// in it, because both products are of the same rounded factors.
//
// A chunk ends early where a channel has decayed by exp(RANGE), so that no exponent exceeds half
// of RANGE. g, which the factors leave out, may be anything down to minus infinity.
//
// The forward pass keeps the state of every SEGMENT tokens; backward, the states in between are
// made again. Results do not depend on the number of threads.

#include <torch/library.h>

#include <vector>

#include "amx.h"

namespace {

constexpr int64_t CHUNK = 64;     // tokens at most
constexpr int64_t SEGMENT = 512;  // tokens between states that are kept
constexpr int64_t MAX_HEADS = 8;  // of a task
constexpr float RANGE = 60.0f;
constexpr float LOWEST = -1e4f;  // finite, and its exponential is zero

// Tokens of a row.
struct Chunk {
  int64_t row, begin, length;
  int64_t end() const { return begin + length; }
  int64_t rows() const { return round_up(length); }
};

// ---------------------------------------------------------------- vectors

// rows [total, D] of `count` strided rows times factor and up, or divided by up; zero beyond them.
template <bool DIVIDES>
void scale_rows(
    bf16* rows, const bf16* source, int64_t stride, float factor, const float* up, int64_t count,
    int64_t total, int64_t D) {
  const __m512 constant = _mm512_set1_ps(factor);
  const auto scale = [&](int64_t i, int64_t d) {
    const __m512 x = _mm512_load_ps(up + i * D + d);
    const __m512 y = DIVIDES ? _mm512_rcp14_ps(x) : _mm512_mul_ps(x, constant);
    return _mm512_mul_ps(load_floats(source + i * stride + d), y);
  };
  for (int64_t i = 0; i < count; i++)
    for (int64_t d = 0; d < D; d += 32)
      _mm512_store_si512(rows + i * D + d, to_bf16(scale(i, d), scale(i, d + 16)));
  std::fill_n(rows + count * D, (total - count) * D, bf16(0));
}

void round_rows(bf16* target, int64_t stride, const float* rows, int64_t count, int64_t D) {
  for (int64_t i = 0; i < count; i++)
    for (int64_t d = 0; d < D; d += 16)
      store_bf16(target + i * stride + d, _mm512_load_ps(rows + i * D + d));
}

// Asks for the rows of a chunk, soon to be read or written. The caches do not foresee them: they
// lie far apart, with the other heads in between. (Not inlined, gcc takes it to do nothing.)
template <typename Rows>
__attribute__((always_inline)) inline void prefetch(
    const Rows& x, const Chunk& chunk, int64_t head, int64_t D) {
  for (int64_t i = chunk.begin; i < chunk.end(); i++) {
    const auto* row = x.at(chunk.row, i, head);
    for (const auto* at = row; at < row + D; at += sizeof(Line) / sizeof(*row))
      _mm_prefetch(at, _MM_HINT_T1);
  }
}

// ---------------------------------------------------------------- products

enum class Half { LOWER, UPPER };  // of a square matrix, the diagonal included

// c [rows, columns] (+)= a [rows, depth] times the paired b.
void multiply(
    float* c, const bf16* a, const bf16* b, int64_t rows, int64_t columns, int64_t depth,
    bool adds) {
  for (int64_t j = 0; j < columns; j += SIDE)
    for (int64_t i = 0; i < rows; i += SIDE)
      multiply_square(
          c + i * columns + j, columns, a + i * depth, depth, SIDE, b + 2 * j, columns, depth,
          adds);
}

// c [rows, columns] += a half of a [rows, rows] times the paired b [rows / 2, columns, 2].
template <Half half>
void add_half_product(float* c, const bf16* a, const bf16* b, int64_t rows, int64_t columns) {
  for (int64_t j = 0; j < columns; j += SIDE)
    for (int64_t i = 0; i < rows; i += SIDE) {
      const int64_t first = half == Half::UPPER ? i : 0;
      const int64_t last = half == Half::UPPER ? rows : i + SIDE;
      multiply_square(
          c + i * columns + j, columns, a + i * rows + first, rows, SIDE,
          b + first * columns + 2 * j, columns, last - first, true);
    }
}

// A half of p [rows, rows] = a [rows, depth] times the paired b, zero in the other half of the
// squares on the diagonal; the squares beyond are left as they are.
template <Half half>
void multiply_half(bf16* p, const bf16* a, const bf16* b, int64_t rows, int64_t depth) {
  alignas(64) float square[SIDE * SIDE];
  for (int64_t i = 0; i < rows; i += SIDE)
    for (int64_t j = half == Half::UPPER ? i : 0; j < (half == Half::UPPER ? rows : i + SIDE);
         j += SIDE) {
      multiply_square(square, SIDE, a + i * depth, depth, SIDE, b + 2 * j, rows, depth, false);
      for (int64_t r = 0; r < SIDE; r++) {
        const __m512i x = to_bf16(
            _mm512_load_ps(square + r * SIDE), _mm512_load_ps(square + r * SIDE + 16));
        const __mmask32 lower = (2ull << r) - 1, upper = ~0u << r;
        const __mmask32 kept = i != j ? ~0u : half == Half::UPPER ? upper : lower;
        _mm512_store_si512(p + (i + r) * rows + j, _mm512_maskz_mov_epi16(kept, x));
      }
    }
}

// ---------------------------------------------------------------- inputs

struct Sizes {
  int64_t B, T, H, H_state, D_k, D_v, group;
  Sizes(const Tensor& q, const Tensor& v)
      : B(q.size(0)), T(q.size(1)), H(q.size(2)), H_state(v.size(2)), D_k(q.size(3)),
        D_v(v.size(3)), group(H / H_state) {}
};

// Bytes of the arrays of a struct.
template <typename Scratch>
int64_t measure(const Sizes& size) {
  Arena arena(nullptr);
  const Scratch scratch(arena, size);
  return (arena.end() - static_cast<Line*>(nullptr)) * sizeof(Line);
}

// A document, or a whole row. The state that enters a segment is kept, but for the first's.
struct Sequence {
  int64_t row, begin, end, checkpoint;
  int64_t count_segments() const { return std::max<int64_t>(end - begin - 1, 0) / SEGMENT + 1; }
};

// State heads of one sequence, which a thread takes along together: their tokens share pages.
struct Task {
  Sequence sequence;
  int64_t first_head, heads, state;  // state: that of the first head, among all states
};

struct Plan {
  std::vector<Sequence> sequences;
  int64_t H, heads, groups, num_checkpoints = 0;

  Plan(const Tensor& bounds, const Sizes& size) : H(size.H_state) {
    const int64_t threads = at::get_num_threads();
    heads = std::min((H + threads - 1) / threads, MAX_HEADS);
    groups = (H + heads - 1) / heads;
    const int32_t* bound = bounds.const_data_ptr<int32_t>();
    for (int64_t row = 0; row < size.B; row++)
      for (int64_t n = 0; n + 1 < bounds.numel(); n++) {
        sequences.push_back({row, bound[n], bound[n + 1], num_checkpoints});
        num_checkpoints += sequences.back().count_segments() - 1;
      }
  }
  int64_t num_sequences() const { return sequences.size(); }
  int64_t num_tasks() const { return num_sequences() * groups; }
  Task find_task(int64_t i) const {
    const int64_t first = i % groups * heads;
    return {sequences[i / groups], first, std::min(heads, H - first), i / groups * H + first};
  }
};

// Logarithms [B, T, H_state] or [B, T, H_state, D_k], or nothing.
struct Decay {
  float* data = nullptr;
  int64_t row_stride = 0, token_stride = 0, head_stride = 0;
  bool per_channel = false;

  explicit Decay(const std::optional<Tensor>& x) {
    if (!x) return;
    data = x->data_ptr<float>();
    row_stride = x->stride(0);
    token_stride = x->stride(1);
    head_stride = x->stride(2);
    per_channel = x->dim() == 4;
  }
  int64_t channels(const Sizes& size) const { return !data ? 0 : per_channel ? size.D_k : 1; }
  float* at(int64_t row, int64_t token, int64_t head) const {
    return data + row * row_stride + token * token_stride + head * head_stride;
  }
};

// A state [D_k, D_v] whose rows are still to be multiplied by `factor`.
struct State {
  float *sums, *factor;

  void place(Arena& arena, const Sizes& size) {
    sums = arena.take<float>(size.D_k * size.D_v);
    factor = arena.take<float>(size.D_k);
  }

  void load(const float* from, int64_t D_k, int64_t D_v) const {
    if (from)
      std::copy_n(from, D_k * D_v, sums);
    else
      std::fill_n(sums, D_k * D_v, 0.0f);
    std::fill_n(factor, D_k, 1.0f);
  }
  void store(float* to, int64_t D_k, int64_t D_v) const {
    for (int64_t i = 0; i < D_k; i++)
      for (int64_t d = i * D_v; d < (i + 1) * D_v; d++) to[d] = sums[d] * factor[i];
  }
  // Multiplies the rows by `decay` too, and rounds them.
  void round(bf16* rounded, const float* decay, int64_t D_k, int64_t D_v) const {
    for (int64_t i = 0; i < D_k; i++) {
      const __m512 by = _mm512_set1_ps(factor[i] * decay[i]);
      for (int64_t d = i * D_v; d < (i + 1) * D_v; d += 32) {
        const __m512 x = _mm512_mul_ps(_mm512_load_ps(sums + d), by);
        const __m512 y = _mm512_mul_ps(_mm512_load_ps(sums + d + 16), by);
        _mm512_store_ps(sums + d, x);
        _mm512_store_ps(sums + d + 16, y);
        _mm512_storeu_si512(rounded + d, to_bf16(x, y));
      }
    }
  }
};

// One of the states x [n, H_state, D_k, D_v], or none.
float* find_state(const std::optional<Tensor>& x, int64_t state) {
  return x ? x->data_ptr<float>() + state * x->size(2) * x->size(3) : nullptr;
}

// What both passes hold of a chunk. "pairs" are paired rows, "columns" the paired transpose.
struct Scratch {
  float *up, *enter, *rest;  // exp(b - m) [CHUNK, D_k]; exp(g + m) and exp(m) [D_k]
  bf16 *q, *k, *k_columns, *k_t, *v, *v_pairs, *entering;

  Scratch(Arena& arena, const Sizes& size) {
    const int64_t D_k = size.D_k, D_v = size.D_v;
    for (float** x : {&enter, &rest}) *x = arena.take<float>(D_k);
    up = arena.take<float>(CHUNK * D_k);
    for (bf16** x : {&q, &k, &k_columns, &k_t}) *x = arena.take<bf16>(CHUNK * D_k);
    for (bf16** x : {&v, &v_pairs}) *x = arena.take<bf16>(CHUNK * D_v);
    entering = arena.take<bf16>(D_k * D_v);
  }
};

struct Inputs {
  Sizes size;
  Heads q, k, v;
  Decay log_decay;
  float scale;

  // As much of a chunk as the decay allows, and its factors.
  Chunk load_decay(const Scratch& s, const Chunk& wanted, int64_t head) const {
    const int64_t D = size.D_k, row = wanted.row, begin = wanted.begin, limit = wanted.length;
    if (!log_decay.data) {
      std::fill_n(s.up, limit * D, 1.0f);
      std::fill_n(s.enter, D, 1.0f);
      std::fill_n(s.rest, D, 1.0f);
      return wanted;
    }
    const auto load = [&](int64_t i, int64_t d) {
      const float* x = log_decay.at(row, begin + i, head);
      return log_decay.per_channel ? _mm512_loadu_ps(x + d) : _mm512_set1_ps(*x);
    };
    int64_t length = 1;
    std::fill_n(s.up, D, 0.0f);
    for (; length < limit; length++) {
      __mmask16 below = 0;
      for (int64_t d = 0; d < D; d += 16) {
        float* b = s.up + length * D + d;
        const __m512 x = _mm512_add_ps(_mm512_load_ps(b - D), load(length, d));
        below |= _mm512_cmplt_ps_mask(x, _mm512_set1_ps(-RANGE));
        _mm512_store_ps(b, x);
      }
      if (below) break;
    }
    for (int64_t d = 0; d < D; d += 16) {
      const __m512 end = _mm512_load_ps(s.up + (length - 1) * D + d);
      const __m512 m = _mm512_mul_ps(end, _mm512_set1_ps(0.5f));
      const __m512 first = _mm512_max_ps(_mm512_set1_ps(LOWEST), load(0, d));
      _mm512_store_ps(s.enter + d, exp_of(_mm512_add_ps(first, m)));
      _mm512_store_ps(s.rest + d, exp_of(m));
      for (float* b = s.up + d; b < s.up + length * D; b += D) {
        const __m512 x = _mm512_sub_ps(_mm512_load_ps(b), m);
        _mm512_store_ps(b, exp2_of(_mm512_mul_ps(x, _mm512_set1_ps(LOG2_E))));
      }
    }
    return {row, begin, length};
  }

  // Keys and values of a chunk whose factors are there.
  void load_keys(const Scratch& s, const Chunk& chunk, int64_t head) const {
    const int64_t rows = chunk.rows();
    const bf16* k_rows = k.at(chunk.row, chunk.begin, head);
    const bf16* v_rows = v.at(chunk.row, chunk.begin, head);
    scale_rows<true>(s.k, k_rows, k.token_stride, 1.0f, s.up, chunk.length, rows, size.D_k);
    copy_rows(s.v, v_rows, v.token_stride, chunk.length, rows, size.D_v);
  }

  void prefetch_keys(const Chunk& chunk, int64_t head) const {
    prefetch(log_decay, chunk, head, log_decay.channels(size));
    prefetch(k, chunk, head, size.D_k);
    prefetch(v, chunk, head, size.D_v);
  }

  void load_queries(const Scratch& s, const Chunk& chunk, int64_t head) const {
    const bf16* rows = q.at(chunk.row, chunk.begin, head);
    scale_rows<false>(
        s.q, rows, q.token_stride, scale, s.up, chunk.length, chunk.rows(), size.D_k);
  }

  // The chunk that follows, cut shorter by the end of the segment alone.
  static Chunk follow(const Chunk& chunk, int64_t last) {
    return {chunk.row, chunk.end(), std::min(CHUNK, last - chunk.end())};
  }

  // S' = exp(g + m) S, in place and rounded.
  void enter(const Scratch& s, const State& state, bf16* entering) const {
    state.round(entering, s.enter, size.D_k, size.D_v);
  }

  // S_next = exp(m) (S' + k'^T v).
  void leave(const Scratch& s, const State& state, const Chunk& chunk) const {
    const int64_t rows = chunk.rows();
    pair_columns(s.k_columns, s.k, rows, size.D_k);
    split_pairs(s.k_t, s.k_columns, size.D_k, rows);
    pair_rows(s.v_pairs, s.v, rows, size.D_v);
    multiply(state.sums, s.k_t, s.v_pairs, size.D_k, size.D_v, rows, true);
    std::copy_n(s.rest, size.D_k, state.factor);
  }
};

// ---------------------------------------------------------------- forward

struct Forward {
  Inputs in;
  Heads out;

  struct Scratch : ::Scratch {
    bf16 *entering_pairs, *p;
    float* sums;
    State states[MAX_HEADS];

    Scratch(Arena& arena, const Sizes& size) : ::Scratch(arena, size) {
      entering_pairs = arena.take<bf16>(size.D_k * size.D_v);
      p = arena.take<bf16>(CHUNK * CHUNK);
      sums = arena.take<float>(CHUNK * size.D_v);
      for (State& state : states) state.place(arena, size);
    }
  };

  void run(
      const Scratch& s, const State& state, const Chunk& chunk, const Chunk& next,
      int64_t head) const {
    const int64_t D_k = in.size.D_k, D_v = in.size.D_v, rows = chunk.rows();
    in.load_keys(s, chunk, head);
    in.prefetch_keys(next, head);
    in.enter(s, state, s.entering);
    in.leave(s, state, chunk);
    pair_rows(s.entering_pairs, s.entering, D_k, D_v);
    for (int64_t i = head * in.size.group; i < (head + 1) * in.size.group; i++) {
      in.load_queries(s, chunk, i);
      prefetch(in.q, next, i, D_k);
      prefetch(out, chunk, i, D_v);
      multiply_half<Half::LOWER>(s.p, s.q, s.k_columns, rows, D_k);
      multiply(s.sums, s.q, s.entering_pairs, rows, D_v, D_k, false);
      add_half_product<Half::LOWER>(s.sums, s.p, s.v_pairs, rows, D_v);
      bf16* target = out.at(chunk.row, chunk.begin, i);
      round_rows(target, out.token_stride, s.sums, chunk.length, D_v);
    }
  }
};

std::tuple<Tensor, Tensor, Tensor> linear_attention_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& log_decay,
    const std::optional<Tensor>& initial_state, const Tensor& bounds, double scale, bool keeps) {
  const Sizes size(q, v);
  const Plan plan(bounds, size);
  const int64_t H = size.H_state, D_k = size.D_k, D_v = size.D_v;
  const auto options = q.options().dtype(at::kFloat);
  const Tensor out = allocate({size.B, size.T, size.H, D_v}, q.options());
  const Tensor final_state = allocate({plan.num_sequences(), H, D_k, D_v}, options);
  const Tensor checkpoints = allocate({keeps ? plan.num_checkpoints : 0, H, D_k, D_v}, options);
  const Inputs inputs{size, Heads(q), Heads(k), Heads(v), Decay(log_decay), float(scale)};
  const Forward forward{inputs, Heads(out)};
  run_tasks(plan.num_tasks(), measure<Forward::Scratch>(size), [&](int64_t i, Arena arena) {
    const Forward::Scratch s(arena, size);
    const Task task = plan.find_task(i);
    const Sequence& sequence = task.sequence;
    for (int64_t h = 0; h < task.heads; h++)
      s.states[h].load(find_state(initial_state, task.state + h), D_k, D_v);
    for (int64_t n = 0; n < sequence.count_segments(); n++) {
      const int64_t first = sequence.begin + n * SEGMENT;
      const int64_t last = std::min(first + SEGMENT, sequence.end);
      for (int64_t h = 0; h < task.heads; h++) {
        const int64_t head = task.first_head + h;
        const int64_t kept = (sequence.checkpoint + n - 1) * H + head;
        if (n > 0 && keeps) s.states[h].store(find_state(checkpoints, kept), D_k, D_v);
        for (Chunk chunk{sequence.row, first, 0}; chunk.end() < last;) {
          chunk = inputs.load_decay(s, Inputs::follow(chunk, last), head);
          forward.run(s, s.states[h], chunk, Inputs::follow(chunk, last), head);
        }
      }
    }
    for (int64_t h = 0; h < task.heads; h++)
      s.states[h].store(find_state(final_state, task.state + h), D_k, D_v);
  });
  return {out, final_state, checkpoints};
}

// ---------------------------------------------------------------- backward

struct Backward {
  Inputs in;
  Heads dout, dq, dk, dv;
  Decay dlog_decay;

  struct Scratch : ::Scratch {
    State state, dstates[MAX_HEADS];
    bf16 *k_pairs, *q_columns, *q_t, *q_pairs, *dout, *dout_pairs, *dout_columns;
    bf16 *entering_columns, *leaving, *leaving_pairs, *leaving_columns;
    bf16 *p_t, *dp_t, *dp, *columns;
    float *dq, *dk, *dv, *db, *end;

    Scratch(Arena& arena, const Sizes& size) : ::Scratch(arena, size) {
      const int64_t D_k = size.D_k, D_v = size.D_v;
      state.place(arena, size);
      for (State& dstate : dstates) dstate.place(arena, size);
      end = arena.take<float>(D_k);
      for (bf16** x : {&k_pairs, &q_columns, &q_t, &q_pairs}) *x = arena.take<bf16>(CHUNK * D_k);
      for (bf16** x : {&dout, &dout_pairs, &dout_columns}) *x = arena.take<bf16>(CHUNK * D_v);
      for (bf16** x : {&entering_columns, &leaving, &leaving_pairs, &leaving_columns})
        *x = arena.take<bf16>(D_k * D_v);
      for (bf16** x : {&p_t, &dp_t, &dp, &columns}) *x = arena.take<bf16>(CHUNK * CHUNK);
      for (float** x : {&dq, &dk, &db}) *x = arena.take<float>(CHUNK * D_k);
      dv = arena.take<float>(CHUNK * D_v);
    }
  };

  // The gradients of a chunk, given the rounded state that enters; dstate moves before it.
  void run(
      const Scratch& s, const State& dstate, const Chunk& chunk, const Chunk& next, int64_t head,
      const bf16* entering) const {
    const int64_t D_k = in.size.D_k, D_v = in.size.D_v, rows = chunk.rows();
    prefetch(dk, chunk, head, D_k);
    prefetch(dv, chunk, head, D_v);
    prefetch(dlog_decay, chunk, head, dlog_decay.channels(in.size));
    pair_rows(s.k_pairs, s.k, rows, D_k);
    pair_columns(s.entering_columns, entering, D_k, D_v);
    dstate.round(s.leaving, s.rest, D_k, D_v);
    pair_rows(s.leaving_pairs, s.leaving, D_k, D_v);
    pair_columns(s.leaving_columns, s.leaving, D_k, D_v);
    multiply(s.dk, s.v, s.leaving_columns, rows, D_k, D_v, false);
    multiply(s.dv, s.k, s.leaving_pairs, rows, D_v, D_k, false);
    if (dlog_decay.data) start_decay(s, dstate, entering, rows);
    for (int64_t i = head * in.size.group; i < (head + 1) * in.size.group; i++)
      add_queries(s, dstate, chunk, next, i);
    std::copy_n(s.enter, D_k, dstate.factor);
    round_rows(dv.at(chunk.row, chunk.begin, head), dv.token_stride, s.dv, chunk.length, D_v);
    store_keys(s, chunk, head);
  }

  void add_queries(
      const Scratch& s, const State& dstate, const Chunk& chunk, const Chunk& next,
      int64_t head) const {
    const int64_t D_k = in.size.D_k, D_v = in.size.D_v, rows = chunk.rows();
    const bf16* dout_rows = dout.at(chunk.row, chunk.begin, head);
    in.load_queries(s, chunk, head);
    prefetch(dq, chunk, head, D_k);
    prefetch(in.q, next, head, D_k);
    prefetch(dout, next, head, D_v);
    pair_rows(s.q_pairs, s.q, rows, D_k);
    pair_columns(s.q_columns, s.q, rows, D_k);
    split_pairs(s.q_t, s.q_columns, D_k, rows);
    copy_rows(s.dout, dout_rows, dout.token_stride, chunk.length, rows, D_v);
    pair_rows(s.dout_pairs, s.dout, rows, D_v);
    pair_columns(s.dout_columns, s.dout, rows, D_v);

    multiply_half<Half::UPPER>(s.p_t, s.k, s.q_columns, rows, D_k);
    add_half_product<Half::UPPER>(s.dv, s.p_t, s.dout_pairs, rows, D_v);
    multiply_half<Half::UPPER>(s.dp_t, s.v, s.dout_columns, rows, D_v);
    add_half_product<Half::UPPER>(s.dk, s.dp_t, s.q_pairs, rows, D_k);
    pair_columns(s.columns, s.dp_t, rows, rows);
    split_pairs(s.dp, s.columns, rows, rows);
    multiply(s.dq, s.dout, s.entering_columns, rows, D_k, D_v, false);
    add_half_product<Half::LOWER>(s.dq, s.dp, s.k_pairs, rows, D_k);
    multiply(dstate.sums, s.q_t, s.dout_pairs, D_k, D_v, rows, true);
    store_queries(s, chunk, head);
  }

  // Begins the sums of the decay's gradient with what the state carries past the chunk's end.
  void start_decay(
      const Scratch& s, const State& dstate, const bf16* entering, int64_t rows) const {
    const int64_t D_k = in.size.D_k, D_v = in.size.D_v;
    std::fill_n(s.db, rows * D_k, 0.0f);
    for (int64_t i = 0; i < D_k; i++) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t d = i * D_v; d < (i + 1) * D_v; d += 16)
        sum = _mm512_fmadd_ps(
            load_floats(entering + d), _mm512_load_ps(dstate.sums + d), sum);
      s.end[i] = _mm512_reduce_add_ps(sum);
    }
    for (int64_t d = 0; d < D_k; d += 16) {
      __m512 sum = _mm512_load_ps(s.end + d);
      for (int64_t i = d; i < rows * D_k; i += D_k)
        sum = _mm512_fmadd_ps(load_floats(s.k + i), _mm512_load_ps(s.dk + i), sum);
      _mm512_store_ps(s.end + d, sum);
    }
  }

  void store_queries(const Scratch& s, const Chunk& chunk, int64_t head) const {
    const int64_t D = in.size.D_k;
    const __m512 factor = _mm512_set1_ps(in.scale);
    for (int64_t t = 0; t < chunk.length; t++) {
      bf16* target = dq.at(chunk.row, chunk.begin + t, head);
      for (int64_t d = 0; d < D; d += 16) {
        const int64_t i = t * D + d;
        const __m512 x = _mm512_load_ps(s.dq + i), up = _mm512_load_ps(s.up + i);
        store_bf16(target + d, _mm512_mul_ps(x, _mm512_mul_ps(up, factor)));
        if (dlog_decay.data)
          _mm512_store_ps(
              s.db + i, _mm512_fmadd_ps(load_floats(s.q + i), x, _mm512_load_ps(s.db + i)));
      }
    }
  }

  void store_keys(const Scratch& s, const Chunk& chunk, int64_t head) const {
    const int64_t D = in.size.D_k;
    for (int64_t t = chunk.length - 1; t >= 0; t--) {
      const int64_t token = chunk.begin + t;
      bf16* target = dk.at(chunk.row, token, head);
      for (int64_t i = t * D; i < (t + 1) * D; i += 16) {
        const __m512 x = _mm512_load_ps(s.dk + i), up = _mm512_load_ps(s.up + i);
        store_bf16(target + i - t * D, _mm512_mul_ps(x, _mm512_rcp14_ps(up)));
      }
      if (!dlog_decay.data) continue;
      float* gradient = dlog_decay.at(chunk.row, token, head);
      __m512 total = _mm512_setzero_ps();
      for (int64_t d = 0; d < D; d += 16) {
        const int64_t i = t * D + d;
        __m512 sum = _mm512_add_ps(_mm512_load_ps(s.end + d), _mm512_load_ps(s.db + i));
        sum = _mm512_fnmadd_ps(load_floats(s.k + i), _mm512_load_ps(s.dk + i), sum);
        _mm512_store_ps(s.end + d, sum);
        if (dlog_decay.per_channel) _mm512_storeu_ps(gradient + d, sum);
        total = _mm512_add_ps(total, sum);
      }
      if (!dlog_decay.per_channel) *gradient = _mm512_reduce_add_ps(total);
    }
  }
};

using Gradients =
    std::tuple<Tensor, Tensor, Tensor, std::optional<Tensor>, std::optional<Tensor>>;

Gradients linear_attention_bwd(
    const Tensor& dout, const std::optional<Tensor>& dfinal, const Tensor& q, const Tensor& k,
    const Tensor& v, const std::optional<Tensor>& log_decay,
    const std::optional<Tensor>& initial_state, const Tensor& bounds, const Tensor& checkpoints,
    double scale) {
  const Sizes size(q, v);
  const Plan plan(bounds, size);
  const int64_t H = size.H_state, D_k = size.D_k, D_v = size.D_v, length = D_k * D_v;
  const Tensor dq = allocate(q.sizes(), q.options());
  const Tensor dk = allocate(k.sizes(), q.options());
  const Tensor dv = allocate(v.sizes(), q.options());
  std::optional<Tensor> dlog_decay, dinitial;
  if (log_decay) dlog_decay = allocate(log_decay->sizes(), log_decay->options());
  if (initial_state) dinitial = allocate(initial_state->sizes(), initial_state->options());
  const Inputs inputs{size, Heads(q), Heads(k), Heads(v), Decay(log_decay), float(scale)};
  const Backward backward{inputs, Heads(dout), Heads(dq), Heads(dk), Heads(dv), Decay(dlog_decay)};
  run_tasks(plan.num_tasks(), measure<Backward::Scratch>(size), [&](int64_t i, Arena arena) {
    const Backward::Scratch s(arena, size);
    const Task task = plan.find_task(i);
    const Sequence& sequence = task.sequence;
    std::vector<Chunk> chunks;
    std::vector<bf16> entering;  // the rounded states that enter them
    for (int64_t h = 0; h < task.heads; h++)
      s.dstates[h].load(find_state(dfinal, task.state + h), D_k, D_v);
    for (int64_t n = sequence.count_segments() - 1; n >= 0; n--) {
      const int64_t first = sequence.begin + n * SEGMENT;
      const int64_t last = std::min(first + SEGMENT, sequence.end);
      for (int64_t h = 0; h < task.heads; h++) {
        const int64_t head = task.first_head + h;
        const int64_t kept = (sequence.checkpoint + n - 1) * H + head;
        s.state.load(
            n > 0 ? find_state(checkpoints, kept) : find_state(initial_state, task.state + h), D_k,
            D_v);
        chunks.clear();
        for (Chunk chunk{sequence.row, first, 0}; chunk.end() < last; chunks.push_back(chunk)) {
          chunk = inputs.load_decay(s, Inputs::follow(chunk, last), head);
          entering.resize(std::max<int64_t>(entering.size(), (chunks.size() + 1) * length));
          inputs.load_keys(s, chunk, head);
          inputs.prefetch_keys(Inputs::follow(chunk, last), head);
          inputs.enter(s, s.state, entering.data() + chunks.size() * length);
          inputs.leave(s, s.state, chunk);
        }
        for (int64_t c = chunks.size() - 1; c >= 0; c--) {
          const Chunk next = c > 0 ? chunks[c - 1] : Chunk{};
          inputs.load_decay(s, chunks[c], head);
          inputs.load_keys(s, chunks[c], head);
          backward.run(s, s.dstates[h], chunks[c], next, head, entering.data() + c * length);
        }
      }
    }
    for (int64_t h = 0; h < task.heads && dinitial; h++)
      s.dstates[h].store(find_state(dinitial, task.state + h), D_k, D_v);
  });
  return {dq, dk, dv, dlog_decay, dinitial};
}

}  // namespace

TORCH_LIBRARY(longaxon_linear_attention, m) {
  m.def(
      "fwd(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, Tensor bounds, "
      "float scale, bool keeps) -> (Tensor, Tensor, Tensor)",
      &linear_attention_fwd);
  m.def(
      "bwd(Tensor dout, Tensor? dfinal, Tensor q, Tensor k, Tensor v, Tensor? log_decay, "
      "Tensor? initial_state, Tensor bounds, Tensor checkpoints, float scale) "
      "-> (Tensor, Tensor, Tensor, Tensor?, Tensor?)",
      &linear_attention_bwd);
}
