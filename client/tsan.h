// tsan.h - tells ThreadSanitizer what it cannot see, because gRPC is not built with it: what is given to gRPC by one thread
// (a batch's tag, a slice's memory) is seen as it was by the thread that gets it back.
#ifndef BKV_CLIENT_TSAN_H
#define BKV_CLIENT_TSAN_H

#if defined(__SANITIZE_THREAD__)
void __tsan_acquire(void *address);
void __tsan_release(void *address);
#define BKV_TSAN_GIVE(address) __tsan_release(address)
#define BKV_TSAN_TAKE(address) __tsan_acquire(address)
#else
#define BKV_TSAN_GIVE(address) (void)(address)
#define BKV_TSAN_TAKE(address) (void)(address)
#endif

#endif
