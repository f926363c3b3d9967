// CUDA's execution model on a CPU, to run a kernel's unedited source: its blocks one after the other, and the threads
// of a block as contexts that are switched where they wait for one another.
//
// A thread runs until it ends or waits: at __syncthreads() for its block, at a shuffle or a vote for the lanes of its
// mask. Where nobody can go on, the barrier diverged, and the launch says which thread waits where. Shared memory is
// poisoned before every block (NaN, -1), the dynamic one between guard pages; threads start forward, backward or
// shuffled. An access to a guard page, or to an address that its type may not have, ends the launch with the thread
// that made it. The static shared memory of all kernels of a file counts as one.

#pragma once
#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <type_traits>
#include <ucontext.h>
#include <utility>
#include <vector>

struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __shared__ __attribute__((section("cuda_shared"))) static
extern "C" char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));  // null where nothing is shared
extern "C" char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host {

constexpr unsigned MOST_THREADS = 1024;
constexpr size_t STACK = 64 << 10, MOST_STATIC = 48 << 10, MOST_SHARED = 99 << 10;
enum class Wait { no, block, warp, done };

struct Thread {
    ucontext_t begin;
    sigjmp_buf resume;
    bool started;
    Wait wait;
    const char* where;   // the call it waits in
    int line;
    unsigned mask;
    uint64_t value;      // what it gives to the others of its mask
};

static std::vector<Thread> threads;
static std::vector<char> stacks;
static std::vector<uint64_t> given;  // values of a whole warp, for each thread, when its wait is over
static char* dynamic_shared;
static sigjmp_buf scheduler, escape;
static ucontext_t home;
static unsigned current;
static void (*body)();
static std::string message;

[[noreturn]] inline void fail(const std::string& what) {
    message = what;
    siglongjmp(escape, 1);
}

inline std::string name(unsigned thread) {
    unsigned x = thread % blockDim.x, y = thread / blockDim.x % blockDim.y, z = thread / blockDim.x / blockDim.y;
    const dim3& b = blockIdx;
    char text[120];
    snprintf(text, sizeof text, "thread (%u, %u, %u) of block (%u, %u, %u)", x, y, z, b.x, b.y, b.z);
    return text;
}

inline std::string where(const Thread& t) { return std::string(t.where) + " in line " + std::to_string(t.line); }
inline bool here(const Thread& a, const Thread& b) { return a.line == b.line && !strcmp(a.where, b.where); }
inline std::string doing(const Thread& t) { return t.wait == Wait::done ? "has ended" : "waits at " + where(t); }

// Leave the thread that runs; comes back when its wait is over.
inline void wait(Wait kind, const char* place, int line, unsigned mask = 0, uint64_t value = 0) {
    Thread& t = threads[current];
    t.wait = kind, t.where = place, t.line = line, t.mask = mask, t.value = value;
    if (!sigsetjmp(t.resume, 0)) siglongjmp(scheduler, 1);
}

inline void begin() {
    body();
    threads[current].wait = Wait::done;
    siglongjmp(scheduler, 1);
}

inline void resume(unsigned i) {
    Thread& t = threads[i];
    current = i;
    threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    if (sigsetjmp(scheduler, 0)) return;
    if (t.started) siglongjmp(t.resume, 1);
    t.started = true;
    getcontext(&t.begin);
    t.begin.uc_stack.ss_sp = stacks.data() + i * STACK, t.begin.uc_stack.ss_size = STACK, t.begin.uc_link = nullptr;
    makecontext(&t.begin, begin, 0);
    setcontext(&t.begin);
}

// Let the lanes of a warp's mask go on if all of them are there; whether any could.
inline bool release_warp(unsigned first, unsigned last) {
    bool any = false;
    for (unsigned i = first; i < last; i++) {
        Thread& t = threads[i];
        if (t.wait != Wait::warp) continue;
        if (!(t.mask >> (i - first) & 1)) fail(name(i) + ": is not in its own mask, " + where(t));
        bool all = true;
        for (unsigned lane = 0; lane < 32 && all; lane++)
            if (t.mask >> lane & 1) {
                if (first + lane >= last) fail(name(i) + ": its mask has lanes that do not exist, " + where(t));
                const Thread& other = threads[first + lane];
                if (other.wait == Wait::done) fail(name(i) + ": a lane of its mask has ended, " + where(t));
                all = other.wait == Wait::warp && other.mask == t.mask && here(other, t);
            }
        if (!all) continue;
        for (unsigned lane = 0; lane < 32; lane++)
            if (t.mask >> lane & 1) {
                for (unsigned from = 0; from < 32; from++)
                    given[32 * (first + lane) + from] = first + from < last ? threads[first + from].value : 0;
            }
        unsigned mask = t.mask;
        for (unsigned lane = 0; lane < 32; lane++)
            if (mask >> lane & 1) threads[first + lane].wait = Wait::no;
        any = true;
    }
    return any;
}

inline void run_block(const std::vector<unsigned>& order) {
    unsigned count = threads.size(), done = 0;
    for (Thread& t : threads) t.started = false, t.wait = Wait::no;
    while (done < count) {
        for (unsigned i : order)
            if (threads[i].wait == Wait::no) resume(i);
        bool any = false;
        for (unsigned first = 0; first < count; first += 32) any |= release_warp(first, std::min(first + 32, count));
        done = 0;
        for (const Thread& t : threads) done += t.wait == Wait::done;
        if (any || done == count) continue;
        unsigned i = 0;
        while (threads[i].wait == Wait::done) i++;
        for (unsigned j = 0; j < count; j++)
            if (threads[j].wait != Wait::block || !here(threads[j], threads[i]))
                fail("divergent barrier: " + name(i) + " waits at " + where(threads[i]) + ", " +
                     (j == i ? "for lanes that wait elsewhere" : name(j) + " " + doing(threads[j])));
        for (Thread& t : threads) t.wait = Wait::no;
    }
}

inline size_t static_shared() { return __stop_cuda_shared - __start_cuda_shared; }

struct Dynamic {  // dynamic shared memory, which ends where a page begins that nobody may touch, and begins after one
    const size_t page = sysconf(_SC_PAGESIZE), bytes, room;
    char *map, *begin, *end;
    explicit Dynamic(size_t bytes) : bytes(bytes), room((bytes + page - 1) / page * page) {
        map = static_cast<char*>(mmap(nullptr, room + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        begin = map + page, end = begin + room;
        mprotect(begin, room, PROT_READ | PROT_WRITE);
        dynamic_shared = end - (bytes + 15) / 16 * 16;
    }
    ~Dynamic() { munmap(map, room + 2 * page); }
    void poison() const {
        memset(begin, 0xFF, room);
        if (static_shared()) memset(__start_cuda_shared, 0xFF, static_shared());
    }
    void check() const {  // beside what the kernel asked for, the poison must still be there
        auto poisoned = [](char c) { return c == char(0xFF); };
        if (!std::all_of(begin, dynamic_shared, poisoned) || !std::all_of(dynamic_shared + bytes, end, poisoned))
            fail("dynamic shared memory written out of bounds, in the block of " + name(0));
    }
};

static void on_fault(int signal, siginfo_t* info, void*) {
    char text[100];
    if (signal == SIGSEGV || signal == SIGBUS)
        snprintf(text, sizeof text, ": access out of bounds, address %p", info->si_addr);
    else
        snprintf(text, sizeof text, ": misaligned access, index beyond its array, shift too far or division by 0");
    message = name(current) + text;
    siglongjmp(escape, 1);
}

struct Faults {  // ends the launch instead of the process
    static constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};
    struct sigaction before[5];
    stack_t stack_before;
    std::vector<char> stack = std::vector<char>(64 << 10);
    Faults() {
        stack_t own = {};
        own.ss_sp = stack.data(), own.ss_size = stack.size();
        sigaltstack(&own, &stack_before);
        struct sigaction action = {};
        action.sa_sigaction = on_fault, action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int i = 0; i < 5; i++) sigaction(SIGNALS[i], &action, &before[i]);
    }
    ~Faults() {
        for (int i = 0; i < 5; i++) sigaction(SIGNALS[i], &before[i], nullptr);
        sigaltstack(&stack_before, nullptr);
    }
};

// order: 0 forward, 1 backward, else the seed of a shuffle. Returns "" or what went wrong.
inline const char* launch(void (*kernel)(), dim3 grid, dim3 block, size_t shared, unsigned order) {
    unsigned count = block.x * block.y * block.z;
    message.clear();
    if (count < 1 || count > MOST_THREADS) message = std::to_string(count) + " threads in a block: 1 to 1024 can be";
    size_t all = static_shared() + shared, most = static_shared() > MOST_STATIC ? MOST_STATIC : MOST_SHARED;
    if (all > most) message = std::to_string(all) + " bytes of shared memory: at most " + std::to_string(most);
    if (!message.empty()) return message.c_str();
    threads.resize(count), given.resize(32 * count), stacks.resize(count * STACK);
    Dynamic dynamic(shared);
    std::vector<unsigned> sequence(count);
    std::iota(sequence.begin(), sequence.end(), 0);
    if (order == 1) std::reverse(sequence.begin(), sequence.end());
    if (order > 1) std::shuffle(sequence.begin(), sequence.end(), std::mt19937(order));
    body = kernel, blockDim = block, gridDim = grid;
    Faults faults;
    if (sigsetjmp(escape, 1)) return message.c_str();
    for (blockIdx.z = 0; blockIdx.z < grid.z; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++)
                dynamic.poison(), run_block(sequence), dynamic.check();
    return "";
}

template <class T> uint64_t bits_of(T value) {
    static_assert(sizeof(T) <= 8, "a shuffle moves 4 or 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    return bits;
}

template <class T> T lane_value(unsigned mask, unsigned lane) {
    if (!(mask >> lane & 1)) fail(name(current) + ": reads a lane outside its mask, " + where(threads[current]));
    T value;
    memcpy(&value, &given[32 * current + lane], sizeof value);
    return value;
}

inline unsigned lane() { return current % 32; }
inline unsigned above(unsigned by) { return lane() + by < 32 ? lane() + by : lane(); }
inline unsigned below(unsigned by) { return lane() >= by ? lane() - by : lane(); }

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** values, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(values[I])...);
}
template <class... A> void call(void (*kernel)(A...), void** values) {
    call(kernel, values, std::index_sequence_for<A...>());
}

