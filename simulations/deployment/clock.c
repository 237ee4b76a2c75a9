/* A wrong clock for one process and what it starts: `LD_PRELOAD`ed by weather.py, which compiles it.
 *
 * CLOCK_OFFSET_FILE names a file with seconds, which may be changed while the process runs. They are added to
 * what the clock on the wall says (CLOCK_REALTIME: Python's time.time, OpenSSL's time, SQLite's gettimeofday).
 * CLOCK_MONOTONIC is left alone, as by a real clock that is set. Waits until a time on the wall have the seconds
 * taken off again, for the kernel's clock is right: else a wait of a second in a process that is an hour ahead
 * lasted an hour (libfaketime's trouble). Times of files stay right; a waiting call does not notice a jump.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)
#define LATER 1000000000L /* seconds: a time since 1970, and not since this machine was started */

static long kernel(long number, long a, long b, long c, long d, long e, long f) {
    REAL(long, "syscall", long, ...);
    return real(number, a, b, c, d, e, f);
}

/* Seconds to add; the file is read again once a second. */
static long offset(void) {
    static long seconds, read_at = -1;
    struct timespec now;
    kernel(SYS_clock_gettime, CLOCK_MONOTONIC, (long)&now, 0, 0, 0, 0);
    if (now.tv_sec != __atomic_load_n(&read_at, __ATOMIC_RELAXED)) {
        __atomic_store_n(&read_at, now.tv_sec, __ATOMIC_RELAXED);
        const char *path = getenv("CLOCK_OFFSET_FILE");
        int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
        char text[32] = "";
        if (file >= 0) {
            if (read(file, text, sizeof text - 1) > 0) __atomic_store_n(&seconds, atol(text), __ATOMIC_RELAXED);
            close(file);
        }
    }
    return __atomic_load_n(&seconds, __ATOMIC_RELAXED);
}

static int on_the_wall(clockid_t clock) { return clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE; }

static const struct timespec *right(const struct timespec *until, struct timespec *copy) {
    if (!until || until->tv_sec < LATER) return until;
    *copy = *until;
    copy->tv_sec -= offset();
    return copy;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(int, "clock_gettime", clockid_t, struct timespec *);
    int status = real(clock, now);
    if (status == 0 && on_the_wall(clock)) now->tv_sec += offset();
    return status;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    REAL(int, "gettimeofday", struct timeval *, void *);
    int status = real(now, zone);
    if (status == 0) now->tv_sec += offset();
    return status;
}

time_t time(time_t *copy) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (copy) *copy = now.tv_sec;
    return now.tv_sec;
}

int timespec_get(struct timespec *now, int base) {
    return base == TIME_UTC && clock_gettime(CLOCK_REALTIME, now) == 0 ? base : 0;
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict until) {
    REAL(int, "sem_timedwait", sem_t *, const struct timespec *);
    struct timespec copy;
    return real(semaphore, right(until, &copy));
}

int pthread_cond_timedwait(
    pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex, const struct timespec *restrict until
) {
    REAL(int, "pthread_cond_timedwait", pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    struct timespec copy;
    return real(condition, mutex, right(until, &copy));
}

int pthread_cond_clockwait(
    pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex, clockid_t clock,
    const struct timespec *restrict until
) {
    REAL(int, "pthread_cond_clockwait", pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *);
    struct timespec copy;
    return real(condition, mutex, clock, on_the_wall(clock) ? right(until, &copy) : until);
}

int pthread_mutex_timedlock(pthread_mutex_t *restrict mutex, const struct timespec *restrict until) {
    REAL(int, "pthread_mutex_timedlock", pthread_mutex_t *, const struct timespec *);
    struct timespec copy;
    return real(mutex, right(until, &copy));
}

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *until, struct timespec *left) {
    REAL(int, "clock_nanosleep", clockid_t, int, const struct timespec *, struct timespec *);
    struct timespec copy;
    return real(clock, flags, on_the_wall(clock) && (flags & TIMER_ABSTIME) ? right(until, &copy) : until, left);
}

/* Abseil (in gRPC) waits by a futex of its own. */
long syscall(long number, ...) {
    va_list more;
    va_start(more, number);
    long a = va_arg(more, long), b = va_arg(more, long), c = va_arg(more, long);
    long d = va_arg(more, long), e = va_arg(more, long), f = va_arg(more, long);
    va_end(more);
    struct timespec copy;
    if (number == SYS_futex && (b & FUTEX_CLOCK_REALTIME) && (b & FUTEX_CMD_MASK) == FUTEX_WAIT_BITSET)
        d = (long)right((const struct timespec *)d, &copy);
    if (number == SYS_clock_gettime) return clock_gettime((clockid_t)a, (struct timespec *)b);
    return kernel(number, a, b, c, d, e, f);
}
