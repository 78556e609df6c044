// The functions of multiflora.ops for processors: the same arithmetic in the same order, so the results are the same to
// the last bit, without the interpreter between the calls of torch.
//
// Each header stands beside the Python file of its name (packing.h is what torch does there in a few calls); letters,
// layouts and reasons are that file's, and here stand only those that C++ adds. An undefined tensor is Python's None.
// native.py builds this file on the machine it is used on.

#include "elementwise.h"
#include "inference.h"
#include "reading.h"
#include "writing.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>

#include <array>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
// autograd has recorded what it needs: what is called inside may go straight to the arithmetic
using Arithmetic = at::AutoDispatchBelowADInplaceOrView;

using Maybe = const std::optional<Tensor>&;

Tensor or_undefined(Maybe tensor) { return tensor.value_or(Tensor()); }

// What torch.autograd.function.once_differentiable does: gradients that answer with an error when differentiated
variable_list once_differentiable(variable_list grads) {
  if (!at::GradMode::is_enabled()) return grads;
  for (auto& grad : grads)
    if (grad.defined()) grad = grad.detach().requires_grad_();
  auto error = std::make_shared<torch::autograd::DelayedError>(
      "trying to differentiate twice a function that was marked with @once_differentiable", grads.size());
  return (*error)(std::move(grads));
}

// The gate of a router, in float32 at least
Tensor softmax(const Tensor& logits) {
  return at::_softmax(logits.to(at::promote_types(logits.scalar_type(), at::kFloat)), 0, /*half_to_float=*/false);
}

Tensor softmax_backward(const Tensor& dgate, const Tensor& gate) {
  return at::_softmax_backward_data(dgate, gate, 0, gate.scalar_type());
}

// Numbers of a call, which autograd keeps beside the tensors
struct Settings : torch::CustomClassHolder {
  double scale = 1;
  Dropout of_x{0, 0}, of_heads{0, 0};
  Sizes sizes{1, 1};
  at::ScalarType of_B = at::kFloat;
};

// ---- autograd -------------------------------------------------------------------------------------------------------

// Inputs that may be missing come last in each function: autograd numbers those that are there.

void keep(AutogradContext* ctx, const Settings& settings) {
  ctx->saved_data["settings"] = c10::IValue::make_capsule(c10::make_intrusive<Settings>(settings));
}

const Settings& kept(AutogradContext* ctx) {
  return static_cast<const Settings&>(*ctx->saved_data["settings"].toCapsule());
}

struct Stems : torch::autograd::Function<Stems> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& A, Maybe maybe_router,
                               Maybe maybe_weight, Maybe maybe_A0, const Settings& settings) {
    const auto router = or_undefined(maybe_router), weight = or_undefined(maybe_weight), A0 = or_undefined(maybe_A0);
    ctx->save_for_backward({x, weight, A, router, A0});
    ctx->set_materialize_grads(false);
    keep(ctx, settings);
    Arithmetic guard;
    variable_list out;
    if (weight.defined()) {
      auto shape = x.sizes().vec();
      shape.back() = weight.size(0);
      out.push_back(at::empty(shape, x.options()));
    }
    const Readers readers{A, router, A0, settings.scale, settings.of_x};
    const auto all = read(by_token(x), readers);
    int64_t start = 0;
    for (const auto count : readers.counts()) {
      if (count) out.push_back(all.narrow(0, start, count));
      start += count;
    }
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    // before the guard: under gradient checkpointing this runs a forward pass
    const auto saved = ctx->get_saved_variables();
    Arithmetic guard;
    const auto &x = saved[0], &weight = saved[1], &router = saved[3];
    const auto& settings = kept(ctx);
    const Readers readers{saved[2], router, saved[4], settings.scale, settings.of_x};
    const auto tokens = by_token(x);
    size_t next = weight.defined() ? 1 : 0;
    variable_list parts;
    for (const auto count : readers.counts()) {
      if (!count) continue;
      const auto& grad = grads[next++];
      parts.push_back(grad.defined() ? grad : at::zeros({count, tokens.size(0)}, x.options()));
    }
    auto [dx, dA, drouter] = read_backward(parts.size() == 1 ? parts[0] : at::cat(parts),
                                           weight.defined() ? grads[0] : Tensor(), weight, tokens, readers,
                                           ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                           router.defined() && ctx->needs_input_grad(2));
    if (dx.defined()) dx = dx.view(x.sizes());
    return once_differentiable({dx, dA, drouter, {}, {}, {}});
  }
};

