// fake.h - a gRPC server for the client's tests that says whatever a test wants it to, and what the tests share.
//
// Each call is handled on a thread of its own, so that a handler is written like a conversation: read, write, finish.
#ifndef BKV_TEST_CLIENT_FAKE_H
#define BKV_TEST_CLIENT_FAKE_H

#include "client/balancekv.h"

#include "balancekv.pb-c.h"
#include <grpc/grpc.h>
#include <stdatomic.h>
#include <sys/types.h>

typedef struct fake_server fake_server_t;
typedef struct fake_call fake_call_t;

// Must end with fake_finish, or return without it: the call is then left hanging until the client gives it up.
typedef void (*fake_handler_t)(fake_call_t *call, void *user);

// Listens on a gRPC address ("unix:/path"). Aborts when it cannot.
fake_server_t *fake_server_start(const char *address, fake_handler_t handler, void *user);
fake_server_t *fake_server_start_with(const char *address, grpc_server_credentials *credentials, fake_handler_t handler,
                                      void *user);
void fake_server_stop(fake_server_t *server); // cancels what hangs

bool fake_is(const fake_call_t *call, const char *method); // "Lookup"

// The next message unpacked; NULL: the client sends no more. The caller frees it with protobuf_c_message_free_unpacked.
void *fake_read(fake_call_t *call, const ProtobufCMessageDescriptor *descriptor);
bool fake_write(fake_call_t *call, const ProtobufCMessage *message); // false: the call has gone
bool fake_write_bytes(fake_call_t *call, const void *bytes, size_t length);
void fake_finish(fake_call_t *call, grpc_status_code code,
                 const char *message); // failures name the request, as the daemon's do

void fake_break(fake_call_t *call, grpc_status_code code, const char *message); // these do not, as when gRPC makes them itself

// Answers that need no thought. fake_open: id is the model's name, zero-padded; its last byte depends on the shares.
void fake_open(fake_call_t *call, uint64_t boot_epoch); // offers "inline"
void fake_open_offering(fake_call_t *call, uint64_t boot_epoch, bool shm);
void fake_lookup(fake_call_t *call, uint64_t boot_epoch); // even first bytes of keys are resident
void fake_put(fake_call_t *call, uint64_t boot_epoch);    // stored_bytes: the sum of the payload's bytes
// One chunk of a record. NULL key or data: none.
bool fake_chunk(fake_call_t *call, uint32_t index, const bkv_key_t *key, uint64_t record_bytes, const void *data,
                size_t length);
// The chunk of a record that is placed. data is a lie.
bool fake_placed(fake_call_t *call, uint32_t index, const bkv_key_t *key, uint64_t record_bytes, uint64_t offset,
                 const void *data, size_t length);

// A place for sockets: a new directory under /tmp, and its removal with one socket in it.
typedef struct fake_place {
    char directory[32], path[64], endpoint[80];
} fake_place_t;
void fake_place_make(fake_place_t *place);
void fake_place_remove(const fake_place_t *place);

// A client of that place, inline alone; asserts that it is made. timeout_ms as in bkv_client_options_t.
bkv_client_t *fake_client(const fake_place_t *place, uint32_t timeout_ms);

bkv_key_t fake_key(uint8_t first, uint8_t second);
bkv_spec_t fake_spec(void);       // model "m", 2 layers, 2 heads, dim 8, fp32, 16-token blocks
bkv_spec_id_t fake_spec_id(void); // as fake_open gives it to fake_spec
uint64_t fake_now_ms(void);

// A sealed raw record of fake_spec's shape; malloc'ed.
void *fake_record(const bkv_key_t *key, uint32_t tokens, size_t *length);

#endif
