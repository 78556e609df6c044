// What packed.cpp does in loops of its own: masks, packing, turning and the elementwise step. All of it is small, and a
// call of torch would cost more than its numbers do. Each loop rounds where torch's calls in packed.py and mask.py round.

#pragma once

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

namespace {

using at::Tensor;

// Calls work(i) for i in [0, number), by several threads where that is worth it: `size` numbers are touched for each i
template <typename Work>
void share_out(int64_t number, int64_t size, const Work& work) {
  at::parallel_for(0, number, std::max<int64_t>(1, at::internal::GRAIN_SIZE / std::max<int64_t>(1, size)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) work(i);
                   });
}

// ---- masks (mask.py) ------------------------------------------------------------------------------------------------

struct Dropout {
  double p;
  int64_t seed;
};

constexpr int64_t LEVELS = 1 << 16;

int64_t dropped_levels(double p) { return std::min<int64_t>(std::nearbyint(p * LEVELS), LEVELS - 1); }

double survivor_weight(double p) { return double(LEVELS) / double(LEVELS - dropped_levels(p)); }

// numpy's SFC64, seeded as mask.py seeds it
struct Sfc64 {
  explicit Sfc64(uint64_t seed) : a(seed), b(seed), c(seed) {
    for (int i = 0; i < 12; ++i) next();
  }
  uint64_t next() {
    const uint64_t out = a + b + counter++;
    a = b ^ (b >> 11);
    b = c + (c << 3);
    c = ((c << 24) | (c >> 40)) + out;
    return out;
  }
  uint64_t a, b, c, counter = 1;
};

// The draws of a mask, some rows of it at a time. One generator makes them all, so this is for one thread.
class Draws {
 public:
  Draws(Dropout dropout, int64_t width)
      : threshold(dropped_levels(dropout.p) - LEVELS / 2), width((width + 3) / 4 * 4), generator(dropout.seed) {}

  // of so many rows more, each `width` long
  const int16_t* take(int64_t rows) {
    draws.resize(rows * width);
    for (auto draw = draws.begin(); draw != draws.end(); draw += 4) {
      const auto word = generator.next();
      std::memcpy(&*draw, &word, sizeof word);
    }
    return draws.data();
  }

  const int16_t threshold;  // a smaller draw drops
  const int64_t width;      // a row begins with a word of its own

 private:
  Sfc64 generator;
  std::vector<int16_t> draws;
};

// 0 or the survivors' weight, (H r, T); undefined without dropout
Tensor head_mask(const Tensor& u, int64_t rows, Dropout dropout) {
  if (dropout.p == 0) return Tensor();
  const auto tokens = u.size(1);
  auto mask = at::empty({rows, tokens}, u.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, u.scalar_type(), "head_mask", [&] {
    const auto weight = static_cast<scalar_t>(survivor_weight(dropout.p)), zero = static_cast<scalar_t>(0);
    auto* out = mask.mutable_data_ptr<scalar_t>();
    Draws all(dropout, tokens);
    for (int64_t row = 0; row < rows; ++row, out += tokens) {
      const auto* draws = all.take(1);
      for (int64_t i = 0; i < tokens; ++i) out[i] = draws[i] >= all.threshold ? weight : zero;
    }
  });
  return mask;
}

// Some rows of a mask on x, (rows, d_in)
struct Block {
  int64_t start, rows;
  const int16_t* draws;
  int64_t stride;
  int16_t threshold;

  Tensor of(const Tensor& matrix, int64_t axis = 0) const { return matrix.narrow(axis, start, rows); }
};

int64_t rows_in_block(const Tensor& x) { return 512 / x.element_size(); }  // _BLOCK of packed.py

// work(block) for the rows of x, so few at a time that what is made of them stays in the caches
template <typename Work>
void by_block(const Tensor& x, Dropout dropout, const Work& work) {
  Draws all(dropout, x.size(1));
  for (int64_t start = 0; start < x.size(0); start += rows_in_block(x)) {
    const auto rows = std::min(rows_in_block(x), x.size(0) - start);
    work(Block{start, rows, all.take(rows), all.width, all.threshold});
  }
}

template <typename Integer>
void drop(Integer* out, const Integer* in, int64_t width, const Block& block) {
  for (int64_t row = 0; row < block.rows; ++row) {
    const auto* draws = block.draws + row * block.stride;
    for (int64_t i = 0; i < width; ++i)
      out[row * width + i] = in[row * width + i] & -Integer(draws[i] >= block.threshold);
  }
}

