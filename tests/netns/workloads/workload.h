/* What all test programs share: see workload.rs for the rules they keep. */
#ifndef WORKLOAD_H
#define WORKLOAD_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* Ends the program: something is not as it was left. */
__attribute__((noreturn, format(printf, 1, 2))) static inline void fail(const char *format, ...)
{
    char text[512];
    int error = errno;
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    dprintf(1, "FAIL %s (errno %d: %s)\n", text, error, strerror(error));
    _exit(1);
}

#define CHECK(condition, format, ...) \
    do { \
        if (!(condition)) \
            fail("%s: " format, #condition, ##__VA_ARGS__); \
    } while (0)

static inline int64_t now_ns(clockid_t clock)
{
    struct timespec t;
    if (clock_gettime(clock, &t) != 0)
        fail("clock_gettime");
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* How late a timer may be: the machine is shared, and a move takes its time. */
#define LATE_NS 20000000000LL

static volatile sig_atomic_t asked;
static atomic_ullong steps;

static inline void on_ask(int signal)
{
    (void)signal;
    asked = 1;
}

static void on_any(int signal)
{
    fail("signal %d that nobody has sent", signal);
}

/* With HANDLE_ALL_SIGNALS in its environment a program begins with handlers for all signals, as Go's runtime
 * does, but for those that a child, a timer or a test may bring. */
__attribute__((constructor)) static void handle_all_signals(void)
{
    struct sigaction action = {.sa_handler = on_any, .sa_flags = SA_RESTART};
    if (!getenv("HANDLE_ALL_SIGNALS"))
        return;
    for (int signal = 1; signal < NSIG; signal++) {
        struct sigaction now;
        if (signal == SIGTERM || signal == SIGINT || sigaction(signal, NULL, &now) != 0)
            continue;
        if (signal == SIGCHLD)
            now.sa_handler = on_ask;
        else
            now = action;
        if (signal != SIGKILL && signal != SIGSTOP)
            CHECK(sigaction(signal, &now, NULL) == 0, "sigaction");
    }
}

/* Says ready and then verifies until killed: `often` all the time, `fully` when asked. */
__attribute__((noreturn)) static inline void verify_forever(void (*often)(void), void (*fully)(void))
{
    struct sigaction action = {.sa_handler = on_ask, .sa_flags = SA_RESTART};
    if (sigaction(SIGUSR1, &action, NULL) != 0)
        fail("sigaction");
    dprintf(1, "ready\n");
    for (;;) {
        if (often)
            often();
        atomic_fetch_add(&steps, 1);
        if (asked) {
            asked = 0;
            if (fully)
                fully();
            dprintf(1, "ok %llu\n", (unsigned long long)atomic_load(&steps));
        }
        struct timespec pause = {0, 1000000};
        nanosleep(&pause, NULL);
    }
}
#endif
