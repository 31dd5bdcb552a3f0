/* Descriptors that are used in unusual ways. */
#include "zoo.h"
#include <dirent.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>

static int fds[8];

/* One-shot registrations that have fired stay silent until they are armed again. */
static void watch(int epoll, int op, int fd, uint32_t events, uint64_t data)
{
    struct epoll_event event = {.events = events, .data.u64 = data};
    CHECK(epoll_ctl(epoll, op, fd, &event) == 0, "epoll_ctl %d of %d", op, fd);
}
static int ready(int epoll, uint64_t *data)
{
    struct epoll_event event;
    int count = epoll_wait(epoll, &event, 1, 0);
    *data = count == 1 ? event.data.u64 : 0;
    return count;
}
static void fired_prepare(void)
{
    uint64_t data;
    fds[0] = epoll_create1(EPOLL_CLOEXEC);
    fds[1] = eventfd(7, 0);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fds + 2) == 0 && write(fds[3], "x", 1) == 1, "pair");
    fds[4] = eventfd(0, 0);
    watch(fds[0], EPOLL_CTL_ADD, fds[1], EPOLLIN | EPOLLONESHOT, 1);
    watch(fds[0], EPOLL_CTL_ADD, fds[2], EPOLLIN | EPOLLONESHOT | EPOLLET, 2);
    CHECK(ready(fds[0], &data) == 1 && ready(fds[0], &data) == 1 && ready(fds[0], &data) == 0, "fire");
    watch(fds[0], EPOLL_CTL_ADD, fds[4], EPOLLIN, 3);
}
static void fired_fully(void)
{
    uint64_t data, one = 1;
    CHECK(ready(fds[0], &data) == 0, "%llu has come", (unsigned long long)data);
    CHECK(write(fds[4], &one, 8) == 8 && ready(fds[0], &data) == 1 && data == 3, "the other one");
    CHECK(read(fds[4], &one, 8) == 8, "read");
    for (uint64_t i = 1; i <= 2; i++) {
        watch(fds[0], EPOLL_CTL_MOD, fds[i], EPOLLIN | EPOLLONESHOT, i);
        CHECK(ready(fds[0], &data) == 1 && data == i && ready(fds[0], &data) == 0, "armed again");
    }
}

/* An epoll in an epoll, an exclusive registration, one whose number is closed and one whose number is another. */
static void nested_prepare(void)
{
    fds[0] = epoll_create1(0);
    fds[1] = epoll_create1(0);
    fds[2] = eventfd(0, EFD_NONBLOCK);
    fds[3] = eventfd(0, EFD_NONBLOCK);
    fds[4] = eventfd(0, EFD_NONBLOCK);
    watch(fds[1], EPOLL_CTL_ADD, fds[2], EPOLLIN | EPOLLEXCLUSIVE, 5);
    watch(fds[0], EPOLL_CTL_ADD, fds[1], EPOLLIN, 6);
    watch(fds[0], EPOLL_CTL_ADD, fds[3], EPOLLIN, 7);
    watch(fds[0], EPOLL_CTL_ADD, fds[4], EPOLLIN, 8);
    fds[5] = dup(fds[3]);
    fds[6] = dup(fds[4]);
    CHECK(close(fds[3]) == 0 && dup2(0, fds[4]) == fds[4], "close");
}
static void nested_fully(void)
{
    uint64_t data, value = 1;
    CHECK(ready(fds[0], &data) == 0, "quiet");
    CHECK(write(fds[2], &value, 8) == 8 && ready(fds[0], &data) == 1 && data == 6, "outer");
    CHECK(ready(fds[1], &data) == 1 && data == 5 && read(fds[2], &value, 8) == 8, "inner");
    CHECK(write(fds[5], &value, 8) == 8 && ready(fds[0], &data) == 1 && data == 7, "closed");
    CHECK(read(fds[5], &value, 8) == 8 && ready(fds[0], &data) == 0, "closed, quiet");
    CHECK(write(fds[6], &value, 8) == 8 && ready(fds[0], &data) == 1 && data == 8, "used again");
    CHECK(read(fds[6], &value, 8) == 8 && ready(fds[0], &data) == 0, "used again, quiet");
}

