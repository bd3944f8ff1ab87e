// A block of a kernel's threads on one thread of the CPU: each is a fiber with its own stack, and runs until it has to meet
// others. Who runs next is the schedule's choice, so that a test can try orders that a GPU might take once in a year.
//
// Kernel files never name anything of here; `dev.cuh` does.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
#ifdef __x86_64__
#include <xmmintrin.h>
#else
#include <ucontext.h>
#endif

namespace shim {

// What a launch asks for. The layout is the C interface between the fake driver and a shared object of kernels.
struct Launch {
    unsigned grid[3];
    unsigned threads;
    size_t shared_bytes;
    const void *args;
    int schedule;  // of `Schedule`
    uint64_t seed;
    int late_copies;
    char *message;
    size_t message_bytes;
};

// An exported kernel.
struct Entry {
    const char *name;
    size_t args_bytes;
    unsigned threads_most;
    void (*body)(const void *);
};

// Which of the threads that can run does run: the lowest, the highest, any, or those of warp `seed` before all others.
enum Schedule { FORWARD, REVERSE, RANDOM, AHEAD };

constexpr unsigned WARP = 32;
constexpr unsigned THREADS_MOST = 1024;
constexpr size_t STACK = 128 << 10;
constexpr size_t SHARED_MOST = 228 << 10;
constexpr unsigned BARRIERS = 16;
constexpr unsigned ARRAYS = 32;
// Behind each static array, so that a write past its end is seen.
constexpr size_t GAP = 64;
constexpr unsigned char POISON = 0xff;  // a NaN in f32, bf16 and e4m3
constexpr unsigned char CANARY = 0xa5;

struct Copy {
    void *to;
    const void *from;
};

struct Fiber {
#ifdef __x86_64__
    void *stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
    char *stack = nullptr;
    const char *waits_for = nullptr;
    bool ended = false;
    // Copies issued and not yet known to be done, by group; the last group is still open.
    std::vector<std::vector<Copy>> copies;
};

// Lanes of a warp on their way to one operation.
struct Meeting {
    const char *what = nullptr;
    uint32_t arrived = 0;
    void *operands[WARP];
};

struct Barrier {
    unsigned arrived = 0, expected = 0;
};

struct Array {
    const void *site = nullptr;
    unsigned char *bytes = nullptr;
    size_t length = 0;
};

struct Block {
    const Launch *launch = nullptr;
    const Entry *entry = nullptr;
    unsigned index[3] = {0, 0, 0};
    unsigned current = 0;  // the thread that runs
    unsigned alive = 0;
    uint64_t ready[THREADS_MOST / 64];
    Fiber fibers[THREADS_MOST];
    Meeting warps[THREADS_MOST / WARP];
    Barrier barriers[BARRIERS];
    unsigned char *shared = nullptr;
    size_t shared_used = 0;
    Array arrays[ARRAYS];
    unsigned arrays_used = 0;
    uint64_t random = 0;
    bool failed = false;
#ifdef __x86_64__
    void *scheduler = nullptr;
#else
    ucontext_t scheduler;
#endif
};

inline Block &block() {
    static Block *one = new Block;
    return *one;
}

#ifdef __x86_64__
// Saves what a call preserves, and goes on where the other stack was left.
extern "C" __attribute__((visibility("hidden"))) void shim_switch(void **from, void *to);
asm(R"(
.text
.hidden shim_switch
.globl shim_switch
.type shim_switch, @function
shim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size shim_switch, .-shim_switch
)");
#endif

inline void to_scheduler() {
    Block &b = block();
#ifdef __x86_64__
    shim_switch(&b.fibers[b.current].stack_pointer, b.scheduler);
#else
    swapcontext(&b.fibers[b.current].context, &b.scheduler);
#endif
}

inline void to_fiber(unsigned thread) {
    Block &b = block();
    b.current = thread;
#ifdef __x86_64__
    shim_switch(&b.scheduler, b.fibers[thread].stack_pointer);
#else
    swapcontext(&b.scheduler, &b.fibers[thread].context);
#endif
}

inline void set_ready(unsigned thread) { block().ready[thread / 64] |= 1ull << thread % 64; }
inline void clear_ready(unsigned thread) { block().ready[thread / 64] &= ~(1ull << thread % 64); }

// Ends the launch with a message. The fibers are left where they are; nothing on their stacks needs an end.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char *format, ...) {
    Block &b = block();
    char text[400];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    snprintf(b.launch->message, b.launch->message_bytes, "%s: block %u,%u,%u, thread %u: %s", b.entry->name, b.index[0],
             b.index[1], b.index[2], b.current, text);
    b.failed = true;
    to_scheduler();
    abort();
}

// The running thread waits until someone makes it ready.
inline void wait(const char *what) {
    Block &b = block();
    b.fibers[b.current].waits_for = what;
    clear_ready(b.current);
    to_scheduler();
}

inline void begin() {
    Block &b = block();
    b.entry->body(b.launch->args);
    // A real barrier may count this thread in or not; code that leaves it to that is refused.
    for (unsigned id = 0; id < BARRIERS; id++)
        if (b.barriers[id].arrived > 0 && b.barriers[id].expected == b.launch->threads)
            fail("ended while %u of %u threads wait at barrier %u", b.barriers[id].arrived, b.barriers[id].expected, id);
    if (b.warps[b.current / WARP].arrived) fail("ended while lanes of its warp wait for %s", b.warps[b.current / WARP].what);
    Fiber &self = b.fibers[b.current];
    self.ended = true;
    b.alive--;
    clear_ready(b.current);
    to_scheduler();
    abort();
}

