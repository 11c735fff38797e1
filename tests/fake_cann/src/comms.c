/* The functions of libhccl for communicators: making, destroying, asking. */
#define _GNU_SOURCE
#include "hccl.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define COMM_MAGIC 0x636f6d6d756e6963ULL

bool is_comm(const struct comm *comm)
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

EXPORT HcclResult HcclCommInitRootInfoConfig(uint32_t num_ranks, const void *root_info,
                                             uint32_t rank, const void *config, void **comm)
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
    enter_serial(CREATING, device, "HcclCommInitRootInfo");
    result = create(num_ranks, root_info, rank, settings, (struct comm **)comm);
    leave_serial(CREATING, device);
    return result;
}

EXPORT HcclResult HcclCommInitRootInfo(uint32_t num_ranks, const void *root_info, uint32_t rank,
                                       void **comm)
{
    return HcclCommInitRootInfoConfig(num_ranks, root_info, rank, NULL, comm);
}

EXPORT HcclResult HcclCommDestroy(void *handle)
{
    struct comm *comm = handle;
    uint64_t one = 1;
    if (!is_comm(comm))
        return fake_error(HCCL_E_PTR,
                          "HcclCommDestroy: no communicator, or one that was destroyed");
    pthread_mutex_lock(&comm->lock);
    bool is_busy = comm->num_done != comm->num_issued;
    if (!is_busy) {
        if (write(comm->cancel, &one, sizeof one) < 0)
            fake_give_up("cannot end a link set-up");
        while (comm->num_in_setup)
            pthread_cond_wait(&comm->changed, &comm->lock);
    }
    pthread_mutex_unlock(&comm->lock);
    if (is_busy)
        return fake_error(HCCL_E_AGAIN,
                          "HcclCommDestroy: operations of the communicator are under way");
    close_comm(comm);
    return HCCL_SUCCESS;
}

/* Notes section 0.3: reports an error of RDMA and nothing else; a lost peer is none. */
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
    static const char *const texts[] = {[0] = "no error",
                                        [1] = "parameter error",
                                        [2] = "empty pointer",
                                        [3] = "memory error",
                                        [4] = "internal error",
                                        [5] = "not support feature",
                                        [6] = "not found specific resource",
                                        [7] = "resource unavailable",
                                        [8] = "call system interface error",
                                        [9] = "timeout",
                                        [10] = "open file fail",
                                        [11] = "tcp connect fail",
                                        [12] = "roce connect fail",
                                        [13] = "tcp transfer fail",
                                        [14] = "roce transfer fail",
                                        [15] = "call runtime api fail",
                                        [16] = "call driver api fail",
                                        [17] = "call profiling api fail",
                                        [18] = "call cce api fail",
                                        [19] = "call network api fail",
                                        [20] = "try again",
                                        [21] = "error cqe",
                                        [22] = "error communicator suspending",
                                        [23] = "retry constraint",
                                        [24] = "out of memory"};
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
