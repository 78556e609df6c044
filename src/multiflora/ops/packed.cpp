// The two functions of packed.py for processors: the same arithmetic in the same order, so the results are the same to
// the last bit, without the interpreter between the calls of torch. Masks, packing and turning are loops of their own.
//
// Letters and layouts are packed.py's, and so are the reasons; here stand only those that C++ adds. An undefined tensor
// is packed.py's None. native.py builds this file on the machine it is used on.

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
// autograd has recorded what it needs: what is called inside may go straight to the arithmetic
using Arithmetic = at::AutoDispatchBelowADInplaceOrView;

using Maybe = const std::optional<Tensor>&;

Tensor or_undefined(Maybe tensor) { return tensor.value_or(Tensor()); }

// (..., d) to (T, d)
Tensor by_token(const Tensor& x) { return x.reshape({-1, x.size(-1)}); }

// What torch.autograd.function.once_differentiable does: gradients that answer with an error when they are differentiated
variable_list once_differentiable(variable_list grads) {
  if (!at::GradMode::is_enabled()) return grads;
  for (auto& grad : grads)
    if (grad.defined()) grad = grad.detach().requires_grad_();
  auto error = std::make_shared<torch::autograd::DelayedError>(
      "trying to differentiate twice a function that was marked with @once_differentiable", grads.size());
  return (*error)(std::move(grads));
}

constexpr int64_t LEVELS = 1 << 16;

// ---- masks (mask.py) ------------------------------------------------------------------------------------------------

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

int64_t dropped_levels(double p) { return std::min<int64_t>(std::nearbyint(p * LEVELS), LEVELS - 1); }

double survivor_weight(double p) { return double(LEVELS) / double(LEVELS - dropped_levels(p)); }

// keep(out, draws, n, threshold) for pieces of a contiguous matrix, row by row
template <typename T, typename Keep>
void each_draw(T* out, int64_t rows, int64_t width, double p, int64_t seed, const Keep& keep) {
  Sfc64 generator(seed);
  const auto threshold = int16_t(dropped_levels(p) - LEVELS / 2);
  std::array<uint64_t, 256> words;
  std::array<int16_t, 4 * words.size()> draws;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t at = 0; at < width; at += draws.size()) {
      const auto count = std::min<int64_t>(draws.size(), width - at);
      const auto used = (count + 3) / 4;
      for (int64_t i = 0; i < used; ++i) words[i] = generator.next();
      std::memcpy(draws.data(), words.data(), used * sizeof(uint64_t));
      keep(out + row * width + at, draws.data(), count, threshold);
    }
  }
}

// head_mask: 0 or the survivors' weight, (H, r, T)
Tensor head_mask(const Tensor& u, int64_t heads, int64_t rank, double p, int64_t seed) {
  auto mask = at::empty({heads, rank, u.size(1)}, u.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, u.scalar_type(), "head_mask", [&] {
    const auto weight = static_cast<scalar_t>(survivor_weight(p));
    const auto zero = static_cast<scalar_t>(0);
    each_draw(mask.mutable_data_ptr<scalar_t>(), heads * rank, u.size(1), p, seed,
              [=](scalar_t* out, const int16_t* draws, int64_t count, int16_t threshold) {
                for (int64_t i = 0; i < count; ++i) out[i] = draws[i] >= threshold ? weight : zero;
              });
  });
  return mask;
}

template <typename Integer>
void drop(void* x, int64_t rows, int64_t width, double p, int64_t seed) {
  each_draw(static_cast<Integer*>(x), rows, width, p, seed,
            [](Integer* out, const int16_t* draws, int64_t count, int16_t threshold) {
              for (int64_t i = 0; i < count; ++i) out[i] &= -Integer(draws[i] >= threshold);
            });
}

// What dropout leaves of x, in place, without the survivors' weight. Zeros are made bit by bit, so a NaN can be dropped.
Tensor& drop_(Tensor& x, double p, int64_t seed) {
  const auto size = x.element_size();
  auto* function = size == 2 ? drop<int16_t> : size == 4 ? drop<int32_t> : drop<int64_t>;
  function(x.mutable_data_ptr(), x.size(0), x.size(1), p, seed);
  return x;
}

// ---- packing --------------------------------------------------------------------------------------------------------

