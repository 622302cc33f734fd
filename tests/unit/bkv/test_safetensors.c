// test_safetensors.c - client/bkv/safetensors*.c: round trips, files as Python writes them, and files nobody should trust.
#include "client/bkv/safetensors.h"
#include "synthetic.h"

// A file in memory: an 8-byte length, `header`, `data_bytes` zeros. The caller frees.
static uint8_t *compose(const char *header, size_t data_bytes, size_t *length) {
    size_t n = strlen(header);
    uint8_t *bytes = calloc(1, 8 + n + data_bytes);
    for (int i = 0; i < 8; i++) {
        bytes[i] = (uint8_t)((uint64_t)n >> (8 * i));
    }
    memcpy(bytes + 8, header, n);
    *length = 8 + n + data_bytes;
    return bytes;
}

static bkv_status_t parse(const char *header, size_t data_bytes, bkv_error_t *err) {
    size_t length;
    uint8_t *bytes = compose(header, data_bytes, &length);
    bkv_safetensors_t *file = NULL;
    bkv_status_t status = bkv_safetensors_parse(bytes, length, &file, err);
    bkv_safetensors_close(file);
    free(bytes);
    return status;
}

Test(safetensors, round_trip) {
    char path[64];
    scratch_path(path);
    const uint16_t halves[6] = {1, 2, 3, 4, 5, 6};
    const int32_t ids[2] = {-7, 9};
    const bkv_tensor_t tensors[] = {
        {.name = "k.0", .type = BKV_TENSOR_F16, .rank = 3, .shape = {1, 2, 3}},
        {.name = "ids", .type = BKV_TENSOR_I32, .rank = 1, .shape = {2}},
        {.name = "empty", .type = BKV_TENSOR_F32, .rank = 2, .shape = {0, 5}},
        {.name = "scalar", .type = BKV_TENSOR_U8, .rank = 0},
    };
    const char *const metadata[][2] = {{"model", "tiny \"quoted\""}, {"rate", "16"}};
    bkv_safetensors_writer_t *writer;
    bkv_safetensors_t *file;
    cr_assert_eq(bkv_safetensors_create(path, tensors, 4, metadata, 2, &writer, NULL), BKV_OK);
    cr_expect_neq(access(path, F_OK), 0, "a file in the making is not in place");
    cr_assert_eq(bkv_safetensors_write(writer, halves, 4, NULL), BKV_OK);
    cr_assert_eq(bkv_safetensors_write(writer, halves + 2, 8, NULL), BKV_OK);
    cr_assert_eq(bkv_safetensors_write(writer, ids, sizeof ids, NULL), BKV_OK);
    cr_assert_eq(bkv_safetensors_write(writer, "x", 1, NULL), BKV_OK);
    cr_assert_eq(bkv_safetensors_finish(writer, NULL), BKV_OK);

    cr_assert_eq(bkv_safetensors_open(path, &file, NULL), BKV_OK);
    cr_expect_eq(bkv_safetensors_count(file), 4);
    const bkv_tensor_t *k = bkv_safetensors_find(file, "k.0");
    cr_assert_not_null(k);
    cr_expect(k->type == BKV_TENSOR_F16 && k->rank == 3 && k->shape[0] == 1 && k->shape[1] == 2 && k->shape[2] == 3);
    cr_expect_eq(memcmp(k->data, halves, sizeof halves), 0);
    cr_expect_eq(memcmp(bkv_safetensors_find(file, "ids")->data, ids, sizeof ids), 0);
    cr_expect_eq(bkv_safetensors_find(file, "empty")->bytes, 0);
    cr_expect_eq(*bkv_safetensors_find(file, "scalar")->data, 'x');
    cr_expect_null(bkv_safetensors_find(file, "k.1"));
    cr_expect_str_eq(bkv_safetensors_metadata(file, "model"), "tiny \"quoted\"");
    cr_expect_null(bkv_safetensors_metadata(file, "none"));
    bkv_safetensors_close(file);
    unlink(path);
}

