// Block-sparse attention with relative position bias on the CPU: forward, and backward by recomputation.
//
// One task is one (sample, head) going forward and one (group of samples, head) going back. A task owns all it
// writes to and adds in a fixed order, so results do not depend on the number of threads. Keys, values and the
// head's column of the position table are packed once a task. Patch queries go in tiles of up to 64 of one
// block, keys in pieces of up to 64 of one block; scores of a tile stand keys first (S[key][query]), so that
// softmax and the bias of consecutive queries run along vector lanes. CLS, token 0, is a tile of its own.
// float32 inside; bfloat16 is converted where it is packed and where results leave.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef LANES
#if defined(__AVX512F__) && !defined(__znver4__)
#define LANES 16
#else
#define LANES 8
#endif
#endif

extern "C" {
// Everything a call needs. Strides count elements. `slots` < 0: every query sees every key.
struct Problem {
  int64_t batch, heads, tokens, width, table_rows, block_size, slots, codes_stride;
  int64_t stride_batch, stride_token, stride_part, stride_head;  // of qkv: (batch, token, part, head, width)
  int64_t bf16, threads, groups;
  const void* qkv;
  const float* table;         // (table_rows, heads)
  const int64_t* codes;       // (batch or 1, tokens - 1)
  const int64_t* key_blocks;  // (blocks, slots), -1 unused
  const uint8_t* key_mask;    // (batch, tokens), or null
  void* out;                  // (batch, tokens, heads, width)
  float* lse;                 // (batch, heads, tokens)
  float* cls_weights;         // (batch, heads, tokens - 1), or null
  const void* grad_out;       // as out
  void* grad_qkv;             // (batch, tokens, 3, heads, width)
  float* grad_table;          // (groups, heads, table_rows)
  float* scratch;             // threads * svitt_scratch_floats
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel of the process, or null
};
}

namespace {

constexpr int L = LANES;
constexpr int TILE = 64;    // queries of a tile, and keys of a piece
constexpr int CHUNK = 400;  // keys whose scores are held at once going forward
typedef float vec __attribute__((vector_size(L * 4)));
typedef float uvec __attribute__((vector_size(L * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(L * 4)));
typedef int32_t uivec __attribute__((vector_size(L * 4), aligned(4), may_alias));

inline vec load(const float* p) { return *(const uvec*)p; }
inline void store(float* p, vec v) { *(uvec*)p = v; }
inline vec splat(float x) { return x - vec{}; }
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// e^x for x <= 0 to 2 ulp; exactly 0 below -87 and at -inf. Cody-Waite reduction, Taylor polynomial.
inline vec exp_negative(vec x) {
  const vec safe = x < -87.0f ? splat(-87.0f) : x;
  const vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vec shifted = safe * 1.44269504088896341f + magic;
  const vec n = shifted - magic;
  const vec r = (safe - n * 0.693359375f) - n * -2.12194440e-4f;
  vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const ivec power = ((ivec)shifted - (ivec)magic + 127) << 23;
  return x < -87.0f ? vec{} : p * (vec)power;
}

inline vec gather(const float* base, ivec index) {
#if LANES == 8 && defined(__AVX2__)
  return (vec)_mm256_i32gather_ps(base, (__m256i)index, 4);
#elif LANES == 16 && defined(__AVX512F__)
  return (vec)_mm512_i32gather_ps((__m512i)index, base, 4);
#else
  vec v;
  for (int i = 0; i < L; ++i) v[i] = base[index[i]];
  return v;
#endif
}

// Keeps a loaded vector in its register: GCC would load it anew for every product, and loads are the limit.
inline void keep_loaded(vec& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
}

inline float sum_lanes(vec v) {
  float s = 0;
  for (int i = 0; i < L; ++i) s += v[i];
  return s;
}

// ---- small matrix products: C[m][lanes] (+)= sum_r A(m, r) B[r][lanes] -----------------------------------

struct Left {  // A(m, r) = data[m * step_m + r * step_r]
  const float* data;
  int64_t step_m, step_r;
};

template <int NV, int MR, bool ADD>
inline void product_tile(int R, const float* a, int64_t step_m, int64_t step_r, const float* b, int64_t ldb,
                         float* c, int64_t ldc) {
  vec acc[MR][NV] = {};
  for (int r = 0; r < R; ++r) {
    if (NV > MR) {  // hold the fewer operand in registers
      vec left[MR];
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) left[m] = splat(a[m * step_m]);
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) {
        vec right = load(b + j * L);
        keep_loaded(right);
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) acc[m][j] += left[m] * right;
      }
    } else {
      vec right[NV];
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) keep_loaded(right[j] = load(b + j * L));
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        const vec left = splat(a[m * step_m]);
#pragma GCC unroll 16
        for (int j = 0; j < NV; ++j) acc[m][j] += left * right[j];
      }
    }
    a += step_r;
    b += ldb;
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) {
      float* to = c + m * ldc + j * L;
      store(to, ADD ? load(to) + acc[m][j] : acc[m][j]);
    }
}

