/* The functions of libhccl: checks, the rule of serial issue, and the order of operations. */
#define _GNU_SOURCE
#include "hccl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define COMM_MAGIC 0x636f6d6d756e6963ULL

/*
 * Facts section 0.1: operators of all communicators of a device are issued serially, and
 * communicators of a device are created serially. Broken: the process ends at once.
 */
struct guard {
    const char *holder;
    int thread;
};
static struct guard issuing[MAX_DEVICES], creating[MAX_DEVICES];
static pthread_mutex_t guards_lock = PTHREAD_MUTEX_INITIALIZER;

static void enter(struct guard *guard, const char *what, int device)
{
    pthread_mutex_lock(&guards_lock);
    if (guard->holder)
        fake_rule_broken("serial issue on device %d: %s in thread %d while thread %d is in %s",
                         device, what, gettid(), guard->thread, guard->holder);
    *guard = (struct guard){what, gettid()};
    pthread_mutex_unlock(&guards_lock);
    fake_sleep(fake_env_number("FAKE_CANN_ISSUE_US", 100) * 1e-6); /* widens the window */
}

static void leave(struct guard *guard)
{
    pthread_mutex_lock(&guards_lock);
    guard->holder = NULL;
    pthread_mutex_unlock(&guards_lock);
}

static bool is_comm(const struct comm *comm)
{
    return comm && comm->magic == COMM_MAGIC;
}

EXPORT HcclResult HcclGetRootInfo(void *root_info)
{
    HcclResult forced = fake_failure("HcclGetRootInfo");
    if (forced)
        return fake_error(forced, "HcclGetRootInfo: failure asked for by FAKE_CANN_FAIL");
    if (!root_info)
        return HCCL_E_PTR;
    if (fake_current_device() < 0)
        return fake_error(HCCL_E_RUNTIME, "HcclGetRootInfo: the thread has set no device");
    return open_root(root_info);
}

static struct comm *new_comm(uint32_t num_ranks, uint32_t rank, struct settings settings)
{
    struct comm *comm = calloc(1, sizeof *comm);
    comm->num_ranks = num_ranks;
    comm->rank = rank;
    comm->settings = settings;
    comm->device = fake_current_device();
    comm->cancel = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    for (uint32_t peer = 0; peer < MAX_RANKS; peer++)
        comm->links[peer] = (struct link){-1, -1, false, false};
    pthread_mutex_init(&comm->lock, NULL);
    pthread_cond_init(&comm->changed, NULL);
    return comm;
}

/* The structure itself stays, so that a handle used too late is found out. */
static void close_comm(struct comm *comm)
{
    comm->magic = 0;
    drop_links(comm);
    close(comm->listener);
    close(comm->cancel);
    if (comm->has_buffers)
        fake_give_memory(comm->device, (size_t)2 * comm->settings.buffer_mb << 20);
}

static HcclResult create(uint32_t num_ranks, const void *root_info, uint32_t rank,
                         struct settings settings, struct comm **made)
{
    struct membership mine;
    struct comm *comm = new_comm(num_ranks, rank, settings);
    memset(&mine, 0, sizeof mine);
    mine.num_ranks = num_ranks;
    mine.rank = rank;
    mine.settings = settings;
    mine.physical_device = fake_physical_device(comm->device);
    snprintf(mine.soc, sizeof mine.soc, "%s", fake_env_text("FAKE_CANN_SOC", "Ascend910B3"));
    comm->listener = listen_anywhere(mine.listener_name, "rank");
    HcclResult result = comm->listener < 0
        ? fake_error(HCCL_E_SYSCALL, "HcclCommInitRootInfo: no socket")
        : join_root(root_info, &mine, comm->listener_names);
    if (result) {
        close_comm(comm);
        return result;
    }
    comm->magic = COMM_MAGIC;
    *made = comm;
    return HCCL_SUCCESS;
}

