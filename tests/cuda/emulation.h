// Runs CUDA kernels on the CPU, for tests: included before a kernel's unchanged source, it defines the words of CUDA
// that csrc/cuda uses. What it can find: wrong indices, missing barriers, barriers that not all threads reach, shared
// memory that is used before it is written or beyond its end, asynchronous copies that nobody waits for. What it cannot:
// speed, and races between blocks.
//
// The threads of a block are fibers. A fiber runs until it waits; who runs next is decided by emulation::order
// (0 forward, 1 backward, else shuffled anew every round with that seed), so that a missing barrier shows in at least
// one order. Where nobody can go on, or threads of a block wait at two different barriers, the program stops.
// With FFW_EMULATION_THREADS they are real threads instead, for ThreadSanitizer and tiny sizes.
// Blocks run one after another, in that order too, except in launches that ask for all of them together.
#pragma once

#define FFW_EMULATION 1

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#if defined(FFW_EMULATION_THREADS)
#include <condition_variable>
#include <mutex>
#include <thread>
#else
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace emulation {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

inline unsigned order = 0;
inline size_t shared_limit = 163 * 1024;  // of one block, an A100's

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s\n", what);
  std::fflush(stderr);
  std::_Exit(3);
}

struct Block;

struct Copy {  // on its way to shared memory
  void* to;
  const void* from;
  size_t bytes;
};

#if defined(FFW_EMULATION_THREADS)

struct Meeting {  // of all threads of a block or of a warp
  std::mutex mutex;
  std::condition_variable all_here;
  unsigned arrived = 0, generation = 0;
  void wait(unsigned members, int) {
    std::unique_lock<std::mutex> lock(mutex);
    const unsigned mine = generation;
    if (++arrived == members) {
      arrived = 0;
      ++generation;
      all_here.notify_all();
    } else {
      all_here.wait(lock, [&] { return generation != mine; });
    }
  }
};

struct Thread {
  Dim index;
  Block* block = nullptr;
  std::vector<Copy> copies;
};
inline thread_local Thread* current = nullptr;
inline void pause() { std::this_thread::yield(); }

#else

struct Meeting;

struct Thread {
  Dim index;
  Block* block = nullptr;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Meeting* waits_for = nullptr;
  std::vector<Copy> copies;
  bool done = false;
};
inline Thread* current = nullptr;
inline ucontext_t scheduler;
inline void pause() { swapcontext(&current->context, &scheduler); }

struct Meeting {
  unsigned arrived = 0;
  int place = 0;
  std::vector<Thread*> waiting;
  void wait(unsigned members, int line) {
    if (arrived > 0 && place != line) fail("threads of one block wait at different barriers");
    place = line;
    if (++arrived == members) {
      arrived = 0;
      for (Thread* thread : waiting) thread->waits_for = nullptr;
      waiting.clear();
      return;
    }
    waiting.push_back(current);
    current->waits_for = this;
    pause();
  }
};

#endif

struct Warp {
  Meeting meeting;
  alignas(8) char slots[32][8];
};

struct Block {
  Dim index, size, grid;
  std::unique_ptr<unsigned char[]> shared;  // exactly as many bytes as the launch gave, NaN
  Meeting meeting;
  std::vector<Warp> warps;
  std::vector<Thread> threads;

  Block(unsigned number, unsigned grid_size, unsigned thread_count, size_t bytes)
      : index{number, 0, 0}, size{thread_count, 1, 1}, grid{grid_size, 1, 1}, shared(new unsigned char[bytes]),
        warps((thread_count + 31) / 32), threads(thread_count) {
    std::memset(shared.get(), 0xff, bytes);
    for (unsigned i = 0; i < thread_count; ++i) {
      threads[i].index = {i, 0, 0};
      threads[i].block = this;
    }
  }
};

inline void barrier(int line) { current->block->meeting.wait(current->block->size.x, line); }

inline Warp& warp_of_current() { return current->block->warps[current->index.x / 32]; }

// The value of the lane whose number differs from this one's by `mask`.
template <typename T>
T shuffle_xor(unsigned lanes, T value, int mask, int line) {
  static_assert(sizeof(T) <= 8, "a register or two");
  if (lanes != 0xffffffffu) fail("only whole warps shuffle here");
  Warp& warp = warp_of_current();
  const unsigned lane = current->index.x % 32;
  std::memcpy(warp.slots[lane], &value, sizeof(T));
  warp.meeting.wait(32, line);
  std::memcpy(&value, warp.slots[lane ^ static_cast<unsigned>(mask)], sizeof(T));
  warp.meeting.wait(32, -line);  // before the slots are used again
  return value;
}

// A bit for every lane, set where its predicate holds.
inline unsigned ballot(unsigned lanes, bool predicate, int line) {
  if (lanes != 0xffffffffu) fail("only whole warps vote here");
  Warp& warp = warp_of_current();
  warp.slots[current->index.x % 32][0] = predicate;
  warp.meeting.wait(32, line);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(warp.slots[lane][0]) << lane;
  warp.meeting.wait(32, -line);  // before the slots are used again
  return votes;
}

// A device may make such a copy at any time before the thread waits for it: here as late as it can, in order 1 at once.
inline void wait_for_copies() {
  for (const Copy& copy : current->copies) std::memcpy(copy.to, copy.from, copy.bytes);
  current->copies.clear();
}

