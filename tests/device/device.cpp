// A simulated accelerator for torch on the CPU: several devices of the type PrivateUse1.
//
// * Device memory is mapped without access (PROT_NONE) except while a kernel runs, and is filled with
//   0xFF (NaN) when it is allocated: host code that follows a device pointer crashes.
// * Operators without a kernel below go to `fallback`. It checks devices as CUDA does (all tensors on
//   one device; CPU tensors only without dimensions or as indices of index/index_put), gives the CPU's
//   kernel a view of the device memory without a copy, and counts one launch.
// * Whatever makes the host wait on CUDA is counted: reading a scalar, blocking copies, results whose
//   shape depends on data. A Python listener, if set, is called for each one.
// * Streams have vector clocks: each kernel and copy records what it reads and writes, and an access
//   that no event orders after another stream's counts as a race. Copies from pinned memory on a side
//   stream are delayed until something waits for them.
// * Memory is counted as a caching allocator does (reserved shrinks only by empty_cache), and running
//   out of it raises torch.OutOfMemoryError.
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/NativeFunctions.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <unordered_map>
#include <unordered_set>

namespace sim {
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
constexpr auto kSim = DeviceType::PrivateUse1;

long env(const char* name, long otherwise) {
  const char* text = std::getenv(name);
  return text && *text ? std::atol(text) : otherwise;
}
int devices() {
  const char* seen = std::getenv("SIM_VISIBLE_DEVICES");  // as CUDA_VISIBLE_DEVICES
  int all = env("SIM_DEVICES", 2);
  if (!seen) return all;
  int count = *seen ? 1 : 0;
  for (const char* p = seen; *p; ++p) count += *p == ',';
  return std::min(count, all);
}
size_t total_memory() { return size_t(env("SIM_MEMORY", 4L << 30)); }
bool protecting() { static bool on = env("SIM_PROTECT", 1); return on; }

thread_local DeviceIndex current = 0;

// ---------------------------------------------------------------- clocks of streams
using StreamKey = std::pair<int, int64_t>;  // device, stream
using Clock = std::map<StreamKey, uint64_t>;
struct DelayedCopy { std::function<void()> copy; uint64_t time; };
struct StreamState { uint64_t time = 0; Clock seen; std::deque<DelayedCopy> delayed; };
std::recursive_mutex mutex;
std::map<StreamKey, StreamState> streams;
Clock host;  // what the host knows to be done
thread_local std::map<int, int64_t> current_stream;
std::atomic<int64_t> next_stream{1};
void merge(Clock& into, const Clock& other) {
  for (auto& [key, time] : other) into[key] = std::max(into[key], time);
}
StreamKey now(int device) { return {device, current_stream.count(device) ? current_stream[device] : 0}; }
void run_delayed(const StreamKey& key, uint64_t until) {
  auto& state = streams[key];
  while (!state.delayed.empty() && state.delayed.front().time <= until) {
    auto delayed = std::move(state.delayed.front());
    state.delayed.pop_front();
    delayed.copy();
  }
}
void wait_for(const StreamKey& waiting, const StreamKey& other) {
  std::lock_guard<std::recursive_mutex> g(mutex);
  run_delayed(other, streams[other].time);
  auto& seen = streams[waiting].seen;
  seen[other] = std::max(seen[other], streams[other].time);
  merge(seen, streams[other].seen);
}
void host_waits(const StreamKey& key, uint64_t until) {
  std::lock_guard<std::recursive_mutex> g(mutex);
  run_delayed(key, until);
  host[key] = std::max(host[key], until);
  merge(host, streams[key].seen);
}

// ---------------------------------------------------------------- counting
std::map<std::string, long> launches, counts, races;
std::map<std::string, long> bytes_of;
py::object* listener = nullptr;  // called with (what, operator, bytes)
void count(const std::string& what, const std::string& op, long bytes = 0) {
  {
    std::lock_guard<std::recursive_mutex> g(mutex);
    counts[what]++;
    bytes_of[what] += bytes;
  }
  if (listener) {
    py::gil_scoped_acquire gil;
    try { (*listener)(what, op, bytes); } catch (py::error_already_set& e) { e.discard_as_unraisable("simulated"); }
  }
}

// ---------------------------------------------------------------- memory
struct Block {
  char* start; size_t mapped, size; int device; int open = 0;
  StreamKey writer{-1, 0}; uint64_t written = 0; Clock readers;
};
std::map<char*, Block> blocks;
struct Memory { size_t allocated = 0, reserved = 0, peak = 0; long ooms = 0; };
std::map<int, Memory> memory;
constexpr size_t PAGE = 4096;

Block* block_of(const void* p) {
  auto it = blocks.upper_bound((char*)p);
  if (it == blocks.begin()) return nullptr;
  --it;
  return (char*)p < it->second.start + it->second.mapped ? &it->second : nullptr;
}
void release(void* p) {
  if (!p) return;
  std::lock_guard<std::recursive_mutex> g(mutex);
  auto it = blocks.find((char*)p);
  if (it == blocks.end()) return;
  memory[it->second.device].allocated -= it->second.size;
  munmap(it->second.start, it->second.mapped);
  blocks.erase(it);
}
struct Allocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t n) override {
    int device = current;
    if (!n) return {nullptr, nullptr, &release, Device(kSim, device)};
    std::lock_guard<std::recursive_mutex> g(mutex);
    auto& m = memory[device];
    if (m.allocated + n > total_memory()) {
      m.ooms++;
      TORCH_CHECK_WITH(OutOfMemoryError, false, "SIM out of memory. Tried to allocate ", n, " bytes. Device ",
        device, " has ", total_memory(), " bytes, of which ", m.allocated, " are allocated");
    }
    size_t mapped = (n + PAGE - 1) / PAGE * PAGE;
    void* p = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(p != MAP_FAILED, "mmap failed: too many maps (vm.max_map_count)?");
    std::memset(p, 0xFF, n);
    if (protecting()) mprotect(p, mapped, PROT_NONE);
    Block b{(char*)p, mapped, n, device};
    blocks.emplace((char*)p, b);
    m.allocated += n;
    m.peak = std::max(m.peak, m.allocated);
    m.reserved = std::max(m.reserved, m.allocated);
    return {p, p, &release, Device(kSim, device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* d, const void* s, size_t n) const override { TORCH_CHECK(false, "copy_data"); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {
    std::lock_guard<std::recursive_mutex> g(mutex);
    counts["empty_cache"]++;
    for (auto& [d, m] : memory) m.reserved = m.allocated;
  }
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex d) override {
    c10::CachingDeviceAllocator::DeviceStats s;
    auto& m = memory[d];
    s.allocated_bytes[0].current = m.allocated; s.allocated_bytes[0].peak = m.peak;
    s.reserved_bytes[0].current = m.reserved; s.reserved_bytes[0].peak = m.reserved;
    return s;
  }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex d) override { memory[d].peak = memory[d].allocated; }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex d) override {
    std::lock_guard<std::recursive_mutex> g(mutex);
    return {total_memory() - memory[d].reserved, total_memory()};
  }
};
Allocator allocator;
REGISTER_ALLOCATOR(kSim, &allocator);

