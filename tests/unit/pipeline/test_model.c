// test_model.c - spec ids against one computed outside of C, every check of a spec, and the table under readers.
#include "daemon/pipeline/model.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

static bkv_model_t example(void) {
    return (bkv_model_t){
        .name = "llama-3@r1",
        .tenant_name = "alice",
        .shape = {.layers = 32, .heads = 8, .key_dim = 128, .dtype = BKV_BF16},
        .params = {.sink = 32, .seed = 7},
    };
}

// SHA-256 over the encoding that model.h documents, by Python's hashlib.
Test(pipeline_model, id_is_the_documented_one) {
    const uint8_t expected[16] = {0xa2, 0x71, 0x34, 0x38, 0x53, 0x73, 0x43, 0xda,
                                  0xc4, 0xef, 0x9b, 0xb6, 0xca, 0xbb, 0x33, 0x43};
    bkv_model_t model = example();
    cr_assert_eq(bkv_model_complete(&model, NULL), BKV_OK);
    cr_assert_arr_eq(model.id.bytes, expected, sizeof(expected));
    cr_assert_eq(model.tenant, UINT64_C(0xaf000e7fc906d82b));
    cr_assert_eq(bkv_tenant_tag(""), UINT64_C(0x141cfc9842c4b0e3));
}

static void fill_shares(uint8_t shares[256]) {
    for (int i = 0; i < 256; i++) {
        shares[i] = (uint8_t)(i % 255 + 1);
    }
}

Test(pipeline_model, shares_end_the_documented_encoding) {
    const uint8_t expected[16] = {0x42, 0x04, 0x48, 0x0a, 0xca, 0x9e, 0xb4, 0xe9,
                                  0x24, 0x9c, 0x8f, 0xea, 0xfd, 0xb9, 0x39, 0x56};
    uint8_t shares[256];
    fill_shares(shares);
    bkv_model_t model = example();
    model.params.shares = shares;
    model.share_count = sizeof(shares);
    cr_assert_eq(bkv_model_complete(&model, NULL), BKV_OK);
    cr_assert_arr_eq(model.id.bytes, expected, sizeof(expected));
    cr_assert_eq(model.params.shares, shares);
}

Test(pipeline_model, equal_shares_are_none) {
    uint8_t shares[256];
    memset(shares, 9, sizeof(shares));
    bkv_model_t none = example(), equal = example();
    equal.params.shares = shares;
    equal.share_count = sizeof(shares);
    cr_assert_eq(bkv_model_complete(&none, NULL), BKV_OK);
    cr_assert_eq(bkv_model_complete(&equal, NULL), BKV_OK);
    cr_assert_arr_eq(none.id.bytes, equal.id.bytes, sizeof(none.id.bytes));
    cr_assert(equal.params.shares == NULL && equal.share_count == 0);
}

Test(pipeline_model, table_keeps_shares_of_its_own) {
    bkv_model_table_t *table = bkv_model_table_create(2);
    uint8_t shares[256], given[256];
    fill_shares(shares);
    memcpy(given, shares, sizeof(given));
    bkv_model_t model = example();
    model.params.shares = given;
    model.share_count = sizeof(given);
    cr_assert_eq(bkv_model_complete(&model, NULL), BKV_OK);
    cr_assert_eq(bkv_model_table_add(table, &model, NULL), BKV_OK);
    cr_assert_eq(bkv_model_table_add(table, &model, NULL), BKV_OK);
    memset(given, 1, sizeof(given));
    const bkv_model_t *found = bkv_model_table_find(table, &model.id);
    cr_assert(found->params.shares != given && found->share_count == sizeof(shares));
    cr_assert_arr_eq(found->params.shares, shares, sizeof(shares));
    bkv_model_table_destroy(table);
}