EXPORT HcclResult HcclCommInitRootInfoConfig(uint32_t num_ranks, const void *root_info, uint32_t rank,
                                             const void *config, void **comm)
{
    struct settings settings;
    int device = fake_current_device();
    HcclResult result = fake_failure("HcclCommInitRootInfo");
    if (result)
        return fake_error(result, "HcclCommInitRootInfo: failure asked for by FAKE_CANN_FAIL");
    if (!root_info || !comm)
        return HCCL_E_PTR;
    if (!num_ranks || num_ranks > MAX_RANKS || rank >= num_ranks)
        return fake_error(HCCL_E_PARA, "HcclCommInitRootInfo: rank %u of %u", rank, num_ranks);
    if (device < 0)
        return fake_error(HCCL_E_RUNTIME, "HcclCommInitRootInfo: the thread has set no device");
    if ((result = read_settings(config, &settings)))
        return result;
    if (fake_capture_refuses_allocation("HcclCommInitRootInfo"))
        return HCCL_E_RUNTIME;
    enter(&creating[device], "HcclCommInitRootInfo", device);
    result = create(num_ranks, root_info, rank, settings, (struct comm **)comm);
    leave(&creating[device]);
    return result;
}

EXPORT HcclResult HcclCommInitRootInfo(uint32_t num_ranks, const void *root_info, uint32_t rank, void **comm)
{
    return HcclCommInitRootInfoConfig(num_ranks, root_info, rank, NULL, comm);
}

/* One operation on the stream of its caller. */
struct operation {
    struct comm *comm;
    uint64_t number;
    bool is_barrier;
    uint32_t count;
    struct item items[];
};

static aclError run_barrier(struct comm *comm, double deadline)
{
    aclError error = ACL_SUCCESS;
    for (int round = 0; round < 2; round++) /* everyone to rank 0, and back */
        for (uint32_t peer = 0; peer < comm->num_ranks && !error; peer++)
            if (peer != comm->rank && (!peer || !comm->rank)) {
                struct item item = {(round == 0) == (comm->rank == 0), NULL, 0, peer};
                error = run_item(comm, &item, deadline);
            }
    return error;
}

static aclError run_operation(void *argument)
{
    struct operation *op = argument;
    struct comm *comm = op->comm;
    pthread_mutex_lock(&comm->lock);
    while (comm->num_done < op->number)
        pthread_cond_wait(&comm->changed, &comm->lock);
    pthread_mutex_unlock(&comm->lock);
    double deadline = fake_now() + exec_timeout(&comm->settings);
    aclError error;
    if (fake_stream_has_failed()) /* nothing behind a failure reaches the device */
        error = RT_NOTIFY_TIMEOUT;
    else if (op->is_barrier)
        error = run_barrier(comm, deadline);
    else
        error = run_items(comm, op->items, op->count, deadline);
    return error;
}

/* Also for operations that a stream dropped: the next one of the communicator may go on. */
static void end_operation(void *argument)
{
    struct operation *op = argument;
    pthread_mutex_lock(&op->comm->lock);
    op->comm->num_done++;
    pthread_cond_broadcast(&op->comm->changed);
    pthread_mutex_unlock(&op->comm->lock);
    free(op);
}

/* The first operation takes the communicator's two buffers. */
static HcclResult take_buffers(struct comm *comm)
{
    size_t length = (size_t)2 * comm->settings.buffer_mb << 20;
    if (comm->has_buffers)
        return HCCL_SUCCESS;
    if (!fake_take_memory(comm->device, length))
        return fake_error(HCCL_E_OOM, "no device memory for two buffers of %u MB", comm->settings.buffer_mb);
    comm->has_buffers = true;
    return HCCL_SUCCESS;
}

static HcclResult set_up_links(struct operation *op)
{
    struct comm *comm = op->comm;
    double deadline = fake_now() + connect_timeout();
    HcclResult result = HCCL_SUCCESS;
    pthread_mutex_lock(&comm->lock);
    comm->num_in_setup++;
    pthread_mutex_unlock(&comm->lock);
    for (uint32_t peer = 0; peer < comm->num_ranks && !result; peer++) {
        bool is_needed = op->is_barrier && peer != comm->rank && (!peer || !comm->rank);
        for (uint32_t i = 0; i < op->count; i++)
            is_needed |= op->items[i].peer == peer;
        if (is_needed)
            result = set_up_link(comm, peer, deadline);
    }
    if (!result)
        result = take_buffers(comm);
    pthread_mutex_lock(&comm->lock);
    comm->num_in_setup--;
    pthread_cond_broadcast(&comm->changed);
    pthread_mutex_unlock(&comm->lock);
    return result;
}

