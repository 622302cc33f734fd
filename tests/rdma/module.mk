# tests/rdma/: the real daemon and the real client over RDMA, in a guest that has Soft-RoCE (run-in-vm.sh), and their faults.
RDMA_PEER := $(BUILD)/tests/rdma-peer
$(BUILD)/obj/tests/rdma/%.o: DEPS_CFLAGS = $(call cflags_of,libibverbs)
$(RDMA_PEER): $(BUILD)/obj/tests/rdma/peer.o
	@mkdir -p $(@D)
	$(call say,LD ,$@)
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(call libs_of,libibverbs)

RDMA_UNIT := $(BUILD)/tests/rdma-unit
RDMA_UNIT_OBJ := $(patsubst %.c,$(BUILD)/obj/%.o,$(wildcard tests/rdma/unit_*.c))
$(RDMA_UNIT_OBJ): DEPS_CFLAGS = $(UNIT_CPPFLAGS) $(call cflags_of,$(TEST_PC))
$(RDMA_UNIT): $(RDMA_UNIT_OBJ) $(UNIT_RUNNER) $(DAEMON_LIB) $(KERNELS_LIB)
	@mkdir -p $(@D)
	$(call say,LD ,$@)
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(TEST_LIBS)

.PHONY: test-rdma test-rdma-run
## test-rdma: put, get, fold and faults over RDMA, in a guest; downloads a kernel once (70 MB, kept in BKV_VM_CACHE)
test-rdma: setup
	@$(MAKE) --no-print-directory test-rdma-run
test-rdma-run: all $(RDMA_PEER) $(RDMA_UNIT)
	@BUILD=$(BUILD) PYTHON=$(PYTHON) tests/run.sh rdma