Test(safetensors, a_writer_counts_bytes) {
    char path[64];
    scratch_path(path);
    const bkv_tensor_t tensor = {.name = "a", .type = BKV_TENSOR_F32, .rank = 1, .shape = {2}};
    bkv_safetensors_writer_t *writer;
    float data[3] = {0};
    cr_assert_eq(bkv_safetensors_create(path, &tensor, 1, NULL, 0, &writer, NULL), BKV_OK);
    cr_expect_eq(bkv_safetensors_write(writer, data, sizeof data, NULL), BKV_INVALID_ARGUMENT);
    cr_assert_eq(bkv_safetensors_write(writer, data, 4, NULL), BKV_OK);
    cr_expect_eq(bkv_safetensors_finish(writer, NULL), BKV_INVALID_ARGUMENT);
    cr_expect_neq(access(path, F_OK), 0, "nothing remains of a file that came out wrong");
    cr_expect_neq(bkv_safetensors_create("/nonexistent/x", &tensor, 1, NULL, 0, &writer, NULL), BKV_OK);
}

// Byte for byte what Python's json.dumps, as used by writers in the wild, puts into a header.
Test(safetensors, reads_what_python_writes) {
    size_t length;
    bkv_safetensors_t *file;
    uint8_t *bytes = compose("{\"__metadata__\": {\"tokens\": \"2\"}, \"ids\": {\"dtype\": \"I32\", \"shape\": [2], "
                             "\"data_offsets\": [0, 8]}, \"q.0\": {\"dtype\": \"F16\", \"shape\": [1, 2, 1], "
                             "\"data_offsets\": [8, 12]}}     ",
                             12, &length);
    cr_assert_eq(bkv_safetensors_parse(bytes, length, &file, NULL), BKV_OK);
    cr_expect_str_eq(bkv_safetensors_metadata(file, "tokens"), "2");
    cr_expect_eq(bkv_safetensors_find(file, "q.0")->data, bytes + length - 4);
    bkv_safetensors_close(file);
    free(bytes);
}

#define T(dtype, shape, offsets) "{\"a\":{\"dtype\":" dtype ",\"shape\":" shape ",\"data_offsets\":" offsets "}}"

Test(safetensors, refuses_what_is_wrong) {
    const struct {
        const char *header, *names;
        size_t data;
    } bad[] = {
        {"", "header", 0},
        {"[]", "header", 0},
        {"nonsense", "header", 0},
        {"{\"a\":1}", "a.dtype", 0},
        {"{\"a\":{}}", "a.dtype", 0},
        {T("\"F99\"", "[1]", "[0,4]"), "a.dtype", 4},
        {T("5", "[1]", "[0,4]"), "a.dtype", 4},
        {T("\"F32\"", "1", "[0,4]"), "a.shape", 4},
        {T("\"F32\"", "[-1]", "[0,4]"), "a.shape", 4},
        {T("\"F32\"", "[1.5]", "[0,4]"), "a.shape", 4},
        {T("\"F32\"", "[1,1,1,1,1,1,1,1,1]", "[0,4]"), "a.shape", 4},
        {T("\"F32\"", "[4611686018427387904,4]", "[0,4]"), "a.shape: too large", 4},
        {T("\"F32\"", "[9223372036854775807,9223372036854775807]", "[0,4]"), "a.shape", 4},
        {T("\"F32\"", "[1]", "[0,5]"), "a.data_offsets", 4},
        {T("\"F32\"", "[1]", "[4,0]"), "a.data_offsets", 4},
        {T("\"F32\"", "[1]", "[-4,0]"), "a.data_offsets", 4},
        {T("\"F32\"", "[1]", "[0,4,8]"), "a.data_offsets", 4},
        {T("\"F32\"", "[1]", "[0,\"4\"]"), "a.data_offsets", 4},
        {T("\"F32\"", "[1]", "{}"), "a.data_offsets", 4},
        {T("\"F32\"", "[2]", "[0,4]"), "a.data_offsets: 4 bytes, but its shape needs 8", 4},
        {T("\"F32\"", "[1]", "[0,4]"), "belong to no tensor", 5},
        {T("\"F32\"", "[1]", "[1,5]"), "hole or an overlap", 5},
        {"{\"__metadata__\":[]}", "__metadata__", 0},
        {"{\"__metadata__\":{\"a\":1}}", "__metadata__.a", 0},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},\"b\":{\"dtype\":\"U8\",\"shape\":[2],"
         "\"data_offsets\":[1,3]}}",
         "hole or an overlap", 3},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},\"a\":{\"dtype\":\"U8\",\"shape\":[1],"
         "\"data_offsets\":[0,1]}}",
         "header", 1},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        bkv_error_t err = {.status = BKV_OK};
        cr_expect_eq(parse(bad[i].header, bad[i].data, &err), BKV_INVALID_ARGUMENT, "%s was taken", bad[i].header);
        if (i > 0) {
            cr_expect_not_null(strstr(err.message, bad[i].names), "%s: \"%s\" does not name %s", bad[i].header, err.message,
                               bad[i].names);
        }
    }
    cr_expect_eq(parse("{}", 0, NULL), BKV_OK);
    cr_expect_eq(parse(T("\"F32\"", "[1]", "[0,4]"), 4, NULL), BKV_OK);
}

