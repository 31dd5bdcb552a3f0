/* Timers and clocks. Times are checked against CLOCK_MONOTONIC, which a move carries on. */
#include "zoo.h"
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/time.h>
#include <sys/timerfd.h>

static atomic_ullong fired;
static int64_t began, period_ns;

static void on_fire(int s) { (void)s; atomic_fetch_add(&fired, 1); }

/* A periodic timer: must go on firing, and never more often than its period allows. */
static void must_fire(void)
{
    unsigned long long was = atomic_load(&fired);
    int64_t end = now_ns(CLOCK_MONOTONIC) + LATE_NS;
    while (atomic_load(&fired) == was) {
        CHECK(now_ns(CLOCK_MONOTONIC) < end, "fired %llu times, no more", was);
        usleep(1000);
    }
    int64_t most = (now_ns(CLOCK_MONOTONIC) - began) / period_ns + 2;
    CHECK((int64_t)atomic_load(&fired) <= most, "fired %llu times", (unsigned long long)atomic_load(&fired));
}

static void catch_with(int signal, int64_t period)
{
    struct sigaction a = {.sa_handler = on_fire, .sa_flags = SA_RESTART};
    CHECK(sigaction(signal, &a, NULL) == 0, "sigaction");
    began = now_ns(CLOCK_MONOTONIC);
    period_ns = period;
}

static void itimer_prepare(void)
{
    catch_with(SIGALRM, 30000000);
    struct itimerval value = {{0, 30000}, {0, 30000}};
    CHECK(setitimer(ITIMER_REAL, &value, NULL) == 0, "setitimer");
}

static void itimer_fully(void)
{
    struct itimerval now;
    must_fire();
    CHECK(getitimer(ITIMER_REAL, &now) == 0, "getitimer");
    CHECK(now.it_interval.tv_sec == 0 && now.it_interval.tv_usec == 30000, "interval");
}

static void until_pending(int signal)
{
    sigset_t set;
    int64_t end = now_ns(CLOCK_MONOTONIC) + LATE_NS;
    do {
        CHECK(now_ns(CLOCK_MONOTONIC) < end, "the timer does not become due");
        usleep(1000);
        sigpending(&set);
    } while (!sigismember(&set, signal));
}

/* Due and not delivered: the timer goes on only once the signal is. */
static void itimer_until_due(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGALRM);
    CHECK(sigprocmask(SIG_BLOCK, &set, NULL) == 0, "block");
    until_pending(SIGALRM);
}

static void itimer_due_prepare(void)
{
    itimer_prepare();
    itimer_until_due();
}

static void itimer_due_fully(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGALRM);
    unsigned long long was = atomic_load(&fired);
    CHECK(sigprocmask(SIG_UNBLOCK, &set, NULL) == 0, "unblock");
    CHECK(atomic_load(&fired) > was, "the signal was not pending any more");
    itimer_fully();
    itimer_until_due();
}

static void itimer_virtual_prepare(void)
{
    struct itimerval value = {{5, 250000}, {1000, 0}};
    CHECK(setitimer(ITIMER_VIRTUAL, &value, NULL) == 0 && setitimer(ITIMER_PROF, &value, NULL) == 0, "set");
}

static void itimer_virtual_fully(void)
{
    struct itimerval now;
    for (int which = ITIMER_VIRTUAL; which <= ITIMER_PROF; which++) {
        CHECK(getitimer(which, &now) == 0, "getitimer");
        CHECK(now.it_interval.tv_sec == 5 && now.it_interval.tv_usec == 250000, "interval of %d", which);
        CHECK(now.it_value.tv_sec > 900 && now.it_value.tv_sec <= 1000, "value of %d", which);
    }
}

static timer_t timers[3];

static void on_timer(int s, siginfo_t *info, void *context)
{
    (void)s;
    (void)context;
    CHECK(info->si_code == SI_TIMER && info->si_value.sival_int == 4711, "value %d", info->si_value.sival_int);
    atomic_fetch_add(&fired, 1);
}