template <int NV, int MR, bool ADD>
void product_panel(int M, int R, Left a, const float* b, int64_t ldb, float* c, int64_t ldc) {
  int m = 0;
  for (; m + MR <= M; m += MR)
    product_tile<NV, MR, ADD>(R, a.data + m * a.step_m, a.step_m, a.step_r, b, ldb, c + m * ldc, ldc);
  if constexpr (MR > 1)
    if (m < M)
      product_panel<NV, (MR + 1) / 2, ADD>(M - m, R, {a.data + m * a.step_m, a.step_m, a.step_r}, b, ldb,
                                           c + m * ldc, ldc);
}

template <bool ADD>
void product(int M, int R, int num_vecs, Left a, const float* b, int64_t ldb, float* c, int64_t ldc) {
#if defined(__AVX512VL__)
  constexpr int M4 = 6, M3 = 8, M2 = 8, M1 = 8;  // 32 vector registers
#else
  constexpr int M4 = 3, M3 = 4, M2 = 6, M1 = 8;  // 16
#endif
  while (num_vecs > 0) {
    const int nv = num_vecs == 5 || num_vecs == 6 ? 3 : std::min(num_vecs, 4);
    if (nv == 4) product_panel<4, M4, ADD>(M, R, a, b, ldb, c, ldc);
    if (nv == 3) product_panel<3, M3, ADD>(M, R, a, b, ldb, c, ldc);
    if (nv == 2) product_panel<2, M2, ADD>(M, R, a, b, ldb, c, ldc);
    if (nv == 1) product_panel<1, M1, ADD>(M, R, a, b, ldb, c, ldc);
    num_vecs -= nv, b += nv * L, c += nv * L;
  }
}

// ---- packing ---------------------------------------------------------------------------------------------

inline float from_bf16(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (f != f) return 0x7fc0;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // round to nearest even
}

inline void read_row(float* to, const void* from, int64_t at, int width, float scale, bool bf16) {
  if (bf16)
    for (int e = 0; e < width; ++e) to[e] = scale * from_bf16(((const uint16_t*)from)[at + e]);
  else
    for (int e = 0; e < width; ++e) to[e] = scale * ((const float*)from)[at + e];
}

inline void write_row(void* to, int64_t at, const float* from, int width, float scale, bool bf16) {
  if (bf16)
    for (int e = 0; e < width; ++e) ((uint16_t*)to)[at + e] = to_bf16(scale * from[e]);
  else
    for (int e = 0; e < width; ++e) ((float*)to)[at + e] = scale * from[e];
}

// Rows of one head lie pages apart, where the processor does not foresee the next: it is told a few rows ahead.
constexpr int AHEAD = 8;
inline void expect_row(const void* from, int64_t at, int width, bool bf16) {
  const char* row = (const char*)from + at * (bf16 ? 2 : 4);
  for (int byte = 0; byte < width * (bf16 ? 2 : 4); byte += 64) __builtin_prefetch(row + byte);
}

// Going back, values are read once a tile, so float32 rows of whole vectors are left where they are: on two threads
// that is a 30th of the peak of a long clip. Keys are read twice and packed.
inline bool values_in_place(const Problem& p) { return p.grad_qkv && !p.bf16 && p.width % L == 0; }

