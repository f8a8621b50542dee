// ThreadSanitizer cannot see the barriers of OpenMP, on whose threads torch::stable::parallel_for runs: every two
// parallel loops, one after the other, would be a race to it. So in its build loops run on threads that are started and
// joined for them. The split is PyTorch's: equal chunks, none smaller than the grain, nested loops in one thread.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace torch::stable {

template <class F>
void parallel_on_threads(const int64_t begin, const int64_t end, const int64_t grain, const F& body) {
  static thread_local bool nested = false;
  if (begin >= end) {
    return;
  }
  const int64_t most = 4, least = std::max<int64_t>(grain, 1);
  const int64_t chunks = nested ? 1 : std::min(most, (end - begin + least - 1) / least);
  const int64_t chunk = (end - begin + chunks - 1) / chunks;
  if (chunks == 1) {
    body(begin, end);
    return;
  }
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += chunk) {
    threads.emplace_back([&body, first, last = std::min(end, first + chunk)] {
      nested = true;
      body(first, last);
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
}

}  // namespace torch::stable

#define parallel_for parallel_on_threads