Test(pipeline_model, bad_shares_are_named) {
    uint8_t shares[256];
    bkv_error_t err;
    fill_shares(shares);
    for (size_t count = 1; count <= 257; count += count == 1 ? 254 : 2) { // 1, 255, 257
        bkv_model_t model = example();
        model.params.shares = shares;
        model.share_count = count;
        cr_assert_eq(bkv_model_complete(&model, &err), BKV_INVALID_ARGUMENT);
        cr_assert_not_null(strstr(err.message, "spec.shares: "), "%s", err.message);
    }
    shares[3 * 8 + 5] = 0;
    bkv_model_t model = example();
    model.params.shares = shares;
    model.share_count = sizeof(shares);
    cr_assert_eq(bkv_model_complete(&model, &err), BKV_INVALID_ARGUMENT);
    cr_assert_str_eq(err.message, "spec.shares: 0 for layer 3, head 5 is not within 1..255");
}

Test(pipeline_model, defaults_spelled_out_are_the_same_spec) {
    bkv_model_t implicit = example(), explicit = example();
    explicit.shape.value_dim = 128;
    explicit.shape.tokens = 256;
    explicit.tp_size = 1;
    explicit.params.codec = BKV_CODEC_BALANCE;
    explicit.params.rate = 16;
    cr_assert_eq(bkv_model_complete(&implicit, NULL), BKV_OK);
    cr_assert_eq(bkv_model_complete(&explicit, NULL), BKV_OK);
    cr_assert_arr_eq(implicit.id.bytes, explicit.id.bytes, sizeof(implicit.id.bytes));
    cr_assert_eq(implicit.shape.tokens, 256);
    cr_assert_eq(implicit.shape.value_dim, 128);
}

// Changes one field, by number; false when there are no more.
static bool change(bkv_model_t *model, int field) {
    switch (field) {
    case 0:
        return strcpy(model->name, "llama-3@r2") != NULL;
    case 1:
        return strcpy(model->tenant_name, "bob") != NULL;
    case 2:
        return model->shape.layers++, true;
    case 3:
        return model->shape.heads++, true;
    case 4:
        return model->shape.key_dim = 64, model->shape.value_dim = 128, true;
    case 5:
        return model->shape.value_dim = 64, true;
    case 6:
        return model->shape.dtype = BKV_FP16, true;
    case 7:
        return model->shape.tokens = 128, true;
    case 8:
        return model->tp_size = 2, true;
    case 9:
        return model->tp_size = 2, model->tp_rank = 1, true;
    case 10:
        return model->params.codec = BKV_CODEC_RAW, true;
    case 11:
        return model->params.rate = 8, true;
    case 12:
        return model->params.sink = 0, true;
    case 13:
        return model->params.seed = UINT64_C(7) << 32, true;
    default:
        return false;
    }
}

Test(pipeline_model, every_field_enters_the_id) {
    bkv_model_t models[16];
    int count = 0;
    models[count] = example();
    cr_assert_eq(bkv_model_complete(&models[count++], NULL), BKV_OK);
    for (int field = 0;; field++) {
        models[count] = example();
        if (!change(&models[count], field)) {
            break;
        }
        bkv_error_t err;
        cr_assert_eq(bkv_model_complete(&models[count], &err), BKV_OK, "field %d: %s", field, err.message);
        for (int i = 0; i < count; i++) {
            cr_assert_neq(memcmp(models[i].id.bytes, models[count].id.bytes, 16), 0, "fields %d and %d", i - 1, field);
        }
        count++;
    }
    cr_assert_eq(count, 15);
}

static void refused(bkv_model_t model, const char *message_start) {
    bkv_error_t err = {.message = ""};
    cr_assert_eq(bkv_model_complete(&model, &err), BKV_INVALID_ARGUMENT, "%s was taken", message_start);
    cr_assert_eq(strncmp(err.message, message_start, strlen(message_start)), 0, "\"%s\", expected \"%s...\"", err.message,
                 message_start);
}

#define REFUSED(message, ...)                                                                                                  \
    do {                                                                                                                       \
        bkv_model_t model = example();                                                                                         \
        __VA_ARGS__;                                                                                                           \
        refused(model, message);                                                                                               \
    } while (0)

