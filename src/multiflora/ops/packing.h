// Weights side by side in another type, and matrices turned. All of it is small, and a call of torch would cost more
// than its numbers do. Each loop rounds where torch's calls in Python round.

#pragma once

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>

#include <algorithm>

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
              "weights of shape ", part.sizes(), " do not fit beside the others of their layer, ", out.sizes(),
              " in all");
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

}  // namespace