// Buffers of one thread, cut from its part of the scratch.
struct Buffers {
  float *k, *v, *dk, *dv, *table, *dtable, *q, *dout, *q_lanes, *dout_lanes, *result, *scores, *dscores;
  int32_t *codes, *key_codes;

  static int64_t layout(const Problem& p, float* base, Buffers* to) {
    const int64_t wide = round_up(p.width, L), n = p.tokens, backward = p.grad_qkv != nullptr;
    float* next = base;
    auto take = [&](int64_t floats) {
      float* part = next;
      next += round_up(floats, 16);
      return part;
    };
    Buffers b;
    b.k = take(n * wide), b.v = take(values_in_place(p) ? 0 : n * wide);
    b.dk = take(backward * n * wide), b.dv = take(backward * n * wide);
    b.table = take(p.table_rows + 2 * L), b.dtable = take(backward * (p.table_rows + 2 * L));
    b.q = take(TILE * wide), b.q_lanes = take(p.width * TILE);
    b.dout = take(TILE * wide), b.dout_lanes = take(p.width * TILE);
    b.result = take(TILE * wide);
    b.scores = take(std::max<int64_t>((backward ? TILE : CHUNK) * TILE, n + L));
    b.dscores = take(backward * std::max<int64_t>(TILE * TILE, n + L));
    b.codes = (int32_t*)take(n + 2 * L), b.key_codes = (int32_t*)take(CHUNK);
    if (to) *to = b;
    return next - base;
  }
};

struct Piece {  // keys [token, token + count) of one block; CLS is {0, 1}
  int token, count;
};

// Patch queries [first, first + count), and how table rows run along each vector of them: one run of
// consecutive codes, two runs (`low` marks the first), or any codes.
struct Tile {
  enum Kind { RUN, TWO_RUNS, SCATTERED };
  int first, count, num_vecs, stride;
  Kind kind[TILE / L];
  int low_base[TILE / L], high_base[TILE / L];
  ivec low[TILE / L], codes[TILE / L];
};

// One (sample, head): its packed keys and values, and the passes over its queries.
class Head {
 public:
  Head(const Problem& p, float* scratch)
      : p_(p), n_(int(p.tokens)), width_(int(p.width)), wide_(int(round_up(p.width, L))), vecs_(wide_ / L) {
    Buffers::layout(p, scratch, &at_);
    for (float* rows : {at_.q, at_.dout}) std::fill(rows, rows + TILE * wide_, 0.0f);  // lanes past the width
    if (wide_ == width_) return;
    std::fill(at_.k, at_.k + n_ * wide_, 0.0f);
    std::fill(at_.v, at_.v + n_ * wide_, 0.0f);
  }

  void open(int64_t head) {
    head_ = head;
    const int64_t rows = p_.table_rows;
    std::fill(at_.table, at_.table + L, 0.0f);
    for (int64_t r = 0; r < rows - 3; ++r) at_.table[L + r] = p_.table[r * p_.heads + head];
    std::fill(at_.table + L + rows - 3, at_.table + rows + 2 * L, 0.0f);
    auto last = [&](int back) { return p_.table[(rows - back) * p_.heads + head]; };
    cls_to_patch_ = last(3), patch_to_cls_ = last(2), cls_to_cls_ = last(1);
    bias_ = at_.table + L + (rows - 4) / 2;
    if (!p_.grad_qkv) return;
    std::fill(at_.dtable, at_.dtable + rows + 2 * L, 0.0f);
    dbias_ = at_.dtable + L + (rows - 4) / 2;
    dcls_to_patch_ = dpatch_to_cls_ = dcls_to_cls_ = 0;
  }

  void forward(int64_t sample) {
    pack(sample);
    forward_cls();
    each_tile([&](Tile& tile) { forward_tile(tile); });
  }

