/* Threads, for all of the compiled code. */

#include "native_numbers.h"

#include <pthread.h>
#include <stddef.h>
#include <sys/types.h>
#include <unistd.h>

struct work {
    void (*job)(void *args, int64_t index, int64_t thread);
    void *args;
    int64_t count, next, thread, joined;
    struct work *shared;
};

static void *work_on(void *given) {
    struct work *mine = given, *all = mine->shared;
    for (;;) {
        int64_t index = __atomic_fetch_add(&all->next, 1, __ATOMIC_RELAXED);
        if (index >= all->count) return NULL;
        all->job(all->args, index, mine->thread);
    }
}

/* GOMP_parallel of the OpenMP that torch uses, in the process that told of it: threads that wait for torch's next work, busily for a while, would take a core from
ours. Processes that are forked later have none of them. */
static void (*team)(void (*)(void *), void *, unsigned, unsigned);
static pid_t team_of;

static void work_in_team(void *given) {
    struct work *all = given;
    int64_t thread = __atomic_fetch_add(&all->joined, 1, __ATOMIC_RELAXED);
    all[thread].thread = thread, all[thread].shared = all;
    work_on(&all[thread]);
}

void fastnst_parallel(int64_t threads, int64_t count, void (*job)(void *, int64_t, int64_t), void *args) {
    struct work works[256] = {{job, args, count, 0, 0, 0, works}};
    pthread_t others[256];
    char runs[256] = {0};
    threads = threads > 256 ? 256 : threads;
    if (threads > 1 && team && getpid() == team_of) {
        team(work_in_team, works, threads, 0);
        return;
    }
    for (int64_t thread = 1; thread < threads; thread++) {
        works[thread] = (struct work){NULL, NULL, 0, 0, thread, 0, works};
        runs[thread] = pthread_create(&others[thread], NULL, work_on, &works[thread]) == 0;
    }
    work_on(&works[0]); /* does all of it where no other thread could be started */
    for (int64_t thread = 1; thread < threads; thread++)
        if (runs[thread]) pthread_join(others[thread], NULL);
}

void fastnst_join(void *gomp_parallel) {
    team_of = getpid();
    team = (void (*)(void (*)(void *), void *, unsigned, unsigned))gomp_parallel;
}
