/* Preloaded into a process under test: every call by which it changes a file below one directory passes through here.

   Two things are done with them, as the shared page (`struct control`, see shim.py) says while it is armed:
     - count them, and end with SIGKILL at the n-th: before the call, or with half of a write done;
     - record them, with the bytes written, so that the states that a power cut may leave can be made (cut.py).
   Syncs are not passed on: neither needs the disk to have anything.  */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define ROOT_BYTES 2048
#define FDS 4096 /* Of which it is remembered that they were opened with O_DSYNC. */

struct control {
  uint64_t armed, count, kill_at, whole_group;
  char root[ROOT_BYTES]; /* Only what is below it counts. */
  char log[ROOT_BYTES];  /* Where to record; empty: not at all. */
  pthread_mutex_t lock;
};

enum op { CREATE = 1, TRUNCATE, WRITE, SYNC, SYNC_DIRECTORY, RENAME, LINK, UNLINK, MKDIR, RMDIR, SYMLINK, MARK };

struct entry {
  uint32_t op, durable;
  uint64_t inode, offset, size;
  uint32_t one, other; /* Lengths of the paths that follow; then come `size` bytes. */
};

static struct control *control;
static char dsync[FDS];

__attribute__((constructor)) static void begin(void) {
  const char *path = getenv("CRASH_CONTROL");
  int fd = path ? (int)openat(AT_FDCWD, path, O_RDWR | O_CLOEXEC) : -1;
  if (fd < 0) return;
  void *page = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (page == MAP_FAILED) return;
  control = page;
}

uint64_t crash_control_size(void) { return sizeof(struct control); }

void crash_prepare(struct control *fresh) {
  pthread_mutexattr_t shared;
  pthread_mutexattr_init(&shared);
  pthread_mutexattr_setpshared(&shared, PTHREAD_PROCESS_SHARED);
  pthread_mutexattr_settype(&shared, PTHREAD_MUTEX_RECURSIVE);
  pthread_mutex_init(&fresh->lock, &shared);
}

static void *find(void *place, const char *name) { return *(void **)place = dlsym(RTLD_NEXT, name); }

#define REAL(name) (real_##name ? real_##name : (__typeof__(real_##name))find(&real_##name, #name))
#define DECLARE(type, name, ...) static type (*real_##name)(__VA_ARGS__)

/* Where things are */

static int below_root(const char *path) {
  size_t size = strlen(control->root);
  return control->armed && !strncmp(path, control->root, size) && (path[size] == '/' || !path[size]);
}

static int path_of(int fd, char *path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, path, PATH_MAX - 1);
  path[size < 0 ? 0 : size] = 0;
  return size > 0;
}

/* The whole path of a name; links in it are not followed: the root is given without any. */
static const char *absolute(int directory, const char *name, char *path) {
  if (name[0] == '/') return name;
  if (directory == AT_FDCWD ? !getcwd(path, PATH_MAX) : !path_of(directory, path)) path[0] = 0;
  size_t size = strlen(path);
  snprintf(path + size, PATH_MAX - size, "/%s", name);
  return path;
}

static int is_ours(int fd) {
  char path[PATH_MAX];
  return control && control->armed && path_of(fd, path) && below_root(path);
}

static uint64_t inode_of(int fd) {
  struct stat status;
  return fstat(fd, &status) ? 0 : status.st_ino;
}

/* Killing */

static int dies_now(void) {
  return control->kill_at && __atomic_add_fetch(&control->count, 1, __ATOMIC_SEQ_CST) == control->kill_at;
}

static void die(void) {
  kill(control->whole_group ? 0 : getpid(), SIGKILL);
  for (;;) pause();
}

static void step(void) {
  if (dies_now()) die();
}

/* A transaction of LMDB is what its last write makes it (that through O_DSYNC): the others are no steps of their own. */
static int is_page_of_lmdb(int fd) {
  char path[PATH_MAX];
  const char *end = "/data.mdb";
  size_t size;
  if (fd < FDS && dsync[fd]) return 0;
  if (!path_of(fd, path)) return 0;
  size = strlen(path);
  return size > strlen(end) && !strcmp(path + size - strlen(end), end);
}

