/* Descriptors and what is behind them. */
#include "zoo.h"
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

static int fds[8], many[300];
static char path[64];

static void eventfd_prepare(void)
{
    fds[0] = eventfd(41, EFD_NONBLOCK | EFD_CLOEXEC);
    fds[1] = eventfd(3, EFD_SEMAPHORE | EFD_NONBLOCK);
}
static void eventfd_fully(void)
{
    uint64_t value;
    CHECK(read(fds[0], &value, 8) == 8 && value == 41, "%llu", (unsigned long long)value);
    CHECK(read(fds[0], &value, 8) < 0 && errno == EAGAIN, "not empty");
    for (int i = 0; i < 3; i++)
        CHECK(read(fds[1], &value, 8) == 8 && value == 1, "semaphore %d", i);
    CHECK(read(fds[1], &value, 8) < 0 && errno == EAGAIN, "semaphore not empty");
    value = 41;
    CHECK(write(fds[0], &value, 8) == 8, "write");
    value = 3;
    CHECK(write(fds[1], &value, 8) == 8, "write");
}

#define IN_PIPE 200000

static void fill_pipe(void)
{
    static char bytes[IN_PIPE];
    for (int i = 0; i < IN_PIPE; i++)
        bytes[i] = (char)(i * 7 + i / 4096);
    CHECK(write(fds[1], bytes, IN_PIPE) == IN_PIPE, "write");
}
static void pipe_prepare(void)
{
    CHECK(pipe2(fds, O_CLOEXEC | O_NONBLOCK) == 0 && pipe2(fds + 2, O_DIRECT) == 0, "pipe2");
    CHECK(fcntl(fds[1], F_SETPIPE_SZ, 262144) == 262144, "size");
    fill_pipe();
    CHECK(write(fds[3], "one", 3) == 3 && write(fds[3], "two!", 4) == 4, "packets");
}
static void pipe_fully(void)
{
    static char bytes[IN_PIPE + 1];
    int waiting;
    CHECK(ioctl(fds[0], FIONREAD, &waiting) == 0 && waiting == IN_PIPE, "%d waiting", waiting);
    CHECK(fcntl(fds[0], F_GETPIPE_SZ) == 262144, "size");
    CHECK(fcntl(fds[0], F_GETFL) & O_NONBLOCK && fcntl(fds[0], F_GETFD) == FD_CLOEXEC, "flags");
    CHECK(read(fds[0], bytes, sizeof bytes) == IN_PIPE, "read");
    for (int i = 0; i < IN_PIPE; i++)
        CHECK(bytes[i] == (char)(i * 7 + i / 4096), "byte %d", i);
    fill_pipe();
    CHECK(read(fds[2], bytes, 100) == 3 && memcmp(bytes, "one", 3) == 0, "first packet");
    CHECK(read(fds[2], bytes, 100) == 4 && memcmp(bytes, "two!", 4) == 0, "second packet");
    CHECK(write(fds[3], "one", 3) == 3 && write(fds[3], "two!", 4) == 4, "packets");
}
/* A pipe whose writing end is closed ends after its contents, one byte less at every check. */
static void pipe_closed_prepare(void)
{
    CHECK(pipe(fds) == 0 && write(fds[1], "0123456789", 10) == 10 && close(fds[1]) == 0, "pipe");
}
static void pipe_closed_fully(void)
{
    static int taken;
    char byte;
    ssize_t got = read(fds[0], &byte, 1);
    CHECK(taken < 10 ? got == 1 && byte == '0' + taken : got == 0, "after %d bytes", taken);
    taken++;
}

static void send_messages(void)
{
    for (int i = 1; i < 6; i++) {
        char text[600];
        memset(text, 'a' + i, sizeof text);
        CHECK(send(fds[0], text, (size_t)i * 100, 0) == i * 100, "stream");
        CHECK(send(fds[3], text, (size_t)i * 100, 0) == i * 100, "datagram");
        CHECK(send(fds[4], text, (size_t)i * 100, 0) == i * 100, "packet");
    }
}
static void pair_prepare(void)
{
    int buffer = 100000;
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0, "stream");
    CHECK(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0, fds + 2) == 0, "datagram");
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, fds + 4) == 0, "packet");
    CHECK(setsockopt(fds[0], SOL_SOCKET, SO_SNDBUF, &buffer, sizeof buffer) == 0, "SO_SNDBUF");
    send_messages();
}
static void pair_fully(void)
{
    char text[2000];
    int buffer;
    socklen_t length = sizeof buffer;
    CHECK(getsockopt(fds[0], SOL_SOCKET, SO_SNDBUF, &buffer, &length) == 0 && buffer == 200000, "%d", buffer);
    CHECK(recv(fds[1], text, sizeof text, MSG_DONTWAIT) == 1500, "stream");
    for (int i = 1, at = 0; i < 6; at += i * 100, i++)
        CHECK(text[at] == 'a' + i && text[at + i * 100 - 1] == 'a' + i, "stream part %d", i);
    for (int i = 1; i < 6; i++) {
        CHECK(recv(fds[2], text, sizeof text, MSG_DONTWAIT) == i * 100 && text[0] == 'a' + i, "datagram %d", i);
        CHECK(recv(fds[5], text, sizeof text, MSG_DONTWAIT) == i * 100 && text[0] == 'a' + i, "packet %d", i);
    }
    CHECK(recv(fds[2], text, sizeof text, 0) < 0 && errno == EAGAIN, "one too many");
    send_messages();
}

