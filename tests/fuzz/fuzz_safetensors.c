// fuzz_safetensors.c - libFuzzer entry for the safetensors reader (clang -fsanitize=fuzzer,address,undefined).
//
// Whatever the bytes: the reader refuses them with a message, or every tensor it shows lies inside them.
#include "client/bkv/safetensors.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    bkv_safetensors_t *file = NULL;
    bkv_error_t err = {.status = BKV_OK, .message = ""};
    bkv_status_t status = bkv_safetensors_parse(data, size, &file, &err);
    if (status != BKV_OK) {
        if (file != NULL || err.status != status || err.message[0] == '\0') {
            abort();
        }
        return 0;
    }
    for (size_t i = 0; i < bkv_safetensors_count(file); i++) {
        const bkv_tensor_t *tensor = bkv_safetensors_at(file, i);
        if (tensor->data < data || tensor->bytes > (size_t)(data + size - tensor->data) ||
            bkv_safetensors_find(file, tensor->name) != tensor) {
            abort();
        }
    }
    bkv_safetensors_metadata(file, "model");
    bkv_safetensors_close(file);
    return 0;
}
