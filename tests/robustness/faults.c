/* Calls of the system that fail on demand, preloaded under a real program.
 *
 * Only calls on files below one folder count, so that Python's own imports do not. The call number
 * FAULT_AT, from 0, fails once with an error; or, with the error 0, it is short: half is read or
 * written. fault_arm() starts counting; fault_count() tells how many calls there were, and
 * fault_name() which one failed.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define DESCRIPTORS 4096

static char root[PATH_MAX];
static size_t root_length;
static long fail_at = -1, count;
static int failing;
static const char *failed = "";
static unsigned char watched[DESCRIPTORS];

void fault_arm(const char *folder, long at, int error) {
    snprintf(root, sizeof root, "%s", folder);
    root_length = strlen(root);
    fail_at = at;
    failing = error;
    failed = "";
    __atomic_store_n(&count, 0, __ATOMIC_SEQ_CST);
}

long fault_count(void) { return __atomic_load_n(&count, __ATOMIC_SEQ_CST); }
const char *fault_name(void) { return failed; }

static int below(int at, const char *path) {
    if (!root_length || !path) return 0;
    if (path[0] == '/') return strncmp(path, root, root_length) == 0;
    if (at >= 0 && at < DESCRIPTORS) return watched[at];
    char here[PATH_MAX];
    return at == AT_FDCWD && getcwd(here, sizeof here) && !strncmp(here, root, root_length);
}

static int is_watched(int fd) {
    return root_length && fd >= 0 && fd < DESCRIPTORS && watched[fd];
}

/* Whether this call is the one that fails. */
static int fails(int counts, const char *name) {
    if (!counts) return 0;
    if (__atomic_fetch_add(&count, 1, __ATOMIC_SEQ_CST) != fail_at) return 0;
    failed = name;
    return 1;
}

