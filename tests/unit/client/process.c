// process.c - see process.h.
#include "process.h"

#include <criterion/criterion.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

static void process_main(int go, int ready, const fake_place_t *place, uint64_t epoch, process_main_t start) {
    char byte;
    prctl(PR_SET_PDEATHSIG, SIGKILL); // a stopped process would outlive a test that failed
    if (read(go, &byte, 1) != 1) {
        _exit(0);
    }
    start(place, epoch);
    if (write(ready, "", 1) != 1 || read(go, &byte, 1) >= 0) {
        _exit(0); // the test has ended
    }
    _exit(1);
}

void process_fork(process_t *process, const fake_place_t *place, uint64_t epoch, process_main_t start) {
    int go[2], ready[2];
    cr_assert(pipe(go) == 0 && pipe(ready) == 0);
    process->pid = fork();
    cr_assert(process->pid >= 0);
    if (process->pid == 0) {
        close(go[1]);
        close(ready[0]);
        process_main(go[0], ready[1], place, epoch, start);
    }
    close(go[0]);
    close(ready[1]);
    process->go = go[1];
    process->ready = ready[0];
}

void process_start(process_t *process) {
    char byte;
    cr_assert(write(process->go, "", 1) == 1 && read(process->ready, &byte, 1) == 1);
}

void process_stop(process_t *process) {
    kill(process->pid, SIGSTOP);
    waitpid(process->pid, NULL, WUNTRACED);
}

void process_kill(process_t *process) {
    if (process->pid == 0) {
        return; // already
    }
    kill(process->pid, SIGKILL);
    waitpid(process->pid, NULL, 0);
    close(process->go);
    close(process->ready);
    process->pid = 0;
}