struct Heads : torch::autograd::Function<Heads> {
  static Tensor forward(AutogradContext* ctx, Tensor y, const Tensor& u, const Tensor& B, Maybe maybe_u0,
                        Maybe maybe_gate, Maybe maybe_B0, Maybe x, Maybe weight, Maybe bias, const Settings& settings) {
    Arithmetic guard;
    const auto gate = or_undefined(maybe_gate), B0 = or_undefined(maybe_B0);
    const auto z = blend(u, or_undefined(maybe_u0), gate, settings.sizes, settings.of_heads);
    const auto columns = columns_of(B, B0, u.scalar_type());
    ctx->save_for_backward(B.is_leaf() ? variable_list{u, gate, B, B0} : variable_list{u, gate, columns, Tensor()});
    keep(ctx, settings);
    if (!weight) return added(y, z, columns);
    ctx->mark_dirty({y});
    auto rows = y.view({-1, y.size(-1)});
    base_product(rows, by_token(*x), *weight, or_undefined(bias));
    rows.addmm_(z.t(), columns.t());
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    // before the guard: under gradient checkpointing this runs a forward pass
    const auto saved = ctx->get_saved_variables();
    Arithmetic guard;
    const auto &u = saved[0], &dy = grads[0];
    const auto& settings = kept(ctx);
    const auto du = at::empty(u.sizes(), u.options());
    const auto [dz, dgate, dB] =
        write_backward(dy, du, u, saved[1], saved[2], saved[3], settings.sizes, settings.of_heads, settings.of_B,
                       ctx->needs_input_grad(2));
    const auto many = settings.sizes.heads * settings.sizes.rank, offset = dz.size(0) - many;
    const auto du0 = offset ? dz.narrow(0, many, offset) : Tensor();
    return once_differentiable({dy, du, dB, du0, dgate, {}, {}, {}, {}, {}});
  }
};

// Stems, softmax and heads in one: a node of autograd in place of four
struct Branches : torch::autograd::Function<Branches> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& A, const Tensor& B,
                               Maybe maybe_router, Maybe y, Maybe weight, Maybe bias, Maybe maybe_A0, Maybe maybe_B0,
                               const Settings& settings) {
    Arithmetic guard;
    const auto router = or_undefined(maybe_router), A0 = or_undefined(maybe_A0), B0 = or_undefined(maybe_B0);
    const auto tokens = by_token(x);
    const Readers readers{A, router, A0, settings.scale, settings.of_x};
    const auto all = read(tokens, readers);
    const auto [stems, gates, offset] = readers.counts();
    const auto u = all.narrow(0, 0, stems), u0 = offset ? all.narrow(0, stems + gates, offset) : Tensor();
    const auto gate = gates ? softmax(all.narrow(0, stems, gates)) : Tensor();
    const auto z = blend(u, u0, gate, settings.sizes, settings.of_heads);
    const auto columns = columns_of(B, B0, u.scalar_type());
    const bool leaf = B.is_leaf();
    ctx->save_for_backward({x, or_undefined(weight), A, router, A0, leaf ? B : columns, leaf ? B0 : Tensor(), u, gate});
    keep(ctx, settings);
    Tensor out;
    if (weight) {
      auto shape = x.sizes().vec();
      shape.back() = weight->size(0);
      out = at::empty(shape, x.options());
      auto rows = by_token(out);
      base_product(rows, tokens, *weight, or_undefined(bias));
      rows.addmm_(z.t(), columns.t());
    } else {
      out = added(*y, z, columns);
    }
    if (!gates) return {out};
    ctx->mark_non_differentiable({gate});
    return {out, gate};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    // before the guard: under gradient checkpointing this runs a forward pass
    const auto saved = ctx->get_saved_variables();
    Arithmetic guard;
    const auto &x = saved[0], &weight = saved[1], &router = saved[3], &u = saved[7], &gate = saved[8], &dy = grads[0];
    const auto& settings = kept(ctx);
    const auto tokens = by_token(x);
    const Readers readers{saved[2], router, saved[4], settings.scale, settings.of_x};
    const auto [stems, gates, offset] = readers.counts();
    const auto dread = at::empty({readers.count(), tokens.size(0)}, x.options());
    const auto [dz, dgate, dB] = write_backward(dy, dread.narrow(0, 0, stems), u, gate, saved[5], saved[6],
                                                settings.sizes, settings.of_heads, settings.of_B,
                                                ctx->needs_input_grad(2));
    if (gates) put(dread, stems, 0, softmax_backward(dgate, gate), 1);
    if (offset) put(dread, stems + gates, 0, dz.narrow(0, dz.size(0) - offset, offset), 1);
    auto [dx, dA, drouter] = read_backward(dread, dy, weight, tokens, readers, ctx->needs_input_grad(0),
                                           ctx->needs_input_grad(1), router.defined() && ctx->needs_input_grad(3));
    if (dx.defined()) dx = dx.view(x.sizes());
    return once_differentiable({dx, dA, dB, drouter, weight.defined() ? Tensor() : dy, {}, {}, {}, {}, {}});
  }
};

