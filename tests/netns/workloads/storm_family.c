/* Children and threads that come and go while memory is missing: each has to find what its parent had. */
#include "storm.h"
#include <spawn.h>
#include <sys/wait.h>

#define PRIVATE_PAGES 3072
#define SHARED_PAGES 1024
#define UNFORKED_PAGES 6144
#define CHILDREN 50
#define GOOD 7

static struct arena mine, common, unforked;
static uint64_t randomness = 3;

static void prepare(void)
{
    make_arena(&mine, 1, PRIVATE_PAGES, PRIVATE_PAGES, 0);
    make_arena(&common, 2, SHARED_PAGES, SHARED_PAGES, 1);
    make_arena(&unforked, 3, UNFORKED_PAGES, UNFORKED_PAGES, 0);
    CHECK(madvise(unforked.base, (size_t)UNFORKED_PAGES * PAGE, MADV_DONTFORK) == 0, "MADV_DONTFORK");
}

static void await(pid_t child, int code, const char *what)
{
    int status;
    pid_t got;
    while ((got = waitpid(child, &status, 0)) == -1 && errno == EINTR)
        continue;
    CHECK(got == child && WIFEXITED(status) && WEXITSTATUS(status) == code, "%s: child %d, %d, status %x", what,
          child, got, status);
}

/* A child reads and writes what it inherited; nobody else may see what it writes to private memory. */
static void childhood(uint32_t number)
{
    uint64_t random = mix(number);
    for (int i = 0; i < 200; i++) {
        verify(&mine, pick(&random, mine.pages), "a child's");
        verify(&common, pick(&random, common.pages), "a child's, shared");
        stamp(&mine, pick(&random, mine.pages));
    }
    if (number % 4 == 0)
        verify_arena(&mine, "all of a child's");
}

static void child_of_a_bomb(uint32_t number)
{
    childhood(number);
    if (number % 5 == 0) {
        pid_t child = fork();
        CHECK(child >= 0, "fork in a child");
        if (child == 0) {
            childhood(number + CHILDREN);
            _exit(GOOD);
        }
        await(child, GOOD, "grandchild");
        verify_arena(&mine, "a child's with a child");
    }
    _exit(GOOD);
}

static void bomb(void)
{
    pid_t children[CHILDREN];
    for (uint32_t i = 0; i < CHILDREN; i++) {
        children[i] = fork();
        CHECK(children[i] >= 0, "fork");
        if (children[i] == 0)
            child_of_a_bomb(i);
        for (int j = 0; j < 20; j++) {
            verify(&mine, pick(&randomness, mine.pages), "the parent's");
            stamp(&mine, pick(&randomness, mine.pages));
            verify(&unforked, pick(&randomness, unforked.pages), "not forked");
        }
        atomic_fetch_add(&steps, 1);
    }
    for (uint32_t i = 0; i < CHILDREN; i++)
        await(children[i], GOOD, "fork bomb");
    verify_arena(&mine, "the parent's");
    verify_arena(&common, "shared with children");
    verify_arena(&unforked, "not forked");
}

/* Words for another program, in pages that are missing: the kernel copies them out of the dying memory. */
static char **words_in(uint32_t page)
{
    char *text = page_at(&mine, page);
    char **words = (char **)(page_at(&mine, page + 1));
    verify(&mine, page, "where words go");
    verify(&mine, page + 1, "where words go");
    words[0] = strcpy(text + 3000, "/bin/sh");
    words[1] = strcpy(text + 3020, "-c");
    words[2] = strcpy(text + 3040, "test \"$0\" = storm && exit 7");
    words[3] = strcpy(text + 4000, "storm");
    words[4] = NULL;
    return words;
}

static uint32_t two_pages(void)
{
    return pick(&randomness, mine.pages / 2 - 1) * 2;
}

static void exec_children(void)
{
    pid_t children[CHILDREN / 2];
    for (uint32_t i = 0; i < CHILDREN / 2; i++) {
        uint32_t page = two_pages();
        children[i] = fork();
        CHECK(children[i] >= 0, "fork");
        if (children[i] == 0) {
            char **words = words_in(page);
            execv(words[0], words);
            fail("exec");
        }
        stamp(&mine, pick(&randomness, mine.pages));
        atomic_fetch_add(&steps, 1);
    }
    for (uint32_t i = 0; i < CHILDREN / 2; i++)
        await(children[i], GOOD, "exec");
    verify_arena(&mine, "after children that exec");
    verify_arena(&unforked, "not forked");
}

static void vfork_one(char **words, uint32_t page, int exits)
{
    pid_t child = vfork();
    CHECK(child >= 0, "vfork");
    if (child == 0) {
        /* In the parent's own memory. */
        if (page_at(&unforked, page)[0] != (char)word_of(&unforked, page, 0))
            _exit(1);
        if (exits)
            _exit(GOOD);
        execv(words[0], words);
        _exit(2);
    }
    await(child, GOOD, "vfork");
}

