/* Work on streams, for those who keep it: the queue and captured graphs. */
#ifndef FAKE_CANN_STREAM_H
#define FAKE_CANN_STREAM_H

#include "internal.h"

#include <pthread.h>
#include <time.h>

struct fake_task {
    fake_work run;
    void *argument;
    void (*release)(void *);
    int num_users;
    bool is_marker; /* records or awaits an event */
    struct fake_task *next;
};

struct fake_task *fake_new_task(fake_work run, void *argument, void (*release)(void *));
void fake_drop_task(struct fake_task *task);
aclError fake_run_shared(void *task);
void fake_drop_shared(void *task);
/* Takes the task over, for the queue or for a graph, or drops it. */
aclError fake_submit(void *stream, struct fake_task *task);
/* Queue tasks that a graph keeps. */
void fake_replay(void *stream, struct fake_task **tasks, size_t count);
/* The stream itself, or the thread's default one for NULL. */
void *fake_resolve_stream(void *stream);

/* A condition on the clock of fake_deadline, which is never for a negative timeout. */
void fake_init_condition(pthread_cond_t *condition);
struct timespec fake_deadline(int32_t timeout_ms);

/* capture.c */
aclError fake_capture_refuses_work(void *stream);
bool fake_is_captured(void *stream);
/* A stream that waits for captured work is captured, too. */
void fake_capture_join(void *stream);
/* Whether the task now belongs to a graph, or was dropped for one, instead of the queue. */
bool fake_captured(void *stream, struct fake_task *task);

#endif
