// The functions of libcuda.so.1 that Triton's launcher calls, for a machine without a GPU: kernels are loaded and
// launched as on an H100, and each launch is noted instead of run. Types and numbers are those of cuda.h.

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef int Result, Device;
typedef void *Handle;
typedef struct {
    unsigned grid[3], block[3], shared_bytes;
    Handle stream;
    void *attributes;
    unsigned attribute_count;
} LaunchConfig;

enum { MAX_PARAMETERS = 256 };

// What a launch had: grid, block, shared memory, stream, function, then its parameters in 64 bits each.
static int64_t noted[10 + MAX_PARAMETERS];
static int64_t launch_count;
static int parameter_sizes[MAX_PARAMETERS], parameter_count;
static int shared_bytes_limit = 232448;
static int64_t next_handle = 4096;

void fake_expect_parameters(int count, const int *sizes) {
    parameter_count = count < MAX_PARAMETERS ? count : MAX_PARAMETERS;
    memcpy(parameter_sizes, sizes, parameter_count * sizeof(int));
}
const int64_t *fake_last_launch(void) { return noted; }
int64_t fake_launch_count(void) { return launch_count; }

static Handle make_handle(void) { return (Handle)(next_handle += 16); }

Result cuLaunchKernelEx(const LaunchConfig *config, Handle function, void **parameters, void **extra) {
    int64_t *next = noted;
    for (int i = 0; i < 3; i++) *next++ = config->grid[i];
    for (int i = 0; i < 3; i++) *next++ = config->block[i];
    *next++ = config->shared_bytes;
    *next++ = (int64_t)config->stream;
    *next++ = (int64_t)function;
    for (int i = 0; i < parameter_count; i++, next++) {
        *next = 0;
        memcpy(next, parameters[i], parameter_sizes[i]);
    }
    launch_count++;
    return 0;
}

Result cuDeviceGetAttribute(int *value, int attribute, Device device) {
    switch (attribute) {
        case 10: *value = 32; break;                  // warp size
        case 16: *value = 132; break;                 // multiprocessors
        case 75: *value = 9; break;                   // compute capability, major
        case 76: *value = 0; break;                   // minor
        case 81: *value = 233472; break;              // shared memory of a multiprocessor
        case 97: *value = shared_bytes_limit; break;  // that a block may have
        default: *value = 65536;
    }
    return 0;
}
Result cuFuncGetAttribute(int *value, int attribute, Handle function) {
    *value = attribute == 0 ? 1024 : attribute == 4 ? 128 : 0;  // threads of a block, registers
    return 0;
}

Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Result cuDeviceGetCount(int *count) { *count = 1; return 0; }
Result cuDeviceGet(Device *device, int index) { *device = index; return 0; }
Result cuDevicePrimaryCtxRetain(Handle *context, Device device) { *context = (Handle)1; return 0; }
Result cuCtxGetDevice(Device *device) { *device = 0; return 0; }
Result cuCtxGetCurrent(Handle *context) { *context = (Handle)1; return 0; }
Result cuCtxSetCurrent(Handle context) { return 0; }
Result cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
Result cuCtxSetLimit(int limit, size_t value) { return 0; }
Result cuModuleLoadData(Handle *module, const void *image) { *module = make_handle(); return 0; }
Result cuModuleUnload(Handle module) { return 0; }
Result cuModuleGetFunction(Handle *function, Handle module, const char *name) { *function = make_handle(); return 0; }
Result cuFuncSetAttribute(Handle function, int attribute, int value) { return 0; }
Result cuFuncSetCacheConfig(Handle function, int config) { return 0; }
Result cuStreamIsCapturing(Handle stream, int *capturing) { *capturing = 0; return 0; }
Result cuOccupancyMaxActiveClusters(int *count, Handle function, const void *config) { *count = 1; return 0; }
Result cuGetErrorString(Result error, const char **text) { *text = "an error of the fake driver"; return 0; }
Result cuPointerGetAttribute(void *value, int attribute, uint64_t pointer) {
    memcpy(value, &pointer, sizeof pointer);
    return 0;
}
