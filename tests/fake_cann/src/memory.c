/* Device memory: host memory of this process, known by its ranges and filled with poison. */
#define _GNU_SOURCE
#include "internal.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define POISON 0xA5
#define ALIGNMENT 512
#define TWO_MIB ((size_t)2 << 20)

struct range {
    char *start;
    size_t length;
    int device;
    bool reserved; /* by aclrtReserveMemAddress: an address range, its memory comes later */
    struct range *next;
};
static struct range *ranges;
static size_t taken[MAX_DEVICES];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static size_t total_memory(void)
{
    return (size_t)fake_env_number("FAKE_CANN_MEMORY_MB", 64 * 1024) << 20;
}

static bool take(int device, size_t length)
{
    if (taken[device] + length > total_memory())
        return false;
    taken[device] += length;
    return true;
}

bool fake_take_memory(int device, size_t length)
{
    pthread_mutex_lock(&lock);
    bool ok = take(device, length);
    pthread_mutex_unlock(&lock);
    return ok;
}

void fake_give_memory(int device, size_t length)
{
    pthread_mutex_lock(&lock);
    taken[device] -= length;
    pthread_mutex_unlock(&lock);
}

bool fake_is_device_memory(const void *start, size_t length)
{
    const char *at = start;
    bool found = false;
    pthread_mutex_lock(&lock);
    for (struct range *r = ranges; r && !found; r = r->next)
        found = at >= r->start && at + length <= r->start + r->length;
    pthread_mutex_unlock(&lock);
    return found;
}

static void add_range(char *start, size_t length, int device, bool reserved)
{
    struct range *r = malloc(sizeof *r);
    *r = (struct range){start, length, device, reserved, ranges};
    ranges = r;
}

/* Returns the range that starts here, taken out of the list, or NULL. */
static struct range *remove_range(const void *start)
{
    for (struct range **at = &ranges; *at; at = &(*at)->next)
        if ((*at)->start == start) {
            struct range *found = *at;
            *at = found->next;
            return found;
        }
    return NULL;
}