  void backward(int64_t sample) {
    pack(sample);
    std::fill(at_.dk, at_.dk + n_ * wide_, 0.0f);
    std::fill(at_.dv, at_.dv + n_ * wide_, 0.0f);
    backward_cls();
    each_tile([&](Tile& tile) { backward_tile(tile); });
    for (int i = 0; i < n_; ++i) {
      const int later = std::min(i + AHEAD, n_ - 1);
      expect_row(p_.grad_qkv, grad_at(later, 1), width_, p_.bf16);
      expect_row(p_.grad_qkv, grad_at(later, 2), width_, p_.bf16);
      write_row(p_.grad_qkv, grad_at(i, 1), at_.dk + i * wide_, width_, 1.0f, p_.bf16);
      write_row(p_.grad_qkv, grad_at(i, 2), at_.dv + i * wide_, width_, 1.0f, p_.bf16);
    }
  }

  void write_table_gradient(int64_t group) {
    float* to = p_.grad_table + (group * p_.heads + head_) * p_.table_rows;
    std::copy(at_.dtable + L, at_.dtable + L + p_.table_rows - 3, to);
    to += p_.table_rows - 3;
    to[0] = dcls_to_patch_, to[1] = dpatch_to_cls_, to[2] = dcls_to_cls_;
  }

 private:
  int64_t qkv_at(int token, int part) const {
    return sample_ * p_.stride_batch + token * p_.stride_token + part * p_.stride_part + head_ * p_.stride_head;
  }
  int64_t grad_at(int token, int part) const {
    return (((sample_ * n_ + token) * 3 + part) * p_.heads + head_) * width_;
  }
  int64_t out_at(int token) const { return ((sample_ * n_ + token) * p_.heads + head_) * width_; }
  float* lse() const { return p_.lse + (sample_ * p_.heads + head_) * n_; }
  float scale() const { return 1.0f / std::sqrt(float(width_)); }
  bool hidden(int token) const { return p_.key_mask && !p_.key_mask[sample_ * n_ + token]; }

  void pack(int64_t sample) {
    sample_ = sample;
    const bool in_place = values_in_place(p_);
    v_ = in_place ? (const float*)p_.qkv + qkv_at(0, 2) : at_.v;
    v_stride_ = in_place ? int(p_.stride_token) : wide_;
    for (int i = 0; i < n_; ++i) {
      const int later = std::min(i + AHEAD, n_ - 1);
      expect_row(p_.qkv, qkv_at(later, 1), width_, p_.bf16);
      read_row(at_.k + i * wide_, p_.qkv, qkv_at(i, 1), width_, 1.0f, p_.bf16);
      if (in_place) continue;
      expect_row(p_.qkv, qkv_at(later, 2), width_, p_.bf16);
      read_row(at_.v + i * wide_, p_.qkv, qkv_at(i, 2), width_, 1.0f, p_.bf16);
    }
    const int64_t* codes = p_.codes + sample * p_.codes_stride;
    at_.codes[0] = 0;  // CLS has none
    for (int i = 1; i < n_; ++i) at_.codes[i] = int32_t(codes[i - 1]);
  }

  // Tiles of one query block after the other, as even as whole vectors allow, with the pieces that they see.
  template <class Visit>
  void each_tile(Visit visit) {
    const int patches = n_ - 1, block = p_.slots < 0 ? patches : int(p_.block_size);
    const int parts = (block + TILE - 1) / TILE, size = int(round_up((block + parts - 1) / parts, L));
    for (int number = 0; number * block < patches; ++number) {
      list_pieces(number);
      const int end = std::min((number + 1) * block, patches);
      for (int first = number * block; first < end; first += size) {
        Tile tile;
        open_tile(tile, first, std::min(size, end - first));
        visit(tile);
      }
    }
  }

  void list_pieces(int block) {
    pieces_.assign(1, {0, 1});
    auto add = [&](int token, int count) {
      for (; count > 0; token += TILE, count -= TILE) pieces_.push_back({token, std::min(count, TILE)});
    };
    if (p_.slots < 0) return add(1, n_ - 1);
    for (int64_t k = 0; k < p_.slots; ++k) {
      const int64_t listed = p_.key_blocks[block * p_.slots + k], token = 1 + listed * p_.block_size;
      if (listed >= 0) add(int(token), int(std::min(p_.block_size, n_ - token)));
    }
  }