/* One open file shared by two numbers, another open of the same file, and an appending one. */
static void file_prepare(void)
{
    snprintf(path, sizeof path, "/run/shared/zoo-file-%d", getpid());
    CHECK((fds[0] = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0640)) >= 0, "%s", path);
    CHECK(write(fds[0], "0123456789abcdef", 16) == 16, "write");
    fds[1] = dup(fds[0]);
    fds[2] = open(path, O_RDONLY);
    fds[3] = open(path, O_WRONLY | O_APPEND);
    CHECK((fds[4] = fcntl(fds[0], F_DUPFD, 900)) == 900, "a high number");
    CHECK(lseek(fds[0], 5, SEEK_SET) == 5 && lseek(fds[2], 11, SEEK_SET) == 11, "lseek");
}
static void file_fully(void)
{
    char byte;
    CHECK(lseek(fds[1], 0, SEEK_CUR) == 5 && lseek(fds[4], 0, SEEK_CUR) == 5, "shared position");
    CHECK(lseek(fds[2], 0, SEEK_CUR) == 11, "own position");
    CHECK(read(fds[1], &byte, 1) == 1 && byte == '5' && lseek(fds[0], 0, SEEK_CUR) == 6, "shared position moves");
    CHECK(read(fds[2], &byte, 1) == 1 && byte == 'b' && lseek(fds[0], 0, SEEK_CUR) == 6, "own position moves");
    CHECK(lseek(fds[0], 5, SEEK_SET) == 5 && lseek(fds[2], 11, SEEK_SET) == 11, "lseek");
    CHECK((fcntl(fds[3], F_GETFL) & (O_APPEND | O_ACCMODE)) == (O_APPEND | O_WRONLY), "flags");
    CHECK((fcntl(fds[2], F_GETFL) & O_ACCMODE) == O_RDONLY, "read only");
    CHECK(fcntl(fds[0], F_GETFD) == FD_CLOEXEC && fcntl(fds[1], F_GETFD) == 0, "close on exec");
}

static void dev_prepare(void)
{
    fds[0] = open("/dev/null", O_RDWR);
    fds[1] = open("/dev/zero", O_RDONLY);
    fds[2] = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
    fds[3] = open("/", O_RDONLY | O_DIRECTORY);
}
static void dev_fully(void)
{
    char bytes[8] = "written";
    CHECK(write(fds[0], bytes, 8) == 8 && read(fds[0], bytes, 8) == 0, "null");
    CHECK(read(fds[1], bytes, 8) == 8 && memcmp(bytes, "\0\0\0\0\0\0\0", 8) == 0, "zero");
    CHECK(read(fds[2], bytes, 8) == 8, "urandom");
    CHECK(openat(fds[3], "proc/self/nothing", O_RDONLY) < 0 && errno == ENOENT, "directory");
}

static void epoll_prepare(void)
{
    struct epoll_event level = {.events = EPOLLIN, .data.u64 = 0x1234567890abcdefULL};
    struct epoll_event edge = {.events = EPOLLIN | EPOLLET, .data.u64 = 2};
    struct epoll_event once = {.events = EPOLLIN | EPOLLONESHOT, .data.u64 = 3};
    fds[0] = epoll_create1(EPOLL_CLOEXEC);
    fds[1] = eventfd(1, 0);
    fds[2] = eventfd(0, 0);
    fds[3] = eventfd(0, 0);
    CHECK(epoll_ctl(fds[0], EPOLL_CTL_ADD, fds[1], &level) == 0, "level");
    CHECK(epoll_ctl(fds[0], EPOLL_CTL_ADD, fds[2], &edge) == 0, "edge");
    CHECK(epoll_ctl(fds[0], EPOLL_CTL_ADD, fds[3], &once) == 0, "once");
}
static uint64_t wait_masks(void)
{
    struct epoll_event got[4];
    uint64_t seen = 0;
    int count = epoll_wait(fds[0], got, 4, 0);
    CHECK(count >= 0, "epoll_wait");
    for (int i = 0; i < count; i++)
        seen |= got[i].data.u64 == 0x1234567890abcdefULL ? 1 : 1ULL << (got[i].data.u64 - 1);
    return seen;
}
static void epoll_fully(void)
{
    uint64_t one = 1, value;
    CHECK(wait_masks() == 1, "level alone");
    CHECK(write(fds[2], &one, 8) == 8 && write(fds[3], &one, 8) == 8, "write");
    CHECK(wait_masks() == 7, "all three");
    CHECK(wait_masks() == 1, "edge and once must be silent now");
    CHECK(read(fds[2], &value, 8) == 8 && read(fds[3], &value, 8) == 8, "read");
    struct epoll_event once = {.events = EPOLLIN | EPOLLONESHOT, .data.u64 = 3};
    CHECK(epoll_ctl(fds[0], EPOLL_CTL_MOD, fds[3], &once) == 0, "arm again");
}