// Pinned memory: sizes are rounded up to a power of two, as torch's own host allocator does.
std::map<char*, size_t> pinned;
size_t pinned_bytes = 0;
void unpin(void* p) {
  std::lock_guard<std::recursive_mutex> g(mutex);
  auto it = pinned.find((char*)p);
  if (it != pinned.end()) { pinned_bytes -= it->second; pinned.erase(it); std::free(p); }
}
struct Host final : at::HostAllocator {
  c10::DataPtr allocate(size_t n) override {
    size_t size = 1;
    while (size < n) size *= 2;
    void* p = nullptr;
    TORCH_CHECK(!posix_memalign(&p, 64, std::max<size_t>(size, 64)), "no memory");
    std::lock_guard<std::recursive_mutex> g(mutex);
    pinned[(char*)p] = size; pinned_bytes += size;
    return {p, p, &unpin, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* d, const void* s, size_t n) const override { std::memcpy(d, s, n); }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};
Host host_allocator;
REGISTER_HOST_ALLOCATOR(kSim, &host_allocator);
bool is_pinned(const void* p) {
  std::lock_guard<std::recursive_mutex> g(mutex);
  auto it = pinned.upper_bound((char*)p);
  return it != pinned.begin() && (char*)p < (--it)->first + it->second;
}

// A kernel's view of device memory: open while it lives.
struct Unprotected {
  std::vector<char*> held;
  void add(const at::Tensor& t) {
    if (!t.defined() || !t.has_storage()) return;
    std::lock_guard<std::recursive_mutex> g(mutex);
    Block* b = block_of(t.storage().data());
    if (!b) return;
    if (b->open++ == 0 && protecting()) mprotect(b->start, b->mapped, PROT_READ | PROT_WRITE);
    held.push_back(b->start);
  }
  ~Unprotected() {
    std::lock_guard<std::recursive_mutex> g(mutex);
    for (char* p : held) {
      auto it = blocks.find(p);
      if (it != blocks.end() && --it->second.open == 0 && protecting())
        mprotect(it->second.start, it->second.mapped, PROT_NONE);
    }
  }
};

// One access of the current stream; races are counted.
struct Access {
  StreamKey key; uint64_t time; std::string op;
  Access(int device, const std::string& op) : key(now(device)), op(op) {
    std::lock_guard<std::recursive_mutex> g(mutex);
    auto& s = streams[key];
    run_delayed(key, s.time);
    merge(s.seen, host);
    time = ++s.time;
  }
  void touch(const at::Tensor& t, bool writes) {
    if (!t.defined() || !t.has_storage()) return;
    std::lock_guard<std::recursive_mutex> g(mutex);
    Block* b = block_of(t.storage().data());
    if (!b) return;
    auto& seen = streams[key].seen;
    if (b->writer.first >= 0 && b->writer != key && seen[b->writer] < b->written)
      races[op + (writes ? ": writes over what another stream writes" : ": reads what another stream still writes")]++;
    if (writes) {
      for (auto& [other, when] : b->readers)
        if (other != key && seen[other] < when) races[op + ": writes over what another stream still reads"]++;
      b->writer = key; b->written = time; b->readers.clear();
    } else {
      b->readers[key] = time;
    }
  }
};

// ---------------------------------------------------------------- guard, streams, events
struct Event { StreamKey key; uint64_t time; Clock seen; };
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr DeviceType static_type = kSim;
  Guard() = default;
  explicit Guard(DeviceType t) { TORCH_CHECK(t == kSim); }
  DeviceType type() const override { return kSim; }
  Device exchangeDevice(Device d) const override { auto old = getDevice(); setDevice(d); return old; }
  Device getDevice() const override { return Device(kSim, current); }
  void setDevice(Device d) const override {
    TORCH_CHECK(d.index() >= 0 && d.index() < devices(), "invalid device ordinal ", int(d.index()));
    current = d.index();
  }
  void uncheckedSetDevice(Device d) const noexcept override { current = d.index(); }
  c10::Stream stream(Device d, int64_t id) const {
    return c10::Stream(c10::Stream::UNSAFE, d.has_index() ? d : getDevice(), id);
  }
  c10::Stream getStream(Device d) const override { return stream(d, now(d.has_index() ? d.index() : current).second); }
  c10::Stream getDefaultStream(Device d) const override { return stream(d, 0); }
  c10::Stream getNewStream(Device d, int) const override { return stream(d, next_stream++); }
  c10::Stream getStreamFromGlobalPool(Device d, bool) const override { return stream(d, next_stream++); }
  c10::Stream exchangeStream(c10::Stream s) const override {
    auto old = getStream(s.device());
    current_stream[s.device_index()] = s.id();
    return old;
  }
  DeviceIndex deviceCount() const noexcept override { return devices(); }
  void destroyEvent(void* e, DeviceIndex) const noexcept override { delete static_cast<Event*>(e); }
  void record(void** e, const c10::Stream& s, DeviceIndex, c10::EventFlag) const override {
    std::lock_guard<std::recursive_mutex> g(mutex);
    StreamKey key{s.device_index(), s.id()};
    auto& state = streams[key];
    if (!*e) *e = new Event;
    *static_cast<Event*>(*e) = {key, state.time, state.seen};
  }
  void block(void* e, const c10::Stream& s) const override {
    if (!e) return;
    std::lock_guard<std::recursive_mutex> g(mutex);
    auto& event = *static_cast<Event*>(e);
    run_delayed(event.key, event.time);
    auto& seen = streams[{s.device_index(), s.id()}].seen;
    seen[event.key] = std::max(seen[event.key], event.time);
    merge(seen, event.seen);
  }
  bool queryEvent(void* e) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream& s) const override {
    StreamKey key{s.device_index(), s.id()};
    count("synchronize", "stream");
    host_waits(key, streams[key].time);
  }
  void synchronizeEvent(void* e) const override {
    if (!e) return;
    auto& event = *static_cast<Event*>(e);
    count("synchronize", "event");
    host_waits(event.key, event.time);
  }
  void synchronizeDevice(DeviceIndex d) const override {
    count("synchronize", "device");
    std::vector<StreamKey> keys;
    { std::lock_guard<std::recursive_mutex> g(mutex); for (auto& [k, s] : streams) if (k.first == d) keys.push_back(k); }
    for (auto& k : keys) host_waits(k, streams[k].time);
  }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  double elapsedTime(void*, void*, DeviceIndex) const override { return 0; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return devices() > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return devices(); }
  void setCurrentDevice(DeviceIndex d) const override { Guard().setDevice(Device(kSim, d)); }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex exchangeDevice(DeviceIndex d) const override { auto old = current; if (d >= 0) current = d; return old; }
  DeviceIndex maybeExchangeDevice(DeviceIndex d) const override { return exchangeDevice(d); }
  bool isPinnedPtr(const void* p) const override { return is_pinned(p); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &host_allocator; }
  Device getDeviceFromPtr(void* p) const override { auto b = block_of(p); TORCH_CHECK(b); return Device(kSim, b->device); }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  void resizePrivateUse1Bytes(const c10::Storage& s, size_t n) const override;
};
void resize_bytes(c10::StorageImpl* s, size_t n) {
  c10::DeviceGuard guard(s->device());
  auto fresh = allocator.allocate(n);
  std::lock_guard<std::recursive_mutex> g(mutex);
  Block *from = block_of(s->data()), *to = block_of(fresh.get());
  if (from && to) {
    if (protecting()) { mprotect(from->start, from->mapped, PROT_READ | PROT_WRITE); mprotect(to->start, to->mapped, PROT_READ | PROT_WRITE); }
    std::memcpy(to->start, from->start, std::min(from->size, n));
    if (protecting()) { if (!from->open) mprotect(from->start, from->mapped, PROT_NONE); mprotect(to->start, to->mapped, PROT_NONE); }
  }
  s->set_data_ptr_noswap(std::move(fresh));
  s->set_nbytes(n);
}
void Hooks::resizePrivateUse1Bytes(const c10::Storage& s, size_t n) const { resize_bytes(s.unsafeGetStorageImpl(), n); }
Hooks hooks;

