/* What the libraries of the double share with each other. None of it is CANN's. */
#ifndef FAKE_CANN_INTERNAL_H
#define FAKE_CANN_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))
#define MAX_DEVICES 16

typedef int aclError;

/* Names and numbers as in torch_npu's copy of acl/error_codes/rt_error_codes.h. */
enum {
    ACL_SUCCESS = 0,
    RT_PARAM_INVALID = 107000,
    RT_INVALID_DEVICE = 107001,
    RT_CONTEXT_NULL = 107002,
    RT_STREAM_NOT_CAPTURED = 107029,
    RT_CAPTURE_REFUSED = 107030,
    RT_NOT_SUPPORTED = 207000,
    RT_OUT_OF_MEMORY = 207001,
    RT_STREAM_SYNC_TIMEOUT = 507046,
    RT_EVENT_SYNC_TIMEOUT = 507047,
    RT_NOTIFY_TIMEOUT = 507048,
    RT_COPY_FAILED = 507052,
};

#pragma GCC visibility push(default) /* libhccl and libopapi call these in libascendcl */

/* hooks.c */
double fake_env_number(const char *name, double otherwise);
const char *fake_env_text(const char *name, const char *otherwise);
/* Seconds of the double for so many seconds of CANN: FAKE_CANN_TIME_SCALE. */
double fake_scaled(double seconds);
double fake_now(void);
void fake_sleep(double seconds);
void fake_sleep_until(double instant);
/* The code which FAKE_CANN_FAIL asks for at this call of this name, else 0. */
int fake_failure(const char *name);
/* Note a line for aclGetRecentErrMsg and print it; returns `code`. */
int fake_error(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* A rule was broken that real CANN would not report: say so and abort. */
void fake_rule_broken(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));
/* The double itself cannot go on: say so and abort. */
void fake_give_up(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

/* device.c */
/* The device of the calling thread, or -1 before aclrtSetDevice. */
int fake_current_device(void);
/* The number of a visible device on the machine. */
int fake_physical_device(int device);
int fake_device_count(void);

/* memory.c */
bool fake_is_device_memory(const void *start, size_t length);
/* Account for device memory that a library takes for itself. */
bool fake_take_memory(int device, size_t length);
void fake_give_memory(int device, size_t length);

/* stream.c */
typedef aclError (*fake_work)(void *argument);
/*
 * Put work at the end of a stream (NULL: the default one of the thread's device).
 * `argument` is freed with `release` when nothing can run the work any more.
 */
aclError fake_enqueue(void *stream, fake_work run, void *argument, void (*release)(void *));
/* Asked from work: the error of work before it on its stream, or 0. */
aclError fake_error_before(void);

/* capture.c: RT_CAPTURE_REFUSED for what must not be done while a graph is captured, else 0. */
aclError fake_capture_refuses_waiting(const char *what);
aclError fake_capture_refuses_allocation(const char *what);

#pragma GCC visibility pop

#endif
