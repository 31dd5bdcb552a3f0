/* A program whose pages are taken away: `worker CASE`. It fills its regions with a pattern of their
 * addresses, prints them and `ready`, waits for a line, uses them, and prints `ok` or `FAIL ...`. */
#include "../netns/workloads/workload.h"
#include <linux/futex.h>
#include <spawn.h>
#include <sys/uio.h>
#include <sys/wait.h>

#define PAGE 4096UL
#define HUGE (2UL << 20)
#define WORDS (PAGE / 8)

static uint64_t mix(uint64_t a)
{
    a ^= a >> 17;
    a *= 0x9e3779b97f4a7c15ULL;
    return a ^ (a >> 29);
}

/* The page at `at` must be the one that was at `name` when it was filled. */
static void check(const void *at, uint64_t name)
{
    const volatile uint64_t *words = at;
    for (unsigned i = 0; i < WORDS; i += 37)
        CHECK(words[i] == mix(name + 8 * i), "%p is not page %lx: word %u is %lx", at, name, i, words[i]);
}

static void check_zero(const void *at)
{
    const volatile uint64_t *words = at;
    for (unsigned i = 0; i < WORDS; i += 37)
        CHECK(words[i] == 0, "%p: word %u is %lx", at, i, words[i]);
}

static void fill(char *at, uint64_t name, size_t len)
{
    for (size_t i = 0; i < len / 8; i++)
        ((uint64_t *)at)[i] = mix(name + 8 * i);
}

static char *map(size_t len, int flags)
{
    char *at = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_ANONYMOUS | flags, -1, 0);
    CHECK(at != MAP_FAILED, "%zu bytes", len);
    if (flags & MAP_HUGETLB)
        return at;
    /* Apart from neighbours, so that the region is one mapping. */
    munmap(at, len);
    at = mmap(at - 64 * PAGE - len, len, PROT_READ | PROT_WRITE, MAP_ANONYMOUS | flags, -1, 0);
    CHECK(at != MAP_FAILED, "%zu bytes", len);
    return at;
}

static void region(const char *at, size_t len, const char *kind)
{
    printf("region %lx %lx %s\n", (uint64_t)at, (uint64_t)at + len, kind);
}

static void ready(void)
{
    char line[16];
    printf("ready\n");
    fflush(stdout);
    CHECK(read(0, line, sizeof line) > 0, "the word to go");
}

static __thread uint64_t seed;
static uint64_t random_below(uint64_t limit)
{
    if (!seed)
        seed = mix((uint64_t)gettid() * 7919 + 1);
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed % limit;
}

static void run_threads(int count, void *(*work)(void *))
{
    pthread_t threads[16];
    for (long i = 0; i < count; i++)
        CHECK(pthread_create(&threads[i], NULL, work, (void *)i) == 0, "thread");
    for (int i = 0; i < count; i++)
        pthread_join(threads[i], NULL);
}

static char *base;
static size_t pages;

static void make_private(size_t count)
{
    pages = count;
    base = map(count * PAGE, MAP_PRIVATE);
    fill(base, (uint64_t)base, count * PAGE);
    region(base, count * PAGE, "private");
}

static void *touch_all(void *argument)
{
    (void)argument;
    for (size_t i = 0; i < pages; i++) {
        char *at = base + random_below(pages) * PAGE;
        check(at, (uint64_t)at);
    }
    return NULL;
}

static void check_all(void)
{
    for (size_t i = 0; i < pages; i++)
        check(base + i * PAGE, (uint64_t)base + i * PAGE);
}

static void threads(void)
{
    make_private(8192);
    ready();
    run_threads(8, touch_all);
    check_all();
}

/* Faults from inside the kernel. */
static void *wake_later(void *word)
{
    while (syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0) == 0)
        usleep(1000);
    return NULL;
}

