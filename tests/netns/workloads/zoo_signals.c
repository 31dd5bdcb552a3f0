/* Signal state: masks, handlers, what is pending, alternate stacks. */
#include "zoo.h"

static void handler_a(int s) { (void)s; }
static void handler_b(int s, siginfo_t *i, void *c) { (void)s; (void)i; (void)c; }

static struct sigaction before[65];
static sigset_t mask_before;

static void read_actions(struct sigaction *into)
{
    for (int s = 1; s <= 64; s++)
        if (s != SIGUSR1 && s != 32 && s != 33)
            CHECK(sigaction(s, NULL, &into[s]) == 0, "signal %d", s);
}

static void handlers_prepare(void)
{
    struct sigaction a = {.sa_handler = handler_a, .sa_flags = SA_RESTART | SA_NODEFER};
    sigaddset(&a.sa_mask, SIGHUP);
    CHECK(sigaction(SIGUSR2, &a, NULL) == 0, "a");
    struct sigaction b = {.sa_sigaction = handler_b, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigaddset(&b.sa_mask, SIGRTMIN + 3);
    sigaddset(&b.sa_mask, SIGTERM);
    CHECK(sigaction(SIGRTMIN + 1, &b, NULL) == 0, "b");
    signal(SIGPIPE, SIG_IGN);
    signal(SIGCHLD, SIG_IGN);
    sigset_t block;
    sigemptyset(&block);
    sigaddset(&block, SIGINT);
    sigaddset(&block, SIGRTMAX);
    sigprocmask(SIG_BLOCK, &block, NULL);
    sigprocmask(SIG_BLOCK, NULL, &mask_before);
    read_actions(before);
}

static void handlers_fully(void)
{
    static struct sigaction now[65];
    read_actions(now);
    for (int s = 1; s <= 64; s++) {
        CHECK(now[s].sa_handler == before[s].sa_handler, "handler of %d", s);
        CHECK(now[s].sa_flags == before[s].sa_flags, "flags of %d", s);
        for (int m = 1; m <= 64; m++)
            CHECK(sigismember(&now[s].sa_mask, m) == sigismember(&before[s].sa_mask, m), "mask of %d", s);
    }
    sigset_t mask;
    sigprocmask(SIG_BLOCK, NULL, &mask);
    for (int m = 1; m <= 64; m++)
        CHECK(sigismember(&mask, m) == sigismember(&mask_before, m), "mask at %d", m);
}

/* Pending for the process and for one thread, plain and queued, with their values and senders. */
static pthread_t receiver;
static atomic_int drain, drained;

static void block_all_but_ask(void)
{
    sigset_t all;
    sigfillset(&all);
    sigdelset(&all, SIGUSR1);
    CHECK(pthread_sigmask(SIG_SETMASK, &all, NULL) == 0, "mask");
}

static int take(int signal, siginfo_t *info)
{
    sigset_t one;
    struct timespec none = {0, 0};
    sigemptyset(&one);
    sigaddset(&one, signal);
    return sigtimedwait(&one, info, &none);
}

static void queue_thread(void)
{
    for (int i = 0; i < 5; i++)
        CHECK(pthread_sigqueue(receiver, SIGRTMIN + 5, (union sigval){.sival_int = 100 + i}) == 0, "queue");
    CHECK(pthread_kill(receiver, SIGHUP) == 0, "kill");
}

static void *receive(void *unused)
{
    (void)unused;
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, NULL);
    atomic_store(&drained, 1);
    for (;;) {
        struct timespec pause = {0, 1000000};
        nanosleep(&pause, NULL);
        if (!atomic_exchange(&drain, 0))
            continue;
        siginfo_t info;
        for (int i = 0; i < 5; i++) {
            CHECK(take(SIGRTMIN + 5, &info) == SIGRTMIN + 5, "thread's signal %d", i);
            CHECK(info.si_value.sival_int == 100 + i && info.si_pid == getpid() && info.si_code == SI_QUEUE,
                  "value %d code %d", info.si_value.sival_int, info.si_code);
        }
        CHECK(take(SIGRTMIN + 5, &info) < 0, "one too many");
        /* The C library turns SI_TKILL into SI_USER. */
        CHECK(take(SIGHUP, &info) == SIGHUP && info.si_code == SI_USER && info.si_pid == getpid(), "SIGHUP");
        atomic_store(&drained, 1);
    }
    return NULL;
}

static void queue_process(void)
{
    for (int i = 0; i < 7; i++)
        CHECK(sigqueue(getpid(), SIGRTMIN + 2, (union sigval){.sival_int = i * 3}) == 0, "queue");
    CHECK(kill(getpid(), SIGTERM) == 0 && kill(getpid(), SIGTERM) == 0, "kill");
}

