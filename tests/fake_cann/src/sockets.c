/* Abstract Unix sockets, and transfers that end at a deadline. */
#define _GNU_SOURCE
#include "hccl.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static socklen_t address_of(const char *name, struct sockaddr_un *address)
{
    memset(address, 0, sizeof *address);
    address->sun_family = AF_UNIX;
    strncpy(address->sun_path + 1, name, sizeof address->sun_path - 2);
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + strlen(name));
}

int listen_anywhere(char name[64], const char *purpose)
{
    struct sockaddr_un address;
    uint64_t random;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || getrandom(&random, sizeof random, 0) != sizeof random)
        return -1;
    snprintf(name, 64, "fake-hccl-%s-%d-%016lx", purpose, getpid(), (unsigned long)random);
    socklen_t length = address_of(name, &address);
    if (bind(fd, (struct sockaddr *)&address, length) || listen(fd, 64)) {
        close(fd);
        return -1;
    }
    return fd;
}

int connect_to(const char *name)
{
    struct sockaddr_un address;
    socklen_t length = address_of(name, &address);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&address, length)) {
        close(fd);
        return -1;
    }
    if (fd >= 0)
        fcntl(fd, F_SETFL, O_NONBLOCK);
    return fd;
}

static enum io_result wait_for(int fd, short events, int cancel, double deadline)
{
    for (;;) {
        struct pollfd fds[2] = {{fd, events, 0}, {cancel, POLLIN, 0}};
        double left = deadline - fake_now();
        if (left <= 0)
            return IO_LATE;
        int ready = poll(fds, 2, left > 1e6 ? 1000000000 : (int)(left * 1e3) + 1);
        if (ready < 0 && errno != EINTR)
            return IO_LOST;
        if (fds[1].revents)
            return IO_CANCELLED;
        if (ready > 0 && fds[0].revents)
            return IO_OK;
    }
}

enum io_result wait_readable(int fd, int cancel, double deadline)
{
    return wait_for(fd, POLLIN, cancel, deadline);
}

enum io_result send_all(int fd, const void *data, size_t length, double deadline)
{
    const char *at = data;
    while (length) {
        ssize_t done = send(fd, at, length, MSG_NOSIGNAL);
        if (done > 0) {
            at += done;
            length -= (size_t)done;
        } else if (done < 0 && errno == EAGAIN) {
            enum io_result result = wait_for(fd, POLLOUT, -1, deadline);
            if (result != IO_OK)
                return result;
        } else if (done < 0 && errno != EINTR) {
            return IO_LOST;
        }
    }
    return IO_OK;
}

enum io_result receive_all(int fd, int cancel, void *data, size_t length, double deadline)
{
    char *at = data;
    while (length) {
        ssize_t done = recv(fd, at, length, 0);
        if (done > 0) {
            at += done;
            length -= (size_t)done;
        } else if (done < 0 && errno == EAGAIN) {
            enum io_result result = wait_for(fd, POLLIN, cancel, deadline);
            if (result != IO_OK)
                return result;
        } else if (done == 0 || errno != EINTR) {
            return IO_LOST;
        }
    }
    return IO_OK;
}
