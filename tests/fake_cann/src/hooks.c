/* What tests steer by environment variables, errors, and time. See README.md. */
#define _GNU_SOURCE
#include "internal.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/*
 * Hooks of the double are read from the environment once and are set with fakeSet from then on:
 * streams read them all the time, and getenv beside setenv is not safe. CANN's own variables
 * are read when CANN would.
 */
#define MAX_HOOKS 32
static struct {
    const char *name;
    char *text;
} hooks[MAX_HOOKS];
static int num_hooks;
static pthread_mutex_t hooks_lock = PTHREAD_MUTEX_INITIALIZER;

/* Texts are never freed: somebody may still read one. */
static char **hook(const char *name)
{
    for (int i = 0; i < num_hooks; i++)
        if (!strcmp(hooks[i].name, name))
            return &hooks[i].text;
    if (num_hooks == MAX_HOOKS)
        fake_give_up("more hooks than there are");
    const char *text = getenv(name);
    hooks[num_hooks].name = strdup(name);
    hooks[num_hooks].text = text ? strdup(text) : NULL;
    return &hooks[num_hooks++].text;
}

EXPORT void fakeSet(const char *name, const char *text)
{
    pthread_mutex_lock(&hooks_lock);
    *hook(name) = text ? strdup(text) : NULL;
    pthread_mutex_unlock(&hooks_lock);
}

static const char *lookup(const char *name)
{
    if (strncmp(name, "FAKE_", 5))
        return getenv(name);
    pthread_mutex_lock(&hooks_lock);
    const char *text = *hook(name);
    pthread_mutex_unlock(&hooks_lock);
    return text;
}

double fake_env_number(const char *name, double otherwise)
{
    const char *text = lookup(name);
    return text && *text ? strtod(text, NULL) : otherwise;
}

const char *fake_env_text(const char *name, const char *otherwise)
{
    const char *text = lookup(name);
    return text && *text ? text : otherwise;
}

double fake_scaled(double seconds)
{
    return seconds * fake_env_number("FAKE_CANN_TIME_SCALE", 1.0);
}

double fake_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

void fake_sleep_until(double instant)
{
    struct timespec until = {(time_t)instant, (long)((instant - (double)(time_t)instant) * 1e9)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR) {
    }
}

void fake_sleep(double seconds)
{
    if (seconds > 0)
        fake_sleep_until(fake_now() + seconds);
}

/* FAKE_CANN_FAIL is a list NAME:CALL:CODE,... where CALL counts from 1, since it was set. */
#define MAX_FAILURES 16
static struct {
    char name[64];
    long call, code, seen;
} failures[MAX_FAILURES];
static int num_failures;
static const char *failures_text;
static pthread_mutex_t failures_lock = PTHREAD_MUTEX_INITIALIZER;

static void read_failures(const char *text)
{
    num_failures = 0;
    failures_text = text;
    for (const char *at = text; at && *at && num_failures < MAX_FAILURES;) {
        if (sscanf(at, "%63[^:]:%ld:%ld", failures[num_failures].name, &failures[num_failures].call,
                   &failures[num_failures].code) != 3)
            fake_give_up("FAKE_CANN_FAIL: expected NAME:CALL:CODE, found '%s'", at);
        failures[num_failures++].seen = 0;
        at = strchr(at, ',');
        at = at ? at + 1 : NULL;
    }
}

int fake_failure(const char *name)
{
    int code = 0;
    const char *text = fake_env_text("FAKE_CANN_FAIL", "");
    pthread_mutex_lock(&failures_lock);
    if (text != failures_text)
        read_failures(text);
    for (int i = 0; i < num_failures; i++)
        if (!strcmp(failures[i].name, name) && ++failures[i].seen == failures[i].call)
            code = (int)failures[i].code;
    pthread_mutex_unlock(&failures_lock);
    return code;
}

static _Thread_local char recent_error[512];
static _Thread_local char given_error[512];

static void print_line(const char *label, const char *text)
{
    char line[700];
    int length = snprintf(line, sizeof line, "fake CANN[%d]: %s%s\n", getpid(), label, text);
    if (write(STDERR_FILENO, line, (size_t)length) < 0)
        return;
}

int fake_error(int code, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(recent_error, sizeof recent_error, format, arguments);
    va_end(arguments);
    print_line("", recent_error);
    return code;
}

static _Noreturn void die(const char *label, const char *format, va_list arguments)
{
    char text[512];
    vsnprintf(text, sizeof text, format, arguments);
    print_line(label, text);
    abort();
}

void fake_rule_broken(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    die("RULE BROKEN: ", format, arguments);
}

void fake_give_up(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    die("", format, arguments);
}

/* As in CANN, reading the message clears it. */
EXPORT const char *aclGetRecentErrMsg(void)
{
    strcpy(given_error, recent_error);
    recent_error[0] = 0;
    return given_error;
}
