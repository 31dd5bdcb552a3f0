/* Counts: `counter [STATE...]`. Its mappings and descriptors must stay what they were when it began: what
 * a failed or refused move leaves behind in it shows here. Each STATE is something that cannot be moved. */
#include "workload.h"
#include <asm/ldt.h>
#include <dirent.h>
#include <limits.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/mount.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>

static char before[65536], after[65536];
static atomic_ullong count;

struct area {
    unsigned long start, end, offset;
    char rights[5], name[200];
};

static size_t add_area(char *into, size_t room, const struct area *area)
{
    return area->end ? (size_t)snprintf(into, room, "%lx-%lx %s %lx %s\n", area->start, area->end, area->rights,
                                        area->offset, area->name)
                     : 0;
}

/* Whether the kernel keeps two alike neighbours as one mapping is its own affair: they are told as one. */
static size_t describe_maps(char *into, size_t room)
{
    static char text[32768];
    size_t length = 0, told = 0;
    ssize_t got;
    int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0, "maps");
    while ((got = read(fd, text + length, sizeof text - 1 - length)) > 0)
        length += (size_t)got;
    close(fd);
    text[length] = 0;
    struct area last = {0}, area;
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
        area = (struct area){0};
        CHECK(sscanf(line, "%lx-%lx %4s %lx %*s %*s %199[^\n]", &area.start, &area.end, area.rights, &area.offset,
                     area.name) >= 4, "maps");
        int alike = last.end == area.start && strcmp(last.rights, area.rights) == 0
                    && strcmp(last.name, area.name) == 0
                    && (area.name[0] != '/' || last.offset + (last.end - last.start) == area.offset);
        if (alike) {
            last.end = area.end;
            continue;
        }
        told += add_area(into + told, room - told, &last);
        last = area;
    }
    return told + add_area(into + told, room - told, &last);
}

/* Mappings, then descriptors by number and target. */
static void describe(char *into, size_t room)
{
    size_t length = describe_maps(into, room / 2);
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

/* Between two rests, so that others find a processor: most tests run beside another one. */
#define TURNS (1 << 15)
static void *counting(void *unused)
{
    (void)unused;
    for (;;) {
        unsigned long long was = atomic_fetch_add(&count, 1);
        CHECK(atomic_load(&count) == was + 1, "counter jumped");
        struct timespec rest = {0, 1000000};
        if (was % TURNS == 0)
            nanosleep(&rest, NULL);
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
    size_t at = 0;
    while (before[at] && before[at] == after[at])
        at++;
    if (before[at] == after[at])
        return;
    while (at > 0 && before[at - 1] != '\n')
        at--;
    fail("mappings or descriptors changed, from \"%.*s\" to \"%.*s\"", (int)strcspn(before + at, "\n"),
         before + at, (int)strcspn(after + at, "\n"), after + at);
}

static void an_inotify(void)
{
    int fd = inotify_init1(IN_CLOEXEC);
    CHECK(fd >= 0 && inotify_add_watch(fd, "/tmp", IN_CREATE) >= 0, "inotify");
}

static void half_a_datagram(void)
{
    struct sockaddr_in self = {.sin_family = AF_INET, .sin_port = htons(9), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    CHECK(fd >= 0 && connect(fd, (struct sockaddr *)&self, sizeof self) == 0, "udp");
    CHECK(send(fd, "half", 4, MSG_MORE) == 4, "udp");
}

static void a_child(void)
{
    pid_t child = fork();
    CHECK(child >= 0, "fork");
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;)
            pause();
    }
}

/* The tracer is a child of somebody else: its parent ends at once. */
static void a_tracer(void)
{
    pid_t me = getpid(), child = fork();
    CHECK(child >= 0, "fork");
    if (child == 0) {
        if (fork() != 0)
            _exit(0);
        if (ptrace(PTRACE_SEIZE, me, 0, 0) != 0)
            _exit(1);
        /* Signals stop the tracee: each is passed on. */
        int status;
        pid_t who;
        while ((who = waitpid(-1, &status, __WALL)) > 0)
            if (WIFSTOPPED(status))
                ptrace(PTRACE_CONT, who, 0, WSTOPSIG(status) == SIGTRAP ? 0 : WSTOPSIG(status));
        _exit(0);
    }
    CHECK(waitpid(child, NULL, 0) == child, "waitpid");
    for (int traced = 0; !traced; usleep(1000)) {
        char line[256];
        FILE *file = fopen("/proc/self/status", "re");
        while (fgets(line, sizeof line, file))
            if (sscanf(line, "TracerPid: %d", &traced) == 1)
                break;
        fclose(file);
    }
}

static void a_filter(void)
{
    struct sock_filter allow = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog program = {1, &allow};
    CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "no_new_privs");
    CHECK(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0, "seccomp");
}

