// A CUDA device that a CPU build of torch takes for real as long as no kernel runs: what autograd, streams, pinned
// memory and the choice of an attention kernel ask of a device. Tensors on it are fake ones (FakeTensorMode).
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>
#include <map>
#include <mutex>

namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream getDefaultStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream exchangeStream(c10::Stream) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

// Ordinary memory, of which it is known what was asked for as pinned.
struct PinnedMemory final : public c10::Allocator {
  static std::mutex& lock() { static std::mutex it; return it; }
  static std::map<const char*, size_t>& sizes() { static std::map<const char*, size_t> it; return it; }

  c10::DataPtr allocate(size_t size) override {
    void* memory = std::aligned_alloc(64, (size + 64) / 64 * 64);
    std::lock_guard<std::mutex> held(lock());
    sizes()[static_cast<char*>(memory)] = size;
    return {memory, memory, &release, c10::Device(c10::DeviceType::CPU)};
  }
  static void release(void* memory) {
    std::lock_guard<std::mutex> held(lock());
    sizes().erase(static_cast<char*>(memory));
    std::free(memory);
  }
  static bool holds(const void* data) {
    std::lock_guard<std::mutex> held(lock());
    auto after = sizes().upper_bound(static_cast<const char*>(data));
    if (after == sizes().begin()) return false;
    const auto& [begin, size] = *std::prev(after);
    return static_cast<const char*>(data) <= begin + size;
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
};

}  // namespace

namespace at {

// The registry makes the name of the class a string.
struct CUDAHooks : public CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  const Generator& getDefaultGenerator(c10::DeviceIndex) const override { return detail::getDefaultCPUGenerator(); }
  bool isPinnedPtr(const void* data) const override { return PinnedMemory::holds(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { static PinnedMemory it; return &it; }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace at

namespace {

// torch's own rules for dense inputs on an H100 (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp), without cuDNN.
bool flash(const sdp::sdp_params& params) {
  const auto head = params.query.sym_size(-1);
  const auto dtype = params.query.scalar_type();
  const bool square = params.query.sym_size(-2) == params.key.sym_size(-2);
  return sdp::check_runtime_disabled_flash(params, false) && sdp::check_tensor_shapes(params, false) &&
      sdp::check_for_attn_mask(params, false) && (dtype == at::kHalf || dtype == at::kBFloat16) && head <= 256 &&
      head == params.value.sym_size(-1) && (square || !params.is_causal) &&
      sdp::check_batch_size_and_num_heads_dense<true>(params, false) &&
      sdp::check_last_dim_stride_equals_1_dense<true>(params, false);
}

bool efficient(const sdp::sdp_params& params) {
  const auto dtype = params.query.scalar_type();
  return sdp::check_runtime_disabled_mem_efficient(params, false) && sdp::check_tensor_shapes(params, false) &&
      (dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat) &&
      sdp::check_batch_size_and_num_heads_dense<false>(params, false) &&
      sdp::check_last_dim_stride_equals_1_dense<false>(params, false);
}

int64_t choose(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
               const std::optional<at::Tensor>& mask, double dropout, bool is_causal, std::optional<double>,
               bool enable_gqa) {
  const sdp::sdp_params params{query, key, value, mask, dropout, is_causal, enable_gqa};
  if (flash(params)) return static_cast<int64_t>(sdp::SDPBackend::flash_attention);
  if (efficient(params)) return static_cast<int64_t>(sdp::SDPBackend::efficient_attention);
  return static_cast<int64_t>(sdp::SDPBackend::math);
}

}  // namespace

namespace at::native {
static RegisterCUDADispatch<decltype(_fused_sdp_choice_stub)> registered(_fused_sdp_choice_stub, &choose);
}  // namespace at::native
