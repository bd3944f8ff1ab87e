// NVRTC by way of g++: a "cubin" names the shared object that was built of the same text. Built objects are kept in
// FAKE_CUDA_CACHE by the text of everything that goes into them; FAKE_CUDA_SHIM is the folder of the kernels' own headers.
#include "fake.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace {

enum Code { SUCCESS = 0, INVALID_OPTION = 5, COMPILATION = 6 };

struct Program {
    std::string name, source, log, image;
    std::vector<std::pair<std::string, std::string>> headers;
};

std::string read(const std::string &path) {
    std::ifstream in(path);
    std::stringstream all;
    all << in.rdbuf();
    return all.str();
}

void write(const std::string &path, const std::string &text) { std::ofstream(path) << text; }

// FNV-1a.
uint64_t hash(const std::string &text, uint64_t from = 0xcbf29ce484222325ull) {
    for (unsigned char byte : text) from = (from ^ byte) * 0x100000001b3ull;
    return from;
}

int compile(Program *program, const std::string &architecture) {
    const char *cache = getenv("FAKE_CUDA_CACHE"), *shim = getenv("FAKE_CUDA_SHIM"), *flags = getenv("FAKE_CUDA_FLAGS");
    if (!cache || !shim || !flags) return program->log = "FAKE_CUDA_CACHE, _SHIM and _FLAGS are not set", COMPILATION;
    std::string folder = std::string(shim) + "/shim";
    uint64_t key = hash(flags, hash(read(folder + "/meet.h"), hash(read(folder + "/fibers.h"), hash(program->source))));
    for (auto &header : program->headers) key = hash(header.second, hash(header.first, key));
    char digits[17];
    snprintf(digits, sizeof digits, "%016lx", static_cast<unsigned long>(key));
    std::string built = std::string(cache) + "/" + digits + ".so";
    if (access(built.c_str(), R_OK)) {
        std::string place = std::string(cache) + "/" + digits + "." + std::to_string(getpid());
        mkdir(place.c_str(), 0700);
        for (auto &header : program->headers) write(place + "/" + header.first, header.second);
        // The headers given come first, and only the shim's own from the folder.
        write(place + "/" + program->name + ".cpp", program->source);
        std::string command = std::string("cd ") + place + " && ln -sfn " + folder + " shim && g++ " + flags +
                              " -shared -fPIC -fvisibility=hidden -I . -o built.so " + program->name + ".cpp > log 2>&1 && mv built.so " + built;
        int failed = system(command.c_str());
        program->log = read(place + "/log");
        if (system(("rm -rf " + place).c_str()) || failed) return COMPILATION;
    }
    program->image = "FAKECUBIN " + architecture + " " + built + "\n";
    return SUCCESS;
}

}  // namespace

FAKE int nvrtcVersion(int *major, int *minor) {
    *major = 13;
    *minor = 5;
    return SUCCESS;
}

FAKE int nvrtcCreateProgram(Program **out, const char *source, const char *name, int count, const char *const *headers, const char *const *names) {
    *out = new Program{name, source, "", "", {}};
    for (int i = 0; i < count; i++) (*out)->headers.push_back({names[i], headers[i]});
    return SUCCESS;
}

FAKE int nvrtcCompileProgram(Program *program, int count, const char *const *options) {
    for (int i = 0; i < count; i++)
        if (!strncmp(options[i], "--gpu-architecture=sm_", 22)) return compile(program, options[i] + 19);
    return program->log = "no architecture whose code could be loaded", INVALID_OPTION;
}

FAKE int nvrtcGetCUBINSize(Program *program, size_t *bytes) {
    *bytes = program->image.size() + 1;
    return SUCCESS;
}

FAKE int nvrtcGetCUBIN(Program *program, char *out) {
    strcpy(out, program->image.c_str());
    return SUCCESS;
}

FAKE int nvrtcGetProgramLogSize(Program *program, size_t *bytes) {
    *bytes = program->log.size() + 1;
    return SUCCESS;
}

FAKE int nvrtcGetProgramLog(Program *program, char *out) {
    strcpy(out, program->log.c_str());
    return SUCCESS;
}

FAKE int nvrtcDestroyProgram(Program **program) {
    delete *program;
    *program = nullptr;
    return SUCCESS;
}

FAKE const char *nvrtcGetErrorString(int code) {
    return code == SUCCESS ? "NVRTC_SUCCESS" : code == COMPILATION ? "NVRTC_ERROR_COMPILATION" : "NVRTC_ERROR_INVALID_OPTION";
}
