/* System calls that are under way while the process is moved: they go on, with the time they have left,
 * and never come back with EINTR. */
#include "zoo.h"
#include <linux/futex.h>
#include <netinet/in.h>
#include <poll.h>
#include <semaphore.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/socket.h>

#define WAIT_MS 700

static int quiet[2];
static atomic_ullong rounds;

/* One call that waits WAIT_MS; what it must return is checked by itself. */
static void (*call)(void);

static void *again_and_again(void *unused)
{
    (void)unused;
    for (;;) {
        int64_t before = now_ns(CLOCK_MONOTONIC);
        call();
        int64_t took = now_ns(CLOCK_MONOTONIC) - before;
        CHECK(took >= WAIT_MS * 1000000LL - 2000000, "came back after %lld ns", (long long)took);
        CHECK(took < WAIT_MS * 1000000LL + LATE_NS, "took %lld ns", (long long)took);
        atomic_fetch_add(&rounds, 1);
    }
    return NULL;
}

static void start(void (*what)(void))
{
    CHECK(pipe(quiet) == 0, "pipe");
    call = what;
    start_thread(again_and_again, NULL);
}

static void went_round(void)
{
    unsigned long long was = atomic_load(&rounds);
    int64_t end = now_ns(CLOCK_MONOTONIC) + LATE_NS;
    while (atomic_load(&rounds) < was + 1) {
        CHECK(now_ns(CLOCK_MONOTONIC) < end, "the call does not come back");
        usleep(1000);
    }
}

static const struct timespec WAIT = {0, WAIT_MS * 1000000};

static void a_nanosleep(void)
{
    struct timespec left;
    CHECK(nanosleep(&WAIT, &left) == 0, "nanosleep");
}
static void a_clock_nanosleep(void)
{
    int64_t end = now_ns(CLOCK_MONOTONIC) + WAIT_MS * 1000000LL;
    struct timespec until = {end / 1000000000, end % 1000000000};
    CHECK(clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == 0, "clock_nanosleep");
}
static void a_poll(void)
{
    struct pollfd p = {.fd = quiet[0], .events = POLLIN};
    CHECK(poll(&p, 1, WAIT_MS) == 0, "poll");
}
static void a_ppoll(void)
{
    struct pollfd p = {.fd = quiet[0], .events = POLLIN};
    sigset_t mask;
    sigfillset(&mask);
    CHECK(ppoll(&p, 1, &WAIT, &mask) == 0, "ppoll");
}
static void a_select(void)
{
    fd_set set;
    FD_ZERO(&set);
    FD_SET(quiet[0], &set);
    struct timeval wait = {0, WAIT_MS * 1000};
    CHECK(select(quiet[0] + 1, &set, NULL, NULL, &wait) == 0, "select");
}
static void a_epoll(void)
{
    static int epoll = -1;
    struct epoll_event event = {.events = EPOLLIN};
    if (epoll < 0) {
        epoll = epoll_create1(EPOLL_CLOEXEC);
        CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, quiet[0], &event) == 0, "epoll_ctl");
    }
    CHECK(epoll_wait(epoll, &event, 1, WAIT_MS) == 0, "epoll_wait");
}
static void a_futex(void)
{
    static int word = 5;
    CHECK(syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 5, &WAIT, NULL, 0) == -1 && errno == ETIMEDOUT, "futex");
}
static void a_semaphore(void)
{
    static sem_t semaphore;
    int64_t end = now_ns(CLOCK_MONOTONIC) + WAIT_MS * 1000000LL;
    struct timespec until = {end / 1000000000, end % 1000000000};
    CHECK(sem_clockwait(&semaphore, CLOCK_MONOTONIC, &until) == -1 && errno == ETIMEDOUT, "sem_clockwait");
}
static void a_condition(void)
{
    static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    static pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
    int64_t end = now_ns(CLOCK_MONOTONIC) + WAIT_MS * 1000000LL;
    struct timespec until = {end / 1000000000, end % 1000000000};
    pthread_mutex_lock(&mutex);
    CHECK(pthread_cond_clockwait(&condition, &mutex, CLOCK_MONOTONIC, &until) == ETIMEDOUT, "condition");
    pthread_mutex_unlock(&mutex);
}
static void a_sigtimedwait(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    CHECK(sigtimedwait(&set, NULL, &WAIT) == -1 && errno == EAGAIN, "sigtimedwait");
}
static void a_receive_timeout(void)
{
    static int pair[2] = {-1, -1};
    char byte;
    if (pair[0] < 0) {
        struct timeval wait = {0, WAIT_MS * 1000};
        CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0, "socketpair");
        CHECK(setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait) == 0, "SO_RCVTIMEO");
    }
    CHECK(recv(pair[0], &byte, 1, 0) == -1 && errno == EAGAIN, "recv");
}

