// handover.h - tells ThreadSanitizer of hand-overs through gRPC, which is not instrumented (as daemon/rpc/handover.h does for
// the server). Nothing in other builds.
#ifndef BKV_CLUSTER_HANDOVER_H
#define BKV_CLUSTER_HANDOVER_H

#ifdef __SANITIZE_THREAD__
void __tsan_acquire(void *address);
void __tsan_release(void *address);
#define BKV_HAND_OVER(address) __tsan_release(address) // before gRPC gets it
#define BKV_TAKE_OVER(address) __tsan_acquire(address) // after it came back
#else
#define BKV_HAND_OVER(address) ((void)(address))
#define BKV_TAKE_OVER(address) ((void)(address))
#endif

#endif
