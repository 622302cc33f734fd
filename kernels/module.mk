# kernels/: needs a C compiler only; seal.c also libxxhash, and is left out where that is missing (GPU hosts).
HAVE_XXHASH := $(shell pkg-config --exists libxxhash 2>/dev/null && echo yes)
KERNELS_SRC := $(filter-out $(if $(HAVE_XXHASH),,kernels/seal.c),$(wildcard kernels/*.c kernels/cpu/*.c kernels/cuda/*.c))

# CUDA: cuda/*.cu where there is nvcc, cuda/absent*.c elsewhere and in sanitizer builds. `make NVCC=` leaves it out too.
ifeq ($(origin NVCC),undefined)
NVCC := $(if $(SAN),,$(shell command -v nvcc 2>/dev/null || ls /usr/local/cuda/bin/nvcc 2>/dev/null))
endif
CUDA_SRC := $(if $(NVCC),$(wildcard kernels/cuda/*.cu))
CUDA_OBJ := $(CUDA_SRC:%.cu=$(BUILD)/obj/%.cu.o)
CUDA_ALL := $(if $(NVCC),$(BUILD)/obj/kernels/cuda_all.o)
CUDA_HOME = $(patsubst %/bin/nvcc,%,$(realpath $(NVCC)))
CUDA_RUNTIME = $(firstword $(wildcard $(CUDA_HOME)/lib64/libcudart_static.a $(CUDA_HOME)/targets/x86_64-linux/lib/libcudart_static.a \
  /usr/lib/x86_64-linux-gnu/libcudart_static.a))
CUDA_ARCH ?= -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=[sm_90,compute_90]
NVCC_FLAGS = -std=c++17 -O3 -Ikernels $(CUDA_ARCH) -Werror all-warnings \
  -Xcompiler -fPIC,-fno-exceptions,-fno-rtti,-fno-threadsafe-statics,-fvisibility=hidden,-Wall,-Wextra,-Werror

KERNELS_OBJ := $(patsubst %.c,$(BUILD)/obj/%.o,$(if $(NVCC),$(filter-out kernels/cuda/absent%.c,$(KERNELS_SRC)),$(KERNELS_SRC))) $(CUDA_ALL)
KERNELS_LIB := $(BUILD)/lib/libbkvkernels.a
KERNELS_LIBS = -lm $(if $(HAVE_XXHASH),$(call libs_of,libxxhash))

# Kernels are arithmetic: -O3, and no errno from math functions, so that loops vectorise. Results stay deterministic: no -ffast-math.
# A file named for an instruction set is compiled for it, and the library runs it only where cpu.c finds that.
ISA_avx2 := -mavx2 -mfma -mf16c
ISA_avx512 := $(ISA_avx2) -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx512vnni -mprefer-vector-width=512
ISA_amx := $(ISA_avx512) -mavx512bf16 -mamx-tile -mamx-bf16 -mamx-int8
isa_flags = $(if $(filter x86_64,$(MACHINE)),$(ISA_$(lastword $(subst _, ,$(1)))))
MACHINE := $(firstword $(subst -, ,$(shell $(CC) -dumpmachine)))
$(BUILD)/obj/kernels/%.o: FILE_CFLAGS = -O3 -fno-math-errno -fno-trapping-math -ffp-contract=off $(call isa_flags,$(*F))

.PHONY: kernels
## kernels: the kernel library alone (no gRPC needed)
kernels: $(KERNELS_LIB) cuda-note
$(KERNELS_LIB): $(KERNELS_OBJ)
	@mkdir -p $(@D)
	@rm -f $@
	$(call say,AR ,$@)
	$(Q)$(AR) rcs $@ $^

$(BUILD)/obj/kernels/%.cu.o: kernels/%.cu
	$(call say,NVCC,$<)
	@mkdir -p $(@D)
	$(Q)$(NVCC) $(NVCC_FLAGS) -MMD -MF $(@:.o=.d) -c $< -o $@
# One object with the CUDA runtime inside, so that whoever links the kernels needs to know nothing of CUDA. The runtime finds
# the driver by dlopen: the same binary runs where there is none.
$(CUDA_ALL): $(CUDA_OBJ)
	$(call say,LD ,$@)
	$(Q)$(LD) -r -o $@ $^ $(CUDA_RUNTIME)

.PHONY: cuda-note
cuda-note:
	@$(if $(NVCC),true,echo "note: CUDA is left out$(if $(SAN), of sanitizer builds,: no nvcc); everything else works")
