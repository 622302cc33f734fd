// main.c - bkv: the table of commands, help, and the way from a status to an exit status.
#include "cli.h"

#include <string.h>

#define SPEC_OF_KEYS (BKV_CLI_CONNECT | BKV_CLI_KEYS | BKV_CLI_NAME | BKV_CLI_CODEC | BKV_CLI_SHAPE)

static const bkv_command_t commands[] = {
    {"ping", "", "is the daemon there, and how far away", BKV_CLI_CONNECT | BKV_CLI_COUNT | BKV_CLI_PING, 0, 0, bkv_cmd_ping,
     NULL},
    {"stats", "", "counters and gauges of the daemon", BKV_CLI_CONNECT | BKV_CLI_WATCH | BKV_CLI_COUNT, 0, 0, bkv_cmd_stats,
     NULL},
    {"put", "FILE", "cut a KV trace into blocks and put them",
     BKV_CLI_CONNECT | BKV_CLI_KEYS | BKV_CLI_NAME | BKV_CLI_CODEC | BKV_CLI_TTL | BKV_CLI_WINDOW | BKV_CLI_PARALLEL, 1, 1,
     bkv_cmd_put,
     "FILE is a safetensors file with k.N and v.N [heads, tokens, dim] of each layer N, F16, BF16 or F32, and perhaps\n"
     "ids [tokens] (I32 or I64). --keys FILE writes what the other commands need to find the blocks again.\n"},
    {"get", "[KEY...]", "fetch blocks' records", SPEC_OF_KEYS | BKV_CLI_OUT | BKV_CLI_RECORD | BKV_CLI_RANGE, 0, -1,
     bkv_cmd_get, "--out writes k.N, v.N, logw.N and index.N as `summarize` does.\n"},
    {"lookup", "[KEY...]", "which blocks are resident", SPEC_OF_KEYS, 0, -1, bkv_cmd_lookup, NULL},
    {"fold", "[KEY...]", "a summary of consecutive blocks", SPEC_OF_KEYS | BKV_CLI_OUT | BKV_CLI_RECORD | BKV_CLI_BUDGET, 0, -1,
     bkv_cmd_fold,
     "--budget, or with --keys --rate, says how large it is; --profile how dense by age, a record or more for each band. With\n"
     "--profile alone its rates are meant as they are.\n"},
    {"attend", "[KEY...]", "attention over resident blocks, in the daemon", SPEC_OF_KEYS | BKV_CLI_OUT | BKV_CLI_QUERIES, 0, -1,
     bkv_cmd_attend, "--out writes out.N [query heads, queries, dim] and lse.N [query heads, queries], F32.\n"},
    {"pin", "[KEY...]", "keep blocks from eviction for a while", SPEC_OF_KEYS | BKV_CLI_TTL, 0, -1, bkv_cmd_pin, NULL},
    {"unpin", "LEASE", "end a pin early", BKV_CLI_CONNECT, 1, 1, bkv_cmd_unpin, NULL},
    {"drop", "[KEY...]", "forget blocks", SPEC_OF_KEYS, 0, -1, bkv_cmd_drop, NULL},
    {"inspect", "[FILE...|KEY...]", "what is in a record", SPEC_OF_KEYS, 0, -1, bkv_cmd_inspect,
     "FILE holds records as `--record` writes them; KEY is 64 hex digits and asks the daemon.\n"},
    {"summarize", "IN OUT", "compress a KV trace off-line, without a daemon",
     BKV_CLI_CODEC | BKV_CLI_WINDOW | BKV_CLI_LOCAL | BKV_CLI_BUDGET | BKV_CLI_RECORD, 2, 2, bkv_cmd_summarize,
     "IN is as for `put`. OUT gets, for each layer N, k.N and v.N F16 [heads, m, dim] as attention sees them, logw.N F32\n"
     "[heads, m] and index.N I32 [heads, m]; heads with fewer tokens are padded at the end with logw -inf. With --profile\n"
     "blocks are dense4 unless --codec says otherwise, and --rate or --budget is that of their fold.\n"},
    {"calibrate", "TRACE...", "measure which heads of a model need the bytes", BKV_CLI_CALIBRATE | BKV_CLI_LOCAL | BKV_CLI_OUT,
     1, -1, bkv_cmd_calibrate,
     "TRACE is as for `put`, with q.N [query heads, tokens, dim] of at least the newest tokens. All others are compressed, and "
     "a\n"
     "head's share is what that costs the newest tokens' attention. --out writes what --shares reads.\n"},
    {"bench", "[FILE]", "load a daemon and measure it",
     BKV_CLI_CONNECT | BKV_CLI_NAME | BKV_CLI_CODEC | BKV_CLI_SHAPE | BKV_CLI_PARALLEL | BKV_CLI_BENCH, 0, 1, bkv_cmd_bench,
     "Blocks come from FILE, or are made up: 8 layers, 4 KV heads, dim 128 (4 MiB each) unless the options say otherwise.\n"},
    {"cluster", "status | nodes | where [KEY...] | drain NODE", "the cluster a daemon belongs to",
     SPEC_OF_KEYS | BKV_CLI_CLUSTER, 1, -1, bkv_cmd_cluster,
     "status: is all well (exit status 1 if not). nodes: who is in it. where: who owns blocks, and who has them; without a "
     "spec\n"
     "(--keys, or --model and the shape) only who owns them. drain: has a node hand its blocks to others, and waits until it "
     "has,\n"
     "at most --timeout; --undo has it take part again.\n"},
};

