/* A stand-in for libnvidia-ml.so.1, for machines without a GPU.
 *
 *   gcc -shared -fPIC -O2 -Wl,-soname,libnvidia-ml.so.1 -o DIR/libnvidia-ml.so.1 fake_nvml.c -lm -lpthread
 *
 * The GPUs live in a file that every process maps (environment: FAKE_NVML_STATE), so that a lock
 * outlives the process that set it, as it does on a real GPU. Each GPU is an array of doubles in
 * the order of `enum field`; __init__.py beside this file names them in the same order. As with the real library,
 * a clock lock can be set and reset but not read; only the test, through the file, sees it.
 *
 * Power is by default that of an A800 in prefill (see docs/hardware.md):
 *   P(f) = idle + util * (scale * (static + dynamic g V2(g)) - idle),  g = f/1000,
 *   V2(g) = (1 + 0.71 max(0, g - 1.106))^2,  static 59.3 W, dynamic 197.3 W/GHz.
 * A power cap that binds lowers the clock until the power fits, and says so as an event reason.
 * By default a capped card draws at a clock what a locked one draws. With a gain G it draws less:
 *   P_capped(f) = P(f) - G (P(f_free) - P(f)),
 * as a regulator does that lowers the clock while the SMs wait for memory and not while they
 * compute; the work done is that of the clock reported.
 * An emulated engine knows better what it draws, and tells it (TOLD_W > 0).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum {
    SUCCESS = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4,
    NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, LIBRARY_NOT_FOUND = 12, GPU_IS_LOST = 15
};
enum field {
    UTIL_FRAC, IDLE_W, POWER_SCALE_FRAC, MIN_MHZ, MAX_MHZ, STEP_MHZ, MEM_MHZ, MEM_LOW_MHZ,
    CAP_W, CAP_DEFAULT_W, CAP_MIN_W, CAP_MAX_W, CAP_INERT, CLAMP_MHZ,
    LOCK_LO_MHZ, LOCK_HI_MHZ, MEM_LOCK_LO_MHZ, MEM_LOCK_HI_MHZ,
    LOST, DENY_PID, HANG_S, HANG_CALLS, SET_S, MIG, VIRTUALIZATION, NO_ENERGY, NO_REASONS,
    ENERGY_J, ENERGY_ZERO_J, LAST_S, SETS, UNSUPPORTED_SETS, HIGHEST_LOCK_MHZ, TEMPERATURE_C,
    STATIC_W, DYNAMIC_W, CAP_GAIN_FRAC, CAP_SETS, TOLD_W,
    N_FIELDS
};
enum { MAX_GPUS = 64, ROOM = 64 };
typedef struct { double v[ROOM]; char uuid[96], name[96]; } gpu_t;
typedef struct {
    uint64_t gpus;
    pthread_mutex_t state, driver;
    char pad[256 - 8 - 2 * sizeof(pthread_mutex_t)];
    gpu_t gpu[MAX_GPUS];
} state_t;

static state_t *S;
static char mapped[4096];
static int users;

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static void sleep_s(double s) {
    if (!(s > 0)) return;
    struct timespec t = { (time_t)s, (long)((s - floor(s)) * 1e9) };
    while (nanosleep(&t, &t) == -1 && errno == EINTR) { }
}
/* Robust: a process killed inside a call leaves the mutex to the next one. */
static void lock(pthread_mutex_t *m) { if (pthread_mutex_lock(m) == EOWNERDEAD) pthread_mutex_consistent(m); }
static void unlock(pthread_mutex_t *m) { pthread_mutex_unlock(m); }