// ---- what Python calls ----------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> stems(const Tensor& x, Maybe weight, const Tensor& A, Maybe router, Maybe A0,
                                                 double scale, double p, int64_t seed) {
  Settings settings;
  settings.scale = scale;
  settings.of_x = {p, seed};
  const auto some = Stems::apply(x, A, router, weight, A0, settings);
  std::array<Tensor, 4> all;
  const std::array<bool, 4> there{weight.has_value(), true, router.has_value(), A0.has_value()};
  for (size_t i = 0, next = 0; i < all.size(); ++i)
    if (there[i]) all[i] = some[next++];
  return {all[0], all[1], all[2], all[3]};
}

Tensor heads(const Tensor& y, const Tensor& u, Maybe u0, Maybe gate, const Tensor& B, Maybe B0, Maybe x, Maybe weight,
             Maybe bias, int64_t num_heads, int64_t rank, double p, int64_t seed) {
  Settings settings;
  settings.sizes = {num_heads, rank};
  settings.of_heads = {p, seed};
  settings.of_B = B.scalar_type();
  return Heads::apply(y, u, B, u0, gate, B0, x, weight, bias, settings);
}

std::tuple<Tensor, Tensor> branches(const Tensor& x, const Tensor& A, Maybe router, Maybe A0, const Tensor& B, Maybe B0,
                                    Maybe y, Maybe weight, Maybe bias, int64_t num_heads, int64_t rank, double scale,
                                    double stem_p, int64_t stem_seed, double head_p, int64_t head_seed) {
  Settings settings;
  settings.scale = scale;
  settings.of_x = {stem_p, stem_seed};
  settings.sizes = {num_heads, rank};
  settings.of_heads = {head_p, head_seed};
  settings.of_B = B.scalar_type();
  const auto out = Branches::apply(x, A, B, router, y, weight, bias, A0, B0, settings);
  return {out[0], out.size() > 1 ? out[1] : Tensor()};
}

Tensor infer(const Tensor& x, const Tensor& rows, const Tensor& columns, Maybe maybe_y, Maybe weight, Maybe bias,
             Maybe maybe_gate, int64_t num_heads, int64_t rank, bool routed, int64_t top_k) {
  Arithmetic guard;
  const Branch branch(rows, columns, num_heads, rank, routed, top_k);
  TORCH_CHECK(rows.scalar_type() == x.scalar_type() && columns.scalar_type() == x.scalar_type() &&
                  rows.size(1) == x.size(-1) && rows.is_contiguous() && columns.is_contiguous(),
              "the prepared branches do not fit the layer's input");
  auto shape = x.sizes().vec();
  shape.back() = columns.size(1);
  const auto tokens = by_token(x).contiguous();
  const auto gate = or_undefined(maybe_gate);
  auto y = weight ? at::linear(tokens, *weight, bias) : Tensor();
  if (!weight) {
    if (maybe_y->scalar_type() != x.scalar_type()) {
      y = at::zeros({tokens.size(0), columns.size(1)}, x.options());
    } else {
      y = by_token(*maybe_y).clone(at::MemoryFormat::Contiguous);
    }
  }
  add(y, tokens, rows, columns, gate, branch);
  y = y.view(shape);
  return !weight && maybe_y->scalar_type() != x.scalar_type() ? *maybe_y + y.to(maybe_y->scalar_type()) : y;
}

