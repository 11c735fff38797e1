/* Links between two ranks of a communicator, and the transfers over them. */
#define _GNU_SOURCE
#include "hccl.h"

#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* A sender may go on only when its receiver is at the same place: READY, DATA, ..., DONE. */
enum frame_kind { READY = 1, DATA, DONE, MISMATCH };
struct frame {
    uint32_t kind, reserved;
    uint64_t total, length;
};

struct hello {
    uint32_t rank, direction; /* 0: the connecting rank sends on it, 1: it receives */
};

/* The lower rank lets in whoever comes until the awaited peer has, then greets it. */
static enum io_result let_in(struct comm *comm, uint32_t peer, double deadline)
{
    char greeting = 1;
    while (comm->links[peer].out < 0 || comm->links[peer].in < 0) {
        struct hello hello;
        enum io_result result = wait_readable(comm->listener, comm->cancel, deadline);
        if (result != IO_OK)
            return result;
        int fd = accept4(comm->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd < 0)
            continue;
        if (receive_all(fd, comm->cancel, &hello, sizeof hello, deadline) != IO_OK ||
            hello.rank >= comm->num_ranks) {
            close(fd);
            continue;
        }
        struct link *link = &comm->links[hello.rank];
        *(hello.direction ? &link->out : &link->in) = fd;
    }
    return send_all(comm->links[peer].out, &greeting, 1, deadline);
}

static enum io_result come_in(struct comm *comm, uint32_t peer, double deadline)
{
    struct link *link = &comm->links[peer];
    char greeting;
    for (uint32_t direction = 0; direction < 2; direction++) {
        struct hello hello = {comm->rank, direction};
        int fd = connect_to(comm->listener_names[peer]);
        if (fd < 0)
            return IO_LOST;
        send_all(fd, &hello, sizeof hello, deadline);
        *(direction ? &link->in : &link->out) = fd;
    }
    return receive_all(link->in, comm->cancel, &greeting, 1, deadline);
}

static void drop_link(struct link *link)
{
    if (link->out >= 0)
        close(link->out);
    if (link->in >= 0)
        close(link->in);
    link->out = link->in = -1;
}

void drop_links(struct comm *comm)
{
    for (uint32_t peer = 0; peer < comm->num_ranks; peer++)
        drop_link(&comm->links[peer]);
}

/* Blocks the host until the peer is in an operation with this rank, too. */
HcclResult set_up_link(struct comm *comm, uint32_t peer, double deadline)
{
    struct link *link = &comm->links[peer];
    if (link->is_up)
        return HCCL_SUCCESS;
    enum io_result result;
    if (comm->rank < peer) {
        result = let_in(comm, peer, deadline);
    } else {
        while ((result = come_in(comm, peer, deadline)) == IO_LOST && fake_now() < deadline) {
            drop_link(link);
            if (wait_readable(comm->listener, comm->cancel, fake_now() + 0.01) == IO_CANCELLED)
                return fake_error(HCCL_E_INTERNAL,
                                  "link set-up with rank %u was ended by HcclCommDestroy", peer);
        }
    }
    link->is_up = result == IO_OK;
    if (link->is_up)
        return HCCL_SUCCESS;
    drop_link(link);
    if (result == IO_CANCELLED)
        return fake_error(HCCL_E_INTERNAL, "link set-up with rank %u was ended by HcclCommDestroy",
                          peer);
    if (result == IO_LOST)
        return fake_error(HCCL_E_TCP_CONNECT, "link set-up: rank %u is gone", peer);
    return fake_error(HCCL_E_TIMEOUT,
                      "link set-up: rank %u did not come within HCCL_CONNECT_TIMEOUT", peer);
}

/* The peer will not answer: as on a device, only the execution timeout ends the wait. */
static aclError time_out(struct link *link, const char *what, double deadline)
{
    link->is_lost = true;
    fake_sleep_until(deadline);
    shutdown(link->out, SHUT_RDWR);
    shutdown(link->in, SHUT_RDWR);
    return fake_error(RT_NOTIFY_TIMEOUT, "%s: the peer did not answer within the execution timeout",
                      what);
}

static bool await_frame(int fd, struct frame *frame, double deadline)
{
    return receive_all(fd, -1, frame, sizeof *frame, deadline) == IO_OK;
}

static bool put_frame(int fd, uint32_t kind, uint64_t total, uint64_t length, double deadline)
{
    struct frame frame = {kind, 0, total, length};
    return send_all(fd, &frame, sizeof frame, deadline) == IO_OK;
}

