// Runs the planted kernel under every schedule: without a bug all agree with plain loops, and every bug shows in at least one.
// Prints a line a bug; ends with 1 if one stayed hidden.
#include "planted.cu"

#include <string>

constexpr unsigned COUNT = 3;

struct Result {
    float out[COUNT][THREADS];
    u32 matrix[COUNT][WARP][4];
    std::string message;
};

static float in[COUNT][TILES][THREADS];

static Result launch(u32 bug, int schedule, uint64_t seed, int late) {
    Result result;
    memset(result.out, 0, sizeof result.out);
    memset(result.matrix, 0, sizeof result.matrix);
    PlantedArgs args = {&in[0][0][0], &result.out[0][0], &result.matrix[0][0][0], bug};
    char message[512] = "";
    shim::Launch launch = {{COUNT, 1, 1}, THREADS, 0, &args, schedule, seed, late, message, sizeof message};
    shim_run(&shim_entry_planted, &launch);
    result.message = message;
    return result;
}

// What the kernel means, without threads.
static Result expected() {
    Result want;
    for (unsigned block = 0; block < COUNT; block++) {
        float total[THREADS], next[THREADS];
        for (unsigned me = 0; me < THREADS; me++) {
            total[me] = 0.0f;
            for (unsigned step = 0; step < TILES; step++) total[me] += in[block][step][THREADS - 1 - me];
        }
        for (unsigned me = 0; me < THREADS; me++) next[me] = total[me] + total[me / WARP * WARP + (me + 1) % WARP];
        for (unsigned me = 0; me < THREADS; me++) total[me] = next[me] + next[(me + 40) % THREADS];
        for (unsigned me = 0; me < THREADS; me++) want.out[block][me] = total[me] + total[me ^ 1];
        float tile[16][16];
        for (unsigned me = 0; me < THREADS; me++)
            for (unsigned half = 0; half < 2; half++) {
                unsigned at = me / WARP * 64 + me % WARP * 2 + half;
                tile[at / 16][at % 16] = from_bits((0x3f80u + (me * (half ? 11 : 7) & 63)) << 16);
            }
        for (unsigned i = 0; i < WARP; i++)
            for (unsigned part = 0; part < 4; part++) {
                unsigned row = i / 4 + part / 2 * 8, column = i % 4 * 2 + part % 2;
                float sum = 0.0f;
                // b's column n holds a's row n: of its first eight inputs, then of row n + 8's first eight.
                for (unsigned k = 0; k < 16; k++) sum += tile[row][k] * tile[column + k / 8 * 8][k % 8];
                want.matrix[block][i][part] = bits(sum);
            }
    }
    return want;
}

static bool differs(const Result &a, const Result &b) {
    return !a.message.empty() || memcmp(a.out, b.out, sizeof a.out) || memcmp(a.matrix, b.matrix, sizeof a.matrix);
}

int main() {
    for (unsigned i = 0; i < COUNT * TILES * THREADS; i++) (&in[0][0][0])[i] = float(i * 37 % 101) - 50.0f;
    const Result want = expected();
    struct { const char *name; int schedule; uint64_t seed; } schedules[] = {
        {"forward", shim::FORWARD, 0}, {"reverse", shim::REVERSE, 0}, {"random 1", shim::RANDOM, 1},
        {"random 2", shim::RANDOM, 2}, {"random 3", shim::RANDOM, 3}, {"warp 0 ahead", shim::AHEAD, 0},
        {"warp 1 ahead", shim::AHEAD, 1}, {"warp 3 ahead", shim::AHEAD, 3},
    };
    int hidden = 0;
    for (u32 bug = NONE; bug < BUGS; bug++) {
        int seen = 0, all = 0;
        std::string by, message;
        for (auto &s : schedules)
            for (int late = 0; late < 2; late++, all++) {
                Result got = launch(bug, s.schedule, s.seed, late);
                if (!differs(got, want)) continue;
                if (!seen++) by = std::string(s.name) + (late ? ", late copies" : ", early copies"), message = got.message;
            }
        printf("bug %2u: %2d of %d schedules%s%s%s%s\n", bug, seen, all, seen ? ", first " : "", by.c_str(),
               message.empty() ? "" : ": ", message.c_str());
        if ((seen > 0) != (bug != NONE)) hidden++;
    }
    return hidden > 0;
}
