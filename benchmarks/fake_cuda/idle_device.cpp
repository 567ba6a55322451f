// Makes a CPU build of torch believe in one CUDA device that never does anything, so that fake tensors may lie on it.
// Fake tensors have no memory: all that torch asks of the device is which one is current and which stream.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <new>

namespace {

constexpr auto kKind = c10::DeviceType::CUDA;

struct IdleGuard final : c10::impl::NoOpDeviceGuardImpl<kKind> {
  static c10::Device device() { return {kKind, 0}; }
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, device()); }
  c10::Device getDevice() const override { return device(); }
  c10::Device exchangeDevice(c10::Device) const override { return device(); }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

struct IdleHooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};
static_assert(sizeof(IdleHooks) == sizeof(at::CUDAHooksInterface));

}  // namespace

// Called once per process. torch keeps the hooks that it found at its import: ours take their place in memory.
extern "C" void install_idle_cuda() {
  static const c10::impl::DeviceGuardImplRegistrar guard(kKind, new IdleGuard());
  new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) IdleHooks();
}