static size_t chunk_of(const struct comm *comm, size_t left)
{
    size_t room = (size_t)comm->settings.buffer_mb << 20;
    return left < room ? left : room;
}

static unsigned long num_chunks;

/* For tests: how many pieces this process has sent. */
EXPORT unsigned long fakeHcclNumChunks(void)
{
    return __atomic_load_n(&num_chunks, __ATOMIC_RELAXED);
}

static aclError send_item(struct comm *comm, const struct item *item, double deadline)
{
    struct link *link = &comm->links[item->peer];
    const char *at = item->buffer;
    size_t left = item->length;
    struct frame frame;
    do {
        size_t chunk = chunk_of(comm, left);
        if (link->is_lost || !await_frame(link->out, &frame, deadline))
            return time_out(link, "send", deadline);
        if (frame.total != item->length) {
            put_frame(link->out, MISMATCH, item->length, 0, deadline);
            return fake_error(RT_COPY_FAILED, "send of %zu bytes meets a receive of %lu",
                              item->length, (unsigned long)frame.total);
        }
        if (!put_frame(link->out, DATA, item->length, chunk, deadline) ||
            send_all(link->out, at, chunk, deadline) != IO_OK)
            return time_out(link, "send", deadline);
        __atomic_add_fetch(&num_chunks, 1, __ATOMIC_RELAXED);
        at += chunk;
        left -= chunk;
    } while (left);
    return await_frame(link->out, &frame, deadline) ? ACL_SUCCESS
                                                    : time_out(link, "send", deadline);
}

static aclError receive_item(struct comm *comm, const struct item *item, double deadline)
{
    struct link *link = &comm->links[item->peer];
    char *at = item->buffer;
    size_t left = item->length;
    struct frame frame;
    do {
        if (link->is_lost || !put_frame(link->in, READY, item->length, left, deadline) ||
            !await_frame(link->in, &frame, deadline))
            return time_out(link, "receive", deadline);
        if (frame.kind == MISMATCH)
            return fake_error(RT_COPY_FAILED, "receive of %zu bytes meets a send of %lu",
                              item->length, (unsigned long)frame.total);
        if (frame.length > left)
            return fake_error(RT_COPY_FAILED, "receive: %lu bytes too many",
                              (unsigned long)(frame.length - left));
        if (receive_all(link->in, -1, at, frame.length, deadline) != IO_OK)
            return time_out(link, "receive", deadline);
        at += frame.length;
        left -= frame.length;
    } while (left);
    return put_frame(link->in, DONE, 0, 0, deadline) ? ACL_SUCCESS
                                                     : time_out(link, "receive", deadline);
}

aclError run_item(struct comm *comm, const struct item *item, double deadline)
{
    return (item->type ? receive_item : send_item)(comm, item, deadline);
}

struct lane {
    struct comm *comm;
    const struct item *items;
    uint32_t count, peer;
    int type;
    double deadline;
    aclError error;
};

static void *run_lane(void *argument)
{
    struct lane *lane = argument;
    for (uint32_t i = 0; i < lane->count && !lane->error; i++)
        if (lane->items[i].peer == lane->peer && lane->items[i].type == lane->type)
            lane->error = run_item(lane->comm, &lane->items[i], lane->deadline);
    return NULL;
}

static bool has_lane(const struct lane *lane)
{
    for (uint32_t i = 0; i < lane->count; i++)
        if (lane->items[i].peer == lane->peer && lane->items[i].type == lane->type)
            return true;
    return false;
}

aclError run_items(struct comm *comm, const struct item *items, uint32_t count, double deadline)
{
    struct lane lanes[2 * MAX_RANKS];
    pthread_t threads[2 * MAX_RANKS];
    int num_lanes = 0;
    aclError error = ACL_SUCCESS;
    if (count == 1)
        return run_item(comm, items, deadline);
    for (uint32_t peer = 0; peer < comm->num_ranks; peer++)
        for (int type = 0; type < 2; type++) {
            lanes[num_lanes] = (struct lane){comm, items, count, peer, type, deadline, 0};
            if (has_lane(&lanes[num_lanes])) {
                if (pthread_create(&threads[num_lanes], NULL, run_lane, &lanes[num_lanes]))
                    fake_give_up("no thread for a batch");
                num_lanes++;
            }
        }
    for (int i = 0; i < num_lanes; i++) {
        pthread_join(threads[i], NULL);
        error = error ? error : lanes[i].error;
    }
    return error;
}
