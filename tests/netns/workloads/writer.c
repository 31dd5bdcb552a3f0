/* The rolling-pattern writer: `writer THREADS MIB FILE PACE [nofile] [shared] [memfd] [sysv] [huge]`.
 *
 * Each thread owns regions of memory (private anonymous and private file; with the words also shared
 * anonymous, memfd, System V, and some of huge pages; with `nofile` no private file), stamps their pages with a sequence over the whole page, and knows for each page what it must
 * contain. Under way it maps, unmaps, moves, grows, shrinks and drops parts of them. One byte that is
 * stale, lost or invented ends the program. PACE is how many stamps a thread makes per millisecond.
 *
 * After a SIGUSR2 the first thread also forks: its children find its memory as it was at their birth, and
 * end. After the next one it forks no more. */
#include "workload.h"
#include <sys/ipc.h>
#include <sys/shm.h>
#include <sys/wait.h>

#define PAGE 4096
#define WORDS (PAGE / 8)
#define REGIONS 8
#define MOST_THREADS 64

#define HUGE_PAGES 512 /* pages in a huge page */
#define MOST_HUGE 4    /* huge regions at a time: the pool is small */

enum kind { ANON, FROM_FILE, SHARED, MEMFD, SYSV, HUGE_PRIVATE, HUGE_SHARED, KINDS };

struct region {
    enum kind kind;
    uint64_t id;
    char *base;
    uint32_t pages;
    uint32_t first;     /* page of the file where it begins */
    int fd;             /* of a memfd that is still open, else -1 */
    int segment;        /* a System V segment that is not removed yet, else -1 */
    int pieces;         /* mapped in pieces: mremap takes one mapping, and these need not have merged */
    uint32_t *sequence; /* 0: never stamped since it was mapped or dropped */
};

struct worker {
    pthread_t thread;
    int number;
    uint64_t random;
    uint32_t sequence;
    uint64_t next_id;
    atomic_uint checked; /* the last full check that was asked for and done */
    struct region regions[REGIONS];
};

static struct worker workers[MOST_THREADS];
static int thread_count, file = -1, pace;
static uint32_t region_pages, file_pages;
static enum kind kinds[KINDS] = {ANON, FROM_FILE};
static uint64_t kind_count = 2;
static atomic_int huge_regions;
static atomic_uint check_asked;

static uint64_t mix(uint64_t x)
{
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdULL;
    x ^= x >> 33;
    x *= 0xc4ceb9fe1a85ec53ULL;
    return x ^ (x >> 33);
}

static uint64_t pick(struct worker *w, uint64_t below)
{
    w->random = mix(w->random + 0x9e3779b97f4a7c15ULL);
    return w->random % below;
}

static uint64_t stamp_base(const struct region *r, uint32_t page)
{
    return mix(r->id ^ ((uint64_t)page << 40) ^ r->sequence[page]);
}

static void stamp(struct worker *w, struct region *r, uint32_t page)
{
    uint64_t *words = (uint64_t *)(r->base + (size_t)page * PAGE);
    r->sequence[page] = ++w->sequence;
    uint64_t base = stamp_base(r, page);
    if (r->fd >= 0 && w->sequence % 4 == 0) {
        /* Behind the back of the mapping. */
        uint64_t copy[WORDS];
        for (int i = 0; i < WORDS; i++)
            copy[i] = base + (uint64_t)i * 0x0101010101010101ULL;
        CHECK(pwrite(r->fd, copy, PAGE, (off_t)page * PAGE) == PAGE, "pwrite");
        return;
    }
    for (int i = 0; i < WORDS; i++)
        words[i] = base + (uint64_t)i * 0x0101010101010101ULL;
}

static uint64_t file_word(uint32_t page, int i)
{
    return mix(((uint64_t)page << 16) | (uint64_t)i);
}

