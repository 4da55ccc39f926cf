// Preloaded: a file system without locks. flock fails with FLOCK_ERROR, fcntl's locks with ENOLCK.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>

typedef int (*Fcntl)(int, int, ...);

int flock(int fd, int operation) {
  (void)fd;
  (void)operation;
  errno = FLOCK_ERROR;
  return -1;
}

static int without_locks(const char *name, int fd, int command, void *argument) {
  if (command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK || command == F_OFD_SETLKW) {
    errno = ENOLCK;
    return -1;
  }
  return ((Fcntl)dlsym(RTLD_NEXT, name))(fd, command, argument);
}

int fcntl(int fd, int command, ...) {
  va_list list;
  va_start(list, command);
  void *argument = va_arg(list, void *);
  va_end(list);
  return without_locks("fcntl", fd, command, argument);
}

int fcntl64(int fd, int command, ...) {
  va_list list;
  va_start(list, command);
  void *argument = va_arg(list, void *);
  va_end(list);
  return without_locks("fcntl64", fd, command, argument);
}
