/* Events: points in the order of a stream. Each record of an event has a number. */
#define _GNU_SOURCE
#include "stream.h"

#include <stdlib.h>

struct event {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint64_t recorded, completed;
    double at;
    aclError error;
    bool is_captured;
    int num_users;
};

EXPORT aclError aclrtCreateEventExWithFlag(void **event, uint32_t flag)
{
    struct event *e = calloc(1, sizeof *e);
    (void)flag;
    e->num_users = 1;
    pthread_mutex_init(&e->lock, NULL);
    fake_init_condition(&e->changed);
    *event = e;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtCreateEventWithFlag(void **event, uint32_t flag)
{
    return aclrtCreateEventExWithFlag(event, flag);
}

EXPORT aclError aclrtCreateEvent(void **event)
{
    return aclrtCreateEventExWithFlag(event, 0);
}

static void drop_event(struct event *e)
{
    if (!__atomic_sub_fetch(&e->num_users, 1, __ATOMIC_ACQ_REL))
        free(e);
}

EXPORT aclError aclrtDestroyEvent(void *event)
{
    if (!event)
        return RT_PARAM_INVALID;
    drop_event(event);
    return ACL_SUCCESS;
}

struct point {
    struct event *event;
    uint64_t number;
};

static void drop_point(void *argument)
{
    drop_event(((struct point *)argument)->event);
    free(argument);
}

static struct point *new_point(struct event *e, uint64_t number)
{
    struct point *p = malloc(sizeof *p);
    *p = (struct point){e, number};
    __atomic_add_fetch(&e->num_users, 1, __ATOMIC_ACQ_REL);
    return p;
}

static aclError run_record(void *argument)
{
    struct point *p = argument;
    pthread_mutex_lock(&p->event->lock);
    if (p->number > p->event->completed)
        p->event->completed = p->number;
    p->event->at = fake_now();
    p->event->error = fake_error_before();
    pthread_cond_broadcast(&p->event->changed);
    pthread_mutex_unlock(&p->event->lock);
    return ACL_SUCCESS;
}

static aclError run_wait(void *argument)
{
    struct point *p = argument;
    pthread_mutex_lock(&p->event->lock);
    while (p->event->completed < p->number)
        pthread_cond_wait(&p->event->changed, &p->event->lock);
    pthread_mutex_unlock(&p->event->lock);
    return ACL_SUCCESS;
}

static aclError submit_marker(void *stream, fake_work run, struct point *point)
{
    struct fake_task *task = fake_new_task(run, point, drop_point);
    task->is_marker = true;
    return fake_submit(stream, task);
}

EXPORT aclError aclrtRecordEvent(void *event, void *stream)
{
    struct event *e = event;
    if (!e)
        return RT_PARAM_INVALID;
    pthread_mutex_lock(&e->lock);
    e->is_captured = fake_is_captured(fake_resolve_stream(stream));
    uint64_t number = e->is_captured ? e->recorded : ++e->recorded;
    pthread_mutex_unlock(&e->lock);
    return submit_marker(stream, run_record, new_point(e, number));
}

EXPORT aclError aclrtStreamWaitEvent(void *stream, void *event)
{
    struct event *e = event;
    if (!e)
        return RT_PARAM_INVALID;
    pthread_mutex_lock(&e->lock);
    uint64_t number = e->recorded;
    bool is_captured = e->is_captured;
    pthread_mutex_unlock(&e->lock);
    if (is_captured)
        fake_capture_join(fake_resolve_stream(stream));
    return submit_marker(stream, run_wait, new_point(e, number));
}

/* Records are numbered, so an event needs no reset before it is recorded again. */
EXPORT aclError aclrtResetEvent(void *event, void *stream)
{
    (void)stream;
    return event ? ACL_SUCCESS : RT_PARAM_INVALID;
}

/*
 * The status is 1 when complete, as in aclrtEventRecordedStatus. What CANN answers behind work
 * that failed is not documented: by default the event just completes, and only the stream tells;
 * with FAKE_CANN_FAILED_EVENT=error the query fails.
 */
EXPORT aclError aclrtQueryEventStatus(void *event, int *status)
{
    struct event *e = event;
    if (!e)
        return RT_PARAM_INVALID;
    pthread_mutex_lock(&e->lock);
    *status = e->recorded && e->completed >= e->recorded;
    aclError error = *status ? e->error : ACL_SUCCESS;
    pthread_mutex_unlock(&e->lock);
    return fake_env_text("FAKE_CANN_FAILED_EVENT", "complete")[0] == 'e' ? error : ACL_SUCCESS;
}

EXPORT aclError aclrtQueryEventWaitStatus(void *event, int *status)
{
    aclError error = aclrtQueryEventStatus(event, status);
    *status = !*status; /* aclrtEventWaitStatus: 0 complete, 1 not ready */
    return error;
}

EXPORT aclError aclrtSynchronizeEventWithTimeout(void *event, int32_t timeout_ms)
{
    struct event *e = event;
    struct timespec until = fake_deadline(timeout_ms);
    aclError error = e ? fake_capture_refuses_waiting("aclrtSynchronizeEvent") : RT_PARAM_INVALID;
    if (error)
        return error;
    pthread_mutex_lock(&e->lock);
    while (e->completed < e->recorded && !error)
        if (pthread_cond_timedwait(&e->changed, &e->lock, &until))
            error = e->completed < e->recorded ? RT_EVENT_SYNC_TIMEOUT : ACL_SUCCESS;
    if (!error)
        error = e->error;
    pthread_mutex_unlock(&e->lock);
    return error;
}

EXPORT aclError aclrtSynchronizeEvent(void *event)
{
    return aclrtSynchronizeEventWithTimeout(event, -1);
}

EXPORT aclError aclrtEventElapsedTime(float *ms, void *start, void *end)
{
    struct event *a = start, *b = end;
    if (!a || !b || !a->completed || !b->completed)
        return RT_PARAM_INVALID;
    *ms = (float)((b->at - a->at) * 1e3);
    return ACL_SUCCESS;
}
