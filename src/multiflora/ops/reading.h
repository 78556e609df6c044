// reading.py for processors.

#pragma once

#include "mask.h"
#include "packing.h"

#include <array>
#include <vector>

namespace {

// ---- dropout on x ---------------------------------------------------------------------------------------------------

// Some rows of a mask on x, (rows, d_in)
struct Block {
  int64_t start, rows;
  const int16_t* draws;
  int64_t stride;
  int16_t threshold;

  Tensor of(const Tensor& matrix, int64_t axis = 0) const { return matrix.narrow(axis, start, rows); }
};

int64_t rows_in_block(const Tensor& x) { return 512 / x.element_size(); }  // _BLOCK of reading.py

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

// ---- the products ---------------------------------------------------------------------------------------------------

// (..., d) to (T, d)
Tensor by_token(const Tensor& x) { return x.reshape({-1, x.size(-1)}); }

// Stems, router rows and offset. What is made of them stands one under another in this order.
struct Readers {
  Tensor A, router, A0;
  double scale;
  Dropout dropout;

  std::array<int64_t, 3> counts() const {
    return {A.size(0), router.defined() ? router.size(0) : 0, A0.defined() ? A0.size(0) : 0};
  }
  int64_t count() const {
    const auto [stems, gates, offset] = counts();
    return stems + gates + offset;
  }
};

// Readers of one input: x, or what dropout leaves of it
struct Reading {
  Tensor rows;  // [s A; R; -s A0], those that are for this input
  int64_t first;  // their place among all readers
  double scale;
  bool of_dropped = false;

  Tensor of(const Tensor& all) const { return all.narrow(0, first, rows.size(0)); }
};

std::vector<Reading> readings(const Tensor& x, const Readers& readers) {
  const auto [stems, gates, offset] = readers.counts();
  const auto p = readers.dropout.p;
  // the survivors' weight goes into the rows, too
  const auto scale = p > 0 ? readers.scale * survivor_weight(p) : readers.scale;
  const auto rows = at::empty({stems + gates + offset, readers.A.size(1)}, x.options());
  put(rows, 0, 0, readers.A, scale);
  if (gates) put(rows, stems, 0, readers.router, 1);
  if (offset) put(rows, stems + gates, 0, readers.A0, -readers.scale);
  if (p == 0) return {Reading{rows, 0, scale}};
  Reading of_dropped{rows.narrow(0, 0, stems), 0, scale, true};
  if (gates + offset == 0) return {of_dropped};
  return {Reading{rows.narrow(0, stems, gates + offset), stems, 1}, of_dropped};
}

// Room for a block of x
Tensor room(const Tensor& x) { return at::empty({std::min(rows_in_block(x), x.size(0)), x.size(1)}, x.options()); }

// The product of rows with what dropout leaves of x, into `out`, (R, T)
void read_dropped(const Tensor& out, const Tensor& given, const Tensor& rows, Dropout dropout) {
  const auto x = given.contiguous(), left = room(x);
  by_block(x, dropout, [&](const Block& block) {
    const auto here = left.narrow(0, 0, block.rows);
    drop(here, block.of(x), block);
    auto part = block.of(out, 1);
    at::mm_out(part, rows, here.t());
  });
}

// Adds the gradient of x to `dx`, where it is needed, and gives that of rows, in float32 at least
Tensor read_dropped_backward(const Tensor& dread, Tensor& dx, const Tensor& given, const Tensor& rows, Dropout dropout,
                             bool needs_x, bool needs_rows) {
  const auto x = given.contiguous(), place = room(x);
  const auto wide = at::toOpMathType(x.scalar_type());
  const auto drows = needs_rows ? at::zeros(rows.sizes(), x.options().dtype(wide)) : Tensor();
  const bool sums = dx.defined();
  if (needs_x && !sums) dx = at::empty_like(x);
  by_block(x, dropout, [&](const Block& block) {
    const auto grad = block.of(dread, 1);
    auto here = place.narrow(0, 0, block.rows);
    if (needs_rows) {
      drop(here, block.of(x), block);
      if (wide == x.scalar_type()) drows.addmm_(grad, here);
      else drows.add_(at::mm(grad, here));
    }
    if (needs_x) {
      at::mm_out(here, grad.t(), rows);
      if (sums) add_dropped(block.of(dx), here, block);
      else drop(block.of(dx), here, block);
    }
  });
  return drows;
}

// [u; logits; u0]
Tensor read(const Tensor& x, const Readers& readers) {
  auto all = at::empty({readers.count(), x.size(0)}, x.options());
  for (const auto& reading : readings(x, readers)) {
    auto part = reading.of(all);
    if (reading.of_dropped) read_dropped(part, x, reading.rows, readers.dropout);
    else at::mm_out(part, reading.rows, x.t());
  }
  return all;
}

struct ReadGrads {
  Tensor dx, dA, drouter;
};

// `dread` is the gradient of what read() gave. dx is that of the base product, too, where dy and its weight are there.
ReadGrads read_backward(const Tensor& dread, const Tensor& dy, const Tensor& weight, const Tensor& x,
                        const Readers& readers, bool needs_x, bool needs_A, bool needs_router) {
  const auto [stems, gates, offset] = readers.counts();
  ReadGrads grads;
  auto& dx = grads.dx;
  for (const auto& reading : readings(x, readers)) {
    // the offset is not trained
    const auto end = std::min(reading.first + reading.rows.size(0), stems + gates);
    const bool to_A = needs_A && reading.first < stems, to_router = needs_router && end > stems;
    const auto from = reading.of(dread);
    Tensor trained;
    if ((to_A || to_router) && !reading.of_dropped)
      trained = at::mm(dread.narrow(0, reading.first, end - reading.first), x);
    if (needs_x && !dx.defined() && weight.defined() && dy.defined()) dx = at::mm(by_token(dy), weight);
    if (reading.of_dropped) trained = read_dropped_backward(from, dx, x, reading.rows, readers.dropout, needs_x, to_A);
    else if (needs_x) dx = dx.defined() ? dx.addmm_(from.t(), reading.rows) : at::mm(from.t(), reading.rows);
    if (to_A) {
      grads.dA = at::empty(readers.A.sizes(), readers.A.options());
      put(grads.dA, 0, 0, cast(trained.narrow(0, 0, stems), readers.A.scalar_type()), reading.scale);
    }
    if (to_router) grads.drouter = cast(trained.narrow(0, stems - reading.first, gates), readers.router.scalar_type());
  }
  return grads;
}

}  // namespace
