/* More system calls that are under way while the process is moved: those that end by another thread, and those
 * whose time the kernel forgets when it is interrupted. */
#include "zoo.h"
#include <linux/futex.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/select.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/uio.h>

static int fds[4];
static atomic_ullong rounds;

static void round_comes(unsigned long long was)
{
    int64_t end = now_ns(CLOCK_MONOTONIC) + LATE_NS;
    while (atomic_load(&rounds) == was) {
        CHECK(now_ns(CLOCK_MONOTONIC) < end, "the call does not come back");
        usleep(1000);
    }
}

/* Calls that another thread ends: begin() makes what they wait at, wait_once() is the call, poke() ends it. */
#define PARTNER(name) \
    static void *name##_loop(void *unused) \
    { \
        (void)unused; \
        for (;;) { \
            name##_wait(); \
            atomic_fetch_add(&rounds, 1); \
        } \
        return NULL; \
    } \
    static void name##_prepare(void) \
    { \
        name##_begin(); \
        start_thread(name##_loop, NULL); \
    } \
    static void name##_fully(void) \
    { \
        unsigned long long was = atomic_load(&rounds); \
        usleep(2000); \
        CHECK(atomic_load(&rounds) == was, "it came back by itself"); \
        name##_poke(); \
        round_comes(was); \
    }

static void socket_with_time(void)
{
    struct timeval wait = {1000, 0};
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0, "socketpair");
    CHECK(setsockopt(fds[0], SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait) == 0, "SO_RCVTIMEO");
    CHECK(setsockopt(fds[0], SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof wait) == 0, "SO_SNDTIMEO");
}
static void poke_socket(void) { CHECK(write(fds[1], "x", 1) == 1, "write"); }

#define read_time_begin socket_with_time
static void read_time_wait(void)
{
    char byte;
    CHECK(read(fds[0], &byte, 1) == 1, "read");
}
#define read_time_poke poke_socket
PARTNER(read_time)

#define readv_time_begin socket_with_time
static void readv_time_wait(void)
{
    char byte;
    struct iovec one = {&byte, 1};
    CHECK(readv(fds[0], &one, 1) == 1, "readv");
}
#define readv_time_poke poke_socket
PARTNER(readv_time)

#define recvmmsg_time_begin socket_with_time
static void recvmmsg_time_wait(void)
{
    char byte;
    struct iovec one = {&byte, 1};
    struct mmsghdr message = {.msg_hdr = {.msg_iov = &one, .msg_iovlen = 1}};
    CHECK(recvmmsg(fds[0], &message, 1, 0, NULL) == 1, "recvmmsg");
}
#define recvmmsg_time_poke poke_socket
PARTNER(recvmmsg_time)

static void accept_time_begin(void)
{
    struct timeval wait = {1000, 0};
    struct sockaddr name = {.sa_family = AF_UNIX};
    CHECK((fds[0] = socket(AF_UNIX, SOCK_STREAM, 0)) >= 0 && bind(fds[0], &name, 2) == 0 && listen(fds[0], 3) == 0, "listen");
    CHECK(setsockopt(fds[0], SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait) == 0, "SO_RCVTIMEO");
}
static void accept_time_wait(void)
{
    int got = accept(fds[0], NULL, NULL);
    CHECK(got >= 0 && close(got) == 0, "accept");
}
static void accept_time_poke(void)
{
    struct sockaddr_storage name;
    socklen_t length = sizeof name;
    int s = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK(getsockname(fds[0], (struct sockaddr *)&name, &length) == 0, "name");
    CHECK(connect(s, (struct sockaddr *)&name, length) == 0 && close(s) == 0, "connect");
}
PARTNER(accept_time)