// Write `part` times `scale` into the window of `out` that begins at this row and column. One pass for what would be a
// concatenation, a product and a cast: small weights cost by the call.
template <typename Out, typename In, typename Wide>
void put(Out* out, int64_t stride, const In* part, int64_t rows, int64_t width, Wide scale) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < width; ++i)
      out[row * stride + i] = static_cast<Out>(static_cast<Wide>(part[row * width + i]) * scale);
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

// The transpose of a contiguous matrix in another type. Torch's copy strides through the whole of one side; in blocks of
// columns both sides stay in the cache.
template <typename Out, typename In>
void turn(Out* out, const In* in, int64_t rows, int64_t columns) {
  constexpr int64_t BLOCK = 32;
  for (int64_t start = 0; start < columns; start += BLOCK)
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = start; column < std::min(start + BLOCK, columns); ++column)
        out[column * rows + row] = static_cast<Out>(in[row * columns + column]);
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

// [B | B0]
Tensor columns_of(const Tensor& B, const Tensor& B0, at::ScalarType dtype) {
  if (!B0.defined()) return B.to(dtype);
  auto out = at::empty({B.size(0), B.size(1) + B0.size(1)}, B.options().dtype(dtype));
  put(out, 0, 0, B, 1);
  put(out, 0, B.size(1), B0, 1);
  return out;
}

// ---- stems ----------------------------------------------------------------------------------------------------------

// Rows that read one input: x, or what dropout leaves of it
struct Reading {
  Tensor x;
  std::array<Tensor, 3> parts;  // A, router, A0; undefined where they read the other input
  double scale;
  bool dropped = false;

  // how many rows of the product are for it
  int64_t width(int i) const { return parts[i].defined() ? parts[i].size(0) : 0; }

  Tensor rows() const {
    const auto d_in = parts[width(0) ? 0 : width(1) ? 1 : 2].size(1);
    auto out = at::empty({width(0) + width(1) + width(2), d_in}, x.options());
    const std::array<double, 3> scales{scale, 1, -scale};
    for (int64_t i = 0, row = 0; i < 3; row += width(i++))
      if (width(i)) put(out, row, 0, parts[i], scales[i]);
    return out;
  }
};

std::vector<Reading> readings(const Tensor& x, const Tensor& A, const Tensor& router, const Tensor& A0, double scale,
                              double p, int64_t seed) {
  if (p == 0) return {Reading{x, {A, router, A0}, scale}};
  auto left = x.clone(at::MemoryFormat::Contiguous);
  Reading of_dropped{drop_(left, p, seed), {A, Tensor(), Tensor()}, scale * survivor_weight(p), true};
  if (!router.defined() && !A0.defined()) return {of_dropped};
  return {Reading{x, {Tensor(), router, A0}, scale}, of_dropped};
}

// (y, u, logits, u0) without those that are missing, and back: autograd takes no undefined output
variable_list there(const std::array<Tensor, 4>& all) {
  variable_list some;
  for (const auto& tensor : all)
    if (tensor.defined()) some.push_back(tensor);
  return some;
}

std::array<Tensor, 4> spread(const variable_list& some, const std::array<bool, 4>& is_there) {
  std::array<Tensor, 4> all;
  for (size_t i = 0, next = 0; i < all.size(); ++i)
    if (is_there[i]) all[i] = some[next++];
  return all;
}

