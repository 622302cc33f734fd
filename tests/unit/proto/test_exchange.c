// test_exchange.c - one gRPC call at the end that asks, against a server whose calls follow a script.
#include "proto/exchange.h"

#include "tests/unit/cluster/impostor.h"

#include <criterion/criterion.h>
#include <grpc/byte_buffer.h>
#include <grpc/grpc_security.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MESSAGES   8
#define NEVER      UINT32_MAX
#define PATIENCE_S 30

// Who asks: messages of these sizes, each full of its number.
typedef struct asker {
    bkv_exchange_t exchange;
    size_t sizes[MESSAGES];
    uint32_t count, made;
    bool end_apart;                // the end is no message's
    uint32_t forget_at, refuse_at; // no memory for that message; that response is not wanted
    uint32_t taken, sent, overs;
    size_t lengths[MESSAGES]; // of responses
    bool named, gone;
} asker_t;

// What the server has seen, and is to do.
typedef struct script {
    size_t lengths[MESSAGES]; // of requests
    uint32_t seen, read_most, answers;
    bool damaged;
    grpc_status_code code;
} script_t;

typedef struct fixture {
    impostor_t *server;
    script_t script;
    grpc_completion_queue *queue;
    grpc_channel *channel;
} fixture_t;

// ---- the asker's hooks ----

static grpc_byte_buffer *on_next(bkv_exchange_t *exchange, bool *last) {
    asker_t *asker = (asker_t *)exchange;
    *last = false;
    if (asker->made == asker->forget_at) {
        return NULL;
    }
    if (asker->made == asker->count) {
        *last = true;
        return NULL;
    }
    grpc_slice slice = grpc_slice_malloc(asker->sizes[asker->made]);
    memset(GRPC_SLICE_START_PTR(slice), (int)asker->made, GRPC_SLICE_LENGTH(slice));
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    *last = ++asker->made == asker->count && !asker->end_apart;
    return message;
}

static void on_sent(bkv_exchange_t *exchange) {
    asker_t *asker = (asker_t *)exchange;
    cr_assert_eq(asker->overs, 0);
    asker->sent++;
}

static bool on_take(bkv_exchange_t *exchange, grpc_byte_buffer *message) {
    asker_t *asker = (asker_t *)exchange;
    cr_assert_eq(exchange->answered, asker->taken > 0);
    asker->lengths[asker->taken] = grpc_byte_buffer_length(message);
    return asker->taken++ != asker->refuse_at;
}

static void on_over(bkv_exchange_t *exchange) {
    asker_t *asker = (asker_t *)exchange;
    asker->overs++;
    asker->named = bkv_exchange_named(exchange);
    cr_assert(!asker->gone);
}

static void on_gone(bkv_exchange_t *exchange) {
    asker_t *asker = (asker_t *)exchange;
    cr_assert(asker->overs == 1 && !asker->gone);
    asker->gone = true;
    bkv_exchange_deinit(exchange);
}

static const bkv_exchange_hooks_t hooks = {.next = on_next, .sent = on_sent, .take = on_take, .over = on_over, .gone = on_gone};

// ---- the server's script ----

static void play(impostor_call_t *call, void *user) {
    script_t *script = user;
    uint8_t *message;
    size_t length;
    while (script->seen < script->read_most && (message = impostor_read(call, &length)) != NULL) {
        for (size_t i = 0; i < length; i++) {
            script->damaged |= message[i] != script->seen;
        }
        script->lengths[script->seen++] = length;
        free(message);
    }
    static const uint8_t zeros[MESSAGES];
    for (uint32_t i = 0; i < script->answers; i++) {
        if (!impostor_write(call, zeros, i + 1)) {
            break;
        }
    }
    if (script->code == GRPC_STATUS_UNKNOWN) {
        impostor_hush(call); // never an end
    }
    impostor_end(call, script->code, "as the script has it");
}

