// Asynchronous copies that land as late as they may: when their group is waited for.
#pragma once

#include "cuda_on_host.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes != 0) {
    cuda_on_host::die("an asynchronous copy is misaligned");
  }
  cuda_on_host::running->copies.back().push_back([=] { std::memcpy(to, from, bytes); });
}

inline void __pipeline_commit() { cuda_on_host::running->copies.emplace_back(); }

inline void __pipeline_wait_prior(size_t newest) {
  auto& groups = cuda_on_host::running->copies;
  while (groups.size() > newest + 1) {
    for (auto& copy : groups.front()) copy();
    groups.erase(groups.begin());
  }
}