static HcclResult issue(struct operation *op, void *stream)
{
    struct comm *comm = op->comm;
    HcclResult result = set_up_links(op);
    if (result) {
        free(op);
        return result;
    }
    pthread_mutex_lock(&comm->lock);
    op->number = comm->num_issued++;
    pthread_mutex_unlock(&comm->lock);
    return fake_enqueue(stream, run_operation, op, end_operation) ? HCCL_E_RUNTIME : HCCL_SUCCESS;
}

static HcclResult check_item(const struct comm *comm, const struct item *item, int data_type, const char *what)
{
    if (!item->buffer)
        return fake_error(HCCL_E_PTR, "%s: no buffer", what);
    if (item->peer >= comm->num_ranks || item->peer == comm->rank || item->type < 0 || item->type > 1)
        return fake_error(HCCL_E_PARA, "%s: rank %u with peer %u of %u", what, comm->rank, item->peer, comm->num_ranks);
    if (data_type != 0 && data_type != 7) /* int8, uint8: all that A2 and A3 promise */
        return fake_error(HCCL_E_NOT_SUPPORT, "%s: data type %d; send bytes as int8", what, data_type);
    if (!fake_is_device_memory(item->buffer, item->length))
        return fake_error(HCCL_E_PARA, "%s: %zu bytes at %p are no device memory", what, item->length, item->buffer);
    return HCCL_SUCCESS;
}

static HcclResult start(struct comm *comm, struct operation *op, void *stream, const char *what)
{
    HcclResult result = fake_failure(what);
    if (result) {
        free(op);
        return fake_error(result, "%s: failure asked for by FAKE_CANN_FAIL", what);
    }
    if (fake_current_device() != comm->device) {
        free(op);
        return fake_error(HCCL_E_RUNTIME, "%s: the thread is on device %d, the communicator on %d", what,
                          fake_current_device(), comm->device);
    }
    if (fake_capture_refuses_waiting(what)) {
        free(op);
        return HCCL_E_RUNTIME;
    }
    enter(&issuing[comm->device], what, comm->device);
    result = issue(op, stream);
    leave(&issuing[comm->device]);
    return result;
}

/* HcclSendRecvItem, 32 bytes. */
struct send_recv_item {
    int type;
    void *buffer;
    uint64_t count;
    int data_type;
    uint32_t peer;
};
_Static_assert(sizeof(struct send_recv_item) == 32, "HcclSendRecvItem");

static HcclResult transfer(const struct send_recv_item *items, uint32_t count, void *handle, void *stream, const char *what)
{
    struct comm *comm = handle;
    if (!is_comm(comm) || !items)
        return fake_error(HCCL_E_PTR, "%s: no communicator, or one that was destroyed", what);
    if (!count)
        return fake_error(HCCL_E_PARA, "%s: no items", what);
    struct operation *op = calloc(1, sizeof *op + count * sizeof *op->items);
    op->comm = comm;
    op->count = count;
    for (uint32_t i = 0; i < count; i++) {
        op->items[i] = (struct item){items[i].type, items[i].buffer, items[i].count, items[i].peer};
        HcclResult result = check_item(comm, &op->items[i], items[i].data_type, what);
        if (result) {
            free(op);
            return result;
        }
    }
    return start(comm, op, stream, what);
}

EXPORT HcclResult HcclSend(void *buffer, uint64_t count, int data_type, uint32_t peer, void *comm, void *stream)
{
    struct send_recv_item item = {0, buffer, count, data_type, peer};
    return transfer(&item, 1, comm, stream, "HcclSend");
}

EXPORT HcclResult HcclRecv(void *buffer, uint64_t count, int data_type, uint32_t peer, void *comm, void *stream)
{
    struct send_recv_item item = {1, buffer, count, data_type, peer};
    return transfer(&item, 1, comm, stream, "HcclRecv");
}

