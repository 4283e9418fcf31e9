// Launches of a program that was made once: one call, nothing derived, looked up or allocated between them.
//
// A library of its own, since it needs neither OpenMP nor AVX. The driver's functions are looked up in the
// libcuda that torch has loaded, so that no CUDA header is needed; ops/launching.py mirrors the structures.
#include <dlfcn.h>

#include <cstdint>

namespace {

using Status = int32_t;  // CUresult
using Handle = void*;   // CUcontext, CUfunction, CUstream

constexpr Status kDriverMissing = -1;

struct Driver {
    Status (*launch_kernel)(Handle, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t,
                            Handle, void**, void**);
    Status (*get_current)(Handle*);
    Status (*push_current)(Handle);
    Status (*pop_current)(Handle*);
    Status (*error_string)(Status, const char**);
};

template <typename Function>
bool find(Handle library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    return function != nullptr;
}

const Driver* load() {
    static Driver driver;
    Handle library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    const bool is_whole = library && find(library, "cuLaunchKernel", driver.launch_kernel) &&
                          find(library, "cuCtxGetCurrent", driver.get_current) &&
                          find(library, "cuCtxPushCurrent_v2", driver.push_current) &&
                          find(library, "cuCtxPopCurrent_v2", driver.pop_current) &&
                          find(library, "cuGetErrorString", driver.error_string);
    return is_whole ? &driver : nullptr;
}

const Driver* driver() {
    static const Driver* loaded = load();
    return loaded;
}

}  // namespace

extern "C" {

// A parameter of a kernel: 8 bytes as they are where `slot` is -1, else the address in that slot plus `value`.
struct Parameter {
    int64_t slot, value;
};

struct Launch {
    Handle function;
    uint32_t grid[3];
    uint32_t threads, shared_bytes, parameter_count;
    const Parameter* parameters;
};

constexpr int kMostParameters = 64;

__attribute__((visibility("default"))) int32_t sparsifiner_launch_interface() { return 1; }

// The context that is current in this thread, null where there is none.
__attribute__((visibility("default"))) Status sparsifiner_current_context(Handle* context) {
    return driver() ? driver()->get_current(context) : kDriverMissing;
}

__attribute__((visibility("default"))) const char* sparsifiner_driver_error(Status status) {
    const char* text = nullptr;
    if (!driver()) return "libcuda.so.1 is missing or lacks a function";
    if (driver()->error_string(status, &text) || !text) return "an error that the driver does not know";
    return text;
}

// Launches all, in order, in `stream` of `context`, which is current meanwhile, whatever thread calls.
__attribute__((visibility("default"))) Status sparsifiner_launch(const Launch* launches, int32_t count,
                                                                 Handle context, Handle stream,
                                                                 const int64_t* addresses) {
    const Driver* cuda = driver();
    if (!cuda) return kDriverMissing;
    Handle current = nullptr;
    if (Status status = cuda->get_current(&current)) return status;
    const bool is_other = current != context;
    if (is_other) {
        if (Status status = cuda->push_current(context)) return status;
    }
    Status status = 0;
    for (int32_t i = 0; i < count && !status; ++i) {
        const Launch& launch = launches[i];
        int64_t values[kMostParameters];
        void* pointers[kMostParameters];
        for (uint32_t j = 0; j < launch.parameter_count; ++j) {
            const Parameter& parameter = launch.parameters[j];
            values[j] = parameter.value + (parameter.slot < 0 ? 0 : addresses[parameter.slot]);
            pointers[j] = &values[j];
        }
        status = cuda->launch_kernel(launch.function, launch.grid[0], launch.grid[1], launch.grid[2],
                                     launch.threads, 1, 1, launch.shared_bytes, stream, pointers, nullptr);
    }
    if (is_other) cuda->pop_current(&current);
    return status;
}

}  // extern "C"
