/*
 * Graph capture in the mode "global", torch_npu's default: what is submitted to the captured
 * stream is kept for replays, and everything else on the device is refused with 107030 until
 * the capture ends (notes section 0.4).
 */
#define _GNU_SOURCE
#include "stream.h"

#include <pthread.h>
#include <stdlib.h>

enum { GLOBAL = 0, RELAXED = 2 };
#define MAX_JOINED 32

struct graph {
    struct fake_task **tasks;
    size_t count;
};

static struct {
    bool is_active;
    int mode;
    pthread_t owner;
    void *streams[MAX_JOINED];
    int num_streams;
    struct graph *graph;
} capture;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local int thread_mode = GLOBAL;

static bool is_captured(const void *stream)
{
    for (int i = 0; i < capture.num_streams; i++)
        if (capture.streams[i] == stream)
            return true;
    return false;
}

static bool is_forbidding(void)
{
    return capture.is_active && capture.mode == GLOBAL && thread_mode != RELAXED;
}

static aclError refuse(const char *what)
{
    return fake_error(RT_CAPTURE_REFUSED,
                      "%s: a graph is being captured, and current capture mode does not support "
                      "this operation",
                      what);
}

aclError fake_capture_refuses_work(void *stream)
{
    pthread_mutex_lock(&lock);
    bool is_refused = is_forbidding() && !is_captured(stream);
    pthread_mutex_unlock(&lock);
    return is_refused ? refuse("work on a stream that is not captured") : ACL_SUCCESS;
}

aclError fake_capture_refuses_waiting(const char *what)
{
    pthread_mutex_lock(&lock);
    bool is_refused = is_forbidding();
    pthread_mutex_unlock(&lock);
    return is_refused ? refuse(what) : ACL_SUCCESS;
}

aclError fake_capture_refuses_allocation(const char *what)
{
    pthread_mutex_lock(&lock);
    bool is_refused = is_forbidding() && !pthread_equal(capture.owner, pthread_self());
    pthread_mutex_unlock(&lock);
    return is_refused ? refuse(what) : ACL_SUCCESS;
}

bool fake_is_captured(void *stream)
{
    pthread_mutex_lock(&lock);
    bool found = capture.is_active && is_captured(stream);
    pthread_mutex_unlock(&lock);
    return found;
}

void fake_capture_join(void *stream)
{
    pthread_mutex_lock(&lock);
    if (capture.is_active && !is_captured(stream) && capture.num_streams < MAX_JOINED)
        capture.streams[capture.num_streams++] = stream;
    pthread_mutex_unlock(&lock);
}

bool fake_captured(void *stream, struct fake_task *task)
{
    pthread_mutex_lock(&lock);
    bool is_kept = capture.is_active && is_captured(stream);
    if (is_kept && !task->is_marker) { /* the order of the graph is that of submission */
        struct graph *g = capture.graph;
        g->tasks = realloc(g->tasks, (g->count + 1) * sizeof *g->tasks);
        g->tasks[g->count++] = task;
    }
    pthread_mutex_unlock(&lock);
    if (is_kept && task->is_marker)
        fake_drop_task(task);
    return is_kept;
}

EXPORT aclError aclmdlRICaptureBegin(void *stream, int mode)
{
    aclError error = RT_CAPTURE_REFUSED;
    pthread_mutex_lock(&lock);
    if (!capture.is_active) {
        capture.is_active = true;
        capture.mode = mode;
        capture.owner = pthread_self();
        capture.num_streams = 1;
        capture.streams[0] = stream;
        capture.graph = calloc(1, sizeof *capture.graph);
        error = stream ? ACL_SUCCESS : RT_PARAM_INVALID;
    }
    pthread_mutex_unlock(&lock);
    return error;
}

EXPORT aclError aclmdlRICaptureEnd(void *stream, void **graph)
{
    pthread_mutex_lock(&lock);
    bool is_mine = capture.is_active && capture.streams[0] == stream;
    if (is_mine) {
        *graph = capture.graph;
        capture.is_active = false;
    }
    pthread_mutex_unlock(&lock);
    return is_mine ? ACL_SUCCESS : RT_STREAM_NOT_CAPTURED;
}

/* aclmdlRICaptureStatus: 0 none, 1 active. */
EXPORT aclError aclmdlRICaptureGetInfo(void *stream, int *status, void **graph)
{
    *status = fake_is_captured(fake_resolve_stream(stream));
    *graph = *status ? capture.graph : NULL;
    return ACL_SUCCESS;
}

EXPORT aclError aclmdlRICaptureThreadExchangeMode(int *mode)
{
    int before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return ACL_SUCCESS;
}

EXPORT aclError aclmdlRIExecuteAsync(void *graph, void *stream)
{
    struct graph *g = graph;
    void *target = fake_resolve_stream(stream);
    aclError refused = fake_capture_refuses_work(target);
    if (!refused)
        fake_replay(target, g->tasks, g->count);
    return refused;
}

EXPORT aclError aclmdlRIDestroy(void *graph)
{
    struct graph *g = graph;
    for (size_t i = 0; i < g->count; i++)
        fake_drop_task(g->tasks[i]);
    free(g->tasks);
    free(g);
    return ACL_SUCCESS;
}
