# proto/: protobuf-c code made from the .proto files, never committed, and what both ends share: gRPC calls, RDMA, placement, TLS files.
PROTO_SRC := $(wildcard proto/*.proto)
PROTO_GEN := $(PROTO_SRC:proto/%.proto=$(BUILD)/proto/%.pb-c.c)
BOTH_SRC := $(wildcard proto/*.c)
BOTH_OBJ := $(BOTH_SRC:%.c=$(BUILD)/obj/%.o)
PROTO_OBJ := $(PROTO_GEN:.c=.o) $(BOTH_OBJ)
PROTO_HDR := $(PROTO_GEN:.c=.h)

$(BOTH_OBJ): DEPS_CFLAGS = $(call cflags_of,grpc libprotobuf-c libcrypto libibverbs libxxhash)
$(BOTH_OBJ): | $(PROTO_HDR)

$(BUILD)/proto/%.pb-c.c $(BUILD)/proto/%.pb-c.h &: proto/%.proto
	@mkdir -p $(@D)
	$(call say,PB ,$<)
	$(Q)protoc -Iproto --c_out=$(BUILD)/proto $<
$(BUILD)/proto/%.pb-c.o: $(BUILD)/proto/%.pb-c.c
	$(call say,CC ,$<)
	$(Q)$(CC) $(CSTD) $(OPT) $(SAN) -fPIC -fvisibility=hidden -c $< -o $@
