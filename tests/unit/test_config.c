// test_config.c - defaults, file and flags; every way a file can be wrong, with its line; printing and reloading.
#include "daemon/config.h"

#include "daemon/observe/log.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// Writes a file and loads it. The file's name is in *path (static).
static char path[64];

static void write_file(const char *text, size_t length) {
    strcpy(path, "/tmp/bkv-config-XXXXXX");
    int fd = mkstemp(path);
    cr_assert_geq(fd, 0);
    cr_assert_eq(write(fd, text, length), (ssize_t)length);
    close(fd);
}

static bkv_status_t load_bytes(const char *text, size_t length, bkv_config_t **config, bkv_error_t *err) {
    write_file(text, length);
    const bkv_flags_t flags = {.file = path};
    bkv_status_t status = bkv_config_load(&flags, config, err);
    unlink(path);
    return status;
}

static bkv_config_t *load(const char *text) {
    bkv_config_t *config;
    bkv_error_t err;
    cr_assert_eq(load_bytes(text, strlen(text), &config, &err), BKV_OK, "%s", err.message);
    return config;
}

static void refused(const char *text, int line, const char *reason) {
    bkv_config_t *config;
    bkv_error_t err = {.message = ""};
    cr_assert_eq(load_bytes(text, strlen(text), &config, &err), BKV_INVALID_ARGUMENT, "was taken: %s", text);
    char expected[256];
    snprintf(expected, sizeof(expected), "%s:%d: %s", path, line, reason);
    cr_assert_eq(strncmp(err.message, expected, strlen(expected)), 0, "\"%s\", expected \"%s...\"", err.message, expected);
}

Test(config, defaults) {
    bkv_config_t *config = load("");
    cr_assert_str_eq(config->listen_socket, "/run/balancekv/balancekvd.sock");
    cr_assert_eq(bkv_config_socket_mode(config), 0660);
    cr_assert_eq(config->memory_arena, 1ull << 30);
    cr_assert_eq(config->limits_op_timeout, 30000);
    cr_assert_eq(config->compute_max_jobs, 1024);
    cr_assert_not(config->memory_prefault);
    cr_assert_eq(config->tenant_count, 0);
    bkv_config_destroy(config);
}

Test(config, file_is_read) {
    bkv_config_t *config = load("\xef\xbb\xbf[memory]\r\n"
                                "; a comment\n"
                                "# another, which is quite a bit longer than the two hundred bytes that the parser has room "
                                "for in one line, so that it would be cut in two and its second half taken for a setting: "
                                "arena = 4096M\n"
                                "arena = 64M   ; and one at the end\n"
                                "   ttl=1h\n"
                                "\tprefault : yes\n"
                                "\n"
                                "[listen]\n"
                                "tcp =\n"
                                "[memory]\n"
                                "slab = 16M\n"
                                "[tenant a name that is longer than inih has room for, 64 bytes]\n"
                                "quota = 1G\n"
                                "[tenant]\n"
                                "quota = 5M");
    cr_assert_eq(config->memory_arena, 64 << 20);
    cr_assert_eq(config->memory_ttl, 3600000);
    cr_assert(config->memory_prefault);
    cr_assert_str_eq(config->listen_tcp, "");
    cr_assert_eq(config->memory_slab, 16 << 20);
    cr_assert_eq(config->tenant_count, 2);
    cr_assert_str_eq(config->tenants[0].name, "a name that is longer than inih has room for, 64 bytes");
    cr_assert_eq(config->tenants[0].bytes, 1ull << 30);
    cr_assert_str_eq(config->tenants[1].name, "");
    bkv_config_destroy(config);
}

Test(config, flags_win) {
    const char *text = "[memory]\narena = 64M\nttl = 5s\n";
    write_file(text, strlen(text));
    bkv_flags_t flags = {.file = path};
    flags.values[BKV_OPT_memory_arena] = "32M";
    flags.values[BKV_OPT_listen_socket] = "/tmp/x.sock";
    bkv_config_t *config;
    cr_assert_eq(bkv_config_load(&flags, &config, NULL), BKV_OK);
    cr_assert_eq(config->memory_arena, 32 << 20);
    cr_assert_eq(config->memory_ttl, 5000);
    cr_assert_str_eq(config->listen_socket, "/tmp/x.sock");
    bkv_config_destroy(config);
    unlink(path);
}

