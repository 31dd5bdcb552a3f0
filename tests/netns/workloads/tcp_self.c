/* Connects to itself, and accepts only when it is told: `tcp_self LISTEN CONNECT PORT [closed_full]`. Its clients are of
 * every kind: that say nothing, little, much, more than fits, something all the time; that have ended their streams, that have closed. On SIGUSR2
 * it accepts them, in their order, both ends talk and end, and it begins anew. On SIGUSR1 it looks at what is
 * there meanwhile. What the kernel resets is an error. */
#include "workload.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

enum { SILENT, LITTLE, MUCH, FULL, TALKING, LITTLE_ENDED, MUCH_ENDED, SILENT_ENDED, MUCH_CLOSED, SILENT_CLOSED, KINDS };
enum { CLIENTS = 2 * KINDS, LENGTH = 30000, MOST_TALK = 20000 };

struct client {
    int fd, kind, port;
    size_t said;
};

static struct client clients[CLIENTS];
static int count, listener, port, only_full;
static const char *to;
static unsigned char text[1 << 16];

/* An address of either version, IPv4 in the form of IPv6 as well. */
static socklen_t name_of(const char *address, int at, struct sockaddr_storage *name)
{
    struct sockaddr_in *four = (void *)name;
    struct sockaddr_in6 *six = (void *)name;
    memset(name, 0, sizeof *name);
    if (strchr(address, ':')) {
        six->sin6_family = AF_INET6;
        six->sin6_port = htons(at);
        CHECK(inet_pton(AF_INET6, address, &six->sin6_addr) == 1, "%s", address);
        return sizeof *six;
    }
    four->sin_family = AF_INET;
    four->sin_port = htons(at);
    CHECK(inet_pton(AF_INET, address, &four->sin_addr) == 1, "%s", address);
    return sizeof *four;
}

/* Both have the port at the same place. */
static int port_of(struct sockaddr_storage *name)
{
    return ntohs(((struct sockaddr_in *)name)->sin_port);
}

static unsigned char byte(const struct client *c, size_t at)
{
    return (unsigned char)((size_t)(c - clients) * 7 + at + at / 251);
}

static void poll_for(int fd, short events, const char *what)
{
    struct pollfd look = {.fd = fd, .events = events};
    int64_t limit = now_ns(CLOCK_MONOTONIC) + LATE_NS;
    while (poll(&look, 1, 100) <= 0)
        CHECK(now_ns(CLOCK_MONOTONIC) < limit, "%s", what);
    CHECK(!(look.revents & (POLLERR | POLLNVAL)), "%s: %x", what, look.revents);
}

/* Writes the next bytes; as many as go if `length` is 0. */
static void say(struct client *c, size_t length)
{
    size_t end = c->said + length;
    while (length == 0 || c->said < end) {
        size_t piece = length && end - c->said < sizeof text ? end - c->said : sizeof text;
        for (size_t i = 0; i < piece; i++)
            text[i] = byte(c, c->said + i);
        ssize_t sent = send(c->fd, text, piece, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0) {
            CHECK(errno == EAGAIN, "send");
            if (length == 0)
                return;
            poll_for(c->fd, POLLOUT, "room");
            continue;
        }
        c->said += (size_t)sent;
    }
}

static void begin(struct client *c, int kind)
{
    struct sockaddr_storage name;
    socklen_t length = name_of(to, port, &name);
    struct sockaddr_storage own;
    name_of(to, 0, &own);
    *c = (struct client){.fd = socket(name.ss_family, SOCK_STREAM, 0), .kind = kind};
    CHECK(bind(c->fd, (struct sockaddr *)&own, length) == 0, "bind");
    CHECK(connect(c->fd, (struct sockaddr *)&name, length) == 0, "connect");
    length = sizeof name;
    CHECK(getsockname(c->fd, (struct sockaddr *)&name, &length) == 0, "getsockname");
    c->port = port_of(&name);
    if (kind == LITTLE || kind == LITTLE_ENDED)
        say(c, 5);
    if (kind == MUCH || kind == MUCH_ENDED || kind == MUCH_CLOSED)
        say(c, LENGTH);
    if (kind == FULL)
        say(c, 0);
    if (kind == LITTLE_ENDED || kind == MUCH_ENDED || kind == SILENT_ENDED)
        CHECK(shutdown(c->fd, SHUT_WR) == 0, "shutdown");
    if (kind == MUCH_CLOSED || kind == SILENT_CLOSED || only_full) {
        close(c->fd);
        c->fd = -1;
    }
}

static void begin_all(void)
{
    count = only_full ? 1 : CLIENTS;
    for (int i = 0; i < count; i++)
        begin(&clients[i], only_full ? FULL : i % KINDS);
}

