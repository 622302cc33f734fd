# tests/gpu/: tests of the CUDA kernels that need nvcc, gcc and make alone; they say aloud when there is no device. Those of
# CUDA IPC need a daemon and a client as well, and so gRPC: where there is none they come from `make bundle`, and run-bundle.sh
# runs them.
GPU_IPC_TEST_SRC := $(wildcard tests/gpu/test_ipc*.c)
GPU_TEST_SRC := $(filter-out $(GPU_IPC_TEST_SRC),$(wildcard tests/gpu/test_*.c))
GPU_TEST_BIN := $(GPU_TEST_SRC:tests/gpu/%.c=$(BUILD)/tests/gpu-%)
GPU_BENCH_SRC := $(filter-out tests/bench/bench_gpu_ipc.c,$(wildcard tests/bench/bench_gpu*.c))
GPU_OBJ := $(patsubst %.c,$(BUILD)/obj/%.o,$(GPU_TEST_SRC) tests/gpu/support.c tests/bench/gpu_common.c $(GPU_BENCH_SRC))
$(GPU_OBJ): DEPS_CFLAGS =
$(BUILD)/tests/gpu-%: $(BUILD)/obj/tests/gpu/%.o $(BUILD)/obj/tests/gpu/support.o $(KERNELS_LIB)
	@mkdir -p $(@D)
	$(call say,LD ,$@)
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(KERNELS_LIBS)

# The client's objects themselves, so that tests reach what is not exported.
GPU_IPC_TEST_BIN := $(GPU_IPC_TEST_SRC:tests/gpu/%.c=$(BUILD)/tests/gpu-%)
GPU_IPC_OBJ := $(patsubst %,$(BUILD)/obj/tests/%.o,gpu/ipc_rig gpu/support) $(CLIENT_OBJ) $(PROTO_OBJ)
GPU_IPC_LINK = $(CC) $(LDFLAGS) -o $@ $(filter-out %.a,$^) $(KERNELS_LIB) $(call libs_of,$(CLIENT_PC)) $(KERNELS_LIBS)
$(patsubst %.c,$(BUILD)/obj/%.o,$(GPU_IPC_TEST_SRC) tests/gpu/ipc_rig.c tests/bench/bench_gpu_ipc.c): | $(PROTO_HDR)
$(GPU_IPC_TEST_BIN): $(BUILD)/tests/gpu-%: $(BUILD)/obj/tests/gpu/%.o $(GPU_IPC_OBJ) $(KERNELS_LIB)
	@mkdir -p $(@D)
	$(call say,LD ,$@)
	$(Q)$(GPU_IPC_LINK)
$(BUILD)/tests/bench_gpu_ipc: $(patsubst %,$(BUILD)/obj/tests/bench/%.o,bench_gpu_ipc gpu_common report) $(GPU_IPC_OBJ) $(KERNELS_LIB)
	@mkdir -p $(@D)
	$(call say,LD ,$@)
	$(Q)$(GPU_IPC_LINK)
HAVE_GRPC := $(shell pkg-config --exists grpc 2>/dev/null && echo yes)

.PHONY: test-gpu bench-gpu
## test-gpu: the CUDA kernels against ref and float64, and CUDA IPC with a daemon, on a machine with a GPU
test-gpu: $(GPU_TEST_BIN) $(if $(HAVE_GRPC),$(GPU_IPC_TEST_BIN) $(BUILD)/bin/balancekvd)
	@for t in $(filter %/gpu-test_%,$^); do echo "$$t"; $$t || exit 1; done
	@$(if $(HAVE_GRPC),true,echo "SKIPPED the tests of CUDA IPC: they need gRPC; tests/gpu/run-bundle.sh runs them from a bundle")

BENCH_GPU_BIN := $(GPU_BENCH_SRC:tests/bench/%.c=$(BUILD)/tests/%)
$(BENCH_GPU_BIN): $(BUILD)/tests/%: $(BUILD)/obj/tests/bench/%.o $(patsubst %,$(BUILD)/obj/tests/bench/%.o,gpu_common report) $(KERNELS_LIB)
	@mkdir -p $(@D)
	$(call say,LD ,$@)
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(KERNELS_LIBS)
## bench-gpu: CUDA kernels and CUDA IPC against the memory, the bus and PyTorch of the same GPU; writes build/bench/gpu*.json
bench-gpu: $(BENCH_GPU_BIN) $(if $(HAVE_GRPC),$(BUILD)/tests/bench_gpu_ipc $(BUILD)/bin/balancekvd)
	@mkdir -p $(BUILD)/bench
	@for t in $(filter %/bench_gpu%,$^); do $$t --out $(BUILD)/bench/$${t##*/bench_}.json || exit 1; done
	@$(if $(HAVE_GRPC),true,echo "SKIPPED the bench of CUDA IPC: it needs gRPC; tests/gpu/run-bundle.sh runs it from a bundle")

# Where there was nvcc, a bundle has all of this.
BUNDLE_PROGRAMS += $(if $(NVCC),$(GPU_TEST_BIN) $(GPU_IPC_TEST_BIN) $(BENCH_GPU_BIN) $(BUILD)/tests/bench_gpu_ipc)
