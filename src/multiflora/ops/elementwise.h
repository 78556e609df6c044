// elementwise.py for processors, in loops of its own, which round where torch's calls round.

#pragma once

#include "mask.h"
#include "packing.h"

#include <array>

namespace {

struct Sizes {
  int64_t heads, rank;
};

// A loop a product, rounded as torch's call would round it: c10's numbers do that by themselves
template <typename T>
const T* times(T* out, const T* one, const T* other, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = one[i] * other[i];
  return out;
}

// sum += row, as wide as the sum is
template <typename Wide, typename T>
void add(Wide* sum, const T* row, int64_t count) {
  for (int64_t i = 0; i < count; ++i) sum[i] += static_cast<Wide>(row[i]);
}

constexpr int64_t PIECE = 256;

// One row of one head in a piece of the tokens: what a few loops in turn read and write stays in the cache
struct Piece {
  int64_t row;  // of z
  int64_t head;
  int64_t stem;  // row of u
  int64_t at, count;
};

template <typename Work>
void by_piece(const Tensor& u, Sizes sizes, const Work& work) {
  const auto tokens = u.size(1), rows = sizes.heads * sizes.rank;
  share_out((tokens + PIECE - 1) / PIECE, PIECE * rows, [&](int64_t piece) {
    const auto at = piece * PIECE, count = std::min(PIECE, tokens - at);
    for (int64_t row = 0; row < rows; ++row)
      work(Piece{row, row / sizes.rank, row % u.size(0), at, count});
  });
}

template <typename T>
const T* data_of(const Tensor& maybe) {
  return maybe.defined() ? maybe.const_data_ptr<T>() : nullptr;
}

// z, and u0 below it
Tensor blend(const Tensor& u, const Tensor& u0, const Tensor& gate, Sizes sizes, Dropout dropout) {
  const auto rows = sizes.heads * sizes.rank, tokens = u.size(1);
  TORCH_CHECK(u.size(0) == sizes.rank || u.size(0) == rows, "u has ", u.size(0), " rows; with ", sizes.heads,
              " heads of rank ", sizes.rank, " it has ", sizes.rank, " or ", rows);
  TORCH_CHECK(!gate.defined() || gate.sizes() == at::IntArrayRef({sizes.heads, tokens}), "the gate has shape ",
              gate.sizes(), "; ", sizes.heads, " heads and ", tokens, " tokens need ", sizes.heads, " x ", tokens);
  const auto z = at::empty({rows + (u0.defined() ? u0.size(0) : 0), tokens}, u.options());
  const auto stems = u.contiguous(), weights = cast(gate, u.scalar_type()), mask = head_mask(u, rows, dropout);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, u.scalar_type(), "blend", [&] {
    const auto *from = data_of<scalar_t>(stems), *by = data_of<scalar_t>(weights), *left = data_of<scalar_t>(mask);
    auto* to = z.mutable_data_ptr<scalar_t>();
    by_piece(u, sizes, [=](Piece p) {
      const auto here = p.row * tokens + p.at;
      const auto* read = from + p.stem * tokens + p.at;
      auto* out = to + here;
      if (by) read = times(out, read, by + p.head * tokens + p.at, p.count);
      if (left) read = times(out, read, left + here, p.count);
      if (read != out) std::copy(read, read + p.count, out);
    });
  });
  if (u0.defined()) put(z, rows, 0, u0, 1);
  return z;
}

struct Blended {
  Tensor dgate, z;
};

// The gradient of u is written into `du`
Blended blend_backward(const Tensor& dz, const Tensor& du, const Tensor& u, const Tensor& gate, Sizes sizes,
                       Dropout dropout) {
  const auto tokens = u.size(1);
  const bool shared = u.size(0) < dz.size(0);
  const auto wide = u.options().dtype(at::toOpMathType(u.scalar_type()));
  const auto z = at::empty_like(dz), sums = shared ? at::zeros(u.sizes(), wide) : Tensor();
  const auto dgate = gate.defined() ? at::zeros(gate.sizes(), wide) : Tensor();
  const auto stems = u.contiguous(), weights = cast(gate, u.scalar_type()), mask = head_mask(u, dz.size(0), dropout);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, u.scalar_type(), "blend_backward", [&] {
    using wide_t = at::opmath_type<scalar_t>;
    const auto *from = data_of<scalar_t>(stems), *by = data_of<scalar_t>(weights), *left = data_of<scalar_t>(mask);
    const auto* grads = data_of<scalar_t>(dz);
    auto *to = z.mutable_data_ptr<scalar_t>(), *to_stems = du.mutable_data_ptr<scalar_t>();
    auto* to_gates = by ? dgate.mutable_data_ptr<wide_t>() : nullptr;
    auto* to_sums = shared ? sums.mutable_data_ptr<wide_t>() : nullptr;
    by_piece(u, sizes, [=](Piece p) {
      const auto here = p.row * tokens + p.at, of_gate = p.head * tokens + p.at, of_stem = p.stem * tokens + p.at;
      const auto *grad = grads + here, *read = from + of_stem;
      auto* out = to + here;
      std::array<scalar_t, PIECE> room;
      if (left) grad = times(room.data(), grad, left + here, p.count);
      if (by) {
        add(to_gates + of_gate, times(out, grad, read, p.count), p.count);
        grad = times(room.data(), grad, by + of_gate, p.count);
        read = times(out, read, by + of_gate, p.count);
      }
      if (left) read = times(out, read, left + here, p.count);
      if (read != out) std::copy(read, read + p.count, out);
      if (to_sums) add(to_sums + of_stem, grad, p.count);
      else std::copy(grad, grad + p.count, to_stems + of_stem);
    });
  });
  if (shared) put(du, 0, 0, sums, 1);
  return {gate.defined() ? dgate.to(gate.scalar_type()) : dgate, z};
}

}  // namespace
