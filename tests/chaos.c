/* Counts the system calls that change a directory. At one of them it kills the process, or lets it fail. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>
static char root[4096];
static long at, seen;
static int fault;
void fault_arm(const char *directory, long number, int error) {
    strncpy(root, directory, 4095);
    at = number; fault = error; seen = 0; }
long fault_seen(void) { return seen; }
/* Whether the call is to fail. A full disk stays full, for all that `grows`; other errors come once. */
static int hit(const char *path, int grows) {
    if (!root[0] || strncmp(path, root, strlen(root))) return 0;
    seen++;
    if (!at || seen < at || (seen > at && fault != ENOSPC) || (fault == ENOSPC && !grows)) return 0;
    errno = fault;
    return 1; }
static int hit_fd(int fd, const char *name, int grows) {
    char link[64], path[4096];
    if (name && name[0] == '/') return hit(name, grows);
    snprintf(link, 64, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, 4095);
    if (n < 0) return 0;
    path[n] = 0;
    return hit(path, grows); }
static void die(void) { kill(getpid(), SIGKILL); pause(); }
#define CALL(type, name, grows, found, parameters, arguments) \
type name parameters { \
    static type (*real) parameters; \
    if (!real) real = dlsym(RTLD_NEXT, #name); \
    if (found) { if (!fault) die(); return -1; } \
    return real arguments; }
/* half of the bytes are written first, as by a disk that fills up and by a kill in between */
ssize_t write(int fd, const void *bytes, size_t n) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "write");
    if (fd < 3 || !hit_fd(fd, 0, 1)) return real(fd, bytes, n);
    if (fault && (fault != ENOSPC || seen > at || n < 2)) return -1;
    ssize_t done = real(fd, bytes, n / 2);
    if (!fault) die();
    return done; }
CALL(int, fsync, 1, hit_fd(fd, 0, 0), (int fd), (fd))
CALL(int, mkdir, 1, hit(path, 1), (const char *path, mode_t mode), (path, mode))
CALL(int, rename, 1, hit(old, 1), (const char *old, const char *new), (old, new))
CALL(int, rmdir, 0, hit(path, 0), (const char *path), (path))
CALL(int, unlink, 0, hit(path, 0), (const char *path), (path))
CALL(int, unlinkat, 0, hit_fd(fd, path, 0), (int fd, const char *path, int flags), (fd, path, flags))
CALL(int, ftruncate64, 0, hit_fd(fd, 0, 0), (int fd, off_t n), (fd, n))
CALL(ssize_t, sendfile64, 1, hit_fd(to, 0, 1), (int to, int from, off_t *at, size_t n), (to, from, at, n))
int open64(const char *path, int flags, ...) {
    static int (*real)(const char *, int, ...);
    if (!real) real = dlsym(RTLD_NEXT, "open64");
    va_list list; va_start(list, flags); mode_t mode = va_arg(list, int); va_end(list);
    if ((flags & (O_WRONLY | O_RDWR)) && hit(path, 1)) { if (!fault) die(); return -1; }
    return real(path, flags, mode); }
