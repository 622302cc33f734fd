// evict.h - who leaves when there is no room.
//
// Victims are chosen by SIEVE (sieve.h says why, and where it is from), one queue per size class, since a slot serves only its
// own class. That alone calcifies: slabs stay with the classes that came first. So when a class has to evict, it also looks at
// the others now and then, and takes a whole slab from the class whose next victim lies in a slab that has been used less
// recently, on average, than what it would itself have to give up. Ages are told in publishes, not in time: a quiet hour
// makes nothing older. A live class's slab is on average half as old as its victim, so that two busy classes do not swap
// slabs back and forth.
//
// Copies of what other daemons own are worth less than all else. They have queues of their own, out of which victims are taken
// first, and a slab is as old as what else is in it. Which of them stay is SIEVE's choice too.
//
// Taking a slab evicts all that is in it under one hold of the space lock: about a microsecond per record, during which puts wait
// and gets do not. It happens as often as classes shift, not as often as records are put.
//
// All functions want the space lock and take shards' locks.
#ifndef BKV_EVICT_H
#define BKV_EVICT_H

#include "sieve.h"
#include "slab.h"

typedef struct bkv_store bkv_store_t;

typedef struct bkv_evict_class {
    bkv_sieve_t owned, copies;
    uint32_t evictions;  // since it last compared itself with the other classes
    uint32_t victim_age; // in publishes, of what it evicted last
} bkv_evict_class_t;

typedef struct bkv_evict {
    bkv_evict_class_t classes[BKV_CLASSES_MAX];
    bkv_sieve_link_t *by_class, *by_tenant; // [entries]: the queues of a class, of a tenant; an entry is in one of each
    uint32_t cursor;                        // slab that the next search of all slabs begins with
} bkv_evict_t;

bkv_status_t bkv_evict_init(bkv_evict_t *evict, uint32_t entries, bkv_error_t *err);
void bkv_evict_deinit(bkv_evict_t *evict);

// An entry joins or leaves the queues of its class and of its tenant: those for copies if it is flagged as one. The flag must
// not change in between.
void bkv_evict_enter(bkv_store_t *store, uint32_t entry);
void bkv_evict_leave(bkv_store_t *store, uint32_t entry);

// A slot of exactly this class for the tenant: a free one, one from a free or a colder slab, or a victim's. false: all slots of
// the class are pinned, leased or being filled.
bool bkv_evict_slot(bkv_store_t *store, uint32_t tenant, uint32_t size_class, uint64_t now_ms, uint32_t *page);

// A slot of this class, whatever it takes: when the class has none that could leave, a free one of a class up to twice as large,
// or a slab of somebody else's; failing that, one of any larger class. Never one of more than max_bytes. false: there is no
// slab whose records could all leave, and no slot large enough whose record could.
bool bkv_evict_any_slot(bkv_store_t *store, uint32_t tenant, uint32_t size_class, uint64_t max_bytes, uint64_t now_ms,
                        uint32_t *page);

// Evicts the tenant's own records until `bytes` more are within its quota. false: the rest are pinned, leased or being filled.
bool bkv_evict_for_quota(bkv_store_t *store, uint32_t tenant, uint64_t bytes, uint64_t now_ms);

// Evicts one record so that there is a free entry, a copy if possible, and from this class if possible.
bool bkv_evict_entry(bkv_store_t *store, uint32_t size_class, uint64_t now_ms);

#endif