static void kernel(void)
{
    make_private(256);
    int ends[2];
    CHECK(pipe(ends) == 0, "pipe");
    ready();
    char other[PAGE];
    CHECK(write(ends[1], base, PAGE) == (ssize_t)PAGE, "write from a missing page");
    CHECK(read(ends[0], other, PAGE) == (ssize_t)PAGE, "read back");
    check(other, (uint64_t)base);
    CHECK(write(ends[1], other, 8) == 8, "write");
    CHECK(read(ends[0], base + 8 * PAGE, 8) == 8, "read into a missing page");
    CHECK(*(uint64_t *)(base + 8 * PAGE) == mix((uint64_t)base), "what was read");
    memcpy(base + 8 * PAGE, &(uint64_t){mix((uint64_t)base + 8 * PAGE)}, 8);
    check(base + 8 * PAGE, (uint64_t)base + 8 * PAGE);
    uint32_t *word = (uint32_t *)(base + 16 * PAGE);
    uint32_t value = (uint32_t)mix((uint64_t)word);
    CHECK(syscall(SYS_futex, word, FUTEX_WAIT, value + 1, NULL, NULL, 0) == -1 && errno == EAGAIN, "futex");
    pthread_t waker;
    pthread_create(&waker, NULL, wake_later, base + 17 * PAGE);
    word = (uint32_t *)(base + 17 * PAGE);
    CHECK(syscall(SYS_futex, word, FUTEX_WAIT, (uint32_t)mix((uint64_t)word), NULL, NULL, 0) == 0, "wait");
    pthread_join(waker, NULL);
    struct iovec local = {other, PAGE}, remote = {base + 18 * PAGE, PAGE};
    CHECK(process_vm_readv(getpid(), &local, 1, &remote, 1, 0) == (ssize_t)PAGE, "process_vm_readv");
    check(other, (uint64_t)base + 18 * PAGE);
    check_all();
}

/* The handler's frame goes to a stack that is missing; a call is interrupted while its page is. */
static volatile sig_atomic_t handled;
static void on_signal(int signal)
{
    (void)signal;
    handled++;
}

static void *reader(void *ends)
{
    CHECK(read(*(int *)ends, base, 8) == 8, "read into a missing page");
    CHECK(*(uint64_t *)base == 7, "what was read");
    return NULL;
}

static void signals(void)
{
    make_private(64);
    stack_t stack = {.ss_sp = base + 8 * PAGE, .ss_size = 16 * PAGE};
    CHECK(sigaltstack(&stack, NULL) == 0, "sigaltstack");
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_ONSTACK};
    sigaction(SIGUSR2, &action, NULL);
    int ends[2];
    CHECK(pipe(ends) == 0, "pipe");
    ready();
    raise(SIGUSR2);
    CHECK(handled == 1, "the signal");
    struct sigaction restart = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    sigaction(SIGUSR2, &restart, NULL);
    pthread_t thread;
    pthread_create(&thread, NULL, reader, &ends[0]);
    uint64_t seven = 7;
    CHECK(write(ends[1], &seven, 8) == 8, "write");
    /* The test holds the page back until it has seen that the fault comes again and again. */
    printf("waiting\n");
    fflush(stdout);
    char line[16];
    CHECK(read(0, line, sizeof line) > 0, "the word to go on");
    pthread_kill(thread, SIGUSR2);
    pthread_join(thread, NULL);
    CHECK(handled == 2, "the second signal");
    for (size_t i = 25; i < pages; i++)
        check(base + i * PAGE, (uint64_t)base + i * PAGE);
}

/* Children that read, write and fork again. */
static void child(int depth)
{
    for (int i = 0; i < 40; i++) {
        size_t page = random_below(pages);
        check(base + page * PAGE, (uint64_t)base + page * PAGE);
    }
    for (size_t i = 0; i < 20; i++) {
        size_t page = random_below(pages);
        memset(base + page * PAGE, depth, PAGE);
        CHECK(base[page * PAGE + 77] == depth, "own write");
    }
}

static void reap(int count)
{
    for (int i = 0; i < count; i++) {
        int status;
        pid_t pid = wait(&status);
        CHECK(pid > 0, "wait");
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "child %d: %x", pid, status);
    }
}