Test(config, bad_files_are_refused_with_line_and_reason) {
    refused("[memory]\narena = lots\n", 2, "[memory] arena: \"lots\": a size in bytes");
    refused("[memory]\n\n\narena = -1\n", 4, "[memory] arena: \"-1\"");
    refused("[memory]\narena =\n", 2, "[memory] arena: \"\"");
    refused("[memory]\narena = 1G # not a comment\n", 2, "[memory] arena: \"1G # not");
    refused("[memory]\narea = 1G\n", 2, "[memory] area: no such key");
    refused("[log]\narena = 1G\n", 2, "[log] arena: no such key");
    refused("[memmory]\narena = 1G\n", 1, "[memmory]: no such section");
    refused("[memory]\n[nothing in it]\n", 2, "[nothing in it]: no such section");
    refused("[]\n", 1, "[]: no such section");
    refused("arena = 1G\n", 1, "arena: stands before the first [section]");
    refused("[memory]\narena = 1G\nslab = 8M\narena = 2G\n", 4, "[memory] arena: is set in line 2 already");
    refused("[memory]\narena = 1G\n[log]\n[memory]\narena = 1G\n", 5, "[memory] arena: is set in line 2 already");
    refused("[memory]\narena 1G\n", 2, "neither a [section]");
    refused("[memory\n", 1, "neither a [section]");
    refused("[memory]\narena = 1G\n  2G\n", 3, "neither a [section]"); // no continuation lines
    refused("[compute]\nthreads = 4294967296\n", 2, "[compute] threads: \"4294967296\": a whole number");
    refused("[compute]\nthreads = 2000\n", 2, "[compute] threads: must be within 1..1024, or 0");
    refused("[compute]\nbackend = gpu\n", 2, "[compute] backend: \"gpu\" is not a backend");
    refused("[limits]\nop_timeout = 0\n", 2, "[limits] op_timeout: must be within 1ms..24h");
    refused("[limits]\nmax_batch = 0\n", 2, "[limits] max_batch: must be within 1..65536");
    refused("[memory]\nprefault = perhaps\n", 2, "[memory] prefault: \"perhaps\": yes or no");
    refused("[memory]\narena = 16M\nslab = 32M\n", 3, "[memory] slab: is larger than the arena");
    refused("[listen]\nsocket_mode = 0999\n", 2, "[listen] socket_mode: \"0999\"");
    refused("[listen]\nsocket_mode = 01777\n", 2, "[listen] socket_mode:");
    refused("[listen]\ntcp = 7420\n", 2, "[listen] tcp: \"7420\": host:port");
    refused("[listen]\ntcp = 127.0.0.1:77777\n", 2, "[listen] tcp:");
    refused("[listen]\ntcp = ::1:7420\n", 2, "[listen] tcp:");
    refused("[listen]\nsocket =\ntcp =\n", 2, "[listen] socket: empty, and so is tcp");
    refused("[listen]\ntls_cert = /c.pem\n", 2, "[listen] tls_cert: needs tls_key");
    refused("[transport]\nshm = 1K\n", 2, "[transport] shm: must be within 64K..16T, or 0");
    refused("[transport]\nshm_window = 0\n", 2, "[transport] shm_window: must be within 64K..16T");
    refused("[transport]\nshm = 1M\nshm_window = 2M\n", 3, "[transport] shm_window: is larger than shm");
    refused("[transport]\nverbs =\n", 2, "[transport] verbs: empty");
    refused("[transport]\nverbs_port = 256\n", 2, "[transport] verbs_port: must be within 1..255, or 0");
    refused("[transport]\nverbs_gid = first\n", 2, "[transport] verbs_gid: \"first\" is neither auto nor within 0..65535");
    refused("[transport]\nverbs_gid = -1\n", 2, "[transport] verbs_gid: \"-1\"");
    refused("[transport]\nverbs_gid = 65536\n", 2, "[transport] verbs_gid: \"65536\"");
    refused("[transport]\nmax_sessions = 0\n", 2, "[transport] max_sessions: must be within 1..1048576");
    refused("[transport]\nidle = 0\n", 2, "[transport] idle: must be within 1ms..24h");
    refused("[log]\nlevel = chatty\n", 2, "[log] level: \"chatty\" is none of");
    refused("[log]\ntarget = file\n", 2, "[log] target: \"file\" is none of");
    refused("[tenant x]\nquota = 1G\n[tenant x]\nquota = 2G\n", 4, "[tenant x] quota: is set in line 2 already");
    refused("[tenant x]\nquota = much\n", 2, "[tenant x] quota: \"much\"");
    refused("[tenant x]\nttl = 1h\n", 2, "[tenant x] ttl: no such key");
    refused("[tenants]\nquota = 1h\n", 1, "[tenants]: no such section");
    refused("[tenant \xff]\nquota = 1h\n", 1, "[tenant \xff]: a tenant's name");
}

