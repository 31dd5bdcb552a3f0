/* Clocks that count from the start of a machine, and what waits for them. They go on through a move: not
 * back, and ahead by no more than the move took, whatever the clocks of the other machine read. */
#include "zoo.h"
#include <linux/time_types.h>
#include <sys/timerfd.h>

/* Between two looks at a clock: a move, and a busy machine. */
#define JUMP_NS 5000000000LL
/* Between reading a clock and reading a timer. */
#define SLACK_NS 500000000LL
#define PERIOD_NS 20000000LL

static const clockid_t clocks[] = {CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_MONOTONIC_RAW, CLOCK_MONOTONIC_COARSE};
#define CLOCKS (sizeof clocks / sizeof clocks[0])
static int64_t last[CLOCKS];

static int64_t kernel_ns(clockid_t clock)
{
    struct timespec t;
    CHECK(syscall(SYS_clock_gettime, clock, &t) == 0, "clock_gettime");
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static struct timespec at(int64_t ns)
{
    return (struct timespec){ns / 1000000000, ns % 1000000000};
}

static void look(void)
{
    for (size_t i = 0; i < CLOCKS; i++) {
        int64_t vdso = now_ns(clocks[i]), kernel = kernel_ns(clocks[i]);
        CHECK(last[i] == 0 || (vdso >= last[i] && vdso < last[i] + JUMP_NS), "clock %d: %lld then %lld",
              clocks[i], (long long)last[i], (long long)vdso);
        CHECK(kernel >= vdso && kernel < vdso + JUMP_NS, "clock %d: vdso %lld kernel %lld", clocks[i],
              (long long)vdso, (long long)kernel);
        last[i] = kernel;
    }
}

/* Sleeps until instants of a clock, one after the other: `step` apart. */
struct sleeper { clockid_t clock; int64_t step; atomic_llong until; };

static struct sleeper sleepers[] = {
    {CLOCK_MONOTONIC, 3000000, 0}, {CLOCK_MONOTONIC, 2000000000, 0}, {CLOCK_BOOTTIME, 700000000, 0},
};
#define SLEEPERS (sizeof sleepers / sizeof sleepers[0])

static void *sleep_on(void *argument)
{
    struct sleeper *s = argument;
    for (;;) {
        int64_t until = now_ns(s->clock) + s->step;
        struct timespec t = at(until);
        atomic_store(&s->until, until);
        int error = clock_nanosleep(s->clock, TIMER_ABSTIME, &t, NULL);
        CHECK(error == 0, "clock_nanosleep: %s", strerror(error));
        int64_t now = now_ns(s->clock);
        CHECK(now >= until && now < until + LATE_NS, "to sleep until %lld, woke at %lld", (long long)until,
              (long long)now);
    }
}

static const clockid_t far_clocks[] = {CLOCK_MONOTONIC, CLOCK_BOOTTIME};
static int64_t far_until[2], ticking_since;
static int far_fd[2], ticking_fd;
static timer_t far_timer[2];
static uint64_t ticks;

static void prepare(void)
{
    struct sigevent none = {.sigev_notify = SIGEV_NONE};
    for (int i = 0; i < 2; i++) {
        far_until[i] = now_ns(far_clocks[i]) + 5000000000000LL;
        struct itimerspec value = {{0, 0}, at(far_until[i])};
        CHECK((far_fd[i] = timerfd_create(far_clocks[i], TFD_NONBLOCK)) >= 0, "timerfd");
        CHECK(timerfd_settime(far_fd[i], TFD_TIMER_ABSTIME, &value, NULL) == 0, "timerfd_settime");
        CHECK(timer_create(far_clocks[i], &none, &far_timer[i]) == 0, "timer_create");
        CHECK(timer_settime(far_timer[i], TIMER_ABSTIME, &value, NULL) == 0, "timer_settime");
    }
    ticking_since = now_ns(CLOCK_MONOTONIC) + PERIOD_NS;
    struct itimerspec often = {at(PERIOD_NS), at(ticking_since)};
    CHECK((ticking_fd = timerfd_create(CLOCK_MONOTONIC, 0)) >= 0, "timerfd");
    CHECK(timerfd_settime(ticking_fd, TFD_TIMER_ABSTIME, &often, NULL) == 0, "timerfd_settime");
    for (size_t i = 0; i < SLEEPERS; i++)
        start_thread(sleep_on, &sleepers[i]);
}

/* What is left of a timer, read between two looks at its clock, must lead to its instant. */
static void leads_to(int which, const char *kind, int64_t before, struct timespec left)
{
    int64_t ns = (int64_t)left.tv_sec * 1000000000 + left.tv_nsec, after = now_ns(far_clocks[which]);
    CHECK(before + ns <= far_until[which] + SLACK_NS && after + ns >= far_until[which] - SLACK_NS,
          "%s on clock %d is %lld ns off", kind, far_clocks[which], (long long)(before + ns - far_until[which]));
}

static void fully(void)
{
    struct itimerspec now;
    uint64_t count;
    for (int i = 0; i < 2; i++) {
        int64_t before = now_ns(far_clocks[i]);
        CHECK(timerfd_gettime(far_fd[i], &now) == 0, "timerfd_gettime");
        leads_to(i, "timerfd", before, now.it_value);
        before = now_ns(far_clocks[i]);
        CHECK(timer_gettime(far_timer[i], &now) == 0, "timer_gettime");
        leads_to(i, "POSIX timer", before, now.it_value);
    }
    /* As many ticks as there were instants, no more and no less. */
    int64_t before = now_ns(CLOCK_MONOTONIC);
    CHECK(read(ticking_fd, &count, 8) == 8, "timerfd");
    ticks += count;
    int64_t after = now_ns(CLOCK_MONOTONIC);
    int64_t least = (before - ticking_since) / PERIOD_NS, most = (after - ticking_since) / PERIOD_NS + 1;
    CHECK((int64_t)ticks >= least - 1 && (int64_t)ticks <= most + 1, "%llu ticks, not %lld to %lld",
          (unsigned long long)ticks, (long long)least, (long long)most);
    for (size_t i = 0; i < SLEEPERS; i++) {
        int64_t until = atomic_load(&sleepers[i].until);
        CHECK(now_ns(sleepers[i].clock) < until + LATE_NS, "a sleep until %lld goes on", (long long)until);
    }
}

ZOO({"go_on", prepare, look, fully})