static void forks(void)
{
    make_private(2048);
    char *wiped = map(16 * PAGE, MAP_PRIVATE);
    fill(wiped, (uint64_t)wiped, 16 * PAGE);
    CHECK(madvise(wiped, 16 * PAGE, MADV_WIPEONFORK) == 0, "wipe");
    region(wiped, 16 * PAGE, "wiped");
    ready();
    for (int i = 0; i < 50; i++) {
        pid_t pid = fork();
        CHECK(pid >= 0, "fork");
        if (pid == 0) {
            seed = mix(i + 1);
            check_zero(wiped + (i % 16) * PAGE);
            child(i + 1);
            if (i % 10 == 0) {
                pid_t grandchild = fork();
                CHECK(grandchild >= 0, "fork");
                if (grandchild == 0) {
                    check_zero(wiped);
                    _exit(0);
                }
                reap(1);
            }
            _exit(0);
        }
        size_t page = random_below(pages);
        check(base + page * PAGE, (uint64_t)base + page * PAGE);
    }
    reap(50);
    check_all();
    for (size_t i = 0; i < 16; i++)
        check(wiped + i * PAGE, (uint64_t)wiped + i * PAGE);
}

extern char **environ;
static void spawn(void)
{
    make_private(1024);
    ready();
    for (int i = 0; i < 10; i++) {
        pid_t pid = vfork();
        if (pid == 0) {
            if (*(volatile uint64_t *)(base + i * 50 * PAGE) != mix((uint64_t)base + i * 50 * PAGE))
                _exit(9);
            execl("/bin/true", "true", NULL);
            _exit(8);
        }
        int status;
        CHECK(waitpid(pid, &status, 0) == pid && status == 0, "vfork: %x", status);
    }
    check_all();
}

static void exec(void)
{
    make_private(1024);
    ready();
    touch_all(NULL);
    execl("/bin/echo", "echo", "ok", NULL);
    fail("exec");
}

/* Blocks of pages that move, grow, shrink, are dropped and given up. */
#define BLOCK 32
struct block {
    char *at;
    uint64_t name;
    size_t len;       /* pages mapped */
    char kept[BLOCK]; /* 1: the pattern, 0: zeros, 2: written */
};
static struct block blocks[8][16];

static void check_block(struct block *b)
{
    for (size_t i = 0; i < b->len; i++) {
        char *at = b->at + i * PAGE;
        if (i < BLOCK && b->kept[i] == 1)
            check(at, b->name + i * PAGE);
        else if (i < BLOCK && b->kept[i] == 2)
            CHECK(*at == 2 && at[4095] == 2, "own write at %p", at);
        else
            check_zero(at);
    }
}

