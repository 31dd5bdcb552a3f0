/* Memory that is shared by mappings and descriptors: memfds and System V segments. */
#include "zoo.h"
#include <linux/memfd.h>
#include <sys/ipc.h>
#include <sys/shm.h>
#include <sys/stat.h>

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x10
#endif
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8
#endif
#define PAGE 4096
#define MANY 64

static char *areas[4];
static int fds[6];

static void fill(char *at, size_t pages, int by)
{
    for (size_t i = 0; i < pages; i++)
        memset(at + i * PAGE, (int)i * 5 + by, PAGE);
}
static void filled(const char *at, size_t pages, int by)
{
    for (size_t i = 0; i < pages; i++)
        for (size_t j = 0; j < PAGE; j++)
            CHECK(at[i * PAGE + j] == (char)((int)i * 5 + by), "page %zu at %zu: %d", i, j, at[i * PAGE + j]);
}
static char *map(int fd, size_t pages, int prot, int flags, off_t page)
{
    char *got = mmap(NULL, pages * PAGE, prot, flags, fd, page * PAGE);
    CHECK(got != MAP_FAILED, "mmap");
    return got;
}
static int memfd(const char *name, unsigned flags, off_t size)
{
    int fd = memfd_create(name, flags);
    CHECK(fd >= 0 && ftruncate(fd, size) == 0, "memfd");
    return fd;
}
static off_t size_of(int fd)
{
    struct stat s;
    CHECK(fstat(fd, &s) == 0, "fstat");
    return s.st_size;
}
static ino_t inode(int fd)
{
    struct stat s;
    CHECK(fstat(fd, &s) == 0, "fstat");
    return s.st_ino;
}

/* One memfd, mapped twice and open three times, by two descriptions; larger than its mappings, with holes. */
static void memfd_prepare(void)
{
    fds[0] = memfd("zoo shared\n", MFD_CLOEXEC, 4 * MANY * PAGE);
    fds[1] = dup(fds[0]);
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fds[0]);
    fds[2] = open(path, O_RDONLY | O_APPEND);
    CHECK(fds[1] >= 0 && fds[2] >= 0, "open");
    areas[0] = map(fds[0], MANY, PROT_READ | PROT_WRITE, MAP_SHARED, 0);
    areas[1] = map(fds[0], MANY, PROT_READ | PROT_WRITE, MAP_SHARED, MANY / 2);
    fill(areas[0], MANY, 1);
    /* Beyond all mappings. */
    CHECK(pwrite(fds[0], "beyond", 6, 3 * MANY * PAGE + 7) == 6, "pwrite");
    CHECK(lseek(fds[0], 1234, SEEK_SET) == 1234 && lseek(fds[2], 99, SEEK_SET) == 99, "lseek");
}
static unsigned memfd_round;
static void memfd_often(void)
{
    int by = (int)(++memfd_round % 100);
    memset(areas[1] + (MANY / 2) * PAGE, by, PAGE); /* page MANY, which only this mapping shows */
    areas[0][MANY / 2 * PAGE] = (char)by;
    CHECK(areas[1][0] == (char)by, "the mappings have parted");
}
static void memfd_fully(void)
{
    char bytes[8] = {0};
    areas[0][MANY / 2 * PAGE] = (char)(MANY / 2 * 5 + 1);
    filled(areas[0], MANY, 1);
    CHECK(pread(fds[0], bytes, 6, 3 * MANY * PAGE + 7) == 6 && memcmp(bytes, "beyond", 6) == 0, "beyond");
    CHECK(pread(fds[0], bytes, 1, MANY * PAGE) == 1 && bytes[0] == (char)(memfd_round % 100), "page %d", MANY);
    CHECK(size_of(fds[0]) == 4 * MANY * PAGE, "size");
    CHECK(inode(fds[0]) == inode(fds[1]) && inode(fds[0]) == inode(fds[2]), "one object");
    CHECK(lseek(fds[1], 0, SEEK_CUR) == 1234 && lseek(fds[2], 0, SEEK_CUR) == 99, "positions");
    CHECK((fcntl(fds[2], F_GETFL) & (O_ACCMODE | O_APPEND)) == (O_RDONLY | O_APPEND), "flags");
    CHECK(fcntl(fds[0], F_GET_SEALS) == F_SEAL_SEAL, "seals %d", fcntl(fds[0], F_GET_SEALS));
    CHECK(lseek(fds[0], 2 * MANY * PAGE, SEEK_DATA) == 3 * MANY * PAGE, "holes");
    CHECK(lseek(fds[0], 1234, SEEK_SET) == 1234, "lseek");
    struct stat s;
    CHECK(fstat(fds[0], &s) == 0 && (s.st_mode & 07777) == 0777, "mode %o", s.st_mode);
}

