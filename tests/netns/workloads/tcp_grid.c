/* Holds connections in the states and with the queues that their clients ask for: `tcp_grid PORT FAMILY`.
 *
 * FAMILY is 4, or 6 for sockets of IPv6, which take clients of IPv4 as well.
 *
 * PORT has buffers of the usual size, PORT + 1 small ones. The first 32 bytes of a connection are an order,
 * which is carried out at once; the rest of the input stays unread until SIGUSR2. Then each connection
 * writes what was ordered for later, reads to the end, and is closed. Every byte is checked. On SIGUSR1 it
 * says how many orders it has, and how many of these connections have ended. */
#include "workload.h"
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#define MOST 8192
#define MAGIC 0x64697267
#define SMALL_BUFFER 16384

struct order {
    uint32_t magic;
    uint32_t cell;
    uint32_t write_now;
    uint32_t write_late;
    /* Not 0: connect from this port to the same one of the client; the order is for that connection. */
    uint16_t dial;
    /* 1: end the output after write_now. 2: likewise, when the end of the input has come. */
    uint8_t shut;
    uint8_t rest[13];
};

union name {
    struct sockaddr any;
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
};

struct connection {
    int fd;
    int has_order, has_shut, released;
    struct order order;
    uint64_t read, written;
};

static int epoll;
static struct connection *all[MOST];
static int used;
static unsigned orders, ended;
static volatile sig_atomic_t go;

static void on_go(int signal)
{
    (void)signal;
    go = 1;
}

static uint8_t byte_at(uint64_t at, uint32_t cell, uint32_t down)
{
    return (uint8_t)(((uint32_t)(at + 1) * 2654435761u + cell * 40503u + down * 7919u) >> 13);
}

static struct connection *hold(int fd, uint32_t events)
{
    struct connection *c = calloc(1, sizeof *c);
    int one = 1;
    CHECK(c && used < MOST, "memory");
    c->fd = fd;
    all[used++] = c;
    CHECK(setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one) == 0, "TCP_NODELAY");
    struct epoll_event event = {.events = events | EPOLLET, .data.ptr = c};
    CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) == 0, "epoll_ctl");
    return c;
}

static void write_bytes(struct connection *c, uint32_t count)
{
    uint8_t bytes[64 << 10];
    CHECK(count <= sizeof bytes, "an order for too much");
    for (uint32_t i = 0; i < count; i++)
        bytes[i] = byte_at(c->written + i, c->order.cell, 1);
    ssize_t sent = count ? send(c->fd, bytes, count, MSG_NOSIGNAL) : 0;
    CHECK(sent == (ssize_t)count, "cell %u: wrote %zd of %u", c->order.cell, sent, count);
    c->written += count;
}

static void shut(struct connection *c)
{
    c->has_shut = 1;
    CHECK(shutdown(c->fd, SHUT_WR) == 0, "cell %u: shutdown", c->order.cell);
}

/* A connection that we make: to the client that ordered it. */
static void dial(struct connection *orderer)
{
    union name local, remote;
    socklen_t len = sizeof local;
    int one = 1;
    CHECK(getsockname(orderer->fd, &local.any, &len) == 0, "getsockname");
    CHECK(getpeername(orderer->fd, &remote.any, &len) == 0, "getpeername");
    /* At the same place in both. */
    local.v4.sin_port = remote.v4.sin_port = htons(orderer->order.dial);
    int fd = socket(local.any.sa_family, SOCK_STREAM | SOCK_NONBLOCK, 0);
    CHECK(setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) == 0, "SO_REUSEADDR");
    CHECK(bind(fd, &local.any, len) == 0, "bind to dial");
    CHECK(connect(fd, &remote.any, len) < 0 && errno == EINPROGRESS, "connect");
    struct connection *c = hold(fd, EPOLLIN | EPOLLRDHUP);
    c->order = orderer->order;
    c->has_order = 1;
    orderer->order.write_late = 0;
}

