// refactorize: for every low-rank pair the balanced pair of the same product, in place, with its moments.
//
// With the thin QR decompositions B = Qb Rb, A^T = Qa Ra and the singular value decomposition Rb Ra^T = U S V^T of the
// core, the new pair is Qb U sqrt(S), sqrt(S) V^T Qa^T. It is B M, M^-1 A with M = Ra^T V S^-1/2, which is computed by
//
//   L L^T = A A^T (Cholesky, so L = Ra^T),  K = L^T (B^T B) L = V S^2 V^T (symmetric),  M = L V S^-1/2,  W = M^-T,
//
// with Gram matrices and everything of r x r elements in fp64. The product is kept by M W^T = I, however inaccurate V
// and S are; that the pair is balanced hangs on them. A pair whose squared condition is too much for fp64 takes QR
// decompositions and an SVD instead (by_qr). Nothing larger than r x r is allocated but chunks of a factor's rows.
//
// ATen calls only: the same code for CPU and CUDA tensors. The host reads the verdicts once in a call. Beyond that, on
// CUDA, torch's eigh reads its own error flags, once for each group of pairs, and by_qr's decompositions theirs.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/ThreadLocalState.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <string_view>
#include <vector>

#include "checks.h"

namespace megalr {
namespace {

using at::Tensor;

enum Status : int64_t {
  kDone = 0,
  kNotFinite = 1,
  kLowRank = 2,
  kMoments = 3,
  kNoDecomposition = 4,
  kNeedsQr = 5,  // never returned
};
enum class Moments { kKeep, kReset, kTransport };

struct Pair {
  Tensor b, a;                    // (m, r), (n, r): A transposed, a view, so that both are rows of r elements
  std::array<Tensor, 4> moments;  // first and second moment of b, of a, in the same orientation; undefined with kKeep
  int64_t rank() const { return b.size(1); }
  int64_t bytes() const { return 4 * (b.numel() + a.numel()); }  // as fp32
};

// Of the dtype's numbers.
double largest_of(const Tensor& x) {
  return x.scalar_type() == at::kBFloat16 ? double{std::numeric_limits<c10::BFloat16>::max()}
                                          : double{std::numeric_limits<float>::max()};
}
double largest_of(const Pair& pair) { return std::min(largest_of(pair.b), largest_of(pair.a)); }

// Rows that are converted and multiplied at once: few enough to stay in a cache and under the factor's own bytes, and
// no fewer than r, which keeps the products efficient.
int64_t chunk_rows(const Tensor& x) {
  const int64_t rows = x.size(0), r = x.size(1);
  return std::max({r, std::min((rows + 3) / 4, (int64_t{1} << 18) / r), int64_t{1}});
}

// x^T x in fp64 into gram (r, r), by chunks of rows and by blocks on and below the diagonal, which are then mirrored.
void gram_into(const Tensor& gram, const Tensor& x) {
  constexpr int64_t kBlock = 128;
  const int64_t rows = x.size(0), r = x.size(1), step = chunk_rows(x);
  gram.zero_();
  for (int64_t i = 0; i < rows; i += step) {
    const Tensor part = x.narrow(0, i, std::min(step, rows - i)).to(at::kDouble);
    for (int64_t j = 0; j < r; j += kBlock) {
      const int64_t width = std::min(kBlock, r - j);
      Tensor block = gram.narrow(0, j, width).narrow(1, 0, j + width);
      block.addmm_(part.narrow(1, j, width).t(), part.narrow(1, 0, j + width));
    }
  }
  for (int64_t j = kBlock; j < r; j += kBlock) {
    const int64_t width = std::min(kBlock, r - j);
    gram.narrow(0, 0, j).narrow(1, j, width).copy_(gram.narrow(0, j, width).narrow(1, 0, j).t());
  }
}

// x = x t in place, in t's dtype; where `done` (a 0-dim bool, or undefined for true) is false x keeps its bits.
void multiply_(const Tensor& x, const Tensor& t, const Tensor& done) {
  const int64_t rows = x.size(0), step = chunk_rows(x);
  for (int64_t i = 0; i < rows; i += step) {
    Tensor part = x.narrow(0, i, std::min(step, rows - i));
    const Tensor old = part.to(t.scalar_type(), /*non_blocking=*/false, /*copy=*/true);
    if (!done.defined() && part.scalar_type() == t.scalar_type()) {
      at::mm_out(part, old, t);
    } else {
      Tensor fresh = at::mm(old, t).to(part.scalar_type());
      part.copy_(done.defined() ? at::where(done, fresh, part) : fresh);
    }
  }
}

// The pair becomes B m, (A^T w)^T, with its moments.
void rewrite(const Pair& pair, const Tensor& m, const Tensor& w, Moments mode, const Tensor& done) {
  multiply_(pair.b, m, done);
  multiply_(pair.a, w, done);
  if (mode == Moments::kReset) {
    for (Tensor moment : pair.moments) done.defined() ? moment.masked_fill_(done, 0) : moment.zero_();
  } else if (mode == Moments::kTransport) {
    // Gradients map as dB w and dA^T m, and first moments with them. Second moments take the squared coefficients.
    multiply_(pair.moments[0], w, done);
    multiply_(pair.moments[1], w.square(), done);
    multiply_(pair.moments[2], m, done);
    multiply_(pair.moments[3], m.square(), done);
  }
}

// Whether x t is in the range of x's dtype (a 0-dim bool): none of its elements is larger than the largest of x times the
// largest column sum of |t|. Where x holds a NaN it is not.
Tensor in_range(const Tensor& x, const Tensor& t) {
  const auto [low, high] = at::aminmax(x.is_contiguous() ? x : x.t());
  return at::maximum(high, -low).to(at::kDouble).mul_(t.abs().sum(0).amax()) < largest_of(x);
}

// Whether all moments are after their transport.
Tensor moments_in_range(const Pair& pair, const Tensor& m, const Tensor& w) {
  return in_range(pair.moments[0], w)
      .logical_and_(in_range(pair.moments[1], w.square()))
      .logical_and_(in_range(pair.moments[2], m))
      .logical_and_(in_range(pair.moments[3], m.square()));
}

// The sign of a singular vector is an accident of the arithmetic: each column of m gets the one that makes its largest
// element positive, so that the two ways below, and the torch reference, agree.
Tensor signs(const Tensor& m) {
  const Tensor sign = m.gather(-2, m.abs().argmax(-2, /*keepdim=*/true)).sign();
  return at::where(sign == 0, 1.0, sign);
}

struct Maps {
  Tensor verdict;  // (k,) int64
  Tensor gentle;   // (k,) bool: a product in fp32 is as good as one in fp64
  Tensor m, w;     // (k, r, r) fp64: B_new = B m, A_new^T = A^T w, w = m^-T; undefined if no pair of a CPU call is fit
};

// The maps of k pairs of rank r from their Gram matrices (k, r, r), which are consumed. Of finite fp32 factors nothing
// here leaves the range of fp64: K's elements are below 1e155 m n r^2.
Maps maps_of(Tensor gram_b, Tensor gram_a, double largest) {
  const Tensor diag_b = gram_b.diagonal(0, -2, -1).clone(), diag_a = gram_a.diagonal(0, -2, -1).clone();  // (k, r)
  const Tensor finite = diag_b.isfinite().all(-1).logical_and_(diag_a.isfinite().all(-1));
  auto [l, info] = at::linalg_cholesky_ex(gram_a);
  gram_a.reset();
  // A pivot against its diagonal element is the squared distance of a row of A from the ones before, whatever the rows'
  // scales. fp64 keeps that to 1e-16; below 1e-9 the rows are no longer orthonormal to fp32 after the division by L.
  const Tensor pivot = (l.diagonal(0, -2, -1).square() / diag_a).amin(-1);
  const Tensor fit = finite.logical_and(info == 0).logical_and_(pivot > 1e-9);
  const Tensor unfit = at::where(finite, at::full({}, kNeedsQr, info.options().dtype(at::kLong)), kNotFinite);
  if (l.is_cpu() && !fit.any().item<bool>()) return {unfit, fit, {}, {}};

  const auto each = [](const Tensor& x) { return x.unsqueeze(-1).unsqueeze(-1); };
  const Tensor skip = each(fit.logical_not());
  l.masked_fill_(skip, 0).diagonal(0, -2, -1).masked_fill_(skip.squeeze(-1), 1);  // eigh raises on NaN
  Tensor k = at::matmul(gram_b, l);
  gram_b.reset();
  k = at::matmul(l.mT(), k).masked_fill_(skip, 0);
  auto [lambda, v] = at::linalg_eigh(k);  // ascending: S^2 from the smallest
  k.reset();
  lambda = lambda.flip(-1), v = v.flip(-1);

  const Tensor s = lambda.clamp_min(std::numeric_limits<double>::min()).sqrt_(), root = s.sqrt().unsqueeze(-2);
  Tensor m = at::matmul(l, v).div_(root);
  const Tensor sign = signs(m);
  m.mul_(sign);
  Tensor w = at::linalg_solve_triangular(l.mT(), v.mul_(root), /*upper=*/true).mul_(sign);
  l.reset(), v.reset();

  // K's rounding is 1e-16 of `scale`, which is far above the eigenvalues where B A cancels. The smallest must stand
  // clear of it, and its effect on B^T B, relative to the largest element, stay below fp32's rounding.
  const Tensor scale = diag_b.mul(diag_a).sum(-1), low = lambda.select(-1, -1), high = lambda.select(-1, 0);
  const Tensor clear = (low > 1e-13 * scale).logical_and_((low * high).clamp_min_(0).sqrt_() > 1e-9 * scale);
  const Tensor fits = s.select(-1, 0).sqrt() < largest;  // no element of the new pair is larger
  Tensor verdict = at::where(fit.logical_and(clear), at::where(fits, unfit.new_zeros({}), kNotFinite), unfit);

  // What fp32 products would lose, as mean squares in units of its rounding: of the balance, and of the product.
  const Tensor norm = lambda.sum(-1);
  const Tensor spread_b = at::matmul(diag_b.unsqueeze(-2), m.square()).sum({-2, -1});
  const Tensor spread_a = at::matmul(diag_a.unsqueeze(-2), w.square()).sum({-2, -1});
  const Tensor peak = at::maximum(m.abs().amax({-2, -1}), w.abs().amax({-2, -1}));
  const Tensor spread = at::maximum(spread_b, spread_a);
  const Tensor balanced = (spread * s.select(-1, 0) < 1e3 * norm).logical_and_(spread < 1e70);  // no sum overflows
  const Tensor gentle = balanced.logical_and_(scale < 64 * norm).logical_and_(peak < 1e15);
  return {verdict, gentle, m, w};
}

// A group of pairs of one rank and one range; writes their verdicts.
void by_cholesky(const std::vector<const Pair*>& group, Moments mode, const Tensor& verdicts) {
  const int64_t k = group.size(), r = group[0]->rank();
  const auto options = verdicts.options().dtype(at::kDouble);
  Tensor gram_b = at::empty({k, r, r}, options), gram_a = at::empty({k, r, r}, options);
  for (int64_t i = 0; i < k; ++i) {
    gram_into(gram_b[i], group[i]->b);
    gram_into(gram_a[i], group[i]->a);
  }
  Maps maps;
  try {
    maps = maps_of(std::move(gram_b), std::move(gram_a), largest_of(*group[0]));
  } catch (const c10::LinAlgError&) {  // eigh does not converge, for one of the group
    verdicts.fill_(kNeedsQr);
    return;
  }
  verdicts.copy_(maps.verdict);
  const bool cpu = verdicts.is_cpu();  // there a verdict costs nothing to read
  for (int64_t i = 0; i < k; ++i) {
    if (cpu && verdicts[i].item<int64_t>() != kDone) continue;
    if (mode == Moments::kTransport) {
      const Tensor spoilt = moments_in_range(*group[i], maps.m[i], maps.w[i]).logical_not_();
      verdicts[i].masked_fill_(spoilt.logical_and_(verdicts[i] == kDone), kMoments);
      if (cpu && verdicts[i].item<int64_t>() != kDone) continue;
    }
    const Tensor done = cpu ? Tensor() : verdicts[i] == kDone;
    const bool single = cpu && maps.gentle[i].item<bool>();
    const Tensor m = single ? maps.m[i].to(at::kFloat) : maps.m[i], w = single ? maps.w[i].to(at::kFloat) : maps.w[i];
    rewrite(*group[i], m, w, mode, done);
  }
}

// R of x = Q R in fp64, from chunks of rows: each time of the triangle so far on top of the next rows.
Tensor triangle_of(const Tensor& x) {
  const int64_t rows = x.size(0), r = x.size(1), step = std::max(r, int64_t{64});
  Tensor stack = at::empty({r + step, r}, x.options().dtype(at::kDouble)), top = stack.narrow(0, 0, r);
  top.copy_(x.narrow(0, 0, r));
  int64_t done = r;
  do {
    const int64_t some = std::min(step, rows - done);
    stack.narrow(0, r, some).copy_(x.narrow(0, done, some));
    top.copy_(std::get<1>(at::linalg_qr(stack.narrow(0, 0, r + some), "r")));
    done += some;
  } while (done < rows);
  return top.clone();
}

// The maps of one pair by QR decompositions and an SVD, whatever its condition; undefined where it has no status kDone.
Status qr_maps(const Pair& pair, Tensor& m, Tensor& w) {
  Tensor r_b = triangle_of(pair.b), r_a = triangle_of(pair.a);
  const double scale = (r_b.norm(2, 0) * r_a.norm(2, 0)).norm().item<double>();
  if (!std::isfinite(scale)) return kNotFinite;
  Tensor core = at::mm(r_b, r_a.t());
  // At a large rank there is no room for the triangles beside the SVD: they are made again.
  const bool tight = pair.b.size(0) + pair.a.size(0) < 6 * pair.rank();
  if (tight) r_b.reset(), r_a.reset();
  auto [u, s, vh] = at::linalg_svd(core, /*full_matrices=*/false);
  core.reset();
  // Below fp32's rounding of the largest, a singular value is rounding; so it is, where B A cancels, below fp64's of
  // what the factors' norms allow.
  const double high = s[0].item<double>(), low = s[-1].item<double>();
  if (!(low > std::numeric_limits<float>::epsilon() * high && low > 1e-10 * scale)) return kLowRank;
  if (!(std::sqrt(high) < largest_of(pair))) return kNotFinite;
  const Tensor root = s.sqrt();
  if (tight) r_a = triangle_of(pair.a);
  m = at::mm(r_a.t(), vh.t()).div_(root);
  r_a.reset(), vh.reset();
  const Tensor sign = signs(m);
  m.mul_(sign);
  if (tight) r_b = triangle_of(pair.b);
  w = at::mm(r_b.t(), u).div_(root).mul_(sign);
  return kDone;
}

// One pair whose condition is too much for the Gram matrices: about twice the time.
Status by_qr(const Pair& pair, Moments mode) {
  Tensor m, w;
  try {
    const Status status = qr_maps(pair, m, w);
    if (status != kDone) return status;
  } catch (const c10::LinAlgError&) {
    return kNoDecomposition;
  }
  if (mode == Moments::kTransport && !moments_in_range(pair, m, w).item<bool>()) return kMoments;
  rewrite(pair, m, w, mode, {});
  return kDone;
}

// What by_cholesky allocates for a pair at its peak, in eigh: L, K, V and two as workspace, in fp64; and one to spare.
int64_t needed_bytes(const Pair& pair) { return 8 * 6 * pair.rank() * pair.rank(); }

// Groups of pairs, the largest first: single pairs on a CPU, where threads share them, and on CUDA as many of one rank
// and range as stay under the budget, whose r x r matrices are decomposed as a batch.
std::vector<std::vector<int64_t>> grouped(const std::vector<Pair>& pairs, int64_t budget, bool cpu) {
  std::vector<int64_t> order(pairs.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
    return std::make_pair(pairs[i].rank(), pairs[i].bytes()) > std::make_pair(pairs[j].rank(), pairs[j].bytes());
  });
  std::vector<std::vector<int64_t>> groups;
  for (const int64_t i : order) {
    const auto joins = [&](const Pair& first, int64_t count) {
      return first.rank() == pairs[i].rank() && largest_of(first) == largest_of(pairs[i]) &&
             (count + 1) * needed_bytes(pairs[i]) <= budget;
    };
    if (!cpu && !groups.empty() && joins(pairs[groups.back()[0]], groups.back().size())) {
      groups.back().push_back(i);
    } else {
      groups.push_back({i});
    }
  }
  return groups;
}

// body(i) for all i < count, by `workers` threads that each take the next one when free; one worker leaves the threads
// to the matrix products.
template <typename Body>
void share(int64_t count, int64_t workers, const Body& body) {
  if (workers <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  std::atomic<int64_t> next{0};
  const at::ThreadLocalState state;
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    const at::ThreadLocalStateGuard guard(state);
    for (int64_t i = next++; i < count; i = next++) body(i);
  });
}