/* Mapped, shared and private at once, and no descriptor left. */
static void closed_prepare(void)
{
    int fd = memfd("zoo-closed", MFD_CLOEXEC, MANY * PAGE);
    areas[0] = map(fd, MANY, PROT_READ | PROT_WRITE, MAP_SHARED, 0);
    fill(areas[0], MANY, 1);
    areas[1] = map(fd, MANY, PROT_READ | PROT_WRITE, MAP_PRIVATE, 0);
    areas[2] = map(fd, MANY, PROT_READ, MAP_SHARED, 0);
    for (int i = 0; i < 8; i++)
        areas[1][i * PAGE] = 100 + i;
    CHECK(close(fd) == 0, "close");
}
static int closed_round;
static void closed_often(void)
{
    int i = ++closed_round % 8;
    areas[1][i * PAGE + 1] = (char)closed_round;
    areas[0][40 * PAGE] = (char)closed_round;
    CHECK(areas[1][40 * PAGE] == (char)closed_round && areas[2][40 * PAGE] == (char)closed_round, "parted");
    /* Back to the object, and to a page of its own again. */
    CHECK(madvise(areas[1] + 12 * PAGE, PAGE, MADV_DONTNEED) == 0, "dontneed");
    CHECK(areas[1][12 * PAGE] == (char)(12 * 5 + 1), "dropped page");
    if (closed_round % 3)
        areas[1][12 * PAGE] = 77;
}
static void closed_fully(void)
{
    areas[0][40 * PAGE] = (char)(40 * 5 + 1);
    filled(areas[0], MANY, 1);
    filled(areas[2], MANY, 1);
    for (int i = 0; i < 8; i++)
        CHECK(areas[1][i * PAGE] == (char)(100 + i), "private page %d", i);
    filled(areas[1] + 8 * PAGE, 0, 0);
    for (int i = 13; i < MANY; i++)
        CHECK(areas[1][i * PAGE] == (char)(i * 5 + 1), "page %d", i);
}

