/* What compiled code calls back for: parallel loops, barriers, workspaces; and the loop of a measurement.
 *
 * Built where the server has a compiler; rpcnb/runtime/backend.py has the same in Python, 30 times slower.
 * Source: TVM's c_backend_api.h (TVMBackend*, TVMParallelGroupEnv), apache-tvm-ffi's c_api.h (TVMFFIAny).
 */
#ifdef __linux__
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__) || defined(__i386__)
#define RELAX() __builtin_ia32_pause()
#elif defined(__aarch64__) || defined(__arm__)
#define RELAX() __asm__ __volatile__("yield" ::: "memory")
#else
#define RELAX() atomic_signal_fence(memory_order_seq_cst)
#endif

#if defined(__x86_64__)
#define PUSH_OUT(line) __builtin_ia32_clflush(line)
#elif defined(__aarch64__)
#define PUSH_OUT(line) __asm__ __volatile__("dc civac, %0" ::"r"(line) : "memory")
#endif

#define MOST 256              /* threads */
#define SPINS 20000           /* looks before a thread sleeps: the next launch of a loop comes within that time */
#define SOON 256              /* looks before the launching thread asks whether a worker waits for its CPU */
#define YIELD 2048            /* looks before a thread offers its CPU: the one it waits for may need that */
#define KEPT 4                /* workspaces that a thread keeps */
#define KEPT_BYTES (64 << 20) /* of all of them */

typedef struct {
  void* sync_handle;
  int32_t num_task;
} group_env;
typedef int (*task_function)(int task, group_env* env, void* closure);
typedef void (*raise_function)(const char* kind, const char* message);

typedef struct {
  _Alignas(64) atomic_uint ticket; /* counts the launches that this thread takes part in */
  atomic_uint done;                /* the last one that it has ended */
  atomic_int cpu;                  /* where it ran last; -1: not known */
  int avoids;                      /* where it does not run; -1: anywhere */
  int index;
  pthread_t thread;
} worker;

static pthread_mutex_t launching = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t sleeping = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t woken = PTHREAD_COND_INITIALIZER;
static atomic_int sleepers;
static worker workers[MOST];
static int started = 1; /* the launching thread is the first */
static int wanted = 1;
static pid_t owner;
static raise_function raise_error;

static task_function run;
static void* closure;
static group_env env;
static atomic_int left, failed;
static atomic_int arrived;
static atomic_uint phase;
static _Thread_local int inside;

/* Look again in a moment; `looks` are those before. */
static inline void wait_a_little(int looks) {
  if (looks % YIELD == YIELD - 1) sched_yield();
  else RELAX();
}

static inline int this_cpu(void) {
#ifdef __linux__
  return sched_getcpu();
#else
  return -1;
#endif
}

/* Have a worker run elsewhere than on the launching thread's CPU: it would wait there until the system moves it, which
 * takes milliseconds. It may run where the launching thread may, but for this CPU. */
static void send_away(worker* one, int here) {
#ifdef __linux__
  cpu_set_t allowed;
  if (one->avoids == here || sched_getaffinity(0, sizeof allowed, &allowed)) return;
  CPU_CLR(here, &allowed);
  if (CPU_COUNT(&allowed) && !pthread_setaffinity_np(one->thread, sizeof allowed, &allowed)) one->avoids = here;
#else
  (void)one, (void)here;
#endif
}

/* Send those workers away that have not ended their tasks yet. */
static void send_late_ones_away(int count) {
  int here = this_cpu();
  for (int index = 1; index < count && here >= 0; index++) {
    worker* one = &workers[index];
    if (atomic_load(&one->done) != atomic_load(&one->ticket)) send_away(one, here);
  }
}