// ---------------------------------------------------------------- tensors
// As MPS: SIM_NO_FLOAT64=1.
void refuse_double(at::ScalarType dtype) {
  bool on = env("SIM_NO_FLOAT64", 0);
  TORCH_CHECK_TYPE(!on || dtype != at::kDouble, "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. Please use float32 instead.");
}
at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(c10::device_or_default(device));
  refuse_double(c10::dtype_or_default(dtype));
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}
at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(c10::device_or_default(device));
  refuse_double(c10::dtype_or_default(dtype));
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}
at::Tensor as_strided(const at::Tensor& t, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(t, size, stride, offset);
}
const at::Tensor& resize_(const at::Tensor& t, c10::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto* impl = t.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  size_t need = (impl->storage_offset() + t.numel()) * t.itemsize();
  if (need > t.storage().nbytes()) resize_bytes(t.storage().unsafeGetStorageImpl(), need);
  return t;
}
at::Tensor& set_storage(at::Tensor& t, at::Storage s, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  t.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(s));
  t.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return t;
}
at::Tensor& set_whole_storage(at::Tensor& t, at::Storage s) {
  int64_t n = s.nbytes() / t.itemsize();
  return set_storage(t, std::move(s), 0, {n}, {1});
}
at::Tensor& set_nothing(at::Tensor& t) {
  return set_storage(t, c10::Storage(c10::Storage::use_byte_size_t(), 0, allocator.allocate(0), &allocator, true), 0, {0}, {1});
}
at::Tensor& set_tensor(at::Tensor& t, const at::Tensor& source) {
  return set_storage(t, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

// The same memory as a tensor of the CPU, for a kernel.
using HostViews = std::unordered_map<c10::StorageImpl*, c10::Storage>;
at::Tensor host_view(const at::Tensor& t, HostViews& storages) {
  auto* own = t.storage().unsafeGetStorageImpl();
  auto it = storages.find(own);
  if (it == storages.end()) {
    c10::Storage s(c10::Storage::use_byte_size_t(), own->nbytes(),
                   c10::DataPtr(own->mutable_data(), Device(DeviceType::CPU)), c10::GetAllocator(DeviceType::CPU), true);
    it = storages.emplace(own, s).first;
  }
  auto made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(it->second), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  if (t.is_conj()) impl->_set_conj(true);
  if (t.is_neg()) impl->_set_neg(true);
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return made;
}
// A CPU kernel's new result as a tensor of the device.
at::Tensor to_device(const at::Tensor& t, Device device, Unprotected& open) {
  c10::DeviceGuard guard(device);
  refuse_double(t.scalar_type());
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(), allocator.allocate(t.storage().nbytes()), &allocator, true),
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), t.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  open.add(made);
  if (t.storage().nbytes()) std::memcpy(const_cast<void*>(made.storage().data()), t.storage().data(), t.storage().nbytes());
  if (t.is_conj()) made.unsafeGetTensorImpl()->_set_conj(true);
  return made;
}

