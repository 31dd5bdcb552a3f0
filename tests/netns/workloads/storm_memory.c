/* Storms over the map: memory moved, dropped and mapped over, as fast as several threads can. */
#include "storm.h"
#include <linux/mman.h>

#define STEPS 500
#define ARENA_PAGES 4096 /* per thread; may double */
#define MOST_PAGES (2 * ARENA_PAGES)

static struct arena arenas[STORM_THREADS];
static uint64_t randoms[STORM_THREADS];

static void begin(void *(*run)(void *), int shared)
{
    for (uintptr_t i = 0; i < STORM_THREADS; i++) {
        make_arena(&arenas[i], i, ARENA_PAGES, MOST_PAGES, shared);
        randoms[i] = mix(i + 77);
        start_thread(run, (void *)i);
    }
}

/* A range of at most 64 pages. */
static uint32_t range(const struct arena *a, uint64_t *random, uint32_t *pages)
{
    uint32_t start = pick(random, a->pages);
    uint32_t most = a->pages - start < 64 ? a->pages - start : 64;
    *pages = 1 + pick(random, most);
    return start;
}

static void emptied(struct arena *a, uint32_t start, uint32_t pages)
{
    memset(a->sequence + start, 0, pages * sizeof *a->sequence);
}

/* One page anywhere, one in the range and its two neighbours; two of them are written. */
static void look(struct arena *a, uint64_t *random, uint32_t start, uint32_t pages, const char *what)
{
    uint32_t some = start + pick(random, pages);
    verify(a, pick(random, a->pages), what);
    verify(a, some, what);
    if (start > 0)
        verify(a, start - 1, what);
    if (start + pages < a->pages)
        verify(a, start + pages, what);
    stamp(a, some);
    stamp(a, pick(random, a->pages));
}

/* Runs `step` many times a round on the thread's own arena, and then verifies all of it. */
static void rounds(uintptr_t number, void (*step)(struct arena *, uint64_t *))
{
    for (unsigned round = 0;;) {
        wait_round(&round);
        for (int i = 0; i < STEPS; i++) {
            step(&arenas[number], &randoms[number]);
            atomic_fetch_add(&steps, 1);
        }
        verify_arena(&arenas[number], "after the storm");
        end_round();
    }
}

