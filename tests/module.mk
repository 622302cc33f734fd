# tests/: unit (criterion, mirrors the sources), integration (real daemon, real sockets), e2e (the real model), bench, fuzz.
PYTHON ?= /usr/bin/python3
UNIT_PC := criterion
UNIT_RUNNER := # an object that brings main() where criterion does not
UNIT_ROOMS := $(sort $(patsubst tests/unit/%/,%,$(dir $(wildcard tests/unit/*/test_*.c))))
UNIT_OBJ := $(patsubst %.c,$(BUILD)/obj/%.o,$(wildcard tests/unit/*.c tests/unit/*/*.c))
UNIT_BIN := $(UNIT_ROOMS:%=$(BUILD)/tests/unit-%) $(BUILD)/tests/unit-daemon
TEST_PC = $(UNIT_PC) $(DAEMON_PC) $(CLIENT_PC) $(BKV_PC)
TEST_LIBS = $(call libs_of,$(TEST_PC)) -lm
$(BUILD)/obj/tests/%.o: DEPS_CFLAGS = $(UNIT_CPPFLAGS) $(call cflags_of,$(TEST_PC))
$(UNIT_OBJ): | $(PROTO_HDR)

comma := ,
# One binary a room, over every room's objects, so that a unit test can reach what is not exported.
UNIT_UNDER = $(CLIENT_OBJ) $(filter-out %/main.o,$(BKV_OBJ)) $(DAEMON_LIB) $(KERNELS_LIB)
define UNIT_RULE
$(BUILD)/tests/unit-$(1): $(patsubst %.c,$(BUILD)/obj/%.o,$(wildcard $(2)/*.c)) $$(UNIT_RUNNER) $$(UNIT_UNDER)
	$$(call say,LD ,$$@)
	@mkdir -p $$(@D)
	$$(Q)$$(CC) $$(LDFLAGS) -o $$@ $$(filter-out %.a,$$^) $$(DAEMON_LIB) $$(KERNELS_LIB) $$(TEST_LIBS)
endef
$(foreach room,$(UNIT_ROOMS),$(eval $(call UNIT_RULE,$(room),tests/unit/$(room))))
$(eval $(call UNIT_RULE,daemon,tests/unit))
# Some of what rpc/ calls goes through tests/unit/rpc/pool.c, which is a cluster to those tests that want one.
$(BUILD)/tests/unit-rpc: LDFLAGS += $(addprefix -Wl$(comma)--wrap=bkv_cluster_,fetch used lookup forget)
# The pipeline's cache of records on a GPU meets the same fake GPU as the transports do.
$(BUILD)/tests/unit-pipeline: $(addprefix $(BUILD)/obj/tests/unit/transport/,fake_gpu.o fake_gpu_work.o)

# The other end of an exchange is the one that the cluster's tests have.
$(BUILD)/tests/unit-proto: $(BUILD)/obj/tests/unit/cluster/impostor.o

.PHONY: test test-run unit integration e2e demo demo-run bench bench-run soak
## test: set up, build, then run every test
test: setup
	@$(MAKE) --no-print-directory test-run
test-run: all $(UNIT_BIN)
	@BUILD=$(BUILD) PYTHON=$(PYTHON) tests/run.sh unit integration e2e
## unit: unit tests alone
unit: all $(UNIT_BIN)
	@BUILD=$(BUILD) PYTHON=$(PYTHON) tests/run.sh unit
## integration: tests against a real daemon over real sockets
integration: all
	@BUILD=$(BUILD) PYTHON=$(PYTHON) tests/run.sh integration
## e2e: a real model answers from what came back (needs BKV_MODEL_DIR)
e2e: all
	@BUILD=$(BUILD) PYTHON=$(PYTHON) tests/run.sh e2e
## demo: set up, build, then show put, fold, get and attention on a real trace
demo: setup
	@$(MAKE) --no-print-directory demo-run
demo-run: all
	@BUILD=$(BUILD) $(PYTHON) tests/demo.py

# The bench of daemon and client, beside what it compares them with: the bare gRPC C core, memcpy, Redis, Mooncake Store.
BENCH_SRC := $(addprefix tests/bench/,bench.c bench_rpc.c bench_data.c bench_stores.c bare.c redis.c mooncake.c report.c)
BENCH_OBJ := $(BENCH_SRC:%.c=$(BUILD)/obj/%.o)
HAVE_HIREDIS = $(call once,HIREDIS,pkg-config --exists hiredis && echo hiredis)
$(BUILD)/obj/tests/bench/redis.o: FILE_CFLAGS = $(if $(HAVE_HIREDIS),-DBKV_HAVE_HIREDIS)
$(BUILD)/tests/bench: $(BENCH_OBJ) $(BUILD)/lib/libbalancekv.so
	@mkdir -p $(@D)
	$(call say,LD ,$@)
	$(Q)$(CC) $(LDFLAGS) -o $@ $(BENCH_OBJ) -L$(BUILD)/lib -lbalancekv '-Wl,-rpath,$$ORIGIN/../lib' \
	  $(call libs_of,$(CLIENT_PC) $(HAVE_HIREDIS)) -lm
# BENCH: its options, as "--quick" or "--part stores".
## bench: daemon and client against a bare gRPC C core, memcpy, Redis and Mooncake Store; writes build/bench/bench.json
bench: setup
	@$(MAKE) --no-print-directory bench-run
bench-run: all $(BUILD)/tests/bench
	@mkdir -p $(BUILD)/bench
	@tests/bench/mooncake.sh $(BUILD)/mooncake $(PYTHON)
	$(BUILD)/tests/bench --daemon $(BUILD)/bin/balancekvd --out $(BUILD)/bench/bench.json \
	  --python $(BUILD)/mooncake/bin/python --script tests/bench/bench_mooncake.py $(BENCH)
# Quality on a real model: the kernels alone, so that it runs where there is no gRPC. QUALITY: its options, as "--quick".
$(BUILD)/lib/libbkvkernels.so: $(KERNELS_OBJ)
	@mkdir -p $(@D)
	$(call say,LD ,$@)
	$(Q)$(CC) $(filter-out -pie,$(LDFLAGS)) -shared -o $@ $^ $(KERNELS_LIBS)
.PHONY: bench-quality
## bench-quality: what a real model still knows from our summaries and from others', at equal bytes (needs BKV_MODEL_DIR)
bench-quality: $(BUILD)/lib/libbkvkernels.so
	@BUILD=$(BUILD) PYTHONPATH=tests $(PYTHON) -m bench.quality $(QUALITY)
# Benches of the kernels need a C compiler only, as the kernels do.
BENCH_KERNELS_SRC := $(wildcard tests/bench/bench_kernels*.c) tests/bench/report.c
BENCH_KERNELS_OBJ := $(BENCH_KERNELS_SRC:%.c=$(BUILD)/obj/%.o)
$(BENCH_KERNELS_OBJ): DEPS_CFLAGS =
$(BUILD)/tests/bench_kernels: $(BENCH_KERNELS_OBJ) $(KERNELS_LIB)
	@mkdir -p $(@D)
	$(call say,LD ,$@)
	$(Q)$(CC) $(LDFLAGS) -o $@ $(BENCH_KERNELS_OBJ) $(KERNELS_LIB) $(KERNELS_LIBS) -ldl
.PHONY: bench-kernels
## bench-kernels: CPU backends on one core, each against ref or the machine; writes build/bench/kernels.json
bench-kernels: $(BUILD)/tests/bench_kernels
	@mkdir -p $(BUILD)/bench
	$(BUILD)/tests/bench_kernels --out $(BUILD)/bench/kernels.json
## soak: mixed load for SECONDS (default 3600); memory must return to its level
soak: all
	@BUILD=$(BUILD) $(PYTHON) tests/integration/soak.py --seconds $(or $(SECONDS),3600)

# Sanitizers build beside, never over, the normal build.
.PHONY: asan tsan
## asan: unit and integration tests under AddressSanitizer and UBSan
asan: setup
	@$(MAKE) --no-print-directory BUILD=build-asan SAN='-fsanitize=address,undefined -fno-sanitize-recover=undefined' OPT='-O1 -g' asan-run
asan-run: all $(UNIT_BIN)
	@BUILD=$(BUILD) PYTHON=$(PYTHON) SANITIZER=asan tests/run.sh unit integration
## tsan: unit and integration tests under ThreadSanitizer
tsan: setup
	@$(MAKE) --no-print-directory BUILD=build-tsan SAN='-fsanitize=thread' OPT='-O1 -g' UNIT_PC= \
	  UNIT_RUNNER=build-tsan/obj/tests/support/tsan/runner.o UNIT_CPPFLAGS=-Itests/support/tsan tsan-run
tsan-run: all $(UNIT_BIN)
	@BUILD=$(BUILD) PYTHON=$(PYTHON) SANITIZER=tsan tests/run.sh unit integration

# Fuzzers: one libFuzzer driver per parser of outside bytes, with a corpus in tests/fuzz/corpus/<name>.
FUZZ_SRC := $(wildcard tests/fuzz/fuzz_*.c)
FUZZ_BIN := $(FUZZ_SRC:tests/fuzz/%.c=build-fuzz/%)
FUZZ_SECONDS ?= 20
FUZZ_ROOM_SRC = $(KERNELS_SRC) $(filter-out client/bkv/main.c,$(BKV_SRC)) $(CLIENT_SRC) $(DAEMON_SRC) $(PROTO_GEN) $(BOTH_SRC)
FUZZ_OBJ = $(FUZZ_ROOM_SRC:%.c=build-fuzz/obj/%.o)
build-fuzz/obj/%.o: %.c | $(PROTO_HDR)
	@mkdir -p $(@D)
	$(call say,FUZ,$<)
	$(Q)clang $(CPPFLAGS) $(call cflags_of,$(DAEMON_PC) $(BKV_PC)) $(CSTD) -O1 -g -w $(call isa_flags,$(*F)) \
	  -fsanitize=fuzzer-no-link,address,undefined -pthread -c $< -o $@
build-fuzz/fuzz_%: tests/fuzz/fuzz_%.c $(FUZZ_OBJ)
	$(call say,FUZ,$<)
	$(Q)clang $(CPPFLAGS) $(call cflags_of,$(DAEMON_PC) $(BKV_PC)) $(CSTD) -O1 -g -fsanitize=fuzzer,address,undefined -pthread -o $@ $^ \
	  $(FUZZ_WRAP:%=-Wl,--wrap=%) $(call libs_of,$(DAEMON_PC) $(BKV_PC)) -lm
# What a fuzzer does itself, in the place of the network and the RDMA device.
build-fuzz/fuzz_answers: FUZZ_WRAP = bkv_peer_call_attempt bkv_verbs_begin bkv_verbs_wake
.PHONY: fuzz fuzz-run
## fuzz: every parser of outside bytes, FUZZ_SECONDS each (default 20)
fuzz: setup
	@$(MAKE) --no-print-directory fuzz-run
fuzz-run: $(FUZZ_BIN)
	@for f in $(FUZZ_BIN); do n=$$(basename $$f); mkdir -p build-fuzz/corpus/$$n; \
	  $$f -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1 -rss_limit_mb=4096 build-fuzz/corpus/$$n $$(ls -d tests/fuzz/corpus/$$n 2>/dev/null) \
	  >build-fuzz/$$n.log 2>&1 && echo "$$n: $$(grep -o 'stat::number_of_executed_units: *[0-9]*' build-fuzz/$$n.log | grep -o '[0-9]*$$') inputs, no finding" \
	  || { tail -n 40 build-fuzz/$$n.log; exit 1; }; done

.PHONY: tidy format
## tidy: formatting, include direction, headers that compile alone, clang-tidy, shell scripts, unit file
tidy: setup
	@$(MAKE) --no-print-directory tidy-run
tidy-run: $(PROTO_HDR)
	@BUILD=$(BUILD) PYTHON=$(PYTHON) tests/tidy.sh
## format: format the C sources in place
format: setup
	clang-format -i $$(git ls-files '*.c' '*.h')

include tests/gpu/module.mk tests/rdma/module.mk tests/cluster/module.mk