static void posix_prepare(void)
{
    catch_with(SIGRTMIN + 4, 40000000);
    struct sigaction a = {.sa_sigaction = on_timer, .sa_flags = SA_SIGINFO | SA_RESTART};
    CHECK(sigaction(SIGRTMIN + 4, &a, NULL) == 0, "sigaction");
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 4};
    event.sigev_value.sival_int = 4711;
    struct itimerspec often = {{0, 40000000}, {0, 40000000}}, late = {{0, 0}, {5000, 0}};
    /* The one in the middle is deleted: the identifiers that are left have a gap. */
    for (int i = 0; i < 3; i++)
        CHECK(timer_create(CLOCK_MONOTONIC, &event, &timers[i]) == 0, "timer_create");
    CHECK(timer_delete(timers[1]) == 0, "timer_delete");
    CHECK(timer_settime(timers[0], 0, &often, NULL) == 0, "timer_settime");
    CHECK(timer_settime(timers[2], 0, &late, NULL) == 0, "timer_settime");
}

static void posix_fully(void)
{
    struct itimerspec now;
    must_fire();
    CHECK(timer_gettime(timers[2], &now) == 0, "timer_gettime");
    CHECK(now.it_value.tv_sec > 4000 && now.it_value.tv_sec <= 5000, "left %ld", (long)now.it_value.tv_sec);
}

/* A timer with an overrun that was told of, and one whose signal waits and is missed all the time. */
#define WAITING_NS 20000000ll
#define APART_NS 3000000ll
static int64_t first_at, taken;

static void to_spec(int64_t ns, struct timespec *t) { *t = (struct timespec){ns / 1000000000, ns % 1000000000}; }

static int take(int signal)
{
    sigset_t set;
    siginfo_t info;
    struct timespec patience;
    to_spec(LATE_NS, &patience);
    sigemptyset(&set);
    sigaddset(&set, signal);
    CHECK(sigtimedwait(&set, &info, &patience) == signal, "signal %d does not wait", signal);
    CHECK(info.si_code == SI_TIMER, "code %d", info.si_code);
    return info.si_overrun;
}

static void missed_prepare(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN + 7);
    sigaddset(&set, SIGRTMIN + 8);
    CHECK(sigprocmask(SIG_BLOCK, &set, NULL) == 0, "mask");
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 7};
    CHECK(timer_create(CLOCK_REALTIME, &event, &timers[0]) == 0, "timer_create");
    event.sigev_signo = SIGRTMIN + 8;
    CHECK(timer_create(CLOCK_MONOTONIC, &event, &timers[1]) == 0, "timer_create");
    struct itimerspec hours = {.it_interval = {3600, 0}}, often;
    to_spec(now_ns(CLOCK_REALTIME) - 3 * 3600000000000ll - 1800000000000ll, &hours.it_value);
    CHECK(timer_settime(timers[0], TIMER_ABSTIME, &hours, NULL) == 0, "timer_settime");
    CHECK(take(SIGRTMIN + 7) == 3, "overrun at first");
    first_at = now_ns(CLOCK_MONOTONIC);
    to_spec(WAITING_NS, &often.it_interval);
    to_spec(first_at, &often.it_value);
    CHECK(timer_settime(timers[1], TIMER_ABSTIME, &often, NULL) == 0, "timer_settime");
    until_pending(SIGRTMIN + 8);
}

