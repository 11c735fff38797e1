/* Streams: one thread each, which runs its work in order. */
#define _GNU_SOURCE
#include "stream.h"

#include <stdlib.h>
#include <string.h>

enum { STOP_ON_FAILURE = 1 };

struct stream {
    int device;
    bool has_thread, is_closing;
    uint64_t mode;  /* aclrtSetStreamFailureMode */
    aclError error; /* of the first work that failed; stays */
    uint64_t num_pending;
    struct fake_task *first, **last;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct stream *next;
};

static struct stream *streams;
static struct stream *defaults[MAX_DEVICES];
static pthread_mutex_t streams_lock = PTHREAD_MUTEX_INITIALIZER;

void fake_init_condition(pthread_cond_t *condition)
{
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(condition, &attributes);
}

static struct stream *new_stream(int device)
{
    struct stream *s = calloc(1, sizeof *s);
    s->device = device;
    s->last = &s->first;
    pthread_mutex_init(&s->lock, NULL);
    fake_init_condition(&s->changed);
    pthread_mutex_lock(&streams_lock);
    s->next = streams;
    streams = s;
    pthread_mutex_unlock(&streams_lock);
    return s;
}

static struct stream *default_stream(int device)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&lock);
    if (!defaults[device])
        defaults[device] = new_stream(device);
    pthread_mutex_unlock(&lock);
    return defaults[device];
}

static struct stream *stream_of(void *handle)
{
    int device = fake_current_device();
    return handle ? handle : device < 0 ? NULL : default_stream(device);
}

struct fake_task *fake_new_task(fake_work run, void *argument, void (*release)(void *))
{
    struct fake_task *task = malloc(sizeof *task);
    *task = (struct fake_task){run, argument, release, 1, false, NULL};
    return task;
}

void fake_drop_task(struct fake_task *task)
{
    if (__atomic_sub_fetch(&task->num_users, 1, __ATOMIC_ACQ_REL))
        return;
    if (task->release)
        task->release(task->argument);
    free(task);
}

static aclError run_task(struct stream *s, struct fake_task *task)
{
    int forced;
    if (task->is_marker) /* events are no work: they neither take time nor fail */
        return task->run(task->argument);
    if (s->error && s->mode == STOP_ON_FAILURE)
        return ACL_SUCCESS;
    fake_sleep(fake_env_number("FAKE_CANN_TASK_US", 50) * 1e-6);
    if ((forced = fake_failure("task")))
        return fake_error(forced, "work on a stream: failure asked for by FAKE_CANN_FAIL");
    return task->run(task->argument);
}

static _Thread_local struct stream *running;

static void *run_stream(void *handle)
{
    struct stream *s = running = handle;
    pthread_mutex_lock(&s->lock);
    for (;;) {
        while (!s->first && !s->is_closing)
            pthread_cond_wait(&s->changed, &s->lock);
        struct fake_task *task = s->first;
        if (!task)
            break;
        s->first = task->next;
        if (!s->first)
            s->last = &s->first;
        pthread_mutex_unlock(&s->lock);
        aclError error = run_task(s, task);
        fake_drop_task(task);
        pthread_mutex_lock(&s->lock);
        if (error && !s->error)
            s->error = error;
        s->num_pending--;
        pthread_cond_broadcast(&s->changed);
    }
    pthread_mutex_unlock(&s->lock);
    free(s);
    return NULL;
}

/* The queue owns the caller's use of the task from here on. */
static void put(struct stream *s, struct fake_task *task)
{
    pthread_mutex_lock(&s->lock);
    if (!s->has_thread) {
        pthread_t thread;
        s->has_thread = true;
        if (pthread_create(&thread, NULL, run_stream, s))
            fake_give_up("no thread for a stream");
        pthread_detach(thread);
    }
    task->next = NULL;
    *s->last = task;
    s->last = &task->next;
    s->num_pending++;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
}

aclError fake_submit(void *handle, struct fake_task *task)
{
    struct stream *s = stream_of(handle);
    aclError refused = s ? fake_capture_refuses_work(s) : RT_CONTEXT_NULL;
    if (refused) {
        fake_drop_task(task);
        return refused;
    }
    if (!fake_captured(s, task))
        put(s, task);
    return ACL_SUCCESS;
}

aclError fake_enqueue(void *stream, fake_work run, void *argument, void (*release)(void *))
{
    return fake_submit(stream, fake_new_task(run, argument, release));
}

void fake_replay(void *handle, struct fake_task **tasks, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        struct fake_task *copy = malloc(sizeof *copy); /* the task may be queued twice */
        __atomic_add_fetch(&tasks[i]->num_users, 1, __ATOMIC_ACQ_REL);
        *copy = (struct fake_task){fake_run_shared,     tasks[i], fake_drop_shared, 1,
                                   tasks[i]->is_marker, NULL};
        put(stream_of(handle), copy);
    }
}

aclError fake_run_shared(void *task)
{
    return ((struct fake_task *)task)->run(((struct fake_task *)task)->argument);
}

void fake_drop_shared(void *task)
{
    fake_drop_task(task);
}

aclError fake_error_before(void)
{
    return running ? running->error : ACL_SUCCESS;
}

void *fake_resolve_stream(void *handle)
{
    return stream_of(handle);
}

