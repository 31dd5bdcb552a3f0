/* An echo server that never loses a byte: `tcp_echo PORT [BACKLOG]`. With a backlog it listens on all addresses of
 * both versions of IP, and accepts nobody before SIGUSR2. It sends back what it got, in order, and keeps
 * what a client does not take yet, up to a limit beyond which it reads no more from it: both queues fill.
 * A connection may end only as its client ends it; any error fails. */
#include "workload.h"
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#define ROOM (256 << 10)

struct connection {
    int fd;
    size_t start, end;
    char *kept;
};

static int epoll;

static void watch(struct connection *c, int op, int fd, unsigned events)
{
    struct epoll_event event = {.events = events, .data.ptr = c};
    CHECK(epoll_ctl(epoll, op, fd, &event) == 0, "epoll_ctl");
}

static void take_new(int listener)
{
    int fd, one = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        struct connection *c = calloc(1, sizeof *c);
        CHECK(c, "memory");
        c->fd = fd;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        watch(c, EPOLL_CTL_ADD, fd, EPOLLIN);
    }
    CHECK(errno == EAGAIN, "accept");
}

/* Writes what is kept; true if nothing is left. */
static int flush(struct connection *c)
{
    while (c->start < c->end) {
        ssize_t sent = send(c->fd, c->kept + c->start, c->end - c->start, MSG_NOSIGNAL);
        if (sent < 0) {
            CHECK(errno == EAGAIN, "send");
            return 0;
        }
        c->start += (size_t)sent;
    }
    c->start = c->end = 0;
    return 1;
}

static void serve(struct connection *c)
{
    if (!c->kept)
        CHECK((c->kept = malloc(ROOM)), "memory");
    for (int turn = 0; turn < 16; turn++) {
        if (!flush(c)) {
            watch(c, EPOLL_CTL_MOD, c->fd, EPOLLOUT);
            return;
        }
        ssize_t got = recv(c->fd, c->kept, ROOM, 0);
        if (got < 0) {
            CHECK(errno == EAGAIN, "recv");
            break;
        }
        if (got == 0) {
            close(c->fd);
            free(c->kept);
            free(c);
            return;
        }
        c->end = (size_t)got;
        atomic_fetch_add(&steps, 1);
    }
    watch(c, EPOLL_CTL_MOD, c->fd, c->start < c->end ? EPOLLOUT : EPOLLIN);
}

static volatile sig_atomic_t may_accept;

static void on_go(int signal)
{
    (void)signal;
    may_accept = 1;
}

int main(int argc, char **argv)
{
    CHECK(argc == 2 || argc == 3, "usage");
    int patient = argc == 3, backlog = patient ? atoi(argv[2]) : 512, one = 1;
    struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1]))};
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = v4.sin_port};
    struct sockaddr *name = patient ? (struct sockaddr *)&v6 : (struct sockaddr *)&v4;
    int listener = socket(name->sa_family, SOCK_STREAM | SOCK_NONBLOCK, 0);
    CHECK(setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) == 0, "SO_REUSEADDR");
    CHECK(bind(listener, name, patient ? sizeof v6 : sizeof v4) == 0, "bind");
    CHECK(listen(listener, backlog) == 0, "listen");
    CHECK((epoll = epoll_create1(0)) >= 0, "epoll");
    may_accept = !patient;
    struct sigaction action = {.sa_handler = on_ask, .sa_flags = SA_RESTART};
    CHECK(sigaction(SIGUSR1, &action, NULL) == 0, "sigaction");
    action.sa_handler = on_go;
    CHECK(sigaction(SIGUSR2, &action, NULL) == 0, "sigaction");
    dprintf(1, "ready\n");
    for (;;) {
        struct epoll_event events[64];
        if (may_accept) {
            may_accept = 0;
            watch(NULL, EPOLL_CTL_ADD, listener, EPOLLIN);
        }
        int count = epoll_wait(epoll, events, 64, 100);
        CHECK(count >= 0 || errno == EINTR, "epoll_wait");
        for (int i = 0; i < count; i++) {
            if (events[i].data.ptr)
                serve(events[i].data.ptr);
            else
                take_new(listener);
        }
        atomic_fetch_add(&steps, 1);
        if (asked) {
            asked = 0;
            dprintf(1, "ok %llu\n", (unsigned long long)atomic_load(&steps));
        }
    }
}
