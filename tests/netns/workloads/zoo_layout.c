/* Mappings of rarer kinds: sealed, droppable, growing down, beyond the end of a file, very many. */
#include "zoo.h"
#include <setjmp.h>
#include <sys/stat.h>

#define PAGE 4096
#define MANY 64

static char *areas[8];
static sigjmp_buf back;

static void on_fault(int s) { siglongjmp(back, s); }
static int faults(volatile char *at)
{
    int signal = sigsetjmp(back, 1);
    if (signal)
        return signal;
    (void)*at;
    return 0;
}
static char *anon(size_t pages, int prot, int flags)
{
    char *got = mmap(NULL, pages * PAGE, prot, flags | MAP_ANONYMOUS, -1, 0);
    CHECK(got != MAP_FAILED, "mmap");
    return got;
}

static int sealed;
static void sealed_prepare(void)
{
    areas[0] = anon(MANY, PROT_READ | PROT_WRITE, MAP_PRIVATE);
    memset(areas[0], 7, MANY * PAGE);
    sealed = syscall(462 /* mseal */, areas[0], (size_t)MANY * PAGE, 0) == 0;
}
static void sealed_fully(void)
{
    for (int i = 0; i < MANY; i++)
        CHECK(areas[0][i * PAGE]++ >= 7, "page %d", i);
    if (sealed)
        CHECK(mprotect(areas[0], PAGE, PROT_NONE) < 0 && errno == EPERM, "not sealed any more");
}

/* The kernel may drop its pages at any time: each is as it was written, or zeros. */
static int droppable;
static void droppable_prepare(void)
{
    areas[0] = mmap(NULL, MANY * PAGE, PROT_READ | PROT_WRITE, 8 /* MAP_DROPPABLE */ | MAP_ANONYMOUS, -1, 0);
    droppable = areas[0] != MAP_FAILED;
    if (droppable)
        memset(areas[0], 9, MANY * PAGE);
}
static void droppable_fully(void)
{
    for (int i = 0; droppable && i < MANY; i++) {
        CHECK(areas[0][i * PAGE] == 9 || areas[0][i * PAGE] == 0, "page %d", i);
        memset(areas[0] + i * PAGE, 9, PAGE);
    }
}

/* A stack of one's own that grows by itself. */
static void grows_prepare(void)
{
    char *room = anon(1024, PROT_NONE, MAP_PRIVATE);
    CHECK(munmap(room, 1024 * PAGE) == 0, "munmap");
    areas[0] = mmap(room + 1000 * PAGE, 4 * PAGE, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_FIXED_NOREPLACE, -1, 0);
    CHECK(areas[0] == room + 1000 * PAGE, "mmap");
    memset(areas[0], 3, 4 * PAGE);
}
static void grows_fully(void)
{
    static int depth;
    CHECK(areas[0][0] == 3 && areas[0][4 * PAGE - 1] == 3, "contents");
    for (int end = depth + 5; depth < end; depth++)
        areas[0][-(depth + 1) * PAGE] = 4;
    for (int i = 0; i < depth; i++)
        CHECK(areas[0][-(i + 1) * PAGE] == 4, "page %d below", i);
}

/* A file that ends in the middle of its mappings; one page of the private one is its own. */
static void beyond_prepare(void)
{
    char path[64];
    struct sigaction a = {.sa_handler = on_fault, .sa_flags = SA_NODEFER};
    CHECK(sigaction(SIGBUS, &a, NULL) == 0, "sigaction");
    snprintf(path, sizeof path, "/run/shared/zoo-end-%d", getpid());
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    CHECK(fd >= 0 && ftruncate(fd, 8 * PAGE) == 0, "%s", path);
    areas[0] = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    areas[1] = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    areas[2] = mmap(NULL, 8 * PAGE, PROT_READ, MAP_PRIVATE, fd, 2 * PAGE);
    areas[0][0] = areas[0][PAGE] = 'p';
    areas[1][1] = areas[1][PAGE + 100] = 's';
    CHECK(ftruncate(fd, PAGE + 200) == 0 && close(fd) == 0, "ftruncate");
}
static void beyond_fully(void)
{
    CHECK(areas[0][0] == 'p' && areas[0][PAGE] == 'p', "private");
    CHECK(areas[1][1] == 's' && areas[1][PAGE + 100] == 's' && areas[1][PAGE + 300] == 0, "shared");
    for (int i = 2; i < 8; i++)
        CHECK(faults(areas[0] + i * PAGE) == SIGBUS && faults(areas[1] + i * PAGE) == SIGBUS, "page %d", i);
    CHECK(faults(areas[2]) == SIGBUS, "wholly beyond");
}