static void set_up(fixture_t *fixture, const script_t *script) {
    fixture->script = *script;
    fixture->server = impostor_start(play, &fixture->script);
    fixture->queue = grpc_completion_queue_create_for_next(NULL);
    char address[32];
    snprintf(address, sizeof(address), "127.0.0.1:%u", impostor_port(fixture->server));
    grpc_channel_credentials *credentials = grpc_insecure_credentials_create();
    fixture->channel = grpc_channel_create(address, credentials, NULL);
    grpc_channel_credentials_release(credentials);
}

static void tear_down(fixture_t *fixture) {
    grpc_channel_destroy(fixture->channel);
    grpc_completion_queue_shutdown(fixture->queue);
    while (grpc_completion_queue_next(fixture->queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL).type != GRPC_QUEUE_SHUTDOWN) {
    }
    grpc_completion_queue_destroy(fixture->queue);
    impostor_stop(fixture->server);
}

static gpr_timespec in_seconds(double seconds) {
    return gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_millis((int64_t)(seconds * 1000), GPR_TIMESPAN));
}

static void init(fixture_t *fixture, asker_t *asker, bkv_exchange_shape_t shape, double deadline_s) {
    bkv_exchange_init(&asker->exchange, &hooks, shape,
                      grpc_channel_create_call(fixture->channel, NULL, GRPC_PROPAGATE_DEFAULTS, fixture->queue,
                                               grpc_slice_from_static_string("/test/Ask"), NULL, in_seconds(deadline_s), NULL));
}

// Until it is gone.
static void drive(fixture_t *fixture, const asker_t *asker) {
    while (!asker->gone) {
        grpc_event event = grpc_completion_queue_next(fixture->queue, in_seconds(PATIENCE_S), NULL);
        cr_assert_eq(event.type, GRPC_OP_COMPLETE, "the exchange hangs");
        bkv_batch_tag_t *tag = event.tag;
        tag->run(tag->owner, event.success != 0);
    }
}

static void ask(fixture_t *fixture, asker_t *asker, bkv_exchange_shape_t shape, double deadline_s) {
    init(fixture, asker, shape, deadline_s);
    cr_assert(bkv_exchange_prepare(&asker->exchange));
    bkv_exchange_start(&asker->exchange);
    drive(fixture, asker);
}

// ---- tests ----

// Small messages are held back until the next: none is lost, changed or out of order, and the last goes out.
Test(exchange, an_upload_arrives_as_it_was_made, .timeout = 60) {
    for (int apart = 0; apart < 2; apart++) {
        fixture_t fixture;
        asker_t asker = {
            .sizes = {10, 1, 3000, 5, 100000, 2048, 7}, .count = 7, .end_apart = apart, .forget_at = NEVER, .refuse_at = NEVER};
        set_up(&fixture, &(script_t){.read_most = NEVER, .answers = 1});
        ask(&fixture, &asker, BKV_UPLOAD, PATIENCE_S);
        cr_assert(asker.exchange.code == GRPC_STATUS_OK && asker.exchange.answered && !asker.exchange.given_up);
        cr_assert(asker.taken == 1 && asker.lengths[0] == 1);
        tear_down(&fixture); // and with it the server's thread
        cr_assert(fixture.script.seen == 7 && !fixture.script.damaged);
        uint64_t bytes = 0;
        for (uint32_t i = 0; i < asker.count; i++) {
            cr_assert_eq(fixture.script.lengths[i], asker.sizes[i], "message %u", i);
            bytes += asker.sizes[i];
        }
        cr_assert(asker.exchange.sent_bytes == bytes && asker.sent > 0);
    }
}

Test(exchange, a_download_is_taken_until_it_ends_or_is_not_wanted, .timeout = 60) {
    const uint32_t refused[] = {NEVER, 2};
    for (int i = 0; i < 2; i++) {
        fixture_t fixture;
        asker_t asker = {.sizes = {1}, .count = 1, .forget_at = NEVER, .refuse_at = refused[i]};
        set_up(&fixture, &(script_t){.read_most = NEVER, .answers = 5});
        ask(&fixture, &asker, BKV_DOWNLOAD, PATIENCE_S);
        cr_assert_eq(asker.taken, i == 0 ? 5 : 3);
        for (uint32_t j = 0; j < asker.taken; j++) {
            cr_assert_eq(asker.lengths[j], j + 1);
        }
        cr_assert_eq(asker.exchange.given_up, i == 1);
        tear_down(&fixture);
    }
}

