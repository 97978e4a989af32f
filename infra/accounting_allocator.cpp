// Counts and limits the memory of torch's CPU tensors; `accounting_allocator.py` builds and loads it.
//
// Torch's default CPU allocator is a stateless object behind a virtual table. It is replaced in place, at its own
// address: c10::SetAllocator would leave out the storages that ask for the default allocator by name (those of
// copy.deepcopy and of unpickling) and the growth of storages made before.
//
// In front of the bytes asked for stands a header, so that data and context of a storage stay the same pointer, as
// copy on write and the raw interface expect, and a release finds size and pool without a lock.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/alignment.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <new>
#include <string>

namespace {

enum PoolIndex : int64_t { kDevice, kHost, kNumPools };

struct Pool {
  std::atomic<int64_t> live{0}, peak{0};

  void raise_peak(int64_t reached) {
    int64_t seen = peak.load(std::memory_order_relaxed);
    while (seen < reached && !peak.compare_exchange_weak(seen, reached, std::memory_order_relaxed)) {
    }
  }
};

struct alignas(c10::gAlignment) Header {
  int64_t bytes;
  std::atomic<int64_t> pool;
};
static_assert(sizeof(Header) == c10::gAlignment, "the data behind it has to stay aligned");

constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();

Pool pools[kNumPools];
std::atomic<int64_t> limit{kNoLimit};
std::atomic<int64_t> allocations_to_failure{0}, failing_bytes{0};  // 0: none is to fail
thread_local int host_depth = 0;

std::string readable(int64_t bytes) {
  char text[64];
  std::snprintf(text, sizeof text, "%.2f MiB (%lld bytes)", double(bytes) / (1 << 20), (long long)bytes);
  return text;
}

[[noreturn]] void refuse(const char* why, int64_t bytes, int64_t live) {
  const int64_t most = limit.load(std::memory_order_relaxed);
  c10::profiledCPUMemoryReporter().OutOfMemory(size_t(bytes));
  TORCH_CHECK_WITH(OutOfMemoryError, false, "memory budget of the CPU device: ", why, ". Asked for ", readable(bytes),
                   "; live are ", readable(live), "; the limit is ",
                   most == kNoLimit ? std::string("not set") : readable(most));
}

// Exactly one allocation is the last one counted down, however many threads allocate.
bool is_to_fail(int64_t bytes) {
  return allocations_to_failure.load(std::memory_order_relaxed) > 0 &&
         bytes >= failing_bytes.load(std::memory_order_relaxed) && allocations_to_failure.fetch_sub(1) == 1;
}

// Books `bytes` to the device unless that would pass the limit, which is not passed for a moment either. Returns what
// is live with them.
int64_t book_to_device(int64_t bytes) {
  std::atomic<int64_t>& live = pools[kDevice].live;
  int64_t before = live.load(std::memory_order_relaxed);
  if (is_to_fail(bytes)) refuse("this allocation was told to fail", bytes, before);
  do {
    if (bytes > limit.load(std::memory_order_relaxed) - before) refuse("the allocation does not fit", bytes, before);
  } while (!live.compare_exchange_weak(before, before + bytes, std::memory_order_relaxed));
  return before + bytes;
}

Header* header_of(void* data) { return static_cast<Header*>(data) - 1; }

void release(void* data) {
  if (!data) return;
  Header* header = header_of(data);
  pools[header->pool.load(std::memory_order_relaxed)].live.fetch_sub(header->bytes, std::memory_order_relaxed);
  c10::profiledCPUMemoryReporter().Delete(data);
  c10::free_cpu(header);
}

class AccountingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    const auto cpu = c10::Device(c10::DeviceType::CPU);
    if (size == 0) return {nullptr, nullptr, &release, cpu};
    TORCH_CHECK(size <= size_t(kNoLimit) - sizeof(Header), "cannot allocate ", size, " bytes: a negative size?");
    const int64_t bytes = int64_t(size), pool = host_depth > 0 ? kHost : kDevice;
    const int64_t reached = pool == kHost ? (pools[kHost].live += bytes) : book_to_device(bytes);
    void* memory;
    try {
      memory = c10::alloc_cpu(size + sizeof(Header));
    } catch (...) {
      pools[pool].live -= bytes;
      c10::profiledCPUMemoryReporter().OutOfMemory(size);
      throw;
    }
    pools[pool].raise_peak(reached);
    void* data = new (memory) Header{bytes, {pool}} + 1;
    c10::profiledCPUMemoryReporter().New(data, size);
    return {data, data, &release, cpu};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* target, const void* source, size_t count) const override {
    default_copy_data(target, source, count);
  }
};
static_assert(sizeof(AccountingAllocator) == sizeof(void*), "stands where torch's stateless allocator stood");

}  // namespace

extern "C" {

// Replaces the allocator; what stands in the way, or null.
const char* svitt_budget_install() {
  c10::Allocator* standard = c10::GetDefaultCPUAllocator();
  if (c10::GetCPUAllocator() != standard) return "another library has replaced torch's CPU allocator";
  if (standard->raw_deleter() != &release) new (standard) AccountingAllocator;
  return nullptr;
}

// A negative limit is none.
void svitt_budget_set_limit(int64_t bytes) { limit = bytes < 0 ? kNoLimit : bytes; }

int64_t svitt_budget_limit() { return limit == kNoLimit ? -1 : limit.load(); }

int64_t svitt_budget_live(int64_t pool) { return pools[pool].live; }

int64_t svitt_budget_peak(int64_t pool) { return pools[pool].peak; }

void svitt_budget_reset_peaks() {
  for (Pool& pool : pools) pool.peak = pool.live.load();
}

// Number 0 takes back what was told before.
void svitt_budget_fail(int64_t number, int64_t at_least_bytes) {
  allocations_to_failure = 0;
  failing_bytes = at_least_bytes;
  allocations_to_failure = number;
}

// Of the calling thread; calls may nest.
void svitt_budget_enter_host() { ++host_depth; }

void svitt_budget_leave_host() { --host_depth; }

// Whether the storage is booked to the host now: not one whose memory came from elsewhere or is a lazy copy's.
bool svitt_budget_move_to_host(const c10::StorageImpl* storage) {
  const c10::DataPtr& memory = const_cast<c10::StorageImpl*>(storage)->_mutable_data_ptr_no_checks();
  if (!memory || memory.get_deleter() != &release) return false;
  Header* header = header_of(memory.get());
  if (header->pool.exchange(kHost) == kHost) return true;
  pools[kDevice].live -= header->bytes;
  pools[kHost].raise_peak(pools[kHost].live += header->bytes);
  return true;
}
}
