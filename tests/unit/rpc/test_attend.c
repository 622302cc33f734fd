// test_attend.c - Attend over a real socket, against what attention over a single token must be.
#include "rig.h"

#include <criterion/criterion.h>
#include <string.h>

Test(rpc_attend, attention_over_one_token_is_its_value) {
    rig_t rig;
    rig_open(&rig);
    float payload[RIG_HEADS * 2 * RIG_DIM]; // one token: K of both heads, then V of both
    for (int i = 0; i < RIG_HEADS * 2 * RIG_DIM; i++) {
        payload[i] = 0.01f * (float)i;
    }
    rig_put(&rig, 7, 1, payload, sizeof(payload));
    float q[4 * RIG_DIM]; // 4 query heads, two for each KV head
    for (int i = 0; i < 4 * RIG_DIM; i++) {
        q[i] = 0.02f * (float)(i % 7);
    }
    uint8_t key[BKV_KEY_BYTES];
    rig_key(7, key);
    ProtobufCBinaryData keys = rig_bytes(key, sizeof(key));
    Balancekv__V1__AttendRequest request = BALANCEKV__V1__ATTEND_REQUEST__INIT;
    request.spec_id = rig_bytes(rig.spec_id, BKV_SPEC_ID_BYTES);
    request.n_keys = 1;
    request.keys = &keys;
    request.query_heads = 4;
    request.queries = 1;
    request.scale = 0.5f;
    request.q = rig_bytes(q, sizeof(q));
    grpc_status_code code;
    char text[256];
    Balancekv__V1__AttendResponse *reply =
        peer_unary(rig.channel, "Attend", &request.base, &balancekv__v1__attend_response__descriptor, &code, text);
    cr_assert_eq(code, GRPC_STATUS_OK, "%s", text);
    cr_assert(reply->output.len == 4 * RIG_DIM * sizeof(float) && reply->lse.len == 4 * sizeof(float));
    float output[4 * RIG_DIM], lse[4];
    memcpy(output, reply->output.data, sizeof(output));
    memcpy(lse, reply->lse.data, sizeof(lse));
    for (int head = 0; head < 4; head++) {
        double dot = 0;
        for (int i = 0; i < RIG_DIM; i++) {
            dot += (double)q[head * RIG_DIM + i] * (double)payload[head / 2 * RIG_DIM + i];
            cr_assert_float_eq(output[head * RIG_DIM + i], payload[(RIG_HEADS + head / 2) * RIG_DIM + i], 1e-5);
        }
        cr_assert_float_eq(lse[head], 0.5 * dot, 1e-4);
    }
    balancekv__v1__attend_response__free_unpacked(reply, NULL);

    request.q.len -= 4;
    cr_assert_null(peer_unary(rig.channel, "Attend", &request.base, &balancekv__v1__attend_response__descriptor, &code, text));
    cr_assert_eq(code, GRPC_STATUS_INVALID_ARGUMENT);
    cr_assert_eq(strncmp(text, "q: ", 3), 0, "%s", text);
    rig_close(&rig);
}
