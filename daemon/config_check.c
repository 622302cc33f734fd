// config_check.c - ranges, words, and options that do not go together.
#include "daemon/config_check.h"

#include "daemon/value.h"
#include "kernels/codec.h"
#include "proto/fd_socket.h"
#include "proto/placement.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>

#define GID_HIGHEST 65535

bkv_status_t bkv_config_refuse(const bkv_config_t *config, size_t id, bkv_error_t *err, const char *format, ...) {
    const bkv_option_t *option = &bkv_options[id];
    char reason[BKV_MESSAGE_MAX];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(reason, sizeof(reason), format, arguments);
    va_end(arguments);
    if (config->origin[id] > 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "%s:%d: [%s] %s: %s", config->file, config->origin[id], option->section,
                        option->name, reason);
    }
    if (config->origin[id] == 0) {
        return bkv_fail(err, BKV_INVALID_ARGUMENT, "[%s] %s: %s", option->section, option->name, reason);
    }
    char flag[64];
    snprintf(flag, sizeof(flag), "%s", option->name);
    for (char *at = flag; *at != '\0'; at++) {
        *at = *at == '_' ? '-' : *at;
    }
    return bkv_fail(err, BKV_INVALID_ARGUMENT, "--%s: %s", flag, reason);
}

void bkv_config_locate(const bkv_config_t *config, bkv_error_t *err) {
    for (size_t id = 0; err->status == BKV_INVALID_ARGUMENT && id < BKV_OPTION_COUNT; id++) {
        char prefix[64];
        int length = snprintf(prefix, sizeof(prefix), "%s.%s: ", bkv_options[id].section, bkv_options[id].name);
        if (strncmp(err->message, prefix, (size_t)length) == 0) {
            const bkv_error_t cause = *err;
            bkv_config_refuse(config, id, err, "%s", cause.message + length);
            return;
        }
    }
}

// Numbers that parse but cannot work. Where 0 means "choose for me", zero says so.
static const struct {
    bkv_option_id_t id;
    bool zero;
    uint64_t lowest, highest;
} ranges[] = {
    {BKV_OPT_memory_arena, false, UINT64_C(1) << 20, UINT64_C(1) << 44},
    {BKV_OPT_memory_slab, true, UINT64_C(64) << 10, UINT64_C(1) << 40},
    {BKV_OPT_memory_max_entries, true, 1, UINT32_C(1) << 30},
    {BKV_OPT_memory_staging, false, UINT64_C(64) << 10, UINT64_C(1) << 40},
    {BKV_OPT_compute_threads, true, 1, 1024},
    {BKV_OPT_compute_max_jobs, false, 1, 1 << 20},
    {BKV_OPT_compute_gpu_cache, true, UINT64_C(16) << 20, UINT64_C(1) << 40},
    {BKV_OPT_limits_rpc_threads, true, 1, 256},
    {BKV_OPT_limits_max_calls, false, 1, 1 << 20},
    {BKV_OPT_limits_max_message, false, UINT64_C(64) << 10, UINT64_C(1) << 30},
    {BKV_OPT_limits_max_block, false, 1024, UINT64_C(1) << 40},
    {BKV_OPT_limits_max_batch, false, 1, 1 << 16},
    {BKV_OPT_limits_max_specs, false, 1, 1 << 20},
    {BKV_OPT_limits_op_timeout, false, 1, 86400000},
    {BKV_OPT_limits_drain_timeout, true, 1, 3600000},
    {BKV_OPT_transport_shm, true, UINT64_C(64) << 10, UINT64_C(1) << 44},
    {BKV_OPT_transport_shm_window, false, UINT64_C(64) << 10, UINT64_C(1) << 44},
    {BKV_OPT_transport_verbs_port, true, 1, 255},
    {BKV_OPT_transport_verbs_sessions, false, 1, 1 << 16},
    {BKV_OPT_transport_max_sessions, false, 1, 1 << 20},
    {BKV_OPT_transport_idle, false, 1, 86400000},
    {BKV_OPT_cluster_replicas, false, 1, BKV_REPLICAS_MAX},
    {BKV_OPT_cluster_weight, true, 1, BKV_WEIGHT_MAX},
    {BKV_OPT_cluster_lease, false, 1000, 3600000},
    {BKV_OPT_cluster_peer_timeout, false, 10, 60000},
    {BKV_OPT_cluster_repair_delay, true, 1, 86400000},
    {BKV_OPT_cluster_repair_rate, true, UINT64_C(64) << 10, UINT64_C(1) << 40},
    {BKV_OPT_cluster_hot_copies, true, 1, 255},
};