inline void prepare(unsigned thread) {
    Block &b = block();
    Fiber &fiber = b.fibers[thread];
    if (!fiber.stack) fiber.stack = static_cast<char *>(aligned_alloc(64, STACK));
    fiber.ended = false;
    fiber.waits_for = nullptr;
    fiber.copies.assign(1, {});
#ifdef __x86_64__
    void **top = reinterpret_cast<void **>(fiber.stack + STACK);
    // A function begins with its stack 8 past a multiple of 16: as if called.
    *--top = nullptr;
    *--top = reinterpret_cast<void *>(&begin);
    for (int saved = 0; saved < 6; saved++) *--top = nullptr;
    fiber.stack_pointer = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &begin, 0);
#endif
    set_ready(thread);
}

inline uint64_t next_random() {
    Block &b = block();
    b.random ^= b.random << 13;
    b.random ^= b.random >> 7;
    b.random ^= b.random << 17;
    return b.random;
}

// The lowest ready thread from `first` to `end`, or -1.
inline int lowest(unsigned first, unsigned end) {
    Block &b = block();
    for (unsigned at = first; at < end;) {
        uint64_t word = b.ready[at / 64] >> at % 64;
        if (word) {
            unsigned found = at + __builtin_ctzll(word);
            return found < end ? int(found) : -1;
        }
        at = (at / 64 + 1) * 64;
    }
    return -1;
}

inline int highest(unsigned end) {
    Block &b = block();
    for (int word = int((end + 63) / 64) - 1; word >= 0; word--)
        if (b.ready[word]) return word * 64 + 63 - __builtin_clzll(b.ready[word]);
    return -1;
}

inline int choose() {
    Block &b = block();
    unsigned threads = b.launch->threads;
    switch (b.launch->schedule) {
        case REVERSE: return highest(threads);
        case RANDOM: {
            unsigned from = next_random() % threads;
            int found = lowest(from, threads);
            return found >= 0 ? found : lowest(0, from);
        }
        case AHEAD: {
            unsigned warp = b.launch->seed % (threads / WARP);
            int found = lowest(warp * WARP, (warp + 1) * WARP);
            return found >= 0 ? found : lowest(0, threads);
        }
        default: return lowest(0, threads);
    }
}

inline void check_shared() {
    Block &b = block();
    for (unsigned i = 0; i < b.arrays_used; i++)
        for (size_t at = 0; at < GAP; at++)
            if (b.arrays[i].bytes[b.arrays[i].length + at] != CANARY) {
                snprintf(b.launch->message, b.launch->message_bytes, "%s: block %u: wrote %zu bytes past a shared array of %zu",
                         b.entry->name, b.index[0], at + 1, b.arrays[i].length);
                b.failed = true;
                return;
            }
}

inline void run_block() {
    Block &b = block();
    memset(b.ready, 0, sizeof b.ready);
    for (Barrier &barrier : b.barriers) barrier = Barrier();
    for (Meeting &meeting : b.warps) meeting.arrived = 0;
    memset(b.shared, POISON, SHARED_MOST + ARRAYS * GAP);
    b.arrays_used = 0;
    b.shared_used = b.launch->shared_bytes;
    b.alive = b.launch->threads;
    for (unsigned thread = 0; thread < b.launch->threads; thread++) prepare(thread);
    while (b.alive > 0 && !b.failed) {
        int thread = choose();
        if (thread < 0) {
            unsigned stuck = 0;
            while (b.fibers[stuck].ended) stuck++;
            snprintf(b.launch->message, b.launch->message_bytes, "%s: block %u: %u threads wait for each other, thread %u for %s",
                     b.entry->name, b.index[0], b.alive, stuck, b.fibers[stuck].waits_for);
            b.failed = true;
            return;
        }
        to_fiber(thread);
    }
    if (!b.failed) check_shared();
}

// Runs a launch; 0, or 1 with a message. One at a time: whoever calls holds a lock.
inline int run(const Entry *entry, const Launch *launch) {
    Block &b = block();
    b.launch = launch;
    b.entry = entry;
    b.failed = false;
    b.random = launch->seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull;
    if (launch->threads == 0 || launch->threads > entry->threads_most || launch->threads % WARP) {
        snprintf(launch->message, launch->message_bytes, "%s: %u threads, whole warps up to %u are allowed", entry->name,
                 launch->threads, entry->threads_most);
        return 1;
    }
    if (!b.shared) b.shared = static_cast<unsigned char *>(aligned_alloc(1024, SHARED_MOST + ARRAYS * GAP));
#ifdef __x86_64__
    // Subnormal numbers are zero, as kernels are compiled.
    unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);
#endif
    unsigned long blocks = 1ul * launch->grid[0] * launch->grid[1] * launch->grid[2];
    for (unsigned long i = 0; i < blocks && !b.failed; i++) {
        // Blocks have no order; the schedule's is as good as another.
        unsigned long at = launch->schedule == FORWARD ? i : blocks - 1 - i;
        b.index[0] = at % launch->grid[0];
        b.index[1] = at / launch->grid[0] % launch->grid[1];
        b.index[2] = at / launch->grid[0] / launch->grid[1];
        run_block();
    }
#ifdef __x86_64__
    _mm_setcsr(mode);
#endif
    return b.failed;
}

}  // namespace shim

extern "C" __attribute__((visibility("default"))) int shim_run(const shim::Entry *entry, const shim::Launch *launch) {
    return shim::run(entry, launch);
}
