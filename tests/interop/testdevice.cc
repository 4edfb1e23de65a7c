// A device of the tests' own in TVM's runtime: "ext_dev", whose memory only it may touch, with two of them and streams.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/runtime/device_api.h>

#include <cstdlib>
#include <cstring>
#include <map>

namespace rpcnb_tests {

using namespace tvm::runtime;
namespace ffi = tvm::ffi;
using tvm::Device;

// Memory is handed out under addresses that nobody can read by mistake: bytes are kept inverted.
class TestDevice : public DeviceAPI {
 public:
  static TestDevice* Get() {
    static TestDevice made;
    return &made;
  }

  void SetDevice(Device) final {}

  void GetAttr(Device dev, DeviceAttrKind kind, ffi::Any* found) final {
    if (kind == kExist) {
      *found = static_cast<int>(dev.device_id >= 0 && dev.device_id < 2);
    } else if (kind == kDeviceName) {
      *found = ffi::String("a device of the tests");
    } else if (kind == kTotalGlobalMemory) {
      *found = static_cast<int64_t>(1) << 20;
    } else if (kind == kWarpSize) {
      *found = 32;
    }
  }

  void* AllocDataSpace(Device, size_t nbytes, size_t, DLDataType) final {
    if (allocated + nbytes > (1 << 20)) TVM_FFI_THROW(RuntimeError) << "the device has no memory left";
    allocated += nbytes;
    void* made = std::malloc(nbytes + 1);
    sizes[made] = nbytes;
    return made;
  }

  void FreeDataSpace(Device, void* pointer) final {
    allocated -= sizes[pointer];
    sizes.erase(pointer);
    std::free(pointer);
  }

  void CopyDataFromTo(const void* from, size_t from_offset, void* to, size_t to_offset, size_t nbytes, Device dev_from,
                      Device dev_to, DLDataType, TVMStreamHandle) final {
    const char* source = static_cast<const char*>(from) + from_offset;
    char* target = static_cast<char*>(to) + to_offset;
    std::memmove(target, source, nbytes);
    if (dev_from.device_type != dev_to.device_type) Invert(target, nbytes);
  }

  TVMStreamHandle CreateStream(Device) final { return reinterpret_cast<TVMStreamHandle>(++streams); }
  void FreeStream(Device, TVMStreamHandle) final { ++freed; }
  void StreamSync(Device, TVMStreamHandle stream) final { synced = reinterpret_cast<int64_t>(stream); }
  void SetStream(Device, TVMStreamHandle stream) final { current = reinterpret_cast<int64_t>(stream); }

  static void Invert(char* data, size_t nbytes) {
    for (size_t index = 0; index < nbytes; ++index) data[index] = static_cast<char>(~data[index]);
  }

  size_t allocated = 0;
  int64_t streams = 0, freed = 0, synced = -1, current = -1;
  std::map<void*, size_t> sizes;
};

// c = a + b on the device.
void Add(ffi::TensorView a, ffi::TensorView b, ffi::TensorView c) {
  TVM_FFI_ICHECK(a.device().device_type == kDLExtDev) << "expected a tensor on the device";
  for (int64_t index = 0; index < a.numel(); ++index) {
    float values[2];
    const ffi::TensorView* given[2] = {&a, &b};
    for (int one = 0; one < 2; ++one) {
      std::memcpy(&values[one], static_cast<char*>(given[one]->data_ptr()) + given[one]->byte_offset() + 4 * index, 4);
      TestDevice::Invert(reinterpret_cast<char*>(&values[one]), 4);
    }
    values[0] += values[1];
    TestDevice::Invert(reinterpret_cast<char*>(values), 4);
    std::memcpy(static_cast<char*>(c.data_ptr()) + c.byte_offset() + 4 * index, values, 4);
  }
}

TVM_FFI_STATIC_INIT_BLOCK() {
  namespace refl = tvm::ffi::reflection;
  refl::GlobalDef()
      .def_packed("device_api.ext_dev",
                  [](ffi::PackedArgs, ffi::Any* found) { *found = static_cast<void*>(TestDevice::Get()); })
      .def("testdevice.add", Add)
      .def("testdevice.pass", [](ffi::Tensor given) { return given; })
      .def("testdevice.count", [](ffi::String what) -> int64_t {
        TestDevice* device = TestDevice::Get();
        if (what == "allocated") return static_cast<int64_t>(device->allocated);
        if (what == "current") return device->current;
        if (what == "synced") return device->synced;
        return device->freed;
      });
}

}  // namespace rpcnb_tests
