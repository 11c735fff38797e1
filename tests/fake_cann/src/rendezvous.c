/* Making a communicator: all ranks meet at the root and learn of each other. */
#define _GNU_SOURCE
#include "hccl.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#define ROOT_MAGIC 0x6663616b65726f6fULL

/* The beginning of HcclRootInfo's 4108 bytes; the rest is zero. */
struct root {
    uint64_t magic, key;
    char name[64];
};

struct answer {
    HcclResult result;
    char names[MAX_RANKS][64];
};

struct gathering {
    int listener, port; /* port: a socket that holds a host port, or -1 */
    uint64_t key;
    int fds[MAX_RANKS];
    struct membership members[MAX_RANKS];
    uint32_t count;
};

/* Notes section 3: HCCL_CONNECT_TIMEOUT seconds, 120 by default, plus 20. */
double connect_timeout(void)
{
    return fake_scaled(fake_env_number("HCCL_CONNECT_TIMEOUT", 120) + 20);
}

static int bind_port(int port)
{
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_port = htons((uint16_t)port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && bind(fd, (struct sockaddr *)&address, sizeof address)) {
        close(fd);
        return -1;
    }
    return fd;
}

/* Hold a port of HCCL_HOST_SOCKET_PORT_RANGE ("60000-60050,61000-61010"), if it is set. */
static HcclResult hold_port(int *held)
{
    const char *range = fake_env_text("HCCL_HOST_SOCKET_PORT_RANGE", "auto");
    *held = -1;
    if (!strcmp(range, "auto"))
        return HCCL_SUCCESS;
    for (const char *at = range; at && *at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL) {
        int first, last;
        int count = sscanf(at, "%d-%d", &first, &last);
        if (count < 1 || first < 1 || (count > 1 && last < first))
            return fake_error(HCCL_E_PARA, "HCCL_HOST_SOCKET_PORT_RANGE: bad value '%s'", range);
        for (int port = first; port <= (count > 1 ? last : first) && *held < 0; port++)
            *held = bind_port(port);
        if (*held >= 0)
            return HCCL_SUCCESS;
    }
    return fake_error(HCCL_E_UNAVAIL,
                      "HcclGetRootInfo: all ports of HCCL_HOST_SOCKET_PORT_RANGE=%s are in use",
                      range);
}

/* Whether a newcomer fits those who came before. */
static HcclResult check(const struct gathering *g, const struct membership *m)
{
    const struct membership *first = &g->members[0];
    if (m->num_ranks != first->num_ranks || m->rank >= m->num_ranks)
        return fake_error(HCCL_E_PARA, "rendezvous: rank %u of %u, others say %u ranks", m->rank,
                          m->num_ranks, first->num_ranks);
    if (memcmp(&m->settings, &first->settings, sizeof m->settings))
        return fake_error(
            HCCL_E_PARA,
            "rendezvous: ranks %u and %u differ in their configurations: buffer %u and "
            "%u MB, execution timeout %d and %d s, name '%s' and '%s'",
            first->rank, m->rank, first->settings.buffer_mb, m->settings.buffer_mb,
            first->settings.exec_timeout_s, m->settings.exec_timeout_s, first->settings.name,
            m->settings.name);
    if (strcmp(m->soc, first->soc))
        return fake_error(HCCL_E_NOT_SUPPORT, "rendezvous: %s and %s in one communicator",
                          first->soc, m->soc);
    for (uint32_t i = 0; i < g->count; i++) {
        if (g->members[i].rank == m->rank)
            return fake_error(HCCL_E_PARA, "rendezvous: rank %u came twice", m->rank);
        if (g->members[i].physical_device == m->physical_device)
            return fake_error(HCCL_E_PARA, "rendezvous: ranks %u and %u are both on device %d",
                              g->members[i].rank, m->rank, m->physical_device);
    }
    return HCCL_SUCCESS;
}

static void answer_all(struct gathering *g, HcclResult result)
{
    struct answer answer = {.result = result};
    for (uint32_t i = 0; i < g->count; i++)
        memcpy(answer.names[g->members[i].rank % MAX_RANKS], g->members[i].listener_name, 64);
    for (uint32_t i = 0; i < g->count; i++) {
        send_all(g->fds[i], &answer, sizeof answer, fake_now() + 5);
        close(g->fds[i]);
    }
}

/* Take one more member; returns whether the gathering is over. */
static bool take_member(struct gathering *g, double deadline)
{
    int fd = accept4(g->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    struct membership m;
    if (fd < 0)
        return false;
    if (receive_all(fd, -1, &m, sizeof m, deadline) != IO_OK || m.key != g->key) {
        close(fd); /* a stranger, or one who left */
        return false;
    }
    HcclResult result = g->count ? check(g, &m) : HCCL_SUCCESS;
    g->fds[g->count] = fd;
    g->members[g->count++] = m;
    if (!result && g->count < g->members[0].num_ranks)
        return false;
    answer_all(g, result);
    return true;
}

static void *run_gathering(void *argument)
{
    struct gathering *g = argument;
    double deadline = fake_now() + connect_timeout();
    bool is_over = false;
    while (!is_over) {
        enum io_result result = wait_readable(g->listener, -1, deadline);
        if (result == IO_OK)
            is_over = take_member(g, deadline);
        else {
            answer_all(g, HCCL_E_TIMEOUT);
            is_over = true;
        }
    }
    close(g->listener);
    if (g->port >= 0)
        close(g->port);
    free(g);
    return NULL;
}

HcclResult open_root(void *root_info)
{
    struct root root = {.magic = ROOT_MAGIC};
    struct gathering *g = calloc(1, sizeof *g);
    pthread_t thread;
    HcclResult result = hold_port(&g->port);
    if (result) {
        free(g);
        return result;
    }
    g->listener = listen_anywhere(root.name, "root");
    if (g->listener < 0 || getrandom(&root.key, sizeof root.key, 0) < 0)
        fake_give_up("no socket for a root");
    g->key = root.key;
    if (pthread_create(&thread, NULL, run_gathering, g))
        fake_give_up("no thread for a root");
    pthread_detach(thread);
    memset(root_info, 0, 4108);
    memcpy(root_info, &root, sizeof root);
    return HCCL_SUCCESS;
}

HcclResult join_root(const void *root_info, struct membership *mine, char names[MAX_RANKS][64])
{
    struct root root;
    struct answer answer;
    double deadline = fake_now() + connect_timeout();
    memcpy(&root, root_info, sizeof root);
    if (root.magic != ROOT_MAGIC)
        return fake_error(HCCL_E_PARA, "HcclCommInitRootInfo: these bytes are no root info");
    mine->key = root.key;
    int fd = connect_to(root.name);
    while (fd < 0 && fake_now() < deadline) {
        fake_sleep(0.01);
        fd = connect_to(root.name);
    }
    if (fd < 0)
        return fake_error(HCCL_E_TCP_CONNECT, "rendezvous: nobody listens at the root any more");
    enum io_result sent = send_all(fd, mine, sizeof *mine, deadline);
    enum io_result got =
        sent == IO_OK ? receive_all(fd, -1, &answer, sizeof answer, deadline) : sent;
    close(fd);
    if (got == IO_LOST) /* the root died with the gathering */
        fake_sleep_until(deadline);
    if (got != IO_OK)
        return fake_error(HCCL_E_TIMEOUT,
                          "rendezvous: not all ranks came within HCCL_CONNECT_TIMEOUT");
    if (answer.result)
        return fake_error(answer.result, "rendezvous: refused with error %d", answer.result);
    memcpy(names, answer.names, sizeof answer.names);
    return HCCL_SUCCESS;
}