static void *storm(void *argument)
{
    struct block *mine = blocks[(long)argument];
    for (int round = 0; round < 600; round++) {
        struct block *b = &mine[random_below(16)];
        if (!b->at)
            continue;
        size_t first = random_below(BLOCK), count = 1 + random_below(BLOCK - first);
        switch (random_below(9)) {
        case 0: /* elsewhere */
        case 1: {
            size_t len = b->len + (random_below(2) ? random_below(8) : 0);
            char *room = mmap(NULL, (len + 2) * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            CHECK(room != MAP_FAILED, "room");
            char *to = mremap(b->at, b->len * PAGE, len * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, room + PAGE);
            if (to == MAP_FAILED) /* it is in several mappings */
                break;
            munmap(room, PAGE);
            munmap(room + (len + 1) * PAGE, PAGE);
            b->at = to;
            b->len = len;
            break;
        }
        case 2: /* shorter; what is cut off comes back as zeros */
            if (b->len > 4) {
                size_t len = b->len - random_below(3);
                CHECK(mremap(b->at, b->len * PAGE, len * PAGE, 0) == b->at, "shrink");
                for (size_t i = len; i < b->len && i < BLOCK; i++)
                    b->kept[i] = 0;
                b->len = len;
            }
            break;
        case 3:
            if (first + count <= b->len) {
                CHECK(madvise(b->at + first * PAGE, count * PAGE, MADV_DONTNEED) == 0, "dontneed");
                for (size_t i = first; i < first + count; i++)
                    b->kept[i] = 0;
            }
            break;
        case 4:
            if (round % 20 == 0) {
                CHECK(munmap(b->at, b->len * PAGE) == 0, "munmap");
                b->at = NULL;
            }
            break;
        case 5: /* splits and joins mappings without an event */
            if (first + count <= b->len) {
                mprotect(b->at + first * PAGE, count * PAGE, PROT_READ);
                check_block(b);
                mprotect(b->at + first * PAGE, count * PAGE, PROT_READ | PROT_WRITE);
            }
            break;
        case 6:
            if (first < b->len) {
                memset(b->at + first * PAGE, 2, PAGE);
                if (first < BLOCK)
                    b->kept[first] = 2;
            }
            break;
        case 7: /* moves the pages and leaves an empty mapping */
            if (round % 4 == 0) {
                char *to = mremap(b->at, b->len * PAGE, b->len * PAGE, MREMAP_MAYMOVE | 4);
                if (to == MAP_FAILED)
                    break;
                check_zero(b->at + (first % b->len) * PAGE);
                munmap(b->at, b->len * PAGE);
                b->at = to;
            }
            break;
        default:
            if (first < b->len)
                *(volatile char *)(b->at + first * PAGE);
        }
    }
    for (int i = 0; i < 16; i++)
        if (mine[i].at)
            check_block(&mine[i]);
    return NULL;
}

static void storms(void)
{
    for (int t = 0; t < 8; t++)
        for (int i = 0; i < 16; i++) {
            struct block *b = &blocks[t][i];
            b->at = map(BLOCK * PAGE, MAP_PRIVATE);
            b->name = (uint64_t)b->at;
            b->len = BLOCK;
            memset(b->kept, 1, BLOCK);
            fill(b->at, b->name, BLOCK * PAGE);
            region(b->at, BLOCK * PAGE, "private");
        }
    ready();
    run_threads(8, storm);
}

/* One object, mapped twice. */
static char *alias;
static void *touch_shared(void *argument)
{
    for (size_t i = 0; i < pages; i++) {
        size_t page = random_below(pages);
        check(((long)argument % 2 ? base : alias) + page * PAGE, (uint64_t)base + page * PAGE);
    }
    return NULL;
}

static void make_shared(size_t count)
{
    pages = count;
    base = map(count * PAGE, MAP_SHARED);
    /* The lowest mapping names the pages. */
    alias = mremap(base, 0, count * PAGE, MREMAP_MAYMOVE);
    CHECK(alias != MAP_FAILED, "second mapping");
    if (alias < base) {
        char *swap = base;
        base = alias;
        alias = swap;
    }
    fill(base, (uint64_t)base, count * PAGE);
    region(base, count * PAGE, "shared");
    region(alias, count * PAGE, "shared");
}

static void shared(void)
{
    make_shared(2048);
    ready();
    pages -= 4;
    base += 4 * PAGE, alias += 4 * PAGE;
    for (int i = 0; i < 4; i++) {
        pid_t pid = fork();
        CHECK(pid >= 0, "fork");
        if (pid == 0) {
            seed = mix(i + 1);
            touch_shared((void *)(long)i);
            /* A page of its own for each to write; all see it. */
            memset(alias + (i - 4) * PAGE, i + 1, PAGE);
            _exit(0);
        }
    }
    run_threads(4, touch_shared);
    base -= 4 * PAGE, alias -= 4 * PAGE;
    reap(4);
    for (int i = 0; i < 4; i++)
        CHECK(base[i * PAGE + 5] == i + 1, "the write of child %d", i);
}

/* Shared memory that is given up in every way, in the parent and in a child. */
static void holes_in(size_t from, size_t to)
{
    for (size_t i = from; i + 8 <= to; i += 8) {
        char *at = base + i * PAGE, *other = alias + i * PAGE;
        switch (random_below(4)) {
        case 0:
            CHECK(madvise(at, 4 * PAGE, MADV_REMOVE) == 0, "remove");
            for (int k = 0; k < 4; k++)
                check_zero((k % 2 ? at : other) + k * PAGE);
            memset(other + 2 * PAGE, 9, PAGE);
            CHECK(at[2 * PAGE + 9] == 9, "a write beside the hole");
            break;
        case 1:
            CHECK(madvise(at, 4 * PAGE, MADV_DONTNEED) == 0, "dontneed");
            for (int k = 0; k < 4; k++)
                check((k % 2 ? at : other) + k * PAGE, (uint64_t)at + k * PAGE);
            break;
        case 2:
            CHECK(madvise(at, 4 * PAGE, MADV_FREE) == -1 && errno == EINVAL, "free");
            check(at, (uint64_t)at);
            break;
        default:
            check(other, (uint64_t)at);
        }
        for (int k = 4; k < 8; k++)
            check((k % 2 ? other : at) + k * PAGE, (uint64_t)at + k * PAGE);
    }
}

static void *hole_maker(void *argument)
{
    long i = (long)argument;
    holes_in(i * 256, (i + 1) * 256);
    return NULL;
}

static void holes(void)
{
    make_shared(2048);
    ready();
    pid_t pid = fork();
    CHECK(pid >= 0, "fork");
    if (pid == 0) {
        seed = 77;
        holes_in(1024, 2048);
        _exit(0);
    }
    run_threads(4, hole_maker);
    reap(1);
}

/* The object is mapped anew, cut, and mapped in full again while its pages are missing. */
static void regrow(void)
{
    make_shared(512);
    ready();
    char *third = mremap(base, 0, 512 * PAGE, MREMAP_MAYMOVE);
    CHECK(third != MAP_FAILED, "third mapping");
    check(third + 500 * PAGE, (uint64_t)base + 500 * PAGE);
    munmap(third, 512 * PAGE);
    munmap(alias, 512 * PAGE);
    CHECK(mremap(base, 512 * PAGE, 100 * PAGE, 0) == base, "shrink");
    /* The test pushes everything, and says go. */
    printf("waiting\n");
    fflush(stdout);
    char line[16];
    CHECK(read(0, line, sizeof line) > 0, "the word to go on");
    char *grown = mremap(base, 100 * PAGE, 512 * PAGE, MREMAP_MAYMOVE);
    CHECK(grown != MAP_FAILED, "grow");
    for (size_t i = 0; i < 512; i++)
        check(grown + i * PAGE, (uint64_t)base + i * PAGE);
}

static char *huge_private, *huge_shared;
static void *touch_huge(void *argument)
{
    for (int i = 0; i < 300; i++) {
        char *at = ((long)argument % 2 ? huge_private : huge_shared) + random_below(3 * 512) * PAGE;
        check(at, (uint64_t)at);
    }
    return NULL;
}

static void huge(void)
{
    huge_private = map(4 * HUGE, MAP_PRIVATE | MAP_HUGETLB);
    huge_shared = map(4 * HUGE, MAP_SHARED | MAP_HUGETLB);
    fill(huge_private, (uint64_t)huge_private, 4 * HUGE);
    fill(huge_shared, (uint64_t)huge_shared, 4 * HUGE);
    region(huge_private, 4 * HUGE, "huge-private");
    region(huge_shared, 4 * HUGE, "huge-shared");
    ready();
    CHECK(madvise(huge_private + 3 * HUGE, HUGE, MADV_DONTNEED) == 0, "dontneed");
    check_zero(huge_private + 3 * HUGE + 17 * PAGE);
    CHECK(madvise(huge_shared + 3 * HUGE, HUGE, MADV_REMOVE) == 0, "remove");
    check_zero(huge_shared + 3 * HUGE + 17 * PAGE);
    run_threads(4, touch_huge);
}

/* Waits for its pages for ever. */
static void stuck(void)
{
    make_private(64);
    ready();
    run_threads(8, touch_all);
}

int main(int argc, char **argv)
{
    static const struct { const char *name; void (*run)(void); } cases[] = {
        {"threads", threads}, {"kernel", kernel}, {"signals", signals}, {"forks", forks},
        {"spawn", spawn},     {"exec", exec},     {"storms", storms},   {"shared", shared},
        {"holes", holes},     {"regrow", regrow}, {"huge", huge},       {"stuck", stuck},
    };
    CHECK(argc == 2, "usage");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        if (strcmp(cases[i].name, argv[1]) == 0) {
            cases[i].run();
            printf("ok\n");
            fflush(stdout);
            char line[16];
            /* Stays until the test has looked at its maps. */
            if (read(0, line, sizeof line) < 0)
                return 1;
            return 0;
        }
    fail("no case %s", argv[1]);
}
