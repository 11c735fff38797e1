/* libhccl of the double: HCCL over Unix sockets. Layouts are those of notes section 2. */
#ifndef FAKE_CANN_HCCL_H
#define FAKE_CANN_HCCL_H

#include "internal.h"

#include <pthread.h>

#define MAX_RANKS 16

typedef int HcclResult;
enum {
    HCCL_SUCCESS = 0,
    HCCL_E_PARA = 1,
    HCCL_E_PTR = 2,
    HCCL_E_INTERNAL = 4,
    HCCL_E_NOT_SUPPORT = 5,
    HCCL_E_UNAVAIL = 7,
    HCCL_E_SYSCALL = 8,
    HCCL_E_TIMEOUT = 9,
    HCCL_E_TCP_CONNECT = 11,
    HCCL_E_RUNTIME = 15,
    HCCL_E_AGAIN = 20,
    HCCL_E_OOM = 24,
};

/* What a communicator was configured with, after the rules of the ABI. */
struct settings {
    uint32_t buffer_mb;
    uint32_t deterministic;
    uint32_t expansion_mode;
    int32_t exec_timeout_s;
    char name[128];
};

/* Each direction of a link is a socket of its own; -1 until it is set up. */
struct link {
    int out, in;
    bool is_up;
    bool is_lost; /* nothing will come any more; only the execution timeout tells */
};

struct comm {
    uint64_t magic;
    uint32_t num_ranks, rank;
    int device;
    struct settings settings;
    char listener_names[MAX_RANKS][64];
    int listener, cancel; /* cancel: an eventfd that ends link set-up */
    struct link links[MAX_RANKS];
    bool has_buffers;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint64_t num_issued, num_done; /* operations run one after the other, in issue order */
    int num_in_setup;
};

/* sockets.c: abstract Unix sockets, and transfers that end at a deadline. */
enum io_result { IO_OK, IO_LOST, IO_LATE, IO_CANCELLED };
int listen_anywhere(char name[64], const char *purpose);
int connect_to(const char *name); /* -1 when nobody listens */
enum io_result wait_readable(int fd, int cancel, double deadline);
enum io_result send_all(int fd, const void *data, size_t length, double deadline);
enum io_result receive_all(int fd, int cancel, void *data, size_t length, double deadline);

/* rendezvous.c */
struct membership {
    uint64_t key;
    uint32_t num_ranks, rank;
    struct settings settings;
    int physical_device;
    char soc[32];
    char listener_name[64];
};
double connect_timeout(void);
HcclResult open_root(void *root_info);
HcclResult join_root(const void *root_info, struct membership *mine, char names[MAX_RANKS][64]);

/* links.c */
struct item {
    int type; /* HcclSendRecvType: 0 send, 1 receive */
    void *buffer;
    size_t length;
    uint32_t peer;
};
HcclResult set_up_link(struct comm *comm, uint32_t peer, double deadline);
void drop_links(struct comm *comm);
aclError run_item(struct comm *comm, const struct item *item, double deadline);
/* All items together; those of one peer and one direction in their order. */
aclError run_items(struct comm *comm, const struct item *items, uint32_t count, double deadline);

/* comms.c */
bool is_comm(const struct comm *comm); /* and not destroyed */

/* serial.c */
enum activity { CREATING, ISSUING, NUM_ACTIVITIES };
void enter_serial(enum activity activity, int device, const char *what);
void leave_serial(enum activity activity, int device);

/* config.c */
HcclResult read_settings(const void *config, struct settings *settings);
double exec_timeout(const struct settings *settings);

#endif
