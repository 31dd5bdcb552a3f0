/* The kernel itself reads and writes memory that is not there: buffers, futexes, stacks. */
#include "storm.h"
#include <linux/futex.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define ARENA_PAGES 3072
#define STEPS 250

static struct arena arenas[STORM_THREADS];

static void prepare(void *(*run)(void *), int shared)
{
    for (uintptr_t i = 0; i < STORM_THREADS; i++) {
        make_arena(&arenas[i], i, ARENA_PAGES, ARENA_PAGES, shared && i % 2);
        start_thread(run, (void *)i);
    }
}

/* The channels of one round: a file without a name, a pipe, a socketpair. */
struct channels {
    int file, pipe[2], pair[2];
};

static void open_channels(struct channels *c)
{
    c->file = memfd_create("storm", MFD_CLOEXEC);
    CHECK(c->file >= 0 && ftruncate(c->file, PAGE) == 0, "memfd");
    CHECK(pipe2(c->pipe, O_CLOEXEC) == 0, "pipe");
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, c->pair) == 0, "socketpair");
}

static void close_channels(const struct channels *c)
{
    CHECK(close(c->file) == 0 && close(c->pipe[0]) == 0 && close(c->pipe[1]) == 0 &&
              close(c->pair[0]) == 0 && close(c->pair[1]) == 0,
          "close");
}

/* Whole pages go from one page of the arena to another through a channel; a page is at most PIPE_BUF. */
static void carry(struct arena *a, const struct channels *c, uint32_t from, uint32_t to, uint32_t way)
{
    char *source = page_at(a, from), *target = page_at(a, to), want[PAGE];
    struct iovec one = {source, PAGE}, two = {target, PAGE};
    ssize_t out = -1, in = -1;
    expected(a, from, want);
    switch (way) {
    case 0:
        out = pwrite(c->file, source, PAGE, 0);
        in = pread(c->file, target, PAGE, 0);
        break;
    case 1:
        out = write(c->pipe[1], source, PAGE);
        in = read(c->pipe[0], target, PAGE);
        break;
    case 2:
        out = send(c->pair[0], source, PAGE, 0);
        in = recv(c->pair[1], target, PAGE, MSG_WAITALL);
        break;
    case 3: {
        /* The list of the buffers is in missing memory as well: the end of a third page. */
        uint32_t third = (from + to) % a->pages;
        if (third == from || third == to)
            third = (third + 1) % a->pages == from ? (third + 2) % a->pages : (third + 1) % a->pages;
        if (third == from || third == to)
            return;
        verify(a, third, "where the list goes");
        struct iovec *list = (struct iovec *)(page_at(a, third) + PAGE - 4 * sizeof *list);
        list[0] = (struct iovec){source, 100};
        list[1] = (struct iovec){source + 100, PAGE - 100};
        list[2] = (struct iovec){target, 4000};
        list[3] = (struct iovec){target + 4000, PAGE - 4000};
        out = writev(c->pipe[1], list, 2);
        in = readv(c->pipe[0], list + 2, 2);
        stamp(a, third);
        break;
    }
    case 4:
        out = PAGE;
        in = process_vm_readv(getpid(), &two, 1, &one, 1, 0);
        break;
    default:
        out = PAGE;
        in = process_vm_writev(getpid(), &one, 1, &two, 1, 0);
        break;
    }
    CHECK(out == PAGE && in == PAGE, "way %u: %zd out, %zd in", way, out, in);
    CHECK(memcmp(target, want, PAGE) == 0, "way %u: page %u did not come to page %u", way, from, to);
    verify(a, from, "the source of a transfer");
    stamp(a, to);
}

/* A few bytes in the middle of a page: what is around them must stay. */
static void part(struct arena *a, const struct channels *c, uint32_t page, uint32_t at)
{
    char want[PAGE], bytes[64];
    expected(a, page, want);
    memset(bytes, (int)(page % 251), sizeof bytes);
    CHECK(write(c->pipe[1], bytes, sizeof bytes) == sizeof bytes, "write");
    CHECK(read(c->pipe[0], page_at(a, page) + at, sizeof bytes) == sizeof bytes, "read");
    memcpy(want + at, bytes, sizeof bytes);
    CHECK(memcmp(page_at(a, page), want, PAGE) == 0, "around a few bytes that were read into page %u", page);
    stamp(a, page);
}

static void *passing(void *argument)
{
    uintptr_t number = (uintptr_t)argument;
    struct arena *a = &arenas[number];
    uint64_t random = mix(number + 5);
    for (unsigned round = 0;;) {
        struct channels c;
        wait_round(&round);
        open_channels(&c);
        for (int i = 0; i < STEPS; i++) {
            uint32_t from = pick(&random, a->pages), to = pick(&random, a->pages);
            if (from != to)
                carry(a, &c, from, to, pick(&random, 6));
            part(a, &c, pick(&random, a->pages), pick(&random, PAGE - 64));
            atomic_fetch_add(&steps, 1);
        }
        close_channels(&c);
        verify_arena(a, "after the calls");
        end_round();
    }
    return NULL;
}