static void* serve(void* argument) {
  worker* self = argument;
  unsigned seen = 0;
  inside = 1;
  for (;;) {
    int spins = 0;
    while (atomic_load(&self->ticket) == seen) {
      if (++spins < SPINS) {
        wait_a_little(spins);
        continue;
      }
      pthread_mutex_lock(&sleeping);
      atomic_fetch_add(&sleepers, 1);
      while (atomic_load(&self->ticket) == seen) pthread_cond_wait(&woken, &sleeping);
      atomic_fetch_sub(&sleepers, 1);
      pthread_mutex_unlock(&sleeping);
    }
    seen = atomic_load(&self->ticket);
    atomic_store(&self->cpu, this_cpu());
    if (run(self->index, &env, closure) != 0) atomic_store(&failed, 1);
    atomic_store(&self->done, seen);
    atomic_fetch_sub(&left, 1);
  }
  return NULL;
}

/* Have so many threads, the caller's included; returns how many there are. */
static int have(int count) {
  if (owner != getpid()) { /* a forked child has none of its parent's */
    owner = getpid();
    started = 1;
    atomic_store(&sleepers, 0);
    pthread_mutex_init(&sleeping, NULL);
    pthread_cond_init(&woken, NULL);
  }
  while (started < count) {
    worker* one = &workers[started];
    pthread_attr_t attributes;
    atomic_store(&one->ticket, 0);
    atomic_store(&one->done, 0);
    atomic_store(&one->cpu, -1);
    one->avoids = -1;
    one->index = started;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    int refused = pthread_create(&one->thread, &attributes, serve, one);
    pthread_attr_destroy(&attributes);
    if (refused) break;
    started++;
  }
  return started;
}

static int in_turn(task_function function, void* data, int count) {
  group_env alone = {NULL, count};
  int worst = 0, before = inside;
  inside = 1;
  for (int task = 0; task < count; task++) worst |= function(task, &alone, data);
  inside = before;
  return worst;
}

/* Run `count` tasks, 0: one per thread; launches inside of one, and of more tasks than threads, run in turn. */
int TVMBackendParallelLaunch(task_function function, void* data, int count) {
  if (count == 0) count = wanted;
  if (count == 1 || inside || count > wanted) return in_turn(function, data, count);
  pthread_mutex_lock(&launching);
  if (have(count) < count) {
    pthread_mutex_unlock(&launching);
    return in_turn(function, data, count);
  }
  run = function;
  closure = data;
  env.sync_handle = &phase;
  env.num_task = count;
  atomic_store(&failed, 0);
  atomic_store(&arrived, 0);
  atomic_store(&left, count - 1);
  int here = this_cpu();
  for (int index = 1; index < count; index++) {
    worker* one = &workers[index];
    if (here >= 0 && atomic_load(&one->cpu) == here) send_away(one, here);
    atomic_fetch_add(&one->ticket, 1);
  }
  if (atomic_load(&sleepers)) {
    pthread_mutex_lock(&sleeping);
    pthread_cond_broadcast(&woken);
    pthread_mutex_unlock(&sleeping);
  }
  inside = 1;
  int result = function(0, &env, data);
  inside = 0;
  for (int looks = 0; atomic_load(&left); looks++) {
    if (looks == SOON) send_late_ones_away(count);
    wait_a_little(looks);
  }
  int others = atomic_load(&failed);
  pthread_mutex_unlock(&launching);
  if (result == 0 && others) {
    raise_error("RuntimeError", "a task of a parallel loop has failed");
    return -1;
  }
  return result;
}

int TVMBackendParallelBarrier(int task, group_env* of) {
  if (of->sync_handle == NULL) return 0; /* its tasks run in turn */
  unsigned now = atomic_load(&phase);
  if (atomic_fetch_add(&arrived, 1) == of->num_task - 1) {
    atomic_store(&arrived, 0);
    atomic_fetch_add(&phase, 1);
    return 0;
  }
  for (int looks = 0; atomic_load(&phase) == now; looks++) {
    if (looks == SOON && task == 0) send_late_ones_away(of->num_task);
    wait_a_little(looks);
  }
  return 0;
}

