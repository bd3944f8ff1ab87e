// A CUDA driver without a GPU: host memory stands for device memory, kernels are shared objects that g++ built (`nvrtc.cpp`), and
// nothing that was put on a stream happens before somebody waits for it, or nobody has called anything for a while: a device does go
// on by itself, and other ranks may wait for it. Only what the worker calls is here.
//
//   FAKE_CUDA_DEVICES   how many GPUs there are (1)              FAKE_CUDA_SCHEDULE  forward, reverse, random:SEED, ahead:WARP
//   FAKE_CUDA_MEMORY    bytes of each (1 GiB)                    FAKE_CUDA_COPIES    early or late
//   FAKE_CUDA_FAIL      NAME:N:CODE, the N-th call of NAME fails  FAKE_CUDA_VERSION   the driver's (13000)
//   FAKE_CUDA_ONCE      a file that the first such failure makes: where it is, none happens
//   FAKE_CUDA_CALLS     a file to which counts of calls go in the end    FAKE_CUDA_CAPABILITY  90 for a Hopper (90)
#include "fake.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>

#include "shim/fibers.h"

namespace {

enum Code { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_IMAGE = 200,
            INVALID_CONTEXT = 201, ECC = 214, NO_BINARY = 209, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600, LAUNCH_FAILED = 719, UNKNOWN = 999 };

struct Module {
    void *library;
    int (*run)(const shim::Entry *, const shim::Launch *);
};

struct Function {
    const shim::Entry *entry;
    Module *module;
    size_t shared_most = 48 << 10;
};

struct Stream {
    std::deque<std::function<int()>> work;
};

struct State {
    std::mutex lock;
    std::map<uintptr_t, size_t> device, host;  // ranges by their first byte
    size_t used = 0;
    int sticky = SUCCESS;  // what a kernel broke stays broken
    std::map<std::string, unsigned> calls;
    unsigned long calls_all = 0;
    std::set<Stream *> streams;
};

State &state() {
    static State *one = new State;
    return *one;
}

thread_local bool current = false;

void write_calls() {
    const char *path = getenv("FAKE_CUDA_CALLS");
    FILE *out = path ? fopen(path, "w") : nullptr;
    if (!out) return;
    for (auto &call : state().calls) fprintf(out, "%s %u\n", call.first.c_str(), call.second);
    fclose(out);
}

// Counts a call, and fails it where the environment says so.
int enter(const char *name) {
    static bool once = (atexit(write_calls), true);
    (void)once;
    unsigned count = ++state().calls[name];
    state().calls_all++;
    const char *plan = getenv("FAKE_CUDA_FAIL");
    char which[64];
    unsigned at, code = UNKNOWN;
    if (plan && sscanf(plan, "%63[^:]:%u:%u", which, &at, &code) >= 2 && !strcmp(which, name) && at == count && first("FAKE_CUDA_ONCE")) {
        // A device that broke stays broken.
        if (code == ECC || code >= 700) state().sticky = code;
        return code;
    }
    return state().sticky;
}

size_t memory() {
    const char *bytes = getenv("FAKE_CUDA_MEMORY");
    return bytes ? strtoull(bytes, nullptr, 10) : size_t(1) << 30;
}

int devices() {
    const char *count = getenv("FAKE_CUDA_DEVICES");
    return count ? atoi(count) : 1;
}

unsigned capability() {
    const char *set = getenv("FAKE_CUDA_CAPABILITY");
    return set ? atoi(set) : 90;
}

// Whether this GPU runs code for `architecture`: common code is for later GPUs of its generation too, 90a for one alone.
bool runs(const char *architecture) {
    char own = 0;
    unsigned code = 0;
    sscanf(architecture, "%u%c", &code, &own);
    return own ? code == capability() : code / 10 == capability() / 10 && code <= capability();
}

bool within(const std::map<uintptr_t, size_t> &ranges, uintptr_t at, size_t bytes) {
    auto next = ranges.upper_bound(at);
    if (next == ranges.begin()) return false;
    auto range = *--next;
    return at + bytes <= range.first + range.second;
}

int complain(int code, const char *text) {
    fprintf(stderr, "fake cuda: %s\n", text);
    return code;
}

// Does what is on a stream, until something of it waits for another process.
int drain(Stream *stream) {
    while (!stream->work.empty() && state().sticky == SUCCESS) {
        int code = stream->work.front()();
        if (code == NOT_READY) return code;
        stream->work.pop_front();
        state().sticky = code;
    }
    return state().sticky;
}

// What goes on by itself while the program does other things.
void go_on() {
    for (unsigned long seen = 0;;) {
        usleep(5000);
        std::lock_guard<std::mutex> guard(state().lock);
        if (state().calls_all == seen)
            for (Stream *stream : state().streams) drain(stream);
        seen = state().calls_all;
    }
}

// The same to the end. Others may call meanwhile, as to abort what is waited for.
int wait(Stream *stream, std::unique_lock<std::mutex> &guard) {
    int code;
    while ((code = drain(stream)) == NOT_READY) {
        guard.unlock();
        usleep(50);
        guard.lock();
    }
    return code;
}

int launch(Function *function, const unsigned grid[3], unsigned threads, size_t shared, const std::string &args) {
    char message[512] = "";
    shim::Launch launch = {{grid[0], grid[1], grid[2]}, threads, shared, args.data(), shim::FORWARD, 0, 0, message, sizeof message};
    const char *schedule = getenv("FAKE_CUDA_SCHEDULE"), *copies = getenv("FAKE_CUDA_COPIES");
    if (schedule) {
        const char *names[] = {"forward", "reverse", "random", "ahead"};
        for (int i = 0; i < 4; i++)
            if (!strncmp(schedule, names[i], strlen(names[i]))) launch.schedule = i;
        const char *seed = strchr(schedule, ':');
        launch.seed = seed ? strtoull(seed + 1, nullptr, 10) : 1;
    }
    launch.late_copies = copies && !strcmp(copies, "late");
    if (function->module->run(function->entry, &launch)) return complain(LAUNCH_FAILED, message);
    return SUCCESS;
}

}  // namespace

