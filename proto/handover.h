// handover.h - tells ThreadSanitizer of hand-overs that it cannot see: gRPC is not instrumented, so neither is the order that
// it makes between starting a batch and its completion, or between making a slice and its release. For whoever speaks gRPC, at
// either end. Nothing in other builds.
#ifndef BKV_HANDOVER_H
#define BKV_HANDOVER_H

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
