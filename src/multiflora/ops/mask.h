// mask.py for processors: the same draws of the same seed.

#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace {

using at::Tensor;

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

}  // namespace