#define ENTER(name)                                   \
    std::unique_lock<std::mutex> guard(state().lock); \
    if (int code = enter(name)) return code

#define CURRENT() \
    if (!current) return complain(INVALID_CONTEXT, "a call without a context")

FAKE int cuInit(unsigned) {
    ENTER("cuInit");
    return devices() > 0 ? SUCCESS : NO_DEVICE;
}

FAKE int cuDriverGetVersion(int *version) {
    ENTER("cuDriverGetVersion");
    const char *set = getenv("FAKE_CUDA_VERSION");
    *version = set ? atoi(set) : 13000;
    return SUCCESS;
}

FAKE int cuDeviceGetCount(int *count) {
    ENTER("cuDeviceGetCount");
    *count = devices();
    return SUCCESS;
}

FAKE int cuDeviceGet(int *device, int ordinal) {
    ENTER("cuDeviceGet");
    if (ordinal < 0 || ordinal >= devices()) return INVALID_DEVICE;
    *device = ordinal;
    return SUCCESS;
}

FAKE int cuDeviceGetName(char *name, int length, int) {
    ENTER("cuDeviceGetName");
    snprintf(name, length, "Fake GPU");
    return SUCCESS;
}

FAKE int cuDeviceGetAttribute(int *value, int attribute, int) {
    ENTER("cuDeviceGetAttribute");
    switch (attribute) {
        case 16: *value = 8; return SUCCESS;            // multiprocessors
        case 32: *value = 1; return SUCCESS;            // memory corrects errors
        case 75: *value = capability() / 10; return SUCCESS;
        case 76: *value = capability() % 10; return SUCCESS;
        case 97: *value = 227 << 10; return SUCCESS;    // shared memory of a block that asks for it
        default: return complain(INVALID_VALUE, "an attribute that it does not know");
    }
}

