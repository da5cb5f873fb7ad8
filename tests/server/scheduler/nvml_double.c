/* A libnvidia-ml.so.1 for tests: its GPUs are what a mapped file says. Layout: struct state, see nvml_double.py. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define GPUS 8
#define PROCESSES 16

struct process { uint64_t pid, used; };
struct gpu { char name[64], uuid[64]; uint64_t total, used, mig, error, processes; struct process process[PROCESSES]; };
struct state { uint64_t count, init_error, latency_us, calls; struct gpu gpu[GPUS]; };

static struct state *state;
enum { OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9 };

static int initialized;

static int enter(void) {
    if (!initialized) return UNINITIALIZED;
    __atomic_add_fetch(&state->calls, 1, __ATOMIC_SEQ_CST);
    if (state->latency_us) usleep(state->latency_us);
    return initialized ? OK : UNINITIALIZED;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    if (!state) {
        int fd = open(getenv("NVML_DOUBLE_STATE") ? getenv("NVML_DOUBLE_STATE") : "", O_RDWR);
        if (fd < 0) return DRIVER_NOT_LOADED;
        void *p = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        close(fd);
        if (p == MAP_FAILED) return DRIVER_NOT_LOADED;
        state = p;
    }
    initialized = !state->init_error;
    return (int)state->init_error;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) {
    int code = initialized ? OK : UNINITIALIZED;
    initialized = 0;
    return code;
}
const char *nvmlErrorString(int code) {
    return code == 15 ? "GPU is lost" : code == DRIVER_NOT_LOADED ? "Driver Not Loaded" : "double's error";
}
int nvmlDeviceGetCount_v2(unsigned *count) {
    int code = enter();
    if (!code) *count = (unsigned)state->count;
    return code;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    int code = enter();
    if (code) return code;
    if (index >= state->count) return INVALID_ARGUMENT;
    *handle = &state->gpu[index];
    return (int)state->gpu[index].error;
}
int nvmlDeviceGetMemoryInfo(struct gpu *gpu, uint64_t out[3]) {
    int code = enter();
    if (code || gpu->error) return code ? code : (int)gpu->error;
    out[0] = gpu->total;
    out[1] = gpu->total - gpu->used;
    out[2] = gpu->used;
    return OK;
}
static int text(const char *from, char *to, unsigned length) {
    int code = enter();
    if (!code) snprintf(to, length, "%s", from);
    return code;
}
int nvmlDeviceGetName(struct gpu *gpu, char *name, unsigned length) { return text(gpu->name, name, length); }
int nvmlDeviceGetUUID(struct gpu *gpu, char *uuid, unsigned length) { return text(gpu->uuid, uuid, length); }
int nvmlDeviceGetMigMode(struct gpu *gpu, unsigned *current, unsigned *pending) {
    int code = enter();
    if (code) return code;
    if (gpu->mig == 2) return NOT_SUPPORTED;
    *current = *pending = (unsigned)gpu->mig;
    return OK;
}
struct info { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; };
int nvmlDeviceGetComputeRunningProcesses_v3(struct gpu *gpu, unsigned *count, struct info *out) {
    int code = enter();
    if (code) return code;
    unsigned have = (unsigned)gpu->processes, room = *count;
    *count = have;
    if (have == 0) return OK;
    if (room < have || !out) return INSUFFICIENT_SIZE;
    for (unsigned i = 0; i < have; i++) {
        memset(&out[i], 0, sizeof out[i]);
        out[i].pid = (unsigned)gpu->process[i].pid;
        out[i].used = gpu->process[i].used;
    }
    return OK;
}