static int opened(const char *form)
{
    char path[128];
    snprintf(path, sizeof path, form, getpid());
    int fd = open(path, O_RDWR | O_CREAT, 0600);
    CHECK(fd >= 0 && write(fd, "contents", 8) == 8, "%s", path);
    return fd;
}

static void a_deleted_file(void)
{
    char path[128];
    opened("/run/shared/deleted-%d");
    snprintf(path, sizeof path, "/run/shared/deleted-%d", getpid());
    CHECK(unlink(path) == 0, "unlink");
}

static void a_lock(void)
{
    int file = opened("/run/shared/locked-%d");
    CHECK(flock(file, LOCK_EX) == 0, "flock");
}

static void a_private_file(void)
{
    opened("/run/node/only-here-%d");
}

static void close_between(int first, int last)
{
    if (first <= last)
        syscall(SYS_close_range, first, last, 0);
}

/* A process that is nobody's child here, and has nothing but what it is given. It holds the end of a pipe until it has
 * closed all else: what its parent waits for. */
static int a_stranger(int keep)
{
    int closed[2];
    char byte;
    CHECK(pipe2(closed, O_CLOEXEC) == 0, "pipe");
    pid_t child = fork();
    CHECK(child >= 0, "fork");
    if (child == 0) {
        if (fork() != 0)
            _exit(0);
        int low = keep < closed[1] ? keep : closed[1], high = keep < closed[1] ? closed[1] : keep;
        close_between(0, low - 1);
        close_between(low + 1, high - 1);
        close_between(high + 1, INT_MAX);
        close(closed[1]);
        return 1;
    }
    CHECK(waitpid(child, NULL, 0) == child, "waitpid");
    CHECK(close(closed[1]) == 0 && read(closed[0], &byte, 1) == 0 && close(closed[0]) == 0, "pipe");
    return 0;
}
static void wait_here(void)
{
    for (;;)
        pause();
}

static void a_sysv_segment(void)
{
    int id = shmget(IPC_PRIVATE, 65536, IPC_CREAT | 0600);
    void *at = shmat(id, NULL, 0);
    CHECK(id >= 0 && at != (void *)-1 && shmctl(id, IPC_RMID, NULL) == 0, "shm");
    if (a_stranger(-1))
        wait_here();
}
static void a_memfd_held(void)
{
    int fd = memfd_create("held", 0);
    CHECK(fd >= 0 && ftruncate(fd, 65536) == 0, "memfd");
    if (a_stranger(fd))
        wait_here();
}
static void a_memfd_mapped(void)
{
    int fd = memfd_create("mapped", 0);
    CHECK(fd >= 0 && ftruncate(fd, 65536) == 0, "memfd");
    CHECK(mmap(NULL, 65536, PROT_READ, MAP_SHARED, fd, 0) != MAP_FAILED, "mmap");
    if (a_stranger(-1))
        wait_here();
}
static void a_mapped_memfd_held(void)
{
    int fd = memfd_create("both", 0);
    CHECK(fd >= 0 && ftruncate(fd, 65536) == 0, "memfd");
    if (a_stranger(fd))
        wait_here();
    CHECK(mmap(NULL, 65536, PROT_READ, MAP_SHARED, fd, 0) != MAP_FAILED && close(fd) == 0, "mmap");
}

static void a_file_held(void)
{
    int fd = opened("/run/shared/held-%d");
    if (a_stranger(fd))
        wait_here();
}
static void an_eventfd_held(void)
{
    int fd = eventfd(0, EFD_CLOEXEC);
    CHECK(fd >= 0, "eventfd");
    if (a_stranger(fd))
        wait_here();
}

static void a_listener_held(void)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(fd >= 0 && listen(fd, 1) == 0, "listen");
    if (a_stranger(fd))
        wait_here();
}

static void begin(int signal)
{
    (void)signal;
    if (fork() == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        wait_here();
    }
}
static void a_child_when_told(void)
{
    struct sigaction action = {.sa_handler = begin, .sa_flags = SA_RESTART};
    CHECK(sigaction(SIGUSR2, &action, NULL) == 0, "sigaction");
}

