/* Has connections to itself of which one end is not there: `tcp_own KIND PORT`.
 * `closed`: their clients have closed, and said all they had to say before; it has accepted them, and reads when it is
 * told (SIGUSR2). `asked`: there is no room for them in the queue, so it is asking still; on SIGUSR2 it accepts them.
 * `asking`: it asks for another one all the time, and each is served. `sibling`: nothing of all that, but it listens at
 * the same place, where other processes may as well. `crowd`: some of its connections wait to be accepted by a sibling;
 * on SIGUSR2 whichever it gets are served. */
#include "workload.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

enum { MOST = 63, LENGTH = 30000 };

static struct sockaddr_in place = {.sin_family = AF_INET};
static int listener, clients[MOST], servers[MOST], greeted[MOST], count;
static unsigned char text[LENGTH];
static volatile sig_atomic_t told;

static void on_go(int signal)
{
    (void)signal;
    told = 1;
}

static void wait_for(int fd, short events, const char *what)
{
    struct pollfd look = {.fd = fd, .events = events};
    int64_t limit = now_ns(CLOCK_MONOTONIC) + LATE_NS;
    while (poll(&look, 1, 100) <= 0)
        CHECK(now_ns(CLOCK_MONOTONIC) < limit, "%s", what);
}

static int ask(int flags)
{
    int fd = socket(AF_INET, SOCK_STREAM | flags, 0);
    CHECK(fd >= 0, "socket");
    CHECK(connect(fd, (struct sockaddr *)&place, sizeof place) == 0 || errno == EINPROGRESS, "connect");
    return fd;
}

static int state(int fd)
{
    struct tcp_info info;
    socklen_t length = sizeof info;
    CHECK(getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length) == 0, "TCP_INFO");
    return info.tcpi_state;
}

static void greet(int client)
{
    CHECK(send(client, "hello", 5, MSG_NOSIGNAL) == 5, "hello");
}

/* Both ends talk, and end. */
static void serve(int server, int client)
{
    char said[6];
    wait_for(server, POLLIN, "a word");
    CHECK(recv(server, said, sizeof said, 0) == 5, "a word");
    CHECK(send(server, "answer", 6, MSG_NOSIGNAL) == 6, "answer");
    wait_for(client, POLLIN, "an answer");
    CHECK(recv(client, said, sizeof said, 0) == 6, "an answer");
    close(client);
    wait_for(server, POLLIN, "an end");
    CHECK(recv(server, said, sizeof said, 0) == 0, "an end");
    close(server);
}

static void begin_closed(void)
{
    for (count = 0; count < 8; count++) {
        int client = ask(0);
        if (count % 2)
            CHECK(send(client, text, LENGTH, 0) == LENGTH, "send");
        servers[count] = accept(listener, NULL, NULL);
        CHECK(servers[count] >= 0, "accept");
        /* An end that was acknowledged, and one that was not, before it is closed. */
        if (count % 4 < 2)
            CHECK(shutdown(client, SHUT_WR) == 0, "shutdown");
        close(client);
        while (state(servers[count]) != TCP_CLOSE_WAIT)
            wait_for(servers[count], POLLRDHUP, "the end");
    }
}

static void end_closed(void)
{
    static unsigned char heard[LENGTH];
    for (int i = 0; i < count; i++) {
        size_t all = i % 2 ? LENGTH : 0;
        if (all)
            CHECK(recv(servers[i], heard, all, MSG_WAITALL) == (ssize_t)all && memcmp(heard, text, all) == 0, "%d", i);
        CHECK(recv(servers[i], heard, 1, 0) == 0, "the end of %d", i);
        /* It hears that nobody is there. */
        send(servers[i], "x", 1, MSG_NOSIGNAL);
        wait_for(servers[i], POLLERR, "a reset");
        CHECK(send(servers[i], "x", 1, MSG_NOSIGNAL) == -1, "%d is heard", i);
        close(servers[i]);
    }
}

static void begin_asked(void)
{
    for (count = 0; count < 5; count++)
        clients[count] = ask(SOCK_NONBLOCK);
    int asking = 0;
    for (int i = 0; i < count; i++)
        asking += state(clients[i]) == TCP_SYN_SENT;
    CHECK(asking > 0, "there is room for all");
}