/* Recording */

static int begin_call(void) {
  if (control->log[0]) pthread_mutex_lock(&control->lock);
  return 1;
}

static void end_call(void) {
  int kept = errno;
  if (control->log[0]) pthread_mutex_unlock(&control->lock);
  errno = kept;
}

static void record(struct entry e, const char *one, const char *other, const struct iovec *data, int parts) {
  if (!control->log[0]) return;
  int kept = errno, fd = open(control->log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
  struct iovec all[16] = {{&e, sizeof e}, {(void *)one, e.one = one ? strlen(one) : 0},
                          {(void *)other, e.other = other ? strlen(other) : 0}};
  if (fd < 0 || parts > 13) abort();
  memcpy(all + 3, data, parts * sizeof *data);
  ssize_t whole = sizeof e + e.one + e.other + e.size;
  if (writev(fd, all, 3 + parts) != whole) abort();
  close(fd);
  errno = kept;
}

static void record_names(enum op op, const char *one, const char *other) {
  record((struct entry){.op = op}, one, other, NULL, 0);
}

/* What a call wrote, as the file has it now. */
static void record_written(int fd, off_t offset, ssize_t size) {
  char link[64], *data;
  if (size <= 0 || !control->log[0]) return;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  int reading = open(link, O_RDONLY | O_CLOEXEC);
  if (reading < 0 || !(data = malloc(size)) || pread(reading, data, size, offset) != size) abort();
  struct iovec all = {data, size};
  record((struct entry){.op = WRITE, .durable = fd < FDS && dsync[fd], .inode = inode_of(fd), .offset = offset,
                        .size = size}, NULL, NULL, &all, 1);
  free(data);
  close(reading);
}

void crash_mark(const char *text) {
  if (control && control->armed && begin_call()) record_names(MARK, text, NULL), end_call();
}

/* Files */

DECLARE(int, openat, int, const char *, int, ...);

static int opened(int directory, const char *name, int flags, mode_t mode) {
  char path[PATH_MAX];
  if (!control || !control->armed || !below_root(absolute(directory, name, path)))
    return REAL(openat)(directory, name, flags, mode);
  const char *whole = absolute(directory, name, path);
  int fresh = flags & O_CREAT && faccessat(directory, name, F_OK, AT_SYMLINK_NOFOLLOW);
  int synced = (flags & O_DSYNC) != 0;
  if (fresh || flags & O_TRUNC) step();
  begin_call();
  int fd = REAL(openat)(directory, name, flags & ~(synced ? O_DSYNC : 0), mode);
  if (fd >= 0 && fresh) record((struct entry){.op = CREATE, .inode = inode_of(fd)}, whole, NULL, NULL, 0);
  else if (fd >= 0 && flags & O_TRUNC) record((struct entry){.op = TRUNCATE, .inode = inode_of(fd)}, NULL, NULL, NULL, 0);
  if (fd >= 0 && fd < FDS) dsync[fd] = synced;
  end_call();
  return fd;
}

#define OPEN(name, directory, ...)                                         \
  int name(__VA_ARGS__, int flags, ...) {                                  \
    mode_t mode = 0;                                                       \
    if (flags & (O_CREAT | __O_TMPFILE)) {                                 \
      va_list rest;                                                        \
      va_start(rest, flags);                                               \
      mode = va_arg(rest, mode_t);                                         \
      va_end(rest);                                                        \
    }                                                                      \
    return opened(directory, path, flags, mode);                           \
  }
OPEN(open, AT_FDCWD, const char *path)
OPEN(open64, AT_FDCWD, const char *path)
OPEN(openat, directory, int directory, const char *path)
OPEN(openat64, directory, int directory, const char *path)

DECLARE(int, close, int);
int close(int fd) {
  if (fd >= 0 && fd < FDS) dsync[fd] = 0;
  return REAL(close)(fd);
}

/* Writing: `half` writes half of it, in whole pages: a kill cuts no page in two. */
#define PAGE 4096
#define HALF(size) ((size) / 2 & -(size_t)PAGE)

#define WRITING(call, half, fd, at, bytes)                                  \
  if (!is_ours(fd)) return call;                                            \
  int counted = !is_page_of_lmdb(fd);                                       \
  if (counted) step();                                                      \
  if (counted && (bytes) > 2 * PAGE && dies_now()) {                               \
    if (half) die();                                                        \
    die();                                                                  \
  }                                                                         \
  begin_call();                                                             \
  off_t from = at;                                                          \
  ssize_t done = call;                                                      \
  record_written(fd, from, done);                                           \
  end_call();                                                               \
  return done

static off_t place_of(int fd) {
  struct stat status;
  if (fcntl(fd, F_GETFL) & O_APPEND && !fstat(fd, &status)) return status.st_size;
  return lseek(fd, 0, SEEK_CUR);
}

static size_t total(const struct iovec *parts, int count) {
  size_t size = 0;
  for (int i = 0; i < count; i++) size += parts[i].iov_len;
  return size;
}

DECLARE(ssize_t, write, int, const void *, size_t);
DECLARE(ssize_t, pwrite, int, const void *, size_t, off_t);
DECLARE(ssize_t, writev, int, const struct iovec *, int);
DECLARE(ssize_t, pwritev, int, const struct iovec *, int, off_t);
DECLARE(ssize_t, copy_file_range, int, off_t *, int, off_t *, size_t, unsigned);
DECLARE(ssize_t, sendfile, int, int, off_t *, size_t);

ssize_t write(int fd, const void *data, size_t size) {
  WRITING(REAL(write)(fd, data, size), REAL(write)(fd, data, HALF(size)), fd, place_of(fd), size);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
  WRITING(REAL(pwrite)(fd, data, size, at), REAL(pwrite)(fd, data, HALF(size), at), fd, at, size);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off_t at) { return pwrite(fd, data, size, at); }

ssize_t writev(int fd, const struct iovec *parts, int count) {
  WRITING(REAL(writev)(fd, parts, count), REAL(writev)(fd, parts, (count + 1) / 2), fd, place_of(fd), total(parts, count));
}

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at) {
  WRITING(REAL(pwritev)(fd, parts, count, at), REAL(pwritev)(fd, parts, (count + 1) / 2, at), fd, at, total(parts, count));
}

