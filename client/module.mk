# client/: libbalancekv (the C API plus kernels/) and bkv (the command line).
CLIENT_PC := grpc libprotobuf-c libcrypto libxxhash libibverbs
BKV_PC := jansson
BKV_SRC := $(wildcard client/bkv/*.c)
CLIENT_SRC := $(wildcard client/*.c) $(foreach room,operations endpoints memory device,$(wildcard client/$(room)/*.c))
CLIENT_OBJ := $(CLIENT_SRC:%.c=$(BUILD)/obj/%.o)
BKV_OBJ := $(BKV_SRC:%.c=$(BUILD)/obj/%.o)
SOVERSION := 0
CLIENT_SO := $(BUILD)/lib/libbalancekv.so.$(VERSION)
PUBLIC_HEADERS := client/balancekv.h client/bkv_device.h kernels/cuda/bkv_cuda.h kernels/codec.h kernels/cool.h kernels/seal.h kernels/status.h kernels/summary.h

$(BUILD)/obj/client/%.o: DEPS_CFLAGS = $(call cflags_of,$(CLIENT_PC) $(BKV_PC))
$(CLIENT_OBJ): | $(PROTO_HDR)
$(CLIENT_SO): $(CLIENT_OBJ) $(PROTO_OBJ) $(KERNELS_OBJ) client/libbalancekv.map
	@mkdir -p $(@D)
	$(call say,LD ,$@)
	$(Q)$(CC) $(filter-out -pie,$(LDFLAGS)) -shared -Wl,-soname,libbalancekv.so.$(SOVERSION) -Wl,--version-script=client/libbalancekv.map -Wl,-z,nodelete \
	  -o $@ $(filter %.o,$^) $(call libs_of,$(CLIENT_PC)) -lm
$(BUILD)/lib/libbalancekv.so: $(CLIENT_SO)
	@ln -sf libbalancekv.so.$(VERSION) $(BUILD)/lib/libbalancekv.so.$(SOVERSION)
	@ln -sf libbalancekv.so.$(SOVERSION) $@

# bkv finds the library beside itself in the build tree and by the usual path once installed.
$(BUILD)/bin/bkv: $(BKV_OBJ) $(BUILD)/lib/libbalancekv.so
	@mkdir -p $(@D)
	$(call say,LD ,$@)
	$(Q)$(CC) $(LDFLAGS) -o $@ $(BKV_OBJ) -L$(BUILD)/lib -lbalancekv '-Wl,-rpath,$$ORIGIN/../lib' $(call libs_of,$(BKV_PC)) -lm

# Examples see only what an application does: the public headers and the library.
$(BUILD)/examples/%: client/examples/%.c $(BUILD)/lib/libbalancekv.so
	@mkdir -p $(@D)
	$(CC) -std=c11 $(WARN) $(OPT) $(SAN) -Iclient -Ikernels -o $@ $< -L$(BUILD)/lib -lbalancekv '-Wl,-rpath,$$ORIGIN/../lib' -lm

$(BUILD)/lib/pkgconfig/balancekv.pc: client/balancekv.pc.in
	@mkdir -p $(@D)
	@sed -e 's|@PREFIX@|$(PREFIX)|g' -e 's|@VERSION@|$(VERSION)|g' $< >$@

.PHONY: client
## client: build/bin/bkv and build/lib/libbalancekv.so
client: $(BUILD)/bin/bkv $(BUILD)/lib/libbalancekv.so $(BUILD)/lib/pkgconfig/balancekv.pc $(BUILD)/examples/put_get $(BUILD)/examples/shared_buffer
