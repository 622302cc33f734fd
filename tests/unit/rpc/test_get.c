// test_get.c - records out, over a real socket: whole, in chunks, to a reader that stops.
#include "rig.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

Test(rpc_get, blocks_come_back_as_they_were) {
    rig_t rig;
    rig_open(&rig);
    float *payload = rig_payload(2 * RIG_BLOCK, 1);
    peer_call_t call;
    peer_start(rig.channel, "Put", 0, &call);
    cr_assert(rig_send_put(&call, &rig, 1, RIG_TOKENS, RIG_BLOCK, NULL, 0)); // a block without data, then data in odd pieces
    cr_assert(rig_send_data(&call, payload, 1));
    cr_assert(rig_send_data(&call, (uint8_t *)payload + 1, RIG_BLOCK - 1));
    cr_assert(rig_send_put(&call, &rig, 2, RIG_TOKENS, RIG_BLOCK, (uint8_t *)payload + RIG_BLOCK, RIG_BLOCK));
    peer_send_last(&call);
    size_t length;
    uint8_t *bytes = peer_receive(&call, &length);
    cr_assert_eq(peer_end(&call), GRPC_STATUS_OK, "%s", call.details);
    Balancekv__V1__PutResponse *reply = balancekv__v1__put_response__unpack(NULL, length, bytes);
    cr_assert(reply->n_results == 2 && reply->boot_epoch == 4711 && !reply->results[1]->duplicate);
    uint8_t key[BKV_KEY_BYTES];
    rig_key(2, key);
    cr_assert_arr_eq(reply->results[1]->key.data, key, sizeof(key));
    cr_assert_gt(reply->results[0]->stored_bytes, RIG_BLOCK);
    balancekv__v1__put_response__free_unpacked(reply, NULL);
    free(bytes);
    peer_free(&call);

    const uint32_t numbers[] = {2, 1};
    rig_start_get(&rig, numbers, 2, 0, &call);
    for (uint32_t i = 0; i < 2; i++) {
        bytes = peer_receive(&call, &length);
        cr_assert_not_null(bytes);
        Balancekv__V1__RecordChunk *chunk = balancekv__v1__record_chunk__unpack(NULL, length, bytes);
        cr_assert(chunk->index == i && chunk->code == 0 && chunk->boot_epoch == 4711);
        cr_assert(chunk->record_bytes == chunk->data.len && chunk->data.len > RIG_BLOCK);
        const uint8_t *expected = (const uint8_t *)payload + (i == 0 ? RIG_BLOCK : 0);
        cr_assert_arr_eq(chunk->data.data + chunk->data.len - RIG_BLOCK, expected, RIG_BLOCK);
        balancekv__v1__record_chunk__free_unpacked(chunk, NULL);
        free(bytes);
    }
    cr_assert_null(peer_receive(&call, &length));
    cr_assert_eq(peer_end(&call), GRPC_STATUS_OK);
    peer_free(&call);
    free(payload);
    rig_close(&rig);
}

Test(rpc_get, large_records_come_in_chunks) {
    rig_t rig;
    rig_open(&rig);
    const uint32_t tokens = 16384; // 8 MiB, sent in messages of 4 MiB
    rig_open_spec(&rig, tokens);
    size_t bytes = RIG_BLOCK / RIG_TOKENS * tokens;
    float *payload = rig_payload(bytes, 3);
    rig_put(&rig, 5, tokens, payload, bytes);
    peer_call_t call;
    const uint32_t number = 5;
    rig_start_get(&rig, &number, 1, 0, &call);
    uint8_t *record = NULL;
    size_t got = 0, length, chunks = 0;
    for (uint8_t *message; (message = peer_receive(&call, &length)) != NULL; chunks++) {
        Balancekv__V1__RecordChunk *chunk = balancekv__v1__record_chunk__unpack(NULL, length, message);
        cr_assert_eq(chunk->record_bytes != 0, chunks == 0, "record_bytes belongs to the first chunk");
        record = chunks == 0 ? malloc(chunk->record_bytes) : record;
        memcpy(record + got, chunk->data.data, chunk->data.len);
        got += chunk->data.len;
        balancekv__v1__record_chunk__free_unpacked(chunk, NULL);
        free(message);
    }
    cr_assert_eq(peer_end(&call), GRPC_STATUS_OK);
    peer_free(&call);
    cr_assert_eq(chunks, 8);
    cr_assert_eq(memcmp(record + got - bytes, payload, bytes), 0);
    free(record);
    free(payload);
    rig_close(&rig);
}

Test(rpc_get, a_reader_that_stops_holds_its_pin_only_until_the_deadline) {
    rig_t rig;
    rig_open(&rig);
    const uint32_t tokens = 8192;
    rig_open_spec(&rig, tokens);
    size_t bytes = RIG_BLOCK / RIG_TOKENS * tokens;
    float *payload = rig_payload(bytes, 13);
    rig_put(&rig, 1, tokens, payload, bytes);
    free(payload);
    uint32_t numbers[16];
    for (int i = 0; i < 16; i++) {
        numbers[i] = 1; // 64 MiB in all
    }
    peer_call_t call;
    rig_start_get(&rig, numbers, 16, 700, &call);
    for (int i = 0; i < 500 && peer_daemon_pinned(&rig.daemon) == 0; i++) {
        usleep(1000);
    }
    cr_assert_gt(peer_daemon_pinned(&rig.daemon), 0);
    cr_assert_eq(rig_resident(&rig, 1, 1), 1, "others are served meanwhile");
    cr_assert(rig_becomes_unpinned(&rig));
    cr_assert_eq(peer_end(&call), GRPC_STATUS_DEADLINE_EXCEEDED);
    peer_free(&call);
    rig_close(&rig);
}

Test(rpc_get, a_missing_key_is_said_in_its_place_and_the_others_come) {
    rig_t rig;
    rig_open(&rig);
    float *payload = rig_payload(RIG_BLOCK, 41);
    rig_put(&rig, 1, RIG_TOKENS, payload, RIG_BLOCK);
    free(payload);
    const uint32_t numbers[] = {1, 99, 1};
    const uint32_t codes[] = {0, GRPC_STATUS_NOT_FOUND, 0};
    peer_call_t call;
    rig_start_get(&rig, numbers, 3, 0, &call);
    for (uint32_t i = 0; i < 3; i++) {
        size_t length;
        uint8_t *bytes = peer_receive(&call, &length);
        cr_assert_not_null(bytes);
        Balancekv__V1__RecordChunk *chunk = balancekv__v1__record_chunk__unpack(NULL, length, bytes);
        cr_assert(chunk->index == i && chunk->code == codes[i]);
        cr_assert_eq(chunk->data.len == 0, chunk->code != 0);
        balancekv__v1__record_chunk__free_unpacked(chunk, NULL);
        free(bytes);
    }
    cr_assert_eq(peer_end(&call), GRPC_STATUS_NOT_FOUND);
    cr_assert_eq(strncmp(call.details, "keys[1]: ", 9), 0, "%s", call.details);
    peer_free(&call);
    rig_close(&rig);
}