/* Calls without a time: a partner wakes them when asked. */
static void *reading(void *unused)
{
    (void)unused;
    for (;;) {
        char byte;
        CHECK(read(quiet[0], &byte, 1) == 1 && byte == 'x', "read");
        atomic_fetch_add(&rounds, 1);
    }
    return NULL;
}
static void read_prepare(void)
{
    CHECK(pipe(quiet) == 0, "pipe");
    start_thread(reading, NULL);
}
static void read_fully(void)
{
    unsigned long long was = atomic_load(&rounds);
    CHECK(write(quiet[1], "x", 1) == 1, "write");
    while (atomic_load(&rounds) != was + 1)
        usleep(1000);
}

static int listener;
static struct sockaddr_in name;

static void *accepting(void *unused)
{
    (void)unused;
    for (;;) {
        int got = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        CHECK(got >= 0, "accept");
        CHECK(write(got, "y", 1) == 1, "write");
        close(got);
    }
    return NULL;
}
static void accept_prepare(void)
{
    socklen_t length = sizeof name;
    name.sin_family = AF_INET;
    name.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(bind(listener, (struct sockaddr *)&name, length) == 0 && listen(listener, 5) == 0, "listen");
    CHECK(getsockname(listener, (struct sockaddr *)&name, &length) == 0, "getsockname");
    start_thread(accepting, NULL);
}
static void accept_fully(void)
{
    /* Reset at the end: a connection that lingers in TIME_WAIT would hold the port. */
    struct linger hard = {1, 0};
    int s = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    char byte;
    CHECK(setsockopt(s, SOL_SOCKET, SO_LINGER, &hard, sizeof hard) == 0, "linger");
    CHECK(connect(s, (struct sockaddr *)&name, sizeof name) == 0, "connect");
    CHECK(read(s, &byte, 1) == 1 && byte == 'y', "answer");
    close(s);
}

static pthread_mutex_t held = PTHREAD_MUTEX_INITIALIZER;
static atomic_int got_it;

static void *locking(void *unused)
{
    (void)unused;
    for (;;) {
        pthread_mutex_lock(&held);
        atomic_store(&got_it, 1);
        pthread_mutex_unlock(&held);
        while (atomic_load(&got_it))
            usleep(100);
    }
    return NULL;
}
static void lock_prepare(void)
{
    pthread_mutex_lock(&held);
    start_thread(locking, NULL);
}
static void lock_fully(void)
{
    CHECK(!atomic_load(&got_it), "a held lock was taken");
    pthread_mutex_unlock(&held);
    while (!atomic_load(&got_it))
        usleep(100);
    pthread_mutex_lock(&held);
    atomic_store(&got_it, 0);
}

#define BLOCKED(name) static void name##_prepare(void) { start(name); }
BLOCKED(a_nanosleep)
BLOCKED(a_clock_nanosleep)
BLOCKED(a_poll)
BLOCKED(a_ppoll)
BLOCKED(a_select)
BLOCKED(a_epoll)
BLOCKED(a_futex)
BLOCKED(a_semaphore)
BLOCKED(a_condition)
BLOCKED(a_sigtimedwait)
BLOCKED(a_receive_timeout)

ZOO({"nanosleep", a_nanosleep_prepare, NULL, went_round},
    {"clock_nanosleep", a_clock_nanosleep_prepare, NULL, went_round},
    {"poll", a_poll_prepare, NULL, went_round},
    {"ppoll", a_ppoll_prepare, NULL, went_round},
    {"select", a_select_prepare, NULL, went_round},
    {"epoll_wait", a_epoll_prepare, NULL, went_round},
    {"futex", a_futex_prepare, NULL, went_round},
    {"semaphore", a_semaphore_prepare, NULL, went_round},
    {"condition", a_condition_prepare, NULL, went_round},
    {"sigtimedwait", a_sigtimedwait_prepare, NULL, went_round},
    {"receive_timeout", a_receive_timeout_prepare, NULL, went_round},
    {"read", read_prepare, NULL, read_fully},
    {"accept", accept_prepare, NULL, accept_fully},
    {"lock", lock_prepare, NULL, lock_fully})
