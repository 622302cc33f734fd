// store.h - records in one bounded arena: reserve, fill, publish; find, pin, unpin; evict.
//
// What it is: an arena (arena.h) cut into slabs of one size class each (slab.h), an index of 64-byte entries in shards
// (index.h), eviction by SIEVE (evict.h), leases (lease.h), restart by a scan of the arena (recover.h); internal.h has the
// locks. A record is known by its key and its spec_id together: two specs never meet, whatever their keys.
// What it is not: it knows records' headers (kernels/summary.h) but neither codecs nor the wire.
//
// All memory is taken at create; afterwards every failure is a status. Thread-safe. Time is an argument: now_ms is a
// monotonic clock of the caller's, the same for all calls.
#ifndef BKV_STORE_H
#define BKV_STORE_H

#include "kernels/status.h"
#include "kernels/summary.h"

#include <stdint.h>

typedef struct bkv_store bkv_store_t;

typedef struct bkv_store_config {
    uint64_t arena_bytes;      // all memory for records; rounded down to whole slabs
    uint64_t slab_bytes;       // also the largest record; 0: arena_bytes / 32, at least 8 MiB, at most 1 GiB
    uint32_t max_entries;      // 0: arena_bytes / 16 KiB, at least 1,024
    uint32_t shards;           // power of two; 0: 64
    uint32_t max_leases;       // 0: 4,096
    uint32_t max_lease_keys;   // keys under lease at once, all leases together; 0: 65,536
    uint64_t tenant_quota;     // bytes of slots per tenant; 0: none (see bkv_store_set_quota)
    uint64_t recovered_ttl_ms; // how long records of an earlier process live on, theirs being forgotten; 0: no expiry
    bool prefault;             // touch every page at create
    const char *arena_path;    // a file on tmpfs or hugetlbfs that outlives the process; NULL: an anonymous memfd
    int arena_fd;              // an arena handed on by a predecessor (systemd's fd store), used instead of arena_path; -1: none
} bkv_store_config_t;

// Counters since create (or, for gauges, now): X(name, is_counter, help)
#define BKV_STORE_METRICS(X)                                                                                                   \
    X(hits_total, true, "finds of resident records")                                                                           \
    X(misses_total, true, "finds of absent records")                                                                           \
    X(published_total, true, "records published")                                                                              \
    X(duplicates_total, true, "publishes of keys that were there already")                                                     \
    X(aborted_total, true, "reservations given back unpublished")                                                              \
    X(dropped_total, true, "records dropped on request")                                                                       \
    X(evicted_capacity_total, true, "records evicted to make room")                                                            \
    X(evicted_quota_total, true, "records evicted because their tenant was over quota")                                        \
    X(evicted_slab_total, true, "records evicted because their slab went to another size class")                               \
    X(expired_total, true, "records whose time to live ended")                                                                 \
    X(corrupt_total, true, "records dropped because their checksum failed")                                                    \
    X(full_total, true, "reservations refused for lack of room")                                                               \
    X(recovered_total, true, "records taken over from an earlier process")                                                     \
    X(adopted_total, true, "records taken over from other daemons of the cluster")                                             \
    X(copies, false, "records resident that other daemons own")                                                                \
    X(raw_bytes_total, true, "bytes of the blocks as put, before compression")                                                 \
    X(stored_bytes_total, true, "bytes of the records made from them")                                                         \
    X(entries, false, "records resident")                                                                                      \
    X(resident_bytes, false, "bytes of resident records")                                                                      \
    X(slot_bytes, false, "bytes of slots in use, rounding included")                                                           \
    X(arena_bytes, false, "bytes of the arena")                                                                                \
    X(pinned, false, "pins held by transfers in flight")                                                                       \
    X(leases, false, "leases alive")

typedef struct bkv_store_metrics {
#define X(name, is_counter, help) uint64_t name;
    BKV_STORE_METRICS(X)
#undef X
} bkv_store_metrics_t;

// A slot being filled. data has room for `capacity` bytes and is 64-byte aligned.
typedef struct bkv_slot {
    uint8_t *data;
    uint64_t capacity;
    uint64_t tenant;
    uint32_t page;  // where in the arena; the store's own
    uint32_t quota; // likewise
} bkv_slot_t;

// A pinned record: data stays as it is until bkv_store_unpin.
typedef struct bkv_pin {
    const uint8_t *data;
    uint64_t length;
    uint32_t entry; // the store's own
    uint32_t shard;
} bkv_pin_t;

