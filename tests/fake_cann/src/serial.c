/*
 * The rule of serial issue: operators of all communicators of a device are issued one after the
 * other, and so are its communicators created (notes section 0.1). Broken: the process ends.
 */
#define _GNU_SOURCE
#include "hccl.h"

#include <unistd.h>

struct holder {
    const char *what;
    int thread;
};
static struct holder holders[NUM_ACTIVITIES][MAX_DEVICES];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void enter_serial(enum activity activity, int device, const char *what)
{
    struct holder *holder = &holders[activity][device];
    pthread_mutex_lock(&lock);
    if (holder->what)
        fake_rule_broken("serial issue on device %d: %s in thread %d while thread %d is in %s",
                         device, what, gettid(), holder->thread, holder->what);
    *holder = (struct holder){what, gettid()};
    pthread_mutex_unlock(&lock);
    fake_sleep(fake_env_number("FAKE_CANN_ISSUE_US", 100) * 1e-6); /* so that overlaps are met */
}

void leave_serial(enum activity activity, int device)
{
    pthread_mutex_lock(&lock);
    holders[activity][device].what = NULL;
    pthread_mutex_unlock(&lock);
}
