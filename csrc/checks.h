// What the ops ask of their tensors, for the bindings of every device. megalr/ops/checks.py is the twin of this file,
// with the same messages.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace megalr {

#define MEGALR_CHECK(ok, op, ...) TORCH_CHECK_VALUE(ok, "megalr.", op, ": ", __VA_ARGS__)

inline std::string dtype_name(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return "float32";
    case at::kDouble: return "float64";
    case at::kBFloat16: return "bfloat16";
    case at::kHalf: return "float16";
    case at::kInt: return "int32";
    case at::kLong: return "int64";
    default: return at::toString(type);
  }
}

// A list's name in the schema, and its tensors.
using NamedList = std::pair<const char*, at::TensorList>;

using Dtypes = std::initializer_list<at::ScalarType>;
constexpr Dtypes kStorage = {at::kFloat, at::kBFloat16};

// One tensor of the model's device, of one of the dtypes, dense and contiguous. `what` is its name, made only for a
// message.
template <typename What>
void check_tensor(const char* op, const What& what, const at::Tensor& tensor, Dtypes dtypes,
                  const char* model_name, const at::Tensor& model) {
  MEGALR_CHECK(tensor.device() == model.device(), op, what(), " is on ", tensor.device().str(), " and ", model_name,
               " on ", model.device().str(), "; all tensors of a call are on one device: write ", what(), ".to(\"",
               model.device().str(), "\")");
  const at::ScalarType type = tensor.scalar_type();
  const auto allowed = [&] {
    std::string names;
    for (const at::ScalarType one : dtypes) names += (names.empty() ? "" : " or ") + dtype_name(one);
    return names;
  };
  MEGALR_CHECK(std::find(dtypes.begin(), dtypes.end(), type) != dtypes.end(), op, what(), " is ", dtype_name(type),
               "; it must be ", allowed(), ": keep it as ", what(), ".float()");
  MEGALR_CHECK(tensor.layout() == at::kStrided, op, what(), " is sparse; write ", what(), ".to_dense()");
  MEGALR_CHECK(tensor.is_contiguous(), op, what(), " is not contiguous (shape ", tensor.sizes(), ", strides ",
               tensor.strides(), "); keep it as ", what(), ".contiguous()");
}

// No tensor that is written shares memory with another of the call.
inline void check_apart(const char* op, const std::vector<NamedList>& written, const std::vector<NamedList>& read) {
  struct Span {
    uintptr_t begin, end;
    size_t place;  // among all, the written ones first
  };
  std::vector<Span> spans;
  size_t place = 0, written_ones = 0;
  for (const auto* lists : {&written, &read}) {
    for (const auto& [name, tensors] : *lists) {
      for (const at::Tensor& tensor : tensors) {
        const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
        if (tensor.nbytes() > 0) spans.push_back({begin, begin + tensor.nbytes(), place});
        ++place;
      }
    }
    if (lists == &written) written_ones = place;
  }
  const auto name_of = [&](size_t place) {
    for (const auto* lists : {&written, &read}) {
      for (const auto& [name, tensors] : *lists) {
        if (place < tensors.size()) return std::string(name) + "[" + std::to_string(place) + "]";
        place -= tensors.size();
      }
    }
    return std::string();
  };
  // By address: of those before, what matters is the one that reaches furthest, of all and of the written ones.
  const auto earlier = [](const Span& x, const Span& y) {
    return std::tie(x.begin, x.place) < std::tie(y.begin, y.place);
  };
  std::sort(spans.begin(), spans.end(), earlier);
  Span furthest{}, furthest_written{};
  for (const Span& span : spans) {
    const bool is_written = span.place < written_ones;
    const Span& other = is_written ? furthest : furthest_written;
    MEGALR_CHECK(span.begin >= other.end, op, name_of(span.place), " shares memory with ", name_of(other.place),
                 ", and one of them is written: write ", name_of(span.place), ".clone()");
    if (span.end > furthest.end) furthest = span;
    if (is_written && span.end > furthest_written.end) furthest_written = span;
  }
}

