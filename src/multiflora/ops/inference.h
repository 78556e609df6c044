// inference.py for processors. A few tokens are multiplied in loops over vectors: a call of a library takes longer for
// them than their numbers do. Sums are kept in float32 (float64 for float64), and the compiler is free to order them.

#pragma once

#include "packing.h"

#include <ATen/cpu/vec/vec.h>

#include <cmath>
#include <limits>
#include <vector>

namespace {

// From so many tokens on a library's product is faster than the loops
constexpr int64_t FEW = 64;

template <typename Wide>
using Vector = at::vec::Vectorized<Wide>;

// A vector of numbers in the type they are added up in
inline Vector<float> wide(const float* from) { return Vector<float>::loadu(from); }
inline Vector<double> wide(const double* from) { return Vector<double>::loadu(from); }
inline Vector<float> wide(const at::BFloat16* from) {
  Vector<float> out;
  at::vec::load_fp32_from_bf16(from, out);
  return out;
}
inline Vector<float> wide(const at::Half* from) {
  Vector<float> out;
  at::vec::load_fp32_from_fp16(from, out);
  return out;
}

template <typename Wide>
Wide total(const Vector<Wide>& vector) {
  Wide lanes[Vector<Wide>::size()], sum = 0;
  vector.store(lanes);
  for (const auto lane : lanes) sum += lane;
  return sum;
}

// read[t][k] = x[t] . rows[k] for some tokens and rows: each vector of x and of rows is loaded once
template <int TOKENS, int ROWS, typename Wide, typename T>
void dots(Wide* read, int64_t of_read, const T* x, const T* rows, int64_t width) {
  constexpr int64_t LANES = Vector<Wide>::size();
  Vector<Wide> sums[TOKENS][ROWS];
  for (auto& of_token : sums)
    for (auto& sum : of_token) sum = Vector<Wide>(0);
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) {
    Vector<Wide> loaded[ROWS];
    for (int k = 0; k < ROWS; ++k) loaded[k] = wide(rows + k * width + i);
    for (int t = 0; t < TOKENS; ++t) {
      const auto here = wide(x + t * width + i);
      for (int k = 0; k < ROWS; ++k) sums[t][k] = at::vec::fmadd(here, loaded[k], sums[t][k]);
    }
  }
  for (int t = 0; t < TOKENS; ++t)
    for (int k = 0; k < ROWS; ++k) {
      auto sum = total<Wide>(sums[t][k]);
      for (auto j = i; j < width; ++j)
        sum += static_cast<Wide>(x[t * width + j]) * static_cast<Wide>(rows[k * width + j]);
      read[t * of_read + k] = sum;
    }
}

template <int TOKENS, typename Wide, typename T>
void dots(Wide* read, const T* x, const T* rows, int64_t count, int64_t width) {
  constexpr int ROWS = TOKENS == 1 ? 4 : 2;  // sums of 4 tokens and 2 rows, and what they are made of, fit registers
  int64_t k = 0;
  for (; k + ROWS <= count; k += ROWS) dots<TOKENS, ROWS>(read + k, count, x, rows + k * width, width);
  for (; k < count; ++k) dots<TOKENS, 1>(read + k, count, x, rows + k * width, width);
}

// y[t] += z[t] columns, for some tokens and the outputs [from, to)
template <int TOKENS, int VECTORS, typename Wide, typename T>
void add_block(T* y, const Wide* z, const T* columns, int64_t inner, int64_t width, int64_t at) {
  constexpr int64_t LANES = Vector<Wide>::size();
  Vector<Wide> sums[TOKENS][VECTORS];
  for (int t = 0; t < TOKENS; ++t)
    for (int v = 0; v < VECTORS; ++v) sums[t][v] = wide(y + t * width + at + v * LANES);
  for (int64_t j = 0; j < inner; ++j) {
    Vector<Wide> loaded[VECTORS];
    for (int v = 0; v < VECTORS; ++v) loaded[v] = wide(columns + j * width + at + v * LANES);
    for (int t = 0; t < TOKENS; ++t) {
      const Vector<Wide> by(z[t * inner + j]);
      for (int v = 0; v < VECTORS; ++v) sums[t][v] = at::vec::fmadd(by, loaded[v], sums[t][v]);
    }
  }
  for (int t = 0; t < TOKENS; ++t)
    for (int v = 0; v < VECTORS; ++v) {
      Wide lanes[LANES];
      sums[t][v].store(lanes);
      for (int64_t l = 0; l < LANES; ++l) y[t * width + at + v * LANES + l] = static_cast<T>(lanes[l]);
    }
}

template <int TOKENS, typename Wide, typename T>
void add(T* y, const Wide* z, const T* columns, int64_t inner, int64_t width, int64_t from, int64_t to) {
  constexpr int64_t LANES = Vector<Wide>::size();
  auto at = from;
  for (; at + 2 * LANES <= to; at += 2 * LANES) add_block<TOKENS, 2>(y, z, columns, inner, width, at);
  for (; at < to; ++at)
    for (int t = 0; t < TOKENS; ++t) {
      auto sum = static_cast<Wide>(y[t * width + at]);
      for (int64_t j = 0; j < inner; ++j) sum += z[t * inner + j] * static_cast<Wide>(columns[j * width + at]);
      y[t * width + at] = static_cast<T>(sum);
    }
}

struct Branch {
  int64_t heads, rank;
  bool routed;
  int64_t top_k;
  int64_t stems, offset;  // numbers of u and of u0 in what a token reads