ssize_t pwritev64(int fd, const struct iovec *parts, int count, off_t at) { return pwritev(fd, parts, count, at); }

ssize_t copy_file_range(int in, off_t *from_at, int out, off_t *to_at, size_t size, unsigned flags) {
  WRITING(REAL(copy_file_range)(in, from_at, out, to_at, size, flags),
          REAL(copy_file_range)(in, from_at, out, to_at, HALF(size), flags), out, to_at ? *to_at : place_of(out), size);
}

ssize_t sendfile(int out, int in, off_t *from_at, size_t size) {
  WRITING(REAL(sendfile)(out, in, from_at, size), REAL(sendfile)(out, in, from_at, HALF(size)), out, place_of(out), size);
}

ssize_t sendfile64(int out, int in, off_t *from_at, size_t size) { return sendfile(out, in, from_at, size); }

DECLARE(int, ftruncate, int, off_t);
int ftruncate(int fd, off_t size) {
  if (!is_ours(fd)) return REAL(ftruncate)(fd, size);
  step();
  begin_call();
  int failed = REAL(ftruncate)(fd, size);
  if (!failed) record((struct entry){.op = TRUNCATE, .inode = inode_of(fd), .offset = size}, NULL, NULL, NULL, 0);
  end_call();
  return failed;
}

int ftruncate64(int fd, off_t size) { return ftruncate(fd, size); }

/* Syncs: a page of LMDB is on the disk once its sync was asked for. */

static int synced(int fd) {
  char path[PATH_MAX];
  struct stat status;
  if (!is_page_of_lmdb(fd)) step();
  begin_call();
  int failed = fstat(fd, &status);
  if (!failed && S_ISDIR(status.st_mode)) record_names(SYNC_DIRECTORY, path_of(fd, path) ? path : "", NULL);
  else if (!failed) record((struct entry){.op = SYNC, .inode = status.st_ino}, NULL, NULL, NULL, 0);
  end_call();
  return failed;
}