static bkv_status_t check_range(const bkv_config_t *config, size_t i, bkv_error_t *err) {
    const bkv_option_t *option = &bkv_options[ranges[i].id];
    const void *field = (const char *)config + option->offset;
    uint64_t value = option->type == BKV_U32 ? *(const uint32_t *)field : *(const uint64_t *)field;
    if ((ranges[i].zero && value == 0) || (value >= ranges[i].lowest && value <= ranges[i].highest)) {
        return BKV_OK;
    }
    char lowest[BKV_VALUE_TEXT], highest[BKV_VALUE_TEXT];
    if (option->type == BKV_SIZE) {
        bkv_value_format_size(ranges[i].lowest, lowest);
        bkv_value_format_size(ranges[i].highest, highest);
    } else if (option->type == BKV_MS) {
        bkv_value_format_ms(ranges[i].lowest, lowest);
        bkv_value_format_ms(ranges[i].highest, highest);
    } else {
        snprintf(lowest, sizeof(lowest), "%llu", (unsigned long long)ranges[i].lowest);
        snprintf(highest, sizeof(highest), "%llu", (unsigned long long)ranges[i].highest);
    }
    return bkv_config_refuse(config, ranges[i].id, err, "must be within %s..%s%s", lowest, highest,
                             ranges[i].zero ? ", or 0" : "");
}

static bool is_word(const char *text, const char *const *words) {
    while (*words != NULL && strcmp(*words, text) != 0) {
        words++;
    }
    return *words != NULL;
}

// host:port, with an IPv6 address in brackets.
static bool is_address(const char *text) {
    const char *colon = strrchr(text, ':');
    uint32_t port;
    if (colon == NULL || colon == text || bkv_value_parse_u32(colon + 1, &port) != NULL || port > 65535) {
        return false;
    }
    bool bracketed = text[0] == '[' && colon[-1] == ']' && colon - text > 2;
    return bracketed || (memchr(text, ':', (size_t)(colon - text)) == NULL && text[0] != '[');
}

static bool parse_mode(const char *text, unsigned *mode) {
    char *end;
    if (text[0] < '0' || text[0] > '7') {
        return false;
    }
    unsigned long value = strtoul(text, &end, 8);
    *mode = (unsigned)value;
    return *end == '\0' && value <= 0777;
}

unsigned bkv_config_socket_mode(const bkv_config_t *config) {
    unsigned mode = 0;
    parse_mode(config->listen_socket_mode, &mode); // was checked when it was loaded
    return mode;
}

// "auto" is -1.
static bool parse_gid(const char *text, int *gid) {
    uint32_t index = 0;
    bool automatic = strcmp(text, "auto") == 0;
    if (!automatic && (bkv_value_parse_u32(text, &index) != NULL || index > GID_HIGHEST)) {
        return false;
    }
    *gid = automatic ? -1 : (int)index;
    return true;
}

int bkv_config_verbs_gid(const bkv_config_t *config) {
    int gid = -1;
    parse_gid(config->transport_verbs_gid, &gid); // was checked when it was loaded
    return gid;
}

// Local transports have a socket of their own beside the first one.
static size_t longest_socket(const bkv_config_t *config) {
    size_t room = sizeof(((struct sockaddr_un *)NULL)->sun_path) - 1;
    return config->transport_shm != 0 || config->transport_cuda_ipc ? room - strlen(BKV_FD_SUFFIX) : room;
}

static bkv_status_t check_listen(const bkv_config_t *config, bkv_error_t *err) {
    unsigned mode;
    const size_t longest = longest_socket(config);
    if (config->listen_socket[0] == '\0' && config->listen_tcp[0] == '\0') {
        return bkv_config_refuse(config, BKV_OPT_listen_socket, err, "empty, and so is tcp: nothing to listen on");
    }
    if (strlen(config->listen_socket) > longest) {
        return bkv_config_refuse(config, BKV_OPT_listen_socket, err, "longer than %zu bytes", longest);
    }
    if (!parse_mode(config->listen_socket_mode, &mode)) {
        return bkv_config_refuse(config, BKV_OPT_listen_socket_mode, err,
                                 "\"%.20s\": octal permissions are expected, as in 0660", config->listen_socket_mode);
    }
    if (config->listen_tcp[0] != '\0' && !is_address(config->listen_tcp)) {
        return bkv_config_refuse(config, BKV_OPT_listen_tcp, err, "\"%.80s\": host:port is expected, an IPv6 host in brackets",
                                 config->listen_tcp);
    }
    if ((config->listen_tls_cert[0] == '\0') != (config->listen_tls_key[0] == '\0')) {
        bool cert_missing = config->listen_tls_cert[0] == '\0';
        return bkv_config_refuse(config, cert_missing ? BKV_OPT_listen_tls_key : BKV_OPT_listen_tls_cert, err,
                                 "needs %s as well", cert_missing ? "tls_cert" : "tls_key");
    }
    if (config->listen_tls_client_ca[0] != '\0' && config->listen_tls_cert[0] == '\0') {
        return bkv_config_refuse(config, BKV_OPT_listen_tls_client_ca, err, "needs tls_cert and tls_key as well");
    }
    return BKV_OK;
}