Test(config, transport_words_and_numbers) {
    bkv_config_t *config = load("");
    cr_assert_eq(bkv_config_verbs_gid(config), -1);
    cr_assert_str_eq(config->transport_verbs, "auto");
    bkv_config_destroy(config);
    config = load("[transport]\nshm = 1M\nverbs_gid = 3\ncuda_ipc = no\n"); // less than the default window, which is no error
    cr_assert_eq(bkv_config_verbs_gid(config), 3);
    cr_assert_eq(config->transport_shm, 1 << 20);
    cr_assert_not(config->transport_cuda_ipc);
    bkv_config_destroy(config);
}

// Without [cluster] etcd the rest of the section is not looked at, but for what no value may be.
Test(config, cluster_refuses_what_cannot_work) {
    static const char etcd[] = "[cluster]\netcd = e:1\n";
    char text[512];
    bkv_config_destroy(load("[listen]\ntcp =\n[cluster]\nadvertise = nonsense\n"));
    bkv_config_destroy(load(etcd));
    refused("[cluster]\nreplicas = 5\n", 2, "[cluster] replicas: must be within 1..4");
    refused("[cluster]\nreplicas = 0\n", 2, "[cluster] replicas: must be within 1..4");
    refused("[cluster]\nlease = 999ms\n", 2, "[cluster] lease: must be within 1s..1h");
    refused("[cluster]\npeer_timeout = 2m\n", 2, "[cluster] peer_timeout: must be within 10ms..1m");
    refused("[cluster]\nrepair_rate = 1K\n", 2, "[cluster] repair_rate: must be within 64K..1T, or 0");
    refused("[cluster]\nhot_copies = 256\n", 2, "[cluster] hot_copies: must be within 1..255, or 0");
    snprintf(text, sizeof(text), "%sadvertise = nowhere\n", etcd);
    refused(text, 3, "[cluster] advertise: \"nowhere\" is not host:port");
    snprintf(text, sizeof(text), "%sadvertise = 0.0.0.0:1\n", etcd);
    refused(text, 3, "[cluster] advertise: needed");
    snprintf(text, sizeof(text), "%setcd_user = root\n", etcd);
    refused(text, 3, "[cluster] etcd_user: goes together with etcd_password_file");
    snprintf(text, sizeof(text), "[listen]\ntcp =\n%s", etcd);
    refused(text, 2, "[listen] tcp: empty: the other daemons");
    snprintf(text, sizeof(text), "[listen]\ntls_cert = /c\ntls_key = /k\ntls_client_ca =\n%s", etcd);
    refused(text, 4, "[listen] tls_client_ca: needed in a cluster with TLS");
    snprintf(text, sizeof(text), "[listen]\ntls_cert = /c\ntls_key = /k\ntls_client_ca = /ca\n%speer_name =\n", etcd);
    refused(text, 7, "[cluster] peer_name: empty");
}

// The fd socket's name is three characters longer than the first one's.
Test(config, socket_leaves_room_for_the_fd_socket) {
    char text[256], socket[108] = "/";
    memset(socket + 1, 's', 104); // 105 characters
    snprintf(text, sizeof(text), "[listen]\nsocket = %s\n", socket);
    refused(text, 2, "[listen] socket: longer than 104 bytes");
    snprintf(text, sizeof(text), "[listen]\nsocket = %s\n[transport]\nshm = 0\ncuda_ipc = no\n", socket);
    bkv_config_destroy(load(text));
}

Test(config, long_lines_and_nul_bytes_are_refused) {
    char text[600];
    memset(text, 'a', sizeof(text));
    memcpy(text, "[listen]\nsocket = /", 19);
    text[500] = '\n';
    bkv_config_t *config;
    bkv_error_t err;
    cr_assert_eq(load_bytes(text, 501, &config, &err), BKV_INVALID_ARGUMENT);
    cr_assert_not_null(strstr(err.message, ":2: the line is longer than"), "%s", err.message);
    cr_assert_eq(load_bytes("[memory]\nttl = 1\0h\n", 19, &config, &err), BKV_INVALID_ARGUMENT);
    cr_assert_not_null(strstr(err.message, ":2: "), "%s", err.message);
}

