/* Threads: their number, names, own memory, registers, and how they end. */
#include "zoo.h"
#include <sys/prctl.h>
#include <sys/rseq.h>

#define MANY 200

static __thread uint64_t own = 1;
static __thread char own_name[16];
static atomic_ullong done;
static atomic_int round_asked;
static pthread_barrier_t barrier;

static void *counting(void *argument)
{
    uint64_t number = (uint64_t)(uintptr_t)argument, mine = 0;
    pid_t tid = gettid();
    int answered = 0;
    own = number;
    snprintf(own_name, sizeof own_name, "thread %u", (unsigned)number);
    CHECK(prctl(PR_SET_NAME, own_name) == 0, "name");
    pthread_barrier_wait(&barrier);
    for (;;) {
        char name[16];
        mine++;
        CHECK(own == number + mine - 1, "own memory of %u", (unsigned)number);
        own++;
        struct timespec pause = {0, 10000000};
        nanosleep(&pause, NULL);
        if (atomic_load(&round_asked) == answered)
            continue;
        answered++;
        CHECK(prctl(PR_GET_NAME, name) == 0 && strcmp(name, own_name) == 0, "name %s", name);
        CHECK(syscall(SYS_gettid) == tid && gettid() == tid, "TID");
        atomic_fetch_add(&done, 1);
    }
    return NULL;
}
static void many_prepare(void)
{
    pthread_barrier_init(&barrier, NULL, MANY + 1);
    for (uintptr_t i = 0; i < MANY; i++)
        start_thread(counting, (void *)i);
    pthread_barrier_wait(&barrier);
}
static void many_fully(void)
{
    unsigned long long was = atomic_load(&done);
    atomic_fetch_add(&round_asked, 1);
    while (atomic_load(&done) < was + MANY)
        usleep(1000);
}

/* Threads that begin before a move end after it and are joined; the holder of a robust lock dies. */
static pthread_t waiting;
static atomic_int go;
static pthread_mutex_t robust;

static void *until_told(void *unused)
{
    (void)unused;
    CHECK(pthread_mutex_lock(&robust) == 0, "lock");
    while (!atomic_load(&go))
        usleep(1000);
    return (void *)77;
}
static void ending_prepare(void)
{
    pthread_mutexattr_t attribute;
    pthread_mutexattr_init(&attribute);
    pthread_mutexattr_setrobust(&attribute, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&robust, &attribute);
    CHECK(pthread_create(&waiting, NULL, until_told, NULL) == 0, "thread");
    while (pthread_mutex_trylock(&robust) == 0)
        pthread_mutex_unlock(&robust);
}
static void ending_fully(void)
{
    void *result;
    CHECK(pthread_mutex_trylock(&robust) == EBUSY, "the lock is not held");
    atomic_store(&go, 1);
    CHECK(pthread_join(waiting, &result) == 0 && result == (void *)77, "join");
    CHECK(pthread_mutex_lock(&robust) == EOWNERDEAD, "the dead holder was not seen");
    CHECK(pthread_mutex_consistent(&robust) == 0 && pthread_mutex_unlock(&robust) == 0, "consistent");
    pthread_mutex_destroy(&robust);
    atomic_store(&go, 0);
    ending_prepare();
}

/* All vector and floating-point registers keep their values in a loop without system calls. */
static void *registers(void *argument)
{
    uint64_t seed = (uint64_t)(uintptr_t)argument * 0x9e3779b97f4a7c15ULL + 1;
    unsigned char in[16 * 32], out[16 * 32];
    int wide = __builtin_cpu_supports("avx");
    for (size_t i = 0; i < sizeof in; i++)
        in[i] = (unsigned char)(seed >> (i % 8 * 8)) ^ (unsigned char)i;
    for (;;) {
        long double x87 = 1.25L + (long double)seed, back;
        uint64_t turns = 300000;
        if (wide)
            __asm__ volatile(
                "fldt %[x]\n"
                "vmovdqu (%[in]),%%ymm0\n vmovdqu 32(%[in]),%%ymm1\n vmovdqu 64(%[in]),%%ymm2\n"
                "vmovdqu 96(%[in]),%%ymm3\n vmovdqu 224(%[in]),%%ymm7\n vmovdqu 480(%[in]),%%ymm15\n"
                "1: dec %[n]\n jnz 1b\n"
                "vmovdqu %%ymm0,(%[out])\n vmovdqu %%ymm1,32(%[out])\n vmovdqu %%ymm2,64(%[out])\n"
                "vmovdqu %%ymm3,96(%[out])\n vmovdqu %%ymm7,224(%[out])\n vmovdqu %%ymm15,480(%[out])\n"
                "vzeroupper\n fstpt %[y]\n"
                : [n] "+r"(turns), [y] "=m"(back)
                : [x] "m"(x87), [in] "r"(in), [out] "r"(out)
                : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm7", "xmm15", "st");
        else
            __asm__ volatile(
                "fldt %[x]\n movdqu (%[in]),%%xmm0\n movdqu 480(%[in]),%%xmm15\n"
                "1: dec %[n]\n jnz 1b\n"
                "movdqu %%xmm0,(%[out])\n movdqu %%xmm15,480(%[out])\n fstpt %[y]\n"
                : [n] "+r"(turns), [y] "=m"(back)
                : [x] "m"(x87), [in] "r"(in), [out] "r"(out)
                : "memory", "cc", "xmm0", "xmm15", "st");
        CHECK(back == x87, "floating point stack");
        CHECK(memcmp(in, out, wide ? 32 : 16) == 0 && memcmp(in + 480, out + 480, wide ? 32 : 16) == 0, "vectors");
        CHECK(!wide || (memcmp(in, out, 128) == 0 && memcmp(in + 224, out + 224, 32) == 0), "wide vectors");
        atomic_fetch_add(&done, 1);
    }
    return NULL;
}
static void registers_prepare(void)
{
    for (uintptr_t i = 1; i <= 3; i++)
        start_thread(registers, (void *)i);
}
static void registers_fully(void)
{
    unsigned long long was = atomic_load(&done);
    while (atomic_load(&done) < was + 10)
        usleep(1000);
}

/* The restartable-sequence area that the C library registered is kept up to date by the kernel. */
static void rseq_fully(void)
{
    if (__rseq_size == 0)
        return;
    volatile struct rseq *area = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
    for (int i = 0; i < 1000; i++) {
        unsigned before, said, after;
        CHECK(syscall(SYS_getcpu, &before, NULL, NULL) == 0, "getcpu");
        said = area->cpu_id;
        CHECK(syscall(SYS_getcpu, &after, NULL, NULL) == 0, "getcpu");
        CHECK(before != after || said == before, "area says %u, kernel %u", said, before);
        if (i % 100 == 0)
            usleep(100);
    }
}

ZOO({"many", many_prepare, NULL, many_fully},
    {"ending", ending_prepare, NULL, ending_fully},
    {"registers", registers_prepare, NULL, registers_fully},
    {"rseq", NULL, NULL, rseq_fully})
