/* libcuda without a device: every function that Triton calls succeeds and does nothing, and a launch is counted. */
#include <stdint.h>
typedef int Result;
typedef void *Handle;
#define SUCCEEDS(name) Result name(void) { return 0; }
#define FINDS(name) Result name(Handle *out) { *out = (Handle)1; return 0; }

static int launches;
int stub_launches(void) { return launches; }
Result cuLaunchKernelEx(void) { launches++; return 0; }

Result cuGetErrorString(Result error, const char **text) { *text = "stub"; return 0; }
Result cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
/* shared memory a block of sm_90: Triton refuses a kernel that needs more */
Result cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 227 << 10; return 0; }
/* attribute 0: most threads a block, which Triton checks num_warps against; else registers, spills, static memory */
Result cuFuncGetAttribute(int *value, int attribute, Handle function) { *value = attribute ? 0 : 1024; return 0; }
/* memory of the host passes for memory of the device */
Result cuPointerGetAttribute(uint64_t *out, int attribute, uint64_t pointer) { *out = pointer; return 0; }
FINDS(cuCtxGetCurrent)
FINDS(cuDevicePrimaryCtxRetain)
FINDS(cuModuleLoadData)
FINDS(cuModuleGetFunction)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)

/* what Triton only links */
SUCCEEDS(cuCtxGetDevice)
SUCCEEDS(cuCtxGetLimit)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuDriverGetVersion)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuOccupancyMaxActiveClusters)
SUCCEEDS(cuStreamIsCapturing)
SUCCEEDS(cuTensorMapEncodeIm2col)
SUCCEEDS(cuTensorMapEncodeTiled)
