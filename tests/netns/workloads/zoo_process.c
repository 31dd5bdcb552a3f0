/* What belongs to the process as a whole: identity, rights, limits, names. */
#include "zoo.h"
#include <grp.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

static char before[20][4096];
static const char *const STATUS[] = {"Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb",
                                     "NoNewPrivs", "Umask", "NSpid", "NSsid", "NSpgid", "Name", "Seccomp",
                                     "Cpus_allowed"};
#define FIELDS (sizeof STATUS / sizeof STATUS[0])

static void remember(void)
{
    for (size_t i = 0; i < FIELDS; i++)
        status_field("/proc/self/status", STATUS[i], before[i], sizeof before[i]);
}
static void same_status(void)
{
    char now[4096];
    for (size_t i = 0; i < FIELDS; i++) {
        status_field("/proc/self/status", STATUS[i], now, sizeof now);
        CHECK(strcmp(now, before[i]) == 0, "%s was %s is %s", STATUS[i], before[i], now);
    }
}

static void attributes_prepare(void)
{
    struct rlimit files = {600, 1000}, stack = {4 << 20, 64 << 20};
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(0, &one);
    CHECK(chdir("/usr/share") == 0, "chdir");
    umask(0137);
    CHECK(setrlimit(RLIMIT_NOFILE, &files) == 0 && setrlimit(RLIMIT_STACK, &stack) == 0, "setrlimit");
    CHECK(setpriority(PRIO_PROCESS, 0, 7) == 0, "nice");
    CHECK(sched_setaffinity(0, sizeof one, &one) == 0, "affinity");
    CHECK(prctl(PR_SET_NAME, "odd name (1) x") == 0, "name");
    CHECK(prctl(PR_SET_TIMERSLACK, 77777UL) == 0, "slack");
    CHECK(prctl(PR_SET_DUMPABLE, 0) == 0 && prctl(PR_SET_DUMPABLE, 1) == 0, "dumpable");
    remember();
}
static void attributes_fully(void)
{
    struct rlimit limit;
    char text[256];
    cpu_set_t set;
    same_status();
    CHECK(getcwd(text, sizeof text) && strcmp(text, "/usr/share") == 0, "cwd");
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur == 600 && limit.rlim_max == 1000, "files");
    CHECK(getrlimit(RLIMIT_STACK, &limit) == 0 && limit.rlim_cur == 4 << 20 && limit.rlim_max == 64 << 20, "stack");
    CHECK(getpriority(PRIO_PROCESS, 0) == 7, "nice");
    CHECK(sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) == 1 && CPU_ISSET(0, &set), "affinity");
    CHECK(prctl(PR_GET_NAME, text) == 0 && strcmp(text, "odd name (1) x") == 0, "name %s", text);
    CHECK(prctl(PR_GET_TIMERSLACK) == 77777, "slack");
    CHECK(prctl(PR_GET_DUMPABLE) == 1, "dumpable");
}

static void nobody_prepare(void)
{
    gid_t groups[] = {65534, 1, 100};
    CHECK(setgroups(3, groups) == 0, "setgroups");
    CHECK(setresgid(65534, 65534, 65534) == 0 && setresuid(65534, 65534, 65534) == 0, "setuid");
    CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "no_new_privs");
    CHECK(prctl(PR_SET_DUMPABLE, 1) == 0, "dumpable");
    remember();
}
/* Real, effective and saved user differ; some capabilities are kept, one of them ambient. */
static void mixed_prepare(void)
{
    CHECK(prctl(PR_CAPBSET_DROP, 35, 0, 0, 0) == 0, "bounding"); /* CAP_WAKE_ALARM */
    CHECK(prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) == 0, "keepcaps");
    CHECK(setresgid(7, 8, 9) == 0 && setresuid(1, 2, 3) == 0, "setresuid");
    struct { uint32_t version; int pid; } header = {0x20080522, 0};
    uint32_t caps[6] = {1u << 10, 1u << 10 | 1u << 12, 1u << 10, 0, 0, 0}; /* NET_BIND_SERVICE, NET_ADMIN */
    CHECK(syscall(SYS_capset, &header, caps) == 0, "capset");
    CHECK(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, 10, 0, 0) == 0, "ambient");
    CHECK(prctl(PR_SET_DUMPABLE, 1) == 0, "dumpable");
    remember();
}
static void mixed_fully(void)
{
    uid_t r, e, s;
    same_status();
    CHECK(getresuid(&r, &e, &s) == 0 && r == 1 && e == 2 && s == 3, "users %u %u %u", r, e, s);
    CHECK(prctl(PR_CAPBSET_READ, 35) == 0, "bounding");
}

extern char **environ;
static char *environment_at;

static void names_prepare(void)
{
    environment_at = environ[0];
    remember();
}
static void names_fully(void)
{
    char text[4096];
    same_status();
    FILE *file = fopen("/proc/self/cmdline", "re");
    size_t got = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[got] = 0;
    CHECK(strcmp(text, program_invocation_name) == 0 && strcmp(text + strlen(text) + 1, "names") == 0, "%s", text);
    ssize_t length = readlink("/proc/self/exe", text, sizeof text - 1);
    CHECK(length > 0, "exe");
    text[length] = 0;
    CHECK(strcmp(text, program_invocation_name) == 0, "exe is %s", text);
    file = fopen("/proc/self/environ", "re");
    got = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    CHECK(got > 0 && environ[0] == environment_at && strcmp(text, environ[0]) == 0, "environment");
    CHECK(getpid() == gettid() && getpid() == syscall(SYS_getpid), "PID");
}

/* Children are made, end and are waited for, after a move as before it. */
static void children_fully(void)
{
    for (int i = 0; i < 5; i++) {
        int status;
        pid_t child = fork();
        if (child == 0)
            _exit(getppid() > 1 ? 10 + i : 1);
        CHECK(child > 0 && waitpid(child, &status, 0) == child, "fork");
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 10 + i, "status %x", (unsigned)status);
    }
    FILE *out = popen("echo hello; exit 3", "re");
    char line[16];
    CHECK(out && fgets(line, sizeof line, out) && strcmp(line, "hello\n") == 0, "popen");
    int status = pclose(out);
    CHECK(WEXITSTATUS(status) == 3, "status %x", (unsigned)status);
}

ZOO({"attributes", attributes_prepare, NULL, attributes_fully},
    {"nobody", nobody_prepare, NULL, same_status},
    {"mixed_credentials", mixed_prepare, NULL, mixed_fully},
    {"names", names_prepare, NULL, names_fully},
    {"children", NULL, NULL, children_fully})
