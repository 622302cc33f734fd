# proto/: protobuf-c code made from the .proto files, never committed.
PROTO_SRC := $(wildcard proto/*.proto)
PROTO_GEN := $(PROTO_SRC:proto/%.proto=$(BUILD)/proto/%.pb-c.c)
PROTO_OBJ := $(PROTO_GEN:.c=.o)
PROTO_HDR := $(PROTO_GEN:.c=.h)

$(BUILD)/proto/%.pb-c.c $(BUILD)/proto/%.pb-c.h &: proto/%.proto
	@mkdir -p $(@D)
	$(call say,PB ,$<)
	$(Q)protoc -Iproto --c_out=$(BUILD)/proto $<
$(BUILD)/proto/%.pb-c.o: $(BUILD)/proto/%.pb-c.c
	$(call say,CC ,$<)
	$(Q)$(CC) $(CSTD) $(OPT) $(SAN) -fPIC -fvisibility=hidden -c $< -o $@
