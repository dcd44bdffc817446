/* Threads that wait for work: a region of a Program or of one large eager call runs on a crew.
 *
 * Why not OpenMP: the end of libgomp's regions spins for as long as it takes, which costs milliseconds once other work
 * shares the cores, and its threads do not survive a fork. Here whoever waits spins a little and then sleeps (team.h). A
 * crew belongs to one caller at a time, so Python threads that train at once have crews of their own; idle ones are kept
 * for the next caller.
 *
 * A team is the first members of a crew, each called by a flag of its own: the others sleep on. A crew that is too small
 * grows, so that there are never more members than teams at work at once have needed.
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
  fd_flag job;  /* number of its last job handed out */
  fd_flag done; /* and finished */
} fd_member;

struct fd_crew {
  fd_crew* next; /* in the list of idle crews */
  int threads;   /* there, with the caller */
  int working;   /* of them, on the job at hand */
  fd_body body;
  void* context;
  char *scratch, *shared;
  int64_t scratch_bytes;
  fd_team* team;
  fd_member members[FD_MAX_THREADS];
};

static void fd_work(const fd_crew* crew, int thread) {
  const fd_worker w = {thread, crew->working, crew->team, crew->scratch + thread * crew->scratch_bytes, crew->shared};
  crew->body(crew->context, &w);
}

static void* fd_serve(void* member_) {
  fd_member* member = (fd_member*)member_;
  for (uint32_t job = 1;; job++) {
    fd_await(&member->job, job);
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

/* Up to so many threads, the caller among them; fewer where the system refuses more, and asks again the next time. */
static void fd_grow(fd_crew* crew, int threads) {
  static int registered = 0;
  pthread_attr_t attributes;
  sigset_t all, before;
  if (!__atomic_exchange_n(&registered, 1, __ATOMIC_ACQ_REL)) pthread_atfork(NULL, NULL, fd_forget_crews);
  pthread_attr_init(&attributes);
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attributes, FD_STACK_BYTES);
  sigfillset(&all); /* signals are for the interpreter's thread, but for a thread's own faults (faulthandler) */
  sigdelset(&all, SIGSEGV), sigdelset(&all, SIGBUS), sigdelset(&all, SIGFPE), sigdelset(&all, SIGILL);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  for (; crew->threads < threads; crew->threads++) {
    fd_member* member = &crew->members[crew->threads];
    pthread_t thread;
    member->crew = crew;
    member->thread = crew->threads;
    if (pthread_create(&thread, &attributes, fd_serve, member)) break;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pthread_attr_destroy(&attributes);
}

/* The smallest idle crew that is large enough, else the largest, else a new one; grown to the size asked for. */
static fd_crew* fd_take_crew(int threads) {
  fd_crew *crew = NULL, **best = NULL;
  pthread_mutex_lock(&fd_idle_lock);
  for (fd_crew** place = &fd_idle_crews; *place; place = &(*place)->next) {
    const int has = (*place)->threads, most = best ? (*best)->threads : 0;
    if (most < threads ? has > most : has >= threads && has < most) best = place;
  }
  if (best) {
    crew = *best;
    *best = crew->next;
  }
  pthread_mutex_unlock(&fd_idle_lock);
  if (!crew && (crew = (fd_crew*)calloc(1, sizeof(fd_crew)))) crew->threads = 1;
  if (crew && crew->threads < threads) fd_grow(crew, threads);
  return crew;
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
  crew->working = threads < crew->threads ? threads : crew->threads;
  crew->body = body, crew->context = context, crew->team = team;
  crew->scratch = scratch, crew->scratch_bytes = scratch_bytes, crew->shared = shared;
  for (int t = 0; t < crew->working; t++) team->flag[t].count = 0;
  for (int t = 1; t < crew->working; t++) fd_publish(&crew->members[t].job, crew->members[t].job.count + 1);
  fd_work(crew, 0);
  for (int t = 1; t < crew->working; t++) fd_await(&crew->members[t].done, crew->members[t].job.count);
  fd_give_back(crew);
}
#endif
