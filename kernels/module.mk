# kernels/: needs a C compiler only; seal.c also libxxhash, and is left out where that is missing (GPU hosts).
HAVE_XXHASH := $(shell pkg-config --exists libxxhash 2>/dev/null && echo yes)
KERNELS_SRC := $(filter-out $(if $(HAVE_XXHASH),,kernels/seal.c),$(wildcard kernels/*.c))
KERNELS_OBJ := $(KERNELS_SRC:%.c=$(BUILD)/obj/%.o)
KERNELS_LIB := $(BUILD)/lib/libbkvkernels.a
KERNELS_LIBS = -lm $(if $(HAVE_XXHASH),$(call libs_of,libxxhash))

# Kernels are arithmetic: -O3, and no errno from math functions, so that loops vectorise. Results stay deterministic: no -ffast-math.
$(BUILD)/obj/kernels/%.o: FILE_CFLAGS = -O3 -fno-math-errno -fno-trapping-math -ffp-contract=off

.PHONY: kernels
## kernels: the kernel library alone (no gRPC needed)
kernels: $(KERNELS_LIB) cuda-note
$(KERNELS_LIB): $(KERNELS_OBJ)
	@mkdir -p $(@D)
	@rm -f $@
	$(call say,AR ,$@)
	$(Q)$(AR) rcs $@ $^

.PHONY: cuda-note
cuda-note:
	@command -v nvcc >/dev/null 2>&1 || echo "note: nvcc not found, CUDA is left out; everything else works"
