// Tables of a layer's KV parameters.
//
// The score of past token t has the term q . R_t k_shift = sum_j A_j cos(theta_j t) + B_j sin(theta_j t) over rotary
// pairs j, with A_j = q_j a_j + q_{j+n} b_j and B_j = q_{j+n} a_j - q_j b_j for the shift (a_j, b_j). Over the tokens
// t = centre + i, -64 <= i < 64, of a chunk, A and B are rotated to the centre once, from the exact fixed-point angle,
// and what is left is a fixed set of functions of i:
//
//     fast pairs (theta_j * 64 > 5)   cos(theta_j i), sin(theta_j i), tabulated
//     slow pairs, all together        16 Chebyshev polynomials T_p(i / 64): their coefficients are linear in A and B
//
// Chebyshev interpolation with 16 nodes of a function whose 16th derivative is at most theta^16 errs on |i| <= 64 by
// (64 theta)^16 / (2^15 16!) <= 5^16 / 6.9e17 = 2.3e-7 of the coefficient, as much as fp32 itself. With base 1e4 and 64
// pairs 18 are fast: 52 functions instead of 128.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <vector>

#include "api.h"

namespace wkvquant {
namespace {

constexpr double kPi = 3.14159265358979323846;
constexpr double kSlow = 5.0;

template <class T>
T* allocate(size_t n) {
  const size_t bytes = (std::max<size_t>(n, 1) * sizeof(T) + 63) / 64 * 64;
  T* p = static_cast<T*>(aligned_alloc(64, bytes));
  memset(p, 0, bytes);
  return p;
}

int round_up(int n) { return (n + kLanes - 1) / kLanes * kLanes; }

void build_basis(Prepared& p) {
  std::vector<double> theta(p.pairs);
  for (int j = 0; j < p.pairs; ++j) theta[j] = static_cast<int64_t>(p.turns[j]) * (2 * kPi / 0x1p64);
  std::vector<int> order;
  for (int j = 0; j < p.pairs; ++j) {
    bool used = false;
    for (int h = 0; h < p.num_kv_heads; ++h) {
      const float* shift = p.k_shift + h * p.head_size;
      used |= shift[j] != 0 || shift[j + p.pairs] != 0;
    }
    if (used) order.push_back(j);
  }
  const double half = kChunk / 2;
  const auto is_fast = [&](int j) { return std::fabs(theta[j]) * half > kSlow; };
  p.active = order.size();
  p.fast = std::stable_partition(order.begin(), order.end(), is_fast) - order.begin();
  if (2 * (p.active - p.fast) <= kChebyshev) p.fast = p.active;  // the polynomials would be more work
  const int slow = p.active - p.fast;
  p.active_padded = round_up(p.active);
  p.basis_rows = 2 * p.fast + (slow ? kChebyshev : 0);
  p.pair = allocate<int32_t>(p.active_padded);
  p.pair_turns = allocate<uint64_t>(p.active_padded);
  p.basis = allocate<float>(static_cast<size_t>(p.basis_rows) * kChunk);
  p.chebyshev = allocate<float>(static_cast<size_t>(slow) * kChebyshev);
  for (int a = 0; a < p.active; ++a) {
    p.pair[a] = order[a];
    p.pair_turns[a] = p.turns[order[a]];
  }
  for (int i = 0; i < kChunk; ++i) {
    const double x = i - half;
    for (int a = 0; a < p.fast; ++a) {
      p.basis[2 * a * kChunk + i] = std::cos(theta[order[a]] * x);
      p.basis[(2 * a + 1) * kChunk + i] = std::sin(theta[order[a]] * x);
    }
    for (int d = 0; slow && d < kChebyshev; ++d)
      p.basis[(2 * p.fast + d) * kChunk + i] = std::cos(d * std::acos(x / half));
  }
  for (int a = 0; a < slow; ++a) {
    // cos is even and sin odd: even coefficients belong to A, odd ones to B.
    for (int d = 0; d < kChebyshev; ++d) {
      double sum = 0;
      for (int k = 0; k < kChebyshev; ++k) {
        const double node = kPi * (k + 0.5) / kChebyshev;
        const double angle = theta[order[p.fast + a]] * half * std::cos(node);
        sum += (d % 2 ? std::sin(angle) : std::cos(angle)) * std::cos(d * node);
      }
      p.chebyshev[a * kChebyshev + d] = sum * (d ? 2.0 : 1.0) / kChebyshev;
    }
  }
}

}  // namespace

Prepared* prepare(const WkvParams& in) {
  Prepared* p = new Prepared{};
  const int d = in.head_size, n = in.num_kv_heads * d;
  p->num_kv_heads = in.num_kv_heads;
  p->head_size = d;
  p->hadamard = in.key_hadamard ? d & -d : 0;
  p->pairs = in.rope_turns ? in.rotary_pairs : 0;
  p->query_scale = allocate<float>(n);
  p->key_scale = allocate<float>(n);
  p->k_shift = allocate<float>(n);
  p->v_shift = allocate<float>(n);
  p->turns = allocate<uint64_t>(round_up(p->pairs));
  const double norm = p->hadamard ? 1 / std::sqrt(static_cast<double>(p->hadamard)) : 1.0;
  for (int i = 0; i < n; ++i) {
    p->query_scale[i] = in.k_smooth[i] * norm;
    p->key_scale[i] = norm / in.k_smooth[i];
    p->k_shift[i] = in.k_shift[i] * (i % d < 2 * p->pairs ? in.rope_scaling : 1.0f);
    p->v_shift[i] = in.v_shift[i];
    p->has_k_shift |= p->k_shift[i] != 0;
  }
  if (in.k_first && in.v_first) {
    for (float** array : {&p->k_first, &p->v_first, &p->k_extra, &p->v_extra}) *array = allocate<float>(n);
    for (int i = 0; i < n; ++i) {
      p->k_first[i] = in.k_first[i];
      p->v_first[i] = in.v_first[i];
      p->k_extra[i] = in.k_first[i] - p->k_shift[i];
      p->v_extra[i] = in.v_first[i] - p->v_shift[i];
    }
  }
  for (int j = 0; j < p->pairs; ++j) p->turns[j] = static_cast<uint64_t>(in.rope_turns[j]);
  build_basis(*p);
  return p;
}

void release(Prepared* p) {
  void* arrays[] = {p->query_scale, p->key_scale, p->k_shift, p->v_shift,    p->turns, p->k_first,  p->v_first,
                    p->k_extra,     p->v_extra,   p->pair,    p->pair_turns, p->basis, p->chebyshev};
  for (void* array : arrays) free(array);
  delete p;
}

}  // namespace wkvquant
