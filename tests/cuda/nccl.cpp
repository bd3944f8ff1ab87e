// NCCL between processes of one host, over shared memory: every pair of ranks has a ring of bytes each way, and each call is a set
// of messages that move a little whenever somebody looks at the stream. As strict as the library: nothing may be called while
// something is in progress (the first looks after each call say that it is), and nothing after an abort.
//
//   FAKE_NCCL_VERSION   what it says it is (23203)
//   FAKE_NCCL_FAULT     WHAT:RANK:N, several with commas between them, at the N-th call (from 1) of a rank:
//     die     the process is killed         stop    the process stands still (SIGSTOP)
//     hang    the call stays in progress    slow    it takes 50 ms, and every later call too
//     async   an error behind the call      fail    an error of the call
//     init    (N = 0) connecting never ends for the rank          early   (N = 0) the process is killed while it connects
//   FAKE_NCCL_ONCE      a file that the first fault makes: where it is, none happens
#include "fake.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

namespace {

enum Code { SUCCESS = 0, SYSTEM = 2, INTERNAL = 3, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE = 6, IN_PROGRESS = 7 };
enum Type { INT8 = 0, FLOAT32 = 7 };
// The driver's: a piece of work whose turn has not come to its end.
const int NOT_READY = 600;

const int RANKS_MOST = 8, GENERATIONS = 4;
const size_t RING = 64 << 10;

struct Ring {
    std::atomic<uint64_t> written, read;
    char data[RING];
};

// One communicator's memory; a shrunk one's is the next in the file.
struct alignas(4096) Memory {
    std::atomic<uint32_t> joined[RANKS_MOST];
    std::atomic<uint32_t> finished[RANKS_MOST];
    Ring ring[RANKS_MOST][RANKS_MOST];
};

struct Id {
    char bytes[128];
};

struct Config {
    size_t size;
    unsigned magic, version;
    int blocking, cga, ctas_least, ctas_most;
    const char *network;
    int split_share;
};

// What goes before the bytes of a message: a call that is not the peer's shows.
struct Head {
    uint32_t kind, turn;
    uint64_t bytes;
};

// One message, some of which has moved.
struct Message {
    int peer;
    char *at;
    Head head;
    size_t moved = 0;  // the head's bytes included
    char seen[sizeof(Head)];
    size_t all() const { return sizeof(Head) + head.bytes; }
};

struct Comm;

struct Call {
    std::vector<Message> sends, receives;
    std::vector<std::unique_ptr<char[]>> kept;
    float *sum = nullptr;
    size_t count = 0;
    Comm *comm;
    void *stream = nullptr;
};

struct Comm {
    std::mutex lock;
    Memory *memory;
    int rank, size, generation;
    char path[64];
    bool dead = false, joining = true, stuck = false, slow = false;
    std::atomic<bool> aborted{false};
    std::atomic<int> error{SUCCESS};
    std::atomic<int> pending{0};  // pieces on streams
    int looks = 0;                // that still say "in progress"
    std::vector<Call *> launching;
    unsigned calls = 0, sent[RANKS_MOST] = {}, received[RANKS_MOST] = {};
    bool finalizing = false;
    // A shrink under way.
    Comm *child = nullptr;
    Comm **child_out = nullptr;
};

thread_local int depth = 0;
thread_local Call *group = nullptr;
thread_local char last[256] = "";

int complain(int code, const char *text) {
    snprintf(last, sizeof last, "fake nccl: %s", text);
    return code;
}

// A shrunk communicator has none.
bool fault(const char *what, int rank, unsigned n, int generation = 0) {
    const char *plan = generation ? nullptr : getenv("FAKE_NCCL_FAULT");
    while (plan && *plan) {
        char which[16];
        int of;
        unsigned at;
        if (sscanf(plan, "%15[a-z]:%d:%u", which, &of, &at) == 3 && !strcmp(which, what) && of == rank && at == n) return first("FAKE_NCCL_ONCE");
        plan = strchr(plan, ',');
        plan += plan != nullptr;
    }
    return false;
}

void kill_here(int signal) {
    kill(getpid(), signal);
    while (signal == SIGKILL) pause();
}

// What the real library answers with a crash, at the caller's bad luck.
void must_live(Comm *comm, const char *name) {
    if (!comm || !comm->dead) return;
    fprintf(stderr, "fake nccl: %s after the communicator was let go of\n", name);
    abort();
}

Memory *map(const char *path, int generation) {
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0 || generation >= GENERATIONS) return nullptr;
    void *at = mmap(nullptr, sizeof(Memory), PROT_READ | PROT_WRITE, MAP_SHARED, file, off_t(generation) * sizeof(Memory));
    close(file);
    return at == MAP_FAILED ? nullptr : static_cast<Memory *>(at);
}