Test(pipeline_model, bad_fields_are_named) {
    REFUSED("spec.model: empty", model.name[0] = '\0');
    REFUSED("spec.model: not UTF-8", strcpy(model.name, "ab\xff"));
    REFUSED("spec.tenant: not UTF-8", strcpy(model.tenant_name, "\xc0\x80"));
    REFUSED("spec.layers: 0", model.shape.layers = 0);
    REFUSED("spec.layers: 4294967295", model.shape.layers = UINT32_MAX);
    REFUSED("spec.kv_heads: 0", model.shape.heads = 0);
    REFUSED("spec.kv_heads: 1025", model.shape.heads = 1025);
    REFUSED("spec.kv_heads: 1024 layers of 1024 heads", model.shape.layers = model.shape.heads = 1024);
    REFUSED("spec.key_dim: 130 is not a multiple of 8", model.shape.key_dim = 130);
    REFUSED("spec.key_dim: 0", model.shape.key_dim = 0);
    REFUSED("spec.value_dim: 2048", model.shape.value_dim = 2048);
    REFUSED("spec.dtype: 0", model.shape.dtype = 0);
    REFUSED("spec.dtype: 9", model.shape.dtype = 9);
    REFUSED("spec.block_tokens: 65537", model.shape.tokens = 65537);
    REFUSED("spec.tp_rank: 1 is not below tp_size 1", model.tp_rank = 1);
    REFUSED("spec.codec: 5", model.params.codec = 5);
    REFUSED("spec.rate: 1", model.params.rate = 1);
    REFUSED("spec.rate: 65", model.params.rate = 65);
}

Test(pipeline_model, table_is_bounded_and_idempotent) {
    bkv_model_table_t *table = bkv_model_table_create(3);
    bkv_model_t model = example();
    for (int round = 0; round < 2; round++) {
        for (uint64_t seed = 0; seed < 3; seed++) {
            model.params.seed = seed;
            cr_assert_eq(bkv_model_complete(&model, NULL), BKV_OK);
            cr_assert_eq(bkv_model_table_add(table, &model, NULL), BKV_OK);
        }
    }
    cr_assert_eq(bkv_model_table_count(table), 3);
    bkv_error_t err;
    model.params.seed = 3;
    cr_assert_eq(bkv_model_complete(&model, NULL), BKV_OK);
    cr_assert_eq(bkv_model_table_add(table, &model, &err), BKV_RESOURCE_EXHAUSTED);
    cr_assert_not_null(strstr(err.message, "max_specs"));
    cr_assert_null(bkv_model_table_find(table, &model.id));
    model.params.seed = 1;
    cr_assert_eq(bkv_model_complete(&model, NULL), BKV_OK);
    cr_assert_eq(bkv_model_table_find(table, &model.id)->params.seed, 1);
    bkv_model_table_destroy(table);
}

#define RACE_MODELS 200

typedef struct race {
    bkv_model_table_t *table;
    bkv_model_t models[RACE_MODELS];
    _Atomic bool all_added;
} race_t;

static void *read_race(void *argument) {
    race_t *race = argument;
    bool last;
    do {
        last = atomic_load(&race->all_added);
        for (int i = 0; i < RACE_MODELS; i++) {
            const bkv_model_t *found = bkv_model_table_find(race->table, &race->models[i].id);
            cr_assert(found != NULL ? found->params.seed == (uint64_t)i : !last);
        }
    } while (!last);
    return NULL;
}

Test(pipeline_model, readers_see_whole_models) {
    static race_t race;
    race.table = bkv_model_table_create(RACE_MODELS);
    for (int i = 0; i < RACE_MODELS; i++) {
        race.models[i] = example();
        race.models[i].params.seed = (uint64_t)i;
        cr_assert_eq(bkv_model_complete(&race.models[i], NULL), BKV_OK);
    }
    pthread_t readers[2];
    for (int i = 0; i < 2; i++) {
        pthread_create(&readers[i], NULL, read_race, &race);
    }
    for (int i = 0; i < RACE_MODELS; i++) {
        cr_assert_eq(bkv_model_table_add(race.table, &race.models[i], NULL), BKV_OK);
    }
    atomic_store(&race.all_added, true);
    for (int i = 0; i < 2; i++) {
        pthread_join(readers[i], NULL);
    }
    bkv_model_table_destroy(race.table);
}