static void missed_fully(void)
{
    struct itimerspec now;
    sigset_t set;
    CHECK(timer_getoverrun(timers[0]) == 3, "overrun %d", timer_getoverrun(timers[0]));
    CHECK(timer_gettime(timers[0], &now) == 0 && now.it_value.tv_sec > 900 && now.it_value.tv_sec <= 1800, "left");
    int missed = take(SIGRTMIN + 8);
    CHECK(missed == timer_getoverrun(timers[1]), "overrun %d", missed);
    taken += 1 + missed;
    int64_t before = now_ns(CLOCK_MONOTONIC);
    CHECK(taken <= (before - first_at) / WAITING_NS + 1, "%lld times", (long long)taken);
    /* In phase, and not once more before its time. */
    CHECK(timer_gettime(timers[1], &now) == 0, "timer_gettime");
    int64_t left = now.it_value.tv_sec * 1000000000ll + now.it_value.tv_nsec;
    int64_t late = (now_ns(CLOCK_MONOTONIC) + left - first_at) % WAITING_NS;
    int64_t early = (before + left - first_at) % WAITING_NS;
    CHECK(late < APART_NS || early > WAITING_NS - APART_NS, "out of phase: %lld to %lld", (long long)early,
          (long long)late);
    sigpending(&set);
    CHECK(!sigismember(&set, SIGRTMIN + 8) || now_ns(CLOCK_MONOTONIC) >= before + left, "twice");
    until_pending(SIGRTMIN + 8);
}

/* Timers of CPU clocks, which begin at 0 after a move: they fire when what they had left is used up. */
#define CPU_NS 300000000ll
static const int on_cpu[3] = {SIGVTALRM, SIGPROF, SIGXCPU};
static atomic_int ran_out[3];

static void on_cpu_time(int signal)
{
    for (int i = 0; i < 3; i++)
        if (signal == on_cpu[i])
            atomic_fetch_add(&ran_out[i], 1);
}

static void cpu_arm(void)
{
    struct itimerval value = {.it_value = {0, CPU_NS / 1000}};
    struct itimerspec spec = {.it_value = {0, CPU_NS}};
    for (int i = 0; i < 3; i++)
        atomic_store(&ran_out[i], 0);
    CHECK(setitimer(ITIMER_VIRTUAL, &value, NULL) == 0 && setitimer(ITIMER_PROF, &value, NULL) == 0, "set");
    CHECK(timer_settime(timers[0], 0, &spec, NULL) == 0, "timer_settime");
}

static void cpu_prepare(void)
{
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGXCPU};
    struct sigaction a = {.sa_handler = on_cpu_time, .sa_flags = SA_RESTART};
    for (int i = 0; i < 3; i++)
        CHECK(sigaction(on_cpu[i], &a, NULL) == 0, "sigaction");
    CHECK(timer_create(CLOCK_PROCESS_CPUTIME_ID, &event, &timers[0]) == 0, "timer_create");
    struct rlimit limit = {3600, 7200};
    CHECK(setrlimit(RLIMIT_CPU, &limit) == 0, "setrlimit");
    cpu_arm();
}

static void cpu_fully(void)
{
    struct rlimit limit;
    struct itimerspec now;
    CHECK(getrlimit(RLIMIT_CPU, &limit) == 0 && limit.rlim_cur == 3600 && limit.rlim_max == 7200, "limit");
    CHECK(timer_gettime(timers[0], &now) == 0, "timer_gettime");
    int64_t left = now.it_value.tv_nsec, began_at = now_ns(CLOCK_PROCESS_CPUTIME_ID), used = 0;
    CHECK(left <= CPU_NS && now.it_value.tv_sec == 0, "left %lld", (long long)left);
    for (int missing = 3; missing > 0; used = now_ns(CLOCK_PROCESS_CPUTIME_ID) - began_at) {
        CHECK(used < left + 2000000000ll, "%d timers have not fired", missing);
        missing = 0;
        for (volatile int spin = 0; spin < 100000; spin++) {
        }
        for (int i = 0; i < 3; i++)
            missing += atomic_load(&ran_out[i]) == 0;
    }
    CHECK(used >= left - 1000000, "fired after %lld ns, %lld were left", (long long)used, (long long)left);
    for (int i = 0; i < 3; i++)
        CHECK(atomic_load(&ran_out[i]) == 1, "timer %d fired %d times", i, atomic_load(&ran_out[i]));
    cpu_arm();
}

static int fd, late_fd;