static void move(struct arena *a, uint64_t *random)
{
    size_t length = (size_t)a->pages * PAGE;
    char *old = a->base, *got;
    uint32_t what = pick(random, 10), pages;
    if (what < 4) {
        char *to = mmap(NULL, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(to != MAP_FAILED, "mmap");
        got = mremap(old, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, to);
        CHECK(got == to, "mremap to %p", (void *)to);
        pages = a->pages;
    } else if (what < 5) {
        /* The old place stays mapped, and empty. */
        got = mremap(old, length, length, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
        CHECK(got != MAP_FAILED && got != old, "mremap, leaving the mapping");
        for (int i = 0; i < 8; i++) {
            char *at = old + (size_t)pick(random, a->pages) * PAGE;
            CHECK(*(volatile uint64_t *)at == 0, "what was moved away is still at %p", (void *)at);
        }
        CHECK(munmap(old, length) == 0, "munmap");
        pages = a->pages;
    } else {
        pages = ARENA_PAGES - 512 + pick(random, 2048);
        got = mremap(old, length, (size_t)pages * PAGE, MREMAP_MAYMOVE);
        CHECK(got != MAP_FAILED, "mremap to %u pages", pages);
        if (pages > a->pages)
            emptied(a, a->pages, pages - a->pages);
    }
    a->base = got;
    a->pages = pages;
    uint32_t some, start = range(a, random, &some);
    look(a, random, start, some, "mremap");
}

static void *moving(void *number)
{
    rounds((uintptr_t)number, move);
    return NULL;
}

static void mremap_prepare(void)
{
    begin(moving, 0);
}

/* Whether no thread maps without saying where: it could take a hole that another is about to fill. */
static int holes_are_safe = 1;

static void map_over(struct arena *a, uint64_t *random)
{
    uint32_t pages, start = range(a, random, &pages);
    if (holes_are_safe && pick(random, 2) == 0)
        CHECK(munmap(page_at(a, start), (size_t)pages * PAGE) == 0, "munmap");
    map_pages(page_at(a, start), pages, 0);
    emptied(a, start, pages);
    look(a, random, start, pages, "mapped over");
}

static void *mapping(void *number)
{
    rounds((uintptr_t)number, map_over);
    return NULL;
}

static void munmap_prepare(void)
{
    begin(mapping, 0);
}

static void give_up(struct arena *a, uint64_t *random)
{
    uint32_t pages, start = range(a, random, &pages);
    if (pick(random, 4) > 0) {
        CHECK(madvise(page_at(a, start), (size_t)pages * PAGE, MADV_DONTNEED) == 0, "MADV_DONTNEED");
        emptied(a, start, pages);
    } else {
        CHECK(madvise(page_at(a, start), (size_t)pages * PAGE, MADV_FREE) == 0, "MADV_FREE");
        /* Old or empty until it is written; from then on it is kept. */
        for (uint32_t page = start; page < start + pages; page++)
            stamp(a, page);
    }
    look(a, random, start, pages, "given up");
}

static void *giving_up(void *number)
{
    rounds((uintptr_t)number, give_up);
    return NULL;
}

static void dontneed_prepare(void)
{
    begin(giving_up, 0);
}

static void punch(struct arena *a, uint64_t *random)
{
    uint32_t pages, start = range(a, random, &pages);
    if (pick(random, 2) == 0) {
        CHECK(madvise(page_at(a, start), (size_t)pages * PAGE, MADV_REMOVE) == 0, "MADV_REMOVE");
        emptied(a, start, pages);
    } else {
        /* Of shared memory this drops the mapping's view only. */
        CHECK(madvise(page_at(a, start), (size_t)pages * PAGE, MADV_DONTNEED) == 0, "MADV_DONTNEED");
    }
    look(a, random, start, pages, "punched");
}

static void *punching(void *number)
{
    rounds((uintptr_t)number, punch);
    return NULL;
}

static void remove_prepare(void)
{
    begin(punching, 1);
}

/* The same shared memory at a second place: what is done by one is seen by the other. */
static void *second_view(const struct arena *a)
{
    void *got = mremap(a->base, 0, (size_t)a->pages * PAGE, MREMAP_MAYMOVE);
    CHECK(got != MAP_FAILED, "a second view");
    return got;
}

static char *views[STORM_THREADS];

static void both(struct arena *a, uint64_t *random)
{
    char **view = &views[a - arenas];
    struct arena other = *a;
    uint32_t page = pick(random, a->pages), seen = pick(random, a->pages);
    other.base = *view;
    verify(&other, seen, "by the second view");
    verify(a, seen, "by the first view");
    stamp(&other, page);
    verify(a, page, "written by the second view");
    punch(pick(random, 2) ? a : &other, random);
    if (pick(random, 30) == 0) {
        CHECK(munmap(*view, (size_t)a->pages * PAGE) == 0, "munmap");
        *view = second_view(a);
    }
}

static void *both_ways(void *number)
{
    rounds((uintptr_t)number, both);
    return NULL;
}

static void twice_prepare(void)
{
    begin(both_ways, 1);
    for (int i = 0; i < STORM_THREADS; i++)
        views[i] = second_view(&arenas[i]);
}

/* All of them at once, each thread another, over the same address space. */
static void *all_ways(void *number)
{
    static void (*const ways[STORM_THREADS])(struct arena *, uint64_t *) = {move, map_over, give_up, punch};
    rounds((uintptr_t)number, ways[(uintptr_t)number]);
    return NULL;
}

static void all_prepare(void)
{
    holes_are_safe = 0;
    begin(all_ways, 0);
    free(arenas[3].sequence);
    CHECK(munmap(arenas[3].base, (size_t)ARENA_PAGES * PAGE) == 0, "munmap");
    make_arena(&arenas[3], 3, ARENA_PAGES, MOST_PAGES, 1);
}

/* Huge pages: private ones, shared ones, and two threads with small pages beside them. */
#define HUGE 512u
#define HUGE_FLAGS (MAP_ANONYMOUS | MAP_HUGETLB | (21 << MAP_HUGE_SHIFT))

static void over_huge(struct arena *a, uint64_t *random, int flags)
{
    uint32_t start = pick(random, a->pages / HUGE) * HUGE, what = pick(random, 60);
    char *at = page_at(a, start);
    if (what == 0) {
        CHECK(madvise(at, HUGE * PAGE, MADV_DONTNEED) == 0, "MADV_DONTNEED");
        if (flags & MAP_PRIVATE)
            emptied(a, start, HUGE);
    } else if (what == 1 && flags & MAP_PRIVATE) {
        CHECK(munmap(at, HUGE * PAGE) == 0, "munmap");
        CHECK(mmap(at, HUGE * PAGE, PROT_READ | PROT_WRITE, flags | MAP_FIXED, -1, 0) == at, "mmap");
        emptied(a, start, HUGE);
    } else if (what == 1) {
        CHECK(madvise(at, HUGE * PAGE, MADV_REMOVE) == 0, "MADV_REMOVE");
        emptied(a, start, HUGE);
    }
    look(a, random, start, HUGE, "a huge page's");
}

static void over_private_huge(struct arena *a, uint64_t *random)
{
    over_huge(a, random, HUGE_FLAGS | MAP_PRIVATE);
}

static void over_shared_huge(struct arena *a, uint64_t *random)
{
    over_huge(a, random, HUGE_FLAGS | MAP_SHARED);
}

static void *huge_ways(void *number)
{
    static void (*const ways[STORM_THREADS])(struct arena *, uint64_t *) = {
        over_private_huge, over_shared_huge, give_up, move};
    rounds((uintptr_t)number, ways[(uintptr_t)number]);
    return NULL;
}

static void huge_prepare(void)
{
    begin(huge_ways, 0);
    for (int i = 0; i < 2; i++) {
        struct arena *a = &arenas[i];
        CHECK(munmap(a->base, (size_t)a->pages * PAGE) == 0, "munmap");
        a->pages = (3 - (uint32_t)i) * HUGE;
        int flags = HUGE_FLAGS | (i ? MAP_SHARED : MAP_PRIVATE);
        a->base = mmap(NULL, (size_t)a->pages * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
        CHECK(a->base != MAP_FAILED, "mmap of huge pages");
        emptied(a, 0, ARENA_PAGES);
        for (uint32_t page = 0; page < a->pages; page++)
            stamp(a, page);
    }
}

ZOO({"mremap", mremap_prepare, NULL, whole_round},
    {"munmap", munmap_prepare, NULL, whole_round},
    {"dontneed", dontneed_prepare, NULL, whole_round},
    {"remove", remove_prepare, NULL, whole_round},
    {"twice", twice_prepare, NULL, whole_round},
    {"all", all_prepare, NULL, whole_round},
    {"huge", huge_prepare, NULL, whole_round})