static int attach(const char *path) {
    if (!path || !*path || strlen(path) >= sizeof mapped) return LIBRARY_NOT_FOUND;
    if (S && !strcmp(path, mapped)) return SUCCESS;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return LIBRARY_NOT_FOUND;
    void *p = mmap(NULL, sizeof(state_t), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (p == MAP_FAILED) return LIBRARY_NOT_FOUND;
    S = p;                                  /* the old one stays: a thread may still be in a call */
    strcpy(mapped, path);
    return SUCCESS;
}

static double watts(const gpu_t *d, double mhz) {
    const double g = mhz / 1000, x = 1 + 0.71 * fmax(0, g - 1.106);
    const double busy = d->v[POWER_SCALE_FRAC] * (d->v[STATIC_W] + d->v[DYNAMIC_W] * g * x * x);
    return d->v[IDLE_W] + d->v[UTIL_FRAC] * fmax(0, busy - d->v[IDLE_W]);
}
static double free_clock(const gpu_t *d) {
    const double *v = d->v;
    double f = v[LOCK_HI_MHZ] > 0 ? v[LOCK_HI_MHZ] : v[UTIL_FRAC] > 0 ? v[MAX_MHZ] : v[MIN_MHZ];
    if (v[CLAMP_MHZ] > 0) f = fmin(f, v[CLAMP_MHZ]);
    f = fmin(fmax(f, v[MIN_MHZ]), v[MAX_MHZ]);
    return v[MIN_MHZ] + floor((f - v[MIN_MHZ]) / v[STEP_MHZ]) * v[STEP_MHZ];
}
/* Power at a clock that a cap has brought down from the free one. */
static double capped_watts(const gpu_t *d, double mhz, double free_mhz) {
    const double saved = watts(d, free_mhz) - watts(d, mhz);
    return fmax(d->v[IDLE_W], watts(d, mhz) - d->v[CAP_GAIN_FRAC] * saved);
}
static double clock_mhz(const gpu_t *d) {
    const double free_mhz = free_clock(d);
    double f = free_mhz;
    while (!d->v[CAP_INERT] && f > d->v[MIN_MHZ] && capped_watts(d, f, free_mhz) > d->v[CAP_W])
        f -= d->v[STEP_MHZ];
    return f;
}
static double watts_now(const gpu_t *d) {
    if (d->v[TOLD_W] > 0) return d->v[TOLD_W];
    return capped_watts(d, clock_mhz(d), free_clock(d));
}
static void integrate(gpu_t *d) {
    const double t = now_s();
    if (d->v[LAST_S] > 0) d->v[ENERGY_J] += watts_now(d) * (t - d->v[LAST_S]);
    d->v[LAST_S] = t;
}
static int supported(const gpu_t *d, double mhz) {
    const double k = (mhz - d->v[MIN_MHZ]) / d->v[STEP_MHZ];
    return mhz >= d->v[MIN_MHZ] && mhz <= d->v[MAX_MHZ] && k == floor(k);
}

/* ---- for the test ---- */

int fakeNvmlCreate(const char *path, unsigned gpus) {
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) return LIBRARY_NOT_FOUND;
    fchmod(fd, 0666);                       /* other users' processes share the GPUs */
    const int bad = ftruncate(fd, sizeof(state_t));
    close(fd);
    mapped[0] = 0;                          /* an earlier file of that name is another machine */
    if (bad || attach(path)) return LIBRARY_NOT_FOUND;
    pthread_mutexattr_t a;
    pthread_mutexattr_init(&a);
    pthread_mutexattr_setpshared(&a, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&a, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&S->state, &a);
    pthread_mutex_init(&S->driver, &a);
    S->gpus = gpus < MAX_GPUS ? gpus : MAX_GPUS;
    return SUCCESS;
}
int fakeNvmlPut(unsigned i, unsigned field, double value) {
    if (!S || i >= S->gpus || field >= N_FIELDS) return INVALID;
    lock(&S->state);
    integrate(&S->gpu[i]);
    S->gpu[i].v[field] = value;
    unlock(&S->state);
    return SUCCESS;
}
double fakeNvmlGet(unsigned i, unsigned field) {
    if (!S || i >= S->gpus || field >= N_FIELDS) return NAN;
    lock(&S->state);
    integrate(&S->gpu[i]);
    const double value = S->gpu[i].v[field];
    unlock(&S->state);
    return value;
}
double fakeNvmlClock(unsigned i) {
    if (!S || i >= S->gpus) return NAN;
    lock(&S->state);
    const double mhz = clock_mhz(&S->gpu[i]);
    unlock(&S->state);
    return mhz;
}
int fakeNvmlName(unsigned i, const char *uuid, const char *name) {
    if (!S || i >= S->gpus) return INVALID;
    snprintf(S->gpu[i].uuid, sizeof S->gpu[i].uuid, "%s", uuid);
    snprintf(S->gpu[i].name, sizeof S->gpu[i].name, "%s", name);
    return SUCCESS;
}

/* ---- as NVML ---- */