/* Whichever end belongs to whichever. */
static void serve_all(int many)
{
    for (int left = many; left > 0; left--) {
        struct sockaddr_in theirs, ours;
        socklen_t length = sizeof theirs;
        /* Where many ask at once, the kernel may forget one that has its answer, until that says something. */
        struct pollfd look[MOST + 1];
        int64_t limit = now_ns(CLOCK_MONOTONIC) + LATE_NS;
        do {
            CHECK(now_ns(CLOCK_MONOTONIC) < limit, "the next one");
            look[0] = (struct pollfd){.fd = listener, .events = POLLIN};
            for (int i = 0; i < count; i++)
                look[i + 1] = (struct pollfd){.fd = greeted[i] ? -1 : clients[i], .events = POLLOUT};
            poll(look, count + 1, 100);
            for (int i = 0; i < count; i++) {
                if (!(look[i + 1].revents & POLLOUT))
                    continue;
                greet(clients[i]);
                greeted[i] = 1;
            }
        } while (!(look[0].revents & POLLIN));
        int server = accept(listener, (struct sockaddr *)&theirs, &length), found = -1;
        CHECK(server >= 0, "accept");
        for (int i = 0; i < count; i++) {
            length = sizeof ours;
            if (clients[i] >= 0 && getsockname(clients[i], (struct sockaddr *)&ours, &length) == 0 &&
                ours.sin_port == theirs.sin_port)
                found = i;
        }
        CHECK(found >= 0, "a client that nobody knows");
        CHECK(greeted[found], "one that did not know");
        CHECK(fcntl(clients[found], F_SETFL, 0) == 0, "fcntl");
        serve(server, clients[found]);
        clients[found] = -1;
    }
}

static void end_asked(void)
{
    serve_all(count);
}

static void end_crowd(void)
{
    struct tcp_info info;
    socklen_t length = sizeof info;
    CHECK(getsockopt(listener, IPPROTO_TCP, TCP_INFO, &info, &length) == 0, "TCP_INFO");
    serve_all((int)info.tcpi_unacked);
}

static void begin_crowd(void)
{
    for (count = 0; count < 20; count++)
        clients[count] = ask(0);
}

static void keep_asking(void)
{
    int client = ask(SOCK_NONBLOCK);
    wait_for(client, POLLOUT, "being connected");
    int error;
    socklen_t length = sizeof error;
    CHECK(getsockopt(client, SOL_SOCKET, SO_ERROR, &error, &length) == 0 && error == 0, "error %d", error);
    greet(client);
    wait_for(listener, POLLIN, "the next one");
    int server = accept(listener, NULL, NULL);
    CHECK(server >= 0, "accept");
    serve(server, client);
}

static void (*end_it)(void);

static void often(void)
{
    if (!end_it)
        keep_asking();
    if (!told || !end_it)
        return;
    told = 0;
    end_it();
    dprintf(1, "served\n");
}

static void nothing(void)
{
}

int main(int argc, char **argv)
{
    CHECK(argc == 3, "usage");
    const char *kind = argv[1];
    place.sin_port = htons(atoi(argv[2]));
    place.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (int i = 0; i < LENGTH; i++)
        text[i] = (unsigned char)(i * 7 + i / 251);
    listener = socket(AF_INET, SOCK_STREAM, 0);
    int one = 1, is_shared = strcmp(kind, "sibling") == 0 || strcmp(kind, "crowd") == 0;
    CHECK(setsockopt(listener, SOL_SOCKET, is_shared ? SO_REUSEPORT : SO_REUSEADDR, &one, sizeof one) == 0, "option");
    CHECK(bind(listener, (struct sockaddr *)&place, sizeof place) == 0, "bind");
    CHECK(listen(listener, strcmp(kind, "asked") ? MOST : 1) == 0, "listen");
    struct sigaction action = {.sa_handler = on_go, .sa_flags = SA_RESTART};
    CHECK(sigaction(SIGUSR2, &action, NULL) == 0, "sigaction");
    end_it = nothing;
    if (strcmp(kind, "closed") == 0) {
        begin_closed();
        end_it = end_closed;
    } else if (strcmp(kind, "asked") == 0) {
        begin_asked();
        end_it = end_asked;
    } else if (strcmp(kind, "crowd") == 0) {
        begin_crowd();
        end_it = end_crowd;
    } else if (strcmp(kind, "asking") == 0) {
        end_it = NULL;
    }
    verify_forever(often, NULL);
}