EXPORT aclError aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flag)
{
    int device = fake_current_device();
    (void)priority, (void)flag;
    if (device < 0)
        return fake_error(RT_CONTEXT_NULL, "aclrtCreateStream: the thread has set no device");
    *stream = new_stream(device);
    return ACL_SUCCESS;
}

EXPORT aclError aclrtCreateStream(void **stream)
{
    return aclrtCreateStreamWithConfig(stream, 0, 0);
}

struct timespec fake_deadline(int32_t timeout_ms)
{
    double end = fake_now() + (timeout_ms < 0 ? 1e8 : timeout_ms * 1e-3);
    time_t seconds = (time_t)end;
    return (struct timespec){seconds, (long)((end - (double)seconds) * 1e9)};
}

static aclError synchronize(struct stream *s, int32_t timeout_ms)
{
    struct timespec until = fake_deadline(timeout_ms);
    aclError error = ACL_SUCCESS;
    pthread_mutex_lock(&s->lock);
    while (s->num_pending && !error)
        if (pthread_cond_timedwait(&s->changed, &s->lock, &until))
            error = s->num_pending ? RT_STREAM_SYNC_TIMEOUT : ACL_SUCCESS;
    if (!error)
        error = s->error;
    pthread_mutex_unlock(&s->lock);
    return error;
}

/* A stream's thread frees it after its last work. */
EXPORT aclError aclrtDestroyStream(void *stream)
{
    struct stream *s = stream;
    if (!s)
        return RT_PARAM_INVALID;
    pthread_mutex_lock(&streams_lock);
    for (struct stream **at = &streams; *at; at = &(*at)->next)
        if (*at == s) {
            *at = s->next;
            break;
        }
    pthread_mutex_unlock(&streams_lock);
    pthread_mutex_lock(&s->lock);
    bool has_thread = s->has_thread;
    s->is_closing = true;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    if (!has_thread)
        free(s);
    return ACL_SUCCESS;
}

EXPORT aclError aclrtDestroyStreamForce(void *stream)
{
    return aclrtDestroyStream(stream);
}

EXPORT aclError aclrtSetStreamFailureMode(void *stream, uint64_t mode)
{
    struct stream *s = stream_of(stream);
    if (!s)
        return RT_CONTEXT_NULL;
    s->mode = mode;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtSynchronizeStreamWithTimeout(void *stream, int32_t timeout_ms)
{
    struct stream *s = stream_of(stream);
    aclError refused = s ? fake_capture_refuses_waiting("aclrtSynchronizeStream") : RT_CONTEXT_NULL;
    return refused ? refused : synchronize(s, timeout_ms);
}

EXPORT aclError aclrtSynchronizeStream(void *stream)
{
    return aclrtSynchronizeStreamWithTimeout(stream, -1);
}

EXPORT aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout_ms)
{
    struct stream *of_device[512];
    int count = 0, device = fake_current_device();
    aclError error = fake_capture_refuses_waiting("aclrtSynchronizeDevice");
    if (device < 0 || error)
        return error ? error : RT_CONTEXT_NULL;
    pthread_mutex_lock(&streams_lock);
    for (struct stream *s = streams; s && count < 512; s = s->next)
        if (s->device == device)
            of_device[count++] = s;
    pthread_mutex_unlock(&streams_lock);
    for (int i = 0; i < count; i++) {
        aclError of_stream = synchronize(of_device[i], timeout_ms);
        error = error ? error : of_stream;
    }
    return error;
}

EXPORT aclError aclrtSynchronizeDevice(void)
{
    return aclrtSynchronizeDeviceWithTimeout(-1);
}

/* "Abort unexecuted tasks and pause executing tasks": what runs here ends, and nothing follows. */
EXPORT aclError aclrtStreamAbort(void *stream)
{
    struct stream *s = stream_of(stream);
    if (!s)
        return RT_CONTEXT_NULL;
    int forced = fake_failure("aclrtStreamAbort");
    if (forced)
        return fake_error(forced, "aclrtStreamAbort: failure asked for by FAKE_CANN_FAIL");
    pthread_mutex_lock(&s->lock);
    struct fake_task *task = s->first;
    s->first = NULL;
    s->last = &s->first;
    for (struct fake_task *t = task; t; t = t->next)
        s->num_pending--;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    while (task) {
        struct fake_task *next = task->next;
        fake_drop_task(task);
        task = next;
    }
    return ACL_SUCCESS;
}

/* aclrtStreamStatus: 0 complete, 1 not ready. */
EXPORT aclError aclrtStreamQuery(void *stream, int *status)
{
    struct stream *s = stream_of(stream);
    if (!s)
        return RT_CONTEXT_NULL;
    pthread_mutex_lock(&s->lock);
    *status = s->num_pending ? 1 : 0;
    aclError error = s->error;
    pthread_mutex_unlock(&s->lock);
    return error;
}

struct host_call {
    void (*function)(void *);
    void *argument;
};

static aclError run_host_call(void *argument)
{
    struct host_call *call = argument;
    call->function(call->argument);
    return ACL_SUCCESS;
}

/* A function of the host, in its turn on the stream. */
EXPORT aclError aclrtLaunchHostFunc(void *stream, void (*function)(void *), void *argument)
{
    struct host_call *call = malloc(sizeof *call);
    *call = (struct host_call){function, argument};
    return fake_enqueue(stream, run_host_call, call, free);
}