  void open_tile(Tile& tile, int first, int count) {
    tile.first = first, tile.count = count, tile.num_vecs = (count + L - 1) / L;
    tile.stride = tile.num_vecs * L;
    pack_queries(tile, at_.q, at_.q_lanes, p_.qkv, scale(), [&](int token) { return qkv_at(token, 0); });
    for (int j = 0; j < tile.num_vecs; ++j) {
      int breaks = 0, place = L, previous = 0;
      for (int i = 0; i < L; ++i) {
        const int query = j * L + i;
        // Lanes past the last query go on counting: their rows exist in the padding, their weight is never used.
        const int code = query < count ? at_.codes[1 + first + query] : previous + 1;
        if (i && code != previous + 1) ++breaks, place = i;
        tile.codes[j][i] = previous = code;
      }
      tile.kind[j] = breaks == 0 ? Tile::RUN : breaks == 1 ? Tile::TWO_RUNS : Tile::SCATTERED;
      tile.low_base[j] = tile.codes[j][0], tile.high_base[j] = tile.codes[j][L - 1] - (L - 1);
      for (int i = 0; i < L; ++i) tile.low[j][i] = i < place ? -1 : 0;
    }
  }

  // Rows of a tile as they are, and transposed so that queries run along lanes.
  template <class At>
  void pack_queries(const Tile& tile, float* rows, float* lanes, const void* from, float scale, At at) {
    for (int i = 0; i < tile.count; ++i) {
      expect_row(from, at(1 + tile.first + std::min(i + AHEAD, tile.count - 1)), width_, p_.bf16);
      read_row(rows + i * wide_, from, at(1 + tile.first + i), width_, scale, p_.bf16);
    }
    for (int e = 0; e < width_; ++e) {
      float* to = lanes + e * tile.stride;
      for (int i = 0; i < tile.count; ++i) to[i] = rows[i * wide_ + e];
      for (int i = tile.count; i < tile.stride; ++i) to[i] = 0.0f;
    }
  }

  // use(key, bias of the tile's j-th vector of queries) for keys [from, to) of `codes`.
  template <class Use>
  void with_bias(const Tile& tile, int j, const int32_t* codes, int from, int to, Use use) const {
    const float *low = bias_ + tile.low_base[j], *high = bias_ + tile.high_base[j];
    if (tile.kind[j] == Tile::RUN)
      for (int k = from; k < to; ++k) use(k, load(low - codes[k]));
    else if (tile.kind[j] == Tile::TWO_RUNS)
      for (int k = from; k < to; ++k) use(k, tile.low[j] ? load(low - codes[k]) : load(high - codes[k]));
    else
      for (int k = from; k < to; ++k) use(k, gather(bias_, tile.codes[j] - codes[k]));
  }

  // Key by key: the next vector that meets the same rows then comes late enough for its loads to find them stored.
  void add_bias_gradient(const Tile& tile, const int32_t* codes, int count) {
    for (int k = 0; k < count; ++k) {
      float* rows = dbias_ - codes[k];
      const float* grad = at_.dscores + k * tile.stride;
      for (int j = 0; j < tile.num_vecs; ++j, grad += L) {
        float *low = rows + tile.low_base[j], *high = rows + tile.high_base[j];
        const vec g = load(grad);
        if (tile.kind[j] == Tile::RUN) {
          store(low, load(low) + g);
        } else if (tile.kind[j] == Tile::TWO_RUNS && high - low >= L) {
          store(low, load(low) + (tile.low[j] ? g : vec{}));
          store(high, load(high) + (tile.low[j] ? vec{} : g));
        } else {
          for (int i = 0; i < L; ++i) rows[tile.codes[j][i]] += grad[i];
        }
      }
    }
  }

