/* Says something long to whoever connects, and closes at once: `tcp_farewell PORT BYTES [PAUSE]`. What the client does not
 * take is its kernel's from then on. Between two clients it pauses for so many milliseconds. */
#include "workload.h"
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>

static void say(int fd, size_t bytes)
{
    int room = (int)(2 * bytes);
    CHECK(setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &room, sizeof room) == 0, "SO_SNDBUFFORCE");
    unsigned char *text = malloc(bytes);
    CHECK(text, "memory");
    for (size_t i = 0; i < bytes; i++)
        text[i] = (unsigned char)(i % 251);
    ssize_t sent = send(fd, text, bytes, MSG_NOSIGNAL | MSG_DONTWAIT);
    CHECK(sent == (ssize_t)bytes, "wrote %zd of %zu", sent, bytes);
    free(text);
    CHECK(close(fd) == 0, "close");
    dprintf(1, "closed\n");
}

int main(int argc, char **argv)
{
    CHECK(argc == 3 || argc == 4, "usage");
    struct timespec pause = {0, argc == 4 ? atoi(argv[3]) * 1000000L : 0};
    struct sockaddr_in name = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1]))};
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
    CHECK(setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) == 0, "SO_REUSEADDR");
    CHECK(bind(listener, (struct sockaddr *)&name, sizeof name) == 0 && listen(listener, 512) == 0, "listen");
    struct sigaction action = {.sa_handler = on_ask, .sa_flags = SA_RESTART};
    CHECK(sigaction(SIGUSR1, &action, NULL) == 0, "sigaction");
    dprintf(1, "ready\n");
    for (;;) {
        struct pollfd look = {.fd = listener, .events = POLLIN};
        if (poll(&look, 1, 100) > 0) {
            int fd = accept(listener, NULL, NULL);
            if (fd >= 0) {
                say(fd, (size_t)atoi(argv[2]));
                nanosleep(&pause, NULL);
            }
        }
        atomic_fetch_add(&steps, 1);
        if (asked) {
            asked = 0;
            dprintf(1, "ok %llu\n", (unsigned long long)atomic_load(&steps));
        }
    }
}