// Moves what fits; true when all of it has moved.
bool push(Ring &ring, Message &message) {
    while (message.moved < message.all()) {
        uint64_t written = ring.written.load(std::memory_order_relaxed);
        size_t room = RING - (written - ring.read.load(std::memory_order_acquire));
        if (!room) return false;
        bool in_head = message.moved < sizeof(Head);
        const char *from = in_head ? reinterpret_cast<char *>(&message.head) + message.moved : message.at + message.moved - sizeof(Head);
        size_t left = (in_head ? sizeof(Head) : message.all()) - message.moved, at = written % RING;
        size_t step = std::min({left, room, RING - at});
        memcpy(ring.data + at, from, step);
        ring.written.store(written + step, std::memory_order_release);
        message.moved += step;
    }
    return true;
}

bool pull(Ring &ring, Message &message, Comm *comm) {
    while (message.moved < message.all()) {
        uint64_t read = ring.read.load(std::memory_order_relaxed);
        size_t there = ring.written.load(std::memory_order_acquire) - read;
        if (!there) return false;
        bool in_head = message.moved < sizeof(Head);
        char *to = in_head ? message.seen + message.moved : message.at + message.moved - sizeof(Head);
        size_t left = (in_head ? sizeof(Head) : message.all()) - message.moved, at = read % RING;
        size_t step = std::min({left, there, RING - at});
        memcpy(to, ring.data + at, step);
        ring.read.store(read + step, std::memory_order_release);
        message.moved += step;
        if (in_head && message.moved == sizeof(Head) && memcmp(message.seen, &message.head, sizeof(Head))) {
            fprintf(stderr, "fake nccl: rank %d and rank %d are at different calls\n", comm->rank, message.peer);
            comm->error = INVALID_USAGE;
            return false;
        }
    }
    return true;
}

// A piece of work of the stream, looked at now and then.
int step(void *context) {
    Call *call = static_cast<Call *>(context);
    Comm *comm = call->comm;
    if (!comm->aborted && comm->error == SUCCESS) {
        bool done = true;
        // Of several messages on one ring the first comes first.
        for (int peer = 0; peer < comm->size; peer++) {
            for (auto &message : call->sends)
                if (message.peer == peer && !push(comm->memory->ring[comm->rank][peer], message)) { done = false; break; }
            for (auto &message : call->receives)
                if (message.peer == peer && !pull(comm->memory->ring[peer][comm->rank], message, comm)) { done = false; break; }
        }
        if (!done || comm->error != SUCCESS) return NOT_READY;
        // Not the balanced tree: the real order is nobody's business.
        for (size_t i = 0; call->sum && i < call->count; i++) {
            float all = 0;
            for (int rank = comm->size - 1; rank >= 0; rank--) all += reinterpret_cast<float *>(call->kept[rank].get())[i];
            call->sum[i] = all;
        }
    } else if (!comm->aborted) {
        return NOT_READY;
    }
    comm->pending--;
    delete call;
    return SUCCESS;
}

int launch(Call *call) {
    static auto push_work = reinterpret_cast<int (*)(void *, int (*)(void *), void *)>(dlsym(dlopen("libcuda.so", RTLD_NOW), "fake_push"));
    call->comm->pending++;
    return push_work(call->stream, step, call) ? int(SYSTEM) : int(SUCCESS);
}

// The calls that a group, or one call alone, has gathered: in progress, until some looks have been taken.
int enqueue(Call *call) {
    Comm *comm = call->comm;
    unsigned n = ++comm->calls;
    if (fault("die", comm->rank, n, comm->generation)) kill_here(SIGKILL);
    if (fault("stop", comm->rank, n, comm->generation)) kill_here(SIGSTOP);
    if (fault("fail", comm->rank, n, comm->generation)) return complain(INTERNAL, "asked to fail");
    if (fault("async", comm->rank, n, comm->generation)) comm->error = REMOTE;
    comm->stuck |= fault("hang", comm->rank, n, comm->generation);
    comm->slow |= fault("slow", comm->rank, n, comm->generation);
    if (comm->slow) usleep(50000);
    comm->launching.push_back(call);
    comm->looks = 2;
    return IN_PROGRESS;
}