  void forward_tile(const Tile& tile) {
    vec top[TILE / L], total[TILE / L];
    for (int j = 0; j < tile.num_vecs; ++j) top[j] = splat(-INFINITY), total[j] = vec{};
    std::fill(at_.result, at_.result + tile.count * wide_, 0.0f);
    for (size_t piece = 0; piece < pieces_.size();) {
      const size_t begin = piece;
      int rows = 0;
      for (; piece < pieces_.size() && rows + pieces_[piece].count <= CHUNK; ++piece) {
        const Piece keys = pieces_[piece];
        product<false>(keys.count, width_, tile.num_vecs, {at_.k + keys.token * wide_, wide_, 1}, at_.q_lanes,
                       tile.stride, at_.scores + rows * tile.stride, tile.stride);
        std::copy_n(at_.codes + keys.token, keys.count, at_.key_codes + rows);
        rows += keys.count;
      }
      softmax_chunk(tile, begin, piece, rows, top, total);
      rows = 0;
      for (size_t i = begin; i < piece; rows += pieces_[i++].count)
        product<true>(tile.count, pieces_[i].count, vecs_, {at_.scores + rows * tile.stride, 1, tile.stride},
                      at_.v + pieces_[i].token * wide_, wide_, at_.result, wide_);
    }
    for (int i = 0; i < tile.count; ++i) {
      const int token = 1 + tile.first + i;
      write_row(p_.out, out_at(token), at_.result + i * wide_, width_, 1.0f / total[i / L][i % L], p_.bf16);
      lse()[token] = top[i / L][i % L] + std::log(total[i / L][i % L]);
    }
  }

  // Scores of `rows` keys become weights relative to the highest score so far; what was added up is rescaled.
  void softmax_chunk(const Tile& tile, size_t begin, size_t end, int rows, vec* top, vec* total) {
    const int has_cls = begin == 0;
    vec shrink[TILE / L];
    hide(tile, begin, end);
    for (int j = 0; j < tile.num_vecs; ++j) {
      float* scores = at_.scores + j * L;
      vec high = top[j];
      if (has_cls) {
        const vec s = load(scores) + patch_to_cls_;
        store(scores, s);
        high = s > high ? s : high;
      }
      with_bias(tile, j, at_.key_codes, has_cls, rows, [&](int k, vec bias) {
        const vec s = load(scores + k * tile.stride) + bias;
        store(scores + k * tile.stride, s);
        high = s > high ? s : high;
      });
      shrink[j] = exp_negative(top[j] - high);
      vec sum = total[j] * shrink[j];
      for (int k = 0; k < rows; ++k) {
        const vec weight = exp_negative(load(scores + k * tile.stride) - high);
        store(scores + k * tile.stride, weight);
        sum += weight;
      }
      top[j] = high, total[j] = sum;
    }
    if (has_cls) return;
    for (int i = 0; i < tile.count; ++i)
      for (int e = 0; e < wide_; ++e) at_.result[i * wide_ + e] *= shrink[i / L][i % L];
  }

  void hide(const Tile& tile, size_t begin, size_t end) {
    if (!p_.key_mask) return;
    float* row = at_.scores;
    for (size_t i = begin; i < end; ++i)
      for (int k = 0; k < pieces_[i].count; ++k, row += tile.stride)
        if (hidden(pieces_[i].token + k)) std::fill(row, row + tile.stride, -INFINITY);
  }

  void backward_tile(const Tile& tile) {
    pack_queries(tile, at_.dout, at_.dout_lanes, p_.grad_out, 1.0f, [&](int token) { return out_at(token); });
    float lse_row[TILE], delta_row[TILE];
    for (int i = 0; i < tile.stride; ++i) {
      // Lanes past the last query: weight 0.
      lse_row[i] = i < tile.count ? lse()[1 + tile.first + i] : INFINITY;
      if (i + AHEAD < tile.count) expect_row(p_.out, out_at(1 + tile.first + i + AHEAD), width_, p_.bf16);
      delta_row[i] = i < tile.count ? dot_with_out(1 + tile.first + i, at_.dout + i * wide_) : 0.0f;
    }
    std::fill(at_.result, at_.result + tile.count * wide_, 0.0f);
    for (const Piece keys : pieces_) {
      const float *k = at_.k + keys.token * wide_, *v = v_ + int64_t(keys.token) * v_stride_;
      product<false>(keys.count, width_, tile.num_vecs, {k, wide_, 1}, at_.q_lanes, tile.stride, at_.scores,
                     tile.stride);
      product<false>(keys.count, width_, tile.num_vecs, {v, v_stride_, 1}, at_.dout_lanes, tile.stride,
                     at_.dscores, tile.stride);
      if (p_.key_mask)
        for (int i = 0; i < keys.count; ++i)
          if (hidden(keys.token + i))
            std::fill_n(at_.scores + i * tile.stride, tile.stride, -INFINITY);
      score_gradients(tile, keys, lse_row, delta_row);
      product<true>(keys.count, tile.count, vecs_, {at_.scores, tile.stride, 1}, at_.dout, wide_,
                    at_.dv + keys.token * wide_, wide_);
      product<true>(keys.count, tile.count, vecs_, {at_.dscores, tile.stride, 1}, at_.q, wide_,
                    at_.dk + keys.token * wide_, wide_);
      product<true>(tile.count, keys.count, vecs_, {at_.dscores, 1, tile.stride}, k, wide_, at_.result, wide_);
    }
    for (int i = 0; i < tile.count; ++i)
      write_row(p_.grad_qkv, grad_at(1 + tile.first + i, 0), at_.result + i * wide_, width_, scale(), p_.bf16);
  }