struct Stems : torch::autograd::Function<Stems> {
  // inputs that may be missing come last: autograd numbers those that are there
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& A, Maybe maybe_router,
                               Maybe maybe_weight, Maybe maybe_A0, double scale, double p, int64_t seed) {
    const auto router = or_undefined(maybe_router), weight = or_undefined(maybe_weight), A0 = or_undefined(maybe_A0);
    ctx->save_for_backward({x, weight, A, router, A0});
    ctx->set_materialize_grads(false);
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["p"] = p;
    ctx->saved_data["seed"] = seed;
    Arithmetic guard;
    std::array<Tensor, 4> out;
    if (weight.defined()) {
      auto shape = x.sizes().vec();
      shape.back() = weight.size(0);
      out[0] = at::empty(shape, x.options());
    }
    for (const auto& reading : readings(by_token(x), A, router, A0, scale, p, seed)) {
      const auto read = at::mm(reading.rows(), reading.x.t());
      int64_t start = 0;
      for (int i = 0; i < 3; start += reading.width(i++))
        if (reading.width(i)) out[i + 1] = read.narrow(0, start, reading.width(i));
    }
    return there(out);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& some) {
    // before the guard: under gradient checkpointing this runs a forward pass
    const auto saved = ctx->get_saved_variables();
    Arithmetic guard;
    const auto x = by_token(saved[0]);
    const auto &weight = saved[1], &A = saved[2], &router = saved[3], &A0 = saved[4];
    const auto grads = spread(some, {weight.defined(), true, router.defined(), A0.defined()});
    const auto p = ctx->saved_data["p"].toDouble();
    const auto seed = ctx->saved_data["seed"].toInt();
    const bool needs_A = ctx->needs_input_grad(1), needs_router = router.defined() && ctx->needs_input_grad(2);
    const auto all = readings(x, A, router, A0, ctx->saved_data["scale"].toDouble(), p, seed);
    Tensor dx, dA, drouter;
    std::vector<Tensor> together;
    for (const auto& reading : all) {
      std::vector<Tensor> parts;
      for (int i = 0; i < 3; ++i) {
        const auto& grad = grads[i + 1];
        if (reading.width(i))
          parts.push_back(grad.defined() ? grad : at::zeros({reading.width(i), x.size(0)}, x.options()));
      }
      together.push_back(parts.size() == 1 ? parts[0] : at::cat(parts));
      const bool to_A = needs_A && reading.width(0), to_router = needs_router && reading.width(1);
      if (to_A || to_router) {
        const auto trained = at::mm(together.back().narrow(0, 0, reading.width(0) + reading.width(1)), reading.x);
        if (to_A) dA = trained.narrow(0, 0, reading.width(0)).to(A.scalar_type()).mul_(reading.scale);
        if (to_router) drouter = trained.narrow(0, reading.width(0), reading.width(1)).to(router.scalar_type());
      }
    }
    if (ctx->needs_input_grad(0)) {
      if (weight.defined() && grads[0].defined()) dx = at::mm(by_token(grads[0]), weight);
      for (size_t i = 0; i < all.size(); ++i) {
        const auto by_row = together[i].t(), rows = all[i].rows();
        if (!all[i].dropped) {
          dx = dx.defined() ? dx.addmm_(by_row, rows) : at::mm(by_row, rows);
          continue;
        }
        auto part = all[i].x;  // the dropped x has been read and gives its memory
        at::mm_out(part, by_row, rows);
        drop_(part, p, seed);
        dx = dx.defined() ? dx.add_(part) : part;
      }
      dx = dx.view(saved[0].sizes());
    }
    return once_differentiable({dx, dA, drouter, {}, {}, {}, {}, {}});
  }
};

// ---- heads ----------------------------------------------------------------------------------------------------------

Tensor flat(const Tensor& z, int64_t heads) {
  const auto all = z.size(0) == heads ? z : z.expand({heads, -1, -1});
  return all.reshape({heads * z.size(1), z.size(2)});
}

Tensor by_stem(const Tensor& u, int64_t rank) { return u.view({u.size(0) / rank, rank, u.size(1)}); }

Tensor blend(const Tensor& u, const Tensor& gate, const Tensor& mask, int64_t heads, int64_t rank) {
  auto z = by_stem(u, rank);
  if (gate.defined()) z = z * gate.to(u.scalar_type()).unsqueeze(1);
  if (mask.defined()) z = z * mask;
  return flat(z, heads);
}

struct Blended {
  Tensor du, dgate, z;
};

Blended blend_backward(const Tensor& dz, const Tensor& u, const Tensor& gate, const Tensor& mask, int64_t heads,
                       int64_t rank) {
  auto z = by_stem(u, rank), du = dz.view({heads, rank, u.size(1)});
  const bool shared = z.size(0) < heads;
  Tensor dgate;
  if (mask.defined()) du = du * mask;
  if (gate.defined()) {
    const auto weight = gate.to(u.scalar_type()).unsqueeze(1);
    dgate = (du * z).sum(at::IntArrayRef{1}, /*keepdim=*/false, gate.scalar_type());
    du = du * weight;
    z = z * weight;
  }
  if (mask.defined()) z = z * mask;
  return {shared ? du.sum(at::IntArrayRef{0}) : du.view_as(u), dgate, flat(z, heads)};
}

