// writing.py for processors.

#pragma once

#include "elementwise.h"
#include "reading.h"

namespace {

// W x + b into y
void base_product(Tensor y, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  if (bias.defined()) at::addmm_out(y, bias, x, weight.t());
  else at::mm_out(y, x, weight.t());
}

// y + z^T columns^T
Tensor added(const Tensor& y, const Tensor& z, const Tensor& columns) {
  if (y.scalar_type() == z.scalar_type()) return at::addmm(by_token(y), z.t(), columns.t()).view(y.sizes());
  return y + at::mm(z.t(), columns.t()).to(y.scalar_type()).view(y.sizes());
}

struct WriteGrads {
  Tensor dz;  // of [z; u0]
  Tensor dgate, dB;
};

// The gradient of u is written into `du`, that of B is of the type `of_B`
WriteGrads write_backward(const Tensor& dy, const Tensor& du, const Tensor& u, const Tensor& gate, const Tensor& B,
                          const Tensor& B0, Sizes sizes, Dropout dropout, at::ScalarType of_B, bool needs_B) {
  const auto grad = by_token(dy).to(u.scalar_type());
  const auto columns = columns_of(B, B0, u.scalar_type());
  WriteGrads grads;
  grads.dz = turned(at::mm(grad, columns), u.scalar_type());
  const auto of_z = grads.dz.narrow(0, 0, sizes.heads * sizes.rank);
  const auto [dgate, z] = blend_backward(of_z, du, u, gate, sizes, dropout);
  grads.dgate = dgate;
  if (needs_B) grads.dB = turned(at::mm(z, grad), of_B);
  return grads;
}

}  // namespace
