/* Counts. Its mappings and descriptors must stay what they were when it began: what a failed or refused
 * move leaves behind in it shows here. */
#include "workload.h"
#include <dirent.h>

static char before[65536], after[65536];
static atomic_ullong count;

static size_t whole_file(const char *path, char *into, size_t room)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0, "%s", path);
    size_t length = 0;
    ssize_t got;
    while ((got = read(fd, into + length, room - length)) > 0)
        length += got;
    close(fd);
    return length;
}

/* Mappings by address and protection, then descriptors by number and target. */
static void describe(char *into, size_t room)
{
    size_t length = whole_file("/proc/self/maps", into, room / 2);
    DIR *list = opendir("/proc/self/fd");
    CHECK(list, "fds");
    struct dirent *entry;
    while ((entry = readdir(list))) {
        char path[64], target[256];
        if (entry->d_name[0] == '.' || atoi(entry->d_name) == dirfd(list))
            continue;
        snprintf(path, sizeof path, "/proc/self/fd/%.20s", entry->d_name);
        ssize_t got = readlink(path, target, sizeof target - 1);
        target[got < 0 ? 0 : got] = 0;
        length += snprintf(into + length, room - length, "%s %s\n", entry->d_name, target);
    }
    closedir(list);
    into[length] = 0;
}

static void *counting(void *unused)
{
    (void)unused;
    for (;;) {
        unsigned long long was = atomic_fetch_add(&count, 1);
        CHECK(atomic_load(&count) == was + 1, "counter jumped");
    }
    return NULL;
}

static void count_on(void)
{
    static unsigned long long last;
    unsigned long long seen = atomic_load(&count);
    CHECK(seen >= last, "%llu after %llu", seen, last);
    last = seen;
}

static void unchanged(void)
{
    describe(after, sizeof after);
    if (strcmp(before, after) != 0)
        fail("mappings or descriptors changed, from\n%s\nto\n%s", before, after);
}

int main(void)
{
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, counting, NULL) == 0, "thread");
    /* Twice: the first pass makes the heap and whatever else the library keeps. */
    describe(before, sizeof before);
    free(malloc(100));
    describe(before, sizeof before);
    verify_forever(count_on, unchanged);
}
