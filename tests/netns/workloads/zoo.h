/* The frame of the zoo: programs that hold one kind of kernel state each and verify it.
 *
 * A file lists its kinds in a table: `prepare` sets the state up, `often` is called all the time, `fully`
 * when asked (before and after a move). `PROGRAM --list` names the kinds, `PROGRAM KIND` runs one. To
 * add a kind, write one function and one line in the table. */
#ifndef ZOO_H
#define ZOO_H
#include "workload.h"

struct kind {
    const char *name;
    void (*prepare)(void);
    void (*often)(void);
    void (*fully)(void);
};

#define ZOO(...) \
    static const struct kind kinds[] = {__VA_ARGS__}; \
    int main(int argc, char **argv) \
    { \
        for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++) { \
            if (argc == 2 && strcmp(argv[1], "--list") == 0) { \
                printf("%s\n", kinds[i].name); \
            } else if (argc == 2 && strcmp(argv[1], kinds[i].name) == 0) { \
                if (kinds[i].prepare) \
                    kinds[i].prepare(); \
                verify_forever(kinds[i].often, kinds[i].fully); \
            } \
        } \
        return argc == 2 && strcmp(argv[1], "--list") == 0 ? 0 : 2; \
    }

static inline void start_thread(void *(*run)(void *), void *argument)
{
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, run, argument) == 0, "thread");
}

/* A field of /proc/self/status, or any file of such lines. */
static inline void status_field(const char *path, const char *name, char *into, size_t room)
{
    FILE *file = fopen(path, "re");
    CHECK(file, "%s", path);
    char line[4096];
    into[0] = 0;
    while (fgets(line, sizeof line, file))
        if (strncmp(line, name, strlen(name)) == 0 && line[strlen(name)] == ':')
            snprintf(into, room, "%.*s", (int)room - 1, line + strlen(name) + 1);
    fclose(file);
}
#endif