Test(exchange, the_end_is_the_daemons_word_or_grpcs, .timeout = 60) {
    fixture_t fixture;
    asker_t refused = {.sizes = {1}, .count = 1, .forget_at = NEVER, .refuse_at = NEVER}, unheard = refused;
    set_up(&fixture, &(script_t){.read_most = NEVER, .code = GRPC_STATUS_UNAVAILABLE});
    ask(&fixture, &refused, BKV_UNARY, PATIENCE_S);
    cr_assert(refused.exchange.code == GRPC_STATUS_UNAVAILABLE && refused.named && !refused.exchange.answered);
    tear_down(&fixture);
    set_up(&fixture, &(script_t){.read_most = NEVER, .code = GRPC_STATUS_UNKNOWN}); // says nothing
    ask(&fixture, &unheard, BKV_UNARY, 0.3);
    cr_assert(unheard.exchange.code == GRPC_STATUS_DEADLINE_EXCEEDED && !unheard.named && !unheard.exchange.answered);
    tear_down(&fixture);
}

Test(exchange, what_says_nothing_is_over_at_once, .timeout = 60) {
    fixture_t fixture;
    asker_t asker = {.forget_at = NEVER, .refuse_at = NEVER};
    set_up(&fixture, &(script_t){.read_most = NEVER});
    ask(&fixture, &asker, BKV_DOWNLOAD, PATIENCE_S);
    cr_assert(asker.exchange.empty && asker.exchange.code == GRPC_STATUS_OK && !asker.exchange.answered);
    cr_assert_eq(impostor_calls(fixture.server), 0);
    tear_down(&fixture);
}

Test(exchange, one_that_was_cancelled_before_its_start_ends_at_once, .timeout = 60) {
    fixture_t fixture;
    asker_t asker = {.sizes = {1}, .count = 1, .forget_at = NEVER, .refuse_at = NEVER};
    set_up(&fixture, &(script_t){.read_most = NEVER});
    init(&fixture, &asker, BKV_DOWNLOAD, PATIENCE_S);
    cr_assert(bkv_exchange_prepare(&asker.exchange));
    grpc_call_cancel(asker.exchange.grpc, NULL);
    bkv_exchange_start(&asker.exchange);
    drive(&fixture, &asker);
    cr_assert_eq(asker.exchange.code, GRPC_STATUS_CANCELLED);
    tear_down(&fixture);
}

Test(exchange, without_memory_for_a_message_it_is_given_up, .timeout = 60) {
    fixture_t fixture;
    set_up(&fixture, &(script_t){.read_most = NEVER, .answers = 1});
    asker_t first = {.sizes = {1, 2, 3}, .count = 3, .forget_at = 0, .refuse_at = NEVER}, third = first;
    init(&fixture, &first, BKV_UPLOAD, PATIENCE_S);
    cr_assert_not(bkv_exchange_prepare(&first.exchange));
    bkv_exchange_deinit(&first.exchange);
    third.forget_at = 2;
    ask(&fixture, &third, BKV_UPLOAD, PATIENCE_S);
    cr_assert(third.exchange.given_up && third.exchange.code == GRPC_STATUS_CANCELLED && third.taken == 0);
    tear_down(&fixture);
}

// The answer comes while what nobody reads is still on its way: the rest is not made, and it is over but once.
Test(exchange, an_early_answer_ends_an_upload, .timeout = 60) {
    fixture_t fixture;
    const size_t much = 16u << 20;
    asker_t asker = {.sizes = {much, much, much, much}, .count = 4, .forget_at = NEVER, .refuse_at = NEVER};
    set_up(&fixture, &(script_t){.read_most = 0, .code = GRPC_STATUS_RESOURCE_EXHAUSTED});
    ask(&fixture, &asker, BKV_UPLOAD, PATIENCE_S);
    cr_assert(asker.exchange.code == GRPC_STATUS_RESOURCE_EXHAUSTED && asker.named);
    cr_assert_lt(asker.made, 4);
    tear_down(&fixture);
}