const std::unordered_set<std::string> SYNCS = {
  "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select", "aten::unique_dim", "aten::_unique2", "aten::_unique",
  "aten::unique_consecutive", "aten::bincount", "aten::repeat_interleave", "aten::item", "aten::allclose", "aten::_linalg_check_errors"};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string& name = schema.name();
  const size_t n = schema.arguments().size(), begin = stack->size() - n;
  const bool indexing = name == "aten::index" || name == "aten::index_put" || name == "aten::index_put_" || name == "aten::_index_put_impl_";
  std::optional<Device> device, requested;
  std::vector<at::Tensor> given;
  auto check = [&](const at::Tensor& t, bool is_index) {
    if (!t.defined()) return;
    if (t.device().type() == kSim) {
      TORCH_CHECK(!device || *device == t.device(), "Expected all tensors to be on the same device, but found at least two devices, ",
                  *device, " and ", t.device(), "! (", name, ")");
      device = t.device();
    }
    given.push_back(t);
  };
  for (size_t i = 0; i < n; ++i) {
    auto& v = (*stack)[begin + i];
    if (v.isTensor()) check(v.toTensor(), false);
    else if (v.isTensorList()) { for (const at::Tensor& t : v.toTensorList()) check(t, false); }
    else if (v.isOptionalTensorList()) { for (const auto& t : v.toOptionalTensorVector()) if (t) check(*t, true); }
    else if (v.isDevice()) requested = v.toDevice();
  }
  if (!device) device = requested && requested->type() == kSim ? *requested : Device(kSim, current);
  if (!device->has_index()) device = Device(kSim, current);
  for (size_t i = 0; i < n; ++i) {
    auto& v = (*stack)[begin + i];
    auto host_tensor = [&](const at::Tensor& t, bool index) {
      if (!t.defined() || t.device().type() == kSim) return;
      if (indexing && index) { count("h2d", name + " with indices on the host", t.numel() * t.itemsize()); return; }
      TORCH_CHECK(t.device().is_cpu() && t.dim() == 0, "Expected all tensors to be on the same device, but found at least two devices, ",
                  *device, " and ", t.device(), "! (", name, ", argument ", schema.arguments()[i].name(), ")");
    };
    if (v.isTensor()) host_tensor(v.toTensor(), false);
    else if (v.isTensorList()) { for (const at::Tensor& t : v.toTensorList()) host_tensor(t, false); }
    else if (v.isOptionalTensorList()) {
      for (const auto& t : v.toOptionalTensorVector()) if (t) {
        host_tensor(*t, true);
        if (t->scalar_type() == at::kBool || t->scalar_type() == at::kByte) count("sync", name + " with a mask");
      }
    }
  }
  if (SYNCS.count(name)) count("sync", name);
  Access access(device->index(), name);
  Unprotected open;
  for (auto& t : given) open.add(t);
  HostViews storages;
  std::unordered_map<c10::TensorImpl*, at::Tensor> back;
  std::vector<std::pair<at::Tensor, at::Tensor>> writes;
  auto show = [&](const at::Tensor& t, bool writing) -> at::Tensor {
    if (!t.defined() || t.device().type() != kSim) return t;
    auto s = host_view(t, storages);
    back[s.unsafeGetTensorImpl()] = t;
    if (writing) writes.emplace_back(t, s);
    access.touch(t, writing);
    return s;
  };
  for (size_t i = 0; i < n; ++i) {
    auto& v = (*stack)[begin + i];
    const auto* alias = schema.arguments()[i].alias_info();
    bool writing = alias && alias->isWrite();
    if (v.isTensor()) v = c10::IValue(show(v.toTensor(), writing));
    else if (v.isTensorList()) {
      c10::List<at::Tensor> l;
      for (const at::Tensor& t : v.toTensorList()) l.push_back(show(t, writing));
      v = c10::IValue(l);
    } else if (v.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> l;
      for (const auto& t : v.toOptionalTensorVector()) l.push_back(t ? std::optional<at::Tensor>(show(*t, false)) : std::nullopt);
      v = c10::IValue(l);
    } else if (v.isDevice() && v.toDevice().type() == kSim) v = c10::IValue(Device(DeviceType::CPU));
    else if (v.isGenerator()) v = c10::IValue(at::detail::getDefaultCPUGenerator());
  }
  {
    std::lock_guard<std::recursive_mutex> g(mutex);
    launches[name]++;
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  // What was written may have another shape or storage now.
  for (auto& [own, s] : writes) {
    auto* storage = own.storage().unsafeGetStorageImpl();
    if (s.storage().data() != storage->data()) {
      size_t bytes = s.storage().nbytes();
      resize_bytes(storage, bytes);
      Unprotected now_open; now_open.add(own);
      if (bytes) std::memcpy(storage->mutable_data(), s.storage().data(), bytes);
    }
    if (s.sizes() != own.sizes() || s.strides() != own.strides() || s.storage_offset() != own.storage_offset())
      own.unsafeGetTensorImpl()->set_sizes_and_strides(s.sizes(), s.strides(), s.storage_offset());
  }
  auto result = [&](const at::Tensor& t) -> at::Tensor {
    if (!t.defined() || !t.device().is_cpu()) return t;
    auto it = back.find(t.unsafeGetTensorImpl());
    if (it != back.end()) return it->second;
    for (auto& [own, s] : storages)
      if (t.storage().unsafeGetStorageImpl() == s.unsafeGetStorageImpl()) {
        auto made = at::detail::make_tensor<c10::TensorImpl>(
            c10::Storage(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(own)), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), t.dtype());
        made.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
        if (t.is_conj()) made.unsafeGetTensorImpl()->_set_conj(true);
        return made;
      }
    auto made = to_device(t, *device, open);
    access.touch(made, true);
    return made;
  };
  const size_t m = schema.returns().size(), first = stack->size() - m;
  for (size_t i = 0; i < m; ++i) {
    auto& v = (*stack)[first + i];
    if (v.isTensor()) v = c10::IValue(result(v.toTensor()));
    else if (v.isTensorList()) {
      c10::List<at::Tensor> l;
      for (const at::Tensor& t : v.toTensorList()) l.push_back(result(t));
      v = c10::IValue(l);
    }
  }
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& to, bool non_blocking) {
  bool from_host = source.device().is_cpu(), to_host = to.device().is_cpu();
  long bytes = source.numel() * source.itemsize();
  int device = (from_host ? to : source).device().index();
  HostViews storages;
  auto run = [](const at::Tensor& source, const at::Tensor& to) {
    Unprotected open; open.add(source); open.add(to);
    HostViews storages;
    auto s = source.device().is_cpu() ? source : host_view(source, storages);
    auto t = to.device().is_cpu() ? to : host_view(to, storages);
    t.copy_(s);
  };
  // As on CUDA, a copy between devices waits for both and lets both wait.
  bool between = !from_host && !to_host && source.device() != to.device();
  if (between) wait_for(now(device), now(to.device().index()));
  Access access(device, "copy");
  access.touch(source, false);
  access.touch(to, true);
  if (between) wait_for(now(to.device().index()), now(device));
  bool delayed = from_host && non_blocking && access.key.second != 0 && source.numel() && is_pinned(source.data_ptr());
  if (from_host) count(non_blocking ? (is_pinned(source.data_ptr()) ? "h2d pinned, does not block" : "h2d pageable, non_blocking") : "h2d", "copy", bytes);
  else if (to_host) count(non_blocking ? "d2h non_blocking" : "d2h", "copy", bytes);
  else {
    std::lock_guard<std::recursive_mutex> g(mutex);
    launches[source.device() == to.device() ? "copy" : "copy between devices"]++;
  }
  if (delayed) {
    std::lock_guard<std::recursive_mutex> g(mutex);
    at::Tensor a = source, b = to;
    streams[access.key].delayed.push_back({[=] { run(a, b); }, access.time});
    return to;
  }
  run(source, to);
  if ((from_host || to_host) && !non_blocking) host_waits(access.key, access.time);
  return to;
}
at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& to) {
  if (to.sizes() != source.sizes()) to.resize_(source.sizes());
  return copy_from(source, to, false);
}
at::Scalar local_scalar(const at::Tensor& t) {
  count("sync", "aten::_local_scalar_dense");
  Access access(t.device().index(), "item");
  access.touch(t, false);
  Unprotected open; open.add(t);
  HostViews storages;
  auto s = host_view(t, storages);
  auto result = s.item();
  host_waits(access.key, access.time);
  return result;
}
at::Tensor view(const at::Tensor& t, c10::IntArrayRef size) { return at::native::view(t, size); }
at::Tensor reshape_alias(const at::Tensor& t, c10::IntArrayRef size, c10::IntArrayRef stride) { return at::native::_reshape_alias(t, size, stride); }
// CUDA counts integers; the CPU does not.
at::Tensor histc(const at::Tensor& t, int64_t bins, const at::Scalar& low, const at::Scalar& high) {
  return c10::isIntegralType(t.scalar_type(), false) ? at::histc(t.to(at::kFloat), bins, low, high).to(t.scalar_type()) : at::histc(t, bins, low, high);
}

