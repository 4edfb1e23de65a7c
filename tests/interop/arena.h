// What TVM's minrpc server asks of its arena, which apache-tvm's wheel does not ship: each piece is a page of its own.
#ifndef RPCNB_TESTS_ARENA_H_
#define RPCNB_TESTS_ARENA_H_

#include <cstddef>

namespace tvm {
namespace support {

struct ArenaPageHeader {
  ArenaPageHeader* next;
  std::size_t size;
  std::size_t offset;
};

template <typename PageAllocator>
class GenericArena {
 public:
  explicit GenericArena(PageAllocator pages) : pages_(pages) {}
  ~GenericArena() { FreeAll(); }

  template <typename T>
  T* allocate_(int count) {
    ArenaPageHeader* page = pages_.allocate(kHead + sizeof(T) * static_cast<std::size_t>(count));
    page->next = first_;
    first_ = page;
    return reinterpret_cast<T*>(reinterpret_cast<char*>(page) + kHead);
  }

  void RecycleAll() { FreeAll(); }

  void FreeAll() {
    while (first_ != nullptr) {
      ArenaPageHeader* page = first_;
      first_ = page->next;
      pages_.deallocate(page);
    }
  }

 private:
  static constexpr std::size_t kHead = 32;  // keeps pieces aligned
  PageAllocator pages_;
  ArenaPageHeader* first_ = nullptr;
};

}  // namespace support
}  // namespace tvm

#endif  // RPCNB_TESTS_ARENA_H_