Test(config, bad_flags_and_missing_files) {
    bkv_config_t *config;
    bkv_error_t err;
    bkv_flags_t flags = {.file = "/nonexistent/balancekvd.conf"};
    cr_assert_eq(bkv_config_load(&flags, &config, &err), BKV_INVALID_ARGUMENT);
    cr_assert_str_eq(err.message, "/nonexistent/balancekvd.conf: No such file or directory");
    flags.file = "/tmp"; // a folder
    cr_assert_eq(bkv_config_load(&flags, &config, &err), BKV_INVALID_ARGUMENT);
    flags.file = "/dev/null";
    flags.values[BKV_OPT_compute_max_jobs] = "0";
    cr_assert_eq(bkv_config_load(&flags, &config, &err), BKV_INVALID_ARGUMENT);
    cr_assert_str_eq(err.message, "--max-jobs: must be within 1..1048576");
}

static char *print_to_memory(void (*print)(const bkv_config_t *, FILE *), const bkv_config_t *config) {
    char *text = NULL;
    size_t length = 0;
    FILE *out = open_memstream(&text, &length);
    print(config, out);
    fclose(out);
    return text;
}

Test(config, printing_round_trips) {
    bkv_config_t *config = load("[memory]\narena = 96M\nttl = 90s\n[listen]\ntcp=[::1]:9\nsocket=\n[tenant bob b]\nquota=3G\n");
    char *first = print_to_memory(bkv_config_print, config);
    bkv_config_t *again = load(first);
    char *second = print_to_memory(bkv_config_print, again);
    cr_assert_str_eq(first, second);
    cr_assert_eq(again->memory_arena, 96 << 20);
    cr_assert_str_eq(again->listen_socket, "");
    cr_assert_str_eq(again->tenants[0].name, "bob b");
    free(first);
    free(second);
    bkv_config_destroy(config);
    bkv_config_destroy(again);
}

static void print_example(const bkv_config_t *config, FILE *out) {
    (void)config;
    bkv_config_print_example(out);
}

// deploy/balancekvd.conf.example is `balancekvd --print-example`; make it again when options.h changes.
Test(config, example_file_is_up_to_date) {
    char *example = print_to_memory(print_example, NULL);
    FILE *file = fopen("deploy/balancekvd.conf.example", "r");
    cr_assert_not_null(file, "run from the repository's root");
    char *found = calloc(1, 65536);
    cr_assert_gt(fread(found, 1, 65535, file), 0);
    fclose(file);
    cr_assert_str_eq(found, example);
    for (char *at = found; *at != '\0'; at++) { // and with every setting switched on it is a valid file of defaults
        if (*at == '#' && at[1] != ' ' && at[1] != '\n') {
            *at = ' ';
        }
    }
    bkv_config_t *config = load(found);
    cr_assert_str_eq(config->tenants[0].name, "alice");
    cr_assert_eq(config->memory_arena, 1ull << 30);
    free(found);
    free(example);
    bkv_config_destroy(config);
}

Test(config, adopt_takes_what_is_reloadable) {
    cr_assert_eq(bkv_log_setup("text", "error", NULL), BKV_OK);
    bkv_config_t *current = load("[memory]\narena = 64M\nttl = 1s\n[log]\nlevel = info\n[tenant a]\nquota = 1M\n");
    bkv_config_t *next = load("[memory]\narena = 32M\nttl = 2s\n[log]\nlevel = debug\n[tenant b]\nquota = 2M\n");
    bkv_config_adopt(current, next);
    cr_assert_eq(current->memory_arena, 64 << 20);
    cr_assert_eq(current->memory_ttl, 2000);
    cr_assert_str_eq(current->log_level, "debug");
    cr_assert_str_eq(current->tenants[0].name, "b");
    cr_assert_str_eq(next->tenants[0].name, "a");
    bkv_config_destroy(current);
    bkv_config_destroy(next);
}

Test(config, flag_names_are_unique) {
    for (size_t i = 0; i < BKV_OPTION_COUNT; i++) {
        for (size_t j = 0; j < i; j++) {
            cr_assert_str_neq(bkv_options[i].name, bkv_options[j].name);
        }
        cr_assert_lt(strlen(bkv_options[i].name), 32);
        cr_assert_lt(strlen(bkv_options[i].help), 200);
    }
}