static void timerfd_prepare(void)
{
    began = now_ns(CLOCK_MONOTONIC);
    period_ns = 20000000;
    fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
    late_fd = timerfd_create(CLOCK_BOOTTIME, TFD_NONBLOCK);
    struct itimerspec often = {{0, 20000000}, {0, 20000000}}, late = {{7, 5}, {5000, 0}};
    CHECK(timerfd_settime(fd, 0, &often, NULL) == 0 && timerfd_settime(late_fd, 0, &late, NULL) == 0, "set");
}

static void timerfd_fully(void)
{
    uint64_t count;
    CHECK(read(fd, &count, 8) == 8 && count > 0, "timerfd");
    atomic_fetch_add(&fired, count);
    int64_t most = (now_ns(CLOCK_MONOTONIC) - began) / period_ns + 2;
    CHECK((int64_t)atomic_load(&fired) <= most, "fired %llu", (unsigned long long)atomic_load(&fired));
    CHECK((int64_t)atomic_load(&fired) >= most - 2 - LATE_NS / period_ns, "fired too seldom");
    struct itimerspec now;
    CHECK(timerfd_gettime(late_fd, &now) == 0, "timerfd_gettime");
    CHECK(now.it_interval.tv_sec == 7 && now.it_interval.tv_nsec == 5, "interval");
    CHECK(now.it_value.tv_sec > 4000 && now.it_value.tv_sec <= 5000, "left %ld", (long)now.it_value.tv_sec);
    CHECK(read(late_fd, &count, 8) < 0 && errno == EAGAIN, "the late one fired");
}

static void signalfd_prepare(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    sigaddset(&set, SIGRTMIN + 6);
    CHECK(sigprocmask(SIG_BLOCK, &set, NULL) == 0, "mask");
    CHECK((fd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC)) >= 0, "signalfd");
    CHECK(sigqueue(getpid(), SIGRTMIN + 6, (union sigval){.sival_int = 99}) == 0, "sigqueue");
}

static void signalfd_fully(void)
{
    struct signalfd_siginfo info;
    CHECK(read(fd, &info, sizeof info) == sizeof info, "signalfd");
    CHECK(info.ssi_signo == (unsigned)SIGRTMIN + 6 && info.ssi_int == 99, "signal %u", info.ssi_signo);
    CHECK(read(fd, &info, sizeof info) < 0 && errno == EAGAIN, "one too many");
    CHECK(kill(getpid(), SIGUSR2) == 0 && read(fd, &info, sizeof info) == sizeof info, "the other signal");
    CHECK(sigqueue(getpid(), SIGRTMIN + 6, (union sigval){.sival_int = 99}) == 0, "sigqueue");
}

/* The vdso's clocks and the kernel's agree, and none goes back. */
static void clocks_often(void)
{
    static const clockid_t all[] = {CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_REALTIME};
    static int64_t last[3];
    for (int i = 0; i < 3; i++) {
        struct timespec t;
        int64_t vdso = now_ns(all[i]);
        CHECK(syscall(SYS_clock_gettime, all[i], &t) == 0, "clock_gettime");
        int64_t kernel = (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
        CHECK(vdso >= last[i], "clock %d went back by %lld ns", all[i], (long long)(last[i] - vdso));
        CHECK(kernel >= vdso && kernel < vdso + LATE_NS, "vdso and kernel differ on %d", all[i]);
        last[i] = kernel;
    }
}

ZOO({"itimer_real", itimer_prepare, NULL, itimer_fully},
    {"itimer_real_due", itimer_due_prepare, NULL, itimer_due_fully},
    {"itimer_virtual_and_prof", itimer_virtual_prepare, NULL, itimer_virtual_fully},
    {"posix_timers", posix_prepare, NULL, posix_fully},
    {"posix_timers_missed", missed_prepare, NULL, missed_fully},
    {"cpu_timers", cpu_prepare, NULL, cpu_fully},
    {"timerfd", timerfd_prepare, NULL, timerfd_fully},
    {"signalfd", signalfd_prepare, NULL, signalfd_fully},
    {"clocks", NULL, clocks_often, clocks_often})