// What the tensors must be. megalr/ops/refactorize.py has the same checks, with the same messages.

constexpr const char* kOp = "refactorize";

Moments mode_of(std::string_view mode) {
  if (mode == "keep") return Moments::kKeep;
  if (mode == "reset") return Moments::kReset;
  MEGALR_CHECK(mode == "transport", kOp, "mode is \"", mode, "\"; write keep, reset or transport");
  return Moments::kTransport;
}

std::vector<Pair> checked_pairs(at::TensorList b, at::TensorList a, at::TensorList moments, Moments mode) {
  const size_t each = mode == Moments::kKeep ? 0 : 4;
  MEGALR_CHECK(a.size() == b.size(), kOp, "A has ", a.size(), " tensors and B ", b.size(), "; give one for each of B");
  MEGALR_CHECK(moments.size() == each * b.size(), kOp, "moments has ", moments.size(), " tensors and B ", b.size(),
               "; this mode takes ", each, " for each of B",
               each ? ": exp_avg_B, exp_avg_sq_B, exp_avg_A, exp_avg_sq_A" : "");
  std::vector<Pair> pairs;
  for (size_t i = 0; i < b.size(); ++i) {
    const std::string index = "[" + std::to_string(i) + "]";
    check_tensor(kOp, [&] { return "B" + index; }, b[i], kStorage, "B[0]", b[0]);
    check_tensor(kOp, [&] { return "A" + index; }, a[i], kStorage, "B[0]", b[0]);
    MEGALR_CHECK(b[i].dim() == 2 && a[i].dim() == 2 && b[i].size(1) == a[i].size(0), kOp, "B", index, " has shape ",
                 b[i].sizes(), " and A", index, " ", a[i].sizes(), "; they must be [m, r] and [r, n]");
    const int64_t most = std::min(b[i].size(0), a[i].size(1));
    MEGALR_CHECK(b[i].size(1) <= most, kOp, "B", index, " has shape ", b[i].sizes(), " and A", index, " ", a[i].sizes(),
                 "; their product has at most rank ", most, ": use a rank up to that");
    Pair pair{b[i], a[i].t(), {}};
    for (size_t j = 0; j < each; ++j) {
      const std::string what = "moments[" + std::to_string(4 * i + j) + "]";
      const Tensor &moment = moments[4 * i + j], &factor = j < 2 ? b[i] : a[i];
      check_tensor(kOp, [&] { return what; }, moment, kStorage, "B[0]", b[0]);
      MEGALR_CHECK(moment.sizes() == factor.sizes(), kOp, what, " has shape ", moment.sizes(), " and ",
                   j < 2 ? "B" : "A", index, " ", factor.sizes(), "; they must be the same");
      pair.moments[j] = j < 2 ? moment : moment.t();
    }
    pairs.push_back(std::move(pair));
  }
  check_apart(kOp, {{"B", b}, {"A", a}, {"moments", moments}}, {});
  return pairs;
}