/* A directory in the middle of being read goes on where it was. */
static DIR *list;
static int entries_seen;
static char folder[64];
static void directory_prepare(void)
{
    snprintf(folder, sizeof folder, "/run/shared/list-%d", getpid());
    CHECK(mkdir(folder, 0700) == 0, "mkdir");
    for (int i = 0; i < 3000; i++) {
        char name[128];
        snprintf(name, sizeof name, "%s/an entry with a long name so that it takes many calls %d", folder, i);
        int fd = open(name, O_CREAT | O_WRONLY, 0600);
        CHECK(fd >= 0 && close(fd) == 0, "%s", name);
    }
    list = opendir(folder);
    for (; entries_seen < 500; entries_seen++)
        CHECK(readdir(list), "readdir");
}
static void directory_fully(void)
{
    int want = entries_seen + 500;
    for (; entries_seen < want && entries_seen < 3002; entries_seen++)
        CHECK(readdir(list), "only %d entries", entries_seen);
    if (entries_seen == 3002)
        CHECK(!readdir(list), "more entries than there are");
}

/* Signals for input, with a signal of one's own. */
static volatile int signalled;
static volatile int by_fd;
static void on_input(int signal, siginfo_t *info, void *context)
{
    (void)signal;
    (void)context;
    signalled++;
    by_fd = info->si_fd;
}
static void async_prepare(void)
{
    struct sigaction action = {.sa_sigaction = on_input, .sa_flags = SA_RESTART | SA_SIGINFO};
    CHECK(sigaction(SIGRTMIN + 3, &action, NULL) == 0 && socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0, "pair");
    CHECK(fcntl(fds[0], F_SETOWN, getpid()) == 0 && fcntl(fds[0], F_SETSIG, SIGRTMIN + 3) == 0, "owner");
    CHECK(fcntl(fds[0], F_SETFL, O_ASYNC | O_NONBLOCK) == 0, "async");
    CHECK(pipe(fds + 2) == 0 && fcntl(fds[2], F_SETOWN, getpid()) == 0, "owner");
    CHECK(fcntl(fds[2], F_SETSIG, SIGRTMIN + 3) == 0 && fcntl(fds[2], F_SETFL, O_ASYNC) == 0, "async");
}
static void async_fully(void)
{
    char byte;
    for (int i = 0; i < 4; i += 2) {
        int was = signalled;
        CHECK(write(fds[i + 1], "x", 1) == 1, "write");
        CHECK(signalled > was && by_fd == fds[i], "signals %d, fd %d", signalled, by_fd);
        CHECK(read(fds[i], &byte, 1) == 1, "read");
    }
}

/* Two thousand descriptors. */
#define CROWD 2000
static int crowd[CROWD];
static void crowd_prepare(void)
{
    struct rlimit limit = {CROWD + 64, CROWD + 64};
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0, "setrlimit");
    for (int i = 0; i < CROWD; i++)
        CHECK((crowd[i] = i % 2 ? eventfd((unsigned)i, EFD_NONBLOCK) : dup(crowd[i ? i - 1 : 0])) >= 0 || i == 0, "fd %d", i);
}
static void crowd_fully(void)
{
    for (int i = 1; i < CROWD; i += 2) {
        uint64_t value;
        CHECK(read(crowd[i], &value, 8) == 8 && value == (uint64_t)i, "eventfd %d", i);
        CHECK(write(crowd[i], &value, 8) == 8, "write");
    }
}