/* Sealed in all ways, with mappings that a seal bears. */
static void sealed_prepare(void)
{
    fds[0] = memfd("zoo-sealed", MFD_ALLOW_SEALING, MANY * PAGE);
    char *at = map(fds[0], MANY, PROT_READ | PROT_WRITE, MAP_SHARED, 0);
    fill(at, MANY, 3);
    CHECK(munmap(at, MANY * PAGE) == 0, "munmap");
    CHECK(fcntl(fds[0], F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW) == 0, "seal");
    areas[0] = map(fds[0], MANY, PROT_READ, MAP_SHARED, 0);
    fds[1] = memfd("zoo-future", MFD_ALLOW_SEALING, MANY * PAGE);
    areas[1] = map(fds[1], MANY, PROT_READ | PROT_WRITE, MAP_SHARED, 0);
    CHECK(fcntl(fds[1], F_ADD_SEALS, F_SEAL_FUTURE_WRITE | F_SEAL_SEAL) == 0, "seal");
    fill(areas[1], MANY, 4);
    fds[2] = memfd_create("zoo-noexec", MFD_NOEXEC_SEAL | MFD_CLOEXEC);
    CHECK(fds[2] >= 0 || errno == EINVAL, "noexec");
    fds[3] = memfd("zoo-open", MFD_ALLOW_SEALING, 5);
}
static void sealed_often(void)
{
    areas[1][7 * PAGE + 5]++;
}
static void sealed_fully(void)
{
    filled(areas[0], MANY, 3);
    CHECK(fcntl(fds[0], F_GET_SEALS) == (F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW), "seals");
    CHECK(pwrite(fds[0], "x", 1, 0) == -1 && errno == EPERM, "can be written");
    CHECK(mprotect(areas[0], PAGE, PROT_READ | PROT_WRITE) == -1 && errno == EACCES, "can be made writable");
    areas[1][7 * PAGE + 5] = (char)(7 * 5 + 4);
    filled(areas[1], MANY, 4);
    CHECK(fcntl(fds[1], F_GET_SEALS) == (F_SEAL_FUTURE_WRITE | F_SEAL_SEAL), "seals");
    CHECK(pwrite(fds[1], "x", 1, 0) == -1 && errno == EPERM, "can be written");
    struct stat s;
    if (fds[2] >= 0)
        CHECK(fcntl(fds[2], F_GET_SEALS) == 0x20 && fstat(fds[2], &s) == 0 && (s.st_mode & 07777) == 0666,
              "seals %x, mode %o", fcntl(fds[2], F_GET_SEALS), s.st_mode);
    CHECK(fcntl(fds[3], F_GET_SEALS) == 0 && size_of(fds[3]) == 5, "open for seals");
}

/* Open and not mapped, changed by calls only, all the time: it is a log with a number in each entry. */
#define LOG (8 << 20)
static unsigned logged;
static void unmapped_prepare(void)
{
    fds[0] = memfd("zoo-log", 0, 0);
    fds[1] = memfd("zoo-ring", 0, LOG);
}
static void unmapped_often(void)
{
    for (int i = 0; i < 20; i++) {
        unsigned entry[64];
        for (int j = 0; j < 64; j++)
            entry[j] = logged * 64 + (unsigned)j;
        if ((size_t)logged * sizeof entry < LOG)
            CHECK(write(fds[0], entry, sizeof entry) == sizeof entry, "write");
        CHECK(pwrite(fds[1], entry, sizeof entry, (off_t)(logged % (LOG / sizeof entry) * sizeof entry)) ==
                  sizeof entry, "pwrite");
        logged++;
    }
}
static void unmapped_fully(void)
{
    unsigned entry[64];
    size_t slots = LOG / sizeof entry, in_log = logged < slots ? logged : slots;
    CHECK(size_of(fds[0]) == (off_t)(in_log * sizeof entry), "size of the log");
    for (size_t i = 0; i < slots; i++) {
        size_t last = i < logged ? i + (logged - 1 - i) / slots * slots : 0;
        CHECK(pread(fds[1], entry, sizeof entry, (off_t)(i * sizeof entry)) == sizeof entry, "pread");
        for (unsigned j = 0; j < 64; j++)
            CHECK(entry[j] == (i < logged ? last * 64 + j : 0), "ring %zu of %u: %u", i, logged, entry[j]);
        if (i < in_log) {
            CHECK(pread(fds[0], entry, sizeof entry, (off_t)(i * sizeof entry)) == sizeof entry, "pread");
            CHECK(entry[0] == i * 64 && entry[63] == i * 64 + 63, "log %zu: %u", i, entry[0]);
        }
    }
}

/* Mapped, and changed behind the mapping's back: by write(2), by holes, by a shrinking and growing end. A
 * thread does so without a pause, so that it is in the middle of a call when the process is stopped. */
