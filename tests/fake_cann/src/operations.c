/* The functions of libhccl that put operations on streams. */
#include "hccl.h"

#include <stdlib.h>

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
    if (fake_error_before()) /* nothing behind a failure reaches the device */
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
        return fake_error(HCCL_E_OOM, "no device memory for two buffers of %u MB",
                          comm->settings.buffer_mb);
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

static uint64_t num_issued;

/* For tests: how many operations this process has issued. */
EXPORT uint64_t fakeHcclNumIssued(void)
{
    return __atomic_load_n(&num_issued, __ATOMIC_ACQUIRE);
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
    if (fake_enqueue(stream, run_operation, op, end_operation))
        return HCCL_E_RUNTIME;
    __atomic_add_fetch(&num_issued, 1, __ATOMIC_ACQ_REL);
    return HCCL_SUCCESS;
}

static HcclResult check_item(const struct comm *comm, const struct item *item, int data_type,
                             const char *what)
{
    if (!item->buffer)
        return fake_error(HCCL_E_PTR, "%s: no buffer", what);
    if (item->peer >= comm->num_ranks || item->peer == comm->rank || item->type < 0 ||
        item->type > 1)
        return fake_error(HCCL_E_PARA, "%s: rank %u with peer %u of %u", what, comm->rank,
                          item->peer, comm->num_ranks);
    if (data_type != 0 && data_type != 7) /* int8, uint8: all that A2 and A3 promise */
        return fake_error(HCCL_E_NOT_SUPPORT, "%s: data type %d; send bytes as int8", what,
                          data_type);
    if (!fake_is_device_memory(item->buffer, item->length))
        return fake_error(HCCL_E_PARA, "%s: %zu bytes at %p are no device memory", what,
                          item->length, item->buffer);
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
        return fake_error(HCCL_E_RUNTIME, "%s: the thread is on device %d, the communicator on %d",
                          what, fake_current_device(), comm->device);
    }
    if (fake_capture_refuses_waiting(what)) {
        free(op);
        return HCCL_E_RUNTIME;
    }
    enter_serial(ISSUING, comm->device, what);
    result = issue(op, stream);
    leave_serial(ISSUING, comm->device);
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

static HcclResult transfer(const struct send_recv_item *items, uint32_t count, void *handle,
                           void *stream, const char *what)
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

EXPORT HcclResult HcclSend(void *buffer, uint64_t count, int data_type, uint32_t peer, void *comm,
                           void *stream)
{
    struct send_recv_item item = {0, buffer, count, data_type, peer};
    return transfer(&item, 1, comm, stream, "HcclSend");
}

EXPORT HcclResult HcclRecv(void *buffer, uint64_t count, int data_type, uint32_t peer, void *comm,
                           void *stream)
{
    struct send_recv_item item = {1, buffer, count, data_type, peer};
    return transfer(&item, 1, comm, stream, "HcclRecv");
}

EXPORT HcclResult HcclBatchSendRecv(struct send_recv_item *items, uint32_t count, void *comm,
                                    void *stream)
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
