/* Huge pages (hugetlb): each kind takes at most 5 of them here, and as many where it is moved to. */
#include "zoo.h"
#include <linux/memfd.h>
#include <sys/stat.h>

#define HUGE (2u << 20)

static char *areas[4];

static char *map(int flags, int fd, unsigned pages)
{
    char *got = mmap(NULL, (size_t)pages * HUGE, PROT_READ | PROT_WRITE, flags, fd, 0);
    CHECK(got != MAP_FAILED, "mmap");
    return got;
}
static void fill(char *at, unsigned pages, unsigned by)
{
    unsigned *words = (unsigned *)at;
    for (unsigned i = 0; i < pages * (HUGE / 4); i++)
        words[i] = i * 7 + by;
}
static void filled(const char *at, unsigned pages, unsigned by)
{
    const unsigned *words = (const unsigned *)at;
    for (unsigned i = 0; i < pages * (HUGE / 4); i++)
        CHECK(words[i] == i * 7 + by, "word %u: %x", i, words[i]);
}
static void empty(const char *at, unsigned pages)
{
    for (size_t i = 0; i < (size_t)pages * HUGE; i++)
        CHECK(at[i] == 0, "byte %zu: %d", i, at[i]);
}

/* Private: written, written in part, never touched; and one page that comes and goes. */
static unsigned turn;
static void private_prepare(void)
{
    areas[0] = map(MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 4);
    fill(areas[0], 1, 1);
    areas[0][HUGE + 12345] = 7;
}
static void private_often(void)
{
    ((unsigned *)areas[0])[turn % (HUGE / 4)] = turn % (HUGE / 4) * 7 + 1;
    turn++;
    /* Dropped, and read: a new page full of zeros, that nobody has written. Or written again. */
    char *page = areas[0] + 2 * HUGE;
    if (turn % 40 == 0)
        fill(page, 1, turn);
    if (turn % 40 == 20)
        CHECK(madvise(page, HUGE, MADV_DONTNEED) == 0, "dontneed");
    if (turn % 40 > 22 && turn % 3 == 0)
        CHECK(page[turn] == 0, "invented");
}
static void private_fully(void)
{
    filled(areas[0], 1, 1);
    CHECK(areas[0][HUGE + 12345] == 7, "second page");
    areas[0][HUGE + 12345] = 0;
    empty(areas[0] + HUGE, 1);
    areas[0][HUGE + 12345] = 7;
    if (turn % 40 >= 20)
        empty(areas[0] + 2 * HUGE, 1);
    else if (turn >= 40)
        filled(areas[0] + 2 * HUGE, 1, turn - turn % 40);
    empty(areas[0] + 3 * HUGE, 1);
}

/* A page that is dropped just once, and read, late: only the last look can find that out. */
static void dropped_prepare(void)
{
    areas[0] = map(MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 2);
    areas[1] = map(MAP_SHARED | MAP_ANONYMOUS | MAP_HUGETLB, -1, 2);
    for (int i = 0; i < 2; i++)
        fill(areas[i], 2, 3);
}
static void dropped_often(void)
{
    static unsigned turn, empty_now;
    CHECK(((unsigned *)areas[0])[999] == (empty_now ? 0 : 999 * 7 + 3), "private page");
    CHECK(((unsigned *)areas[1])[HUGE / 4 + 999] == (empty_now ? 0 : (HUGE / 4 + 999) * 7 + 3), "shared page");
    if (++turn % 3)
        return;
    if ((empty_now = !empty_now)) {
        CHECK(madvise(areas[0], HUGE, MADV_DONTNEED) == 0 && areas[0][99] == 0, "dontneed");
        CHECK(madvise(areas[1] + HUGE, HUGE, MADV_REMOVE) == 0 && areas[1][HUGE + 99] == 0, "remove");
    } else {
        fill(areas[0], 1, 3);
        fill(areas[1], 2, 3);
    }
}
static void dropped_fully(void)
{
    filled(areas[1], 1, 3);
}

/* Shared anonymous: written, and then not mapped any more, so that no scan of the mapping tells. */
static void shared_prepare(void)
{
    areas[0] = map(MAP_SHARED | MAP_ANONYMOUS | MAP_HUGETLB, -1, 4);
    fill(areas[0], 2, 2);
}
static void shared_often(void)
{
    unsigned *words = (unsigned *)(areas[0] + 2 * HUGE);
    CHECK(words[HUGE / 8] == turn, "lost: %u, not %u", words[HUGE / 8], turn);
    words[0] = 1;
    words[HUGE / 8] = ++turn;
    CHECK(madvise(areas[0] + 2 * HUGE, HUGE, MADV_DONTNEED) == 0, "dontneed");
}
static void shared_fully(void)
{
    filled(areas[0], 2, 2);
}

/* A memfd of huge pages, mapped shared and private; one page of it is only open, and one a hole. */
static int fd;
static void memfd_prepare(void)
{
    fd = memfd_create("zoo-huge", MFD_HUGETLB | MFD_ALLOW_SEALING);
    CHECK(fd >= 0 && ftruncate(fd, 4 * HUGE) == 0, "memfd");
    char *at = map(MAP_SHARED, fd, 3);
    fill(at, 3, 4);
    CHECK(munmap(at + 2 * HUGE, HUGE) == 0, "munmap");
    areas[0] = at;
    areas[1] = mmap(NULL, HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, HUGE);
    CHECK(areas[1] != MAP_FAILED, "mmap");
    areas[1][5] = 55;
    CHECK(fcntl(fd, F_ADD_SEALS, F_SEAL_GROW) == 0, "seal");
}
static void memfd_often(void)
{
    areas[0][turn++ % 1000]++;
}
static void memfd_fully(void)
{
    fill(areas[0], 1, 4);
    filled(areas[0], 2, 4);
    CHECK(areas[1][5] == 55, "private page");
    char byte;
    CHECK(pread(fd, &byte, 1, 2 * HUGE + 4) == 1 && byte == (char)((2 * (HUGE / 4) + 1) * 7 + 4), "open page %d", byte);
    struct stat s;
    CHECK(fstat(fd, &s) == 0 && s.st_size == 4 * HUGE && s.st_blocks == 3 * HUGE / 512, "blocks %ld", (long)s.st_blocks);
    CHECK(fcntl(fd, F_GET_SEALS) == F_SEAL_GROW, "seals");
}

ZOO({"private", private_prepare, private_often, private_fully},
    {"dropped", dropped_prepare, dropped_often, dropped_fully},
    {"shared", shared_prepare, shared_often, shared_fully},
    {"memfd", memfd_prepare, memfd_often, memfd_fully})