// Lists of one length, tensors of one device, equal shapes at each index, contiguous, one storage dtype in a list.
inline void check_lists(const char* op, const std::vector<NamedList>& lists) {
  const auto& [first, model] = lists.front();
  const std::string model_name = std::string(first) + "[0]";
  for (const auto& [name, tensors] : lists) {
    MEGALR_CHECK(tensors.size() == model.size(), op, name, " has ", tensors.size(), " tensors and ", first, " ",
                 model.size(), "; give one for each of ", first);
    for (size_t i = 0; i < tensors.size(); ++i) {
      const at::Tensor& tensor = tensors[i];
      const auto what = [&, name = name] { return std::string(name) + "[" + std::to_string(i) + "]"; };
      check_tensor(op, what, tensor, kStorage, model_name.c_str(), model[0]);
      MEGALR_CHECK(tensor.scalar_type() == tensors[0].scalar_type(), op, what(), " is ",
                   dtype_name(tensor.scalar_type()), " and ", name, "[0] ", dtype_name(tensors[0].scalar_type()),
                   "; a list has one dtype: split it");
      MEGALR_CHECK(tensor.sizes() == model[i].sizes(), op, what(), " has shape ", tensor.sizes(), " and ", first, "[",
                   i, "] ", model[i].sizes(), "; they must be the same");
    }
  }
}

template <typename Values>
void check_length(const char* op, const char* name, const Values& values, const char* first, at::TensorList tensors) {
  MEGALR_CHECK(values.size() == tensors.size(), op, name, " has ", values.size(), " numbers and ", first, " ",
               tensors.size(), " tensors; give one for each of ", first);
}

// One count for each tensor, at least 1.
inline void check_steps(const char* op, const char* name, at::IntArrayRef steps, const char* first,
                        at::TensorList tensors) {
  check_length(op, name, steps, first, tensors);
  for (size_t i = 0; i < steps.size(); ++i) {
    MEGALR_CHECK(steps[i] >= 1, op, name, "[", i, "] is ", steps[i],
                 "; it counts this update too, so it is at least 1");
  }
}

// One bias correction 1 - prod beta_t for each tensor, in (0, 1].
inline void check_bias(const char* op, const char* name, at::ArrayRef<double> values, const char* first,
                       at::TensorList tensors) {
  check_length(op, name, values, first, tensors);
  for (size_t i = 0; i < values.size(); ++i) {
    MEGALR_CHECK(values[i] > 0 && values[i] <= 1, op, name, "[", i, "] is ", values[i],
                 "; it is 1 - prod beta_t over the updates, this one included, in (0, 1]");
  }
}

// (n, 3), fp32, with the tensors.
inline void check_statistics(const char* op, const at::Tensor& statistics, const char* first, at::TensorList tensors) {
  const auto what = [] { return std::string("statistics"); };
  const std::string model_name = std::string(first) + "[0]";
  check_tensor(op, what, statistics, {at::kFloat}, model_name.c_str(), tensors.empty() ? statistics : tensors[0]);
  MEGALR_CHECK(statistics.dim() == 2 && statistics.size(0) == int64_t(tensors.size()) && statistics.size(1) == 3, op,
               "statistics has shape ", statistics.sizes(), "; it must be [", tensors.size(), ", 3], a row for each of ",
               first);
}

// What an op writes is as exact as what it computes.
inline void check_float(const char* op, const char* name, at::TensorList tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    MEGALR_CHECK(tensors[i].scalar_type() == at::kFloat, op, name, "[", i, "] is ",
                 dtype_name(tensors[i].scalar_type()), "; it must be float32: keep it as ", name, "[", i, "].float()");
  }
}

// The data of a tensor that an op modifies, and a note of it for autograd, which may have saved the tensor.
inline void* modified(const at::Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  return tensor.mutable_data_ptr();
}

}  // namespace megalr