Test(safetensors, refuses_a_lying_length) {
    size_t length;
    bkv_safetensors_t *file;
    uint8_t *bytes = compose(T("\"F32\"", "[1]", "[0,4]"), 4, &length);
    for (size_t cut = 0; cut < length; cut++) {
        uint8_t *part = malloc(cut > 0 ? cut : 1);
        memcpy(part, bytes, cut);
        cr_expect_eq(bkv_safetensors_parse(part, cut, &file, NULL), BKV_INVALID_ARGUMENT, "cut at %zu", cut);
        free(part);
    }
    const uint64_t lies[] = {0, 1, length - 7, BKV_TENSOR_HEADER_MAX + 1, UINT64_MAX, UINT64_MAX - 7};
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        memcpy(bytes, &lies[i], sizeof lies[i]);
        cr_expect_eq(bkv_safetensors_parse(bytes, length, &file, NULL), BKV_INVALID_ARGUMENT);
    }
    free(bytes);
}

// Every single-byte change of a sound file is either still sound or refused; sanitizers watch that nothing else happens.
Test(safetensors, survives_mutation) {
    size_t length;
    uint8_t *bytes = compose("{\"k.0\":{\"dtype\":\"F16\",\"shape\":[1,2,2],\"data_offsets\":[0,8]},\"v.0\":{\"dtype\":\"F16\","
                             "\"shape\":[1,2,2],\"data_offsets\":[8,16]}}",
                             16, &length);
    const uint8_t flips[] = {0x01, 0x02, 0x10, 0x80, 0xff};
    for (size_t at = 0; at < length; at++) {
        for (size_t f = 0; f < sizeof flips; f++) {
            bkv_safetensors_t *file = NULL;
            bytes[at] ^= flips[f];
            if (bkv_safetensors_parse(bytes, length, &file, NULL) == BKV_OK) {
                for (size_t i = 0; i < bkv_safetensors_count(file); i++) {
                    const bkv_tensor_t *tensor = bkv_safetensors_at(file, i);
                    cr_assert(tensor->data >= bytes && tensor->data + tensor->bytes <= bytes + length);
                }
            }
            bkv_safetensors_close(file);
            bytes[at] ^= flips[f];
        }
    }
    free(bytes);
}

Test(safetensors, not_a_file) {
    bkv_safetensors_t *file;
    bkv_error_t err;
    cr_expect_eq(bkv_safetensors_open("/nonexistent", &file, &err), BKV_FAILED_PRECONDITION);
    cr_expect_not_null(strstr(err.message, "/nonexistent: "));
    cr_expect_eq(bkv_safetensors_open("/tmp", &file, &err), BKV_INVALID_ARGUMENT);
    cr_expect_eq(bkv_safetensors_open("/dev/zero", &file, &err), BKV_INVALID_ARGUMENT);
}
