// A third device for tests: memory of its own kind, work done by PyTorch's CPU kernels.
//
// PyTorch leaves one device slot, PrivateUse1, open to others; torch_npu fills it, and so does this file. A tensor here
// lives in memory that no CPU kernel may touch, so code that mixes devices fails as it would on an NPU. Operators run by
// copying their inputs to the CPU and the results back, except those named by forbid(), which raise NotImplementedError.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <malloc.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>

namespace {

using at::Tensor;
constexpr auto kSlot = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kSlot, 0);
const c10::Stream kStream(c10::Stream::DEFAULT, kDevice);

// How many bytes are in use, now and at most: a device's memory is what it has least of.
std::atomic<int64_t> used{0}, most{0};

void give_back(void* place) {
  used -= static_cast<int64_t>(malloc_usable_size(place));
  std::free(place);
}

class Memory final : public at::Allocator {
 public:
  at::DataPtr allocate(size_t n_bytes) override {
    void* place = n_bytes == 0 ? nullptr : std::malloc(n_bytes);
    used += static_cast<int64_t>(malloc_usable_size(place));
    if (used > most) most = used.load();
    return at::DataPtr(place, place, give_back, kDevice);
  }
  at::DeleterFnPtr raw_deleter() const override { return give_back; }
  void copy_data(void* to, const void* from, size_t n_bytes) const override { std::memcpy(to, from, n_bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(kSlot, &memory);

// One device, one stream, and nothing that runs later: every request to wait is already granted.
class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  static constexpr c10::DeviceType static_type = kSlot;
  c10::DeviceType type() const override { return kSlot; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return kStream; }
  c10::Stream getNewStream(c10::Device, int) const override { return kStream; }
  c10::Stream exchangeStream(c10::Stream) const override { return kStream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

void grow(const at::Storage& storage, size_t n_bytes) {
  at::DataPtr larger = memory.allocate(n_bytes);
  if (storage.nbytes() > 0) std::memcpy(larger.get(), storage.data(), std::min<size_t>(storage.nbytes(), n_bytes));
  storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(larger));
  storage.unsafeGetStorageImpl()->set_nbytes(n_bytes);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void init() const override {}
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  at::Device getDeviceFromPtr(void*) const override { return kDevice; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static at::Generator shared = at::detail::createCPUGenerator();
    return shared;
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t n_bytes) const override { grow(storage, n_bytes); }
};
Hooks hooks;
const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

// Making tensors.

Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

// Moving values: the CPU's copy kernel reads and writes through a CPU tensor over the same bytes.

Tensor through_cpu(const Tensor& tensor) {
  if (tensor.is_cpu()) return tensor;
  at::Storage held = tensor.storage();
  int64_t entries = static_cast<int64_t>(held.nbytes() / tensor.element_size());
  auto keep_alive = [held](void*) {};
  auto options = at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
  Tensor flat = at::from_blob(held.mutable_data(), {entries}, keep_alive, options);
  return flat.as_strided(tensor.sizes(), tensor.strides(), tensor.storage_offset());
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  Tensor target = through_cpu(to);
  target.copy_(through_cpu(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar one_value(const Tensor& tensor) { return through_cpu(tensor).item(); }

// Looking at the same memory in another shape; only sizes and strides change, so the CPU's functions serve.

Tensor as_strided(const Tensor& x, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::cpu::as_strided(x, size, stride, offset);
}
Tensor view(const Tensor& x, c10::SymIntArrayRef size) { return at::native::view(x, C10_AS_INTARRAYREF_SLOW(size)); }
Tensor reshape_alias(const Tensor& x, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return at::native::_reshape_alias(x, size, stride);
}
const Tensor& resize(const Tensor& x, c10::SymIntArrayRef wanted, std::optional<at::MemoryFormat>) {
  c10::IntArrayRef size = C10_AS_INTARRAYREF_SLOW(wanted);
  size_t entries = c10::multiply_integers(size) + x.storage_offset();
  if (x.storage().nbytes() < entries * x.element_size()) grow(x.storage(), entries * x.element_size());
  x.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return x;
}
Tensor& set_part(Tensor& x, at::Storage from, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return at::cpu::set_(x, from, offset, size, stride);
}
Tensor& set_whole(Tensor& x, at::Storage from) {
  int64_t entries = static_cast<int64_t>(from.nbytes() / x.element_size());
  return at::cpu::set_(x, from, 0, {entries}, {1});
}
Tensor& set_like(Tensor& x, const Tensor& other) {
  return at::cpu::set_(x, other.storage(), other.storage_offset(), other.sizes(), other.strides());
}

// PyTorch asks backends of this slot for convolutions of their own.

Tensor convolve(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups) {
  std::optional<Tensor> shift;
  if (bias.has_value() && bias->defined()) shift = bias->cpu();
  return at::convolution_symint(
             x.cpu(), weight.cpu(), shift, stride, padding, dilation, transposed, output_padding, groups)
      .to(x.device());
}

std::tuple<Tensor, Tensor, Tensor> convolve_backward(
    const Tensor& gradient, const Tensor& x, const Tensor& weight, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups, std::array<bool, 3> wanted) {
  std::vector<c10::SymInt> bias_size{gradient.sym_size(1)};
  auto found = at::convolution_backward_symint(
      gradient.cpu(), x.cpu(), weight.cpu(), at::OptionalSymIntArrayRef(bias_size), stride, padding, dilation,
      transposed, output_padding, groups, wanted);
  auto back = [&](const Tensor& t) { return t.defined() ? t.to(x.device()) : t; };
  return {back(std::get<0>(found)), back(std::get<1>(found)), back(std::get<2>(found))};
}

// Everything else.

std::set<std::string> forbidden;

void anything(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  std::string name = op.schema().name();
  TORCH_CHECK_NOT_IMPLEMENTED(forbidden.count(name) == 0, name, " has no kernel on this device");
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &one_value);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage", &set_whole);
  m.impl("set_.source_Storage_storage_offset", &set_part);
  m.impl("set_.source_Tensor", &set_like);
  m.impl("convolution_overrideable", &convolve);
  m.impl("convolution_backward_overrideable", &convolve_backward);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&anything>());
}
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("used", [] { return used.load(); });
  m.def("most", [] { return most.load(); });
  m.def("forget_most", [] { most = used.load(); });
  m.def("forbid", [](const std::string& name) { forbidden.insert(name); });
  m.def("allow", [](const std::string& name) { forbidden.erase(name); });
}
