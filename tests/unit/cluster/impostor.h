// impostor.h - another member, made in the test: a gRPC server whose calls each run a script of the test's, which may answer as a
// daemon would, or otherwise.
#ifndef BKV_TEST_IMPOSTOR_H
#define BKV_TEST_IMPOSTOR_H

#include "daemon/cluster/members/member.h"

#include <grpc/grpc.h>
#include <protobuf-c/protobuf-c.h>

typedef struct impostor impostor_t;
typedef struct impostor_call impostor_call_t;

// Runs on a thread of the call's own. A call that it has not ended is ended with UNIMPLEMENTED.
typedef void (*impostor_script_t)(impostor_call_t *call, void *user);

impostor_t *impostor_start(impostor_script_t script, void *user); // on a port of 127.0.0.1
impostor_t *impostor_start_at(uint16_t port, impostor_script_t script, void *user);
void impostor_stop(impostor_t *impostor); // cancels its calls, and waits for their scripts
uint16_t impostor_port(const impostor_t *impostor);
uint32_t impostor_calls(impostor_t *impostor); // that have come so far

// What etcd would say of a member that listens there.
bkv_member_t impostor_member(const char *id, uint64_t epoch, uint16_t port);

const char *impostor_method(const impostor_call_t *call);                     // "Have"
uint8_t *impostor_read(impostor_call_t *call, size_t *length);                // malloc'd; NULL: no more
bool impostor_write(impostor_call_t *call, const void *bytes, size_t length); // false: the call has ended
bool impostor_send(impostor_call_t *call, const ProtobufCMessage *message);
void impostor_end(impostor_call_t *call, grpc_status_code code, const char *details); // as a daemon would, with a request's id
void impostor_reply(impostor_call_t *call, const ProtobufCMessage *message);          // and ends the call with OK
void impostor_hush(impostor_call_t *call); // says nothing until the call is cancelled or over

// The first request, unpacked; the test's to free.
void *impostor_request(impostor_call_t *call, const ProtobufCMessageDescriptor *type);

#endif
