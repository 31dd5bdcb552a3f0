/* Has a file open that is on this host only, until SIGUSR2 says that it has been looked at: as a server has a
 * temporary file. */
#include "workload.h"

static char name[64];
static int file;

static void on_look(int signal)
{
    (void)signal;
    close(file);
    unlink(name);
    file = -1;
}

static void is_gone(void)
{
    CHECK(file == -1 && access(name, F_OK) != 0, "%s is here", name);
}

int main(void)
{
    struct sigaction action = {.sa_handler = on_look, .sa_flags = SA_RESTART};
    CHECK(sigaction(SIGUSR2, &action, NULL) == 0, "sigaction");
    snprintf(name, sizeof name, "/run/node/fleeting-%d", getpid());
    file = open(name, O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(file >= 0 && write(file, "contents", 8) == 8, "%s", name);
    verify_forever(NULL, is_gone);
}