static void vfork_children(void)
{
    for (uint32_t i = 0; i < CHILDREN / 2; i++) {
        uint32_t page = two_pages();
        vfork_one(words_in(page), pick(&randomness, unforked.pages), i % 2);
        stamp(&mine, page);
        stamp(&mine, page + 1);
        page = two_pages();
        pid_t child;
        char **words = words_in(page);
        CHECK(posix_spawn(&child, words[0], NULL, NULL, words, environ) == 0, "posix_spawn");
        await(child, GOOD, "posix_spawn");
        stamp(&mine, page);
        stamp(&mine, page + 1);
        atomic_fetch_add(&steps, 1);
    }
    verify_arena(&mine, "after vfork");
    verify_arena(&unforked, "after vfork");
}

/* Threads that live for a few pages each; what a thread writes is its own sixteenth. */
#define THREADS 16
#define GENERATIONS 12

static void *brief(void *argument)
{
    uintptr_t number = (uintptr_t)argument;
    uint64_t random = mix(number + 31 * atomic_load(&steps));
    uint32_t share = mine.pages / THREADS;
    char *own = malloc(200000);
    CHECK(own, "malloc");
    for (int i = 0; i < 20; i++) {
        uint32_t page = (uint32_t)number * share + pick(&random, share);
        verify(&mine, page, "a brief thread's");
        stamp(&mine, page);
        verify(&unforked, pick(&random, unforked.pages), "for all threads");
        memset(own + (size_t)i * PAGE, i, PAGE);
    }
    free(own);
    atomic_fetch_add(&steps, 1);
    return argument;
}

static void threads(void)
{
    pthread_t all[THREADS];
    for (int generation = 0; generation < GENERATIONS; generation++) {
        for (uintptr_t i = 0; i < THREADS; i++)
            CHECK(pthread_create(&all[i], NULL, brief, (void *)i) == 0, "thread");
        for (uintptr_t i = 0; i < THREADS; i++) {
            void *result;
            CHECK(pthread_join(all[i], &result) == 0 && result == (void *)i, "join");
        }
    }
    verify_arena(&mine, "after the threads");
    verify_arena(&unforked, "after the threads");
}

/* The process becomes another program: all that was missing is wanted no more. */
static int came_by_exec;

static void become(void)
{
    char number[32];
    if (came_by_exec) {
        came_by_exec = 0;
        verify_arena(&mine, "after exec");
        return;
    }
    verify(&mine, pick(&randomness, mine.pages), "before exec");
    snprintf(number, sizeof number, "%llu", (unsigned long long)atomic_load(&steps) + 1);
    execl("/proc/self/exe", "storm_family", "exec_self", number, NULL);
    fail("exec");
}

/* On SIGUSR2 a thread touches what is not mapped, while others wait for missing pages. */
static volatile sig_atomic_t ending;

static void on_end(int signal)
{
    (void)signal;
    ending = 1;
}

static void *reading(void *argument)
{
    uint64_t random = mix((uintptr_t)argument);
    while (!ending)
        usleep(1000);
    for (;;)
        verify(&unforked, pick(&random, unforked.pages), "while it crashes");
    return NULL;
}

static void end_prepare(void)
{
    struct sigaction action = {.sa_handler = on_end};
    CHECK(sigaction(SIGUSR2, &action, NULL) == 0, "sigaction");
    prepare();
    for (uintptr_t i = 0; i < 4; i++)
        start_thread(reading, (void *)i);
}

static void crash_often(void)
{
    if (!ending)
        return;
    verify(&mine, 5, "before the crash");
    *(volatile int *)(uintptr_t)16 = 1;
}

static void exit_often(void)
{
    if (!ending)
        return;
    verify(&mine, 5, "before the end");
    _exit(3);
}

/* The parent ends, and a child goes on with what is missing. */
static void orphan_often(void)
{
    if (!ending)
        return;
    pid_t child = fork();
    CHECK(child >= 0, "fork");
    if (child > 0)
        _exit(3);
    for (uint32_t page = mine.pages; page-- > 0;) {
        verify(&mine, page, "the orphan's");
        verify(&common, page % common.pages, "the orphan's, shared");
    }
    dprintf(1, "orphan is right\n");
    _exit(0);
}

static void at_rest(void)
{
    verify(&mine, pick(&randomness, mine.pages), "at rest");
}

static const struct kind family[] = {
    {"fork_bomb", prepare, NULL, bomb},
    {"exec", prepare, NULL, exec_children},
    {"vfork", prepare, NULL, vfork_children},
    {"threads", prepare, NULL, threads},
    {"exec_self", prepare, NULL, become},
    {"crash", end_prepare, crash_often, at_rest},
    {"exit", end_prepare, exit_often, at_rest},
    {"orphan", end_prepare, orphan_often, at_rest},
};

int main(int argc, char **argv)
{
    for (size_t i = 0; i < sizeof family / sizeof family[0]; i++) {
        if (argc >= 2 && strcmp(argv[1], "--list") == 0) {
            printf("%s\n", family[i].name);
        } else if (argc >= 2 && strcmp(argv[1], family[i].name) == 0) {
            family[i].prepare();
            if (argc == 3) {
                atomic_store(&steps, strtoull(argv[2], NULL, 10));
                came_by_exec = asked = 1;
            }
            verify_forever(family[i].often, family[i].fully);
        }
    }
    return argc == 2 && strcmp(argv[1], "--list") == 0 ? 0 : 2;
}