/* Names without files behind them: O_PATH, with O_NOFOLLOW on nothing special; files with every flag. */
static void flags_prepare(void)
{
    char path[64];
    snprintf(path, sizeof path, "/run/shared/flags-%d", getpid());
    fds[0] = open(path, O_CREAT | O_RDWR | O_NOATIME | O_SYNC, 0600);
    fds[1] = open(path, O_PATH);
    fds[2] = open("/run/shared", O_PATH | O_DIRECTORY | O_NOFOLLOW);
    fds[3] = open(path, O_WRONLY | O_APPEND | O_DSYNC | O_NONBLOCK);
    fds[4] = open(path, 3);
    CHECK(fds[0] >= 0 && fds[1] >= 0 && fds[2] >= 0 && fds[3] >= 0 && fds[4] >= 0, "open");
    CHECK(write(fds[0], "0123456789", 10) == 10 && lseek(fds[0], 1L << 40, SEEK_SET) == 1L << 40, "far");
    for (int i = 0; i < 5; i++)
        fds[i] |= fcntl(fds[i], F_GETFL) << 8;
}
static void flags_fully(void)
{
    for (int i = 0; i < 5; i++)
        CHECK(fcntl(fds[i] & 0xff, F_GETFL) == fds[i] >> 8, "%d: %x not %x", i, fcntl(fds[i] & 0xff, F_GETFL), fds[i] >> 8);
    CHECK(lseek(fds[0] & 0xff, 0, SEEK_CUR) == 1L << 40, "position");
}

/* What tells of the process and of the machine, read a little. */
static void views_prepare(void)
{
    char path[64], first;
    snprintf(path, sizeof path, "/proc/self/task/%d/status", getpid());
    const char *names[] = {"/proc/self/stat", path, "/proc/meminfo", "/proc/uptime"};
    for (int i = 0; i < 4; i++) {
        fds[i] = open(names[i], O_RDONLY | O_CLOEXEC);
        CHECK(fds[i] >= 0 && read(fds[i], &first, 1) == 1, "%s", names[i]);
    }
}
static void views_fully(void)
{
    char text[256], expected[64];
    snprintf(expected, sizeof expected, "%d (", getpid());
    const char *first[] = {expected, "Name:", "MemTotal:", ""};
    for (int i = 0; i < 4; i++) {
        CHECK(lseek(fds[i], 0, SEEK_CUR) == 1 && lseek(fds[i], 0, SEEK_SET) == 0, "position of %d", i);
        ssize_t n = read(fds[i], text, sizeof text - 1);
        CHECK(n > 5 && strncmp(text, first[i], strlen(first[i])) == 0, "%d begins otherwise", i);
        CHECK(lseek(fds[i], 1, SEEK_SET) == 1, "back");
    }
}

/* A pipe full by pages that are mostly empty. */
static void sparse_pipe_prepare(void)
{
    CHECK(pipe2(fds, O_NONBLOCK) == 0 && pipe2(fds + 2, O_DIRECT | O_NONBLOCK) == 0, "pipe");
    while (write(fds[3], "ab", 2) == 2)
        fds[4]++;
    /* Moved by splice, pages keep their own lengths. */
    CHECK(splice(fds[2], NULL, fds[1], NULL, 1000, SPLICE_F_NONBLOCK) > 0, "splice");
    CHECK(ioctl(fds[0], FIONREAD, &fds[5]) == 0 && fds[5] > 4, "count");
}
static void sparse_pipe_fully(void)
{
    int waiting;
    CHECK(ioctl(fds[0], FIONREAD, &waiting) == 0 && waiting == fds[5], "%d of %d bytes", waiting, fds[5]);
}

ZOO({"fired", fired_prepare, NULL, fired_fully},
    {"nested", nested_prepare, NULL, nested_fully},
    {"directory", directory_prepare, NULL, directory_fully},
    {"async", async_prepare, NULL, async_fully},
    {"crowd", crowd_prepare, NULL, crowd_fully},
    {"flags", flags_prepare, NULL, flags_fully},
    {"views", views_prepare, NULL, views_fully},
    {"sparse_pipe", sparse_pipe_prepare, NULL, sparse_pipe_fully})