EXPORT HcclResult HcclBatchSendRecv(struct send_recv_item *items, uint32_t count, void *comm, void *stream)
{
    return transfer(items, count, comm, stream, "HcclBatchSendRecv");
}

EXPORT HcclResult HcclBarrier(void *handle, void *stream)
{
    struct comm *comm = handle;
    if (!is_comm(comm))
        return HCCL_E_PTR;
    struct operation *op = calloc(1, sizeof *op);
    op->comm = comm;
    op->is_barrier = true;
    return start(comm, op, stream, "HcclBarrier");
}

EXPORT HcclResult HcclCommDestroy(void *handle)
{
    struct comm *comm = handle;
    uint64_t one = 1;
    if (!is_comm(comm))
        return fake_error(HCCL_E_PTR, "HcclCommDestroy: no communicator, or one that was destroyed");
    pthread_mutex_lock(&comm->lock);
    bool is_busy = comm->num_done != comm->num_issued;
    if (!is_busy) {
        if (write(comm->cancel, &one, sizeof one) < 0)
            fake_rule_broken("cannot end a link set-up");
        while (comm->num_in_setup)
            pthread_cond_wait(&comm->changed, &comm->lock);
    }
    pthread_mutex_unlock(&comm->lock);
    if (is_busy)
        return fake_error(HCCL_E_AGAIN, "HcclCommDestroy: operations of the communicator are under way");
    close_comm(comm);
    return HCCL_SUCCESS;
}

/* Facts section 0.3: reports an error of RDMA and nothing else; a lost peer is none. */
EXPORT HcclResult HcclGetCommAsyncError(void *comm, HcclResult *error)
{
    if (!is_comm(comm) || !error)
        return HCCL_E_PTR;
    *error = fake_failure("HcclGetCommAsyncError");
    return HCCL_SUCCESS;
}

EXPORT HcclResult HcclGetCommName(void *comm, char *name)
{
    if (!is_comm(comm) || !name)
        return HCCL_E_PTR;
    const struct comm *c = comm;
    if (c->settings.name[0])
        snprintf(name, 128, "%s", c->settings.name);
    else
        snprintf(name, 128, "%s", c->listener_names[0]);
    return HCCL_SUCCESS;
}

EXPORT HcclResult HcclGetRankSize(void *comm, uint32_t *size)
{
    if (!is_comm(comm) || !size)
        return HCCL_E_PTR;
    *size = ((struct comm *)comm)->num_ranks;
    return HCCL_SUCCESS;
}

EXPORT HcclResult HcclGetRankId(void *comm, uint32_t *rank)
{
    if (!is_comm(comm) || !rank)
        return HCCL_E_PTR;
    *rank = ((struct comm *)comm)->rank;
    return HCCL_SUCCESS;
}

EXPORT const char *HcclGetErrorString(HcclResult code)
{
    static const char *const texts[] = {
        [0] = "no error", [1] = "parameter error", [2] = "empty pointer", [3] = "memory error",
        [4] = "internal error", [5] = "not support feature", [6] = "not found specific resource",
        [7] = "resource unavailable", [8] = "call system interface error", [9] = "timeout",
        [10] = "open file fail", [11] = "tcp connect fail", [12] = "roce connect fail",
        [13] = "tcp transfer fail", [14] = "roce transfer fail", [15] = "call runtime api fail",
        [16] = "call driver api fail", [17] = "call profiling api fail", [18] = "call cce api fail",
        [19] = "call network api fail", [20] = "try again", [21] = "error cqe",
        [22] = "error communicator suspending", [23] = "retry constraint", [24] = "out of memory"};
    return code >= 0 && code <= 24 ? texts[code] : "unknown error";
}

/* torch_npu sets what is deterministic here; there is nothing to set. */
EXPORT HcclResult HcclSetConfig(int config, int32_t value)
{
    (void)config, (void)value;
    return HCCL_SUCCESS;
}

/* For tests: how many threads are setting up links of this communicator. */
EXPORT int fakeHcclNumInSetup(void *handle)
{
    struct comm *comm = handle;
    pthread_mutex_lock(&comm->lock);
    int count = comm->num_in_setup;
    pthread_mutex_unlock(&comm->lock);
    return count;
}