// What dropout leaves of these rows of x, without the survivors' weight. By bits, so a NaN can be dropped.
void drop(const Tensor& out, const Tensor& in, const Block& block) {
  const auto width = in.size(1);
  const auto as = [&](auto integer) {
    using Integer = decltype(integer);
    drop(static_cast<Integer*>(out.mutable_data_ptr()), static_cast<const Integer*>(in.const_data_ptr()), width, block);
  };
  const auto size = in.element_size();
  size == 2 ? as(int16_t()) : size == 4 ? as(int32_t()) : as(int64_t());
}

// sum += what dropout leaves of these rows
void add_dropped(const Tensor& sum, const Tensor& in, const Block& block) {
  const auto width = in.size(1);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, in.scalar_type(), "add_dropped", [&] {
    const auto* from = in.const_data_ptr<scalar_t>();
    auto* to = sum.mutable_data_ptr<scalar_t>();
    for (int64_t row = 0; row < block.rows; ++row) {
      const auto* draws = block.draws + row * block.stride;
      for (int64_t i = 0; i < width; ++i) {
        const auto at = row * width + i;
        to[at] = to[at] + (draws[i] >= block.threshold ? from[at] : static_cast<scalar_t>(0));
      }
    }
  });
}

// ---- packing --------------------------------------------------------------------------------------------------------

// Write `part` times `scale` into the window of `out` that begins at this row and column. One pass for what would be a
// concatenation, a product and a cast: small weights cost by the call.
template <typename Out, typename In, typename Wide>
void put(Out* out, int64_t stride, const In* part, int64_t rows, int64_t width, Wide scale) {
  share_out(rows, width, [=](int64_t row) {
    for (int64_t i = 0; i < width; ++i)
      out[row * stride + i] = static_cast<Out>(static_cast<Wide>(part[row * width + i]) * scale);
  });
}

void put(const Tensor& out, int64_t row, int64_t column, const Tensor& part, double scale) {
  TORCH_CHECK(row + part.size(0) <= out.size(0) && column + part.size(1) <= out.size(1) &&
                  (part.size(0) == out.size(0) || part.size(1) == out.size(1)),
              "weights of shape ", part.sizes(), " do not fit beside the others of their layer, ", out.sizes(), " in all");
  const auto from = part.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, out.scalar_type(), "put", [&] {
    using out_t = scalar_t;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, from.scalar_type(), "put", [&] {
      put(out.mutable_data_ptr<out_t>() + row * out.size(1) + column, out.size(1), from.const_data_ptr<scalar_t>(),
          from.size(0), from.size(1), static_cast<at::opmath_type<scalar_t>>(scale));
    });
  });
}

// The transpose of a contiguous matrix in another type, block by block: the rows of a large power of two in length that
// torch's copy strides through share a few places of the cache, and blocks wider than a cache has ways would, too
template <typename Out, typename In>
void turn(Out* out, const In* in, int64_t rows, int64_t columns) {
  constexpr int64_t BLOCK = 8;
  const auto across = (columns + BLOCK - 1) / BLOCK, down = (rows + BLOCK - 1) / BLOCK;
  share_out(down * across, BLOCK * BLOCK, [=](int64_t block) {
    const auto top = block / across * BLOCK, left = block % across * BLOCK;
    for (int64_t column = left; column < std::min(left + BLOCK, columns); ++column)
      for (int64_t row = top; row < std::min(top + BLOCK, rows); ++row)
        out[column * rows + row] = static_cast<Out>(in[row * columns + column]);
  });
}

Tensor turned(const Tensor& matrix, at::ScalarType dtype) {
  const auto from = matrix.contiguous();
  auto out = at::empty({from.size(1), from.size(0)}, from.options().dtype(dtype));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, out.scalar_type(), "turned", [&] {
    using out_t = scalar_t;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, from.scalar_type(), "turned", [&] {
      turn(out.mutable_data_ptr<out_t>(), from.const_data_ptr<scalar_t>(), from.size(0), from.size(1));
    });
  });
  return out;
}

// In another type; undefined stays undefined
Tensor cast(const Tensor& matrix, at::ScalarType dtype) {
  if (!matrix.defined() || matrix.scalar_type() == dtype) return matrix.defined() ? matrix.contiguous() : matrix;
  auto out = at::empty(matrix.sizes(), matrix.options().dtype(dtype));
  put(out, 0, 0, matrix, 1);
  return out;
}

// [B | B0]
Tensor columns_of(const Tensor& B, const Tensor& B0, at::ScalarType dtype) {
  if (!B0.defined()) return cast(B, dtype);
  auto out = at::empty({B.size(0), B.size(1) + B0.size(1)}, B.options().dtype(dtype));
  put(out, 0, 0, B, 1);
  put(out, 0, B.size(1), B0, 1);
  return out;
}

// ---- the elementwise step -------------------------------------------------------------------------------------------

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