static int enter(gpu_t *d) {                /* checks, hangs, then holds the state */
    if (!users) return UNINITIALIZED;
    if (d < S->gpu || d >= S->gpu + S->gpus) return INVALID;
    double hang_s = 0;
    lock(&S->state);
    if (d->v[HANG_CALLS] > 0) { d->v[HANG_CALLS] -= 1; hang_s = d->v[HANG_S]; }
    if (hang_s > 0) {
        unlock(&S->state);
        sleep_s(hang_s);
        lock(&S->state);
    }
    if (d->v[LOST]) { unlock(&S->state); return GPU_IS_LOST; }
    integrate(d);
    return SUCCESS;
}
#define GET(d, body) do { int e_ = enter(d); if (e_) return e_; int r_ = SUCCESS; { body } unlock(&S->state); return r_; } while (0)
/* Setters of one machine follow one another, each as long as the slowest driver call. */
static int begin_set(gpu_t *d) {
    if (!users) return UNINITIALIZED;
    if (d < S->gpu || d >= S->gpu + S->gpus) return INVALID;
    lock(&S->driver);
    sleep_s(d->v[SET_S]);
    unlock(&S->driver);
    const int e = enter(d);
    if (e) return e;
    if (d->v[DENY_PID] < 0 || d->v[DENY_PID] == (double)getpid()) { unlock(&S->state); return NO_PERMISSION; }
    return SUCCESS;
}
#define SET(d, body) do { int e_ = begin_set(d); if (e_) return e_; int r_ = SUCCESS; { body } unlock(&S->state); return r_; } while (0)

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    const int e = attach(getenv("FAKE_NVML_STATE"));
    if (!e) users++;
    return e;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { if (!users) return UNINITIALIZED; users--; return SUCCESS; }
