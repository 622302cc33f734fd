// The cuda-ipc transport over a fake GPU (fake_gpu.h): sessions, places and events. What becomes of it all when something fails
// is test_cuda_ipc_faults.c's; that the kernels are right, and that CUDA shares memory as it should, is tests/gpu's to say.
#include "cuda_rig.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// ---- attach ----

Test(cuda_ipc, without_a_gpu_or_when_turned_off_there_is_no_such_transport) {
    cuda_rig_t rig;
    cuda_rig_open(&rig);
    uint8_t handle[BKV_GPU_HANDLE_BYTES];
    const bkv_device_allocation_t allocation = cuda_by_handle(rig.memory, CUDA_MEMORY, handle);
    for (uint32_t gpus = 0; gpus < 2; gpus++) {
        bkv_error_t err;
        bkv_session_id_t id;
        bkv_transports_destroy(rig.fixture.transports);
        fake_gpu_plug(gpus);
        rig.fixture.config.cuda_ipc = gpus == 0;
        cr_assert_eq(bkv_transports_create(&rig.fixture.config, &rig.fixture.transports, &err), BKV_OK);
        cr_assert_eq(cuda_try_attach(&rig, &allocation, 1, &id, &err), BKV_UNIMPLEMENTED);
        cr_assert_not_null(strstr(err.message, gpus == 0 ? "no CUDA device" : "turned off"), "%s", err.message);
    }
    cuda_rig_close(&rig);
}

Test(cuda_ipc, a_device_that_the_daemon_does_not_see_is_refused) {
    cuda_rig_t rig;
    cuda_rig_open(&rig);
    bkv_error_t err;
    bkv_attach_result_t result;
    uint8_t handle[BKV_GPU_HANDLE_BYTES], uuid[BKV_CUDA_UUID_BYTES] = {1};
    const bkv_device_allocation_t allocation = cuda_by_handle(rig.memory, CUDA_MEMORY, handle);
    const bkv_attach_args_t args = {
        .kind = BKV_TRANSPORT_CUDA_IPC, .local = true, .uuid = uuid, .allocations = &allocation, .allocation_count = 1};
    cr_assert_eq(bkv_session_attach(rig.fixture.transports, &args, &result, &err), BKV_UNIMPLEMENTED);
    cr_assert_not_null(strstr(err.message, "cuda_ipc.uuid"), "%s", err.message);
    cuda_rig_close(&rig);
}