int check(Comm *comm, const char *name) {
    must_live(comm, name);
    if (!comm) return complain(INVALID_ARGUMENT, "no communicator");
    if (comm->error != SUCCESS) return comm->error;
    if (comm->joining || comm->looks || comm->stuck || comm->child_out)
        return complain(INVALID_ARGUMENT, "a call before the one before it was done");
    return SUCCESS;
}

// Where a call's messages go: a group's, or its own.
template <class Fill>
int call(Comm *comm, void *stream, const char *name, Fill fill) {
    std::lock_guard<std::mutex> guard(comm->lock);
    if (int code = check(comm, name)) return code;
    Call *into = depth ? group : nullptr;
    if (!into) into = new Call;
    if (depth) group = into;
    into->comm = comm;
    into->stream = stream;
    if (int code = fill(*into)) return code;
    return depth ? int(SUCCESS) : enqueue(into);
}

void add(Call &call, bool sends, int peer, void *at, uint32_t kind, size_t bytes) {
    Comm *comm = call.comm;
    unsigned &turn = (sends ? comm->sent : comm->received)[peer];
    Message message{peer, static_cast<char *>(at), {kind, turn++, bytes}, 0, {}};
    (sends ? call.sends : call.receives).push_back(message);
}

size_t width(int type) { return type == FLOAT32 ? 4 : 1; }

Comm *make(const char *path, int generation, int rank, int size) {
    Memory *memory = map(path, generation);
    if (!memory) return nullptr;
    Comm *comm = new Comm;
    comm->memory = memory;
    comm->rank = rank;
    comm->size = size;
    comm->generation = generation;
    snprintf(comm->path, sizeof comm->path, "%s", path);
    comm->stuck = fault("init", rank, 0, generation);
    if (fault("early", rank, 0, generation)) kill_here(SIGKILL);
    memory->joined[rank].store(1);
    return comm;
}

bool everyone(Comm *comm, std::atomic<uint32_t> *words) {
    for (int rank = 0; rank < comm->size; rank++)
        if (!words[rank].load()) return false;
    return true;
}

// The state that a look shows.
int state(Comm *comm) {
    if (comm->error != SUCCESS) return comm->error;
    if (comm->stuck) return IN_PROGRESS;
    if (comm->joining) {
        if (!everyone(comm, comm->memory->joined)) return IN_PROGRESS;
        comm->joining = false;
    }
    if (comm->child_out) {
        if (!everyone(comm->child, comm->child->memory->joined)) return IN_PROGRESS;
        comm->child->joining = false;
        *comm->child_out = comm->child;
        comm->child_out = nullptr;
    }
    if (comm->looks && --comm->looks) return IN_PROGRESS;
    for (Call *call : comm->launching)
        if (int code = launch(call)) return code;
    comm->launching.clear();
    return comm->finalizing && comm->pending ? int(IN_PROGRESS) : int(SUCCESS);
}

}  // namespace

FAKE int ncclGetVersion(int *version) {
    const char *set = getenv("FAKE_NCCL_VERSION");
    *version = set ? atoi(set) : 23203;
    return SUCCESS;
}

FAKE const char *ncclGetLastError(Comm *) { return last; }

// A file without a name, which stays as long as this process or a mapping of it.
FAKE int ncclGetUniqueId(Id *id) {
    int file = memfd_create("fake-nccl", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, GENERATIONS * sizeof(Memory))) return SYSTEM;
    memset(id, 0, sizeof *id);
    snprintf(id->bytes, sizeof id->bytes, "/proc/%d/fd/%d", getpid(), file);
    return SUCCESS;
}

FAKE int ncclCommInitRankConfig(Comm **out, int size, Id id, int rank, Config *config) {
    if (!config || config->magic != 0xcafebeef || config->blocking != 0) return complain(INVALID_ARGUMENT, "a configuration that blocks");
    if (config->cga != INT_MIN || config->ctas_least != INT_MIN || config->split_share != INT_MIN) return complain(INVALID_ARGUMENT, "a configuration that says too much");
    if (size < 1 || size > RANKS_MOST || rank < 0 || rank >= size) return complain(INVALID_ARGUMENT, "a rank that is none");
    *out = make(id.bytes, 0, rank, size);
    return *out ? int(IN_PROGRESS) : complain(SYSTEM, "an id that leads nowhere");
}

