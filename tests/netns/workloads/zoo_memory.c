/* Memory that is not plain: protections, advice, locks, holes, growth. */
#include "zoo.h"
#include <linux/mman.h>
#include <setjmp.h>
#include <sys/resource.h>

#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#endif
#define PAGE 4096
#define MANY 64

static char *areas[8];
static sigjmp_buf back;

static void on_fault(int s) { siglongjmp(back, s); }

static int faults(volatile char *at, int writing)
{
    int signal = sigsetjmp(back, 1);
    if (signal)
        return signal;
    if (writing)
        *at = *at;
    else
        (void)*at;
    return 0;
}

static char *anon(int prot, int flags)
{
    char *got = mmap(NULL, MANY * PAGE, prot, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    CHECK(got != MAP_FAILED, "mmap");
    return got;
}
static void fill(char *at, size_t pages)
{
    for (size_t i = 0; i < pages; i++)
        memset(at + i * PAGE, (int)(i * 5 + 1), PAGE);
}
static void filled(const char *at, size_t pages)
{
    for (size_t i = 0; i < pages; i++)
        for (size_t j = 0; j < PAGE; j += 8)
            CHECK(at[i * PAGE + j] == (char)(i * 5 + 1), "page %zu at %zu", i, j);
}
static void catch_faults(void)
{
    struct sigaction a = {.sa_handler = on_fault, .sa_flags = SA_NODEFER};
    CHECK(sigaction(SIGSEGV, &a, NULL) == 0 && sigaction(SIGBUS, &a, NULL) == 0, "sigaction");
}

/* Contents under PROT_NONE and under read-only, and code that was written and made executable. */
static void protections_prepare(void)
{
    static const unsigned char code[] = {0xb8, 0x2a, 0, 0, 0, 0xc3}; /* mov eax, 42; ret */
    catch_faults();
    for (int i = 0; i < 3; i++)
        fill(areas[i] = anon(PROT_READ | PROT_WRITE, 0), MANY);
    memcpy(areas[2], code, sizeof code);
    CHECK(mprotect(areas[0], MANY * PAGE, PROT_NONE) == 0, "none");
    CHECK(mprotect(areas[1] + 8 * PAGE, 8 * PAGE, PROT_READ) == 0, "read");
    CHECK(mprotect(areas[2], PAGE, PROT_READ | PROT_EXEC) == 0, "exec");
}
static void protections_fully(void)
{
    CHECK(faults(areas[0], 0) == SIGSEGV, "PROT_NONE can be read");
    CHECK(mprotect(areas[0], MANY * PAGE, PROT_READ) == 0, "read");
    filled(areas[0], MANY);
    CHECK(faults(areas[0], 1) == SIGSEGV, "read-only can be written");
    CHECK(mprotect(areas[0], MANY * PAGE, PROT_NONE) == 0, "none");
    filled(areas[1], MANY);
    CHECK(faults(areas[1] + 8 * PAGE, 1) == SIGSEGV && faults(areas[1] + 16 * PAGE, 1) == 0, "read-only part");
    CHECK(((int (*)(void))(void *)areas[2])() == 42, "code");
    CHECK(faults(areas[2], 1) == SIGSEGV, "code can be written");
}

static int guards;

static void guard_prepare(void)
{
    catch_faults();
    fill(areas[0] = anon(PROT_READ | PROT_WRITE, 0), MANY);
    guards = madvise(areas[0] + 4 * PAGE, 2 * PAGE, MADV_GUARD_INSTALL) == 0;
}
static void guard_fully(void)
{
    if (!guards)
        return; /* older kernels */
    CHECK(faults(areas[0] + 4 * PAGE, 0) == SIGSEGV && faults(areas[0] + 5 * PAGE, 1) == SIGSEGV, "guard");
    filled(areas[0], 4);
    CHECK(areas[0][6 * PAGE] == (char)(6 * 5 + 1), "behind the guard");
}

static char flags_before[3][256];

static void flags_of(const char *at, char *into)
{
    FILE *file = fopen("/proc/self/smaps", "re");
    char line[512];
    unsigned long start;
    int inside = 0;
    into[0] = 0;
    while (fgets(line, sizeof line, file)) {
        char dash;
        if (sscanf(line, "%lx%c", &start, &dash) == 2 && dash == '-')
            inside = start == (unsigned long)at;
        else if (inside && strncmp(line, "VmFlags:", 8) == 0)
            snprintf(into, 256, "%.250s", line);
    }
    fclose(file);
}
static void advice_prepare(void)
{
    areas[0] = anon(PROT_READ | PROT_WRITE, 0);
    areas[1] = anon(PROT_READ | PROT_WRITE, MAP_NORESERVE);
    areas[2] = anon(PROT_READ | PROT_WRITE, 0);
    CHECK(madvise(areas[0], MANY * PAGE, MADV_DONTFORK) == 0, "dontfork");
    CHECK(madvise(areas[0], MANY * PAGE, MADV_DONTDUMP) == 0, "dontdump");
    CHECK(madvise(areas[1], MANY * PAGE, MADV_HUGEPAGE) == 0 || errno == EINVAL, "hugepage");
    CHECK(madvise(areas[2], MANY * PAGE, MADV_WIPEONFORK) == 0, "wipeonfork");
    CHECK(madvise(areas[2], MANY * PAGE, MADV_SEQUENTIAL) == 0, "sequential");
    for (int i = 0; i < 3; i++) {
        fill(areas[i], MANY);
        flags_of(areas[i], flags_before[i]);
    }
}
static void advice_fully(void)
{
    char now[256];
    for (int i = 0; i < 3; i++) {
        filled(areas[i], MANY);
        flags_of(areas[i], now);
        CHECK(strcmp(now, flags_before[i]) == 0, "area %d was %s is %s", i, flags_before[i], now);
    }
}

static void locked_prepare(void)
{
    struct rlimit limit = {8 << 20, 8 << 20};
    CHECK(setrlimit(RLIMIT_MEMLOCK, &limit) == 0, "setrlimit");
    fill(areas[0] = anon(PROT_READ | PROT_WRITE, 0), MANY);
    CHECK(mlock(areas[0], MANY * PAGE) == 0, "mlock");
    areas[1] = anon(PROT_READ | PROT_WRITE, 0);
    CHECK(mlock2(areas[1], MANY * PAGE, MLOCK_ONFAULT) == 0, "mlock2");
    fill(areas[1], 3);
}
static void locked_fully(void)
{
    char text[64];
    filled(areas[0], MANY);
    filled(areas[1], 3);
    status_field("/proc/self/status", "VmLck", text, sizeof text);
    CHECK(atoi(text) == 2 * MANY * 4, "locked%s", text);
}

/* The break and the stack grow on from where they are, deep use of both included. */
static size_t heap_pages;

static int deep(int depth)
{
    volatile char room[3000];
    memset((char *)room, depth, sizeof room);
    int below = depth ? deep(depth - 1) : 0;
    CHECK(room[0] == (char)depth && room[2999] == (char)depth, "stack at depth %d", depth);
    return below + 1;
}
static void growth_prepare(void)
{
    areas[0] = sbrk(0);
    CHECK(sbrk(16 * PAGE) == areas[0], "sbrk");
    areas[0] = (char *)(((uintptr_t)areas[0] + PAGE - 1) & ~(uintptr_t)(PAGE - 1));
    fill(areas[0], heap_pages = 15);
    CHECK(deep(200) == 201, "stack");
}
static void growth_fully(void)
{
    static int depth = 300;
    filled(areas[0], heap_pages);
    char *end = sbrk(0);
    CHECK(end >= areas[0] + heap_pages * PAGE && sbrk(4 * PAGE) == end, "sbrk");
    memset(end, 0, 4 * PAGE);
    CHECK(deep(depth += 100) > 300, "stack");
}

static void shared_prepare(void)
{
    areas[0] = mmap(NULL, MANY * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(areas[0] != MAP_FAILED, "mmap");
    fill(areas[0], MANY);
    CHECK(madvise(areas[0] + 8 * PAGE, 8 * PAGE, MADV_REMOVE) == 0, "remove");
    /* A second mapping of the same pages. */
    areas[1] = mremap(areas[0], 0, MANY * PAGE, MREMAP_MAYMOVE);
    CHECK(areas[1] != MAP_FAILED && areas[1] != areas[0], "mremap");
}
static void shared_fully(void)
{
    static char turn;
    filled(areas[0], 8);
    filled(areas[1], 8);
    CHECK(areas[0][9 * PAGE] == 0 && areas[1][15 * PAGE + 5] == 0, "hole");
    areas[0][20 * PAGE + 1] = ++turn;
    CHECK(areas[1][20 * PAGE + 1] == turn, "no longer the same pages");
    areas[0][20 * PAGE + 1] = 20 * 5 + 1;
}

/* Far apart, at the lowest address, sparse, and right below the stack's reach. */
static void places_prepare(void)
{
    static char *const at[] = {(char *)0x10000, (char *)0x10000000000, (char *)0x7f0000000000};
    for (int i = 0; i < 3; i++) {
        areas[i] = mmap(at[i], MANY * PAGE, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
        CHECK(areas[i] == at[i], "mmap at %p", (void *)at[i]);
        fill(areas[i], MANY);
    }
    areas[3] = mmap(NULL, 1L << 40, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(areas[3] != MAP_FAILED, "a terabyte");
    for (int i = 0; i < 30; i++)
        areas[3][(size_t)i << 35] = (char)i;
}
static void places_fully(void)
{
    for (int i = 0; i < 3; i++)
        filled(areas[i], MANY);
    for (int i = 0; i < 30; i++) {
        CHECK(areas[3][(size_t)i << 35] == (char)i, "sparse %d", i);
        CHECK(areas[3][((size_t)i << 35) + PAGE] == 0, "invented %d", i);
    }
}

static void file_shared_prepare(void)
{
    char path[64];
    snprintf(path, sizeof path, "/run/shared/zoo-map-%d", getpid());
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    CHECK(fd >= 0 && ftruncate(fd, MANY * PAGE) == 0, "%s", path);
    areas[0] = mmap(NULL, MANY * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    areas[1] = mmap(NULL, MANY * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    CHECK(areas[0] != MAP_FAILED && areas[1] != MAP_FAILED && close(fd) == 0, "mmap");
    fill(areas[0], MANY);
    for (int i = 0; i < 8; i++)
        areas[1][i * PAGE] = (char)(100 + i);
}
static void file_shared_fully(void)
{
    filled(areas[0], MANY);
    filled(areas[1] + 8 * PAGE, 0);
    for (int i = 0; i < MANY; i++)
        CHECK(areas[1][i * PAGE] == (char)(i < 8 ? 100 + i : i * 5 + 1), "private page %d", i);
}

ZOO({"protections", protections_prepare, NULL, protections_fully},
    {"guard_pages", guard_prepare, NULL, guard_fully},
    {"advice", advice_prepare, NULL, advice_fully},
    {"locked", locked_prepare, NULL, locked_fully},
    {"growth", growth_prepare, NULL, growth_fully},
    {"shared_anonymous", shared_prepare, NULL, shared_fully},
    {"places", places_prepare, NULL, places_fully},
    {"file_shared", file_shared_prepare, NULL, file_shared_fully})