DECLARE(int, fsync, int);
int fsync(int fd) { return is_ours(fd) ? synced(fd) : REAL(fsync)(fd); }

DECLARE(int, fdatasync, int);
int fdatasync(int fd) { return is_ours(fd) ? synced(fd) : REAL(fdatasync)(fd); }

/* Names */

#define NAMING(call, op, at, name, other)                                                   \
  char first[PATH_MAX], second[PATH_MAX];                                                  \
  (void)second;                                                                            \
  if (!control || !control->armed || !below_root(absolute(at, name, first))) return call;  \
  step();                                                                                  \
  begin_call();                                                                            \
  int failed = call;                                                                       \
  if (!failed) record_names(op, absolute(at, name, first), other);                         \
  end_call();                                                                              \
  return failed

#define AND(at, name) absolute(at, name, second)

DECLARE(int, rename, const char *, const char *);
int rename(const char *from, const char *to) {
  NAMING(REAL(rename)(from, to), RENAME, AT_FDCWD, from, AND(AT_FDCWD, to));
}

DECLARE(int, renameat, int, const char *, int, const char *);
int renameat(int d, const char *from, int e, const char *to) {
  NAMING(REAL(renameat)(d, from, e, to), RENAME, d, from, AND(e, to));
}

DECLARE(int, renameat2, int, const char *, int, const char *, unsigned);
int renameat2(int d, const char *from, int e, const char *to, unsigned flags) {
  NAMING(REAL(renameat2)(d, from, e, to, flags), RENAME, d, from, AND(e, to));
}

DECLARE(int, link, const char *, const char *);
int link(const char *from, const char *to) { NAMING(REAL(link)(from, to), LINK, AT_FDCWD, from, AND(AT_FDCWD, to)); }

DECLARE(int, linkat, int, const char *, int, const char *, int);
int linkat(int d, const char *from, int e, const char *to, int flags) {
  NAMING(REAL(linkat)(d, from, e, to, flags), LINK, d, from, AND(e, to));
}

DECLARE(int, symlink, const char *, const char *);
int symlink(const char *target, const char *path) {
  NAMING(REAL(symlink)(target, path), SYMLINK, AT_FDCWD, path, target);
}

DECLARE(int, unlink, const char *);
int unlink(const char *path) { NAMING(REAL(unlink)(path), UNLINK, AT_FDCWD, path, NULL); }

DECLARE(int, unlinkat, int, const char *, int);
int unlinkat(int d, const char *path, int flags) {
  NAMING(REAL(unlinkat)(d, path, flags), flags & AT_REMOVEDIR ? RMDIR : UNLINK, d, path, NULL);
}

DECLARE(int, mkdir, const char *, mode_t);
int mkdir(const char *path, mode_t mode) { NAMING(REAL(mkdir)(path, mode), MKDIR, AT_FDCWD, path, NULL); }

DECLARE(int, rmdir, const char *);
int rmdir(const char *path) { NAMING(REAL(rmdir)(path), RMDIR, AT_FDCWD, path, NULL); }

/* Modes are no names, but a kill may come between. */
DECLARE(int, chmod, const char *, mode_t);
int chmod(const char *path, mode_t mode) {
  char whole[PATH_MAX];
  if (control && control->armed && below_root(absolute(AT_FDCWD, path, whole))) step();
  return REAL(chmod)(path, mode);
}

DECLARE(int, fchmod, int, mode_t);
int fchmod(int fd, mode_t mode) {
  if (is_ours(fd)) step();
  return REAL(fchmod)(fd, mode);
}

DECLARE(int, posix_fallocate, int, off_t, off_t);
int posix_fallocate(int fd, off_t at, off_t size) {
  struct stat status;
  if (!is_ours(fd)) return REAL(posix_fallocate)(fd, at, size);
  step();
  begin_call();
  int failed = REAL(posix_fallocate)(fd, at, size);
  if (!failed && !fstat(fd, &status))
    record((struct entry){.op = TRUNCATE, .inode = status.st_ino, .offset = status.st_size}, NULL, NULL, NULL, 0);
  end_call();
  return failed;
}

int posix_fallocate64(int fd, off_t at, off_t size) { return posix_fallocate(fd, at, size); }