FAKE int ncclCommGetAsyncError(Comm *comm, int *out) {
    must_live(comm, "ncclCommGetAsyncError");
    std::lock_guard<std::mutex> guard(comm->lock);
    *out = state(comm);
    return SUCCESS;
}

// The memory stays: what is still on a stream looks at it.
FAKE int ncclCommAbort(Comm *comm) {
    must_live(comm, "ncclCommAbort");
    std::lock_guard<std::mutex> guard(comm->lock);
    comm->aborted = true;
    comm->dead = true;
    return SUCCESS;
}

FAKE int ncclCommFinalize(Comm *comm) {
    std::lock_guard<std::mutex> guard(comm->lock);
    if (int code = check(comm, "ncclCommFinalize")) return code;
    comm->finalizing = true;
    return IN_PROGRESS;
}

FAKE int ncclCommDestroy(Comm *comm) {
    std::lock_guard<std::mutex> guard(comm->lock);
    if (int code = check(comm, "ncclCommDestroy")) return code;
    comm->dead = true;
    return SUCCESS;
}

FAKE int ncclCommShrink(Comm *comm, int *excluded, int count, Comm **out, Config *, int flags) {
    must_live(comm, "ncclCommShrink");
    std::lock_guard<std::mutex> guard(comm->lock);
    if (count < 1 || flags != 1) return complain(INVALID_ARGUMENT, "a shrink that is none");
    int before = 0;
    for (int i = 0; i < count; i++) {
        if (excluded[i] == comm->rank) return complain(INVALID_ARGUMENT, "a rank that excludes itself");
        before += excluded[i] < comm->rank;
    }
    comm->aborted = true;
    comm->error = SUCCESS;
    comm->stuck = comm->joining = false;
    comm->looks = 0;
    for (Call *call : comm->launching) delete call;
    comm->launching.clear();
    comm->child = make(comm->path, comm->generation + 1, comm->rank - before, comm->size - count);
    if (!comm->child) return complain(SYSTEM, "no room to shrink");
    comm->child_out = out;
    return IN_PROGRESS;
}

FAKE int ncclGroupStart() {
    depth++;
    return SUCCESS;
}

FAKE int ncclGroupEnd() {
    if (!depth) return complain(INVALID_USAGE, "a group ended that was not started");
    if (--depth || !group) return SUCCESS;
    Call *whole = group;
    group = nullptr;
    std::lock_guard<std::mutex> guard(whole->comm->lock);
    return enqueue(whole);
}

FAKE int ncclAllReduce(const void *from, void *to, size_t count, int type, int op, Comm *comm, void *stream) {
    if (type != FLOAT32 || op != 0) return complain(INVALID_ARGUMENT, "only sums of float");
    // Read when its turn comes: what is sent is the device's memory itself.
    return call(comm, stream, "ncclAllReduce", [&](Call &call) {
        call.sum = static_cast<float *>(to);
        call.count = count;
        for (int peer = 0; peer < comm->size; peer++) {
            call.kept.emplace_back(new char[count * 4 + 4]);
            add(call, true, peer, const_cast<void *>(from), 1, count * 4);
            add(call, false, peer, call.kept.back().get(), 1, count * 4);
        }
        return int(SUCCESS);
    });
}

FAKE int ncclAllGather(const void *from, void *to, size_t count, int type, Comm *comm, void *stream) {
    return call(comm, stream, "ncclAllGather", [&](Call &call) {
        size_t bytes = count * width(type);
        for (int peer = 0; peer < comm->size; peer++) {
            add(call, true, peer, const_cast<void *>(from), 2, bytes);
            add(call, false, peer, static_cast<char *>(to) + peer * bytes, 2, bytes);
        }
        return int(SUCCESS);
    });
}

FAKE int ncclSend(const void *from, size_t count, int type, int peer, Comm *comm, void *stream) {
    return call(comm, stream, "ncclSend", [&](Call &call) {
        if (peer < 0 || peer >= comm->size) return complain(INVALID_ARGUMENT, "a peer that is none");
        return add(call, true, peer, const_cast<void *>(from), 3, count * width(type)), int(SUCCESS);
    });
}

FAKE int ncclRecv(void *to, size_t count, int type, int peer, Comm *comm, void *stream) {
    return call(comm, stream, "ncclRecv", [&](Call &call) {
        if (peer < 0 || peer >= comm->size) return complain(INVALID_ARGUMENT, "a peer that is none");
        return add(call, false, peer, to, 3, count * width(type)), int(SUCCESS);
    });
}
