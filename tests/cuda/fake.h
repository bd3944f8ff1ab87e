// What the fake libraries share.
#pragma once

#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#define FAKE extern "C" __attribute__((visibility("default")))
// An image of kernels: what it is for (sm_90a), and the path of a shared object.
#define FAKE_IMAGE "FAKECUBIN sm_%15s %1023s"

// Whether no failure was the first yet: it makes the file that the variable names. Without one, each is.
static inline bool first(const char *variable) {
    const char *path = getenv(variable);
    int file = path ? open(path, O_CREAT | O_EXCL | O_CLOEXEC, 0600) : -1;
    if (file >= 0) close(file);
    return !path || file >= 0;
}