Test(cuda_ipc, allocations_that_are_none_are_refused_by_number) {
    cuda_rig_t rig;
    cuda_rig_open(&rig);
    uint8_t good[BKV_GPU_HANDLE_BYTES], garbage[BKV_GPU_HANDLE_BYTES] = {9};
    const bkv_device_allocation_t fine = cuda_by_handle(rig.memory, CUDA_MEMORY, good);
    const struct {
        bkv_device_allocation_t second;
        const char *message;
    } cases[] = {
        {{.handle = good, .bytes = 0}, "cuda_ipc.allocations[1].bytes: 0"},
        {{.handle = good, .bytes = CUDA_MEMORY + 1}, "cuda_ipc.allocations[1].bytes: 1048577"},
        {{.handle = good, .bytes = UINT64_MAX}, "cuda_ipc.allocations[1].bytes: "},
        {{.handle = garbage, .bytes = 1}, "cuda_ipc.allocations[1].handle: "},
        {{.handle = NULL, .bytes = FAKE_GRANULARITY + 1}, "cuda_ipc.allocations[1].bytes: 65537 is not a multiple"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        const bkv_device_allocation_t list[] = {fine, cases[i].second};
        bkv_error_t err;
        bkv_session_id_t id;
        cr_assert_eq(cuda_try_attach(&rig, list, 2, &id, &err), BKV_INVALID_ARGUMENT, "%s", cases[i].message);
        cr_assert_eq(strncmp(err.message, cases[i].message, strlen(cases[i].message)), 0, "%s", err.message);
        cr_assert_eq(err.status, BKV_INVALID_ARGUMENT);
        cr_assert_eq(fake_gpu_counts().imports, 0);
    }
    bkv_error_t err;
    bkv_session_id_t id;
    cr_assert_eq(cuda_try_attach(&rig, &fine, 0, &id, &err), BKV_INVALID_ARGUMENT);
    cr_assert_eq(cuda_try_attach(&rig, &fine, BKV_DEVICE_ALLOCATIONS + 1, &id, &err), BKV_INVALID_ARGUMENT);
    cuda_rig_close(&rig);
}

Test(cuda_ipc, sessions_that_name_one_allocation_share_its_mapping) {
    cuda_rig_t rig;
    cuda_rig_open(&rig);
    bkv_session_t *first = cuda_attach_memory(&rig), *second = cuda_attach_memory(&rig);
    cr_assert_eq(fake_gpu_counts().imports, 1);
    cuda_detach(&rig, first);
    cr_assert_eq(fake_gpu_counts().imports, 1);
    cuda_detach(&rig, second);
    cr_assert_eq(fake_gpu_counts().imports, 0);
    cuda_rig_close(&rig);
}

// ---- fetch ----

Test(cuda_ipc, a_block_is_compressed_where_it_lies) {
    cuda_rig_t rig;
    cuda_rig_open(&rig);
    bkv_session_t *session = cuda_attach_memory(&rig);
    static const struct {
        bkv_codec_t codec;
        uint32_t rate;
    } codecs[] = {{BKV_CODEC_RAW, 0}, {BKV_CODEC_DENSE8, 0}, {BKV_CODEC_DENSE4, 0}, {BKV_CODEC_BALANCE, 4}};
    for (uint32_t i = 0; i < 4; i++) {
        cuda_layout_t layout;
        bkv_ingest_args_t args = cuda_put_args(&rig, i, codecs[i].codec, codecs[i].rate);
        fixture_fill(&rig.fixture, CUDA_TOKENS, i, rig.memory + 256 * i);
        cuda_layout_payload(&rig, 256 * i, &layout);
        cuda_put_well(&rig, session, &args, &layout.layout);
        cuda_assert_stored(&rig, i, &args, rig.memory + 256 * i);
    }
    cr_assert_eq(fake_gpu_counts().gathers, 0);
    cuda_detach(&rig, session);
    cuda_rig_close(&rig);
}

// Pages of 16 tokens, [page][token][K of both heads, V of both heads], in reverse order; both layers far apart.
static void layout_paged(cuda_layout_t *layout) {
    *layout = (cuda_layout_t){.keys = {4096, 4096 + 400000}, .values = {4096 + 256, 4096 + 400000 + 256}};
    layout->layout = (bkv_device_layout_t){.keys = layout->keys,
                                           .values = layout->values,
                                           .layers = 2,
                                           .pages = layout->pages,
                                           .page_count = (CUDA_TOKENS + 15) / 16,
                                           .page_tokens = 16,
                                           .page_stride = 16 * 384,
                                           .token_stride = 384,
                                           .head_stride = 128,
                                           .value_token_stride = 384,
                                           .value_head_stride = 64};
    for (uint32_t i = 0; i < layout->layout.page_count; i++) {
        layout->pages[i] = 2 * (layout->layout.page_count - i);
    }
}

// Spreads a payload over the pages.
static void scatter(const cuda_rig_t *rig, const cuda_layout_t *layout, const uint8_t *payload, uint8_t *memory) {
    bkv_shape_t shape = cuda_shape(rig);
    bkv_block_t block;
    bkv_block_from_payload(&shape, payload, &block);
    for (uint32_t i = 0; i < 2 * 2 * 2 * CUDA_TOKENS; i++) {
        bool value = i % 2;
        uint32_t layer = i / 2 % 2, head = i / 4 % 2, token = i / 8;
        const bkv_stride_t *stride = value ? &block.value_stride : &block.key_stride;
        const uint8_t *from = (const uint8_t *)(value ? block.values : block.keys) + layer * stride->layer +
                              head * stride->head + token * stride->token;
        uint64_t to = (value ? layout->values : layout->keys)[layer] + layout->pages[token / 16] * layout->layout.page_stride +
                      token % 16 * 384 + head * (value ? 64u : 128u);
        memcpy(memory + to, from, value ? 64 : 128);
    }
}

Test(cuda_ipc, blocks_in_pages_are_gathered_first) {
    cuda_rig_t rig;
    cuda_rig_open(&rig);
    bkv_session_t *session = cuda_attach_memory(&rig);
    uint8_t *payload = malloc(CUDA_MEMORY);
    cuda_layout_t layout;
    layout_paged(&layout);
    bkv_ingest_args_t args = cuda_put_args(&rig, 1, BKV_CODEC_DENSE8, 0);
    fixture_fill(&rig.fixture, CUDA_TOKENS, 5, payload);
    scatter(&rig, &layout, payload, rig.memory);
    cuda_put_well(&rig, session, &args, &layout.layout);
    cuda_assert_stored(&rig, 1, &args, payload);
    cr_assert_eq(fake_gpu_counts().gathers, 1);
    free(payload);
    cuda_detach(&rig, session);
    cuda_rig_close(&rig);
}

Test(cuda_ipc, chunks_are_one_piece_once_all_of_them_have_come) {
    cuda_rig_t rig;
    cuda_rig_open(&rig);
    uint8_t *chunks = fake_gpu_alloc(3 * FAKE_GRANULARITY, true), handle[BKV_GPU_HANDLE_BYTES];
    const bkv_device_allocation_t list[] = {cuda_by_handle(rig.memory, CUDA_MEMORY, handle),
                                            {NULL, FAKE_GRANULARITY},
                                            {NULL, FAKE_GRANULARITY},
                                            {NULL, FAKE_GRANULARITY}};
    bkv_session_t *session = cuda_attach(&rig, list, 4);
    cuda_layout_t layout;
    bkv_error_t err;
    outcome_t outcome;
    bkv_ingest_args_t args = cuda_put_args(&rig, 1, BKV_CODEC_RAW, 0);
    cuda_layout_payload(&rig, CUDA_MEMORY + FAKE_GRANULARITY - 4096, &layout); // across both borders
    fixture_fill(&rig.fixture, CUDA_TOKENS, 3, chunks + FAKE_GRANULARITY - 4096);
    const bkv_place_t place = {.layout = &layout.layout};
    const bkv_transport_ops_t *ops = session->ops;
    static const uint32_t order[] = {3, 1, 2};
    for (int i = 0; i < 3; i++) {
        cr_assert_eq(cuda_put(&rig, session, &args, &place, &outcome, &err), BKV_FAILED_PRECONDITION);
        cr_assert_not_null(strstr(err.message, "descriptor"), "%s", err.message);
        int fd;
        cr_assert_eq(bkv_gpu_export_chunk(chunks + (order[i] - 1) * FAKE_GRANULARITY, &fd), 0);
        cr_assert_eq(ops->give_fd(session->self, session->state, order[i], fd, &err), BKV_OK, "%s", err.message);
    }
    cuda_put_well(&rig, session, &args, &layout.layout);
    cuda_assert_stored(&rig, 1, &args, chunks + FAKE_GRANULARITY - 4096);
    size_t descriptors = open_descriptors();
    cr_assert_eq(ops->give_fd(session->self, session->state, 1, dup(0), &err), BKV_INVALID_ARGUMENT);
    cr_assert_eq(ops->give_fd(session->self, session->state, 0, dup(0), &err), BKV_INVALID_ARGUMENT);
    cr_assert_eq(ops->give_fd(session->self, session->state, 4, dup(0), &err), BKV_INVALID_ARGUMENT);
    cr_assert_eq(open_descriptors(), descriptors);
    cuda_detach(&rig, session);
    cuda_rig_close(&rig);
}

Test(cuda_ipc, a_descriptor_that_is_no_chunk_is_refused_and_another_may_come) {
    cuda_rig_t rig;
    cuda_rig_open(&rig);
    uint8_t *chunk = fake_gpu_alloc(FAKE_GRANULARITY, true);
    const bkv_device_allocation_t list[] = {{NULL, FAKE_GRANULARITY}, {NULL, 2 * FAKE_GRANULARITY}};
    bkv_session_t *session = cuda_attach(&rig, list, 2);
    bkv_error_t err;
    int fd, ends[2];
    cr_assert_eq(pipe(ends), 0);
    cr_assert_eq(session->ops->give_fd(session->self, session->state, 0, ends[0], &err), BKV_INVALID_ARGUMENT);
    close(ends[1]);
    cr_assert_eq(bkv_gpu_export_chunk(chunk, &fd), 0);
    cr_assert_eq(session->ops->give_fd(session->self, session->state, 1, fd, &err), BKV_INVALID_ARGUMENT, "too small");
    cr_assert_eq(bkv_gpu_export_chunk(chunk, &fd), 0);
    cr_assert_eq(session->ops->give_fd(session->self, session->state, 0, fd, &err), BKV_OK, "%s", err.message);
    cuda_detach(&rig, session);
    cuda_rig_close(&rig);
}

Test(cuda_ipc, what_does_not_lie_in_the_session_is_refused_and_nothing_is_left) {
    cuda_rig_t rig;
    cuda_rig_open(&rig);
    bkv_session_t *session = cuda_attach_memory(&rig);
    cuda_layout_t layout;
    bkv_error_t err;
    outcome_t outcome;
    bkv_ingest_args_t args = cuda_put_args(&rig, 1, BKV_CODEC_RAW, 0);
    cuda_layout_payload(&rig, CUDA_MEMORY - args.payload_bytes + 16, &layout);
    const bkv_place_t place = {.layout = &layout.layout};
    cr_assert_eq(cuda_put(&rig, session, &args, &place, &outcome, &err), BKV_INVALID_ARGUMENT);
    cr_assert_eq(strncmp(err.message, "place.layout.", 13), 0, "%s", err.message);
    args = cuda_put_args(&rig, 2, BKV_CODEC_BALANCE, 64);
    args.tokens = 1;
    args.payload_bytes /= CUDA_TOKENS;
    cuda_layout_payload(&rig, 0, &layout);
    cr_assert_eq(cuda_put(&rig, session, &args, &place, &outcome, &err), BKV_INVALID_ARGUMENT);
    cr_assert_not_null(strstr(err.message, "too few for rate"), "%s", err.message);
    cuda_detach(&rig, session);
    cuda_rig_close(&rig);
}

Test(cuda_ipc, values_that_no_record_may_hold_fail_their_own_block) {
    cuda_rig_t rig;
    cuda_rig_open(&rig);
    bkv_session_t *session = cuda_attach_memory(&rig);
    cuda_layout_t good, bad;
    bkv_error_t err;
    outcome_t outcomes[2];
    fixture_fill(&rig.fixture, CUDA_TOKENS, 1, rig.memory);
    memcpy(rig.memory + 131072, rig.memory, 131072);
    memset(rig.memory + 131072, 0xff, 4); // NaN
    cuda_layout_payload(&rig, 0, &good);
    cuda_layout_payload(&rig, 131072, &bad);
    const bkv_place_t places[] = {{.layout = &good.layout}, {.layout = &bad.layout}};
    fake_gpu_hold(true); // so that both are in one batch, or may be
    for (uint32_t i = 0; i < 2; i++) {
        bkv_ingest_args_t args = cuda_put_args(&rig, i, BKV_CODEC_DENSE4, 0);
        cr_assert_eq(cuda_put(&rig, session, &args, &places[i], &outcomes[i], &err), BKV_OK, "%s", err.message);
    }
    fake_gpu_hold(false);
    outcome_wait(&outcomes[0]);
    outcome_wait(&outcomes[1]);
    cr_assert_eq(outcomes[0].error.status, BKV_OK, "%s", outcomes[0].error.message);
    cr_assert_eq(outcomes[1].error.status, BKV_INVALID_ARGUMENT);
    cr_assert_not_null(strstr(outcomes[1].error.message, "NaN"), "%s", outcomes[1].error.message);
    cuda_detach(&rig, session);
    cuda_rig_close(&rig);
}

Test(cuda_ipc, a_key_that_is_there_already_needs_no_gpu) {
    cuda_rig_t rig;
    cuda_rig_open(&rig);
    bkv_session_t *session = cuda_attach_memory(&rig);
    cuda_layout_t layout;
    bkv_error_t err;
    outcome_t outcome;
    fixture_fill(&rig.fixture, CUDA_TOKENS, 1, rig.memory);
    cuda_layout_payload(&rig, 0, &layout);
    bkv_ingest_args_t args = cuda_put_args(&rig, 1, BKV_CODEC_RAW, 0);
    const bkv_place_t place = {.layout = &layout.layout};
    cuda_put_well(&rig, session, &args, &layout.layout);
    uint32_t before = fake_gpu_counts().compressions;
    cr_assert_eq(cuda_put(&rig, session, &args, &place, &outcome, &err), BKV_OK);
    outcome_wait(&outcome);
    cr_assert(outcome.error.status == BKV_OK && outcome.put.duplicate);
    cr_assert_eq(fake_gpu_counts().compressions, before);
    cuda_detach(&rig, session);
    cuda_rig_close(&rig);
}

// ---- deliver ----

Test(cuda_ipc, a_record_is_taken_to_its_place_also_across_allocations) {
    cuda_rig_t rig;
    cuda_rig_open(&rig);
    uint8_t *second = fake_gpu_alloc(CUDA_MEMORY, false), handles[2][BKV_GPU_HANDLE_BYTES];
    const bkv_device_allocation_t list[] = {cuda_by_handle(rig.memory, CUDA_MEMORY, handles[0]),
                                            cuda_by_handle(second, CUDA_MEMORY, handles[1])};
    bkv_session_t *session = cuda_attach(&rig, list, 2);
    fixture_put(&rig.fixture, 7, CUDA_TOKENS);
    bkv_delivery_t delivery = fixture_deliver(&rig.fixture, 7);
    static const uint64_t offsets[] = {0, 64, CUDA_MEMORY - 4096, CUDA_MEMORY};
    for (size_t i = 0; i < 4; i++) {
        bkv_error_t err;
        outcome_t outcome;
        const bkv_place_t place = {.offset = offsets[i], .bytes = delivery.length};
        outcome_init(&outcome);
        memset(rig.memory, 0xaa, CUDA_MEMORY);
        memset(second, 0xaa, CUDA_MEMORY);
        cr_assert_eq(bkv_session_deliver(session, &place, &delivery, outcome_delivered, &outcome, &err), BKV_OK, "%s",
                     err.message);
        outcome_wait(&outcome);
        cr_assert_eq(outcome.error.status, BKV_OK, "%s", outcome.error.message);
        for (uint64_t at = 0; at < 2 * CUDA_MEMORY; at++) {
            uint8_t byte = at < CUDA_MEMORY ? rig.memory[at] : second[at - CUDA_MEMORY];
            bool inside = at >= offsets[i] && at < offsets[i] + delivery.length;
            cr_assert_eq(byte, inside ? delivery.data[at - offsets[i]] : 0xaa, "%llu", (unsigned long long)at);
        }
    }
    bkv_delivery_release(rig.fixture.pipeline, &delivery);
    cuda_detach(&rig, session);
    cuda_rig_close(&rig);
}

// ---- events ----

Test(cuda_ipc, a_block_waits_for_its_event_and_no_other_does) {
    cuda_rig_t rig;
    cuda_rig_open(&rig);
    bkv_session_t *session = cuda_attach_memory(&rig);
    cuda_layout_t layout;
    bkv_error_t err;
    outcome_t outcome;
    uint8_t handle[BKV_GPU_HANDLE_BYTES];
    void *event = fake_gpu_event(handle);
    cuda_layout_payload(&rig, 0, &layout);
    memset(rig.memory, 0, CUDA_MEMORY); // what is there before the event comes
    bkv_ingest_args_t late = cuda_put_args(&rig, 1, BKV_CODEC_RAW, 0), other = cuda_put_args(&rig, 2, BKV_CODEC_RAW, 0);
    const bkv_place_t place = {.layout = &layout.layout, .event = handle};
    cr_assert_eq(cuda_put(&rig, session, &late, &place, &outcome, &err), BKV_OK, "%s", err.message);
    for (int i = 0; i < 10; i++) {
        cuda_put_well(&rig, session, &other, &layout.layout);
        usleep(1000);
    }
    cr_assert_neq(sem_trywait(&outcome.called), 0, "it must not begin before its event");
    fixture_fill(&rig.fixture, CUDA_TOKENS, 9, rig.memory);
    fake_gpu_event_come(event);
    outcome_wait(&outcome);
    cr_assert_eq(outcome.error.status, BKV_OK, "%s", outcome.error.message);
    cuda_assert_stored(&rig, 1, &late, rig.memory);
    cuda_detach(&rig, session);
    cuda_rig_close(&rig);
}

Test(cuda_ipc, the_end_of_a_session_is_the_end_of_waiting_for_its_events) {
    cuda_rig_t rig;
    cuda_rig_open(&rig);
    bkv_session_t *session = cuda_attach_memory(&rig);
    cuda_layout_t layout;
    bkv_error_t err;
    outcome_t put_outcome, get_outcome;
    uint8_t handle[BKV_GPU_HANDLE_BYTES];
    fake_gpu_event(handle); // which never comes: its process has died
    cuda_layout_payload(&rig, 0, &layout);
    fixture_put(&rig.fixture, 7, CUDA_TOKENS);
    bkv_delivery_t delivery = fixture_deliver(&rig.fixture, 7);
    bkv_ingest_args_t args = cuda_put_args(&rig, 1, BKV_CODEC_RAW, 0);
    const bkv_place_t from = {.layout = &layout.layout, .event = handle}, to = {.bytes = delivery.length, .event = handle};
    outcome_init(&get_outcome);
    cr_assert_eq(cuda_put(&rig, session, &args, &from, &put_outcome, &err), BKV_OK);
    cr_assert_eq(bkv_session_deliver(session, &to, &delivery, outcome_delivered, &get_outcome, &err), BKV_OK);
    usleep(5000);
    cuda_detach(&rig, session);
    outcome_wait(&put_outcome);
    outcome_wait(&get_outcome);
    cr_assert_eq(put_outcome.error.status, BKV_FAILED_PRECONDITION);
    cr_assert_eq(get_outcome.error.status, BKV_FAILED_PRECONDITION);
    bkv_delivery_release(rig.fixture.pipeline, &delivery);
    cuda_rig_close(&rig);
}

Test(cuda_ipc, an_event_that_is_none_is_refused) {
    cuda_rig_t rig;
    cuda_rig_open(&rig);
    bkv_session_t *session = cuda_attach_memory(&rig);
    cuda_layout_t layout;
    bkv_error_t err;
    outcome_t outcome;
    const uint8_t garbage[BKV_GPU_HANDLE_BYTES] = {5};
    cuda_layout_payload(&rig, 0, &layout);
    bkv_ingest_args_t args = cuda_put_args(&rig, 1, BKV_CODEC_RAW, 0);
    const bkv_place_t place = {.layout = &layout.layout, .event = garbage};
    cr_assert_eq(cuda_put(&rig, session, &args, &place, &outcome, &err), BKV_OK);
    outcome_wait(&outcome);
    cr_assert_eq(outcome.error.status, BKV_INVALID_ARGUMENT);
    cr_assert_eq(strncmp(outcome.error.message, "place.event: ", 13), 0, "%s", outcome.error.message);
    cuda_detach(&rig, session);
    cuda_rig_close(&rig);
}

// More events than a session keeps open.
Test(cuda_ipc, events_are_opened_again_when_their_place_is_needed) {
    cuda_rig_t rig;
    cuda_rig_open(&rig);
    bkv_session_t *session = cuda_attach_memory(&rig);
    cuda_layout_t layout;
    bkv_error_t err;
    fixture_fill(&rig.fixture, CUDA_TOKENS, 1, rig.memory);
    cuda_layout_payload(&rig, 0, &layout);
    uint8_t handles[150][BKV_GPU_HANDLE_BYTES];
    for (uint32_t i = 0; i < 300; i++) {
        outcome_t outcome;
        if (i < 150) {
            fake_gpu_event_come(fake_gpu_event(handles[i]));
        }
        bkv_ingest_args_t args = cuda_put_args(&rig, i, BKV_CODEC_DENSE4, 0);
        const bkv_place_t place = {.layout = &layout.layout, .event = handles[i % 150]};
        cr_assert_eq(cuda_put(&rig, session, &args, &place, &outcome, &err), BKV_OK);
        outcome_wait(&outcome);
        cr_assert_eq(outcome.error.status, BKV_OK, "%s", outcome.error.message);
        cr_assert_leq(fake_gpu_counts().events, 128 + 3);
    }
    cuda_detach(&rig, session);
    cuda_rig_close(&rig);
}
