/* What the kernel keeps of a process without showing it in /proc. */
#include "zoo.h"
#include <asm/prctl.h>
#include <sched.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/timerfd.h>

#define PAGE 4096

/* membarrier(2) by number: the header of the C library may not have them. */
#define BARRIER_GLOBAL_EXPEDITED 2
#define REGISTER_GLOBAL_EXPEDITED 4
#define BARRIER_PRIVATE 8
#define REGISTER_PRIVATE 16
#define BARRIER_SYNC_CORE 32
#define REGISTER_SYNC_CORE 64
#define BARRIER_RSEQ 128
#define REGISTER_RSEQ 256
#define GET_REGISTRATIONS 512

static long membarrier(int command)
{
    return syscall(SYS_membarrier, command, 0, 0);
}
static long registered;

static void membarrier_prepare(void)
{
    CHECK(membarrier(BARRIER_PRIVATE) < 0 && errno == EPERM, "not registered yet");
    CHECK(membarrier(REGISTER_PRIVATE) == 0 && membarrier(REGISTER_GLOBAL_EXPEDITED) == 0, "register");
    CHECK(membarrier(REGISTER_SYNC_CORE) == 0, "register");
    registered = membarrier(GET_REGISTRATIONS);
}
static void membarrier_fully(void)
{
    CHECK(membarrier(BARRIER_PRIVATE) == 0 && membarrier(BARRIER_SYNC_CORE) == 0, "barrier");
    CHECK(membarrier(GET_REGISTRATIONS) == registered, "registrations");
    CHECK(membarrier(BARRIER_RSEQ) < 0, "never registered");
}

static long locked_kib(void)
{
    char text[64];
    status_field("/proc/self/status", "VmLck", text, sizeof text);
    return atol(text);
}
static void more_is_locked(long want)
{
    long before = locked_kib();
    char *at = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(at != MAP_FAILED, "mmap");
    long more = locked_kib() - before;
    CHECK(munmap(at, 16 * PAGE) == 0 && more == want, "%ld KiB are locked", more);
}
static void lock_future_prepare(void)
{
    CHECK(mlockall(MCL_FUTURE) == 0, "mlockall");
}
static void lock_all_prepare(void)
{
    CHECK(mlockall(MCL_CURRENT | MCL_FUTURE | 4 /* MCL_ONFAULT */) == 0, "mlockall");
}
static void lock_future_fully(void)
{
    more_is_locked(64);
}