struct Heads : torch::autograd::Function<Heads> {
  static Tensor forward(AutogradContext* ctx, Tensor y, const Tensor& u, const Tensor& B, Maybe maybe_u0,
                        Maybe maybe_gate, Maybe maybe_B0, Maybe x, Maybe weight, Maybe bias, int64_t heads,
                        int64_t rank, double p, int64_t seed) {
    Arithmetic guard;
    const auto u0 = or_undefined(maybe_u0), gate = or_undefined(maybe_gate), B0 = or_undefined(maybe_B0);
    const auto mask = p > 0 ? head_mask(u, heads, rank, p, seed) : Tensor();
    auto z = blend(u, gate, mask, heads, rank);
    const auto columns = columns_of(B, B0, u.scalar_type());
    ctx->save_for_backward(B.is_leaf() ? variable_list{u, gate, B, B0} : variable_list{u, gate, columns, Tensor()});
    ctx->saved_data["heads"] = heads;
    ctx->saved_data["rank"] = rank;
    ctx->saved_data["p"] = p;
    ctx->saved_data["seed"] = seed;
    ctx->saved_data["dtype"] = B.scalar_type();
    if (u0.defined()) z = at::cat({z, u0});
    if (weight) {
      ctx->mark_dirty({y});
      auto rows = y.view({-1, y.size(-1)});
      if (bias)
        at::addmm_out(rows, *bias, by_token(*x), weight->t());
      else
        at::mm_out(rows, by_token(*x), weight->t());
      rows.addmm_(z.t(), columns.t());
      return y;
    }
    if (y.scalar_type() == z.scalar_type()) return at::addmm(by_token(y), z.t(), columns.t()).view(y.sizes());
    return y + at::mm(z.t(), columns.t()).to(y.scalar_type()).view(y.sizes());
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    // before the guard: under gradient checkpointing this runs a forward pass
    const auto saved = ctx->get_saved_variables();
    Arithmetic guard;
    const auto &u = saved[0], &gate = saved[1], &B = saved[2], &B0 = saved[3], &dy = grads[0];
    const auto heads = ctx->saved_data["heads"].toInt(), rank = ctx->saved_data["rank"].toInt();
    const auto p = ctx->saved_data["p"].toDouble();
    const auto mask = p > 0 ? head_mask(u, heads, rank, p, ctx->saved_data["seed"].toInt()) : Tensor();
    const auto grad = by_token(dy).to(u.scalar_type()), columns = columns_of(B, B0, u.scalar_type());
    const auto small = turned(at::mm(grad, columns), u.scalar_type());
    const auto many = heads * rank;
    auto blended = blend_backward(small.narrow(0, 0, many), u, gate, mask, heads, rank);
    Tensor du0, dB;
    if (ctx->needs_input_grad(2)) dB = turned(at::mm(blended.z, grad), ctx->saved_data["dtype"].toScalarType());
    if (small.size(0) > many) du0 = small.narrow(0, many, small.size(0) - many);
    return once_differentiable({dy, blended.du, dB, du0, blended.dgate, {}, {}, {}, {}, {}, {}, {}, {}});
  }
};

// ---- what Python calls ----------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> stems(const Tensor& x, Maybe weight, const Tensor& A, Maybe router, Maybe A0,
                                                 double scale, double p, int64_t seed) {
  const auto out = spread(Stems::apply(x, A, router, weight, A0, scale, p, seed),
                          {weight.has_value(), true, router.has_value(), A0.has_value()});
  return {out[0], out[1], out[2], out[3]};
}

Tensor heads(const Tensor& y, const Tensor& u, Maybe u0, Maybe gate, const Tensor& B, Maybe B0, Maybe x, Maybe weight,
             Maybe bias, int64_t num_heads, int64_t rank, double p, int64_t seed) {
  return Heads::apply(y, u, B, u0, gate, B0, x, weight, bias, num_heads, rank, p, seed);
}

}  // namespace

TORCH_LIBRARY(multiflora, library) {
  library.def("stems(Tensor x, Tensor? weight, Tensor A, Tensor? router, Tensor? A0, float scale, float p, int seed)"
              " -> (Tensor, Tensor, Tensor, Tensor)", &stems);
  library.def("heads(Tensor(a!) y, Tensor u, Tensor? u0, Tensor? gate, Tensor B, Tensor? B0, Tensor? x, Tensor? weight,"
              " Tensor? bias, int num_heads, int rank, float p, int seed) -> Tensor", &heads);
}