/* Sends into a full socket, with a time. */
static char load[1 << 16];
static void fill_socket(void)
{
    while (send(fds[0], load, 1000, MSG_DONTWAIT) == 1000)
        ;
}
static void send_time_begin(void)
{
    struct timeval wait = {1000, 0};
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, fds) == 0, "socketpair");
    CHECK(setsockopt(fds[0], SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof wait) == 0, "SO_SNDTIMEO");
    fill_socket();
}
static void send_time_wait(void) { CHECK(send(fds[0], load, 1000, 0) == 1000, "send"); }
static void send_time_poke(void)
{
    unsigned long long was = atomic_load(&rounds);
    while (atomic_load(&rounds) == was)
        CHECK(recv(fds[1], load, 1000, MSG_DONTWAIT) == 1000 || errno == EAGAIN, "recv");
}
static void *send_time_loop(void *unused)
{
    (void)unused;
    for (;;) {
        fill_socket();
        send_time_wait();
        atomic_fetch_add(&rounds, 1);
    }
    return NULL;
}
static void write_time_wait(void) { CHECK(write(fds[0], load, 1000) == 1000, "write"); }
static void *write_time_loop(void *unused)
{
    (void)unused;
    for (;;) {
        fill_socket();
        write_time_wait();
        atomic_fetch_add(&rounds, 1);
    }
    return NULL;
}
static void send_time_prepare(void) { send_time_begin(); start_thread(send_time_loop, NULL); }
static void write_time_prepare(void) { send_time_begin(); start_thread(write_time_loop, NULL); }
static void send_time_fully(void)
{
    unsigned long long was = atomic_load(&rounds);
    usleep(2000);
    CHECK(atomic_load(&rounds) == was, "it came back by itself");
    send_time_poke();
}

/* Signals that are waited for. */
static pthread_t waiter;
static atomic_int waiter_tid;
static volatile int handled;
static void on_handled(int signal) { (void)signal; handled++; }
static void handled_begin(void)
{
    struct sigaction action = {.sa_handler = on_handled};
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    CHECK(sigaction(SIGUSR2, &action, NULL) == 0 && sigprocmask(SIG_BLOCK, &set, NULL) == 0, "sigaction");
}
#define sigsuspend_begin handled_begin
static void sigsuspend_wait(void)
{
    sigset_t set, now;
    int was = handled;
    sigfillset(&set);
    sigdelset(&set, SIGUSR2);
    waiter = pthread_self();
    atomic_store(&waiter_tid, gettid());
    CHECK(sigsuspend(&set) == -1 && errno == EINTR && handled == was + 1, "sigsuspend");
    pthread_sigmask(SIG_BLOCK, NULL, &now);
    CHECK(sigismember(&now, SIGUSR2) && !sigismember(&now, SIGTERM), "mask");
}
/* Waits until the thread sleeps in the call of this number: a signal that comes before would be none to pause(). */
static void is_in(long number)
{
    int64_t end = now_ns(CLOCK_MONOTONIC) + LATE_NS;
    for (;;) {
        char path[64], text[64] = "";
        snprintf(path, sizeof path, "/proc/self/task/%d/syscall", atomic_load(&waiter_tid));
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd >= 0) {
            CHECK(read(fd, text, sizeof text - 1) >= 0, "%s", path);
            close(fd);
            if (text[0] != 'r' && strtol(text, NULL, 10) == number)
                return;
        }
        CHECK(now_ns(CLOCK_MONOTONIC) < end, "the thread is not in call %ld but at %s", number, text);
        usleep(500);
    }
}
static void poke_in(long number)
{
    is_in(number);
    CHECK(pthread_kill(waiter, SIGUSR2) == 0, "kill");
}
static void sigsuspend_poke(void) { poke_in(SYS_rt_sigsuspend); }
PARTNER(sigsuspend)

static void pause_begin(void)
{
    struct sigaction action = {.sa_handler = on_handled};
    CHECK(sigaction(SIGUSR2, &action, NULL) == 0, "sigaction");
}
static void pause_wait(void)
{
    waiter = pthread_self();
    atomic_store(&waiter_tid, gettid());
    CHECK(pause() == -1 && errno == EINTR, "pause");
}
static void pause_poke(void) { poke_in(SYS_pause); }
PARTNER(pause)

