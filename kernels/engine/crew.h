/* Threads that wait for work: a region of a Program or of one large eager call runs on a crew.
 *
 * Why not OpenMP: the end of libgomp's regions spins for as long as it takes, which costs milliseconds once other work
 * shares the cores, and its threads do not survive a fork. Here whoever waits spins a little and then sleeps (team.h). A
 * crew belongs to one caller at a time, so Python threads that train at once have crews of their own; idle ones are kept
 * for the next caller.
 */
#ifndef FASTDL_CREW_H
#define FASTDL_CREW_H
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include "team.h"

#define FD_STACK_BYTES (8 << 20)

typedef void (*fd_body)(void* context, const fd_worker* worker);

typedef struct fd_crew fd_crew;
typedef struct {
  fd_crew* crew;
  int thread;   /* 1, 2, ...: the caller is 0 */
  fd_flag done; /* the last job it has finished */
} fd_member;

struct fd_crew {
  fd_crew* next;      /* in the list of idle crews */
  int asked, threads; /* asked for, and there: fewer where the system refuses threads */
  fd_flag job;        /* number of the last job handed out */
  fd_body body;
  void* context;
  char *scratch, *shared;
  int64_t scratch_bytes;
  fd_team* team;
  fd_member members[FD_MAX_THREADS];
};

static void fd_work(const fd_crew* crew, int thread) {
  const fd_worker w = {thread, crew->threads, crew->team, crew->scratch + thread * crew->scratch_bytes, crew->shared};
  crew->body(crew->context, &w);
}

static void* fd_serve(void* member_) {
  fd_member* member = (fd_member*)member_;
  for (uint32_t job = 1;; job++) {
    fd_await(&member->crew->job, job);
    fd_work(member->crew, member->thread);
    fd_publish(&member->done, job);
  }
  return NULL;
}

static pthread_mutex_t fd_idle_lock = PTHREAD_MUTEX_INITIALIZER;
static fd_crew* fd_idle_crews = NULL;

/* In the child of a fork there is no member left: it makes crews of its own. */
static void fd_forget_crews(void) {
  static const pthread_mutex_t fresh = PTHREAD_MUTEX_INITIALIZER;
  fd_idle_lock = fresh;
  fd_idle_crews = NULL;
}

static fd_crew* fd_make_crew(int threads) {
  static int registered = 0;
  fd_crew* crew = (fd_crew*)calloc(1, sizeof(fd_crew));
  pthread_attr_t attributes;
  sigset_t all, before;
  if (!crew) return NULL;
  if (!__atomic_exchange_n(&registered, 1, __ATOMIC_ACQ_REL)) pthread_atfork(NULL, NULL, fd_forget_crews);
  crew->asked = threads;
  pthread_attr_init(&attributes);
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attributes, FD_STACK_BYTES);
  sigfillset(&all); /* signals are for the interpreter's thread, but for a thread's own faults (faulthandler) */
  sigdelset(&all, SIGSEGV), sigdelset(&all, SIGBUS), sigdelset(&all, SIGFPE), sigdelset(&all, SIGILL);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  for (crew->threads = 1; crew->threads < threads; crew->threads++) {
    fd_member* member = &crew->members[crew->threads];
    pthread_t thread;
    member->crew = crew;
    member->thread = crew->threads;
    if (pthread_create(&thread, &attributes, fd_serve, member)) break;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pthread_attr_destroy(&attributes);
  return crew;
}

static fd_crew* fd_take_crew(int threads) {
  fd_crew* found = NULL;
  pthread_mutex_lock(&fd_idle_lock);
  for (fd_crew** place = &fd_idle_crews; *place; place = &(*place)->next)
    if ((*place)->asked == threads) {
      found = *place;
      *place = found->next;
      break;
    }
  pthread_mutex_unlock(&fd_idle_lock);
  return found ? found : fd_make_crew(threads);
}

static void fd_give_back(fd_crew* crew) {
  pthread_mutex_lock(&fd_idle_lock);
  crew->next = fd_idle_crews;
  fd_idle_crews = crew;
  pthread_mutex_unlock(&fd_idle_lock);
}

/* Run body(context, worker) on a team; the caller is thread 0. scratch holds `threads` private blocks of scratch_bytes
 * each. The team may be smaller than asked for; it covers every share all the same. */
static void fd_parallel(fd_body body, void* context, int threads, char* scratch, int64_t scratch_bytes, char* shared,
                        fd_team* team) {
  fd_crew* crew = threads > 1 ? fd_take_crew(threads < FD_MAX_THREADS ? threads : FD_MAX_THREADS) : NULL;
  if (!crew) {
    const fd_worker alone = {0, 1, team, scratch, shared};
    body(context, &alone);
    return;
  }
  for (int t = 0; t < FD_MAX_THREADS; t++) team->flag[t].count = 0;
  crew->body = body, crew->context = context, crew->team = team;
  crew->scratch = scratch, crew->scratch_bytes = scratch_bytes, crew->shared = shared;
  const uint32_t job = crew->job.count + 1;
  fd_publish(&crew->job, job);
  fd_work(crew, 0);
  for (int t = 1; t < crew->threads; t++) fd_await(&crew->members[t].done, job);
  fd_give_back(crew);
}
#endif