EXPORT aclError aclrtMalloc(void **address, size_t size, int policy)
{
    int device = fake_current_device(), forced = fake_failure("aclrtMalloc");
    (void)policy;
    if (forced)
        return fake_error(forced, "aclrtMalloc: failure asked for by FAKE_CANN_FAIL");
    if (device < 0)
        return fake_error(RT_CONTEXT_NULL, "aclrtMalloc: the thread has set no device");
    if (!address || !size)
        return fake_error(RT_PARAM_INVALID, "aclrtMalloc: %zu bytes", size);
    aclError refused = fake_capture_refuses_allocation("aclrtMalloc");
    if (refused)
        return refused;
    pthread_mutex_lock(&lock);
    char *start = take(device, size)
                      ? aligned_alloc(ALIGNMENT, (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT)
                      : NULL;
    if (start) {
        memset(start, POISON, size);
        add_range(start, size, device, false);
    }
    pthread_mutex_unlock(&lock);
    *address = start;
    return start ? ACL_SUCCESS
                 : fake_error(RT_OUT_OF_MEMORY, "aclrtMalloc: no %zu bytes left", size);
}

EXPORT aclError aclrtMallocAlign32(void **address, size_t size, int policy)
{
    return aclrtMalloc(address, size, policy);
}

EXPORT aclError aclrtFree(void *address)
{
    pthread_mutex_lock(&lock);
    struct range *r = remove_range(address);
    if (r)
        taken[r->device] -= r->length;
    pthread_mutex_unlock(&lock);
    if (!r)
        return fake_error(RT_PARAM_INVALID, "aclrtFree: %p is no device memory", address);
    memset(r->start, ~POISON, r->length);
    free(r->start);
    free(r);
    return ACL_SUCCESS;
}

EXPORT aclError aclrtMallocHost(void **address, size_t size)
{
    int forced = fake_failure("aclrtMallocHost");
    if (forced)
        return fake_error(forced, "aclrtMallocHost: failure asked for by FAKE_CANN_FAIL");
    return posix_memalign(address, 4096, size) ? RT_OUT_OF_MEMORY : ACL_SUCCESS;
}

EXPORT aclError aclrtFreeHost(void *address)
{
    free(address);
    return ACL_SUCCESS;
}

EXPORT aclError aclrtGetMemInfo(int which, size_t *available, size_t *total)
{
    int device = fake_current_device();
    (void)which;
    if (device < 0)
        return RT_CONTEXT_NULL;
    pthread_mutex_lock(&lock);
    *total = total_memory();
    *available = *total - taken[device];
    pthread_mutex_unlock(&lock);
    return ACL_SUCCESS;
}

/* Virtual memory (expandable segments): a reserved range is mapped piece by piece. */
EXPORT aclError aclrtReserveMemAddress(void **address, size_t size, size_t alignment,
                                       void *expected, uint64_t flags)
{
    (void)alignment, (void)expected, (void)flags;
    char *start =
        mmap(NULL, size + TWO_MIB, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED)
        return RT_OUT_OF_MEMORY;
    *address = (void *)(((uintptr_t)start + TWO_MIB - 1) / TWO_MIB * TWO_MIB);
    pthread_mutex_lock(&lock);
    add_range(*address, size, fake_current_device(), true);
    pthread_mutex_unlock(&lock);
    return ACL_SUCCESS;
}

EXPORT aclError aclrtReleaseMemAddress(void *address)
{
    pthread_mutex_lock(&lock);
    struct range *r = remove_range(address);
    pthread_mutex_unlock(&lock);
    if (!r)
        return RT_PARAM_INVALID;
    munmap(r->start, r->length);
    free(r);
    return ACL_SUCCESS;
}

struct physical {
    int device;
    size_t size;
};

EXPORT aclError aclrtMallocPhysical(void **handle, size_t size, const void *properties,
                                    uint64_t flags)
{
    struct physical *p = malloc(sizeof *p);
    (void)properties, (void)flags;
    *p = (struct physical){fake_current_device(), size};
    aclError refused = fake_capture_refuses_allocation("aclrtMallocPhysical");
    if (refused || !fake_take_memory(p->device, size)) {
        free(p);
        return refused ? refused : RT_OUT_OF_MEMORY;
    }
    *handle = p;
    return ACL_SUCCESS;
}

EXPORT aclError aclrtFreePhysical(void *handle)
{
    struct physical *p = handle;
    fake_give_memory(p->device, p->size);
    free(p);
    return ACL_SUCCESS;
}

EXPORT aclError aclrtMapMem(void *address, size_t size, size_t offset, void *handle, uint64_t flags)
{
    (void)offset, (void)handle, (void)flags;
    if (mprotect(address, size, PROT_READ | PROT_WRITE))
        return RT_PARAM_INVALID;
    memset(address, POISON, size);
    return ACL_SUCCESS;
}

EXPORT aclError aclrtUnmapMem(void *address)
{
    (void)address; /* the range stays readable until it is released */
    return ACL_SUCCESS;
}

static bool is_well_formed(void *target, size_t room, const void *source, size_t count, int kind)
{
    /* aclrtMemcpyKind: 0 h2h, 1 h2d, 2 d2h, 3 d2d; what is on the device must be its memory. */
    bool to_device = kind == 1 || kind == 3, from_device = kind == 2 || kind == 3;
    return count <= room && target && source &&
           (!to_device || fake_is_device_memory(target, count)) &&
           (!from_device || fake_is_device_memory(source, count));
}

EXPORT aclError aclrtMemcpy(void *target, size_t room, const void *source, size_t count, int kind)
{
    int forced = fake_failure("aclrtMemcpy");
    if (forced)
        return fake_error(forced, "aclrtMemcpy: failure asked for by FAKE_CANN_FAIL");
    aclError refused = fake_capture_refuses_waiting("aclrtMemcpy");
    if (refused)
        return refused;
    if (count && !is_well_formed(target, room, source, count, kind))
        return fake_error(RT_PARAM_INVALID, "aclrtMemcpy: kind %d, %zu bytes from %p to %p", kind,
                          count, source, target);
    memcpy(target, source, count);
    return ACL_SUCCESS;
}

EXPORT aclError aclrtMemset(void *target, size_t room, int32_t value, size_t count)
{
    if (count > room)
        return RT_PARAM_INVALID;
    aclError refused = fake_capture_refuses_waiting("aclrtMemset");
    if (!refused)
        memset(target, value, count);
    return refused;
}

struct copy {
    void *target;
    const void *source;
    size_t count;
    int value;
};

static aclError run_copy(void *argument)
{
    struct copy *c = argument;
    if (c->source)
        memmove(c->target, c->source, c->count);
    else
        memset(c->target, c->value, c->count);
    return ACL_SUCCESS;
}

static aclError enqueue_copy(void *stream, struct copy content)
{
    struct copy *c = malloc(sizeof *c);
    *c = content;
    return fake_enqueue(stream, run_copy, c, free);
}

EXPORT aclError aclrtMemcpyAsync(void *target, size_t room, const void *source, size_t count,
                                 int kind, void *stream)
{
    int forced = fake_failure("aclrtMemcpyAsync");
    if (forced)
        return fake_error(forced, "aclrtMemcpyAsync: failure asked for by FAKE_CANN_FAIL");
    if (!count)
        return ACL_SUCCESS;
    if (!is_well_formed(target, room, source, count, kind))
        return fake_error(RT_PARAM_INVALID, "aclrtMemcpyAsync: kind %d, %zu bytes from %p to %p",
                          kind, count, source, target);
    return enqueue_copy(stream, (struct copy){target, source, count, 0});
}

EXPORT aclError aclrtMemsetAsync(void *target, size_t room, int32_t value, size_t count,
                                 void *stream)
{
    if (count > room || !fake_is_device_memory(target, count))
        return RT_PARAM_INVALID;
    return enqueue_copy(stream, (struct copy){target, NULL, count, value});
}