static void verify(const struct worker *w, const struct region *r, uint32_t page)
{
    const uint64_t *words = (const uint64_t *)(r->base + (size_t)page * PAGE);
    uint64_t base = stamp_base(r, page);
    for (int i = 0; i < WORDS; i++) {
        uint64_t want = r->sequence[page] ? base + (uint64_t)i * 0x0101010101010101ULL
                        : r->kind == FROM_FILE ? file_word(r->first + page, i) : 0;
        if (words[i] != want)
            fail("thread %d kind %d region %p page %u (%p) word %d: is %llx, must be %llx, sequence %u of %u",
                 w->number, r->kind, (void *)r->base, page, (const void *)words, i,
                 (unsigned long long)words[i], (unsigned long long)want, r->sequence[page], w->sequence);
    }
}

static void verify_all(const struct worker *w)
{
    for (int i = 0; i < REGIONS; i++)
        for (uint32_t page = 0; page < w->regions[i].pages; page++)
            verify(w, &w->regions[i], page);
}

static char *map(const struct region *r, void *at, uint32_t page, uint32_t pages)
{
    int flags = at ? MAP_FIXED : 0;
    int fd = -1;
    off_t offset = 0;
    if (r->kind == FROM_FILE) {
        flags |= MAP_PRIVATE;
        fd = file;
        offset = (off_t)(r->first + page) * PAGE;
    } else {
        flags |= MAP_ANONYMOUS | (r->kind == SHARED ? MAP_SHARED : MAP_PRIVATE);
    }
    char *got = mmap(at, (size_t)pages * PAGE, PROT_READ | PROT_WRITE, flags, fd, offset);
    CHECK(got != MAP_FAILED, "mmap");
    return got;
}

static int is_shared(const struct region *r)
{
    return r->kind == SHARED || r->kind == MEMFD || r->kind == SYSV || r->kind == HUGE_SHARED;
}

static int is_huge(const struct region *r)
{
    return r->kind == HUGE_PRIVATE || r->kind == HUGE_SHARED;
}

