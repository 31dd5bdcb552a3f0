/* Memory that a storm goes through: pages that each know what they must contain. */
#ifndef STORM_H
#define STORM_H
#include "zoo.h"

#define PAGE 4096u
#define WORDS (PAGE / 8)

struct arena {
    char *base;
    uint32_t pages;
    uint64_t id;
    uint32_t *sequence; /* 0: reads as zeros */
};

static inline uint64_t mix(uint64_t x)
{
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdULL;
    x ^= x >> 33;
    x *= 0xc4ceb9fe1a85ec53ULL;
    return x ^ (x >> 33);
}

/* Repeatable choices; each thread and child has a state of its own. */
static inline uint32_t pick(uint64_t *random, uint32_t below)
{
    *random = mix(*random + 0x9e3779b97f4a7c15ULL);
    return (uint32_t)(*random % below);
}

static inline char *page_at(const struct arena *a, uint32_t page)
{
    return a->base + (size_t)page * PAGE;
}

static inline uint64_t word_of(const struct arena *a, uint32_t page, uint32_t i)
{
    uint32_t sequence = a->sequence[page];
    return sequence ? mix(a->id ^ ((uint64_t)page << 40) ^ sequence) + i * 0x0101010101010101ULL : 0;
}

static inline void stamp(struct arena *a, uint32_t page)
{
    uint64_t *words = (uint64_t *)page_at(a, page);
    a->sequence[page]++;
    for (uint32_t i = 0; i < WORDS; i++)
        words[i] = word_of(a, page, i);
}

/* What a page must contain, into a buffer. */
static inline void expected(const struct arena *a, uint32_t page, void *into)
{
    uint64_t *words = into;
    for (uint32_t i = 0; i < WORDS; i++)
        words[i] = word_of(a, page, i);
}

static inline void verify_at(const struct arena *a, uint32_t page, const void *at, const char *what)
{
    const uint64_t *words = at;
    for (uint32_t i = 0; i < WORDS; i++)
        if (words[i] != word_of(a, page, i))
            fail("%s: page %u of %u at %p, word %u: is %llx, must be %llx (sequence %u)", what, page, a->pages,
                 at, i, (unsigned long long)words[i], (unsigned long long)word_of(a, page, i),
                 a->sequence[page]);
}

static inline void verify(const struct arena *a, uint32_t page, const char *what)
{
    verify_at(a, page, page_at(a, page), what);
}

static inline void verify_arena(const struct arena *a, const char *what)
{
    for (uint32_t page = 0; page < a->pages; page++)
        verify(a, page, what);
}

static inline char *map_pages(void *at, uint32_t pages, int shared)
{
    int flags = MAP_ANONYMOUS | (shared ? MAP_SHARED : MAP_PRIVATE) | (at ? MAP_FIXED : 0);
    char *got = mmap(at, (size_t)pages * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
    CHECK(got != MAP_FAILED, "mmap");
    return got;
}

/* An arena with every page stamped, and room in its book to grow to `most` pages. */
static inline void make_arena(struct arena *a, uint64_t id, uint32_t pages, uint32_t most, int shared)
{
    a->id = mix(id + 1);
    a->pages = pages;
    a->base = map_pages(NULL, pages, shared);
    a->sequence = calloc(most, sizeof *a->sequence);
    CHECK(a->sequence, "calloc");
    for (uint32_t page = 0; page < pages; page++)
        stamp(a, page);
}

/* A round: threads that wait for it go through their storm, and it ends when all have. */
#define STORM_THREADS 4
static atomic_uint round_begun, round_done;

static inline void whole_round(void)
{
    unsigned round = atomic_fetch_add(&round_begun, 1) + 1;
    while (atomic_load(&round_done) < round * STORM_THREADS)
        usleep(1000);
}

static inline void wait_round(unsigned *last)
{
    while (atomic_load(&round_begun) == *last)
        usleep(1000);
    ++*last;
}

static inline void end_round(void)
{
    atomic_fetch_add(&round_done, 1);
}
#endif