  // `scores` become weights, `dscores` (gradients of the weights) gradients of the scores.
  void score_gradients(const Tile& tile, Piece keys, const float* lse_row, const float* delta_row) {
    for (int j = 0; j < tile.num_vecs; ++j) {
      const vec lse = load(lse_row + j * L), delta = load(delta_row + j * L);
      auto step = [&](int k, vec bias) {
        float *score = at_.scores + k * tile.stride + j * L, *dscore = at_.dscores + k * tile.stride + j * L;
        const vec weight = exp_negative(load(score) + bias - lse), grad = weight * (load(dscore) - delta);
        store(score, weight);
        store(dscore, grad);
        return grad;
      };
      if (keys.token == 0)
        dpatch_to_cls_ += sum_lanes(step(0, splat(patch_to_cls_)));
      else
        with_bias(tile, j, at_.codes + keys.token, 0, keys.count, step);
    }
    if (keys.token != 0) add_bias_gradient(tile, at_.codes + keys.token, keys.count);
  }

  // CLS sees every key: scores (tokens), padded with -inf to whole vectors.
  int cls_scores() {
    read_row(at_.q, p_.qkv, qkv_at(0, 0), width_, scale(), p_.bf16);
    for (int i = 0; i < n_; ++i)
      at_.scores[i] =
          hidden(i) ? -INFINITY : dot(at_.q, at_.k + i * wide_) + (i ? cls_to_patch_ : cls_to_cls_);
    const int padded = int(round_up(n_, L));
    std::fill(at_.scores + n_, at_.scores + padded, -INFINITY);
    return padded;
  }

  void forward_cls() {
    const int padded = cls_scores();
    const float top = *std::max_element(at_.scores, at_.scores + n_);
    vec sum = {};
    for (int i = 0; i < padded; i += L) {
      const vec weight = exp_negative(load(at_.scores + i) - top);
      store(at_.scores + i, weight);
      sum += weight;
    }
    const float total = sum_lanes(sum);
    product<false>(1, n_, vecs_, {at_.scores, 0, 1}, at_.v, wide_, at_.result, wide_);
    write_row(p_.out, out_at(0), at_.result, width_, 1.0f / total, p_.bf16);
    lse()[0] = top + std::log(total);
    if (!p_.cls_weights) return;
    float* to = p_.cls_weights + (sample_ * p_.heads + head_) * (n_ - 1);
    for (int i = 1; i < n_; ++i) to[i - 1] = at_.scores[i] / total;
  }

  void backward_cls() {
    const int padded = cls_scores();
    read_row(at_.dout, p_.grad_out, out_at(0), width_, 1.0f, p_.bf16);
    const float delta = dot_with_out(0, at_.dout), lse_0 = lse()[0];
    for (int i = 0; i < padded; i += L)
      store(at_.scores + i, exp_negative(load(at_.scores + i) - lse_0));
    float patches = 0;
    for (int i = 0; i < n_; ++i) {
      at_.dscores[i] = at_.scores[i] * (dot(at_.dout, v_ + int64_t(i) * v_stride_) - delta);
      if (i) patches += at_.dscores[i];
    }
    dcls_to_patch_ += patches, dcls_to_cls_ += at_.dscores[0];
    product<true>(n_, 1, vecs_, {at_.scores, 1, 0}, at_.dout, wide_, at_.dv, wide_);
    product<true>(n_, 1, vecs_, {at_.dscores, 1, 0}, at_.q, wide_, at_.dk, wide_);
    product<false>(1, n_, vecs_, {at_.dscores, 0, 1}, at_.k, wide_, at_.result, wide_);
    write_row(p_.grad_qkv, grad_at(0, 0), at_.result, width_, scale(), p_.bf16);
  }