#define REAL(result, name, ...)                          \
    static result (*real)(__VA_ARGS__);                  \
    if (!real) real = (result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

/* A call that moves n bytes, and may move half of them. */
#define MOVES(name, type, parameters, arguments, half, fd, n)                    \
    type name parameters {                                                       \
        REAL(type, #name, TYPES_##name);                                         \
        if (fails(is_watched(fd), #name)) {                                      \
            if (failing) { errno = failing; return -1; }                         \
            if ((n) > 1) return real half;                                       \
        }                                                                        \
        return real arguments;                                                   \
    }

#define TYPES_read int, void *, size_t
MOVES(read, ssize_t, (int fd, void *at, size_t n), (fd, at, n), (fd, at, n / 2), fd, n)
#define TYPES_write int, const void *, size_t
MOVES(write, ssize_t, (int fd, const void *at, size_t n), (fd, at, n), (fd, at, n / 2), fd, n)
#define TYPES_pread64 int, void *, size_t, off64_t
MOVES(pread64, ssize_t, (int fd, void *at, size_t n, off64_t o), (fd, at, n, o),
      (fd, at, n / 2, o), fd, n)
#define TYPES_pwrite64 int, const void *, size_t, off64_t
MOVES(pwrite64, ssize_t, (int fd, const void *at, size_t n, off64_t o), (fd, at, n, o),
      (fd, at, n / 2, o), fd, n)
#define TYPES_copy_file_range int, off64_t *, int, off64_t *, size_t, unsigned
MOVES(copy_file_range, ssize_t,
      (int from, off64_t *a, int to, off64_t *b, size_t n, unsigned f), (from, a, to, b, n, f),
      (from, a, to, b, n / 2, f), to, n)
#define TYPES_sendfile64 int, int, off64_t *, size_t
MOVES(sendfile64, ssize_t, (int to, int from, off64_t *o, size_t n), (to, from, o, n),
      (to, from, o, n / 2), to, n)

/* Vectors: half of them, in one piece at least. */
#define VECTORS(name, type, parameters, arguments, half)                         \
    ssize_t name parameters {                                                    \
        REAL(ssize_t, #name, TYPES_##name);                                      \
        if (fails(is_watched(fd), #name)) {                                      \
            if (failing) { errno = failing; return -1; }                         \
            struct iovec first = v[0];                                           \
            if (n == 1 && first.iov_len > 1) first.iov_len /= 2;                 \
            return real half;                                                    \
        }                                                                        \
        return real arguments;                                                   \
    }
#define TYPES_preadv64v2 int, const struct iovec *, int, off64_t, int
VECTORS(preadv64v2, ssize_t, (int fd, const struct iovec *v, int n, off64_t o, int f),
        (fd, v, n, o, f), (fd, &first, 1, o, f))
#define TYPES_pwritev64v2 int, const struct iovec *, int, off64_t, int
VECTORS(pwritev64v2, ssize_t, (int fd, const struct iovec *v, int n, off64_t o, int f),
        (fd, v, n, o, f), (fd, &first, 1, o, f))
#define TYPES_readv int, const struct iovec *, int
VECTORS(readv, ssize_t, (int fd, const struct iovec *v, int n), (fd, v, n), (fd, &first, 1))
#define TYPES_writev int, const struct iovec *, int
VECTORS(writev, ssize_t, (int fd, const struct iovec *v, int n), (fd, v, n), (fd, &first, 1))

/* A call that is done or not; a short one is not short here. */
#define DOES(name, parameters, arguments, counts)                                \
    int name parameters {                                                        \
        REAL(int, #name, TYPES_##name);                                          \
        if (fails(counts, #name) && failing) { errno = failing; return -1; }     \
        return real arguments;                                                   \
    }
#define TYPES_fsync int
DOES(fsync, (int fd), (fd), is_watched(fd))
#define TYPES_fdatasync int
DOES(fdatasync, (int fd), (fd), is_watched(fd))
#define TYPES_ftruncate64 int, off64_t
DOES(ftruncate64, (int fd, off64_t n), (fd, n), is_watched(fd))
#define TYPES_fchmod int, mode_t
DOES(fchmod, (int fd, mode_t m), (fd, m), is_watched(fd))
#define TYPES_chmod const char *, mode_t
DOES(chmod, (const char *p, mode_t m), (p, m), below(AT_FDCWD, p))
#define TYPES_mkdir const char *, mode_t
DOES(mkdir, (const char *p, mode_t m), (p, m), below(AT_FDCWD, p))
#define TYPES_rename const char *, const char *
DOES(rename, (const char *a, const char *b), (a, b), below(AT_FDCWD, b))
#define TYPES_renameat2 int, const char *, int, const char *, unsigned
DOES(renameat2, (int x, const char *a, int y, const char *b, unsigned f), (x, a, y, b, f),
     below(y, b))
#define TYPES_link const char *, const char *
DOES(link, (const char *a, const char *b), (a, b), below(AT_FDCWD, b))
#define TYPES_linkat int, const char *, int, const char *, int
DOES(linkat, (int x, const char *a, int y, const char *b, int f), (x, a, y, b, f), below(y, b))
#define TYPES_unlink const char *
DOES(unlink, (const char *p), (p), below(AT_FDCWD, p))
#define TYPES_unlinkat int, const char *, int
DOES(unlinkat, (int x, const char *p, int f), (x, p, f), below(x, p))
#define TYPES_rmdir const char *
DOES(rmdir, (const char *p), (p), below(AT_FDCWD, p))

/* This one returns its error. */
int posix_fallocate64(int fd, off64_t from, off64_t n) {
    REAL(int, "posix_fallocate64", int, off64_t, off64_t);
    if (fails(is_watched(fd), "posix_fallocate64") && failing) return failing;
    return real(fd, from, n);
}

static int opened(int fd, int counts) {
    if (fd >= 0 && fd < DESCRIPTORS) watched[fd] = (unsigned char)counts;
    return fd;
}

#define MODE(flags)                                                              \
    mode_t mode = 0;                                                             \
    if ((flags) & (O_CREAT | __O_TMPFILE)) {                                     \
        va_list more;                                                            \
        va_start(more, flags);                                                   \
        mode = va_arg(more, mode_t);                                             \
        va_end(more);                                                            \
    }

int open64(const char *path, int flags, ...) {
    REAL(int, "open64", const char *, int, ...);
    MODE(flags)
    int counts = below(AT_FDCWD, path);
    if (fails(counts, "open") && failing) { errno = failing; return -1; }
    return opened(real(path, flags, mode), counts);
}

int openat64(int at, const char *path, int flags, ...) {
    REAL(int, "openat64", int, const char *, int, ...);
    MODE(flags)
    int counts = below(at, path);
    if (fails(counts, "openat") && failing) { errno = failing; return -1; }
    return opened(real(at, path, flags, mode), counts);
}

int close(int fd) {
    REAL(int, "close", int);
    if (fd >= 0 && fd < DESCRIPTORS) watched[fd] = 0;
    return real(fd);
}