/* So many wait to be accepted. */
static int waiting(void)
{
    struct tcp_info info = {0};
    socklen_t length = sizeof info;
    CHECK(getsockopt(listener, IPPROTO_TCP, TCP_INFO, &info, &length) == 0, "TCP_INFO");
    return (int)info.tcpi_unacked;
}

/* All wait, if they had the time to come, and nobody was told anything. */
static void look(void)
{
    int64_t limit = now_ns(CLOCK_MONOTONIC) + LATE_NS;
    while (waiting() != count) {
        struct timespec pause = {0, 1000000};
        CHECK(now_ns(CLOCK_MONOTONIC) < limit, "%d of %d wait", waiting(), count);
        nanosleep(&pause, NULL);
    }
    for (int i = 0; i < count; i++) {
        struct client *c = &clients[i];
        struct pollfd seen = {.fd = c->fd, .events = POLLIN};
        CHECK(c->fd < 0 || poll(&seen, 1, 0) == 0, "client %d hears something: %x", i, seen.revents);
    }
}

static void hear(int fd, struct client *c, size_t from, size_t to)
{
    static unsigned char heard[1 << 16];
    while (from < to) {
        poll_for(fd, POLLIN, "more of it");
        ssize_t got = recv(fd, heard, to - from < sizeof heard ? to - from : sizeof heard, MSG_DONTWAIT);
        CHECK(got > 0, "after %zu of %zu bytes of client %d", from, to, (int)(c - clients));
        for (ssize_t i = 0; i < got; i++, from++)
            CHECK(heard[i] == byte(c, from), "byte %zu of client %d", from, (int)(c - clients));
    }
}

static void hear_end(int fd, const char *whose)
{
    char more;
    poll_for(fd, POLLIN, whose);
    CHECK(recv(fd, &more, 1, MSG_DONTWAIT) == 0, "the end of %s", whose);
}

static void serve(struct client *c)
{
    struct sockaddr_storage name;
    socklen_t length = sizeof name;
    poll_for(listener, POLLIN, "the next one");
    int fd = accept(listener, (struct sockaddr *)&name, &length), error;
    CHECK(fd >= 0, "accept");
    CHECK(port_of(&name) == c->port, "%d in place of %d", port_of(&name), c->port);
    hear(fd, c, 0, c->said);
    int ended = c->kind >= LITTLE_ENDED || c->fd < 0;
    if (ended)
        hear_end(fd, "a client");
    if (c->fd >= 0) {
        CHECK(send(fd, "answer", 6, MSG_NOSIGNAL) == 6, "answer");
        char answer[6];
        for (size_t at = 0; at < 6;) {
            poll_for(c->fd, POLLIN, "the answer");
            ssize_t got = recv(c->fd, answer + at, 6 - at, MSG_DONTWAIT);
            CHECK(got > 0, "the answer");
            at += (size_t)got;
        }
        CHECK(memcmp(answer, "answer", 6) == 0, "another answer");
        if (!ended) {
            size_t before = c->said;
            say(c, 1000);
            hear(fd, c, before, c->said);
            CHECK(shutdown(c->fd, SHUT_WR) == 0, "shutdown");
            hear_end(fd, "a client");
        }
    }
    length = sizeof error;
    CHECK(getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) == 0 && error == 0, "error %d", error);
    close(fd);
    if (c->fd >= 0) {
        hear_end(c->fd, "the server");
        close(c->fd);
    }
}

static volatile sig_atomic_t may_accept;

static void on_go(int signal)
{
    (void)signal;
    may_accept = 1;
}

static void often(void)
{
    for (int i = 0; i < count; i++)
        if (clients[i].kind == TALKING && clients[i].said < MOST_TALK)
            say(&clients[i], 1);
    if (!may_accept)
        return;
    may_accept = 0;
    int64_t before = now_ns(CLOCK_MONOTONIC);
    for (int i = 0; i < count; i++)
        serve(&clients[i]);
    int64_t took = now_ns(CLOCK_MONOTONIC) - before;
    only_full = 0;
    begin_all();
    dprintf(1, "served in %lld ms\n", (long long)(took / 1000000));
}

int main(int argc, char **argv)
{
    struct sockaddr_storage name;
    CHECK(argc == 4 || argc == 5, "usage");
    to = argv[2];
    port = atoi(argv[3]);
    only_full = argc == 5;
    socklen_t length = name_of(argv[1], port, &name);
    listener = socket(name.ss_family, SOCK_STREAM, 0);
    int one = 1;
    CHECK(setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) == 0, "SO_REUSEADDR");
    CHECK(bind(listener, (struct sockaddr *)&name, length) == 0, "bind");
    CHECK(listen(listener, CLIENTS) == 0, "listen");
    struct sigaction action = {.sa_handler = on_go, .sa_flags = SA_RESTART};
    CHECK(sigaction(SIGUSR2, &action, NULL) == 0, "sigaction");
    begin_all();
    verify_forever(often, look);
}