/* Workspaces: 64 bytes before each have its size. A thread keeps those that it freed last. */
typedef struct {
  char* blocks[KEPT];
  size_t bytes;
  int oldest; /* gives way where all places are taken */
} shelf;
static _Thread_local shelf kept;
static pthread_key_t at_end;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static size_t size_of(char* block) { return *(size_t*)(block - 64); }

static void empty(void* argument) {
  shelf* one = argument;
  for (int i = 0; i < KEPT; i++)
    if (one->blocks[i]) free(one->blocks[i] - 64);
  memset(one, 0, sizeof *one);
}

static void make_key(void) { pthread_key_create(&at_end, empty); }

void* TVMBackendAllocWorkspace(int device_type, int device, uint64_t nbytes, int code, int bits) {
  (void)device, (void)code, (void)bits;
  if (device_type != 1 || nbytes > SIZE_MAX / 2) return NULL;
  for (int i = 0; i < KEPT; i++) {
    char* block = kept.blocks[i];
    if (block && size_of(block) >= nbytes && size_of(block) / 2 <= nbytes) {
      kept.blocks[i] = NULL;
      kept.bytes -= size_of(block);
      return block;
    }
  }
  void* made = NULL;
  if (posix_memalign(&made, 64, (size_t)nbytes + 64)) return NULL;
  *(size_t*)made = (size_t)nbytes;
  return (char*)made + 64;
}

int TVMBackendFreeWorkspace(int device_type, int device, void* pointer) {
  (void)device_type, (void)device;
  char* block = pointer;
  if (!block) return 0;
  pthread_once(&once, make_key);
  pthread_setspecific(at_end, &kept);
  int place = 0;
  while (place < KEPT && kept.blocks[place]) place++;
  if (place == KEPT) {
    place = kept.oldest;
    kept.oldest = (kept.oldest + 1) % KEPT;
    kept.bytes -= size_of(kept.blocks[place]);
    free(kept.blocks[place] - 64);
    kept.blocks[place] = NULL;
  }
  if (kept.bytes + size_of(block) > KEPT_BYTES) {
    free(block - 64);
    return 0;
  }
  kept.blocks[place] = block;
  kept.bytes += size_of(block);
  return 0;
}

/* -- for rpcnb ------------------------------------------------------------------------------------------------- */

void rpcnb_configure(int threads, raise_function raise) {
  wanted = threads < 1 ? 1 : threads > MOST ? MOST : threads;
  raise_error = raise;
}

int rpcnb_threads(void) { return wanted; }

/* Push memory out of the processor's caches; returns 0 on processors that know no way. */
int rpcnb_flush(const char* start, size_t nbytes) {
#ifdef PUSH_OUT
  for (uintptr_t line = (uintptr_t)start & ~(uintptr_t)63; line < (uintptr_t)start + nbytes; line += 64)
    PUSH_OUT((const void*)line);
  __sync_synchronize();
  return 1;
#else
  (void)start, (void)nbytes;
  return 0;
#endif
}

typedef struct {
  int32_t type_index;
  uint32_t padding;
  union {
    int64_t number;
    void* object;
  };
} any;
typedef int (*call_function)(void* function, any* arguments, int32_t count, any* result);

/* Call `number` times; returns how often that went well, and the seconds of it. */
int64_t rpcnb_repeat(call_function call, void (*release)(void*), void* function, any* arguments, int32_t count,
                     int64_t number, double* seconds) {
  struct timespec start, end;
  int64_t done = 0;
  clock_gettime(CLOCK_MONOTONIC, &start);
  for (; done < number; done++) {
    any result = {0, 0, {0}};
    if (call(function, arguments, count, &result) != 0) break;
    if (result.type_index >= 64) release(result.object);
  }
  clock_gettime(CLOCK_MONOTONIC, &end);
  *seconds = (double)(end.tv_sec - start.tv_sec) + 1e-9 * (double)(end.tv_nsec - start.tv_nsec);
  return done;
}