const char *nvmlErrorString(int r) {
    switch (r) {
    case SUCCESS: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NO_PERMISSION: return "Insufficient Permissions";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case GPU_IS_LOST: return "GPU is lost";
    default: return "Unknown Error";
    }
}
int nvmlSystemGetDriverVersion(char *b, unsigned n) { if (!users) return UNINITIALIZED; snprintf(b, n, "fake"); return SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned *n) { if (!users) return UNINITIALIZED; *n = (unsigned)S->gpus; return SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, gpu_t **h) {
    if (!users) return UNINITIALIZED;
    if (i >= S->gpus) return INVALID;
    *h = &S->gpu[i];
    return SUCCESS;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, gpu_t **h) {
    if (!users) return UNINITIALIZED;
    for (unsigned i = 0; i < S->gpus; i++)
        if (!strcmp(uuid, S->gpu[i].uuid)) { *h = &S->gpu[i]; return SUCCESS; }
    return NOT_FOUND;
}
int nvmlDeviceGetIndex(gpu_t *d, unsigned *i) { GET(d, *i = (unsigned)(d - S->gpu);); }
int nvmlDeviceGetUUID(gpu_t *d, char *b, unsigned n) { GET(d, snprintf(b, n, "%s", d->uuid);); }
int nvmlDeviceGetName(gpu_t *d, char *b, unsigned n) { GET(d, snprintf(b, n, "%s", d->name);); }
int nvmlDeviceGetMigMode(gpu_t *d, unsigned *now, unsigned *next) { GET(d, *now = *next = d->v[MIG] != 0;); }
int nvmlDeviceGetVirtualizationMode(gpu_t *d, unsigned *m) { GET(d, *m = (unsigned)d->v[VIRTUALIZATION];); }
int nvmlDeviceGetPersistenceMode(gpu_t *d, unsigned *m) { GET(d, *m = 1;); }
int nvmlDeviceGetTemperature(gpu_t *d, unsigned sensor, unsigned *c) { (void)sensor; GET(d, *c = (unsigned)d->v[TEMPERATURE_C];); }
int nvmlDeviceGetUtilizationRates(gpu_t *d, unsigned *u) { GET(d, u[0] = u[1] = (unsigned)lround(100 * d->v[UTIL_FRAC]);); }
int nvmlDeviceGetSupportedMemoryClocks(gpu_t *d, unsigned *n, unsigned *c) {
    GET(d,
        const unsigned room = *n;
        *n = 2;
        if (room < 2 || !c) r_ = INSUFFICIENT_SIZE;
        else { c[0] = (unsigned)d->v[MEM_MHZ]; c[1] = (unsigned)d->v[MEM_LOW_MHZ]; });
}
int nvmlDeviceGetSupportedGraphicsClocks(gpu_t *d, unsigned mem, unsigned *n, unsigned *c) {
    GET(d,
        const unsigned room = *n;
        const unsigned k = (unsigned)((d->v[MAX_MHZ] - d->v[MIN_MHZ]) / d->v[STEP_MHZ]) + 1;
        if (mem != d->v[MEM_MHZ] && mem != d->v[MEM_LOW_MHZ]) r_ = INVALID;
        else {
            *n = k;
            if (room < k || !c) r_ = INSUFFICIENT_SIZE;
            else for (unsigned i = 0; i < k; i++)       /* descending, as the driver lists them */
                c[i] = (unsigned)(d->v[MIN_MHZ] + (k - 1 - i) * d->v[STEP_MHZ]);
        });
}
int nvmlDeviceGetMaxClockInfo(gpu_t *d, int type, unsigned *c) { GET(d, *c = (unsigned)d->v[type == 2 ? MEM_MHZ : MAX_MHZ];); }
int nvmlDeviceGetClockInfo(gpu_t *d, int type, unsigned *c) {
    GET(d,
        const double mem = d->v[MEM_LOCK_HI_MHZ] > 0 ? d->v[MEM_LOCK_HI_MHZ] : d->v[MEM_MHZ];
        *c = (unsigned)(type == 2 ? mem : clock_mhz(d)););
}
int nvmlDeviceGetPowerUsage(gpu_t *d, unsigned *mw) { GET(d, *mw = (unsigned)(1e3 * watts_now(d));); }
int nvmlDeviceGetTotalEnergyConsumption(gpu_t *d, unsigned long long *mj) {
    GET(d,
        if (d->v[NO_ENERGY]) r_ = NOT_SUPPORTED;
        else *mj = (unsigned long long)(1e3 * fmax(0, d->v[ENERGY_J] - d->v[ENERGY_ZERO_J])););
}
int nvmlDeviceGetCurrentClocksEventReasons(gpu_t *d, unsigned long long *r) {
    GET(d,
        if (d->v[NO_REASONS]) r_ = NOT_SUPPORTED;
        else *r = (d->v[UTIL_FRAC] > 0 ? 0ULL : 1ULL) | (clock_mhz(d) < free_clock(d) ? 4ULL : 0ULL););
}
int nvmlDeviceGetPowerManagementLimit(gpu_t *d, unsigned *mw) { GET(d, *mw = (unsigned)(1e3 * d->v[CAP_W]);); }
int nvmlDeviceGetPowerManagementDefaultLimit(gpu_t *d, unsigned *mw) { GET(d, *mw = (unsigned)(1e3 * d->v[CAP_DEFAULT_W]);); }
int nvmlDeviceGetPowerManagementLimitConstraints(gpu_t *d, unsigned *lo, unsigned *hi) {
    GET(d, *lo = (unsigned)(1e3 * d->v[CAP_MIN_W]); *hi = (unsigned)(1e3 * d->v[CAP_MAX_W]););
}
int nvmlDeviceSetPowerManagementLimit(gpu_t *d, unsigned mw) {
    SET(d,
        if (mw < 1e3 * d->v[CAP_MIN_W] || mw > 1e3 * d->v[CAP_MAX_W]) r_ = INVALID;
        else { d->v[CAP_W] = mw / 1e3; d->v[SETS] += 1; d->v[CAP_SETS] += 1; });
}
int nvmlDeviceSetGpuLockedClocks(gpu_t *d, unsigned lo, unsigned hi) {
    SET(d,
        if (lo > hi) r_ = INVALID;
        else {
            if (!supported(d, lo) || !supported(d, hi)) d->v[UNSUPPORTED_SETS] += 1;
            d->v[LOCK_LO_MHZ] = lo;
            d->v[LOCK_HI_MHZ] = hi;
            d->v[HIGHEST_LOCK_MHZ] = fmax(d->v[HIGHEST_LOCK_MHZ], hi);
            d->v[SETS] += 1;
        });
}
int nvmlDeviceResetGpuLockedClocks(gpu_t *d) { SET(d, d->v[LOCK_LO_MHZ] = d->v[LOCK_HI_MHZ] = 0; d->v[SETS] += 1;); }
int nvmlDeviceSetMemoryLockedClocks(gpu_t *d, unsigned lo, unsigned hi) {
    SET(d, if (lo > hi) r_ = INVALID; else { d->v[MEM_LOCK_LO_MHZ] = lo; d->v[MEM_LOCK_HI_MHZ] = hi; d->v[SETS] += 1; });
}
int nvmlDeviceResetMemoryLockedClocks(gpu_t *d) { SET(d, d->v[MEM_LOCK_LO_MHZ] = d->v[MEM_LOCK_HI_MHZ] = 0; d->v[SETS] += 1;); }
