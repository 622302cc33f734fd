# tests/gpu/: tests of the CUDA kernels that need nvcc, gcc and make alone; they say aloud when there is no device.
GPU_TEST_SRC := $(wildcard tests/gpu/test_*.c)
GPU_TEST_BIN := $(GPU_TEST_SRC:tests/gpu/%.c=$(BUILD)/tests/gpu-%)
GPU_OBJ := $(patsubst %.c,$(BUILD)/obj/%.o,$(wildcard tests/gpu/*.c tests/bench/bench_gpu*.c))
$(GPU_OBJ): DEPS_CFLAGS =
$(BUILD)/tests/gpu-%: $(BUILD)/obj/tests/gpu/%.o $(BUILD)/obj/tests/gpu/support.o $(KERNELS_LIB)
	@mkdir -p $(@D)
	$(call say,LD ,$@)
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(KERNELS_LIBS)

.PHONY: test-gpu bench-gpu
## test-gpu: the CUDA kernels against ref and float64, on a machine with a GPU
test-gpu: $(GPU_TEST_BIN)
	@for t in $^; do echo "$$t"; $$t || exit 1; done

BENCH_GPU_BIN := $(patsubst tests/bench/%.c,$(BUILD)/tests/%,$(wildcard tests/bench/bench_gpu*.c))
$(BUILD)/tests/bench_gpu%: $(BUILD)/obj/tests/bench/bench_gpu%.o $(BUILD)/obj/tests/bench/report.o $(KERNELS_LIB)
	@mkdir -p $(@D)
	$(call say,LD ,$@)
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(KERNELS_LIBS)
## bench-gpu: CUDA kernels against the memory and PyTorch of the same GPU; writes build/bench/gpu*.json
bench-gpu: $(BENCH_GPU_BIN)
	@mkdir -p $(BUILD)/bench
	@for t in $^; do $$t --out $(BUILD)/bench/$${t##*/bench_}.json || exit 1; done