#define sigwait_begin handled_begin
static void sigwait_wait(void)
{
    siginfo_t info;
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    CHECK(sigwaitinfo(&set, &info) == SIGUSR2 && info.si_value.sival_int == 77, "sigwaitinfo");
}
static void sigwait_poke(void)
{
    union sigval value = {.sival_int = 77};
    CHECK(sigqueue(getpid(), SIGUSR2, value) == 0, "sigqueue");
}
PARTNER(sigwait)

static void signalfd_begin(void)
{
    sigset_t set;
    handled_begin();
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    fds[0] = signalfd(-1, &set, 0);
}
static void signalfd_wait(void)
{
    struct signalfd_siginfo info;
    CHECK(read(fds[0], &info, sizeof info) == sizeof info && info.ssi_int == 77, "signalfd");
}
#define signalfd_poke sigwait_poke
PARTNER(signalfd)

static void eventfd_begin(void) { fds[0] = eventfd(0, 0); }
static void eventfd_wait(void)
{
    uint64_t value;
    CHECK(read(fds[0], &value, 8) == 8 && value == 5, "eventfd");
}
static void eventfd_poke(void)
{
    uint64_t five = 5;
    CHECK(write(fds[0], &five, 8) == 8, "write");
}
PARTNER(eventfd)

static void timerfd_begin(void) { fds[0] = timerfd_create(CLOCK_MONOTONIC, 0); }
static void timerfd_wait(void)
{
    uint64_t value;
    CHECK(read(fds[0], &value, 8) == 8 && value == 1, "timerfd");
}
static void timerfd_poke(void)
{
    struct itimerspec soon = {.it_value = {0, 1}};
    CHECK(timerfd_settime(fds[0], 0, &soon, NULL) == 0, "settime");
}
PARTNER(timerfd)

static void splice_begin(void) { CHECK(pipe(fds) == 0 && pipe(fds + 2) == 0, "pipe"); }
static void splice_wait(void) { CHECK(splice(fds[0], NULL, fds[3], NULL, 1, 0) == 1, "splice"); }
static void splice_poke(void)
{
    char byte;
    CHECK(write(fds[1], "z", 1) == 1 && read(fds[2], &byte, 1) == 1 && byte == 'z', "through");
}
PARTNER(splice)

static void waitall_begin(void) { CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0, "socketpair"); }
static void waitall_wait(void)
{
    char bytes[4];
    CHECK(recv(fds[0], bytes, 4, MSG_WAITALL) == 4, "recv");
}
static void waitall_poke(void) { CHECK(write(fds[1], "abcd", 4) == 4, "write"); }
PARTNER(waitall)

/* Locks: with priority inheritance, robust, read and write. */
static pthread_mutex_t mutex;
static atomic_int got_it;
static void *locking(void *unused)
{
    (void)unused;
    for (;;) {
        CHECK(pthread_mutex_lock(&mutex) == 0, "lock");
        atomic_store(&got_it, 1);
        CHECK(pthread_mutex_unlock(&mutex) == 0, "unlock");
        while (atomic_load(&got_it))
            usleep(100);
    }
    return NULL;
}
static void lock_with(int protocol, int robust)
{
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setprotocol(&attributes, protocol);
    pthread_mutexattr_setrobust(&attributes, robust);
    pthread_mutex_init(&mutex, &attributes);
    CHECK(pthread_mutex_lock(&mutex) == 0, "lock");
    start_thread(locking, NULL);
    start_thread(locking, NULL);
}
static void inherit_prepare(void) { lock_with(PTHREAD_PRIO_INHERIT, PTHREAD_MUTEX_STALLED); }
static void robust_prepare(void) { lock_with(PTHREAD_PRIO_NONE, PTHREAD_MUTEX_ROBUST); }
static void lock_fully(void)
{
    CHECK(!atomic_load(&got_it), "a held lock was taken");
    CHECK(pthread_mutex_unlock(&mutex) == 0, "unlock");
    while (!atomic_load(&got_it))
        usleep(100);
    CHECK(pthread_mutex_lock(&mutex) == 0, "lock");
    atomic_store(&got_it, 0);
}