template <class T>
constexpr char kind = std::is_pointer_v<T> ? 'p' : std::is_same_v<T, float> ? 'f' : sizeof(T) == 4 ? 'i' : 'l';
template <class... A> const char* kinds(void (*)(A...)) {
    static const char text[] = {kind<A>..., 0};
    return text;
}

template <class T> T atomic_add(T* address, T value) {
    T before = *address;
    *address += value;
    return before;
}

}  // namespace host

#define __syncthreads() host::wait(host::Wait::block, "__syncthreads", __LINE__)
#define __syncwarp() host::wait(host::Wait::warp, "__syncwarp", __LINE__, 0xFFFFFFFFu)

template <class T> T host_shuffle(unsigned mask, T value, unsigned from, const char* place, int line) {
    host::wait(host::Wait::warp, place, line, mask, host::bits_of(value));
    return host::lane_value<T>(mask, from % 32);
}
#define __shfl_sync(mask, value, from) host_shuffle(mask, value, from, "__shfl_sync", __LINE__)
#define __shfl_xor_sync(mask, value, by) host_shuffle(mask, value, host::lane() ^ (by), "__shfl_xor_sync", __LINE__)
#define __shfl_down_sync(mask, value, by) host_shuffle(mask, value, host::above(by), "__shfl_down_sync", __LINE__)
#define __shfl_up_sync(mask, value, by) host_shuffle(mask, value, host::below(by), "__shfl_up_sync", __LINE__)