// What CUDA does in one kernel, and the CPU in another way than by parts.
std::map<std::string, long> attentions;
at::Tensor sdpa(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& mask,
                double p, bool causal, std::optional<double> scale, bool gqa) {
  std::vector<at::Tensor> given{q, k, v};
  if (mask && mask->defined()) given.push_back(*mask);
  Access access(q.device().index(), "sdpa");
  Unprotected open; HostViews storages;
  for (auto& t : given) {
    TORCH_CHECK(t.device() == q.device(), "Expected all tensors to be on the same device, but found at least two devices, ", q.device(), " and ", t.device(), "! (sdpa)");
    open.add(t); access.touch(t, false);
  }
  {
    std::lock_guard<std::recursive_mutex> g(mutex);
    launches["aten::scaled_dot_product_attention"]++;
    std::ostringstream text;
    text << "q " << q.sizes() << " " << q.dtype() << (gqa ? " gqa" : "") << (causal ? " causal" : "") << " mask ";
    if (given.size() > 3) text << mask->sizes() << " " << mask->dtype() << " strides " << mask->strides(); else text << "none";
    attentions[text.str()]++;
  }
  std::optional<at::Tensor> m;
  if (given.size() > 3) m = host_view(*mask, storages);
  auto result = at::scaled_dot_product_attention(host_view(q, storages), host_view(k, storages), host_view(v, storages), m, p, causal, scale, gqa);
  auto made = to_device(result, q.device(), open);
  access.touch(made, true);
  return made;
}
at::Tensor sdpa_autograd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& mask,
                double p, bool causal, std::optional<double> scale, bool gqa) {
  if (at::GradMode::is_enabled() && (q.requires_grad() || k.requires_grad() || v.requires_grad()))
    return std::get<0>(at::_scaled_dot_product_attention_math(q, k, v, mask, p, causal, std::nullopt, scale, gqa));
  at::AutoDispatchBelowADInplaceOrView below;
  return sdpa(q, k, v, mask, p, causal, scale, gqa);
}
}  // namespace sim

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&sim::fallback>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &sim::empty);
  m.impl("empty_strided", &sim::empty_strided);
  m.impl("as_strided", &sim::as_strided);
  m.impl("view", &sim::view);
  m.impl("_reshape_alias", &sim::reshape_alias);
  m.impl("view_as_real", &at::native::view_as_real);
  m.impl("view_as_complex", &at::native::view_as_complex);
  m.impl("unfold", &at::native::unfold);
  m.impl("resize_", &sim::resize_);
  m.impl("set_.source_Storage_storage_offset", &sim::set_storage);
  m.impl("set_.source_Storage", &sim::set_whole_storage);
  m.impl("set_", &sim::set_nothing);
  m.impl("set_.source_Tensor", &sim::set_tensor);
  m.impl("_copy_from", &sim::copy_from);
  m.impl("_copy_from_and_resize", &sim::copy_from_and_resize);
  m.impl("_local_scalar_dense", &sim::local_scalar);
  m.impl("scaled_dot_product_attention", &sim::sdpa);
  // Composite on the CPU's side too, or with another result by parts.
  for (const char* name : {"native_layer_norm", "convolution", "convolution_backward", "native_batch_norm", "native_group_norm",
                           "index.Tensor", "repeat_interleave.Tensor"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&sim::fallback>());
}
TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) { m.impl("scaled_dot_product_attention", &sim::sdpa_autograd); }

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  at::RegisterPrivateUse1HooksInterface(&sim::hooks);
  m.def("device_count", &sim::devices);
  m.def("current_device", [] { return int(sim::current); });
  m.def("set_device", [](int d) { sim::Guard().setDevice(c10::Device(sim::kSim, d)); });
  m.def("mem_get_info", [](int d) { return sim::allocator.getMemoryInfo(d); });
  m.def("memory", [](int d) { auto& x = sim::memory[d]; return std::make_tuple(x.allocated, x.reserved, x.peak, x.ooms); });
  m.def("reset_peak", [](int d) { sim::allocator.resetPeakStats(d); });
  m.def("empty_cache", [] { sim::allocator.emptyCache({0, 0}); });
  m.def("pinned_bytes", [] { return sim::pinned_bytes; });
  m.def("reset", [] { std::lock_guard<std::recursive_mutex> g(sim::mutex); sim::launches.clear(); sim::counts.clear(); sim::races.clear(); sim::attentions.clear(); sim::bytes_of.clear(); });
  m.def("launches", [] { return sim::launches; });
  m.def("counts", [] { return sim::counts; });
  m.def("bytes", [] { return sim::bytes_of; });
  m.def("races", [] { return sim::races; });
  m.def("attentions", [] { return sim::attentions; });
  m.def("blocks", [] { return sim::blocks.size(); });
  m.def("listen", [](py::object f) { delete sim::listener; sim::listener = f.is_none() ? nullptr : new py::object(f); });
}
