// What the fake libraries share.
#pragma once

#define FAKE extern "C" __attribute__((visibility("default")))
// An image of kernels: the path of a shared object.
#define FAKE_IMAGE "FAKECUBIN %1023s"