/* Twenty thousand mappings. */
#define LOTS 20000
static void lots_prepare(void)
{
    areas[0] = anon(LOTS, PROT_READ | PROT_WRITE, MAP_PRIVATE);
    for (int i = 0; i < LOTS; i++)
        areas[0][(size_t)i * PAGE] = (char)i;
    for (int i = 0; i < LOTS; i += 2)
        CHECK(mprotect(areas[0] + (size_t)i * PAGE, PAGE, PROT_READ) == 0, "mprotect");
}
static void lots_fully(void)
{
    for (int i = 0; i < LOTS; i++)
        CHECK(areas[0][(size_t)i * PAGE] == (char)i, "page %d", i);
}

/* Private mappings of what is not a file: /dev/zero, and a memfd that is closed. */
static void sources_prepare(void)
{
    int zero = open("/dev/zero", O_RDWR | O_CLOEXEC), memory = (int)syscall(SYS_memfd_create, "private", 1);
    CHECK(write(memory, "of the memfd", 12) == 12 && ftruncate(memory, 4 * PAGE) == 0, "memfd");
    areas[0] = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, zero, 0);
    areas[1] = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, zero, 0);
    areas[2] = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, memory, 0);
    areas[3] = mmap(NULL, 4 * PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE, memory, 0);
    close(zero);
    close(memory);
    for (int i = 0; i < 3; i++)
        areas[i][PAGE] = (char)('0' + i);
}
static void sources_fully(void)
{
    for (int i = 0; i < 3; i++)
        CHECK(areas[i][PAGE] == '0' + i && areas[i][2 * PAGE] == 0, "mapping %d", i);
    CHECK(memcmp(areas[2], "of the memfd", 12) == 0 && memcmp(areas[3], "of the memfd", 12) == 0 && areas[3][PAGE] == 0, "memfd");
}

/* A huge page that is one, and stays readable after parts of it were given back. */
static void thp_prepare(void)
{
    areas[0] = mmap((char *)0x600000000000, 8 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    CHECK(areas[0] != MAP_FAILED && madvise(areas[0], 8 << 20, MADV_HUGEPAGE) == 0, "mmap");
    memset(areas[0], 6, 8 << 20);
    CHECK(madvise(areas[0] + (1 << 20), 64 * PAGE, MADV_DONTNEED) == 0, "dontneed");
    CHECK(mprotect(areas[0] + (5 << 20), 16 * PAGE, PROT_NONE) == 0, "mprotect");
}
static void thp_fully(void)
{
    CHECK(mprotect(areas[0] + (5 << 20), 16 * PAGE, PROT_READ | PROT_WRITE) == 0, "mprotect");
    for (size_t i = 0; i < 8 << 20; i += 512) {
        int dropped = i >= 1 << 20 && i < (1 << 20) + 64 * PAGE;
        CHECK(areas[0][i] == (dropped ? 0 : 6), "at %zx: %d", i, areas[0][i]);
    }
    CHECK(mprotect(areas[0] + (5 << 20), 16 * PAGE, PROT_NONE) == 0, "mprotect");
}

ZOO({"sealed", sealed_prepare, NULL, sealed_fully},
    {"droppable", droppable_prepare, NULL, droppable_fully},
    {"grows", grows_prepare, NULL, grows_fully},
    {"beyond", beyond_prepare, NULL, beyond_fully},
    {"lots", lots_prepare, NULL, lots_fully},
    {"sources", sources_prepare, NULL, sources_fully},
    {"thp", thp_prepare, NULL, thp_fully})