FAKE int cuDeviceGetUuid_v2(unsigned char *id, int device) {
    ENTER("cuDeviceGetUuid_v2");
    memset(id, device + 1, 16);
    return SUCCESS;
}

FAKE int cuDeviceTotalMem_v2(size_t *bytes, int) {
    ENTER("cuDeviceTotalMem_v2");
    *bytes = memory();
    return SUCCESS;
}

// As on a host with two switches that don't reach each other.
FAKE int cuDeviceCanAccessPeer(int *can, int one, int other) {
    ENTER("cuDeviceCanAccessPeer");
    *can = one / 4 == other / 4;
    return SUCCESS;
}

FAKE int cuDeviceGetP2PAttribute(int *value, int, int one, int other) {
    ENTER("cuDeviceGetP2PAttribute");
    *value = one / 4 == other / 4;
    return SUCCESS;
}

FAKE int cuDevicePrimaryCtxRetain(void **context, int device) {
    ENTER("cuDevicePrimaryCtxRetain");
    *context = reinterpret_cast<void *>(uintptr_t(device) + 1);
    return SUCCESS;
}

FAKE int cuDevicePrimaryCtxRelease_v2(int) {
    ENTER("cuDevicePrimaryCtxRelease_v2");
    return SUCCESS;
}

FAKE int cuCtxSetCurrent(void *context) {
    ENTER("cuCtxSetCurrent");
    current = context != nullptr;
    return SUCCESS;
}

FAKE int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    ENTER("cuMemGetInfo_v2");
    CURRENT();
    *total = memory();
    *free_bytes = memory() - state().used;
    return SUCCESS;
}