static void buffers_prepare(void)
{
    prepare(passing, 1);
}

/* A futex in each of the pages that are missing: its value is compared by the kernel, and a waiter by one
 * page is woken by another thread. Threads 0 and 1 are partners, and 2 and 3. */
static atomic_uint turns[STORM_THREADS / 2];

static long futex(uint32_t *word, int operation, uint32_t value)
{
    return syscall(SYS_futex, word, operation, value, NULL, NULL, 0);
}

static void *meeting(void *argument)
{
    uintptr_t number = (uintptr_t)argument;
    struct arena *mine = &arenas[number], *a = &arenas[number & ~1u];
    int private = number < 2 ? FUTEX_PRIVATE_FLAG : 0;
    atomic_uint *turn = &turns[number / 2];
    for (unsigned round = 0;;) {
        wait_round(&round);
        uint64_t random = mix(round * 4 + number / 2);
        for (int i = 0; i < STEPS; i++) {
            uint32_t page = pick(&random, a->pages);
            uint32_t *word = (uint32_t *)page_at(a, page);
            uint32_t is = (uint32_t)word_of(a, page, 0);
            if (number % 2 == 0) {
                /* The word is not this: the kernel has to read it to know. */
                long wrong = futex(word, FUTEX_WAIT | private, is + 1);
                CHECK(wrong == -1 && errno == EAGAIN, "a futex with another value: %ld", wrong);
                verify(a, page, "a futex");
                atomic_fetch_add(turn, 1);
                while (__atomic_load_n(word, __ATOMIC_ACQUIRE) == is)
                    CHECK(futex(word, FUTEX_WAIT | private, is) == 0 || errno == EAGAIN || errno == EINTR,
                          "waiting");
                stamp(a, page);
                atomic_fetch_add(turn, 1);
            } else {
                unsigned now = 3 * (unsigned)STEPS * (round - 1) + 3 * (unsigned)i;
                while (atomic_load(turn) != now + 1)
                    sched_yield();
                __atomic_store_n(word, is + 2, __ATOMIC_RELEASE);
                CHECK(futex(word, FUTEX_WAKE | private, 1) >= 0, "waking");
                verify(mine, (page + 7) % mine->pages, "the partner's own");
                while (atomic_load(turn) != now + 2)
                    sched_yield();
                atomic_fetch_add(turn, 1);
            }
            while (atomic_load(turn) < 3 * (unsigned)STEPS * (round - 1) + 3 * (unsigned)i + 3)
                sched_yield();
            atomic_fetch_add(&steps, 1);
        }
        verify_arena(mine, "after the futexes");
        end_round();
    }
    return NULL;
}

static void futex_prepare(void)
{
    prepare(meeting, 1);
}

/* Stacks: the first thread's grows below where it has ever been, the others' frames are missing pages. */
#define FRAME_WORDS 480
#define DEEP 700

static uint64_t descend(uint32_t depth, uint64_t seed, int pause, unsigned *round)
{
    volatile uint64_t frame[FRAME_WORDS];
    uint64_t sum = 0;
    for (uint32_t i = 0; i < FRAME_WORDS; i++)
        frame[i] = mix(seed + depth) + i;
    if (depth > 0)
        sum = descend(depth - 1, seed, pause, round);
    else if (pause)
        wait_round(round);
    for (uint32_t i = 0; i < FRAME_WORDS; i++) {
        CHECK(frame[i] == mix(seed + depth) + i, "the frame at depth %u, word %u: %llx", depth, i,
              (unsigned long long)frame[i]);
        sum += frame[i];
    }
    return sum;
}

static void *standing_deep(void *argument)
{
    uint64_t seed = mix((uintptr_t)argument + 11);
    for (unsigned round = 0;; end_round())
        CHECK(descend(DEEP, seed++, 1, &round) != 1, "unlikely");
    return NULL;
}

static void stack_prepare(void)
{
    for (uintptr_t i = 0; i < STORM_THREADS; i++)
        start_thread(standing_deep, (void *)i);
    make_arena(&arenas[0], 0, ARENA_PAGES, ARENA_PAGES, 0);
    CHECK(descend(100, 1, 0, NULL) != 1, "unlikely");
}

static void stack_fully(void)
{
    static uint32_t depth = 300;
    CHECK(descend(depth, depth, 0, NULL) != 1, "unlikely");
    /* 2 MiB further each time, up to what a stack may have. */
    depth = depth < 1500 ? depth + 400 : 300;
    whole_round();
    verify_arena(&arenas[0], "beside the stacks");
}

ZOO({"buffers", buffers_prepare, NULL, whole_round},
    {"futex", futex_prepare, NULL, whole_round},
    {"stack", stack_prepare, NULL, stack_fully})
