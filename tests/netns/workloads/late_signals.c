/* Counts the signals it gets: each SIGRTMIN is queued, so none may be missing and none may come twice. */
#include "workload.h"

static atomic_ullong got;

static void on_signal(int signal)
{
    (void)signal;
    atomic_fetch_add(&got, 1);
}

static void tell(void)
{
    dprintf(1, "got %llu\n", (unsigned long long)atomic_load(&got));
}

int main(void)
{
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    CHECK(sigaction(SIGRTMIN, &action, NULL) == 0, "sigaction");
    verify_forever(NULL, tell);
}