  Branch(const Tensor& rows, const Tensor& columns, int64_t heads, int64_t rank, bool routed, int64_t top_k)
      : heads(heads), rank(rank), routed(routed), top_k(top_k),
        stems(rows.size(0) - (columns.size(0) - heads * rank) - (routed ? heads : 0)),
        offset(columns.size(0) - heads * rank) {
    TORCH_CHECK(stems == rank || stems == heads * rank, "prepared rows have ", stems, " stems; with ", heads,
                " heads of rank ", rank, " they have ", rank, " or ", heads * rank);
  }
};

// Softmax over a token's logits, in place; of the k largest alone where top_k is given
template <typename Wide>
void softmax(Wide* logits, int64_t count, int64_t top_k) {
  if (top_k > 0 && top_k < count) {
    std::vector<int64_t> order(count);
    for (int64_t i = 0; i < count; ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](auto one, auto other) { return logits[one] > logits[other]; });
    for (auto i = top_k; i < count; ++i) logits[order[i]] = -std::numeric_limits<Wide>::infinity();
  }
  const auto most = *std::max_element(logits, logits + count);
  Wide sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += logits[i] = std::exp(logits[i] - most);
  for (int64_t i = 0; i < count; ++i) logits[i] /= sum;
}

// What a token read becomes what its heads write: [g_h u_h ...; u0]
template <typename Wide>
void blend(Wide* z, Wide* read, const Wide* gate, const Branch& branch) {
  auto* logits = read + branch.stems;
  if (branch.routed) softmax(logits, branch.heads, branch.top_k);
  const auto* weights = branch.routed ? logits : gate;
  const bool shared = branch.stems == branch.rank;
  for (int64_t h = 0; h < branch.heads; ++h)
    for (int64_t j = 0; j < branch.rank; ++j)
      z[h * branch.rank + j] = read[shared ? j : h * branch.rank + j] * (weights ? weights[h] : Wide(1));
  const auto* frozen = logits + (branch.routed ? branch.heads : 0);
  std::copy(frozen, frozen + branch.offset, z + branch.heads * branch.rank);
}

template <typename Number, typename Work>
void by_tokens(Number tokens, const Work& work) {
  Number t = 0;
  for (; t + 4 <= tokens; t += 4) work(t, std::integral_constant<int, 4>());
  for (; t < tokens; ++t) work(t, std::integral_constant<int, 1>());
}

// y += the branches of x, (T, d_in), in loops; the rows of a weight are shared out among threads
template <typename T>
void add_few(T* y, const T* x, const T* rows, const T* columns, const at::opmath_type<T>* gate, const Branch& branch,
             int64_t tokens, int64_t count, int64_t inner, int64_t d_in, int64_t d_out) {
  using Wide = at::opmath_type<T>;
  std::vector<Wide> read(tokens * count), z(tokens * inner);
  by_tokens(tokens, [&](int64_t t, auto some) {
    dots<some.value>(read.data() + t * count, x + t * d_in, rows, count, d_in);
  });
  for (int64_t t = 0; t < tokens; ++t)
    blend(z.data() + t * inner, read.data() + t * count, gate ? gate + t * branch.heads : nullptr, branch);
  constexpr int64_t STRIP = 64;
  share_out((d_out + STRIP - 1) / STRIP, STRIP * inner * tokens, [&](int64_t strip) {
    const auto from = strip * STRIP, to = std::min(from + STRIP, d_out);
    by_tokens(tokens, [&](int64_t t, auto some) {
      add<some.value>(y + t * d_out, z.data() + t * inner, columns, inner, d_out, from, to);
    });
  });
}

// The same by a library's products
void add_many(Tensor y, const Tensor& x, const Tensor& rows, const Tensor& columns, const Tensor& gate,
              const Branch& branch) {
  const auto read = at::linear(x, rows), z = at::empty({x.size(0), columns.size(0)}, x.options());
  const auto weights = cast(gate, at::toOpMathType(x.scalar_type()));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "infer", [&] {
    using Wide = at::opmath_type<scalar_t>;
    const auto *from = read.const_data_ptr<scalar_t>();
    const auto *by = weights.defined() ? weights.const_data_ptr<Wide>() : nullptr;
    auto* to = z.mutable_data_ptr<scalar_t>();
    const auto count = rows.size(0), inner = columns.size(0);
    at::parallel_for(0, x.size(0), 64, [&](int64_t begin, int64_t end) {
      std::vector<Wide> of_token(count), made(inner);
      for (auto t = begin; t < end; ++t) {
        for (int64_t k = 0; k < count; ++k) of_token[k] = static_cast<Wide>(from[t * count + k]);
        blend(made.data(), of_token.data(), by ? by + t * branch.heads : nullptr, branch);
        for (int64_t j = 0; j < inner; ++j) to[t * inner + j] = static_cast<scalar_t>(made[j]);
      }
    });
  });
  y.addmm_(z, columns);
}

// y += the branches of x, (T, d_in), the way that is faster for so many tokens; all are contiguous and of one type
void add(const Tensor& y, const Tensor& x, const Tensor& rows, const Tensor& columns, const Tensor& gate,
         const Branch& branch) {
  if (x.size(0) >= FEW) return add_many(y, x, rows, columns, gate, branch);
  const auto weights = cast(gate, at::toOpMathType(x.scalar_type()));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "infer", [&] {
    using Wide = at::opmath_type<scalar_t>;
    add_few<scalar_t>(y.mutable_data_ptr<scalar_t>(), x.const_data_ptr<scalar_t>(), rows.const_data_ptr<scalar_t>(),
                      columns.const_data_ptr<scalar_t>(),
                      weights.defined() ? weights.const_data_ptr<Wide>() : nullptr, branch, x.size(0), rows.size(0),
                      columns.size(0), x.size(1), columns.size(1));
  });
}

}  // namespace