/* All descriptors that the soft limit allows, and more. */
static int last_fd;
static void no_descriptor_prepare(void)
{
    struct rlimit limit = {32, 64};
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0, "setrlimit");
    int fd;
    while ((fd = open("/dev/null", O_RDONLY)) >= 0)
        last_fd = fd;
    limit.rlim_cur = 16;
    CHECK(last_fd == 31 && setrlimit(RLIMIT_NOFILE, &limit) == 0, "setrlimit");
}
static void no_descriptor_fully(void)
{
    struct rlimit limit;
    CHECK(fcntl(last_fd, F_GETFD) >= 0, "last");
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur == 16 && limit.rlim_max == 64, "limit");
    CHECK(open("/dev/null", O_RDONLY) < 0 && errno == EMFILE, "room");
}
/* Limits that leave little room. */
static void limits_prepare(void)
{
    struct rlimit limit = {0, 0};
    CHECK(setrlimit(RLIMIT_NPROC, &limit) == 0 && setrlimit(RLIMIT_MEMLOCK, &limit) == 0, "limits");
    CHECK(setrlimit(RLIMIT_CORE, &limit) == 0, "limits");
    CHECK(setrlimit(RLIMIT_SIGPENDING, &limit) == 0 && setrlimit(RLIMIT_MSGQUEUE, &limit) == 0, "limits");
    limit.rlim_cur = limit.rlim_max = 1 << 20;
    CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0, "limits");
    limit.rlim_cur = limit.rlim_max = 1 << 30;
    CHECK(setrlimit(RLIMIT_AS, &limit) == 0 && setrlimit(RLIMIT_DATA, &limit) == 0, "limits");
}
static void limits_fully(void)
{
    struct rlimit limit;
    CHECK(getrlimit(RLIMIT_CORE, &limit) == 0 && limit.rlim_max == 0, "limit");
    CHECK(getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_max == 1 << 30, "limit");
    CHECK(mmap(NULL, 2L << 30, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED, "mmap");
}

/* Numbers of the process that /proc or prctl tells. */
static int persona;
static void odd_prepare(void)
{
    CHECK(prctl(PR_SET_CHILD_SUBREAPER, 1) == 0, "subreaper");
    CHECK(personality(ADDR_NO_RANDOMIZE | READ_IMPLIES_EXEC | MMAP_PAGE_ZERO) >= 0, "personality");
    persona = personality(0xffffffff);
    CHECK(prctl(PR_SET_SECUREBITS, 0x20 | 0x10) == 0, "securebits"); /* KEEP_CAPS and its lock */
    CHECK(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0, "thp");
    struct sched_param param = {.sched_priority = 3};
    CHECK(sched_setscheduler(0, SCHED_RR | SCHED_RESET_ON_FORK, &param) == 0, "sched");
    CHECK(syscall(SYS_ioprio_set, 1, 0, 2 << 13 | 7) == 0, "ioprio");
    FILE *file = fopen("/proc/self/coredump_filter", "we");
    fprintf(file, "0x7f");
    fclose(file);
    CHECK(syscall(SYS_setfsuid, 1000) == 0 && syscall(SYS_setfsgid, 1001) == 0, "fs ids");
}
static void odd_fully(void)
{
    int value = 0;
    char text[64];
    CHECK(prctl(PR_GET_CHILD_SUBREAPER, &value) == 0 && value == 1, "subreaper");
    CHECK(personality(0xffffffff) == persona, "personality");
    CHECK(prctl(PR_GET_SECUREBITS) == 0x30, "securebits");
    CHECK(prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == 1, "thp");
    CHECK(sched_getscheduler(0) == (SCHED_RR | SCHED_RESET_ON_FORK), "sched");
    CHECK(syscall(SYS_ioprio_get, 1, 0) == (2 << 13 | 7), "ioprio");
    status_field("/proc/self/status", "Uid", text, sizeof text);
    CHECK(strstr(text, "1000"), "uid%s", text);
}
static void deadline_prepare(void)
{
    struct { uint32_t size, policy; uint64_t flags; int32_t nice; uint32_t priority; uint64_t runtime, deadline, period; uint32_t lo, hi; }
        attr = {.size = 56, .policy = 6, .flags = 1, .runtime = 10000000, .deadline = 30000000, .period = 50000000};
    CHECK(syscall(SYS_sched_setattr, 0, &attr, 0) == 0, "sched_setattr");
}
static void deadline_fully(void)
{
    CHECK((sched_getscheduler(0) & 0xff) == 6, "policy");
}

/* Registers of old and new: the x87 stack, control words, the base of GS. */
static char gs_area[64];
static void fpu_prepare(void)
{
    unsigned mxcsr = 0x1f80 | 0x6000 | 0x8040;
    unsigned short control = 0x0c7f;
    strcpy(gs_area, "behind gs");
    CHECK(syscall(SYS_arch_prctl, ARCH_SET_GS, gs_area) == 0, "gs");
    __asm__ volatile("ldmxcsr %0; fldcw %1" : : "m"(mxcsr), "m"(control));
}
static void fpu_often(void)
{
    unsigned mxcsr;
    unsigned short control;
    char first;
    __asm__ volatile("stmxcsr %0; fnstcw %1; movb %%gs:1, %2" : "=m"(mxcsr), "=m"(control), "=r"(first));
    CHECK((mxcsr & 0xffc0) == (0x1f80 | 0x6000 | 0x8040) && control == 0x0c7f && first == 'e', "%x %x %c", mxcsr, control, first);
}

static void *in_x87(void *unused)
{
    (void)unused;
    double three = 3.25, seven = 7.5;
    __asm__ volatile("fldl %0; fldl %1" : : "m"(three), "m"(seven));
    for (;;) {
        double top, below;
        __asm__ volatile("mov $2000000, %%rcx; 1: dec %%rcx; jnz 1b; fld %%st(1); fstpl %0; fld %%st(0); fstpl %1"
                         : "=m"(below), "=m"(top) : : "rcx");
        CHECK(top == 7.5 && below == 3.25, "x87");
        atomic_fetch_add(&steps, 1);
    }
}
static void x87_prepare(void)
{
    start_thread(in_x87, NULL);
}

static int timer_fds[3];
static void timerfd_prepare(void)
{
    struct itimerspec far = {.it_value = {2000000000, 5}, .it_interval = {100, 7}};
    timer_fds[0] = timerfd_create(CLOCK_REALTIME, TFD_NONBLOCK);
    timer_fds[1] = timerfd_create(CLOCK_BOOTTIME, TFD_NONBLOCK);
    timer_fds[2] = timerfd_create(8 /* CLOCK_REALTIME_ALARM */, TFD_NONBLOCK | TFD_CLOEXEC);
    CHECK(timerfd_settime(timer_fds[0], TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET, &far, NULL) == 0, "cancel");
    far.it_value.tv_sec = 1000;
    CHECK(timerfd_settime(timer_fds[1], 0, &far, NULL) == 0, "boottime");
    if (timer_fds[2] >= 0)
        CHECK(timerfd_settime(timer_fds[2], 0, &far, NULL) == 0, "alarm");
}
static void timerfd_fully(void)
{
    struct itimerspec now;
    char path[64], text[64];
    CHECK(timerfd_gettime(timer_fds[1], &now) == 0 && now.it_interval.tv_sec == 100 && now.it_value.tv_sec > 900, "boottime");
    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", timer_fds[0]);
    status_field(path, "settime flags", text, sizeof text);
    CHECK(strtol(text, NULL, 8) == 3, "flags%s", text);
    if (timer_fds[2] >= 0)
        CHECK(timerfd_gettime(timer_fds[2], &now) == 0 && now.it_value.tv_sec > 900, "alarm");
}

/* SS_AUTODISARM, and a handler that runs on such a stack while the process is moved. */
static char *disarm_stack;
static volatile int inside, leave;
static void on_disarm(int signal)
{
    (void)signal;
    inside = 1;
    while (!leave)
        usleep(1000);
    inside = 0;
}
static void *disarm_thread(void *unused)
{
    (void)unused;
    stack_t stack = {.ss_sp = disarm_stack, .ss_size = 65536, .ss_flags = 1 << 31}, now;
    struct sigaction action = {.sa_handler = on_disarm, .sa_flags = SA_ONSTACK};
    CHECK(sigaltstack(&stack, NULL) == 0 && sigaction(SIGUSR2, &action, NULL) == 0, "altstack");
    for (;;) {
        pthread_kill(pthread_self(), SIGUSR2);
        CHECK(sigaltstack(NULL, &now) == 0 && now.ss_sp == disarm_stack && now.ss_flags == 1 << 31, "after %x", now.ss_flags);
        atomic_fetch_add(&steps, 1);
    }
}
static void autodisarm_prepare(void)
{
    disarm_stack = malloc(65536);
    start_thread(disarm_thread, NULL);
    while (!inside)
        usleep(100);
}
static void autodisarm_fully(void)
{
    unsigned long long was = atomic_load(&steps);
    leave = 1;
    while (atomic_load(&steps) < was + 2)
        usleep(100);
    leave = 0;
    while (!inside)
        usleep(100);
}

ZOO({"membarrier", membarrier_prepare, NULL, membarrier_fully},
    {"lock_future", lock_future_prepare, NULL, lock_future_fully},
    {"lock_all", lock_all_prepare, NULL, lock_future_fully},
    {"no_descriptor", no_descriptor_prepare, NULL, no_descriptor_fully},
    {"limits", limits_prepare, NULL, limits_fully},
    {"odd", odd_prepare, NULL, odd_fully},
    {"deadline", deadline_prepare, NULL, deadline_fully},
    {"fpu", fpu_prepare, fpu_often, NULL},
    {"x87", x87_prepare, NULL, NULL},
    {"timerfd", timerfd_prepare, NULL, timerfd_fully},
    {"autodisarm", autodisarm_prepare, NULL, autodisarm_fully})