static void take_order(struct connection *c)
{
    ssize_t got = recv(c->fd, &c->order, sizeof c->order, 0);
    if (got < 0 && errno == EAGAIN)
        return;
    CHECK(got == sizeof c->order && c->order.magic == MAGIC, "an order of %zd bytes", got);
    c->has_order = 1;
    c->read = sizeof c->order;
    if (c->order.dial) {
        dial(c);
    } else {
        write_bytes(c, c->order.write_now);
        if (c->order.shut == 1)
            shut(c);
    }
    orders++;
}

static void finish(struct connection *c)
{
    uint8_t bytes[64 << 10];
    for (;;) {
        ssize_t got = recv(c->fd, bytes, sizeof bytes, 0);
        if (got < 0) {
            CHECK(errno == EAGAIN, "cell %u: recv", c->order.cell);
            return;
        }
        if (got == 0)
            break;
        for (ssize_t i = 0; i < got; i++)
            CHECK(bytes[i] == byte_at(c->read + (uint64_t)i, c->order.cell, 0), "cell %u: byte %llu",
                  c->order.cell, (unsigned long long)(c->read + (uint64_t)i));
        c->read += (uint64_t)got;
    }
    dprintf(1, "end %u %llu %llu\n", c->order.cell, (unsigned long long)c->read,
            (unsigned long long)c->written);
    close(c->fd);
    c->fd = -1;
    ended++;
}

static void release_all(void)
{
    int kept = 0;
    for (int i = 0; i < used; i++) {
        struct connection *c = all[i];
        if (c->fd < 0) {
            free(c);
            continue;
        }
        all[kept++] = c;
        CHECK(c->has_order, "a connection without an order");
        c->released = 1;
        if (!c->has_shut)
            write_bytes(c, c->order.write_late);
        finish(c);
    }
    used = kept;
    dprintf(1, "went %d\n", kept);
}

static void on_event(struct connection *c, uint32_t events)
{
    if (c->fd < 0)
        return;
    if (!c->has_order)
        take_order(c);
    if (c->has_order && c->order.shut == 2 && !c->has_shut && (events & EPOLLRDHUP))
        shut(c);
    if (c->released)
        finish(c);
}

static void take_new(int listener)
{
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0)
        hold(fd, EPOLLIN | EPOLLRDHUP);
    CHECK(errno == EAGAIN, "accept");
}

static int listen_on(int port, int family, int buffer)
{
    union name name = {.v6 = {.sin6_family = family, .sin6_port = htons(port)}};
    socklen_t len = family == AF_INET ? sizeof name.v4 : sizeof name.v6;
    int fd = socket(family, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
    CHECK(setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) == 0, "SO_REUSEADDR");
    if (buffer)
        CHECK(setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &buffer, sizeof buffer) == 0, "SO_RCVBUF");
    CHECK(bind(fd, &name.any, len) == 0 && listen(fd, 4096) == 0, "listen");
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = (uint64_t)fd};
    CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) == 0, "epoll_ctl");
    return fd;
}

int main(int argc, char **argv)
{
    CHECK(argc == 3, "usage");
    CHECK((epoll = epoll_create1(0)) >= 0, "epoll");
    int port = atoi(argv[1]), family = atoi(argv[2]) == 6 ? AF_INET6 : AF_INET;
    int listeners[] = {listen_on(port, family, 0), listen_on(port + 1, family, SMALL_BUFFER)};
    struct sigaction asking = {.sa_handler = on_ask}, going = {.sa_handler = on_go};
    CHECK(sigaction(SIGUSR1, &asking, NULL) == 0 && sigaction(SIGUSR2, &going, NULL) == 0, "sigaction");
    dprintf(1, "ready\n");
    for (;;) {
        struct epoll_event events[64];
        int count = epoll_wait(epoll, events, 64, 100);
        CHECK(count >= 0 || errno == EINTR, "epoll_wait");
        for (int i = 0; i < count; i++) {
            uint64_t what = events[i].data.u64;
            if (what == (uint64_t)listeners[0] || what == (uint64_t)listeners[1])
                take_new((int)what);
            else
                on_event(events[i].data.ptr, events[i].events);
        }
        if (go) {
            go = 0;
            release_all();
        }
        if (asked) {
            asked = 0;
            dprintf(1, "ok %u %u\n", orders, ended);
        }
    }
}