  float dot(const float* x, const float* y) const {
    vec sum = {};
    for (int e = 0; e < wide_; e += L) sum += load(x + e) * load(y + e);
    return sum_lanes(sum);
  }

  float dot_with_out(int token, const float* x) {
    float* row = at_.result;  // free at this time
    read_row(row, p_.out, out_at(token), width_, 1.0f, p_.bf16);
    std::fill(row + width_, row + wide_, 0.0f);
    return dot(row, x);
  }

  const Problem& p_;
  const int n_, width_, wide_, vecs_;
  Buffers at_;
  std::vector<Piece> pieces_;
  const float* v_ = nullptr;
  int v_stride_ = 0;
  int64_t sample_ = 0, head_ = 0;
  const float* bias_ = nullptr;
  float* dbias_ = nullptr;
  float cls_to_patch_ = 0, patch_to_cls_ = 0, cls_to_cls_ = 0;
  float dcls_to_patch_ = 0, dpatch_to_cls_ = 0, dcls_to_cls_ = 0;
};

struct Work {
  const Problem& problem;
  int64_t tasks;
  void (*run)(const Problem&, int64_t task, float* scratch);
  std::atomic<int64_t> next_task{0}, next_thread{0};
};

void work_off(void* data) {
  Work& work = *(Work*)data;
  float* scratch = work.problem.scratch + work.next_thread++ * Buffers::layout(work.problem, nullptr, nullptr);
  for (int64_t task; (task = work.next_task++) < work.tasks;) work.run(work.problem, task, scratch);
}

// Through the process's own OpenMP runtime where there is one: a second pool would fight its spinning threads.
void run_all(Work work) {
  const int64_t threads = std::min(work.problem.threads, work.tasks);
  if (threads <= 1) return work_off(&work);
  if (work.problem.parallel) return work.problem.parallel(work_off, &work, unsigned(threads), 0);
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back(work_off, &work);
  work_off(&work);
  for (auto& other : others) other.join();
}
}  // namespace

extern "C" {

int64_t svitt_scratch_floats(const Problem* p) { return Buffers::layout(*p, nullptr, nullptr); }

// What is wrong with the index tensors, or null: they are followed without further checks.
const char* svitt_check(const Problem* p) {
  const int64_t patches = p->tokens - 1, blocks = p->slots < 0 ? 1 : (patches + p->block_size - 1) / p->block_size;
  for (int64_t i = 0; i < blocks * std::max<int64_t>(p->slots, 0); ++i)
    if (p->key_blocks[i] < -1 || p->key_blocks[i] >= blocks) return "key_blocks lists a block that does not exist";
  for (int64_t b = 0; b < (p->codes_stride ? p->batch : 1); ++b) {
    const auto [low, high] = std::minmax_element(p->codes + b * patches, p->codes + (b + 1) * patches);
    if (*high - *low > (p->table_rows - 4) / 2) return "codes lie farther apart than the position table reaches";
  }
  return nullptr;
}

void svitt_forward(const Problem* problem) {
  run_all({*problem, problem->batch * problem->heads, [](const Problem& p, int64_t task, float* scratch) {
             Head head(p, scratch);
             head.open(task % p.heads);
             head.forward(task / p.heads);
           }});
}

void svitt_backward(const Problem* problem) {
  run_all({*problem, problem->groups * problem->heads, [](const Problem& p, int64_t task, float* scratch) {
             const int64_t group = task / p.heads;
             Head head(p, scratch);
             head.open(task % p.heads);
             for (int64_t b = p.batch * group / p.groups; b < p.batch * (group + 1) / p.groups; ++b)
               head.backward(b);
             head.write_table_gradient(group);
           }});
}
}