// For tokens that lie together by expert: each expert has rows and columns of its own
void infer_experts(const Tensor& y, const Tensor& x, const Tensor& rows, const Tensor& columns, const Tensor& ends,
                   Maybe maybe_gate, int64_t num_heads, int64_t rank, bool routed, int64_t top_k) {
  Arithmetic guard;
  const Branch branch(rows[0], columns[0], num_heads, rank, routed, top_k);
  const auto tokens = x.contiguous(), gate = or_undefined(maybe_gate);
  for (const auto& one : {y, rows, columns})
    TORCH_CHECK(one.scalar_type() == x.scalar_type() && one.is_contiguous(), "the experts' branches do not fit x");
  TORCH_CHECK(rows.size(2) == x.size(1) && columns.size(2) == y.size(1) && y.size(0) == x.size(0) &&
                  ends.scalar_type() == at::kInt && ends.numel() == rows.size(0) && ends.is_contiguous(),
              "the experts' branches do not fit x");
  int64_t start = 0;
  for (int64_t e = 0; e < rows.size(0); ++e) {
    const auto end = static_cast<int64_t>(ends.const_data_ptr<int>()[e]), count = end - start;
    TORCH_CHECK(count >= 0 && end <= x.size(0), "the tokens do not lie together by expert");
    if (count > 0)
      add(y.narrow(0, start, count), tokens.narrow(0, start, count), rows[e], columns[e],
          gate.defined() ? gate.narrow(0, start, count) : gate, branch);
    start = end;
  }
}

// Eight sums side by side, so that one need not wait for another; each step is reversible, so no change can be lost in one
int64_t digest(const std::vector<Tensor>& tensors) {
  constexpr uint64_t PRIME = 0x9E3779B97F4A7C15;
  constexpr size_t LANES = 8;
  std::array<uint64_t, LANES> sums;
  for (size_t lane = 0; lane < LANES; ++lane) sums[lane] = lane + 1;
  for (const auto& tensor : tensors) {
    const auto* bytes = static_cast<const char*>(tensor.const_data_ptr());
    const size_t size = tensor.nbytes(), block = LANES * sizeof(uint64_t);
    for (size_t at = 0; at < size; at += block) {
      std::array<uint64_t, LANES> words{};
      std::memcpy(words.data(), bytes + at, std::min(block, size - at));
      for (size_t lane = 0; lane < LANES; ++lane) sums[lane] = (sums[lane] ^ words[lane]) * PRIME;
      for (size_t lane = 0; lane < LANES; ++lane) sums[lane] ^= sums[lane] >> 32;
    }
  }
  uint64_t all = 0;
  for (const auto sum : sums) {
    all = (all ^ sum) * PRIME;
    all ^= all >> 32;
  }
  return static_cast<int64_t>(all);
}

}  // namespace

TORCH_LIBRARY(multiflora, library) {
  library.def("stems(Tensor x, Tensor? weight, Tensor A, Tensor? router, Tensor? A0, float scale, float p, int seed)"
              " -> (Tensor, Tensor, Tensor, Tensor)", &stems);
  library.def("heads(Tensor(a!) y, Tensor u, Tensor? u0, Tensor? gate, Tensor B, Tensor? B0, Tensor? x, Tensor? weight,"
              " Tensor? bias, int num_heads, int rank, float p, int seed) -> Tensor", &heads);
  library.def("branches(Tensor x, Tensor A, Tensor? router, Tensor? A0, Tensor B, Tensor? B0, Tensor? y,"
              " Tensor? weight, Tensor? bias, int num_heads, int rank, float scale, float stem_p, int stem_seed,"
              " float head_p, int head_seed) -> (Tensor, Tensor)", &branches);
  library.def("infer(Tensor x, Tensor rows, Tensor columns, Tensor? y, Tensor? weight, Tensor? bias, Tensor? gate,"
              " int num_heads, int rank, bool routed, int top_k) -> Tensor", &infer);
  library.def("infer_experts(Tensor(a!) y, Tensor x, Tensor rows, Tensor columns, Tensor ends, Tensor? gate,"
              " int num_heads, int rank, bool routed, int top_k) -> ()", &infer_experts);
  library.def("digest(Tensor[] tensors) -> int", &digest);
}