static void pending_prepare(void)
{
    block_all_but_ask();
    CHECK(pthread_create(&receiver, NULL, receive, NULL) == 0, "thread");
    while (!atomic_load(&drained))
        usleep(1000);
    queue_process();
    queue_thread();
}

static void pending_fully(void)
{
    siginfo_t info;
    for (int i = 0; i < 7; i++) {
        CHECK(take(SIGRTMIN + 2, &info) == SIGRTMIN + 2, "process's signal %d", i);
        CHECK(info.si_value.sival_int == i * 3 && info.si_uid == getuid() && info.si_code == SI_QUEUE,
              "value %d", info.si_value.sival_int);
    }
    CHECK(take(SIGRTMIN + 2, &info) < 0, "one too many");
    CHECK(take(SIGTERM, &info) == SIGTERM && info.si_code == SI_USER, "SIGTERM");
    CHECK(take(SIGTERM, &info) < 0, "SIGTERM twice");
    atomic_store(&drained, 0);
    atomic_store(&drain, 1);
    while (!atomic_load(&drained))
        usleep(1000);
    queue_process();
    queue_thread();
}

static stack_t stack_before;
static volatile uintptr_t stack_used;

static void on_stack(int s)
{
    (void)s;
    stack_used = (uintptr_t)__builtin_frame_address(0);
}

static void altstack_fully(void)
{
    stack_t now;
    CHECK(sigaltstack(NULL, &now) == 0, "sigaltstack");
    CHECK(now.ss_sp == stack_before.ss_sp && now.ss_size == stack_before.ss_size && now.ss_flags == 0,
          "stack %p %zu", now.ss_sp, now.ss_size);
    stack_used = 0;
    raise(SIGUSR2);
    uintptr_t low = (uintptr_t)now.ss_sp;
    CHECK(stack_used > low && stack_used < low + now.ss_size, "ran elsewhere");
}

static void altstack_prepare(void)
{
    stack_before = (stack_t){.ss_sp = malloc(65536), .ss_size = 65536};
    CHECK(sigaltstack(&stack_before, NULL) == 0, "sigaltstack");
    struct sigaction a = {.sa_handler = on_stack, .sa_flags = SA_ONSTACK};
    CHECK(sigaction(SIGUSR2, &a, NULL) == 0, "sigaction");
}

/* A thread that stays inside a signal handler, on the alternate stack, while it is moved. */
static atomic_int inside, leave, left;

static void staying(int s)
{
    CHECK(s == SIGUSR2, "%d", s);
    volatile long local = 12345;
    atomic_store(&inside, 1);
    while (!atomic_load(&leave))
        CHECK(local == 12345, "local");
}

static void *handler_thread(void *unused)
{
    (void)unused;
    sigset_t none;
    sigemptyset(&none);
    sigaddset(&none, SIGUSR1);
    pthread_sigmask(SIG_SETMASK, &none, NULL);
    stack_t mine = {.ss_sp = malloc(65536), .ss_size = 65536};
    CHECK(sigaltstack(&mine, NULL) == 0, "sigaltstack");
    for (;;) {
        double number = 1.5;
        pthread_kill(pthread_self(), SIGUSR2);
        CHECK(number == 1.5, "floating point");
        sigset_t mask;
        pthread_sigmask(SIG_SETMASK, NULL, &mask);
        CHECK(sigismember(&mask, SIGUSR1) && !sigismember(&mask, SIGUSR2), "mask after the handler");
        atomic_store(&left, 1);
    }
    return NULL;
}

static void inside_prepare(void)
{
    struct sigaction a = {.sa_handler = staying, .sa_flags = SA_ONSTACK};
    CHECK(sigaction(SIGUSR2, &a, NULL) == 0, "sigaction");
    start_thread(handler_thread, NULL);
    while (!atomic_load(&inside))
        usleep(1000);
}

static void inside_fully(void)
{
    atomic_store(&left, 0);
    atomic_store(&inside, 0);
    atomic_store(&leave, 1);
    while (!atomic_load(&left))
        usleep(1000);
    atomic_store(&leave, 0);
    while (!atomic_load(&inside))
        usleep(1000);
}

ZOO({"handlers_and_masks", handlers_prepare, NULL, handlers_fully},
    {"pending", pending_prepare, NULL, pending_fully},
    {"altstack", altstack_prepare, altstack_fully, altstack_fully},
    {"inside_a_handler", inside_prepare, NULL, inside_fully})