#define BACK 512
static unsigned char behind[BACK]; /* what each page begins with */
static pthread_mutex_t back_lock = PTHREAD_MUTEX_INITIALIZER;
static void behind_check(unsigned i, unsigned end)
{
    for (; i < end; i++)
        for (int j = 0; j < 100; j += 9)
            CHECK((unsigned char)areas[0][i * PAGE + j] == behind[i], "page %u at %d: %d, must be %d", i, j,
                  (unsigned char)areas[0][i * PAGE + j], behind[i]);
}
static void *behind_the_back(void *unused)
{
    static char page[16 * PAGE];
    (void)unused;
    for (unsigned n = 1;; n++) {
        unsigned i = n * 7919 % (BACK - 16);
        pthread_mutex_lock(&back_lock);
        behind_check(i, i + 16);
        if (n % 5 == 0) {
            if (n % 2)
                CHECK(fallocate(fds[0], FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, i * PAGE, 4 * PAGE) == 0, "punch");
            else
                CHECK(madvise(areas[0] + i * PAGE, 4 * PAGE, MADV_REMOVE) == 0, "remove");
            memset(behind + i, 0, 4);
            if (n % 3) /* read, so that a new page is there */
                CHECK(areas[0][i * PAGE] == 0, "a hole is not empty");
        } else if (n % 17 == 0) {
            behind_check(BACK - 8, BACK);
            CHECK(ftruncate(fds[0], (BACK - 8) * PAGE + 100) == 0 && ftruncate(fds[0], BACK * PAGE) == 0, "truncate");
            memset(behind + BACK - 7, 0, 7);
        } else {
            memset(page, (int)n | 1, sizeof page);
            CHECK(pwrite(fds[0], page, sizeof page, i * PAGE) == sizeof page, "pwrite");
            memset(behind + i, (int)(unsigned char)(n | 1), 16);
        }
        pthread_mutex_unlock(&back_lock);
        if (n % 8 == 0)
            sched_yield();
    }
    return NULL;
}
static void behind_prepare(void)
{
    fds[0] = memfd("zoo-behind", 0, BACK * PAGE);
    areas[0] = map(fds[0], BACK, PROT_READ | PROT_WRITE, MAP_SHARED, 0);
    start_thread(behind_the_back, NULL);
}
static void behind_fully(void)
{
    pthread_mutex_lock(&back_lock);
    behind_check(0, BACK);
    pthread_mutex_unlock(&back_lock);
}

/* Bytes in the last page behind the end: they are only in the mapping. */
static void tail_prepare(void)
{
    fds[0] = memfd("zoo-tail", 0, 3 * PAGE + 100);
    areas[0] = map(fds[0], 4, PROT_READ | PROT_WRITE, MAP_SHARED, 0);
    fill(areas[0], 4, 9);
}
static void tail_fully(void)
{
    filled(areas[0], 4, 9);
    CHECK(size_of(fds[0]) == 3 * PAGE + 100, "size %ld", (long)size_of(fds[0]));
}

/* System V segments: one attached twice (once for reading), with a part unmapped and a part protected; and one
 * that was removed and lives on by its attach. */