// Creates, or takes over the arena of arena_path or arena_fd: every slot whose header is sound becomes an entry again (its
// payload is verified when it is got). An arena of another version or geometry is cleared, and the log says so; a file that
// is no arena is left alone and refused.
// *recovered (may be NULL): how many records were taken over. now_ms starts their TTL. A file is locked: two daemons never
// share one. arena_fd is duplicated, the caller may close it. INVALID_ARGUMENT: a field of config, named; FAILED_PRECONDITION:
// another process has the arena; RESOURCE_EXHAUSTED: no memory, or no room on the file system.
bkv_status_t bkv_store_create(const bkv_store_config_t *config, uint64_t now_ms, bkv_store_t **store, uint64_t *recovered,
                              bkv_error_t *err);

// Asserts that nothing is pinned or reserved. The arena's file or memfd keeps its records.
void bkv_store_destroy(bkv_store_t *store);

// The arena's descriptor, to hand to a successor. Owned by the store.
int bkv_store_fd(const bkv_store_t *store);

// The arena's memory, to be registered with devices: one mapping, for the store's life.
void bkv_store_memory(const bkv_store_t *store, void **memory, uint64_t *bytes);

// Largest record that fits.
uint64_t bkv_store_max_record(const bkv_store_t *store);

// Bytes of slots that `tenant` (as in the record header) may use; 0: no limit; BKV_QUOTA_DEFAULT: config's tenant_quota again,
// which set_default_quota changes. May be called at any time; what is over a smaller quota leaves at the tenant's next reserve.
// RESOURCE_EXHAUSTED: 16,384 tenants have records or quotas already.
#define BKV_QUOTA_DEFAULT UINT64_MAX
bkv_status_t bkv_store_set_quota(bkv_store_t *store, uint64_t tenant, uint64_t bytes, bkv_error_t *err);
void bkv_store_set_default_quota(bkv_store_t *store, uint64_t bytes);

// A slot for a record of at most `length` bytes. Evicts as needed, the tenant's own records first where it is at its quota.
// RESOURCE_EXHAUSTED: nothing can be evicted (all pinned or leased), the quota is smaller than the record, or it is larger
// than a slab; the message says which.
bkv_status_t bkv_store_reserve(bkv_store_t *store, uint64_t tenant, uint64_t length, uint64_t now_ms, bkv_slot_t *slot,
                               bkv_error_t *err);

// Shows the sealed record in slot->data (header.key, header.length and header.tenant are taken from it) to everybody; the
// slot is the store's afterwards in every case. A record much smaller than its slot moves to one of its own size, for which a
// record of that size may be evicted. ttl_ms 0: no expiry. raw_bytes: size before compression, for the counters.
// ALREADY_EXISTS: the key was there, this record is gone, the older one stays. RESOURCE_EXHAUSTED: no entry to be had.
// INVALID_ARGUMENT: the header is no record's, or its length or tenant are not the slot's.
bkv_status_t bkv_store_publish(bkv_store_t *store, bkv_slot_t *slot, uint64_t ttl_ms, uint64_t raw_bytes, uint64_t now_ms,
                               bkv_error_t *err);

// The same, and pins the record that is resident afterwards, so that it cannot leave before its maker has read it: this one on
// BKV_OK, the older one on ALREADY_EXISTS, whose checksum is then the caller's to verify. BUSY: too many pins on the older one.
bkv_status_t bkv_store_publish_pinned(bkv_store_t *store, bkv_slot_t *slot, uint64_t ttl_ms, uint64_t raw_bytes,
                                      uint64_t now_ms, bkv_pin_t *pin, bkv_error_t *err);

// Publishes a record that another daemon of the cluster has made: as publish (pin NULL) or publish_pinned, but not counted as a
// block that was put. The caller has validated it and verified its checksum. copy: see bkv_store_set_copy.
bkv_status_t bkv_store_adopt(bkv_store_t *store, bkv_slot_t *slot, uint64_t ttl_ms, bool copy, uint64_t now_ms, bkv_pin_t *pin,
                             bkv_error_t *err);

// Says whether a resident record is but a copy of what other daemons own. Copies make room before all else of about their size
// does (evict.h), and are not listed. A record is none until it is said to be, also when it was taken over from an earlier
// process, and no more once it is published or adopted again as what is none. Returns whether it is resident.
bool bkv_store_set_copy(bkv_store_t *store, const bkv_name_t *name, bool copy, uint64_t now_ms);

