// What the fake libraries share.
#pragma once

#define FAKE extern "C" __attribute__((visibility("default")))
// An image of kernels: what it is for (sm_90a), and the path of a shared object.
#define FAKE_IMAGE "FAKECUBIN sm_%15s %1023s"
