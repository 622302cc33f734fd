# daemon/: balancekvd, an archive of everything but main.c (so that tests link it) plus main.c.
DAEMON_PC := grpc libprotobuf-c libuv inih libsystemd libcrypto libxxhash libibverbs
DAEMON_SRC := $(filter-out daemon/main.c,$(wildcard daemon/*.c daemon/*/*.c daemon/*/*/*.c))
DAEMON_OBJ := $(DAEMON_SRC:%.c=$(BUILD)/obj/%.o)
DAEMON_LIB := $(BUILD)/lib/libbkvdaemon.a
DAEMON_LIBS = $(call libs_of,$(DAEMON_PC)) -lm

$(BUILD)/obj/daemon/%.o: DEPS_CFLAGS = $(call cflags_of,$(DAEMON_PC))
$(DAEMON_OBJ) $(BUILD)/obj/daemon/main.o: | $(PROTO_HDR)
$(DAEMON_LIB): $(DAEMON_OBJ) $(PROTO_OBJ)
	@mkdir -p $(@D)
	@rm -f $@
	$(call say,AR ,$@)
	$(Q)$(AR) rcs $@ $^

.PHONY: daemon
## daemon: build/bin/balancekvd
daemon: $(BUILD)/bin/balancekvd
$(BUILD)/bin/balancekvd: $(BUILD)/obj/daemon/main.o $(DAEMON_LIB) $(KERNELS_LIB)
	@mkdir -p $(@D)
	$(call say,LD ,$@)
	$(Q)$(CC) $(LDFLAGS) -o $@ $^ $(DAEMON_LIBS)