inline void copy_async(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || reinterpret_cast<uintptr_t>(from) % bytes != 0) {
    fail("a copy from or to an address that is no multiple of its size");
  }
  current->copies.push_back({to, from, bytes});
  if (order == 1) wait_for_copies();
}

inline void run_thread(const std::function<void()>& kernel) {
  kernel();
  if (!current->copies.empty()) fail("a thread ends before its copies");
}

inline std::vector<size_t> shuffled(size_t count, std::mt19937& random) {
  std::vector<size_t> numbers(count);
  for (size_t i = 0; i < count; ++i) numbers[i] = order == 1 ? count - 1 - i : i;
  if (order > 1) std::shuffle(numbers.begin(), numbers.end(), random);
  return numbers;
}

#if defined(FFW_EMULATION_THREADS)

inline void run_blocks(std::vector<std::unique_ptr<Block>>& blocks, const std::function<void()>& kernel,
                       std::mt19937&) {
  std::vector<std::thread> running;
  for (auto& block : blocks) {
    for (Thread& thread : block->threads) {
      running.emplace_back([&] {
        current = &thread;
        run_thread(kernel);
      });
    }
  }
  for (std::thread& thread : running) thread.join();
}

#else

inline const std::function<void()>* running_kernel = nullptr;
inline void fiber_main() {
  run_thread(*running_kernel);
  current->done = true;
  for (;;) pause();
}

inline void run_blocks(std::vector<std::unique_ptr<Block>>& blocks, const std::function<void()>& kernel,
                       std::mt19937& random) {
  constexpr size_t stack_bytes = 64 * 1024;
  running_kernel = &kernel;
  std::vector<Thread*> threads;
  for (auto& block : blocks) {
    for (Thread& thread : block->threads) threads.push_back(&thread);
  }
  for (Thread* thread : threads) {
    thread->stack.reset(new char[stack_bytes]);
    getcontext(&thread->context);
    thread->context.uc_stack.ss_sp = thread->stack.get();
    thread->context.uc_stack.ss_size = stack_bytes;
    makecontext(&thread->context, fiber_main, 0);
  }
  for (size_t left = threads.size(); left > 0;) {
    bool progress = false;
    for (const size_t number : shuffled(threads.size(), random)) {
      Thread* const thread = threads[number];
      if (thread->done || thread->waits_for != nullptr) continue;
      current = thread;
      swapcontext(&scheduler, &thread->context);
      progress = true;
      left -= thread->done;
    }
    if (!progress) fail("a barrier that not all threads reach");
  }
  current = nullptr;
}

#endif

inline void launch(int64_t grid, unsigned threads, size_t shared, bool together, const std::function<void()>& kernel) {
  if (grid <= 0 || threads == 0 || threads > 1024 || threads % 32 != 0 || shared > shared_limit) {
    fail("a launch that no device would accept");
  }
  std::mt19937 random(order);
  const auto make = [&](size_t number) {
    return std::make_unique<Block>(static_cast<unsigned>(number), static_cast<unsigned>(grid), threads, shared);
  };
  std::vector<std::unique_ptr<Block>> blocks;
  for (const size_t number : shuffled(static_cast<size_t>(grid), random)) {
    blocks.push_back(make(number));
    if (together) continue;
    run_blocks(blocks, kernel, random);
    blocks.clear();
  }
  if (together) run_blocks(blocks, kernel, random);
}

}  // namespace emulation

#define threadIdx (emulation::current->index)
#define blockIdx (emulation::current->block->index)
#define blockDim (emulation::current->block->size)
#define gridDim (emulation::current->block->grid)
#define __syncthreads() emulation::barrier(__LINE__)
#define __shfl_xor_sync(lanes, value, mask) emulation::shuffle_xor(lanes, value, mask, __LINE__)
#define __ballot_sync(lanes, predicate) emulation::ballot(lanes, predicate, __LINE__)
#define __ffs(bits) __builtin_ffs(static_cast<int>(bits))
#define __threadfence() static_cast<void>(0)  // the atomics below order all memory
#define __nanosleep(nanoseconds) emulation::pause()
#define __ldcg(pointer) (*(pointer))
#define FFW_SHARED(T, name) T* const name = reinterpret_cast<T*>(emulation::current->block->shared.get())
#define FFW_LAUNCH(kernel, blocks, threads, shared, stream, ...) \
  (static_cast<void>(stream), emulation::launch(blocks, threads, shared, false, [&] { kernel(__VA_ARGS__); }))
#define FFW_LAUNCH_TOGETHER(kernel, blocks, threads, shared, stream, ...) \
  (static_cast<void>(stream), emulation::launch(blocks, threads, shared, true, [&] { kernel(__VA_ARGS__); }))

inline unsigned atomicAdd(unsigned* number, unsigned value) {
  return __atomic_fetch_add(number, value, __ATOMIC_SEQ_CST);
}

using cudaStream_t = void*;

namespace ffw::cuda {
inline size_t largest_shared_memory() { return emulation::shared_limit; }
template <typename Kernel>
void allow_shared_memory(Kernel, size_t) {}

template <int bytes>
void copy_async(void* shared, const void* global) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "no such instruction");
  emulation::copy_async(shared, global, bytes);
}
inline void wait_for_copies() { emulation::wait_for_copies(); }
}  // namespace ffw::cuda

// 16-bit storage, rounded to the nearest, ties to even.
struct __half {
  _Float16 value;
};
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &wide, sizeof(result));
  return result;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