// Ends at a page that nobody may touch; full of NaNs.
FAKE int cuMemAlloc_v2(uintptr_t *out, size_t bytes) {
    ENTER("cuMemAlloc_v2");
    CURRENT();
    if (bytes == 0) return INVALID_VALUE;
    if (state().used + bytes > memory()) return OUT_OF_MEMORY;
    size_t page = sysconf(_SC_PAGESIZE), whole = (bytes + page - 1) / page * page;
    char *range = static_cast<char *>(mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (range == MAP_FAILED) return OUT_OF_MEMORY;
    mprotect(range + whole, page, PROT_NONE);
    // CUDA promises 256 bytes, and so much may lie between the end and the guard.
    uintptr_t at = (reinterpret_cast<uintptr_t>(range) + whole - bytes) / 256 * 256;
    memset(reinterpret_cast<void *>(at), shim::POISON, bytes);
    state().device[at] = bytes;
    state().used += bytes;
    *out = at;
    return SUCCESS;
}

FAKE int cuMemFree_v2(uintptr_t at) {
    ENTER("cuMemFree_v2");
    auto found = state().device.find(at);
    if (found == state().device.end()) return complain(INVALID_VALUE, "memory freed that is not there");
    size_t page = sysconf(_SC_PAGESIZE), whole = (found->second + page - 1) / page * page;
    munmap(reinterpret_cast<void *>(at / page * page), whole + page);
    state().used -= found->second;
    state().device.erase(found);
    return SUCCESS;
}

FAKE int cuMemHostAlloc(void **out, size_t bytes, unsigned) {
    ENTER("cuMemHostAlloc");
    CURRENT();
    if (posix_memalign(out, 4096, bytes ? bytes : 1)) return OUT_OF_MEMORY;
    memset(*out, shim::POISON, bytes);
    state().host[reinterpret_cast<uintptr_t>(*out)] = bytes;
    return SUCCESS;
}

FAKE int cuMemFreeHost(void *at) {
    ENTER("cuMemFreeHost");
    if (!state().host.erase(reinterpret_cast<uintptr_t>(at))) return complain(INVALID_VALUE, "host memory freed that is not there");
    free(at);
    return SUCCESS;
}

// Pinned memory is read when the copy's turn comes, other memory before the call returns.
FAKE int cuMemcpyHtoDAsync_v2(uintptr_t to, const void *from, size_t bytes, Stream *stream) {
    ENTER("cuMemcpyHtoDAsync_v2");
    CURRENT();
    if (!within(state().device, to, bytes)) return complain(INVALID_VALUE, "a copy to memory that is not the device's");
    auto copy = [=] { return memcpy(reinterpret_cast<void *>(to), from, bytes), int(SUCCESS); };
    if (within(state().host, reinterpret_cast<uintptr_t>(from), bytes)) return stream->work.push_back(copy), SUCCESS;
    std::string kept(static_cast<const char *>(from), bytes);
    stream->work.push_back([=] { return memcpy(reinterpret_cast<void *>(to), kept.data(), bytes), int(SUCCESS); });
    return SUCCESS;
}

// The same the other way round: what goes to memory that is not pinned has come when the call returns.
FAKE int cuMemcpyDtoHAsync_v2(void *to, uintptr_t from, size_t bytes, Stream *stream) {
    ENTER("cuMemcpyDtoHAsync_v2");
    CURRENT();
    if (!within(state().device, from, bytes)) return complain(INVALID_VALUE, "a copy from memory that is not the device's");
    stream->work.push_back([=] { return memcpy(to, reinterpret_cast<void *>(from), bytes), int(SUCCESS); });
    return within(state().host, reinterpret_cast<uintptr_t>(to), bytes) ? int(SUCCESS) : wait(stream, guard);
}

FAKE int cuMemcpyDtoDAsync_v2(uintptr_t to, uintptr_t from, size_t bytes, Stream *stream) {
    ENTER("cuMemcpyDtoDAsync_v2");
    CURRENT();
    if (!within(state().device, to, bytes) || !within(state().device, from, bytes)) {
        return complain(INVALID_VALUE, "a copy of memory that is not the device's");
    }
    stream->work.push_back([=] { return memmove(reinterpret_cast<void *>(to), reinterpret_cast<void *>(from), bytes), int(SUCCESS); });
    return SUCCESS;
}

FAKE int cuMemsetD8Async(uintptr_t at, unsigned char value, size_t bytes, Stream *stream) {
    ENTER("cuMemsetD8Async");
    CURRENT();
    if (!within(state().device, at, bytes)) return complain(INVALID_VALUE, "memory filled that is not the device's");
    stream->work.push_back([=] { return memset(reinterpret_cast<void *>(at), value, bytes), int(SUCCESS); });
    return SUCCESS;
}

FAKE int cuStreamCreate(Stream **out, unsigned) {
    ENTER("cuStreamCreate");
    CURRENT();
    *out = new Stream;
    state().streams.insert(*out);
    static bool once = (std::thread(go_on).detach(), true);
    (void)once;
    return SUCCESS;
}

FAKE int cuStreamSynchronize(Stream *stream) {
    ENTER("cuStreamSynchronize");
    return wait(stream, guard);
}

FAKE int cuStreamQuery(Stream *stream) {
    ENTER("cuStreamQuery");
    return drain(stream);
}

FAKE int cuStreamWriteValue32_v2(Stream *stream, uintptr_t at, unsigned value, unsigned) {
    ENTER("cuStreamWriteValue32_v2");
    if (!within(state().host, at, 4) && !within(state().device, at, 4)) return complain(INVALID_VALUE, "a value to memory that is nobody's");
    stream->work.push_back([=] { return __atomic_store_n(reinterpret_cast<unsigned *>(at), value, __ATOMIC_RELEASE), int(SUCCESS); });
    return SUCCESS;
}

// For the other fake libraries: work that says NOT_READY until it is done.
FAKE int fake_push(Stream *stream, int (*work)(void *), void *context) {
    ENTER("fake_push");
    stream->work.push_back([=] { return work(context); });
    return SUCCESS;
}

FAKE int cuStreamDestroy_v2(Stream *stream) {
    ENTER("cuStreamDestroy_v2");
    wait(stream, guard);
    state().streams.erase(stream);
    delete stream;
    return SUCCESS;
}

FAKE int cuModuleLoadData(Module **out, const void *image) {
    ENTER("cuModuleLoadData");
    CURRENT();
    char path[1024], architecture[16];
    if (sscanf(static_cast<const char *>(image), FAKE_IMAGE, architecture, path) != 2) return INVALID_IMAGE;
    if (!runs(architecture)) return NO_BINARY;
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) return complain(INVALID_IMAGE, dlerror());
    void *run = dlsym(library, "shim_run");
    if (!run) return INVALID_IMAGE;
    *out = new Module{library, reinterpret_cast<int (*)(const shim::Entry *, const shim::Launch *)>(run)};
    return SUCCESS;
}