/* The kinds that are more than one mmap. */
static char *map_object(struct worker *w, struct region *r)
{
    size_t length = (size_t)r->pages * PAGE;
    if (r->kind == MEMFD) {
        int fd = memfd_create("writer", MFD_CLOEXEC);
        CHECK(fd >= 0 && ftruncate(fd, (off_t)length) == 0, "memfd");
        char *got = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        CHECK(got != MAP_FAILED, "mmap");
        if (pick(w, 2))
            CHECK(close(fd) == 0, "close");
        else
            r->fd = fd;
        return got;
    }
    if (r->kind == SYSV) {
        int id = shmget(IPC_PRIVATE, length, IPC_CREAT | 0600);
        CHECK(id >= 0, "shmget");
        char *got = shmat(id, NULL, 0);
        CHECK(got != (void *)-1, "shmat");
        if (pick(w, 2))
            CHECK(shmctl(id, IPC_RMID, NULL) == 0, "shmctl");
        else
            r->segment = id;
        return got;
    }
    if (is_huge(r)) {
        int flags = r->kind == HUGE_SHARED ? MAP_SHARED : MAP_PRIVATE;
        char *got = mmap(NULL, length, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
        CHECK(got != MAP_FAILED, "mmap");
        return got;
    }
    return map(r, NULL, 0, r->pages);
}

static void make(struct worker *w, struct region *r)
{
    r->kind = kinds[pick(w, kind_count)];
    r->fd = r->segment = -1;
    if (is_huge(r) && atomic_fetch_add(&huge_regions, 1) >= MOST_HUGE) {
        atomic_fetch_sub(&huge_regions, 1);
        r->kind = ANON;
    }
    r->id = mix(((uint64_t)w->number << 48) | ++w->next_id);
    r->pages = is_huge(r) ? HUGE_PAGES : region_pages / 2 + (uint32_t)pick(w, region_pages / 2);
    r->pieces = 0;
    r->first = r->kind == FROM_FILE ? (uint32_t)pick(w, file_pages - r->pages) : 0;
    r->base = map_object(w, r);
    r->sequence = calloc(region_pages * 2 + HUGE_PAGES, sizeof *r->sequence);
    CHECK(r->sequence, "calloc");
}

static void unmake(struct worker *w, struct region *r)
{
    for (int i = 0; i < 16; i++)
        verify(w, r, (uint32_t)pick(w, r->pages));
    CHECK(munmap(r->base, (size_t)r->pages * PAGE) == 0, "munmap");
    CHECK(r->fd < 0 || close(r->fd) == 0, "close");
    CHECK(r->segment < 0 || shmctl(r->segment, IPC_RMID, NULL) == 0, "shmctl");
    if (is_huge(r))
        atomic_fetch_sub(&huge_regions, 1);
    free(r->sequence);
}

/* A range inside the region, for the operations below. */
static uint32_t range(struct worker *w, const struct region *r, uint32_t *pages)
{
    if (is_huge(r)) {
        *pages = HUGE_PAGES;
        return 0;
    }
    uint32_t start = (uint32_t)pick(w, r->pages);
    uint32_t most = r->pages - start < 32 ? r->pages - start : 32;
    *pages = 1 + (uint32_t)pick(w, most);
    return start;
}

static void drop(struct worker *w, struct region *r)
{
    uint32_t pages, start = range(w, r, &pages);
    CHECK(madvise(r->base + (size_t)start * PAGE, (size_t)pages * PAGE, MADV_DONTNEED) == 0, "madvise");
    if (!is_shared(r))
        memset(r->sequence + start, 0, pages * sizeof *r->sequence);
}

static void punch(struct worker *w, struct region *r)
{
    uint32_t pages, start = range(w, r, &pages);
    char *at = r->base + (size_t)start * PAGE;
    if (r->kind == HUGE_PRIVATE)
        return;
    if (r->fd >= 0 && pick(w, 2)) {
        int how = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
        CHECK(fallocate(r->fd, how, (off_t)start * PAGE, (off_t)pages * PAGE) == 0, "fallocate");
    } else if (is_shared(r)) {
        /* A second anonymous object in the middle would not move and grow with the first. */
        CHECK(madvise(at, (size_t)pages * PAGE, MADV_REMOVE) == 0, "madvise");
    } else {
        CHECK(munmap(at, (size_t)pages * PAGE) == 0, "munmap");
        map(r, at, start, pages);
        r->pieces = 1;
    }
    memset(r->sequence + start, 0, pages * sizeof *r->sequence);
}

static void move(struct worker *w, struct region *r)
{
    size_t length = (size_t)r->pages * PAGE;
    if (r->pieces || is_huge(r))
        return;
    char *to = mmap(NULL, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(to != MAP_FAILED, "mmap");
    char *got = mremap(r->base, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, to);
    CHECK(got == to, "mremap");
    r->base = got;
    verify(w, r, (uint32_t)pick(w, r->pages));
}

static void resize(struct worker *w, struct region *r)
{
    uint32_t pages = region_pages / 2 + (uint32_t)pick(w, region_pages);
    if (r->kind != ANON || r->pieces)
        return;
    char *got = mremap(r->base, (size_t)r->pages * PAGE, (size_t)pages * PAGE, MREMAP_MAYMOVE);
    CHECK(got != MAP_FAILED, "mremap");
    r->base = got;
    if (pages > r->pages)
        memset(r->sequence + r->pages, 0, (pages - r->pages) * sizeof *r->sequence);
    r->pages = pages;
}

#define MOST_CHILDREN 3
static volatile sig_atomic_t forking;
static pid_t children[MOST_CHILDREN];

static void on_fork(int signal)
{
    (void)signal;
    forking = !forking;
}

static void look_after_children(struct worker *w)
{
    for (int i = 0; i < MOST_CHILDREN; i++) {
        int status;
        if (children[i] && waitpid(children[i], &status, WNOHANG) == children[i]) {
            CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "child: status %x", (unsigned)status);
            children[i] = 0;
        }
        if (!children[i] && forking) {
            children[i] = fork();
            CHECK(children[i] >= 0, "fork");
            if (!children[i]) {
                verify_all(w);
                _exit(0);
            }
        }
    }
}

static void *work(void *argument)
{
    struct worker *w = argument;
    for (int i = 0; i < REGIONS; i++) {
        make(w, &w->regions[i]);
        for (uint32_t page = 0; page < w->regions[i].pages; page++)
            stamp(w, &w->regions[i], page);
    }
    for (uint64_t step = 1;; step++) {
        struct region *r = &w->regions[pick(w, REGIONS)];
        uint64_t what = pick(w, 10000);
        if (what < 8900)
            stamp(w, r, (uint32_t)pick(w, r->pages));
        else if (what < 9900)
            verify(w, r, (uint32_t)pick(w, r->pages));
        else if (what < 9960)
            drop(w, r);
        else if (what < 9980)
            punch(w, r);
        else if (what < 9989)
            move(w, r);
        else if (what < 9997)
            resize(w, r);
        else {
            unmake(w, r);
            make(w, r);
        }
        if (w->number == 0 && step % 64 == 0)
            look_after_children(w);
        atomic_fetch_add(&steps, 1);
        unsigned asked_for = atomic_load(&check_asked);
        if (atomic_load(&w->checked) != asked_for) {
            verify_all(w);
            atomic_store(&w->checked, asked_for);
        }
        if (step % (uint64_t)pace == 0) {
            struct timespec pause = {0, 1000000};
            nanosleep(&pause, NULL);
        }
    }
    return NULL;
}

static void check_all(void)
{
    unsigned number = atomic_fetch_add(&check_asked, 1) + 1;
    for (int i = 0; i < thread_count; i++)
        while (atomic_load(&workers[i].checked) != number) {
            struct timespec pause = {0, 1000000};
            nanosleep(&pause, NULL);
        }
}

int main(int argc, char **argv)
{
    CHECK(argc >= 5, "usage: writer THREADS MIB FILE PACE [nofile] [shared] [memfd] [sysv] [huge]");
    thread_count = atoi(argv[1]);
    pace = atoi(argv[4]);
    for (int i = 5; i < argc; i++) {
        if (strcmp(argv[i], "nofile") == 0)
            kinds[1] = ANON;
        static const struct { const char *word; enum kind first, last; } words[] = {
            {"shared", SHARED, SHARED}, {"memfd", MEMFD, MEMFD}, {"sysv", SYSV, SYSV},
            {"huge", HUGE_PRIVATE, HUGE_SHARED},
        };
        for (size_t j = 0; j < sizeof words / sizeof words[0]; j++)
            for (enum kind k = words[j].first; strcmp(argv[i], words[j].word) == 0 && k <= words[j].last; k++)
                kinds[kind_count++] = k;
    }
    CHECK(thread_count > 0 && thread_count <= MOST_THREADS && pace > 0, "arguments");
    /* A region is three quarters of this on average. */
    region_pages = (uint32_t)((uint64_t)atoi(argv[2]) * 256 * 4 / 3 / (unsigned)thread_count / REGIONS);
    CHECK(region_pages >= 16, "too little memory");
    file_pages = region_pages * 2;
    file = open(argv[3], O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    CHECK(file >= 0, "%s", argv[3]);
    for (uint32_t page = 0; page < file_pages; page++) {
        uint64_t words[WORDS];
        for (int i = 0; i < WORDS; i++)
            words[i] = file_word(page, i);
        CHECK(write(file, words, PAGE) == PAGE, "write");
    }
    /* What is written to by nobody is easier to find the same on the other host. */
    CHECK(close(file) == 0 && (file = open(argv[3], O_RDONLY | O_CLOEXEC)) >= 0, "%s", argv[3]);
    struct sigaction action = {.sa_handler = on_fork, .sa_flags = SA_RESTART};
    CHECK(sigaction(SIGUSR2, &action, NULL) == 0, "sigaction");
    for (int i = 0; i < thread_count; i++) {
        workers[i].number = i;
        workers[i].random = mix((uint64_t)i + 1) ^ (uint64_t)getpid();
        CHECK(pthread_create(&workers[i].thread, NULL, work, &workers[i]) == 0, "thread");
    }
    check_all();
    verify_forever(NULL, check_all);
}
