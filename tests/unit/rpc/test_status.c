// test_status.c - every status has the gRPC code that callers expect.
#include "daemon/rpc/status.h"

#include <criterion/criterion.h>

Test(rpc_status, has_grpcs_codes) {
    cr_assert_eq(bkv_status_to_grpc(BKV_OK), GRPC_STATUS_OK);
    cr_assert_eq(bkv_status_to_grpc(BKV_INVALID_ARGUMENT), GRPC_STATUS_INVALID_ARGUMENT);
    cr_assert_eq(bkv_status_to_grpc(BKV_NOT_FOUND), GRPC_STATUS_NOT_FOUND);
    cr_assert_eq(bkv_status_to_grpc(BKV_RESOURCE_EXHAUSTED), GRPC_STATUS_RESOURCE_EXHAUSTED);
    cr_assert_eq(bkv_status_to_grpc(BKV_DATA_LOSS), GRPC_STATUS_DATA_LOSS);
    cr_assert_eq(bkv_status_to_grpc(BKV_UNAUTHENTICATED), GRPC_STATUS_UNAUTHENTICATED);
}

Test(rpc_status, busy_means_unavailable) {
    cr_assert_eq(bkv_status_to_grpc(BKV_BUSY), GRPC_STATUS_UNAVAILABLE);
}

Test(rpc_status, foreign_numbers_are_unknown) {
    cr_assert_eq(bkv_status_to_grpc((bkv_status_t)2), GRPC_STATUS_UNKNOWN);
    cr_assert_eq(bkv_status_to_grpc((bkv_status_t)-1), GRPC_STATUS_UNKNOWN);
    cr_assert_eq(bkv_status_to_grpc((bkv_status_t)99), GRPC_STATUS_UNKNOWN);
}
