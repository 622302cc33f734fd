// lane.c - the threads of the peers: each takes what gRPC has done from its queue and runs what follows from it; now and then it
// looks for calls that nothing has come of, and one of them asks the suspected peers.
//
// They look at fixed times and not when something is due: gRPC has no public way to wake a queue's thread for a timer that is
// started elsewhere, and a look at an idle lane costs a microsecond.
#include "daemon/cluster/peer/internal.h"

#include "daemon/observe/clock.h"

#include <signal.h>
#include <unistd.h>

#define LOOKS        16 // within the timeout
#define LOOK_MOST_MS 100

static void look(bkv_peer_lane_t *lane, uint64_t now_ms) {
    bkv_peer_calls_watch(lane, now_ms);
    if (lane == &lane->peers->lanes[0]) {
        bkv_peers_probe(lane->peers, now_ms);
    }
}

static void *lane_run(void *argument) {
    bkv_peer_lane_t *lane = argument;
    uint64_t pause_ms = lane->peers->timeout_ms / LOOKS;
    pause_ms = pause_ms < 1 ? 1 : pause_ms > LOOK_MOST_MS ? LOOK_MOST_MS : pause_ms;
    uint64_t look_ms = bkv_now_ms() + pause_ms;
    for (;;) {
        grpc_event event = grpc_completion_queue_next(lane->completions, bkv_peers_timespec(look_ms), NULL);
        if (event.type == GRPC_QUEUE_SHUTDOWN) {
            return NULL;
        }
        if (event.type == GRPC_OP_COMPLETE) {
            bkv_batch_back(&event);
        }
        uint64_t now_ms = bkv_now_ms();
        if (now_ms >= look_ms) {
            // Where it was this process that stood still, answers may lie here unread: they come first.
            if (now_ms - look_ms < pause_ms * LOOKS / 2) {
                look(lane, now_ms);
            }
            look_ms = now_ms + pause_ms;
        }
    }
}

// Signals are the main loop's business.
static int thread_start(bkv_peer_lane_t *lane) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&lane->thread, NULL, lane_run, lane);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

// Fewer than CPUs: all of gRPC's queues wait on one set of descriptors, so that each thread more is woken for what is another's and
// hands it on. On two CPUs a second lane costs a pool 8 % of its work a CPU second (make bench-cluster).
static uint32_t lanes_for(long cpus) {
    return cpus < 8 ? 1 : cpus < 32 ? 2 : BKV_PEER_LANES;
}

bkv_status_t bkv_peer_lanes_start(bkv_peers_t *peers, bkv_error_t *err) {
    peers->lane_count = lanes_for(sysconf(_SC_NPROCESSORS_ONLN));
    for (uint32_t i = 0; i < peers->lane_count; i++) {
        bkv_peer_lane_t *lane = &peers->lanes[i];
        lane->peers = peers;
        lane->completions = grpc_completion_queue_create_for_next(NULL);
        pthread_mutex_init(&lane->lock, NULL);
        if (thread_start(lane) != 0) {
            grpc_completion_queue_shutdown(lane->completions);
            grpc_completion_queue_destroy(lane->completions);
            pthread_mutex_destroy(&lane->lock);
            return bkv_fail(err, BKV_RESOURCE_EXHAUSTED, "cluster: no thread could be started for questions to members");
        }
        peers->lanes_running++;
    }
    return BKV_OK;
}

void bkv_peer_lanes_end(bkv_peers_t *peers) {
    for (uint32_t i = 0; i < peers->lanes_running; i++) {
        grpc_completion_queue_shutdown(peers->lanes[i].completions);
    }
    for (uint32_t i = 0; i < peers->lanes_running; i++) {
        bkv_peer_lane_t *lane = &peers->lanes[i];
        pthread_join(lane->thread, NULL);
        grpc_completion_queue_destroy(lane->completions);
        pthread_mutex_destroy(&lane->lock);
    }
}