static int segments[2];
static void segment_prepare(void)
{
    segments[0] = shmget(IPC_PRIVATE, MANY * PAGE - 1000, 0640 | IPC_CREAT);
    segments[1] = shmget(IPC_PRIVATE, MANY * PAGE, 0600 | IPC_CREAT);
    CHECK(segments[0] >= 0 && segments[1] >= 0, "shmget");
    areas[0] = shmat(segments[0], NULL, 0);
    areas[1] = shmat(segments[0], NULL, SHM_RDONLY);
    areas[2] = shmat(segments[1], NULL, 0);
    areas[3] = shmat(segments[0], NULL, 0);
    CHECK(areas[0] != (void *)-1 && areas[1] != (void *)-1 && areas[2] != (void *)-1, "shmat");
    CHECK(shmctl(segments[1], IPC_RMID, NULL) == 0, "rmid");
    fill(areas[0], MANY, 1);
    fill(areas[2], MANY, 2);
    CHECK(munmap(areas[3] + 8 * PAGE, 8 * PAGE) == 0, "munmap");
    CHECK(mprotect(areas[3] + 32 * PAGE, 8 * PAGE, PROT_READ) == 0, "mprotect");
    struct shmid_ds ds;
    CHECK(shmctl(segments[0], IPC_STAT, &ds) == 0, "stat");
    ds.shm_perm.uid = 12;
    ds.shm_perm.gid = 34;
    CHECK(shmctl(segments[0], IPC_SET, &ds) == 0, "set");
}
static void segment_often(void)
{
    areas[0][5 * PAGE]++;
    areas[2][6 * PAGE]++;
    CHECK(areas[1][5 * PAGE] == areas[0][5 * PAGE] && areas[3][5 * PAGE] == areas[0][5 * PAGE], "parted");
}
static void segment_fully(void)
{
    areas[0][5 * PAGE] = (char)(5 * 5 + 1);
    areas[2][6 * PAGE] = (char)(6 * 5 + 2);
    filled(areas[0], MANY, 1);
    filled(areas[1], MANY, 1);
    filled(areas[2], MANY, 2);
    struct shmid_ds ds;
    CHECK(shmctl(segments[0], IPC_STAT, &ds) == 0, "stat");
    /* Three attaches; one is in four pieces. */
    CHECK(ds.shm_nattch == 6 && ds.shm_segsz == MANY * PAGE - 1000, "attaches %lu", (unsigned long)ds.shm_nattch);
    CHECK(ds.shm_perm.uid == 12 && ds.shm_perm.gid == 34 && (ds.shm_perm.mode & 0777) == 0640, "permissions");
    CHECK(ds.shm_perm.cuid == 0 && ds.shm_perm.__key == IPC_PRIVATE, "creator, key");
    CHECK(shmctl(segments[1], IPC_STAT, &ds) == 0 && ds.shm_nattch == 1, "attaches");
    CHECK(ds.shm_perm.mode & SHM_DEST, "it will not be removed");
    CHECK(mprotect(areas[1], PAGE, PROT_READ | PROT_WRITE) == -1 && errno == EACCES, "can be written");
    /* All pieces are one attach still. */
    CHECK(shmdt(areas[3]) == 0 && shmctl(segments[0], IPC_STAT, &ds) == 0 && ds.shm_nattch == 2, "detach");
    CHECK(shmat(segments[0], areas[3], 0) == areas[3], "attach again");
    CHECK(munmap(areas[3] + 8 * PAGE, 8 * PAGE) == 0, "munmap");
    CHECK(mprotect(areas[3] + 32 * PAGE, 8 * PAGE, PROT_READ) == 0, "mprotect");
}

/* A segment with a key: by it, others find it. */
static void key_prepare(void)
{
    key_t key = 0x6d696772;
    segments[0] = shmget(key, MANY * PAGE, 0600 | IPC_CREAT | IPC_EXCL);
    areas[0] = shmat(segments[0], NULL, 0);
    CHECK(segments[0] >= 0 && areas[0] != (void *)-1, "shm");
    fill(areas[0], MANY, 1);
}
static void key_fully(void)
{
    filled(areas[0], MANY, 1);
    CHECK(shmget(0x6d696772, 0, 0) == segments[0], "key");
}

ZOO({"sysv_key", key_prepare, NULL, key_fully},
    {"memfd", memfd_prepare, memfd_often, memfd_fully},
    {"memfd_closed", closed_prepare, closed_often, closed_fully},
    {"memfd_sealed", sealed_prepare, sealed_often, sealed_fully},
    {"memfd_unmapped", unmapped_prepare, unmapped_often, unmapped_fully},
    {"memfd_behind", behind_prepare, NULL, behind_fully},
    {"memfd_tail", tail_prepare, NULL, tail_fully},
    {"sysv", segment_prepare, segment_often, segment_fully})