static struct sockaddr_in6 where;

static void listening_prepare(void)
{
    int one = 1, seconds = 30;
    socklen_t length = sizeof where;
    where.sin6_family = AF_INET6;
    where.sin6_addr = in6addr_any;
    where.sin6_port = htons(4242);
    fds[0] = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    CHECK(setsockopt(fds[0], SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) == 0, "SO_REUSEADDR");
    CHECK(setsockopt(fds[0], SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one) == 0, "SO_KEEPALIVE");
    CHECK(setsockopt(fds[0], IPPROTO_TCP, TCP_NODELAY, &one, sizeof one) == 0, "TCP_NODELAY");
    CHECK(setsockopt(fds[0], IPPROTO_TCP, TCP_KEEPIDLE, &seconds, sizeof seconds) == 0, "TCP_KEEPIDLE");
    CHECK(bind(fds[0], (struct sockaddr *)&where, length) == 0 && listen(fds[0], 7) == 0, "listen");
}
static int option(int level, int which)
{
    int value = -1;
    socklen_t length = sizeof value;
    CHECK(getsockopt(fds[0], level, which, &value, &length) == 0, "option %d %d", level, which);
    return value;
}
static void listening_fully(void)
{
    struct sockaddr_in6 name;
    struct tcp_info info;
    socklen_t length = sizeof name;
    CHECK(getsockname(fds[0], (struct sockaddr *)&name, &length) == 0 && name.sin6_port == htons(4242), "name");
    CHECK(option(SOL_SOCKET, SO_REUSEADDR) && option(SOL_SOCKET, SO_KEEPALIVE), "socket options");
    CHECK(option(IPPROTO_TCP, TCP_NODELAY) && option(IPPROTO_TCP, TCP_KEEPIDLE) == 30, "TCP options");
    length = sizeof info;
    CHECK(getsockopt(fds[0], IPPROTO_TCP, TCP_INFO, &info, &length) == 0 && info.tcpi_sacked == 7, "backlog");
    int client = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct linger hard = {1, 0};
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(4242)};
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    CHECK(accept(fds[0], NULL, NULL) < 0 && errno == EAGAIN, "someone came");
    CHECK(setsockopt(client, SOL_SOCKET, SO_LINGER, &hard, sizeof hard) == 0, "SO_LINGER");
    CHECK(connect(client, (struct sockaddr *)&to, sizeof to) == 0, "connect");
    int got = accept(fds[0], NULL, NULL);
    CHECK(got >= 0, "accept");
    close(client);
    close(got);
}

static void many_prepare(void)
{
    struct rlimit limit;
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0, "getrlimit");
    limit.rlim_cur = limit.rlim_max < 4096 ? limit.rlim_max : 4096;
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0, "setrlimit");
    for (int i = 0; i < 300; i++)
        CHECK((many[i] = eventfd((unsigned)i, EFD_NONBLOCK)) >= 0, "eventfd %d", i);
}
static void many_fully(void)
{
    for (int i = 0; i < 300; i++) {
        uint64_t value = 0;
        ssize_t got = read(many[i], &value, 8);
        CHECK(i == 0 ? got < 0 : got == 8 && value == (uint64_t)i, "eventfd %d", i);
        CHECK(write(many[i], &value, 8) == 8, "write");
    }
}

ZOO({"eventfd", eventfd_prepare, NULL, eventfd_fully},
    {"pipe", pipe_prepare, NULL, pipe_fully},
    {"pipe_closed", pipe_closed_prepare, NULL, pipe_closed_fully},
    {"socketpair", pair_prepare, NULL, pair_fully},
    {"file", file_prepare, NULL, file_fully},
    {"devices", dev_prepare, NULL, dev_fully},
    {"epoll", epoll_prepare, NULL, epoll_fully},
    {"listening", listening_prepare, NULL, listening_fully},
    {"many", many_prepare, NULL, many_fully})