static size_t free_huge_pages(void)
{
    FILE *file = fopen("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "re");
    size_t pages = 0;
    CHECK(file && fscanf(file, "%zu", &pages) == 1, "free huge pages");
    fclose(file);
    return pages;
}
static void more_than_half_of_the_huge_pages(void)
{
    size_t length = (free_huge_pages() / 2 + 1) << 21;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB;
    CHECK(mmap(NULL, length, PROT_READ | PROT_WRITE, flags, -1, 0) != MAP_FAILED, "mmap");
}
static void a_hugetlbfs_file(void)
{
    CHECK(mkdir("/run/node/huge", 0700) == 0 || errno == EEXIST, "mkdir");
    CHECK(mount("none", "/run/node/huge", "hugetlbfs", 0, NULL) == 0, "mount");
    int fd = open("/run/node/huge/file", O_RDWR | O_CREAT, 0600);
    CHECK(fd >= 0, "open");
    void *at = mmap(NULL, 2 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(at != MAP_FAILED && close(fd) == 0, "mmap");
}

static void a_connection(void)
{
    struct sockaddr_in name = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof name;
    int listener = socket(AF_INET, SOCK_STREAM, 0), client = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(bind(listener, (struct sockaddr *)&name, length) == 0 && listen(listener, 1) == 0, "listen");
    CHECK(getsockname(listener, (struct sockaddr *)&name, &length) == 0, "getsockname");
    CHECK(connect(client, (struct sockaddr *)&name, length) == 0 && accept(listener, NULL, NULL) >= 0, "connect");
    close(listener);
}

static void a_port(void)
{
    struct sockaddr_in name = {.sin_family = AF_INET, .sin_port = htons(4243)};
    int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    CHECK(setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) == 0, "SO_REUSEADDR");
    CHECK(bind(listener, (struct sockaddr *)&name, sizeof name) == 0 && listen(listener, 1) == 0, "listen");
}

static void a_key(void)
{
    const long of_process = -2;
    CHECK(syscall(SYS_add_key, "user", "counter", "secret", 6, of_process) > 0, "add_key");
}

static void *sleep_on(void *unused)
{
    for (;;)
        pause();
    return unused;
}

/* With a thread beside it the process has a list of adjustments in any case. */
static void an_adjusted_semaphore(void)
{
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, sleep_on, NULL) == 0, "thread");
    int id = semget(IPC_PRIVATE, 1, 0600);
    struct sembuf one = {0, 1, SEM_UNDO};
    CHECK(id >= 0 && semop(id, &one, 1) == 0, "semaphore");
}

static void a_message_queue(void)
{
    struct { long type; char text[8]; } message = {1, "message"};
    int id = msgget(IPC_PRIVATE, 0600);
    CHECK(id >= 0 && msgsnd(id, &message, sizeof message.text, 0) == 0, "queue");
}

static void a_segment_of_code(void)
{
    struct user_desc entry = {.entry_number = 2, .base_addr = 0x1000, .limit = 0xfff, .useable = 1, .seg_32bit = 1};
    CHECK(syscall(SYS_modify_ldt, 1, &entry, sizeof entry) == 0, "modify_ldt");
}

static void a_watched_directory(void)
{
    int fd = open("/tmp", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    CHECK(fd >= 0 && signal(SIGIO, SIG_IGN) != SIG_ERR, "open");
    CHECK(fcntl(fd, F_NOTIFY, DN_CREATE | DN_MULTISHOT) == 0, "F_NOTIFY");
}

static const struct { const char *name; void (*make)(void); } states[] = {
    {"inotify", an_inotify}, {"half_udp", half_a_datagram}, {"child", a_child}, {"traced", a_tracer},
    {"seccomp", a_filter}, {"deleted", a_deleted_file}, {"lock", a_lock}, {"private_file", a_private_file},
    {"sysv", a_sysv_segment},
    {"memfd_held", a_memfd_held}, {"memfd_mapped", a_memfd_mapped}, {"mapped_memfd_held", a_mapped_memfd_held},
    {"file_held", a_file_held}, {"eventfd_held", an_eventfd_held},
    {"listener_held", a_listener_held}, {"child_when_told", a_child_when_told},
    {"huge", more_than_half_of_the_huge_pages}, {"hugetlbfs", a_hugetlbfs_file}, {"connection", a_connection}, {"port", a_port},
    {"key", a_key}, {"semaphore", an_adjusted_semaphore}, {"queue", a_message_queue},
    {"segment", a_segment_of_code}, {"watched", a_watched_directory},
};

int main(int argc, char **argv)
{
    pthread_t thread;
    for (int i = 1; i < argc; i++) {
        int known = 0;
        for (size_t j = 0; j < sizeof states / sizeof states[0]; j++)
            if (strcmp(argv[i], states[j].name) == 0) {
                states[j].make();
                known = 1;
            }
        CHECK(known, "no state %s", argv[i]);
    }
    CHECK(pthread_create(&thread, NULL, counting, NULL) == 0, "thread");
    /* Twice: the first pass makes the heap and whatever else the library keeps. */
    describe(before, sizeof before);
    free(malloc(100));
    describe(before, sizeof before);
    verify_forever(count_on, unchanged);
}