// Forgets a resident record that is but a copy, and that nobody has pinned or leased: who has, may look for it again by its name.
// Returns whether it did.
bool bkv_store_drop_copy(bkv_store_t *store, const bkv_name_t *name, uint64_t now_ms);

// What is left of a pinned record's time to live, in ms, at least 1; 0: it has no end.
uint64_t bkv_store_ttl(const bkv_store_t *store, const bkv_pin_t *pin, uint64_t now_ms);

// The blocks that are no copies, in pieces and in an order of the store's own: fills at most `capacity` items with those at *cursor
// and behind it and moves *cursor past them; looks at no more than 16 times as many entries, so that a 0 with *more set means: go
// on. A block that is resident from before cursor 0 until the end is listed, once; one that comes or goes meanwhile may be. Folds
// are not listed: they are nobody's to have, and whoever wants one makes it again. Takes no lock for long.
typedef struct bkv_store_item {
    bkv_name_t name;
    uint64_t bytes; // of the record
} bkv_store_item_t;
size_t bkv_store_list(bkv_store_t *store, uint64_t *cursor, bkv_store_item_t *items, size_t capacity, uint64_t now_ms,
                      bool *more);

// The same of those that are copies: some are this daemon's own after a change of the members.
size_t bkv_store_list_copies(bkv_store_t *store, uint64_t *cursor, bkv_store_item_t *items, size_t capacity, uint64_t now_ms,
                             bool *more);

// Gives a slot back unpublished.
void bkv_store_abort(bkv_store_t *store, bkv_slot_t *slot);

// Finds and pins the record of key, and verifies its checksum. NOT_FOUND: not there (or expired, or its header's spec_id
// is not *spec_id). DATA_LOSS: it was there but damaged; it has been dropped. Counts as a use. BUSY: too many pins on it.
bkv_status_t bkv_store_pin(bkv_store_t *store, const bkv_spec_id_t *spec_id, const bkv_key_t *key, uint64_t now_ms,
                           bkv_pin_t *pin, bkv_error_t *err);
void bkv_store_unpin(bkv_store_t *store, const bkv_pin_t *pin);

// The same without the checksum, for a reader that sums the bytes itself as it moves them; it calls _damaged where they do not
// match, while it holds the pin: the record is dropped and counted as corrupt.
bkv_status_t bkv_store_pin_unverified(bkv_store_t *store, const bkv_spec_id_t *spec_id, const bkv_key_t *key, uint64_t now_ms,
                                      bkv_pin_t *pin, bkv_error_t *err);
void bkv_store_damaged(bkv_store_t *store, const bkv_pin_t *pin);

// Whether key is resident; does not count as a use.
bool bkv_store_contains(bkv_store_t *store, const bkv_spec_id_t *spec_id, const bkv_key_t *key, uint64_t now_ms);

// Copies the header of key's record and says how long it is, without a look at the rest: for plans, nothing is verified. False
// when key is not resident; then nothing is written. Does not count as a use.
bool bkv_store_peek(bkv_store_t *store, const bkv_spec_id_t *spec_id, const bkv_key_t *key, uint64_t now_ms,
                    bkv_record_header_t *header, uint64_t *length);

// Forgets key. Pinned readers finish; the slot is reused once the last pin is gone. Returns whether it was there.
bool bkv_store_drop(bkv_store_t *store, const bkv_spec_id_t *spec_id, const bkv_key_t *key, uint64_t now_ms);

// Keeps all of keys from eviction and expiry for ttl_ms. NOT_FOUND names the first missing key, and then none is held.
bkv_status_t bkv_store_lease(bkv_store_t *store, const bkv_spec_id_t *spec_id, const bkv_key_t *keys, uint32_t count,
                             uint64_t ttl_ms, uint64_t now_ms, uint64_t *lease, bkv_error_t *err);
bkv_status_t bkv_store_unlease(bkv_store_t *store, uint64_t lease, bkv_error_t *err);

// Ends leases and records whose time has come; call about once a second. At most `limit` entries are looked at.
void bkv_store_tick(bkv_store_t *store, uint64_t now_ms, uint32_t limit);

void bkv_store_metrics(bkv_store_t *store, bkv_store_metrics_t *metrics);

#endif
