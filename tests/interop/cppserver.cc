// A server without Python: the handshake, then the loop of TVM's runtime; its lists of files end in a comma, as those of
// TVM's C++ server do. It prints its port first.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <unistd.h>

#include <csignal>
#include <cstdint>
#include <cstdio>
#include <string>

namespace ffi = tvm::ffi;

constexpr int32_t kMagic = 0xff271;

bool ReadAll(int descriptor, void* data, size_t size) {
  for (char* at = static_cast<char*>(data); size > 0;) {
    ssize_t count = read(descriptor, at, size);
    if (count <= 0) return false;
    at += count;
    size -= static_cast<size_t>(count);
  }
  return true;
}

void Serve(int client) {
  int32_t magic = 0, length = 0;
  if (!ReadAll(client, &magic, 4) || magic != kMagic || !ReadAll(client, &length, 4) || length < 0 || length > 1024) {
    return;
  }
  std::string key(static_cast<size_t>(length), ' '), own = "server:cpp";
  if (!ReadAll(client, key.data(), key.size())) return;
  int32_t answer[2] = {kMagic, static_cast<int32_t>(own.size())};
  if (write(client, answer, 8) != 8 || write(client, own.data(), own.size()) != static_cast<ssize_t>(own.size())) return;
  ffi::Function::GetGlobalRequired("rpc.ServerLoop")(client);
}

int main() {
  namespace refl = ffi::reflection;
  refl::GlobalDef()
      .def("tvm.rpc.server.listdir", [](ffi::String) { return ffi::String("one.txt,two.txt,"); })
      .def("cpp.add", [](int64_t one, int64_t other) { return one + other; });
  int listener = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  if (bind(listener, reinterpret_cast<sockaddr*>(&address), size) != 0 || listen(listener, 4) != 0) return 1;
  getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size);
  std::printf("%d\n", ntohs(address.sin_port));
  std::fflush(stdout);
  std::signal(SIGCHLD, SIG_IGN);
  for (int client; (client = accept(listener, nullptr, nullptr)) >= 0; close(client)) {
    if (fork() == 0) {  // a process for each client, as TVM's: one that goes in its own way ends it
      close(listener);
      Serve(client);
      _exit(0);
    }
  }
  return 0;
}