// The library stays: its stacks and shared memory are its own for good.
FAKE int cuModuleUnload(Module *module) {
    ENTER("cuModuleUnload");
    delete module;
    return SUCCESS;
}

FAKE int cuModuleGetFunction(Function **out, Module *module, const char *name) {
    ENTER("cuModuleGetFunction");
    void *entry = dlsym(module->library, (std::string("shim_entry_") + name).c_str());
    if (!entry) return NOT_FOUND;
    *out = new Function{static_cast<const shim::Entry *>(entry), module};
    return SUCCESS;
}

FAKE int cuFuncSetAttribute(Function *function, int attribute, int value) {
    ENTER("cuFuncSetAttribute");
    if (attribute != 8 || value > 227 << 10) return INVALID_VALUE;
    function->shared_most = value;
    return SUCCESS;
}

FAKE int cuLaunchKernel(Function *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y, unsigned threads_z,
                        unsigned shared, Stream *stream, void **parameters, void **extra) {
    ENTER("cuLaunchKernel");
    CURRENT();
    if (!x || !y || !z || y > 65535 || z > 65535 || threads_y != 1 || threads_z != 1) return complain(INVALID_VALUE, "a grid of nothing, or too large");
    if (shared > function->shared_most) return complain(INVALID_VALUE, "more shared memory than was allowed");
    // A buffer and its size: so a struct that differs from the kernel's is found.
    if (parameters || !extra || extra[0] != reinterpret_cast<void *>(1) || extra[2] != reinterpret_cast<void *>(2)) return INVALID_VALUE;
    size_t bytes = *static_cast<size_t *>(extra[3]);
    if (bytes != function->entry->args_bytes) {
        char text[200];
        snprintf(text, sizeof text, "%s takes %zu bytes, %zu were given", function->entry->name, function->entry->args_bytes, bytes);
        return complain(INVALID_VALUE, text);
    }
    std::string args(static_cast<char *>(extra[1]), bytes);
    stream->work.push_back([=] {
        const unsigned grid[3] = {x, y, z};
        return launch(function, grid, threads, shared, args);
    });
    return SUCCESS;
}

FAKE int cuGetErrorName(int code, const char **name) {
    switch (code) {
        case INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; break;
        case OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; break;
        case NO_DEVICE: *name = "CUDA_ERROR_NO_DEVICE"; break;
        case INVALID_DEVICE: *name = "CUDA_ERROR_INVALID_DEVICE"; break;
        case INVALID_IMAGE: *name = "CUDA_ERROR_INVALID_IMAGE"; break;
        case NO_BINARY: *name = "CUDA_ERROR_NO_BINARY_FOR_GPU"; break;
        case INVALID_CONTEXT: *name = "CUDA_ERROR_INVALID_CONTEXT"; break;
        case NOT_FOUND: *name = "CUDA_ERROR_NOT_FOUND"; break;
        case LAUNCH_FAILED: *name = "CUDA_ERROR_LAUNCH_FAILED"; break;
        default: *name = "CUDA_ERROR_UNKNOWN";
    }
    return SUCCESS;
}