inline unsigned host_ballot(unsigned mask, bool vote, const char* place, int line) {
    host::wait(host::Wait::warp, place, line, mask, vote);
    unsigned votes = 0;
    for (unsigned lane = 0; lane < 32; lane++)
        if (mask >> lane & 1) votes |= unsigned(host::given[32 * host::current + lane]) << lane;
    return votes;
}
#define __ballot_sync(mask, vote) host_ballot(mask, vote, "__ballot_sync", __LINE__)
#define __any_sync(mask, vote) (host_ballot(mask, vote, "__any_sync", __LINE__) != 0)
#define __all_sync(mask, vote) (host_ballot(mask, vote, "__all_sync", __LINE__) == (mask))

inline int atomicAdd(int* address, int value) { return host::atomic_add(address, value); }
inline unsigned atomicAdd(unsigned* address, unsigned value) { return host::atomic_add(address, value); }
inline float atomicAdd(float* address, float value) { return host::atomic_add(address, value); }

template <class T> T __ldcs(const T* address) { return *address; }  // a load of what is read once
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __float2int_rn(float x) {  // as on the device, the nearest that there is, and 0 for NaN
    return x != x ? 0 : x >= 2147483648.f ? 0x7FFFFFFF : x < -2147483648.f ? -0x7FFFFFFF - 1 : int(nearbyintf(x));
}
inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
using std::max;
using std::min;

// What a launch from outside calls: the kernel's arguments by address, as cuLaunchKernel takes them.
#define HOST_EXPORT(kernel)                                                                                          \
    static void** host_##kernel##_values;                                                                             \
    static void host_##kernel##_body() { host::call(kernel, host_##kernel##_values); }                                \
    extern "C" const char* kinds_##kernel() { return host::kinds(kernel); }                                           \
    extern "C" const char* launch_##kernel(void** values, const unsigned* grid, const unsigned* block, size_t shared, \
                                           unsigned order) {                                                          \
        host_##kernel##_values = values;                                                                              \
        return host::launch(host_##kernel##_body, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]},        \
                            shared, order);                                                                           \
    }