static bkv_status_t check_transport(const bkv_config_t *config, bkv_error_t *err) {
    int gid;
    if (!parse_gid(config->transport_verbs_gid, &gid)) {
        return bkv_config_refuse(config, BKV_OPT_transport_verbs_gid, err, "\"%.20s\" is neither auto nor within 0..%d",
                                 config->transport_verbs_gid, GID_HIGHEST);
    }
    if (config->transport_verbs[0] == '\0') {
        return bkv_config_refuse(config, BKV_OPT_transport_verbs, err, "empty: auto, off or a device's name is expected");
    }
    bool window_given = config->origin[BKV_OPT_transport_shm_window] != 0; // the default is just the most that one may get
    if (window_given && config->transport_shm != 0 && config->transport_shm_window > config->transport_shm) {
        return bkv_config_refuse(config, BKV_OPT_transport_shm_window, err, "is larger than shm, which is for all clients");
    }
    return BKV_OK;
}

// An address that others cannot use: one that stands for all, or a port that is not chosen yet with nothing to choose it for.
static bool is_wildcard(const char *address) {
    return strncmp(address, "0.0.0.0:", 8) == 0 || strncmp(address, "[::]:", 5) == 0;
}

static bkv_status_t check_cluster(const bkv_config_t *config, bkv_error_t *err) {
    const char *advertise = config->cluster_advertise;
    if (config->cluster_etcd[0] == '\0') {
        return BKV_OK;
    }
    if (config->listen_tcp[0] == '\0') {
        return bkv_config_refuse(config, BKV_OPT_listen_tcp, err, "empty: the other daemons of the cluster come through it");
    }
    if (advertise[0] != '\0' && !is_address(advertise)) {
        return bkv_config_refuse(config, BKV_OPT_cluster_advertise, err, "\"%.80s\" is not host:port", advertise);
    }
    if (is_wildcard(advertise[0] != '\0' ? advertise : config->listen_tcp)) {
        return bkv_config_refuse(config, BKV_OPT_cluster_advertise, err,
                                 "needed: %.80s says not where others reach this daemon", config->listen_tcp);
    }
    if (config->listen_tls_cert[0] != '\0' && config->listen_tls_client_ca[0] == '\0') {
        return bkv_config_refuse(config, BKV_OPT_listen_tls_client_ca, err,
                                 "needed in a cluster with TLS: by their certificates daemons know each other");
    }
    if (config->listen_tls_cert[0] != '\0' && config->cluster_peer_name[0] == '\0') {
        return bkv_config_refuse(config, BKV_OPT_cluster_peer_name, err, "empty: it is what tells daemons from their clients");
    }
    if ((config->cluster_etcd_user[0] == '\0') != (config->cluster_etcd_password_file[0] == '\0')) {
        return bkv_config_refuse(config, BKV_OPT_cluster_etcd_user, err, "goes together with etcd_password_file");
    }
    return BKV_OK;
}

static bkv_status_t check_words(const bkv_config_t *config, bkv_error_t *err) {
    static const char *const targets[] = {"auto", "journald", "text", "json", NULL};
    static const char *const levels[] = {"error", "warn", "info", "debug", NULL};
    if (!is_word(config->log_target, targets)) {
        return bkv_config_refuse(config, BKV_OPT_log_target, err, "\"%.40s\" is none of auto, journald, text, json",
                                 config->log_target);
    }
    if (!is_word(config->log_level, levels)) {
        return bkv_config_refuse(config, BKV_OPT_log_level, err, "\"%.40s\" is none of error, warn, info, debug",
                                 config->log_level);
    }
    if (bkv_backend_get(config->compute_backend) == NULL) {
        return bkv_config_refuse(config, BKV_OPT_compute_backend, err, "\"%.40s\" is not a backend that this machine can run",
                                 config->compute_backend);
    }
    return BKV_OK;
}

bkv_status_t bkv_config_check(const bkv_config_t *config, bkv_error_t *err) {
    bkv_status_t status = BKV_OK;
    for (size_t i = 0; i < sizeof(ranges) / sizeof(ranges[0]) && status == BKV_OK; i++) {
        status = check_range(config, i, err);
    }
    if (status == BKV_OK) {
        status = check_listen(config, err);
    }
    if (status == BKV_OK) {
        status = check_words(config, err);
    }
    if (status == BKV_OK) {
        status = check_transport(config, err);
    }
    if (status == BKV_OK) {
        status = check_cluster(config, err);
    }
    if (status == BKV_OK && config->memory_slab > config->memory_arena) {
        status = bkv_config_refuse(config, BKV_OPT_memory_slab, err, "is larger than the arena");
    }
    return status;
}
