// test_put.c - blocks in, over a real socket: how they may be cut, how they may fail, what stays.
#include "rig.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

Test(rpc_put, a_failed_block_names_itself_and_spares_those_before_it) {
    rig_t rig;
    rig_open(&rig);
    float *payload = rig_payload(RIG_BLOCK, 9);
    peer_call_t call;
    peer_start(rig.channel, "Put", 0, &call);
    rig_send_put(&call, &rig, 1, RIG_TOKENS, RIG_BLOCK, payload, RIG_BLOCK);
    rig_send_put(&call, &rig, 2, RIG_TOKENS, RIG_BLOCK, payload, RIG_BLOCK);
    payload[5] = NAN;
    rig_send_put(&call, &rig, 3, RIG_TOKENS, RIG_BLOCK, payload, RIG_BLOCK);
    peer_send_last(&call);
    size_t length;
    cr_assert_null(peer_receive(&call, &length));
    cr_assert_eq(peer_end(&call), GRPC_STATUS_INVALID_ARGUMENT);
    cr_assert_eq(strncmp(call.details, "block[2]", 8), 0, "%s", call.details);
    peer_free(&call);
    cr_assert_eq(rig_resident(&rig, 1, 3), 2);
    free(payload);
    rig_close(&rig);
}

Test(rpc_put, a_put_that_breaks_off_leaves_nothing_half_stored) {
    rig_t rig;
    rig_open(&rig);
    float *payload = rig_payload(RIG_BLOCK, 11);
    peer_call_t call;
    peer_start(rig.channel, "Put", 0, &call);
    rig_send_put(&call, &rig, 1, RIG_TOKENS, RIG_BLOCK, payload, RIG_BLOCK);
    rig_send_put(&call, &rig, 2, RIG_TOKENS, RIG_BLOCK, payload, RIG_BLOCK / 2);
    peer_cancel(&call);
    cr_assert_eq(peer_end(&call), GRPC_STATUS_CANCELLED);
    peer_free(&call);
    cr_assert(rig_reaches_open_calls(&rig, 0));
    cr_assert_eq(rig_resident(&rig, 2, 1), 0);
    rig_put(&rig, 2, RIG_TOKENS, payload, RIG_BLOCK); // nothing is in its way
    cr_assert_eq(rig_resident(&rig, 2, 1), 1);
    free(payload);
    rig_close(&rig); // asserts that no slot stayed reserved
}

Test(rpc_put, a_stream_that_ends_too_early_says_how_much_is_missing) {
    rig_t rig;
    rig_open(&rig);
    float *payload = rig_payload(RIG_BLOCK, 29);
    peer_call_t call;
    peer_start(rig.channel, "Put", 0, &call);
    rig_send_put(&call, &rig, 1, RIG_TOKENS, RIG_BLOCK, payload, RIG_BLOCK);
    rig_send_put(&call, &rig, 2, RIG_TOKENS, RIG_BLOCK, payload, RIG_BLOCK - 10);
    peer_send_last(&call);
    cr_assert_eq(peer_end(&call), GRPC_STATUS_INVALID_ARGUMENT);
    cr_assert_str_eq(call.details, "block[1].payload_bytes: the stream ended with 10 bytes missing");
    peer_free(&call);
    cr_assert_eq(rig_resident(&rig, 1, 2), 1);
    free(payload);
    rig_close(&rig);
}

// The call as a whole is twice as large as the staging memory: it has to wait for itself.
Test(rpc_put, a_call_waits_for_its_own_blocks_when_the_daemon_is_full) {
    rig_t rig;
    rig_open(&rig);
    const uint32_t tokens = 4096, blocks = 32;
    rig.codec = BALANCEKV__V1__CODEC__CODEC_DENSE4;
    rig_open_spec(&rig, tokens);
    size_t bytes = RIG_BLOCK / RIG_TOKENS * tokens;
    cr_assert_gt(bytes * blocks, (size_t)32 << 20);
    float *payload = rig_payload(bytes, 31);
    peer_call_t call;
    peer_start(rig.channel, "Put", 0, &call);
    for (uint32_t i = 0; i < blocks; i++) {
        cr_assert(rig_send_put(&call, &rig, i, tokens, bytes, payload, bytes));
    }
    peer_send_last(&call);
    size_t length;
    uint8_t *message = peer_receive(&call, &length);
    cr_assert_eq(peer_end(&call), GRPC_STATUS_OK, "%s", call.details);
    Balancekv__V1__PutResponse *reply = balancekv__v1__put_response__unpack(NULL, length, message);
    cr_assert_eq(reply->n_results, blocks);
    for (uint32_t i = 0; i < blocks; i++) {
        uint8_t key[BKV_KEY_BYTES];
        rig_key(i, key);
        cr_assert_arr_eq(reply->results[i]->key.data, key, sizeof(key), "results come in the order of the blocks");
    }
    balancekv__v1__put_response__free_unpacked(reply, NULL);
    free(message);
    peer_free(&call);
    free(payload);
    rig_close(&rig);
}

Test(rpc_put, data_without_a_block_and_blocks_beyond_max_batch_are_refused) {
    rig_t rig;
    rig_open(&rig);
    peer_call_t call;
    peer_start(rig.channel, "Put", 0, &call);
    rig_send_data(&call, "abc", 3);
    peer_send_last(&call);
    cr_assert_eq(peer_end(&call), GRPC_STATUS_INVALID_ARGUMENT);
    cr_assert_str_eq(call.details, "block[0].data: 3 bytes that belong to no block");
    peer_free(&call);
    float *payload = rig_payload(RIG_BLOCK, 37);
    peer_start(rig.channel, "Put", 0, &call);
    for (uint32_t i = 0; i <= rig.config.max_batch; i++) {
        rig_send_put(&call, &rig, i % 4, RIG_TOKENS, RIG_BLOCK, payload, RIG_BLOCK);
    }
    peer_send_last(&call);
    cr_assert_eq(peer_end(&call), GRPC_STATUS_RESOURCE_EXHAUSTED, "%s", call.details);
    cr_assert_eq(strncmp(call.details, "block[64].", 10), 0, "%s", call.details);
    peer_free(&call);
    free(payload);
    rig_close(&rig);
}