Tensor refactorize(at::TensorList b, at::TensorList a, at::TensorList moments, std::string_view mode_name) {
  const Moments mode = mode_of(mode_name);
  const std::vector<Pair> pairs = checked_pairs(b, a, moments, mode);
  if (pairs.empty()) return at::empty({0}, at::kLong);
  const at::AutoDispatchBelowADInplaceOrView guard;
  for (const at::TensorList list : {b, a, moments}) {
    for (const Tensor& x : list) modified(x);
  }

  // At most 4 times the largest pair's factors exist beside the tensors at once, wherever m + n is at least 4 r.
  int64_t budget = 0, need = 1;
  for (const Pair& pair : pairs) {
    budget = std::max(budget, 4 * pair.bytes());
    need = std::max(need, needed_bytes(pair));
  }
  const bool cpu = b[0].is_cpu();
  const auto groups = grouped(pairs, budget, cpu);
  const int64_t count = groups.size(), threads = at::get_num_threads();
  const bool one_each = cpu && std::min(count, budget / need) >= threads;  // else the products share the threads

  std::vector<Tensor> verdicts(count);
  share(count, one_each ? threads : 1, [&](int64_t g) {
    std::vector<const Pair*> group;
    for (const int64_t i : groups[g]) group.push_back(&pairs[i]);
    verdicts[g] = at::zeros({int64_t(group.size())}, b[0].options().dtype(at::kLong));
    if (group[0]->rank() > 0) by_cholesky(group, mode, verdicts[g]);
  });

  const Tensor found = at::cat(verdicts).cpu();  // the host waits here, once
  Tensor status = at::empty_like(found);
  int64_t position = 0;
  for (const auto& group : groups) {
    for (const int64_t i : group) {
      int64_t verdict = found[position++].item<int64_t>();
      if (verdict == kNeedsQr) verdict = by_qr(pairs[i], mode);
      status[i] = verdict;
    }
  }
  return status.to(b[0].device());
}

}  // namespace

TORCH_LIBRARY_IMPL(megalr, CPU, m) { m.impl("refactorize", &refactorize); }
TORCH_LIBRARY_IMPL(megalr, CUDA, m) { m.impl("refactorize", &refactorize); }

}  // namespace megalr