#define COMMAND_COUNT (sizeof commands / sizeof *commands)

static void show_exits(void) {
    printf("\nExit status:\n");
#define X(code, text) printf("  %d  %s\n", code, text);
    BKV_CLI_EXITS(X)
#undef X
}

static void show_help(void) {
    printf("Usage: bkv [OPTION...] COMMAND [OPTION...] [OPERAND...]\n"
           "The command line of balancekvd, which keeps compressed KV caches for LLM inference.\n\nCommands:\n");
    for (size_t i = 0; i < COMMAND_COUNT; i++) {
        printf("  %-10s %s\n", commands[i].name, commands[i].summary);
    }
    printf("\n`bkv COMMAND --help` has the options of each. These go with all that talk to a daemon:\n\n");
    bkv_cli_help(BKV_CLI_ALL | BKV_CLI_CONNECT, stdout);
    printf("  %-21s %s\n", "--version", "the version");
    show_exits();
}

static void show_command(const bkv_command_t *command) {
    printf("Usage: bkv %s [OPTION...] %s\n%c%s.\n", command->name, command->operands, command->summary[0] - 'a' + 'A',
           command->summary + 1);
    if (command->details != NULL) {
        printf("%s", command->details);
    }
    printf("\n");
    bkv_cli_help(command->groups | BKV_CLI_ALL, stdout);
    show_exits();
}

static const bkv_command_t *find_command(const char *name) {
    for (size_t i = 0; i < COMMAND_COUNT; i++) {
        if (strcmp(commands[i].name, name) == 0) {
            return &commands[i];
        }
    }
    return NULL;
}

static bkv_status_t run_command(const bkv_command_t *command, bkv_cli_t *cli, int argc, char **argv, bkv_error_t *err) {
    bkv_status_t status = bkv_cli_parse(cli, command->groups | BKV_CLI_ALL, argc, argv, false, err);
    if (status != BKV_OK) {
        return status;
    }
    if (cli->help) {
        show_command(command);
        return BKV_OK;
    }
    if (cli->arg_count < command->min_args || (command->max_args >= 0 && cli->arg_count > command->max_args)) {
        return bkv_cli_usage(cli, err, "expected operands: %s", command->max_args == 0 ? "none" : command->operands);
    }
    return command->run(cli, err);
}

int main(int argc, char **argv) {
    bkv_cli_t cli = {.given = 0};
    bkv_error_t err = {.status = BKV_OK};
    if (argc == 2 && (strcmp(argv[1], "--version") == 0 || strcmp(argv[1], "-V") == 0)) {
        printf("bkv %s\n", bkv_version());
        return 0;
    }
    // Options before the command are the common ones.
    bkv_status_t status = bkv_cli_parse(&cli, BKV_CLI_ALL | BKV_CLI_CONNECT, argc, argv, true, &err);
    const char *name = NULL;
    bool help = status == BKV_OK && cli.arg_count > 0 && strcmp(cli.args[0], "help") == 0;
    if (status == BKV_OK && (cli.help || (help && cli.arg_count == 1))) {
        show_help();
        return 0;
    }
    if (help) { // `bkv help put` is `bkv put --help`
        cli.help = true;
        cli.args++;
        cli.arg_count = 1;
    }
    if (status == BKV_OK && cli.arg_count == 0) {
        status = bkv_cli_usage(&cli, &err, "no command");
    } else if (status == BKV_OK) {
        const bkv_command_t *command = find_command(cli.args[0]);
        if (command == NULL) {
            status = bkv_cli_usage(&cli, &err, "%.64s: no such command", cli.args[0]);
        } else {
            name = command->name;
            status = run_command(command, &cli, cli.arg_count, cli.args, &err);
        }
    }
    if (status == BKV_OK && (fflush(stdout) != 0 || ferror(stdout))) {
        status = bkv_fail(&err, BKV_FAILED_PRECONDITION, "stdout: could not be written");
    }
    if (status != BKV_OK) {
        bkv_cli_report(&cli, name, &err);
    }
    return bkv_cli_exit(status, cli.usage);
}