/* Until an instant of the time of day, and several futexes at once. */
static void *until(void *unused)
{
    (void)unused;
    for (;;) {
        struct timespec then;
        clock_gettime(CLOCK_REALTIME, &then);
        then.tv_sec += 1;
        CHECK(clock_nanosleep(CLOCK_REALTIME, TIMER_ABSTIME, &then, NULL) == 0, "clock_nanosleep");
        static uint32_t word;
        clock_gettime(CLOCK_MONOTONIC, &then);
        then.tv_nsec += 200000000;
        then.tv_sec += then.tv_nsec / 1000000000;
        then.tv_nsec %= 1000000000;
        struct { uint64_t value, address; uint32_t flags, reserved; } list = {0, (uint64_t)&word, 2 | 128, 0};
        CHECK(syscall(449, &list, 1, 0, &then, CLOCK_MONOTONIC) == -1 && errno == ETIMEDOUT, "futex_waitv");
        fd_set set;
        FD_ZERO(&set);
        struct timespec wait = {0, 300000000};
        sigset_t mask;
        sigemptyset(&mask);
        CHECK(pselect(0, &set, NULL, NULL, &wait, &mask) == 0, "pselect");
        atomic_fetch_add(&rounds, 1);
    }
    return NULL;
}
static void until_prepare(void) { start_thread(until, NULL); }
static void until_fully(void) { round_comes(atomic_load(&rounds)); }

/* What is left of a wait counts, not its whole length. The first check comes near its end. */
#define LONG_MS 10000
static int epoll;
static atomic_llong began;
static void *long_wait(void *unused)
{
    (void)unused;
    for (;;) {
        struct epoll_event event;
        int64_t before = now_ns(CLOCK_MONOTONIC);
        atomic_store(&began, before);
        CHECK(epoll_wait(epoll, &event, 1, LONG_MS) == 0, "epoll_wait");
        int64_t took = (now_ns(CLOCK_MONOTONIC) - before) / 1000000;
        CHECK(took >= LONG_MS && took < LONG_MS * 7 / 4, "took %lld ms", (long long)took);
        atomic_fetch_add(&rounds, 1);
    }
    return NULL;
}
static void long_prepare(void)
{
    epoll = epoll_create1(0);
    start_thread(long_wait, NULL);
}
static void long_fully(void)
{
    static int checked;
    if (checked++)
        return until_fully();
    while (now_ns(CLOCK_MONOTONIC) < atomic_load(&began) + LONG_MS * 800000LL)
        usleep(1000);
}

ZOO({"read_time", read_time_prepare, NULL, read_time_fully},
    {"readv_time", readv_time_prepare, NULL, readv_time_fully},
    {"recvmmsg_time", recvmmsg_time_prepare, NULL, recvmmsg_time_fully},
    {"accept_time", accept_time_prepare, NULL, accept_time_fully},
    {"send_time", send_time_prepare, NULL, send_time_fully},
    {"write_time", write_time_prepare, NULL, send_time_fully},
    {"sigsuspend", sigsuspend_prepare, NULL, sigsuspend_fully},
    {"pause", pause_prepare, NULL, pause_fully},
    {"sigwait", sigwait_prepare, NULL, sigwait_fully},
    {"signalfd", signalfd_prepare, NULL, signalfd_fully},
    {"eventfd", eventfd_prepare, NULL, eventfd_fully},
    {"timerfd", timerfd_prepare, NULL, timerfd_fully},
    {"splice", splice_prepare, NULL, splice_fully},
    {"waitall", waitall_prepare, NULL, waitall_fully},
    {"inherit", inherit_prepare, NULL, lock_fully},
    {"robust", robust_prepare, NULL, lock_fully},
    {"until", until_prepare, NULL, until_fully},
    {"long", long_prepare, NULL, long_fully})
